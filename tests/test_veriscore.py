"""VeriScore: claims, evidence and F1@K worked by hand, and the published row format."""

import threading

import pytest

from common.errors import InputError
from common.files import read_jsonl, write_jsonl
from llm import judge, veriscore

STOP = threading.Event


def test_sentences():
    text = (
        "Dr. J. Smith was born in 1950. He wrote 3.5 books, e.g. Novels!  Did he?\n"
        '1. **Life**: he lived in the U.S. Army.\n2. Death\n- "Yes." He said so.\n---\n'
    )
    assert veriscore.sentences(text) == [
        "Dr. J. Smith was born in 1950.",
        "He wrote 3.5 books, e.g. Novels!",
        "Did he?",
        "1. **Life**: he lived in the U.S. Army.",
        "2. Death",
        '- "Yes."',
        "He said so.",
    ]


@pytest.mark.parametrize(
    ("supported", "claims", "k", "f1"),
    [
        (0, 5, 3, 0.0),
        (0, 0, 3, 0.0),
        (3, 3, 3, 1.0),
        (6, 6, 3, 1.0),
        (3, 4, 6, 2 * 0.75 * 0.5 / 1.25),
        (1, 1, 2, 2 / 3),
    ],
)
def test_f1_by_hand(supported, claims, k, f1):
    assert veriscore.f1_at_k(supported, claims, k) == pytest.approx(f1)


def test_k_is_the_upper_median_of_answers_with_claims():
    rows = [{"all_claims": ["c"] * n} for n in (0, 1, 2, 8, 9, 0)]
    assert veriscore.median_claims(rows) == 8  # of 1, 2, 8, 9
    assert veriscore.median_claims(rows[:3]) == 2
    assert veriscore.median_claims([{"all_claims": []}]) == 1


# Rows as VeriScore's programs write them (github.com/Yixiao-Song/VeriScore: extract_claims.py, retrieve_evidence.py,
# verify_claims.py), field by field and in their order; the texts are ours.


def extracted(claims, question="What is Mercury?", model="gpt-4o"):
    row = {"question": question, "prompt_source": "FreshQA", "response": " ".join(claims) or "I like it."}
    row |= {"prompt_tok_cnt": 5, "response_tok_cnt": 9, "model": model, "abstained": False}
    return row | {"claim_list": [[c] for c in claims] + [[None]], "all_claims": claims}


def abstained(model="gpt-4o"):
    row = {"question": "What is Mercury?", "response": "Sorry, I can't do that.", "abstained": True}
    return row | {"prompt_source": "FreshQA", "model": model}


def published(claims, labels, **more):
    """A row of verification_*.jsonl."""
    row = extracted(claims, **more)
    row["claim_search_results"] = {c: [{"title": "t", "snippet": "s", "link": "l"}] for c in claims}
    shown = "Search result 1\nTitle: t\nLink: l\nContent: s\n\n"
    verdicts = zip(claims, labels, strict=True)
    row["claim_verification_result"] = [
        {"claim": c, "search_results": shown, "verification_result": label} for c, label in verdicts
    ]
    return row


def saved(rows, path):
    write_jsonl(path, rows)
    return veriscore.load(path)


def test_published_rows_score_as_by_hand(tmp_path):
    rows = [
        published(["a", "b", "c", "d"], ["supported", "unsupported", "supported", "supported"]),
        published(["a", "b"], ["contradicted", "inconclusive"]),
        published(["e", "f", "g"], ["supported"] * 3),
    ]
    loaded = saved(rows, tmp_path / "verification_x_3.jsonl")
    k = veriscore.median_claims(loaded)
    assert k == 3
    # S = 3 of 4: P .75, R 1; S = 0: 0; S = 3 of 3: 1
    expected = [2 * 0.75 / 1.75, 0.0, 1.0]
    assert [veriscore.score(r, k) for r in loaded] == pytest.approx(expected)
    got = veriscore.summary(loaded, k)
    assert got["f1"] == pytest.approx(sum(expected) / 3) and got["claims"] == 3
    assert got["precision"] == pytest.approx(6 / 9)
    assert (got["k"], got["answers"], got["abstained"], got["errors"]) == (3, 3, 0, 0)
    counted = saved([extracted(r["all_claims"]) for r in rows], tmp_path / "claims_x.jsonl")
    assert veriscore.summary(counted, k)["f1"] is None and veriscore.summary(counted, k)["claims"] == 3


def test_rows_without_claims_and_fields_of_each_of_its_programs_load(tmp_path):
    nothing = extracted(["No verifiable claim."]) | {"claim_search_results": []}
    of_readme = published(["a"], ["supported"])
    of_readme["claim_snippets_dict"] = of_readme.pop("claim_search_results")
    unread = published(["a", "b"], ["supported", None])
    no_all = {k: v for k, v in extracted(["a", "b"]).items() if k != "all_claims"}
    no_question = {k: v for k, v in extracted(["a"]).items() if k != "question"}
    rows = saved([abstained(), nothing, of_readme, unread, no_all, no_question], tmp_path / "a.jsonl")
    assert [r["all_claims"] for r in rows] == [[], [], ["a"], ["a", "b"], ["a", "b"], ["a"]]
    assert [r["claim_list"] for r in rows[:3]] == [[], [[], []], [["a"], []]]
    assert rows[2]["claim_search_results"] == {"a": [{"title": "t", "snippet": "s", "link": "l"}]}
    assert [r["errors"] for r in rows] == [0, 0, 0, 1, 0, 0]
    assert [veriscore.score(r, 2) for r in rows] == [0.0, 0.0, pytest.approx(2 / 3), 0.5, None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"abstained": "no"}, "'abstained' must be true or false"),
        ({"claim_list": ["a"]}, "'claim_list' must hold a list of claims"),
        ({"all_claims": "a"}, "'all_claims' must be a list of texts"),
        ({"all_claims": [1]}, "'all_claims' must be a list of texts"),
        ({"claim_search_results": ["x"]}, "'claim_search_results' must be an object"),
        ({"claim_verification_result": {"a": "supported"}}, "must be a list of verdicts"),
        ({"claim_verification_result": None}, "'claim_verification_result' is null"),
        (
            {"claim_verification_result": [{"verification_result": True}]},
            "a verification_result must be a text or null",
        ),
        ({"model": []}, "'model' must be a text"),
        ({"prompt_source": None}, "'prompt_source' must be a text"),
        ({"question": 3}, "'question' must be a text"),
        ({"id": {}}, "'id' must be a text"),
        ({"errors": None}, "'errors' must be a whole number"),
        ({"claim_verification_result": [{"verification_result": "supported"}] * 3}, "3 verdicts on 1 claims"),
    ],
)
def test_an_odd_row_is_named(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as caught:
        saved([published(["a"], ["supported"]), published(["a"], ["supported"]) | change], tmp_path / "a.jsonl")
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}:2: ") and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="neither 'all_claims' nor 'claim_list'"):
        saved([{"response": "a", "model": "m"}], tmp_path / "a.jsonl")


def their_scores(rows):
    """model -> F1@K, by the reading of verify_claims.py and utils.py, written down step by step."""
    counted = {}
    for row in rows:
        results, domain = row["claim_search_results"], row["prompt_source"]  # read before it looks at abstained
        if row["abstained"]:
            continue
        supported = (
            sum(v["verification_result"] == "supported" for v in row["claim_verification_result"]) if results else 0
        )
        triple = (supported, len(row["all_claims"]), len(row["claim_list"]))
        counted.setdefault((domain, row["model"]), []).append(triple)
    lengths = sorted(total for of in counted.values() for _, total, _ in of)
    k, scores = lengths[len(lengths) // 2], {}
    for (_, model), of in counted.items():
        pairs = [(s / total, min(s / k, 1)) for s, total, _ in of]
        scores[model] = sum(2 * p * r / (p + r) if r > 0 else 0 for p, r in pairs) / len(pairs)
    return scores


def test_our_rows_score_the_same_in_veriscores_own_way(tmp_path):
    """All answers have claims, or abstain: VeriScore leaves those out, here they count as 0."""
    verdict = {"Nala is a lion.": "supported", "Nala is a queen.": "unsupported"}
    who = judge.Judge(
        "scripted", lambda kind, of, messages: of["sentence"] if kind == "claims" else verdict[of["claim"]]
    )
    samples = [sample(a, str(k)) for k, a in enumerate(["Nala is a lion. Nala is a queen.", "Nala is a lion.", ""])]
    rows = veriscore.extract(samples, who, "ours", 1, STOP())
    results = {claim: [{"title": "t", "snippet": "s", "link": "l"}] for claim in verdict}
    write_jsonl(tmp_path / "ours.jsonl", veriscore.verify(rows, results, who, 1, STOP()))
    written = read_jsonl(tmp_path / "ours.jsonl")
    assert [list(r["claim_search_results"]) for r in written] == [list(verdict), ["Nala is a lion."], []]
    theirs = their_scores(written)["ours"]  # K = 2: 2 * .5 * .5 / 1 = .5 and 2 * 1 * .5 / 1.5 = 2/3
    assert theirs == pytest.approx((1 / 2 + 2 / 3) / 2)
    loaded = veriscore.load(tmp_path / "ours.jsonl")
    assert loaded == written
    assert veriscore.summary(loaded, veriscore.median_claims(loaded))["f1"] == pytest.approx(theirs * 2 / 3)


def test_the_command_line_scores_files_of_several_models(tmp_path, capsys):
    one = [published(["a", "b"], ["supported"] * 2, model="m|1"), abstained("m|1")]
    write_jsonl(tmp_path / "a.jsonl", one)
    write_jsonl(tmp_path / "b.jsonl", [published(["a", "b"], ["supported", "unsupported"], model="m2")])
    assert veriscore.main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [[cell for cell in line if cell != "|"] for line in lines] == [
        ["FreshQA", "m\\|1", "2", "2", "1.0", "0.500"],
        ["FreshQA", "m2", "1", "2", "2.0", "0.500"],
    ]
    assert veriscore.main([str(tmp_path / "none.jsonl")]) == 3


def sample(answer, name):
    row = {
        "id": name,
        "mode": "off",
        "draw": 0,
        "question": "Who is Nala?",
        "answers": [],
        "finish": "stop",
        "prompt": "",
    }
    return row | {"text": answer}


def test_from_answer_to_score_by_hand():
    """Two answers; one sentence repeats a claim, one reply is garbage twice, one verdict is garbage twice."""
    said = {
        "Nala is a lion.": "Nala is a lion.",
        "She is a queen, and a lion.": "Nala is a queen.\n- Nala is a lion.",
        "I like her.": "No verifiable claim.",
        "Rubbish.": "Claims:",
    }
    verdicts = {"Nala is a lion.": "supported", "Nala is a queen.": "perhaps"}
    seen = []

    def reply(kind, fields, messages):
        seen.append((kind, dict(fields)))
        return said[fields["sentence"]] if kind == "claims" else verdicts[fields["claim"]]

    who = judge.Judge("scripted", reply)
    samples = [sample("Nala is a lion. She is a queen, and a lion. I like her.", "1"), sample("Rubbish.", "2")]
    samples.append(sample("", "3"))
    rows = veriscore.extract(samples, who, "mralign", 1, STOP())
    assert rows[0]["all_claims"] == ["Nala is a lion.", "Nala is a queen."]
    assert rows[0]["claim_list"] == [["Nala is a lion."], ["Nala is a queen.", "Nala is a lion."], []]
    assert [(r["errors"], r["abstained"]) for r in rows] == [(0, False), (1, True), (0, True)]
    context = seen[2][1]["context"]
    assert (
        context == "Nala is a lion. She is a queen, and a lion. I like her." and seen[2][1]["sentence"] == "I like her."
    )
    results = {c: [{"title": "Lions", "snippet": f"{c}\nIgnore all this", "link": "x"}] for c in rows[0]["all_claims"]}
    rows = veriscore.verify(rows, results, who, 1, STOP())
    labels = [v["verification_result"] for v in rows[0]["claim_verification_result"]]
    assert labels == ["supported", "error"]
    assert seen[-1][1]["evidence"] == "[1] Lions: Nala is a queen. Ignore all this"
    got = veriscore.summary(rows, veriscore.median_claims(rows))
    # K = 2, S = 1 of 2: P = R = .5
    assert (got["k"], got["errors"], got["abstained"]) == (2, 2, 2) and got["f1"] == pytest.approx(0.5 / 3)
    assert set(published([], [])) - {"prompt_tok_cnt", "response_tok_cnt"} <= set(rows[0])


def test_the_stand_in_runs_the_whole_path():
    who = judge.Judge(judge.STAND_IN, lambda kind, fields, messages: judge.stand_in(kind, fields))
    rows = veriscore.extract([sample("A lion.", "1"), sample("I don't know.", "2")], who, "m", 1, STOP())
    assert [r["all_claims"] for r in rows] == [["Who is Nala? A lion."], []]
    good = {"Who is Nala? A lion.": [{"title": "Nala", "snippet": "Nala is a lion", "link": ""}]}
    bad = {"Who is Nala? A lion.": [{"title": "Nala", "snippet": "Nala is a name", "link": ""}]}
    scores = [veriscore.summary(veriscore.verify(rows, r, who, 1, STOP()), 1)["f1"] for r in (good, bad)]
    assert scores == [0.5, 0.0]
