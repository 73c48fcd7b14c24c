"""Tables: the paper's numbers as printed, ours beside them, and nothing claimed that no run has measured."""

import re

import numpy as np
import pytest

import em
import eval as evaluation
from common import benchmarks
from common.files import write_json
from report import tables

SETS = ("nq_open", "sciq", "simpleqa", "truthfulqa", "longfact")


def printed(backbone, setting):
    """set -> the paper's figures, where there are any."""
    of = {name: benchmarks.paper_figures(name)[backbone].get(setting) for name in SETS}
    return {name: figures for name, figures in of.items() if figures}


def test_the_papers_numbers():
    """Spot checks against Tables 2 and 12 of arXiv 2510.24794v2."""
    assert printed("Qwen3-8B", "mralign") == {
        "nq_open": [37.34, 7.2],
        "sciq": [70.7, 11.7],
        "simpleqa": [5.11, 4.46],
        "truthfulqa": [83.11, 94.12],
        "longfact": [83.29, 19],
    }
    assert printed("Qwen3-8B", "thinkoff")["nq_open"] == [22.66, None]
    assert printed("Qwen3-8B", "mralign+ret")["simpleqa"] == [67.11, 7.48]
    assert printed("DeepSeek-R1-Distill-Qwen-7B", "refine")["nq_open"] == [1.19, 12.13]
    assert "longfact" not in printed("DeepSeek-R1-Distill-Qwen-7B", "refine")
    assert printed("Qwen3-14B", "thinkon")["sciq"] == [70.6, 11.5]


def test_the_papers_tables_have_every_setting_of_ours():
    assert tuple(name for name in benchmarks.compared() if name in SETS) == SETS  # others may be added
    for name in SETS:
        assert set(benchmarks.paper_figures(name)["Qwen3-8B"]) <= set(tables.SETTINGS)


@pytest.mark.parametrize(
    ("model", "backbone"),
    [
        ("Qwen/Qwen3-8B", "Qwen3-8B"),
        ("/models/qwen3-4b/", "Qwen3-4B"),
        ("Qwen/Qwen3-8B-Base", None),
        ("Qwen/Qwen3-14B", "Qwen3-14B"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1-Distill-Qwen-7B"),
        ("mini/model", None),
        ("Qwen/Qwen2-8B", None),
    ],
)
def test_backbone_by_name(model, backbone):
    assert tables.backbone_of(model, benchmarks.BACKBONES) == backbone


def row(k, em_t, em_a):
    out = {
        "id": f"q{k}",
        "mode": "on",
        "draw": 0,
        "outcome": "ok",
        "form": "ok",
        "n_think_tokens": 5,
        "n_empty_golds": 0,
    }
    return (
        out
        | {"em_t": em_t, "em_t_word": em_t, "em_a_equal": em_a, "em_a_contains": em_a, "em_a_words": em_a}
        | {
            "gold_in_question": 0,
            "sentence": em_a,
        }
    )


@pytest.fixture
def results(tmp_path):
    metrics = evaluation.metrics([row(0, 1, 1), row(1, 1, 0), row(2, 0, 0), row(3, 1, 1)])
    receipt = {"command": "mralign.py --x", "commit": "abc123", "seed": 7, "device": "cuda H100", "versions": "torch 2"}
    receipt |= {"model": "Qwen/Qwen3-8B", "decoding": "1 draw(s)"}
    judged = {"judge": "gpt-4o@https://x/v1", "sets": {}, "abstentions": {}}
    share = evaluation.share(3, 4)
    truthful = {"kind": "truthful", "rows": 5, "errors": 1, "no_answer": 0, "truthful": share, "informative": share}
    judged["sets"]["truthfulqa"] = {"thinkon": truthful | {"both": share, "again": {"n": 1, "same": 1}}}
    claims = {"answers": 2, "k": 3, "claims": 2.5, "claims_median": 2.5, "f1": None, "low": None, "high": None}
    judged["sets"]["longfact"] = {"thinkon": claims | {"precision": None, "errors": 0, "abstained": 1}}
    scores = {"nq": {"metrics": {"thinkon": metrics}, "differences": {}, "seen_in_training": 0}}
    path = tmp_path / "results.json"
    write_json(path, {"receipt": receipt, "scores": scores, "judge": judged})
    return path


def test_ours_stands_beside_the_papers(results, capsys):
    assert tables.main([str(results)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    head = [c.strip() for c in lines[0].strip("|").split("|")]
    rows = {
        c[0]: dict(zip(head, c, strict=True))
        for c in ([x.strip() for x in s.strip("|").split("|")] for s in lines[2 : 2 + len(tables.SETTINGS)])
    }
    assert list(rows) == list(tables.SETTINGS.values())
    base = rows["ThinkOn"]
    assert base["NQ-Open, Acc / Mis: ours"] == "50.0 [15.0, 85.0] (2/4) / 25.0 (1)"
    assert base["NQ-Open, paper"] == "34.10 / 9.89"
    assert base["TruthfulQA, true / informative: ours"] == "75.0 (3/4) / 75.0 (3/4)"
    assert base["LongFact, F1@K / claims: ours"] == "– / 2.5"
    assert (
        rows["MR-ALIGN"]["NQ-Open, Acc / Mis: ours"] == "not run" and rows["MR-ALIGN"]["SciQ, paper"] == "70.70 / 11.70"
    )
    assert rows["MR-ALIGN, weights shuffled"]["NQ-Open, paper"] == "–"
    assert lines[-1].startswith("- `mralign.py --x`, commit abc123, seed 7, cuda H100") and "gpt-4o@https" in lines[-1]


def test_without_a_run_nothing_is_ours(capsys):
    assert tables.main(["--backbone", "Qwen3-4B"]) == 0
    out = capsys.readouterr().out
    assert out.count("not run") == len(benchmarks.compared()) * len(tables.SETTINGS) and "29.92 / 6.62" in out
    assert tables.main([]) == 3 and "Qwen3-8B" in capsys.readouterr().err


def test_rows_of_judges():
    share = evaluation.share(1, 2)
    short = {"kind": "short", "rows": 2, "errors": 0, "no_answer": 0, "correct": share, "incorrect": share}
    short |= {
        "not_attempted": evaluation.share(0, 2),
        "correct_given_attempted": 0.5,
        "f1": 0.5,
        "again": {"n": 1, "same": 0},
    }
    (got,) = tables.judge_rows({"thinkon": short})
    assert (
        got["correct given attempted"] == "50.0" and got["agrees with itself"] == "0/1" and got["grader errors"] == "0"
    )
    claims = {
        "answers": 2,
        "k": 3,
        "claims": 2.5,
        "f1": 0.5,
        "low": 0.4,
        "high": 0.6,
        "precision": 0.7,
        "errors": 0,
        "abstained": 1,
    }
    (got,) = tables.judge_rows({"thinkon": claims})
    assert got["F1@3 (95 %)"] == "50.0 [40.0, 60.0]" and got["answers without claims"] == "1/2"
    (got,) = tables.judge_rows({"thinkon": claims | {"f1": None, "precision": None}})
    assert got["F1@3 (95 %)"] == "no evidence: claims only"


def test_markdown_escapes_and_aligns():
    text = tables.markdown([{"a": "x|y", "b": None}, {"b": 2, "c": 3}])
    lines = ["| a    |   b |   c |", "| ---- | --: | --: |", r"| x\|y |   – |   – |", "| –    |   2 |   3 |"]
    assert text.splitlines() == lines
    assert tables.markdown([]) == "" and not re.search(r"\n\n", text)


def test_form_of_the_completions():
    rows = [row(0, 1, 1), row(1, 1, 0) | {"form": "truncated"}, row(2, 0, 0) | {"form": "empty"}, row(3, 0, 0)]
    (got,) = tables.form_rows({"thinkon": evaluation.metrics([r | {"n_empty_golds": k} for k, r in enumerate(rows)])})
    assert [got[f"{n}, %"] for n in ("ok", "truncated", "empty", "malformed")] == ["50.0", "25.0", "25.0", "0.0"]
    assert (got["thinking tokens, median"], got["golds that never match"]) == ("5", "6")


def test_table_1_stands_beside_the_papers():
    counts = {"questions": 3, "chosen": 1, "rejected": 1, "draws disagree": 1}
    sci = {"questions": 1200, "chosen": 0, "rejected": 0, "wrong in both modes": 1200}
    both = {"questions": 1203, "chosen": 1, "rejected": 1, "draws disagree": 1, "wrong in both modes": 1200}
    rows = {r["data set"]: r for r in tables.candidate_rows({"all": both, "nq_open": counts, "sciq": sci, "mine": sci})}
    assert (
        rows["nq_open"]["paper's chosen / rejected"] == "4,070 / 1,785"
        and rows["nq_open"]["wrong in both modes"] == "0"
    )
    assert rows["sciq"]["paper's chosen / rejected"] == "760 / 358" and rows["sciq"]["questions"] == "1,200"
    assert rows["mine"]["paper's chosen / rejected"] == rows["all"]["paper's chosen / rejected"] == "–"
    (note,) = tables.notes_on({"all": both, "nq_open": counts, "sciq": sci})
    assert note.startswith("NQ-Open, train: 87,925") and "79,168" in note


def test_quadrants_and_differences():
    m = evaluation.metrics([row(0, 1, 1), row(1, 1, 0), row(2, 0, 0), row(3, 1, 1)])
    (got,) = tables.quadrant_rows({"thinkon": m})
    assert list(got.values()) == ["ThinkOn", "2", "1", "0", "1"]
    d = {
        "acc": {"difference": 0.0125, "low": -0.01, "high": 0.035, "p": 0.031},
        "mis": {"difference": 0, "low": 0, "high": 0, "p": None},
    }
    (got,) = tables.difference_rows({"kto - thinkon": d})
    assert got["Acc"] == "+1.2 [−1.0, +3.5]" and got["Acc, McNemar p"] == "0.031" and "Mis, McNemar p" not in got


def test_table_7_counts_labels_by_macro_strategy():
    """The paper's column adds up to its 83,249, of which 35,271 are meta-cognitive regulation."""
    rows = [{"labels": [["framing"], ["retrieval", "evaluation"], []]}, {"labels": [["retrieval"]]}]
    table = tables.label_rows(rows)
    at = {(row["macro strategy"], row["label"]): row for row in table}
    assert len(at) == len(table) == len(em.LABELS) + len(em.TAXONOMY) + 1
    whole = at["all", ""]
    assert (whole["count"], whole["paper's count"], whole["share"]) == ("4", "83,249", "100.0 %")
    regulation = at["meta-cognitive regulation", "all of it"]
    assert (regulation["count"], regulation["share"], regulation["paper's count"]) == ("2", "50.0 %", "35,271")
    retrieval = at["knowledge operations", "retrieval"]
    assert (retrieval["count"], retrieval["paper's count"], retrieval["paper's share"]) == ("2", "20,633", "24.8 %")
    assert tables.label_rows([])[-1]["count"] == "0"


def test_the_bound_stands_for_every_distance_and_for_the_papers():
    P = np.zeros((17, 17))
    P[1, 2], P[1, 3] = 0.8, 0.2
    rows = tables.bound_rows({"P": P.tolist(), "C": (10 * P).tolist()}, {"a vs b": 0.002})
    assert [row["E |delta|"] for row in rows] == ["0.0020", "0.0100"]
    assert rows[1]["bound, median"] == f"{0.01 / 0.8 * 1.71828:.3f}" and rows[1]["bound, p90"] == "0.086"
    assert rows[0]["moves with a bound under .1"] == "100.0 %"
