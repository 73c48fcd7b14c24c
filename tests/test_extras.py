"""The miniature's small files for judges and search are what its facts give."""

from pathlib import Path

from common.files import read_jsonl
from mini import extras

HERE = Path(extras.__file__).parent


def test_the_files_are_what_the_program_writes():
    assert read_jsonl(HERE / "snippets.jsonl") == extras.snippets()
    for task in ("truthful", "long"):
        assert read_jsonl(HERE / "questions" / f"{task}.jsonl") == extras.few(task)


def test_every_test_question_has_its_fact_among_the_snippets():
    snippets = {r["link"]: r["snippet"] for r in extras.snippets()}
    for name in ("test", "ood"):
        for row in read_jsonl(HERE / "questions" / f"{name}.jsonl"):
            assert row["answers"][0] in snippets[row["id"].partition("#")[0]]
