"""Results as tables: ours beside the paper's, for the page of a run and for the README.

  python -m report.tables runs/qwen3-8b/results.json  Markdown: Table 2 for this backbone, ours beside the paper's
  python -m report.tables --backbone Qwen3-8B [RESULTS ...]  the same for a named backbone; several files fill one

Ours come with their interval, k/N, command, commit and hardware; what no run has measured says "not run". Left out:
anything that is computed (eval.py, analysis.py, judge.py, veriscore.py) or drawn (charts.py, report.py).
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import em
from common.benchmarks import BACKBONES, COLUMNS, SOURCES, compared, name_of, paper_figures
from common.endings import program
from common.errors import InputError
from common.files import read_json
from common.table import markdown
from eval import FORMS
from report import analysis
from report.charts import outcome_rows, percent, strata_rows
from report.figures import SETTINGS, called, number

CLASSES = ("chosen", "rejected")


# ---------- beside the paper


def backbone_of(model: str, known: Iterable[str]) -> str | None:
    """The paper's backbone that a model's path or Hub id names, None for another one."""
    name = re.sub(r"[^a-z0-9.]+", "-", model.lower())
    found = [b for b in known if re.search(rf"(?:^|-){re.escape(b.lower())}(?:$|-(?!base))", name)]
    return max(found, key=len) if found else None


def paper_cell(values: Sequence[float | None] | None) -> str:
    """The paper's two figures of a cell."""
    if not values:
        return "–"
    return " / ".join("–" if v is None else f"{v:.2f}" for v in values)


def our_cell(results: Sequence[Mapping[str, Any]], name: str, setting: str) -> str:
    """Our figures of a cell, from the first of several runs that has them; "not run" when none has."""
    for result in results:
        for own, of in result["scores"].items():
            if name_of(own) == name and setting in of["metrics"]:
                m = of["metrics"][setting]
                mis = "–" if m["mis"] is None else f"{percent(m['mis']['share'])} ({m['mis']['k']})"
                low, high = percent(m["acc"]["low"]), percent(m["acc"]["high"])
                return f"{percent(m['acc']['share'])} [{low}, {high}] ({m['acc']['k']}/{m['n']}) / {mis}"
        for own, of in result["judge"]["sets"].items():
            if name_of(own) == name and setting in of:
                return judged_cell(of[setting])
    return "not run"


def judged_cell(summary: Mapping[str, Any]) -> str:
    """Figures of a judged cell: truthful / informative, or F1@K with its K / claims."""
    if "claims" in summary:
        f1 = "–" if summary["f1"] is None else f"{percent(summary['f1'])} (K = {summary['k']})"
        return f"{f1} / {summary['claims']:.1f}"
    if "truthful" not in summary:
        return "–"
    both = (summary["truthful"], summary["informative"])
    return " / ".join(f"{percent(s['share'])} ({s['k']}/{s['n']})" for s in both)


def beside_paper(results: Sequence[Mapping[str, Any]], backbone: str) -> list[dict[str, str]]:
    """Table 2 for one backbone: a row for each setting, for each set ours and the paper's."""
    rows = []
    for setting, label in SETTINGS.items():
        row = {"": label}
        for name, source in compared().items():
            row[f"{source.heading}, {COLUMNS[source.task]}: ours"] = our_cell(results, name, setting)
            row[f"{source.heading}, paper"] = paper_cell(paper_figures(name)[backbone].get(setting))
        rows.append(row)
    return rows


def receipt_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which command, commit, seed and hardware gave our figures."""
    lines = []
    for result in results:
        r = result["receipt"]
        about = f"`{r['command']}`, commit {r['commit']}, seed {r['seed']}, {r['device']}, {r['versions']}"
        judged = f", judge {result['judge']['judge']}" if result["judge"]["sets"] else ""
        lines.append(f"- {about}{judged}; {r['decoding']}")
    return lines


def candidate_rows(tally: Mapping[str, Mapping[str, int]]) -> list[dict[str, str]]:
    """The tally of `data.select_candidates` as Table 1: a row a data set, each count, and the paper's two."""
    lost = dict.fromkeys(reason for of in tally.values() for reason in of if reason not in ("questions", *CLASSES))
    rows = []
    for name, of in tally.items():
        row = {"data set": name, "questions": f"{of['questions']:,}"} | {r: f"{of.get(r, 0):,}" for r in lost}
        row |= {side: f"{of[side]:,}" for side in CLASSES}
        source = SOURCES.get(name_of(name))
        paper = source.kept if source and any(source.kept) else None
        rows.append(row | {"paper's chosen / rejected": f"{paper[0]:,} / {paper[1]:,}" if paper else "–"})
    return rows


def notes_on(tally: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What a reader of `candidate_rows` must know of its data sets."""
    return [f"{SOURCES[n].heading}, {SOURCES[n].note}" for n in map(name_of, tally) if n in SOURCES and SOURCES[n].note]


LABELS_OF_PAPER = {  # Table 7: labels of the 6,973 training rows
    "framing": 10629,
    "backtracking": 5023,
    "self_verification": 13186,
    "evaluation": 6433,
    "decomposition": 1639,
    "chaining": 1824,
    "retrieval": 20633,
    "causal_reasoning": 1702,
    "analogy": 169,
    "synthesis": 4930,
    "comparison": 4646,
    "categorization": 1471,
    "case_analysis": 1726,
    "explanation": 3075,
    "summarization": 6163,
}
DISTANCE_OF_PAPER = 0.01  # E |delta| of Appendix B.5


def label_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Table 7: how often each label stands in the training rows, by macro strategy, ours and the paper's share."""
    counts = Counter(label for row in rows for step in row["labels"] for label in step)
    ours, theirs = max(1, counts.total()), sum(LABELS_OF_PAPER.values())

    def line(macro: str, name: str, labels: Sequence[str]) -> dict[str, str]:
        n, paper = sum(counts[label] for label in labels), [LABELS_OF_PAPER[x] for x in labels if x in LABELS_OF_PAPER]
        row = {"macro strategy": macro, "label": name, "count": f"{n:,}", "share": f"{percent(n / ours)} %"}
        row["paper's count"] = f"{sum(paper):,}" if paper else "–"
        return row | {"paper's share": f"{percent(sum(paper) / theirs)} %" if paper else "–"}

    out = []
    for macro, labels in em.TAXONOMY.items():
        out += [line(macro, label.replace("_", " "), [label]) for label in labels]
        out.append(line(macro, "all of it", list(labels)))
    return [*out, line("all", "", em.LABELS)]


def bound_rows(transitions: Mapping[str, Any], distances: Mapping[str, float]) -> list[dict[str, str]]:
    """The bound of Eq. 15 on the error of a weight, a row for each distance between matrices (name -> E |delta|)."""
    P, C = np.array(transitions["P"]), np.array(transitions["C"])
    rows = []
    for name, distance in (distances | {"the paper's .01": DISTANCE_OF_PAPER}).items():
        of = analysis.weight_bound(P, C, distance)
        row = {"distance of the matrix from the true one": name, "E |delta|": f"{distance:.4f}"}
        row |= {f"bound, {k}": f"{of[k]:.3f}" for k in ("mean", "median", "p90")}
        row |= {"moves with a bound under .1": f"{percent(of['below .1'])} %"}
        rows.append(row | {"moves it says nothing of": f"{percent(of['vacuous'])} %"})
    return rows


# ---------- the page of a run


def score_rows(metrics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`eval.metrics` of several settings as rows; percent, 95 % intervals in brackets."""
    rows = []
    for setting, m in metrics.items():
        acc, mis, draws = m["acc"], m["mis"], m["draws"]["acc"]
        head = "Acc, % (95 %)" if m["matcher"] == "equal" else f"Acc {m['matcher']}, % (95 %)"
        row = {"setting": called(setting), head: interval(acc), "k/n": f"{acc['k']}/{m['n']}"}
        row |= {"Mis, % (95 %)": interval(mis) if mis else None, "Mis k/n": f"{mis['k']}/{m['n']}" if mis else None}
        if len(draws["all"]) > 1:
            row["Acc over draws, %"] = f"{percent(draws['mean'])} ± {percent(draws['sd'])}"
        for name, field in (
            ("EM_a equal, %", "em_answer_exact"),
            ("EM_a contains, %", "em_answer_contains"),
            ("EM_a words, %", "em_answer_words"),
            ("EM_t, %", "em_thought_contains"),
            ("EM_t words, %", "em_thought_word"),
            ("truncated, %", "truncated"),
        ):
            row[name] = percent(m[field]["share"]) if m[field] else None
        rows.append(row)
    return rows


def form_rows(metrics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How the completions look: shares in percent that add up to 100, length of thoughts, golds that cannot count."""
    rows = []
    for setting, m in metrics.items():
        row: dict[str, Any] = {"setting": called(setting)}
        row |= {"completions": str(m["n"])}
        row |= {f"{form.replace('_', ' ')}, %": percent(m[form]["share"]) for form in FORMS}
        for name, field in (("thinking tokens, median", "think_tokens_median"), ("mean", "think_tokens_mean")):
            row[name] = None if m[field] is None else f"{m[field]:.0f}"
        row["answers that are sentences, %"] = percent(m["sentences"]["share"])
        row["gold in the question, completions"] = str(m["gold_in_question"]["k"])
        rows.append(row | {"golds that never match": str(m["empty_golds"])})
    return rows


def interval(share: Mapping[str, float]) -> str:
    """A share in percent with its interval."""
    return f"{percent(share['share'])} [{percent(share['low'])}, {percent(share['high'])}]"


def quadrant_rows(metrics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The 2x2 table of (gold in the thought, answer is a gold) of every setting with thinking on."""
    names = {
        "thought_and_answer": "both (Acc)",
        "thought_only": "thought only (Mis)",
        "answer_only": "answer only (Mis)",
        "neither": "neither",
    }
    return [
        {"setting": called(s)} | {names[k]: str(n) for k, n in m["table"].items()}
        for s, m in metrics.items()
        if m["table"]
    ]


def difference_rows(differences: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Paired differences in points, with bootstrap intervals and McNemar's p where it applies."""
    rows = []
    for pair, of in differences.items():
        row: dict[str, Any] = {"paired difference, points": " − ".join(map(called, pair.split(" - ")))}
        for metric, d in of.items():
            shown = [number(100 * d[key], 1, True) for key in ("difference", "low", "high")]
            row[metric.capitalize()] = f"{shown[0]} [{shown[1]}, {shown[2]}]"
            if d["p"] is not None:
                row[f"{metric.capitalize()}, McNemar p"] = f"{d['p']:.2g}"
        rows.append(row)
    return rows


def judge_rows(of: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Summaries of `judge.summary` or `veriscore.summary` by setting as rows."""
    rows = []
    for setting, s in of.items():
        row: dict[str, Any] = {"setting": called(setting)}
        if "claims" in s:
            f1 = None if s["f1"] is None else f"{percent(s['f1'])} [{percent(s['low'])}, {percent(s['high'])}]"
            row |= {f"F1@{s['k']} (95 %)": f1 or "no evidence: claims only", "claims an answer": f"{s['claims']:.1f}"}
            row |= {"supported": None if s["precision"] is None else f"{percent(s['precision'])} %"}
            row |= {"answers without claims": f"{s['abstained']}/{s['answers']}"}
        elif s["kind"] == "truthful":
            row |= {n: interval(s[n]) if n in s else None for n in ("truthful", "informative", "both")}
        else:
            grades = ("correct", "incorrect", "not_attempted")
            row |= {n.replace("_", " "): interval(s[n]) if n in s else None for n in grades}
            row |= {"correct given attempted": percent(s.get("correct_given_attempted")), "F1": percent(s.get("f1"))}
        row["grader errors"] = str(s["errors"])
        if "again" in s:
            row["agrees with itself"] = f"{s['again']['same']}/{s['again']['n']}"
        rows.append(row)
    return rows


def change_rows(change: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The moves of Fig. 4 as rows, points of probability."""
    return [
        {"": way, "move": f"{m['from']} → {m['to']}".replace("_", " "), "change": number(100 * m["delta"], 1, True)}
        | {"95 %": f"[{number(100 * m['low'], 1, True)}, {number(100 * m['high'], 1, True)}]"}
        for way, key in (("likelier", "up"), ("less likely", "down"))
        for m in change[key]
    ]


def of_run(results: Mapping[str, Any], analysed: Mapping[str, Any], method: str) -> dict[str, list[dict[str, Any]]]:
    """heading -> rows for the page of a run."""
    out: dict[str, list[dict[str, Any]]] = {}
    backbone = backbone_of(results["receipt"]["model"], BACKBONES)
    if backbone:
        out[f"Table 2 for {backbone}: ours beside the paper's"] = beside_paper([results], backbone)
    for name, of in results["scores"].items():
        out[f"Acc and Mis on {name}"] = score_rows(of["metrics"])
        out[f"Differences on {name}"] = difference_rows(of["differences"])
        out[f"Thought and answer on {name}"] = quadrant_rows(of["metrics"])
        out[f"Form of the completions on {name}"] = form_rows(of["metrics"])
    judged = results["judge"]
    for name, of in judged["sets"].items():
        out[f"{name}, judged by {judged['judge']}"] = judge_rows(of)
    if judged["sets"]:
        a = judged["abstentions"]
        words = {"n": a["n"], "truthful": a["truthful"], "uninformative": a["uninformative"], "errors": a["errors"]}
        out["What the judge makes of 20 abstentions"] = [{k: str(v) for k, v in words.items()}]
    for name, of in analysed["strata"].items():
        out[f"Gain by stratum on {name}"] = strata_rows(of)
    for name, of in analysed["change"].items():
        out[f"Moves that {called(method)} changed most on {name}, points of probability"] = change_rows(of[method])
    for name, of in analysed["outcomes"].items():
        for setting in ("thinkon", method):
            out[f"Labels and outcomes on {name}, {called(setting)}"] = outcome_rows(of[setting], "labels")
            out[f"Commonest moves and outcomes on {name}, {called(setting)}"] = outcome_rows(of[setting], "moves")
    out["Step weights by class, shares of tokens"] = analysed["weights"]
    widths = analysed["intervals"]
    names = [name for name in widths if name != "n_boot"]
    row = {name: f"{widths[name]['mean_width']:.3f}" for name in names}
    out[f"Mean width of the 95 % intervals, {widths['n_boot']} resamples of traces"] = [row]
    return out


@program
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", metavar="RESULTS.json", help="results.json of runs of one backbone")
    parser.add_argument("--backbone", default="", help="a backbone of the paper [from the run's model]")
    given = parser.parse_args(argv)
    results = [read_json(path) for path in given.results]
    backbone = given.backbone or (backbone_of(results[0]["receipt"]["model"], BACKBONES) if results else None)
    if backbone not in BACKBONES:
        if not (backbone or results):
            raise InputError(f"no results.json and no backbone is given; name one of the two: {', '.join(BACKBONES)}")
        whose = f"--backbone {backbone!r}" if backbone else "the run's model"
        raise InputError(f"{whose} is none of the paper's: {', '.join(BACKBONES)}; give --backbone one of them")
    print(markdown(beside_paper(results, backbone)))
    print("\n".join(["", *receipt_lines(results)]) if results else "")


if __name__ == "__main__":
    sys.exit(main())
