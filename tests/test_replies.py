"""The grammar of every kind of reply, one table: what is read, and the near misses that models write.

None: of no use, so it is asked for once more and then counted as an error. Nothing in between is guessed.
"""

import json
from typing import Any

import pytest
from fake_server import as_reply

import data
from common.errors import AnnotationError
from llm import judge
from llm.committee import parse_reply

TWO = "Truthfulness: true\nInformativeness: informative"
YES, NO = {"truthful": True, "informative": True}, {"truthful": False, "informative": False}
LION, QUEEN = "Nala is a lion.", "Nala is a queen."
LABELS = as_reply([([0], {"framing": 9.0}), ([1], {"retrieval": 8.0})])
READ = [(0,), (1,)]
TABLE: list[tuple[str, str, Any]] = [
    # a TruthfulQA verdict
    ("truthful", TWO, YES),
    ("truthful", "truthfulness:FALSE\n\n  Informativeness: Uninformative  \n", NO),
    ("truthful", "<think>Truthfulness: false, hm</think>\n" + TWO, YES),
    ("truthful", "Truthfulness: false, hm</think>\n" + TWO, YES),
    ("truthful", "**Truthfulness:** true\n**Informativeness:** informative", YES),
    ("truthful", f"```\n{TWO}\n```", YES),
    ("truthful", TWO.replace("\n", "\r\n"), YES),
    ("truthful", "Truthfulness: true", None),
    ("truthful", "Truthfulness: true Informativeness: informative", None),
    ("truthful", "Informativeness: informative\nTruthfulness: true", None),
    ("truthful", TWO + "\nIt is right.", None),
    ("truthful", "Here you are:\n" + TWO, None),
    ("truthful", "Truthfulness: true | false\nInformativeness: informative", None),
    ("truthful", "Truthfulness: trueish\nInformativeness: informative", None),
    ("truthful", "Truthfulness: true\nInformativeness: not informative", None),
    ("truthful", "true\ninformative", None),
    ("truthful", "", None),
    # a grade; searched for a letter, "CORRECT" would be C and "INCORRECT" too: the known failure of such graders
    ("short", "CORRECT", "correct"),
    ("short", "INCORRECT", "incorrect"),
    ("short", "not_attempted", "not_attempted"),
    ("short", "Not attempted.", "not_attempted"),
    ("short", "NOT-ATTEMPTED", "not_attempted"),
    ("short", "**Correct**", "correct"),
    ("short", "`incorrect`", "incorrect"),
    ("short", '"correct"', "correct"),
    ("short", "**Grade:** incorrect", "incorrect"),
    ("short", "Incorrect!", "incorrect"),
    ("short", "<think>\nincorrect?\n</think>\n\ncorrect", "correct"),
    ("short", "Answer: B", None),
    ("short", "C", None),
    ("short", "A", None),
    ("short", "not correct", None),
    ("short", "partially correct", None),
    ("short", "correct or incorrect", None),
    ("short", "correct, but it hedges", None),
    ("short", "The answer is correct", None),
    ("short", "correct\nincorrect", None),
    ("short", "", None),
    # claims
    ("claims", f"- {LION}\n2. Simba is a lion.\n\n{LION}", [LION, "Simba is a lion."]),
    ("claims", f"Claim 1: {LION}\nClaim 2: {QUEEN}", [LION, QUEEN]),
    ("claims", f"\u2013 {LION}\n\u2022 {QUEEN}", [LION, QUEEN]),
    ("claims", f"{LION}\nNote: opinions are left out.", [LION]),
    ("claims", "1066 was a year.", ["1066 was a year."]),  # not a list mark
    ("claims", "None of the lions is white.", ["None of the lions is white."]),
    ("claims", "Nothing is a song by Nala.", ["Nothing is a song by Nala."]),
    ("claims", "No claim to the throne was made.", ["No claim to the throne was made."]),
    ("claims", "No verifiable claim.", []),
    ("claims", "no verifiable claim", []),
    ("claims", "No verifiable claims.", []),
    ("claims", "**No verifiable claims**", []),
    ("claims", "There is no verifiable claim.", []),
    ("claims", "There are no verifiable claims in this sentence.", []),
    ("claims", "There aren't any verifiable claims.", []),
    ("claims", "This sentence does not contain any verifiable claims.", []),
    ("claims", "The sentence contains no factual claims.", []),
    ("claims", "No claims can be extracted.", []),
    ("claims", "No verifiable facts", []),
    ("claims", "None", []),
    ("claims", "(none)", []),
    ("claims", "N/A", []),
    ("claims", "Not applicable.", []),
    ("claims", "- None.", []),
    ("claims", "No claims can be extracted from this sentence.", []),
    ("claims", "No verifiable claims are present.", []),
    ("claims", "No verifiable claims were identified.", []),
    ("claims", "There are no verifiable facts to extract.", []),
    ("claims", "No verifiable claims: the sentence is an opinion.", []),
    ("claims", "no verifiable claim (opinion)", []),
    ("claims", "The sentence is subjective and contains no verifiable claim.", []),
    ("claims", "I cannot find any verifiable claims.", []),
    ("claims", "No further claims.", []),
    ("claims", "0 claims", []),
    ("claims", "Not verifiable.", []),
    ("claims", "Nothing to verify.", []),
    ("claims", "None found", []),
    ("claims", "No statements were made by Nala.", ["No statements were made by Nala."]),
    ("claims", "There is no verifiable proof of Nala's age.", ["There is no verifiable proof of Nala's age."]),
    ("claims", "Claims by Nala were found to be false.", ["Claims by Nala were found to be false."]),
    ("claims", "Nothing verifiable is known about Nala.", ["Nothing verifiable is known about Nala."]),
    ("claims", f"{LION}\nNo more claims.", None),
    ("claims", f"Here is one claim\n{LION}", None),
    ("claims", f"Verifiable claims from the sentence\n{LION}", None),
    ("claims", "The claims are as follows", None),
    ("claims", f"{LION}\nLet me know if you need more.", None),
    ("claims", "Please provide the sentence.", None),
    ("claims", "Yes.", None),
    ("claims", f"(Note: an opinion)\n{LION}", None),
    ("claims", "[]", []),
    ("claims", "<think>No claim?</think>No verifiable claim.", []),
    ("claims", f"{LION}\nNo verifiable claim.", None),
    ("claims", f"{LION}\nNone", None),
    ("claims", f"Claims:\n{LION}", None),
    ("claims", f"Here are the claims:\n- {LION}", None),
    ("claims", f"Sure! Here they are.\n- {LION}", None),
    ("claims", f"```\n{LION}\n```", None),
    ("claims", f"### Facts\n- {LION}", None),
    ("claims", f"**Claims**\n{LION}", None),
    ("claims", f'["{LION}"]', None),
    ("claims", f"<claim>{LION}</claim>", None),
    ("claims", "I'm sorry, but I can't help with that.", None),
    ("claims", "I cannot extract claims from an opinion.", None),
    ("claims", "Note: the sentence is an opinion.", None),
    ("claims", "---", None),
    ("claims", "", None),
    # is a claim supported
    ("support", "supported", True),
    ("support", "Supported.", True),
    ("support", "### Supported. ###", True),  # as VeriScore's own prompts ask
    ("support", "**unsupported**", False),
    ("support", "UNSUPPORTED", False),
    ("support", "Decision: unsupported", False),
    ("support", "<think>supported?</think>unsupported", False),
    ("support", "not supported", None),
    ("support", "supported, mostly", None),
    ("support", "partially supported", None),
    ("support", "contradicted", None),
    ("support", "unsupported or supported", None),
    ("support", "", None),
    # labels of a trace
    ("labels", LABELS, READ),
    ("labels", f"```json\n{LABELS}\n```", READ),
    ("labels", f"```JSON\n{LABELS}\n```", READ),
    ("labels", f"<think>two {{steps}}</think>{LABELS}", READ),
    ("labels", f"two steps</think>\n{LABELS}", READ),
    ("labels", f"Sure! {LABELS}", None),
    ("labels", f"{LABELS}\nThat is all.", None),
    ("labels", LABELS[:-1] + ",}", None),
    ("labels", LABELS.replace('"', "'"), None),
    ("labels", LABELS.replace("framing", "Framing"), None),
    ("labels", LABELS.replace("framing", "framing, retrieval"), None),
    ("labels", LABELS.replace("9.0", '"9/10"'), None),
    ("labels", f"[{LABELS}]", None),
    ("labels", json.dumps({"reply": json.loads(LABELS)}), None),
    ("labels", "<think>and so on", None),
    ("labels", "", None),
    # the answer of a completion
    ("answer", "<think>a</think><answer>Paris</answer>", "Paris"),
    ("answer", "<think>a</think>\n```\n<answer>Paris</answer>\n```", "Paris"),
    ("answer", "<think>a</think>\n\n**Paris**", "**Paris**"),
    ("answer", "<think><answer>Rome</answer></think><answer>Paris</answer>", "Paris"),
    ("answer", "<think>a</think><answer>Rome</answer><answer>Paris</answer>", "Paris"),
    ("answer", "<think>a</think><answer>Paris", "Paris"),
    ("answer", "a</think>Paris", "Paris"),
    ("answer", "<think>a</think><answer>your answer</answer>", None),
    ("answer", "<think>a</think><answer></answer>", None),
    ("answer", "<think>Paris", None),
    ("answer", "Paris", None),  # no thought, so it is not known where one would end
    ("answer", "<think>a</think>Paris<think>", None),
]


def labels(text: str) -> list[tuple[int, ...]] | None:
    try:
        return [step.segments for step in parse_reply(text, 2)]
    except AnnotationError:
        return None


READERS = {kind: read for kind, (_, read) in judge.KINDS.items()}
READERS |= {"labels": labels, "answer": lambda text: data.parse(text).answer or None}


@pytest.mark.parametrize(("kind", "reply", "value"), TABLE)
def test_a_reply_is_read_whole_or_not_at_all(kind, reply, value):
    assert READERS[kind](reply) == value
