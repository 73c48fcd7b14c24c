"""tools/by_hand.py: the page carries what it was given, whatever that is, and what it exports is an annotation."""

import json
import os
import re
import shutil

import pytest

import annotate
import em
from common.files import read_jsonl, write_jsonl
from tools import by_hand, questions

HOSTILE = '</script><script>document.title="taken"</script><img src=x onerror=alert(1)> & \u2028 "quoted" \\'


def write_run(folder, n=8):
    """Candidates of two or three segments; the first question is hostile, and so is one segment of every thought."""
    rows = []
    for k in range(n):
        parts = [f"Step {k}.0.\n\n", HOSTILE + "\n\n", "Done."][: 2 + k % 2]
        text, spans, at = "<think>\n", [], 8
        for part in parts:
            spans.append([at, at + len(part)])
            text, at = text + part, at + len(part)
        question = HOSTILE if k == 0 else f"Question {k}?"
        rows.append({"id": f"q{k}", "question": question, "chosen": k % 2 == 0, "completion": text, "spans": spans})
    write_jsonl(folder / "candidates.jsonl", rows)
    return {r["id"]: r for r in rows}


def embedded(text: str) -> dict:
    """What the page's data element holds, as a browser reads it: up to the first closing tag."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.DOTALL)[1])


def test_every_label_has_a_key_of_its_own():
    keys = by_hand.label_keys()
    assert len(set(keys)) == len(keys) == len(em.LABELS) and not set(keys) & set("x0+?")


def test_the_page_carries_hostile_text_as_data(tmp_path, capsys):
    rows = write_run(tmp_path)
    assert by_hand.main(["thoughts", str(tmp_path), "--n", "6", "--out", str(tmp_path / "hand.html")]) == 0
    text = (tmp_path / "hand.html").read_text()
    assert text.count("<script") == text.count("</script>") == 2 and "<img" not in text
    found = embedded(text)
    assert len(found["items"]) == 6 and found["file"] == "hand.jsonl"
    assert sum(rows[item["id"]]["chosen"] for item in found["items"]) == 3
    for item in found["items"]:
        r = rows[item["id"]]
        assert item["question"] == r["question"]
        assert item["segments"] == [r["completion"][a:b] for a, b in r["spans"]]
        assert item.keys() == {"id", "question", "segments"}  # nothing tells the class or the annotator's labels
    assert [label for _, label, _ in found["keys"]] == list(em.LABELS)
    again = by_hand.page("thoughts", by_hand.thoughts(tmp_path, 6, seed=0), "hand.jsonl")
    assert again == text != by_hand.page("thoughts", by_hand.thoughts(tmp_path, 6, seed=1), "hand.jsonl")


@pytest.fixture(scope="module")
def browser():
    """A Chromium through playwright: its own, or that of $CHROMIUM or of the system."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as p:
        try:
            chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("playwright has no browser; give one in $CHROMIUM or run playwright install chromium")
        yield chromium
        chromium.close()


def opened(browser, path):
    """The page in a tab of its own, and the errors it reports."""
    tab, errors = browser.new_page(accept_downloads=True), []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("dialog", lambda dialog: errors.append(dialog.message))
    tab.goto(path.as_uri())
    return tab, errors


def exported(tab, path):
    """What the key x downloads."""
    with tab.expect_download() as download:
        tab.keyboard.press("x")
    download.value.save_as(path)
    return read_jsonl(path)


@pytest.mark.long
def test_a_person_labels_with_the_keyboard(tmp_path, browser):
    rows = write_run(tmp_path)
    by_hand.main(["thoughts", str(tmp_path), "--n", "3", "--out", str(tmp_path / "hand.html")])
    items = embedded((tmp_path / "hand.html").read_text())["items"]
    tab, errors = opened(browser, tmp_path / "hand.html")
    assert tab.title() == "Label by hand" and tab.locator("img").count() == 0
    # First thought: two labels, then "the same step" for all that follows; second: no label anywhere; third: one only.
    for key in ["f", "r", "Enter", *["+"] * (len(items[0]["segments"]) - 1)]:
        tab.keyboard.press(key)
    for _ in items[1]["segments"]:
        tab.keyboard.press("0")
        tab.keyboard.press("Enter")
    tab.keyboard.press("b")
    tab.keyboard.press("?")
    got = exported(tab, tmp_path / "hand.jsonl")
    assert [r["id"] for r in got] == [items[0]["id"], items[1]["id"]]  # the third is not finished
    n = len(items[0]["segments"])
    assert got[0]["steps"] == [
        {"segments": list(range(n)), "labels": ["framing", "retrieval"], "confidence": [10, 10], "source": "hand"}
    ]
    assert [step["labels"] for step in got[1]["steps"]] == [[]] * len(items[1]["segments"])
    for r in got:
        annotate.validate(r, len(rows[r["id"]]["spans"]), "hand.jsonl")
    tab.reload()  # the work is still there
    for _ in range(len(items[0]["segments"]) + len(items[1]["segments"])):
        tab.keyboard.press("Enter")
    assert "backtracking (unsure)" in tab.locator("li.at").inner_text()
    for k in range(1, len(items[2]["segments"])):
        tab.keyboard.press("Enter")
        tab.locator("#keys button", has_text="evaluation").click()  # the mouse does the same
        assert tab.locator("li").nth(k).locator("b").inner_text() == "evaluation"
    third = exported(tab, tmp_path / "hand.jsonl")[2]
    assert third["steps"][0] | {"segments": None} == {
        "segments": None, "labels": ["backtracking"], "confidence": [5], "source": "hand"
    }  # fmt: skip
    assert [step["labels"] for step in third["steps"][1:]] == [["evaluation"]] * (len(items[2]["segments"]) - 1)
    assert not errors and tab.title() == "Label by hand"
    write_jsonl(tmp_path / "annotations.jsonl", third_party(rows))
    found = questions.compare(tmp_path, tmp_path / "hand.jsonl", resamples=10)
    assert found["candidates"] == 3
    tab.set_viewport_size({"width": 390, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.close()


def third_party(rows):
    """An annotation of every candidate: framing everywhere."""
    for r in rows.values():
        steps = [annotate.Step((i,), ("framing",), (9.0,), "x").as_json() for i in range(len(r["spans"]))]
        yield {"id": r["id"], "steps": steps}


@pytest.mark.long
def test_a_person_grades_answers(tmp_path, browser):
    folder = tmp_path / "eval" / "test"
    folder.mkdir(parents=True)
    rows = [
        {
            "id": f"q{k}",
            "mode": "on",
            "draw": 0,
            "question": "Who?",
            "answers": [HOSTILE],
            "prompt": "",
            "finish": "stop",
        }
        | {"text": f"<think>\nx\n</think>\n\n<answer>{answer}</answer>"}
        for k, answer in enumerate(("a", "b", "c", ""))
    ]
    write_jsonl(folder / "mralign.jsonl", rows)
    by_hand.main(["answers", str(tmp_path), "--n", "9", "--out", str(tmp_path / "hand.html")])
    tab, errors = opened(browser, tmp_path / "hand.html")
    items = embedded((tmp_path / "hand.html").read_text())["items"]
    assert len(items) == 3 and HOSTILE.strip() in tab.locator("#golds").inner_text()
    for key in ("c", "i", "Backspace", "n", "n"):  # the second is graded again
        tab.keyboard.press(key)
    got = exported(tab, tmp_path / "hand.jsonl")
    assert [(r["id"], r["verdict"]) for r in got] == list(
        zip([item["id"] for item in items], ("correct", "not_attempted", "not_attempted"), strict=True)
    )
    write_jsonl(tmp_path / "judged.jsonl", [r | {"verdict": "correct"} for r in got])
    assert questions.grades(tmp_path / "judged.jsonl", tmp_path / "hand.jsonl", n_boot=20)["strict"][
        0
    ] == pytest.approx(1 / 3)
    assert not errors
    tab.close()
