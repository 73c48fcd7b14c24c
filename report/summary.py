"""The first lines of a run's page: what was done, what came out, and the words one needs, for who has read no paper."""

from collections.abc import Mapping, Sequence
from typing import Any

from report.charts import percent
from report.figures import called, number

WORDS = {
    "thought, answer": "the model first thinks in a text of its own, in steps, and then answers",
    "Acc": "accuracy: the share of completions with a right answer both in the thought and as the answer",
    "Mis": "misalignment: the share in which it is only in one of the two; mostly the thought finds it and the answer "
    "is another one",
    "hit gap": "right answer in the thought, less right answer in both: what the thinking found and the answer lost",
    "ThinkOn, ThinkOff": "the model before any training here, with and without a thought",
    "chosen, rejected": "thoughts of the model itself that made its answer right, or wrong, compared with no thought",
    "label, move": "what a step does (one or two of 15 kinds), and one step following another",
    "P": "how likely a move is; P_pos among chosen thoughts, P_neg among rejected ones",
    "w": "the weight of a step in training: P_pos / P, or P_neg / P, of the move into it, between 1/e and e",
    "95 %": "an interval in square brackets: it covers other questions, not another seed or other training rows",
}
ONE_RUN = (
    "One run with one seed: it shows that the whole method runs and what it changes here; whether one method beats "
    "another takes several seeds at equal distance from the base model (make study on the miniature)."
)


def sentence(pair: str, of: Mapping[str, Any]) -> str:
    """A paired difference in words: "MR-ALIGN against KTO: +0.2 points Acc [−0.8, +1.2], which may be chance".

    pair: "mralign - kto". of: `eval.compare`.
    """
    a, b = map(called, pair.split(" - "))
    d = of["acc"]
    value, low, high = (number(100 * d[key], 1, True) for key in ("difference", "low", "high"))
    verdict = "may be chance" if d["low"] <= 0 <= d["high"] else "is more than the choice of questions explains"
    return f"{a} against {b}: {value} points of Acc [{low}, {high}], which {verdict}."


def lead(
    receipt: Mapping[str, Any], tally: Mapping[str, Mapping[str, int]], scores: Mapping[str, Any], method: str
) -> list[str]:
    """Paragraphs: what was done, then for every set the answer in a sentence with its interval.

    tally: of the candidates, {} where it is not known. scores: set -> {"metrics", "differences"}. method: the one the
    page shows.
    """
    done = f"The model {receipt['model']} was aligned with {called(method)}"
    if of := tally.get("all"):
        done += (
            f": it answered {of['questions']:,} training questions several times, and {of['chosen']:,} of its thoughts "
            f"that made an answer right and {of['rejected']:,} that made it wrong became training rows"
        )
    out = [f"{done}. Then every variant answered the same held-out questions."]
    for name, of in scores.items():
        metrics = of["metrics"]
        if not {"thinkon", method} <= metrics.keys():
            continue
        before, after = metrics["thinkon"], metrics[method]
        shares = [percent(m[key]["share"]) for m in (before, after) for key in ("acc", "mis")]
        text = (
            f"On {name} ({after['n']:,} completions each) Acc went from {shares[0]} to {shares[2]} % and Mis from "
            f"{shares[1]} to {shares[3]} %."
        )
        pairs = [f"{method} - {other}" for other in ("thinkon", "kto", "sft", "shuffled", "mean") if other != method]
        text += "".join(f" {sentence(pair, of['differences'][pair])}" for pair in pairs if pair in of["differences"])
        out.append(text)
    return [*out, ONE_RUN]


def better_and_worse(before: Sequence[bool], after: Sequence[bool]) -> dict[str, int]:
    """How many questions became right, became wrong, stayed right and stayed wrong, in this order."""
    pairs = list(zip(before, after, strict=True))
    kinds = {
        "better": (False, True),
        "worse": (True, False),
        "right in both": (True, True),
        "wrong in both": (False, False),
    }
    return {name: pairs.count(kind) for name, kind in kinds.items()}
