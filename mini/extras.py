"""Small files that let the miniature walk every path of the evaluation; made from facts.jsonl and questions/test.jsonl.

    python -m mini.extras

  snippets.jsonl            one sentence a fact, what the stand-in for a search engine finds
  questions/truthful.jsonl  20 test questions with a best answer, as TruthfulQA's are judged
  questions/long.jsonl      20 test questions without answers, as LongFact's are checked claim by claim

They test the path and say nothing about truthfulness or long answers: this model answers with a name.
"""

import sys
from pathlib import Path
from typing import Any

from common.endings import program
from common.files import read_json, read_jsonl, write_jsonl

HERE = Path(__file__).parent
FEW = 20


def snippets() -> list[dict[str, Any]]:
    """A document for every fact of the test and out-of-domain splits."""
    wording = read_json(HERE / "wording.json")["relations"]
    facts = [f for f in read_jsonl(HERE / "facts.jsonl") if f["split"] in ("test", "ood")]
    return [
        {
            "title": f["subject"],
            "snippet": wording[f["relation"]]["statements"][0].format(s=f["subject"], o=f["object"]),
            "link": f["id"],
        }
        for f in facts
    ]


def few(task: str) -> list[dict[str, Any]]:
    """Every 25th test question as one of another task."""
    rows = read_jsonl(HERE / "questions" / "test.jsonl")[::25][:FEW]
    extra = [{"best_answer": r["answers"][0]} if task == "truthful" else {"answers": []} for r in rows]
    return [r | {"id": f"{task}/{r['id']}", "task": task} | e for r, e in zip(rows, extra, strict=True)]


@program
def main() -> None:
    """Write the three files."""
    write_jsonl(HERE / "snippets.jsonl", snippets())
    for task in ("truthful", "long"):
        write_jsonl(HERE / "questions" / f"{task}.jsonl", few(task))


if __name__ == "__main__":
    sys.exit(main())
