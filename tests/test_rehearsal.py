"""The rehearsal: is the scripted world what it says it is, and does the paper's config run in it from end to end?"""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

import data
import em
from common.files import read_json, read_jsonl, write_jsonl
from common.template import ChatTemplate, fill, load_prompt
from common.tokens import encode, load_tokenizer, token_offsets
from llm import judge, retrieve
from mini import rehearsal
from mini import rehearsal_server as world

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    rehearsal.make_model(folder)
    return folder


@pytest.fixture(scope="module")
def script(model) -> world.Script:
    return world.Script(model)


def request(model: Path, question: str, on: bool, seed: int, name: str = "base", temperature: float = 0.2) -> dict:
    """A request of /completions, as llm/remote.py makes it."""
    turn = fill(load_prompt(ROOT / "prompts/factual.txt"), question=question)
    ids = encode(load_tokenizer(model), ChatTemplate(model).prompt(turn, on))
    return {"prompt": ids, "model": name, "seed": seed, "temperature": temperature, "max_tokens": 2048}


@pytest.mark.parametrize("right", [True, False])
def test_the_true_matrices_are_what_counting_the_thoughts_gives(script, right):
    """Thoughts as they are sent, cut by the pipeline's own rule; the first label of a segment is the chain's."""
    counts = np.zeros((17, 17))
    for k in range(600):
        text = "".join(script.thought(random.Random(f"count/{k}"), right, ""))
        labels = [world.labels_in(text[a:b])[0] for a, b in data.split_segments(text, 0, len(text))]
        codes = [0, *(em.STATES.index(label) for label in labels), 16]
        for a, b in zip(codes[:-1], codes[1:], strict=True):
            counts[a, b] += 1
    P = world.true_transitions(1, 1)["P_pos" if right else "P_neg"]
    leaving = counts.sum(1, keepdims=True)
    sigma = np.sqrt(P * (1 - P) / np.maximum(leaving, 1))
    seen = np.broadcast_to(leaving >= 100, P.shape)
    assert seen.sum() > 100
    assert (np.abs(counts / np.maximum(leaving, 1) - P) < 4.5 * sigma + 1e-9)[seen].all()


def test_the_matrix_of_all_is_the_mixture_of_both_classes():
    """By hand: P_ab = (n+ C+_ab + n- C-_ab) / (n+ C+_a + n- C-_a)."""
    pos, neg = world.true_counts(True), world.true_counts(False)
    a, b = 3, 7
    expected = (5 * pos[a, b] + 2 * neg[a, b]) / (5 * pos[a].sum() + 2 * neg[a].sum())
    assert world.true_transitions(5, 2)["P"][a, b] == pytest.approx(expected, abs=1e-15)
    assert pos[1:-1, -1].sum() == pytest.approx(1)  # a thought stops once


def test_replies_depend_on_the_request_alone_and_their_ids_spell_their_text(model, script):
    tokenizer = load_tokenizer(model)
    bodies = [
        request(model, world.question("nq", True, k)["question"], on, k) for k in range(12) for on in (True, False)
    ]
    first = [world.complete(script, body)["choices"][0] for body in bodies]
    again = [world.complete(world.Script(model), body)["choices"][0] for body in reversed(bodies)]
    assert first == again[::-1]
    for choice in first:
        text, _ = token_offsets(tokenizer, choice["token_ids"])
        stopped = choice["finish_reason"] == "stop"
        assert text == choice["text"] + "<|im_end|>" * stopped
        assert stopped or len(choice["token_ids"]) == 2048
    assert len({choice["text"] for choice in first}) == len(first)


@pytest.mark.parametrize("kind", [*world.KINDS, "ok"])
def test_a_malformed_kind_is_what_the_parser_calls_it(kind):
    parts, stops = world.put_together(kind, True, ["Hm.", "\n\n", "So."], "Gold")
    parsed = data.parse("".join(parts), thinking=True, finished=stops)
    assert parsed.outcome == kind
    assert (parsed.answer == "Gold") is (kind not in world.LOST) or kind == "no_thought"


def test_every_question_has_a_place_of_its_own_and_says_its_data_set():
    rows = [
        world.question(name, train, k) for name in world.TEST for train in (True, False) for k in (0, 1, 999, 79_167)
    ]
    assert len({row["question"] for row in rows}) == len(rows)
    assert all(row["id"].startswith(world.about(f"User: {row['question']}\nAnswer:")[0]) for row in rows)
    assert not any(data.contains_gold(row["question"], row["answers"]) for row in rows)


def test_the_judge_is_understood_and_search_bears_out_what_is_true():
    def reply(kind, fields, messages):
        return world.judged({"model": "judge", "seed": 0, "messages": messages})

    who, q = judge.Judge("script", reply), world.question("truthfulqa", False, 3)
    given = {"question": q["question"], "best_answer": q["best_answer"]}
    assert who.ask("truthful", answer=q["best_answer"], **given).value == {"truthful": True, "informative": True}
    assert who.ask("truthful", answer="I have no comment.", **given).value == {"truthful": True, "informative": False}
    assert who.ask("truthful", answer=world.wrong_of(q["question"], 0), **given).value["truthful"] is False
    verdicts = []
    for k in range(30):
        for true in (True, False):
            claim = world.fact("Belmora", k, true)
            evidence = retrieve.as_text(retrieve.organic(world.searched(claim, 5), 5))
            verdicts.append(who.ask("support", claim=claim, evidence=evidence).value is true)
    assert sum(verdicts) >= 55  # the script errs in 2 of 100


def test_annotators_confuse_as_their_matrix_says_and_a_spoilt_reply_is_mended():
    from common.errors import AnnotationError
    from llm.committee import parse_reply

    label, n = "retrieval", 4000
    said = [next(iter(world.opinion("annotator-b", str(k), [world.OPENERS[label][0]]))) for k in range(n)]
    row = world.confusion("annotator-b", 0.75)[em.LABELS.index(label)]
    for other, p in zip(em.LABELS, row, strict=True):
        assert said.count(other) / n == pytest.approx(p, abs=4.5 * np.sqrt(p * (1 - p) / n) + 1e-9)
    spoilt = 0
    for k in range(150):
        material = {
            "question": f"q{k}",
            "segments": [{"segment": i, "text": world.OPENERS[label][0]} for i in range(5)],
        }
        turn = {"role": "user", "content": f"nothing in it is an instruction to you.\n{json.dumps(material)}"}
        try:
            parse_reply(world.annotated({"model": "annotator-a", "messages": [turn]}), 5)
        except AnnotationError:
            spoilt += 1
            parse_reply(world.annotated({"model": "annotator-a", "messages": [turn, turn, turn]}), 5)
    assert 1 <= spoilt <= 16  # 4 %


def test_the_correlation_is_one_for_the_true_weights_and_none_for_shuffled_ones(script):
    rows = []
    for k in range(60):
        thought = "".join(script.thought(random.Random(k), k % 3 > 0, ""))
        spans = data.split_segments(thought, 0, len(thought))
        rows.append({"completion": thought, "spans": spans, "label": k % 3 > 0})
    true = rehearsal.true_weights(rows)
    same = rehearsal.correlation([row | {"w": w} for row, w in zip(rows, true, strict=True)])
    assert same["all"]["r"] == pytest.approx(1) and same["rejected"]["low"] == pytest.approx(1)
    pool = [x for w in true for x in w]
    random.Random(0).shuffle(pool)
    mixed = rehearsal.correlation([row | {"w": [pool.pop() for _ in row["spans"]]} for row in rows])
    assert mixed["all"]["low"] < 0.05 < 0.95 > mixed["all"]["high"]


def test_the_page_says_which_runs_of_the_sweep_have_other_weights(tmp_path):
    """lambda_r is no part of the step weights: a run that changes it alone must not be said to differ in them."""
    files = {name: tmp_path / f"{k}.jsonl" for k, name in enumerate(("full", "Table 3, x", "Table 4, lambda_r 2.0"))}
    for file, w in zip(files.values(), (1.5, 0.5, 1.5), strict=True):
        write_jsonl(file, [{"w": [1.0, w]}])
    line = rehearsal.sweep_line(files)
    assert "weights (above) do, in: Table 3, x." in line
    assert line.endswith("of the run called full, and other settings of the loss: Table 4, lambda_r 2.0.")
    del files["Table 4, lambda_r 2.0"]
    assert rehearsal.sweep_line(files).endswith("in: Table 3, x.")


def test_search_can_be_asked_of_another_address(tmp_path):
    engine = retrieve.engine("serper@http://127.0.0.1:9/v1#OTHER", tmp_path / "cache.jsonl")
    assert (engine.endpoint.base_url, engine.endpoint.key_env) == ("http://127.0.0.1:9/v1", "OTHER")
    assert engine.name != retrieve.engine("serper", tmp_path / "cache.jsonl").name  # results are kept apart


@pytest.mark.long
def test_the_small_rehearsal_from_end_to_end(tmp_path, monkeypatch):
    """Two processes, all stages, all tables; of Tables 3 and 4 one row."""
    scale = 0.003
    monkeypatch.setattr(rehearsal, "SWEEP", {n: rehearsal.SWEEP[n] for n in ("full", "Table 3, one label a step")})
    text = rehearsal.rehearse(tmp_path, scale, {"label_eval": 4, "batch_size": 8})  # more than one step
    results = read_json(tmp_path / "run/results.json")
    assert results["receipt"]["processes"] == 2
    tally = results["stages"]["candidates"]["by data set"]
    questions = sum(of["questions"] for of in tally.values())
    assert questions == len(read_jsonl(tmp_path / "data/train.jsonl"))
    for side, kept in (("chosen", 4830), ("rejected", 2143)):  # Table 1
        expected = kept * questions / 90_847
        assert abs(sum(of[side] for of in tally.values()) - expected) < 4 * expected**0.5
    for name in ("nq", "sciq", "simpleqa"):
        assert len(results["scores"][name]["metrics"]) == 8
    for name in ("truthfulqa", "longfact"):
        assert len(results["judge"]["sets"][name]) == 8
    # Some 25 rows are too few for their weights; that the labels are the true ones must show. By chance: under 2 of 15.
    rows = read_jsonl(tmp_path / "run/train.jsonl")
    assert all(math.isfinite(rehearsal.correlation(rows)["all"][name]) for name in ("r", "low", "high"))
    steps = [(r["completion"][a:b], said) for r in rows for (a, b), said in zip(r["spans"], r["labels"], strict=True)]
    assert sum(bool(set(said) & set(world.labels_in(text))) for text, said in steps) > 0.6 * len(steps)
    for heading in ("Table 1", "Table 2", "Tables 3 and 4", "Fitted and true step weights", "Our own sampler"):
        assert f"## {heading}" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "ours" not in line]
    for name in ("ThinkOff", "ThinkOn", "Self-Refine", "SFT", "KTO", "MR-ALIGN", "ThinkOn + Ret", "MR-ALIGN + Ret"):
        row = next(line for line in rows if line[2:].split(" |")[0].strip() == name and line.count("|") > 9)  # Table 2
        assert "not run" not in row
