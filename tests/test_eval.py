"""eval.py: scores by hand, intervals and tests against scipy, the table."""

import json
import re

import numpy as np
import pytest
from conftest import shared_data
from scipy import stats

import data
import eval as evaluation
from common import files
from common.errors import InputError
from common.template import fill


def sample(text, golds=("Paris",), mode="on", finish="stop", name="q", draw=0, question="capital of France?"):
    row = {"id": name, "mode": mode, "draw": draw, "question": question, "answers": list(golds), "prompt": ""}
    return row | {"text": text, "finish": finish, "ids": []}


def think(thought, answer):
    return f"<think>{thought}</think>\n\n<answer>{answer}</answer>"


# ---------- one sample


@pytest.mark.parametrize(
    ("text", "finish", "em_t", "word", "equal", "contains", "form"),
    [
        (think("Paris?", "Paris"), "stop", 1, 1, 1, 1, "ok"),
        (think("Parisian", "the paris!"), "stop", 1, 0, 1, 1, "ok"),
        (think("Lyon", "not Paris"), "stop", 0, 0, 0, 1, "ok"),
        ("<think>Paris, I am sure it is Paris", "length", 1, 1, 0, 0, "truncated"),
        ("<think>Paris, I am sure it is Paris", "stop", 0, 0, 0, 0, "no_thought"),  # it ended by itself
        ("Paris", "stop", 0, 0, 0, 0, "no_thought"),  # never thought: nothing of it is an answer
        ("<think>x</think><answer>your answer</answer>", "stop", 0, 0, 0, 0, "empty"),
        ("<think>x</think>Paris", "length", 0, 0, 0, 0, "truncated"),
        ("<think>x</think><answer>Paris</answer> since", "length", 0, 0, 1, 1, "truncated"),
        ("<think>x</think><answer></answer>", "stop", 0, 0, 0, 0, "empty"),
        ("<think> </think>Paris", "stop", 0, 0, 1, 1, "empty"),
        ("x</think>Paris", "stop", 0, 0, 1, 1, "malformed"),
        ("<think>x</think><answer>Paris", "stop", 0, 0, 1, 1, "malformed"),
    ],
)
def test_scores_by_hand(text, finish, em_t, word, equal, contains, form):
    got = evaluation.score(sample(text, finish=finish))
    names = ("em_t", "em_t_word", "em_a_equal", "em_a_contains", "form", "truncated")
    assert [got[n] for n in names] == [em_t, word, equal, contains, form, form == "truncated"]


def test_thinking_off_and_several_golds():
    got = evaluation.score(sample("Mark Twain.", ["Samuel Clemens", "Mark Twain"], mode="off"))
    assert (got["em_a_equal"], got["em_t"], got["form"], got["n_think_tokens"]) == (True, False, "ok", None)
    assert evaluation.score(sample("x", ["France"], mode="off"))["gold_in_question"]
    assert not evaluation.score(sample("A+", ["A+"], mode="off"))["em_a_contains"]
    with pytest.raises(InputError, match="field 'finish' is missing in a row of id 'q'"):
        evaluation.score({k: v for k, v in sample("x").items() if k != "finish"})


def test_thinking_tokens_are_those_of_the_sampled_ids(tiny_tokenizer):
    text = think("\nIs it Paris?\n\nYes.\n", "Paris")
    ids = tiny_tokenizer.encode(text + "<|im_end|>").ids
    got = evaluation.score(sample(text) | {"ids": ids}, tiny_tokenizer)
    assert got["n_think_tokens"] == len(tiny_tokenizer.encode("\nIs it Paris?\n\nYes.\n").ids)
    cut = evaluation.score(sample("<think>Is it", finish="length") | {"ids": ids[:5]}, tiny_tokenizer)
    assert cut["n_think_tokens"] == 4  # all but <think>
    assert evaluation.score(sample("Paris", mode="off") | {"ids": ids}, tiny_tokenizer)["n_think_tokens"] == 0


@pytest.mark.long
def test_every_gold_of_natural_questions_scores_itself_in_both_modes():
    rows = files.read_jsonl(shared_data() / "nq_open" / "NQ-open.dev.jsonl")
    scored = [
        evaluation.score(sample(think(f"so {gold} then", gold), row["answer"], name=f"{k}/{j}"))
        for k, row in enumerate(rows)
        for j, gold in enumerate(row["answer"])
        if gold.strip()
    ]
    figures = evaluation.metrics(scored)
    missed = figures["n"] - figures["acc"]["k"]
    assert figures["acc"]["k"] == figures["em_answer_exact"]["k"] and missed == 4  # those that normalise to nothing
    assert figures["mis"]["k"] == 0 and figures["table"]["neither"] == 4


# ---------- a run


def rows(counts, mode="on"):
    """Scored rows from counts of (em_t, em_a_equal, em_a_contains)."""
    out = []
    for (t, equal, contains), n in counts.items():
        for _ in range(n):
            row = {
                "id": f"q{len(out)}",
                "mode": mode,
                "draw": 0,
                "outcome": "ok",
                "form": "ok",
                "n_think_tokens": len(out),
                "n_empty_golds": 0,
            }
            row |= {"em_t": t, "em_t_word": t, "em_a_equal": equal, "em_a_contains": contains, "gold_in_question": 0}
            row |= {"em_a_words": contains, "sentence": not equal}
            out.append(row)
    return out


def test_acc_and_mis_by_hand():
    scored = rows({(1, 1, 1): 5, (1, 0, 0): 3, (0, 1, 1): 2, (0, 0, 0): 6, (1, 0, 1): 4})
    got = evaluation.metrics(scored)
    assert got["table"] == {"thought_and_answer": 5, "thought_only": 7, "answer_only": 2, "neither": 6}
    assert (got["n"], got["acc"]["k"], got["acc"]["share"], got["mis"]["k"], got["mis"]["share"]) == (
        20,
        5,
        0.25,
        9,
        0.45,
    )
    assert (got["em_thought_contains"]["k"], got["em_answer_exact"]["k"], got["em_answer_contains"]["k"]) == (12, 7, 11)
    assert (got["think_tokens_mean"], got["think_tokens_median"]) == (9.5, 9.5)
    got = evaluation.metrics(scored, "contains")
    assert got["table"] == {"thought_and_answer": 9, "thought_only": 3, "answer_only": 2, "neither": 6}
    assert (got["acc"]["k"], got["mis"]["k"]) == (9, 5)
    assert json.loads(json.dumps(got)) == got


def test_thinking_off_has_acc_alone():
    got = evaluation.metrics(rows({(0, 1, 1): 3, (0, 0, 1): 1}, mode="off"))
    assert (got["acc"]["k"], got["acc"]["n"]) == (3, 4)
    assert got["mis"] is got["table"] is got["em_thought_contains"] is got["think_tokens_mean"] is None
    with pytest.raises(AssertionError):
        evaluation.indicator(rows({(0, 1, 1): 1}, mode="off"), "mis")


def test_shares_of_forms_add_up():
    texts = [think("a", "b"), "<think>a", "<think>a</think>", "<think> </think>b", think("a", "b") + " c", "a</think>b"]
    scored = [evaluation.score(sample(t, name=str(k))) for k, t in enumerate(texts)]
    got = evaluation.metrics(scored)
    assert [got[f]["k"] for f in evaluation.FORMS] == [1, 0, 1, 2, 2]
    assert got["mis"]["k"] == 0  # the golden answer is in the thought of none
    assert got["outcomes"] == {"empty": 2, "no_thought": 1, "no_open": 1, "ok": 1, "trailing": 1}
    assert got["think_tokens_mean"] is None  # no tokenizer was given


def test_runs_that_cannot_be_scored():
    with pytest.raises(InputError, match="the test set is empty"):
        evaluation.metrics([])
    with pytest.raises(InputError, match="on and off are mixed"):
        evaluation.metrics(rows({(1, 1, 1): 1}) + rows({(1, 1, 1): 1}, mode="off"))
    with pytest.raises(InputError, match="draw 0 of 'q0' is scored twice"):
        evaluation.metrics(rows({(1, 1, 1): 1}) * 2)


# ---------- intervals and tests


def test_wilson_equals_scipy():
    for n in (1, 2, 7, 100, 3610):
        for k in {0, 1, n // 3, n - 1, n} & set(range(n + 1)):
            expected = stats.binomtest(k, n).proportion_ci(method="wilson")
            assert evaluation.wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert evaluation.wilson(1231, 3610) == pytest.approx((0.3257, 0.3566), abs=5e-5)  # 34.10 % of NQ-Open's test set


def test_mcnemar_equals_scipy():
    rng = np.random.default_rng(0)
    for n in (1, 5, 30, 400):
        a, b = ({str(i): int(x) for i, x in enumerate(rng.random(n) < p)} for p in (0.6, 0.5))
        wins, losses = (sum(x[i] > y[i] for i in a) for x, y in ((a, b), (b, a)))
        expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert evaluation.mcnemar(a, b) == pytest.approx(expected, rel=1e-9)
        assert evaluation.mcnemar(a, b) == evaluation.mcnemar(b, a)
    assert evaluation.mcnemar({"x": 1}, {"x": 1}) == 1.0
    many = {str(i): i % 2 for i in range(4000)}
    assert evaluation.mcnemar(many, {k: 1 - v for k, v in many.items()}) == 1.0
    assert evaluation.mcnemar(dict.fromkeys(many, 1), dict.fromkeys(many, 0)) == 0.0  # 2**-3999 has no float


def test_bootstrap_equals_scipy_and_the_normal_interval():
    rng = np.random.default_rng(1)
    a, b = ((rng.random(400) < p).astype(float) for p in (0.6, 0.5))
    named = [{str(i): x for i, x in enumerate(values)} for values in (a, b)]
    difference, low, high = evaluation.paired_bootstrap(*named)
    assert difference == pytest.approx((a - b).mean(), abs=1e-12)
    theirs = stats.bootstrap((a - b,), np.mean, n_resamples=10_000, method="percentile", rng=rng).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.005)
    half = 1.96 * (a - b).std(ddof=1) / 20
    assert (low, high) == pytest.approx((difference - half, difference + half), abs=0.005)
    assert evaluation.paired_bootstrap(*named) == (difference, low, high)
    few = [evaluation.paired_bootstrap(*named, n_boot=20, seed=k) for k in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    swapped = evaluation.paired_bootstrap(*named[::-1])
    assert swapped == pytest.approx((-difference, -high, -low), abs=1e-12)


def test_bootstrap_pairs_by_id_not_by_order():
    a, b = {"x": 1.0, "y": 0.0, "z": 1.0}, {"z": 1.0, "x": 1.0, "y": 0.0}
    assert evaluation.paired_bootstrap(a, b) == (0.0, 0.0, 0.0)
    with pytest.raises(InputError, match="'w' was scored in one run only"):
        evaluation.paired_bootstrap(a, b | {"w": 1.0})
    with pytest.raises(InputError, match="nothing to compare"):
        evaluation.paired_bootstrap({}, {})


def test_bootstrap_by_cluster():
    rng = np.random.default_rng(2)
    facts = rng.integers(-1, 2, 100).astype(float)
    a = {f"{f}/{k}": x for f, x in enumerate(facts) for k in range(4)}  # four questions a fact, all alike
    zero, cluster = dict.fromkeys(a, 0.0), {i: i.split("/")[0] for i in a}
    _, low, high = evaluation.paired_bootstrap(a, zero, cluster)
    half = 1.96 * facts.std(ddof=1) / 10  # 100 independent facts, not 400 questions
    assert (low, high) == pytest.approx((facts.mean() - half, facts.mean() + half), abs=0.015)
    _, naive_low, naive_high = evaluation.paired_bootstrap(a, zero)
    assert (high - low) / (naive_high - naive_low) == pytest.approx(2.0, abs=0.1)
    own = evaluation.paired_bootstrap(a, zero, {i: i for i in a})
    assert own == evaluation.paired_bootstrap(a, zero)
    # Clusters of unequal size: the mean is over questions, as in the estimate itself.
    uneven = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0}
    got = evaluation.paired_bootstrap(uneven, dict.fromkeys(uneven, 0.0), dict(a=0, b=0, c=0, d=1))
    assert got == (0.75, 0.0, 1.0)
    with pytest.raises(InputError, match="'a' belongs to no cluster"):
        evaluation.paired_bootstrap(uneven, uneven, {})


def test_two_runs_compared():
    a = rows({(1, 1, 1): 8, (1, 0, 0): 2})
    b = rows({(1, 1, 1): 3, (1, 0, 0): 5, (0, 0, 0): 2})
    got = evaluation.compare(a, b)
    assert got["acc"]["difference"] == pytest.approx(0.5) and got["mis"]["difference"] == pytest.approx(-0.3)
    assert got["acc"]["p"] == pytest.approx(stats.binomtest(5, 5).pvalue)  # five pairs differ, all one way
    assert got["mis"]["p"] == pytest.approx(stats.binomtest(2, 7).pvalue)  # rows 3-7 one way, rows 8-9 the other
    assert 0 < got["acc"]["low"] < 0.5 < got["acc"]["high"] < 1
    off = rows({(0, 1, 1): 10}, mode="off")
    assert list(evaluation.compare(a, off)) == ["acc"]
    assert evaluation.compare(a, off)["acc"]["difference"] == pytest.approx(-0.2)
    assert evaluation.compare(a, b, cluster={r["id"]: 0 for r in a})["acc"]["p"] is None
    draws = [r | {"id": f"q{k // 2}", "draw": k % 2} for k, r in enumerate(a)]  # two draws of five questions
    other = [r | {"id": f"q{k // 2}", "draw": k % 2} for k, r in enumerate(b)]
    got = evaluation.compare(draws, other)["acc"]
    assert got["difference"] == pytest.approx(0.5) and got["p"] is None
    with pytest.raises(InputError, match="scored in one run only"):
        evaluation.compare(a, b[:-1])


# ---------- several draws, pitfalls


def test_draws_are_pooled_and_a_question_counts_once_in_an_interval():
    once = rows({(1, 1, 1): 3, (1, 0, 0): 5, (0, 0, 0): 2})
    again = [r | {"draw": 1} for r in rows({(1, 1, 1): 5, (1, 0, 0): 3, (0, 0, 0): 2})]
    got = evaluation.metrics(once + again)
    assert (got["n"], got["questions"], got["acc"]["k"], got["acc"]["n"]) == (20, 10, 8, 20)
    expected = stats.binomtest(4, 10).proportion_ci(method="wilson")  # 4 of 10 questions, not 8 of 20
    assert (got["acc"]["low"], got["acc"]["high"]) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert got["draws"]["acc"] == {"mean": 0.4, "sd": pytest.approx(0.02**0.5), "all": [0.3, 0.5]}
    assert got["draws"]["mis"]["all"] == [0.5, 0.3]
    assert evaluation.metrics(once)["draws"]["acc"] == {"mean": 0.3, "sd": None, "all": [0.3]}
    text = evaluation.draws_table({"a": got, "b": evaluation.metrics(rows({(0, 1, 1): 1}, mode="off"))})
    assert text.splitlines()[2:] == [
        "| a   |     2 |  40.00 ± 14.14 |  40.00 ± 14.14 |",
        "| b   |     1 |     100.00 ± - |              - |",
    ]
    assert evaluation.draws_table({"a": evaluation.metrics(once)}) == ""


def test_gold_answers_that_normalise_to_nothing_are_counted():
    scored = [evaluation.score(sample("A+", ["A+", "---", "B"], mode="off"))]
    figures = evaluation.metrics(scored)
    assert figures["empty_golds"] == 2 and figures["acc"]["k"] == 0
    assert "2 gold answers normalise to nothing" in evaluation.warnings(figures)[0]


def test_a_truncated_share_above_one_percent_is_said():
    texts = [think("Paris", "Paris")] * 98
    done = [evaluation.score(sample(t, name=str(k))) for k, t in enumerate(texts)]
    cut = [evaluation.score(sample("<think>Paris", name=f"cut{k}", finish="length")) for k in range(2)]
    assert evaluation.warnings(evaluation.metrics(done)) == []
    one = evaluation.metrics(done + [done[0] | {"id": "98"}] + cut[:1])
    assert one["truncated"]["share"] == 0.01 and evaluation.warnings(one) == []  # above 1 %, not at it
    assert "2.0 % of the completions are truncated" in evaluation.warnings(evaluation.metrics(done + cut))[0]


def test_braces_in_a_question_are_text():
    assert fill("Q: {question}\nA: {answer}", question="{answer}", answer="{question}") == "Q: {answer}\nA: {question}"


def test_substring_and_word_containment_differ_where_they_should():
    got = evaluation.score(sample(think("the several eras", "x"), ["era", "AI"]))
    assert (got["em_t"], got["em_t_word"]) == (True, False)
    got = evaluation.score(sample(think("not Mark Twain", "not Mark Twain"), ["Mark Twain"]))
    assert (got["em_a_equal"], got["em_a_contains"]) == (False, True)


# ---------- the command line


def test_saved_samples_are_scored_again_and_exported(tmp_path, capsys):
    one = [sample(think("Paris", "Paris"), name=str(k)) for k in range(3)] + [sample(think("Paris", "Rome"), name="3")]
    two = [sample(think("Paris", "Rome"), name=str(k)) for k in range(4)]
    paths = [str(tmp_path / name / "nq.jsonl") for name in ("a", "b")]
    for path, of in zip(paths, (one, two), strict=True):
        files.write_jsonl(path, of)
    out = tmp_path / "lm.jsonl"
    assert evaluation.main([*paths, "--export-lm-eval", str(out)]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "a/nq" in line)
    assert " 75.0 [" in row and " 3/4 " in row
    assert "acc: +75.00 [" in printed and "McNemar p 0.25" in printed  # three pairs differ, all one way: 2 / 2^3
    exported = files.read_jsonl(out, ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "exact_match"))
    assert [r["exact_match"] for r in exported] == [1.0, 1.0, 1.0, 0.0]
    assert exported[3]["filtered_resps"] == ["Rome"] and exported[3]["resps"] == [[one[3]["text"]]]
    assert evaluation.main([str(tmp_path / "absent.jsonl")]) == 3


# ---------- the table


def test_table():
    on = evaluation.metrics(rows({(1, 1, 1): 5, (1, 0, 0): 3, (0, 1, 1): 2, (0, 0, 0): 6, (1, 0, 1): 4}))
    off = evaluation.metrics(rows({(0, 1, 1): 3, (0, 0, 1): 1}, mode="off"))
    text = evaluation.table({"ThinkOff": off, "MR-ALIGN": on})
    lines = text.splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0][1] == "Acc equal (95 %)"
    assert cells[2][0] == "ThinkOff" and cells[2][2:5] == ["3/4", "-", "-"] and cells[2][8] == "-"
    low, high = (100 * x for x in stats.binomtest(5, 20).proportion_ci(method="wilson"))
    assert cells[3][:3] == ["MR-ALIGN", f"25.0 [{low:.1f}, {high:.1f}]", "5/20"]
    assert cells[3][4:] == ["9/20", "35.0", "55.0", "55.0", "60.0", "60.0", "65.0", "100.0", "0.0", "0.0", "0.0", "10"]
    assert all(re.fullmatch(r"-+:?", c) for c in cells[1])
    with pytest.raises(AssertionError):
        evaluation.table({"a": on, "b": evaluation.metrics(rows({(1, 1, 1): 1}), "contains")})


def test_every_matcher_of_data_is_a_column_and_a_headline():
    scored = [
        evaluation.score(sample(think("x", "It is Parisian"))),
        evaluation.score(sample(think("x", "a Paris x"), name="r")),
    ]
    found = {m: evaluation.indicator(scored, "mis", m).tolist() for m in data.MATCHERS}
    nothing = {"verifier": [False, False]}  # neither answer has a value
    assert found == {"equal": [False, False], "contains": [True, True], "words": [False, True]} | nothing
    assert [evaluation.metrics(scored, m)["mis"]["k"] for m in data.MATCHERS] == [0, 2, 1, 0]
    other = [evaluation.score(sample(think("x", "Rome"), name=name)) for name in ("q", "r")]
    assert [evaluation.compare(scored, other, m)["mis"]["difference"] for m in data.MATCHERS] == [0, 1, 0.5, 0]


def test_a_completion_without_a_thought_is_counted_by_itself_and_no_part_of_mis():
    texts = [think("Paris", "Paris"), "It is Paris.", "<think>It must be Paris"]
    got = evaluation.metrics([evaluation.score(sample(t, name=str(k))) for k, t in enumerate(texts)])
    assert (got["acc"]["k"], got["mis"]["k"], got["no_thought"]["k"], got["truncated"]["k"]) == (1, 0, 2, 0)
    assert "66.7 % of the completions are no thought" in evaluation.warnings(got)[0]


def test_sentences_and_folded_golds():
    answers = ["Paris", "The capital is Paris.", "Paris, France.", "It is **Paris, in France.**", "U.S."]
    scored = [evaluation.score(sample(think("x", a), name=str(k))) for k, a in enumerate(answers)]
    assert evaluation.metrics(scored)["sentences"]["k"] == 2
    plain, folded = (evaluation.score(sample(think("résumé", "résumé"), ["resume"]), fold=f) for f in (False, True))
    assert (plain["em_t"], plain["em_a_equal"], folded["em_t"], folded["em_a_equal"]) == (False, False, True, True)
