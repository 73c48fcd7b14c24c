"""data.py: parsing, segments, exact match, candidates, tokens and their weights, prompts, packing."""

import doctest
import json
import random
import re
import unicodedata

import numpy as np
import pytest
import torch
from conftest import build_tokenizer, shared_data
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import data
from common import files
from common import template as template_module
from common.errors import InputError
from common.template import TAGS, ChatTemplate, fill, load_prompt, opens_thought
from common.tokens import BYTE_OF_CHAR, encode, load_tokenizer, token_offsets

# ---------- parsing

# completion, thinking, finished -> outcome, thought, answer, tagged
GOLDEN = [
    ("<think>\nHm.\n</think>\n\n<answer>Paris</answer>", True, True, "ok", "\nHm.\n", "Paris", True),
    ("<think>Hm.</think>\n\nParis.", True, True, "ok", "Hm.", "Paris.", False),
    ("\n<think>Hm.</think>It is <answer>\nParis\n</answer>\n", True, True, "ok", "Hm.", "Paris", True),
    (
        "<think>Put it in <answer>x</answer>.</think>Paris",
        True,
        True,
        "ok",
        "Put it in <answer>x</answer>.",
        "Paris",
        False,
    ),
    ("<think>Hm.</think><answer>Paris</answer>", True, False, "ok", "Hm.", "Paris", True),
    ("<think>Hm. Paris", True, False, "no_close", "Hm. Paris", "", False),
    ("<think>Hm. Paris", True, True, "no_thought", "", "", False),
    ("<answer>Paris</answer>", True, True, "no_thought", "", "", False),
    ("<answer>Par", True, False, "no_close", "<answer>Par", "", False),
    ("Paris", True, True, "no_thought", "", "", False),
    ("", True, True, "no_thought", "", "", False),
    ("<think>a</think>Paris<think>b", True, True, "no_close", "a</think>Paris<think>b", "", False),
    ("</think>Paris<think>", True, True, "no_close", "", "", False),
    ("<think>Hm.</think><answer>Par", True, False, "cut", "Hm.", "", False),
    ("<think>Hm.</think>Par", True, False, "cut", "Hm.", "", False),
    ("<think>Hm.</think>", True, False, "cut", "Hm.", "", False),
    ("<think>Hm.</think><answer>Paris</answer> or <answer>Ly", True, False, "cut", "Hm.", "", False),
    ("<think>a</think>b</think><answer>c</answer>", True, True, "multiple", "a</think>b", "c", True),
    ("<think>a<think>b</think>c", True, True, "multiple", "a<think>b", "c", False),
    ("<think>a</think><think>b</think>c", True, True, "multiple", "a</think><think>b", "c", False),
    ("<think>a</think><answer>b</answer><answer>c</answer>", True, True, "multiple", "a", "c", True),
    ("<think>a</think><answer>b</answer>c</answer>", True, True, "multiple", "a", "b", True),
    ("<think>a</think><answer>b</answer><answer>c", True, True, "multiple", "a", "b", True),
    ("Hm.</think>Paris", True, True, "no_open", "Hm.", "Paris", False),
    ("<think>a</think><answer>Paris", True, True, "unclosed", "a", "Paris", False),
    ("<think>a</think>Paris</answer>", True, True, "unclosed", "a", "Paris", False),
    ("<think>a</think></answer>Paris<answer>", True, True, "unclosed", "a", "Paris", False),
    ("<think>\n\n</think>\n\nParis", True, True, "empty", "\n\n", "Paris", False),
    ("<think>a</think>\n\n", True, True, "empty", "a", "", False),
    ("<think>a</think><answer> </answer>", True, True, "empty", "a", "", True),
    ("<think>a</think><answer></answer>Paris", True, True, "empty", "a", "", True),
    ("Well. <think>a</think>Paris", True, True, "leading", "a", "Paris", False),
    ("<think>a</think><answer>Paris</answer> Done.", True, True, "trailing", "a", "Paris", True),
    ("<answer>Paris</answer>", False, True, "ok", "", "Paris", True),
    (" Paris\n", False, True, "ok", "", "Paris", False),
    ("Paris is", False, False, "cut", "", "", False),
    ("<answer>Paris</answer> and so", False, False, "trailing", "", "Paris", True),
    ("", False, True, "empty", "", "", False),
    ("</think>Paris", False, True, "multiple", "", "Paris", False),
    ("<think>x</think>Paris", False, True, "multiple", "", "Paris", False),
    ("<think>Paris", False, True, "no_close", "", "", False),
    # A native thought, then the prompt's own tags; the first that is not blank is the thought.
    ("<think>a\n</think>\n\n<think>b</think>\n<answer>c</answer>", True, True, "twice", "a\n", "c", True),
    ("<think>\n\n</think>\n\n<think>b</think><answer>c</answer>", True, True, "twice", "b", "c", True),
    ("<think>a</think>\n<think>b</think>c", True, True, "multiple", "a</think>\n<think>b", "c", False),
    ("<think>a</think>so<think>b</think><answer>c</answer>", True, True, "multiple", "a</think>so<think>b", "c", True),
    (
        "<think>a</think><think>b</think><answer>c</answer><answer>d</answer>",
        True,
        True,
        "multiple",
        "a</think><think>b",
        "d",
        True,
    ),
    # Fenced blocks
    ("```xml\n<think>a</think>\n<answer>c</answer>\n```", True, True, "ok", "a", "c", True),
    ("<think>a</think>\n```\nParis\n```", True, True, "ok", "a", "Paris", False),
    ("<think>a</think><answer>\n```text\nParis\n```\n</answer>", True, True, "ok", "a", "Paris", True),
    ("<think>a</think>use ``` so", True, True, "ok", "a", "use ``` so", False),
    # The prompt's own words are no answer
    ("<think>a</think><answer> your answer </answer>", True, True, "placeholder", "a", "", True),
    ("<think>a</think><answer>your answer</answer><answer>Rome</answer>", True, True, "multiple", "a", "Rome", True),
    ("<answer>your answer</answer>", False, True, "placeholder", "", "", True),
]


@pytest.mark.parametrize(("text", "thinking", "finished", "outcome", "thought", "answer", "tagged"), GOLDEN)
def test_golden_table_of_parses(text, thinking, finished, outcome, thought, answer, tagged):
    got = data.parse(text, thinking, finished)
    assert (got.outcome, got.thought, got.answer, got.tagged) == (outcome, thought, answer, tagged)
    if thinking and outcome != "no_thought":
        assert text[slice(*got.span)] == thought
    else:
        assert got.span is None


OPENED = [  # the prompt ends in <think>
    ("\nHm.\n</think>\n\nParis", True, "ok", "\nHm.\n", "Paris", False),
    ("Hm.</think><answer>Paris</answer>", True, "ok", "Hm.", "Paris", True),
    ("Hm. Paris", False, "no_close", "Hm. Paris", "", False),
    ("a</think>\n<think>b</think><answer>c</answer>", True, "twice", "a", "c", True),
    ("Hm.</think>Par", False, "cut", "Hm.", "", False),
    ("<think>Hm.</think>Paris", True, "multiple", "<think>Hm.", "Paris", False),
    ("a</think>b</think>c", True, "multiple", "a</think>b", "c", False),
    ("a</think>b<think>c", True, "no_close", "a</think>b<think>c", "", False),
    ("</think>Paris", True, "empty", "", "Paris", False),
    ("Hm.</think>", True, "empty", "Hm.", "", False),
    ("Hm.</think><answer>Paris", True, "unclosed", "Hm.", "Paris", False),
    ("Hm.</think><answer>Paris</answer>!", True, "trailing", "Hm.", "Paris", True),
]


@pytest.mark.parametrize(("text", "finished", "outcome", "thought", "answer", "tagged"), OPENED)
def test_a_thought_the_prompt_has_opened(text, finished, outcome, thought, answer, tagged):
    got = data.parse(text, True, finished, opened=True)
    assert (got.outcome, got.thought, got.answer, got.tagged) == (outcome, thought, answer, tagged)
    assert text[slice(*got.span)] == thought and got.span[0] == 0
    sample = {"text": text, "mode": "on", "finish": "stop" if finished else "length"}
    assert data.parse_sample(sample | {"prompt": "<|Assistant|><think>\n"}) == got
    # The same text under a prompt that speaks of the tag without ending in it is read as before.
    assert data.parse_sample(sample | {"prompt": "Use <think></think>.\n"}) == data.parse(text, True, finished)


def test_every_outcome_is_in_the_documented_table_and_in_the_golden_one():
    table = data.parse.__doc__.split("answer\n", 1)[1].split("\n\n")[0]
    documented = {line.split()[0] for line in table.splitlines()}
    assert documented == {row[3] for row in GOLDEN}


def test_no_soup_of_tags_breaks_the_parser_and_thoughts_never_leak_into_answers():
    chance = random.Random(0)
    pieces = [*TAGS, "in", "out", " ", "\n\n", "<think", "think>"]
    for _ in range(5000):
        text = "".join(chance.choices(pieces, k=chance.randint(0, 9)))
        thinking, finished = chance.random() < 0.5, chance.random() < 0.5
        got = data.parse(text, thinking, finished)
        untagged = text.replace("<answer>", " ").replace("</answer>", " ")
        assert got.answer in untagged and got.answer == got.answer.strip()
        closed = text.rfind("</think>")
        if thinking and (closed < 0 or "<think>" in text[closed:]):
            none = thinking and finished and closed < 0
            assert got.outcome == ("no_thought" if none else "no_close") and got.answer == ""
        if got.answer and closed >= 0:
            assert got.answer in text[closed + 8 :].replace("<answer>", " ").replace("</answer>", " ")
        if got.outcome == "ok" and thinking:
            assert re.fullmatch(r"\s*<think>(?s:.*)</think>(?s:.*)", text) and got.thought.strip() and got.answer


# ---------- segments


def test_doctests():
    results = [doctest.testmod(module) for module in (data, template_module)]
    assert all(r.failed == 0 for r in results) and sum(r.attempted for r in results) >= 3


@pytest.mark.parametrize(
    ("thought", "segments"),
    [
        ("a\n\nb", ["a\n\n", "b"]),
        ("\na\n\nb\n", ["\na\n\n", "b\n"]),
        ("a\n\n\n\nb", ["a\n\n\n\n", "b"]),
        ("a\n\n\nb", ["a\n\n\n", "b"]),
        ("a\nb", ["a\nb"]),
        ("\n\na\n\nb", ["\n\na\n\n", "b"]),
        ("a\n\n  \n\nb", ["a\n\n  \n\n", "b"]),
        ("  \n\n \n\na", ["  \n\n \n\na"]),
        ("a\n\n", ["a\n\n"]),
        ("a\n\n ", ["a\n\n "]),
        ("a\r\n\r\nb", ["a\r\n\r\n", "b"]),
        ("a\n \t\nb", ["a\n \t\n", "b"]),
        ("a\r\nb", ["a\r\nb"]),
        ("a\n\n   b", ["a\n\n", "   b"]),  # an indent belongs to what it indents
        ("a  \n\nb", ["a  \n\n", "b"]),
        ("", []),
        (" \n\n \n", []),
    ],
)
def test_segments_by_hand(thought, segments):
    text = f"<think>{thought}</think>\n\nx\n\ny"
    spans = data.split_segments(text, 7, 7 + len(thought))
    assert [text[a:b] for a, b in spans] == segments


def test_segments_equal_a_slow_independent_split_and_cover_exactly():
    chance = random.Random(2)
    for _ in range(3000):
        head, tail = ("".join(chance.choices("ab\n ", k=chance.randint(0, 5))) for _ in range(2))
        thought = "".join(chance.choices(["a", "b.", "\n", "\n\n", " ", "\n\n\n", "é"], k=chance.randint(0, 12)))
        spans = data.split_segments(head + thought + tail, len(head), len(head) + len(thought))
        # Paragraphs line by line: a line of spaces ends one. Where there is none, thought.split("\n\n") of the paper.
        paragraphs: list[list[str]] = [[]]
        for line in thought.split("\n"):
            if line.strip():
                paragraphs[-1].append(line)
            else:
                paragraphs.append([])
        pieces = ["\n".join(p).strip() for p in paragraphs if p]
        if not re.search(r"\n +\n", thought):
            assert pieces == [p.strip() for p in thought.split("\n\n") if p.strip()]
        assert [(head + thought + tail)[a:b].strip() for a, b in spans] == pieces
        edges = [c for span in spans for c in span]
        assert edges[1:-1:2] == edges[2::2]
        if pieces:
            assert (edges[0], edges[-1]) == (len(head), len(head) + len(thought))
            assert all(re.search(r"\n *\n *$", (head + thought + tail)[x:y]) for x, y in spans[:-1])


# ---------- exact match

ARTICLES = {"a", "an", "the"}
PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def orqa(text: str) -> str:
    """The same normal form by a character loop: no regular expressions, no translate."""
    words, word = [], ""
    for c in unicodedata.normalize("NFD", text).lower() + " ":
        if c in PUNCTUATION:
            continue
        if c.isspace():
            words.append(word)
            word = ""
        else:
            word += c
    out = []
    for w in words:  # an article is a maximal run of word characters, which other symbols may stand next to
        piece, rest = "", ""
        for c in w + "\0":
            if c.isalnum() or unicodedata.category(c) == "Pc":
                piece += c
            else:
                rest += (" " if piece in ARTICLES else piece) + c
                piece = ""
        out.append(rest[:-1])
    return " ".join(" ".join(out).split())


def random_strings(n: int):
    chance = random.Random(5)
    alphabet = [chr(c) for c in range(32, 127)] + list(
        "éÉñßİıΣς’‘“”–—…«»🙂日本ａＡ１ \u00a0\u2028\t\n\u200b\u0301\u0308"
    )
    alphabet += ["a", "an", "the", "A", "An", "THE", " the ", " a ", " ", " ", "a-", ".an."] * 3
    for _ in range(n):
        yield "".join(chance.choices(alphabet, k=chance.randint(0, 12)))


def test_normaliser_equals_the_independent_orqa_on_100_000_strings():
    changed = 0
    for text in random_strings(100_000):
        assert data.normalise(text) == orqa(text), repr(text)
        changed += data.normalise(text) != text
    assert changed > 50_000


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Beatles", "beatles"),
        ("  A  an THE ", ""),
        ("U.S.A.", "usa"),
        ("twenty-one", "twentyone"),
        ("the-end", "theend"),  # punctuation goes before articles do
        ("A+", ""),
        ("---", ""),
        ("Café", "cafe\u0301"),  # decomposed, the accent stays
        ("don\u2019t", "don\u2019t"),  # only ASCII punctuation goes
        ("don't", "dont"),
        ("x\t\n\u00a0y", "x y"),
        ("banana the a", "banana"),
    ],
)
def test_normal_form_by_hand(text, normal):
    assert data.normalise(text) == normal


@pytest.mark.parametrize(
    ("thought", "answer", "golds", "equal", "contains"),
    [
        ("I recall Paris.", "Paris", ["Paris"], (1, 1), (1, 1)),
        ("I recall Paris.", "The Paris!", ["paris"], (1, 1), (1, 1)),
        ("I recall Lyon.", "Paris", ["Paris"], (0, 1), (0, 1)),
        ("Paris? No.", "Lyon", ["Paris"], (1, 0), (1, 0)),
        ("Hm.", "not Mark Twain", ["Mark Twain"], (0, 0), (0, 1)),
        ("Hm.", "It is Mark Twain.", ["Samuel Clemens", "Mark Twain"], (0, 0), (0, 1)),
        ("Samuel Clemens", "Mark Twain", ["Samuel Clemens", "Mark Twain"], (1, 1), (1, 1)),
        ("anything", "", ["---"], (0, 0), (0, 0)),
        ("A+", "A+", ["A+"], (0, 0), (0, 0)),
        ("x", "", ["x"], (1, 0), (1, 0)),
        ("several", "era", ["era"], (1, 1), (1, 1)),
        ("Cafe\u0301", "Café", ["café"], (1, 1), (1, 1)),
    ],
)
def test_exact_match_by_hand(thought, answer, golds, equal, contains):
    assert data.exact_match(thought, answer, golds) == equal
    assert data.exact_match(thought, answer, golds, "contains") == contains


def test_whole_words():
    words = data.MATCHERS["words"]
    assert data.contains_gold("several things", ["era"]) and not words("several things", ["era"])
    assert words("the era ended", ["The Era"])
    assert words("1914–1918", ["1918"])
    assert not words("in 1914", ["14", "191"])
    assert not words("anything", ["+", "---"])
    assert words("a.b", ["a.b"])  # nothing in a gold is a pattern


STRINGS = {name: match for name, match in data.MATCHERS.items() if name != "verifier"}
JUDGED = [  # answer, gold, whether a person calls it right -> equal, contains, words
    ("sexual", "sexual", True, 1, 1, 1),
    ("asexual", "sexual", False, 0, 1, 0),  # SciQ
    ("Sexual reproduction.", "sexual", True, 0, 1, 1),
    ("endothermic", "exothermic", False, 0, 0, 0),
    ("invertebrates", "vertebrates", False, 0, 1, 0),
    ("It is the vertebrates.", "vertebrates", True, 0, 1, 1),
    ("1945", "194", False, 0, 1, 0),
    ("In 1945.", "1945", True, 0, 1, 1),
    ("unsaturated fats", "saturated fats", False, 0, 1, 0),
    ("The Amazon", "amazon", True, 1, 1, 1),
    ("not Mark Twain", "Mark Twain", False, 0, 1, 1),  # no matcher reads a "not"
    ("Samuel Clemens", "Mark Twain", True, 0, 0, 0),
]


@pytest.mark.parametrize(("answer", "gold", "right", "equal", "contains", "words"), JUDGED)
def test_matchers_on_hand_made_answers(answer, gold, right, equal, contains, words):
    assert [match(answer, [gold]) for match in STRINGS.values()] == [equal, contains, words]


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("So it is \\boxed{1,200}.", "1200", True),
        ("\\boxed{3} or rather \\boxed{0.5}", "\\frac{1}{2}", True),  # the last box counts
        ("0.5", "\\frac12", True),
        ("\\boxed{12}", "121", False),
        ("The answer is 12.", "12", False),  # a sentence is no value
        ("", "12", False),
    ],
)
def test_the_verifier_as_a_matcher_compares_values(answer, gold, right):
    assert data.MATCHERS["verifier"](answer, ["no value {", gold]) == right


def test_whole_words_take_fewest_wrong_answers_among_those_that_accept_sentences():
    wrong = [(answer, gold) for answer, gold, right, *_ in JUDGED if not right]
    taken = {name: sum(match(a, [g]) for a, g in wrong) for name, match in STRINGS.items()}
    assert taken == {"equal": 0, "contains": 5, "words": 1}


def test_distractors_of_sciq_taken_for_the_gold():
    """9,000 wrong options of SciQ: what each matcher takes for the right one."""
    folder = shared_data() / "sciq"
    taken: dict[str, int] = dict.fromkeys(STRINGS, 0)
    total = 0
    for name in ("sciq_test.jsonl", "sciq_train_first2000.jsonl"):
        for row in files.read_jsonl(folder / name):
            for k in (1, 2, 3):
                total += 1
                for matcher, match in STRINGS.items():
                    taken[matcher] += match(row[f"distractor{k}"], [row["correct_answer"]])
    assert (total, taken) == (9000, {"equal": 7, "contains": 48, "words": 11})


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1914–1918", "1914-1918"),
        ("don’t look up", "Don't Look Up"),
        ("Beyoncé", "Beyonce"),
        ("100 °C", "100 degrees C"),
        ("“Heroes”", "Heroes"),
        ("−5", "-5"),
    ],
)
def test_the_folded_form_takes_signs_for_their_plain_ones(answer, gold):
    assert not data.equals_gold(answer, [gold]) and data.equals_gold(answer, [gold], fold=True)
    assert data.exact_match(answer, answer, [gold], fold=True) == (True, True)


def test_all_natural_questions_golds_match_themselves():
    path = shared_data() / "nq_open" / "NQ-open.dev.jsonl"
    rows = files.read_jsonl(path, ("question", "answer"))
    empty = 0
    for row in rows:
        for gold in row["answer"]:
            expected = bool(orqa(gold))
            empty += not expected
            assert data.exact_match(f"so {gold} it is", gold, [gold]) == (expected, expected), gold
    assert len(rows) == 3610
    assert empty == 4  # "A+", "---", ")", "*"


# ---------- tokens, characters


def test_tiny_tokenizer_fuses_over_the_end_of_a_segment(tiny_tokenizer):
    tokens = [tiny_tokenizer.decode([i]) for i in tiny_tokenizer.encode("Paris.\n\nSo").ids]
    assert ".\n\n" in tokens
    assert len(tiny_tokenizer.encode("<think>").ids) == 1


def some_text(chance: random.Random) -> str:
    """Anything a model might write, in NFC, since Qwen's tokenizer puts it there."""
    parts = [
        "So ",
        "the answer",
        "Paris",
        ".",
        "!",
        "?!",
        "\n",
        "\n\n",
        "\n\n\n",
        "\r\n",
        "\r\n\r\n",
        " ",
        "  ",
        "\t",
        "東京",
    ]
    parts += [
        "é",
        "ñandú",
        "🙂",
        "👩‍👩‍👧",
        "🇫🇷",
        "\u200b",
        "\u200d",
        "\ufeff",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
    ]
    parts += [".\n\n", ":\n\n", "<|im_end|>", "{x}", "‮", "\ufffd", "ẛ̣", "각", "\x00", "1995", "Ġ", "Ċ"]
    text = "".join(chance.choices(parts, k=chance.randint(0, 14)))
    return unicodedata.normalize("NFC", text)


def check_cover(tokenizer: Tokenizer, seed: int, n: int) -> None:
    """Offsets equal the library's; every token of the thought is in exactly the segment of its first character."""
    chance = random.Random(seed)
    for _ in range(n):
        thought, answer = some_text(chance), some_text(chance)
        text = f"<think>{thought}</think>{answer}"
        encoding = tokenizer.encode(text, add_special_tokens=False)
        got, offsets = token_offsets(tokenizer, encoding.ids)
        assert got == text == tokenizer.decode(encoding.ids, skip_special_tokens=False)
        assert [a for a, _ in offsets] == [a for a, _ in encoding.offsets]
        assert all(a < b for a, b in offsets) and offsets[0][0] == 0 and offsets[-1][1] == len(text)
        assert all(a <= c and b <= d and c <= b for (a, b), (c, d) in zip(offsets, offsets[1:], strict=False))
        end = 7 + len(thought)
        spans = data.split_segments(text, 7, end)
        w = [float(k + 2) for k in range(len(spans))]
        weights = data.token_weights(offsets, spans, w).tolist()
        owner = [1.0] * (len(text) + 1)  # the weight of every character, written down one by one
        for (a, b), x in zip(spans, w, strict=True):
            owner[a:b] = [x] * (b - a)
        assert weights == [owner[a] for a, _ in offsets]
        inside = sum(7 <= a < end for a, _ in offsets)
        assert data.count_think_tokens(offsets, (7, end)) == inside
        if spans:
            assert sum(x > 1 for x in weights) == inside


def test_exact_cover_on_500_texts(tiny_tokenizer):
    check_cover(tiny_tokenizer, seed=3, n=500)


def test_exact_cover_on_the_real_tokenizer(qwen3_tokenizer):
    check_cover(qwen3_tokenizer, seed=4, n=2_000)
    ids = qwen3_tokenizer.encode("Paris.\n\nSo").ids
    assert len(ids) == 3  # "Paris", ".\n\n", "So"
    _, offsets = token_offsets(qwen3_tokenizer, ids)
    assert data.token_weights(offsets, [(0, 8), (8, 10)], [2.0, 3.0]).tolist() == [2.0, 2.0, 3.0]


@pytest.mark.parametrize("which", ["tiny_tokenizer", "qwen3_tokenizer"])
def test_any_sampled_ids_give_the_decoded_text(which, request):
    tokenizer = request.getfixturevalue(which)
    chance, size, broken = random.Random(6), tokenizer.get_vocab_size(with_added_tokens=True), 0
    odd = [i for i in range(size) if "\ufffd" in tokenizer.decode([i], skip_special_tokens=False)][:200]
    for _ in range(1000):
        ids = [
            chance.choice(odd) if chance.random() < 0.5 else chance.randrange(size) for _ in range(chance.randint(1, 8))
        ]
        text, offsets = token_offsets(tokenizer, ids)
        assert text == tokenizer.decode(ids, skip_special_tokens=False)
        assert len(offsets) == len(ids) and offsets[0][0] == 0 and offsets[-1][1] == len(text)
        starts = [a for a, _ in offsets]
        assert starts == sorted(starts)
        assert all(b >= c for (_, b), (c, _) in zip(offsets, offsets[1:], strict=False))  # no character is left out
        broken += "\ufffd" in text
    assert broken > 300


def test_a_split_character_belongs_to_all_its_tokens_and_invalid_bytes_show(tiny_tokenizer):
    def byte(b: int) -> int:
        return tiny_tokenizer.token_to_id(next(c for c, v in BYTE_OF_CHAR.items() if v == b))

    emoji = [byte(b) for b in "🙂".encode()]
    a, end = byte(ord("a")), tiny_tokenizer.token_to_id("<|im_end|>")
    assert token_offsets(tiny_tokenizer, [a, *emoji, a]) == ("a🙂a", [(0, 1), *[(1, 2)] * 4, (2, 3)])
    assert token_offsets(tiny_tokenizer, [a, *emoji[:3], end]) == (
        "a\ufffd<|im_end|>",
        [(0, 1), *[(1, 2)] * 3, (2, 12)],
    )
    assert token_offsets(tiny_tokenizer, [emoji[1], emoji[1], a]) == ("\ufffd\ufffda", [(0, 1), (1, 2), (2, 3)])
    assert token_offsets(tiny_tokenizer, emoji[:2]) == ("\ufffd", [(0, 1), (0, 1)])
    assert token_offsets(tiny_tokenizer, []) == ("", [])


def test_an_added_token_counts_by_its_content():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["\n\n", "Ġé"])  # the second is written with characters of the byte alphabet
    ids = [tokenizer.token_to_id(t) for t in ("\n\n", "Ġé", "a")]
    assert token_offsets(tokenizer, ids) == ("\n\nĠéa", [(0, 2), (2, 4), (4, 5)])


def test_other_tokenizers_are_refused(tiny_tokenizer, tmp_path):
    other = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}))
    other.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="not ByteLevel; use a byte-level BPE"):
        token_offsets(other, [1])
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="not ByteLevel"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="token id -1 is none"):
        token_offsets(tiny_tokenizer, [-1])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json: not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        load_tokenizer(tmp_path / "none")
    tiny_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert encode(load_tokenizer(tmp_path), "So Paris.") == tiny_tokenizer.encode("So Paris.").ids


def test_weights_by_hand():
    offsets = [(0, 7), (7, 9), (9, 12), (11, 14), (14, 15), (15, 23), (23, 24)]
    spans = [(7, 11), (11, 15)]  # the token (9, 12) starts in the first
    weights = data.token_weights(offsets, spans, [0.5, 2.0])
    assert weights.dtype == torch.float32
    assert weights.tolist() == [1.0, 0.5, 0.5, 2.0, 2.0, 1.0, 1.0]
    assert data.token_weights(offsets, [(7, 9), (14, 15)], [0.5, 2.0]).tolist() == [1.0, 0.5, 1.0, 1.0, 2.0, 1.0, 1.0]
    assert data.token_weights(offsets, [], []).tolist() == [1.0] * 7
    with pytest.raises(AssertionError):
        data.token_weights(offsets, [(7, 12), (11, 15)], [1.0, 1.0])
    with pytest.raises(AssertionError):
        data.token_weights(offsets, spans, [1.0])


# ---------- questions, prompts


def write(path, rows):
    files.write_jsonl(path, rows)
    return path


def question(k: int, **other):
    return {"id": f"q{k}", "question": f"Who is number {k}?", "answers": ["Six"]} | other


def test_questions_and_their_tally(tmp_path):
    rows = [question(1), question(2, question="the WHO is number 1"), question(3, answers=["A+", "B"], dataset="x")]
    rows += [question(4, question="???"), question(5, question="!!!")]  # both normalise to nothing, they are not equal
    path = write(tmp_path / "q.jsonl", rows)
    found = {"questions": 5, "repeated questions": 1, "golds that never match": 1}
    assert data.load_questions(path) == (rows, found)
    assert data.load_questions(path, drop_repeated=True) == ([rows[0], *rows[2:]], found | {"questions": 4})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (question(1), "id 'q1' was used on an earlier line"),
        (question(2, id=2), "field 'id' must be a text"),
        (question(2, id=""), "field 'id' must be a text"),
        (question(2, question=" "), "field 'question' must be a text"),
        (question(2, question=None), "field 'question' must be a text"),
        (question(2, answers=[]), "field 'answers' must be a list"),
        (question(2, answers="Six"), "field 'answers' must be a list"),
        (question(2, answers=["Six", ""]), "field 'answers' must be a list"),
        ({"id": "q2", "question": "x"}, "field 'answers' is missing"),
    ],
)
def test_bad_questions_are_named(tmp_path, row, reason):
    path = write(tmp_path / "q.jsonl", [question(1), row])
    with pytest.raises(InputError, match=re.escape(f"{path}:2: {reason}")):
        data.load_questions(path)


def test_no_questions(tmp_path):
    with pytest.raises(InputError, match="holds no question"):
        data.load_questions(write(tmp_path / "q.jsonl", []))
    with pytest.raises(InputError, match="no such file"):
        data.load_questions(tmp_path / "none.jsonl")


def test_fill_is_one_pass():
    assert fill("{a} {b} {a}", a="{b}", b="{a}") == "{b} {a} {b}"
    assert fill('{"x": 0} {a}', a=r"\1 \g<0> {0}") == r'{"x": 0} \1 \g<0> {0}'
    for template in ("no place", "{question} {answr}"):
        with pytest.raises(InputError, match="must hold exactly the places {question}"):
            fill(template, question="x")


def test_prompts_of_the_repository():
    plain, factual = (load_prompt(f"{data.__file__[:-8]}/prompts/{n}.txt") for n in ("plain", "factual"))
    assert plain == "{question}"
    filled = fill(factual, question="who {answer} </think>?")
    assert filled.endswith("\n\nQuestion: who {answer} </think>?")
    assert all(tag in factual for tag in TAGS)


TEMPLATE = """{%- for m in messages %}
    {%- if m.role == 'nobody' %}{% continue %}{% endif %}
    {%- if m.role == 'bad' %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}
    {{- bos_token + m.role + '\\n' + m.content + eos_token }}
{% endfor %}
{{ {'a<b': 'é'} | tojson }}
    {% if add_generation_prompt %}
assistant:{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}

    {% endif %}"""


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_template_equals_transformers(tiny_tokenizer, tmp_path, where):
    config = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>", "special": True}, "pad_token": None}
    if where == "chat_template.jinja":
        (tmp_path / where).write_text(TEMPLATE)
        config["chat_template"] = "not this one"
    else:
        config["chat_template"] = TEMPLATE
    files.write_json(tmp_path / "tokenizer_config.json", config)
    ours = ChatTemplate(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer, bos_token="<s>", eos_token="<|im_end|>")
    theirs.chat_template = TEMPLATE
    for thinking in (True, False):
        messages = [{"role": "user", "content": "a {{ 7 * 7 }} <b>\n"}]
        expected = theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert ours.prompt(messages[0]["content"], thinking) == expected
        assert "{{ 7 * 7 }} <b>" in expected and expected.count("<think>") == (not thinking)
    assert ours.render([{"role": "nobody", "content": ""}]).strip() == '{"a<b": "é"}'
    with pytest.raises(InputError, match="the chat template fails .unknown role bad"):
        ours.render([{"role": "bad", "content": "x"}])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% if %}", "does not parse"),
        ("{{ messages.__class__.__mro__ }}", "fails"),
        ("{{ messages.append(1) }}", "fails"),
        ("{{ 1 / 0 }}", "fails"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "fails"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "fails"),
        (None, "no chat template"),
        ([{"name": "tool_use", "template": "x"}], "no chat template"),
    ],
)
def test_bad_or_hostile_templates(tmp_path, source, reason):
    files.write_json(tmp_path / "tokenizer_config.json", {"chat_template": source} if source else {})
    with pytest.raises(InputError, match=f"tokenizer_config.json: .*{reason}"):
        ChatTemplate(tmp_path).prompt("x", True)


# Small templates with the prompts of two public models. R1-Distill: no system turn, always <think> and a line end.
R1 = (
    "{{ bos_token }}{% for m in messages %}<｜{{ m.role | capitalize }}｜>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
NEMOTRON = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content }}"
    "<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
)


def template(folder, source, system="", **special):
    files.write_json(folder / "tokenizer_config.json", {"chat_template": source} | special)
    return ChatTemplate(folder, system)


def test_golden_prompts_of_r1_distill(tmp_path):
    """The strings its published template renders; off, which it has not, is the closed empty block."""
    r1 = template(tmp_path, R1, bos_token={"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>"})
    head = "<｜begin▁of▁sentence｜><｜User｜>who wrote it<｜Assistant｜><think>\n"
    assert r1.prompt("who wrote it", True) == head and opens_thought(head)
    off = r1.prompt("who wrote it", False)
    assert off == head + "\n</think>\n\n" and not opens_thought(off)


def test_golden_prompts_of_nemotron(tmp_path):
    """Thinking is switched by the system turn; without one the thought is closed by hand, and said so."""
    head = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ndetailed thinking {}<|eot_id|>"
    tail = "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    nemotron = template(tmp_path, NEMOTRON, "detailed thinking {thinking}", bos_token="<|begin_of_text|>")
    for mode in ("on", "off"):
        assert nemotron.prompt("hi", mode == "on") == head.format(mode) + tail
    plain = template(tmp_path, NEMOTRON, bos_token="<|begin_of_text|>")
    assert plain.prompt("hi", True) == "<|begin_of_text|>" + tail
    assert plain.prompt("hi", False) == plain.prompt("hi", True) + "<think>\n\n</think>\n\n"  # closed by hand
    assert "--system 'detailed thinking {thinking}'" in plain.by_hand() and nemotron.by_hand() == ""


def test_tokenizer_without_the_special_tokens(tiny_tokenizer, tmp_path):
    qwen3 = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>"
    template(tmp_path, qwen3, eos_token="<|im_end|>").check(tiny_tokenizer)
    cases = ((R1, "<｜Assistant｜>, <｜User｜>", {}), (qwen3, "</s>", {"eos_token": "</s>"}))
    for source, named, special in cases:
        with pytest.raises(InputError, match=f"tokenizer_config.json: {named} is not one token of tokenizer.json"):
            template(tmp_path, source, **special).check(tiny_tokenizer)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "tokenizer.json"])
def test_tokenizer_files_may_not_lead_out_of_the_folder(tmp_path, name):
    folder = tmp_path / "model"
    template(tmp_path, "{{ messages }}")
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "tokenizer_config.json")
    with pytest.raises(InputError, match=f"{name}: a link out of the folder"):
        ChatTemplate(folder)
        load_tokenizer(folder)


def test_golden_prompts_of_qwen3(qwen3_tokenizer):
    template = ChatTemplate(shared_data() / "qwen3_tokenizer")
    cases = json.loads((shared_data() / "qwen3_chat_golden.json").read_text())
    for case in cases:
        variables = {k: case[k] for k in ("add_generation_prompt", "enable_thinking")}
        text = template.render(case["messages"], **variables)
        assert text == case["text"], case["name"]
        assert encode(qwen3_tokenizer, text) == case["input_ids"], case["name"]
        if len(case["messages"]) == 1:
            assert template.prompt(case["messages"][0]["content"], case["enable_thinking"]) == text
    assert len(cases) == 6
    template.check(qwen3_tokenizer)


# ---------- candidates


def sample(tokenizer, k, mode, draw, right, text=None, finish="stop"):
    """A draw for question k whose answer is right or wrong; the thought has 4 segments."""
    thought = f"\nQuestion {k}.\n\nDraw {draw}.\n\nHm.\n\nSo.\n"
    answer = f"<answer>{'Six' if right else 'Two'}</answer>"
    text = text or (f"<think>{thought}</think>\n\n{answer}" if mode == "on" else answer)
    ids = tokenizer.encode(text + ("<|im_end|>" if finish == "stop" else "")).ids
    row = question(k) | {"mode": mode, "draw": draw, "prompt": f"Q{k}", "prompt_ids": [k], "ids": ids}
    return row | {"text": text, "finish": finish}


def draws(tokenizer, k, on, off):
    return [sample(tokenizer, k, mode, d, z) for mode, zs in (("on", on), ("off", off)) for d, z in enumerate(zs)]


SMALL = dict(segments=(4, 15), think_tokens=(1, 1000))
FOUR = [(1, (1, 1, 1), (0, 0, 0)), (2, (0, 0, 0), (1, 1, 1)), (3, (1, 1, 1), (1, 1, 1)), (4, (0, 0, 0), (0, 0, 0))]
MIXED = [(5, (1, 1, 0), (0, 0, 0)), (6, (1, 1, 1), (0, 0, 1)), (7, (0, 1, 0), (1, 0, 1))]


def test_candidates_of_hand_made_draws(tiny_tokenizer):
    samples = [s for args in FOUR + MIXED for s in draws(tiny_tokenizer, *args)]
    random.Random(0).shuffle(samples)
    samples.sort(key=lambda s: s["id"])  # draws in any order, questions in theirs
    rows, tallies = data.select_candidates(samples, tiny_tokenizer, **SMALL)
    tally = tallies["all"]
    expected = {"questions": 7, "chosen": 1, "rejected": 1}
    reasons = {"draws disagree": 3, "right in both modes": 1, "wrong in both modes": 1}
    assert tally == expected | reasons and list(tally)[:3] == list(expected)
    assert [(r["id"], r["chosen"]) for r in rows] == [("q1", True), ("q2", False)]
    row, text = rows[0], "<think>\nQuestion 1.\n\nDraw 0.\n\nHm.\n\nSo.\n</think>\n\n<answer>Six</answer>"
    assert row["completion"] == text and row["prompt_ids"] == [1] and row["prompt"] == "Q1"
    assert [text[a:b] for a, b in row["spans"]] == ["\nQuestion 1.\n\n", "Draw 0.\n\n", "Hm.\n\n", "So.\n"]
    assert tiny_tokenizer.decode(row["completion_ids"], skip_special_tokens=False) == text + "<|im_end|>"
    thought = text[7 : text.index("</think>")]
    assert row["n_think_tokens"] == len(tiny_tokenizer.encode(thought).ids)
    json.dumps(rows)


def test_samples_are_taken_one_question_at_a_time(tiny_tokenizer):
    """In the sampler's order no more than two questions' draws are alive at once; any order gives the same rows."""
    samples = [s for args in FOUR + MIXED for s in draws(tiny_tokenizer, *args)]
    alive: list[int] = []

    class Row(dict):
        def __init__(self, row):
            super().__init__(row)
            alive.append(1)

        def __del__(self):
            alive.pop()

    most = 0

    def one_by_one():
        nonlocal most
        for row in samples:
            yield Row(row)
            most = max(most, len(alive))

    expected = data.select_candidates(one_by_one(), tiny_tokenizer, **SMALL)
    assert most <= 2 * 6 + 2  # the question in hand, the one that is read, and the row that was read last
    mixed = samples[::-1]
    random.Random(1).shuffle(mixed)
    mixed.sort(key=lambda s: s["draw"])  # all questions are open at once, in another order
    rows, tally = data.select_candidates(mixed, tiny_tokenizer, **SMALL)
    order = [r["id"] for r in mixed]
    assert rows == sorted(expected[0], key=lambda r: order.index(r["id"])) and tally["all"] == expected[1]["all"]
    late = [*samples, samples[0]]  # a draw of a question that was done with long ago
    with pytest.raises(InputError, match="draw 0 of 'q1', thinking on, comes twice"):
        data.select_candidates(late, tiny_tokenizer, **SMALL)


def test_fewer_draws_can_be_used_and_every_draw_can_be_kept(tiny_tokenizer):
    samples = [s for args in FOUR + MIXED for s in draws(tiny_tokenizer, *args)]
    rows, tally = data.select_candidates(samples, tiny_tokenizer, n_draws=1, **SMALL)
    assert [r["id"] for r in rows] == ["q1", "q2", "q5", "q6", "q7"]
    assert [r["chosen"] for r in rows] == [True, False, True, True, False]
    samples = [s | {"ids": samples[1]["ids"], "text": samples[1]["text"]} if s is samples[2] else s for s in samples]
    rows, tally = data.select_candidates(samples, tiny_tokenizer, keep="all", **SMALL)
    assert [r["id"] for r in rows] == ["q1#0", "q1#1", "q2#0", "q2#1", "q2#2"]
    tally = tally["all"]
    assert (tally["chosen"], tally["rejected"], tally["repeated draw"]) == (2, 3, 1)


def test_the_tally_is_told_by_data_set(tiny_tokenizer):
    """Table 1: what became of the questions of each set; the sets add up to all."""
    sets = {1: "nq_open", 2: "nq_open", 3: "sciq", 5: "sciq", 7: "nq_open"}
    samples = [
        s | ({"dataset": sets[args[0]]} if args[0] in sets else {})
        for args in FOUR + MIXED
        for s in draws(tiny_tokenizer, *args)
    ]
    _, tally = data.select_candidates(samples, tiny_tokenizer, **SMALL)
    assert tally["nq_open"] == {"questions": 3, "chosen": 1, "rejected": 1, "draws disagree": 1}
    assert tally["sciq"] == {
        "questions": 2, "chosen": 0, "rejected": 0, "draws disagree": 1, "right in both modes": 1
    }  # fmt: skip
    assert tally["unnamed"]["questions"] == 2
    for key, n in tally["all"].items():
        assert n == sum(of.get(key, 0) for name, of in tally.items() if name != "all")


def test_outcomes_of_both_modes(tiny_tokenizer):
    samples = draws(tiny_tokenizer, 1, (1, 1, 1), (0, 0, 0))
    samples[0] = sample(tiny_tokenizer, 1, "on", 0, True, "Six")
    samples[3] = sample(tiny_tokenizer, 1, "off", 0, True, "Si", "length")
    assert data.count_outcomes(samples) == {"on": {"ok": 2, "no_thought": 1}, "off": {"ok": 2, "cut": 1}}


@pytest.mark.parametrize(
    ("text", "finish", "on", "remedy"),
    [
        ("Six", "stop", (1, 1, 1), "9 of 9 completions with thinking on hold no thought: take a model that reasons"),
        ("<think>a", "length", (1, 1, 1), "9 of 9 completions with thinking on were cut short: raise --draw-max-new"),
        (None, "stop", (0, 0, 0), "no answer is a gold: look at some"),
        (None, "stop", (1, 0, 1), "draw at a lower temperature"),
    ],
)
def test_the_remedy_follows_the_main_cause(tiny_tokenizer, text, finish, on, remedy):
    samples = [
        s
        for k in range(3)
        for s in (
            [sample(tiny_tokenizer, k, "on", d, z, text, finish) for d, z in enumerate(on)]
            + [sample(tiny_tokenizer, k, "off", d, False) for d in range(3)]
        )
    ]
    with pytest.raises(InputError, match=remedy):
        data.select_candidates(samples, tiny_tokenizer, **SMALL)


def test_the_placeholder_is_the_prompts():
    assert f"<answer> {data.PLACEHOLDER} </answer>" in load_prompt(files.ROOT / "prompts" / "factual.txt")


def test_limits_hold_their_ends_and_every_question_is_accounted_for(tiny_tokenizer):
    base = [s for args in FOUR[:2] for s in draws(tiny_tokenizer, *args)]
    count = data.select_candidates(base, tiny_tokenizer, **SMALL)[0][0]["n_think_tokens"]

    def tally(samples, **limits):
        rows, tallies = data.select_candidates(base + samples, tiny_tokenizer, **(SMALL | limits))
        tally = tallies["all"]
        assert sum(v for k, v in tally.items() if k != "questions") == tally["questions"]
        return {k: v for k, v in tally.items() if k not in ("questions", "chosen", "rejected")}

    assert tally([], segments=(4, 4), think_tokens=(count, count)) == {}
    for bad, reason in (
        ({"segments": (5, 9)}, "fewer than 5 segments"),
        ({"segments": (1, 3)}, "more than 3 segments"),
        ({"think_tokens": (count + 1, 999)}, f"fewer than {count + 1} thinking tokens"),
        ({"think_tokens": (0, count - 1)}, f"more than {count - 1} thinking tokens"),
    ):
        with pytest.raises(InputError, match=f"no chosen row .*{reason} 2.*; widen --min-.* or draw for more"):
            tally([], **bad)

    def third(text, finish="stop"):
        """Question 3 with thinking on right in every draw, draw 0 as given."""
        rest = draws(tiny_tokenizer, 3, (1, 1, 1), (0, 0, 0))
        return [sample(tiny_tokenizer, 3, "on", 0, True, text, finish), *rest[1:]]

    thought = "<think>a\n\nb\n\nc\n\nd</think>"
    assert tally(third(f"{thought}Six")) == {}
    assert tally(third(f"{thought}<answer>Six</answer> Yes.")) == {}  # chatter after the answer leaves no doubt
    assert tally(third(f"So:\n{thought}<answer>Six</answer>")) == {}  # nor before the thought
    assert tally(third(f"{thought}<answer>Two</answer><answer>Six</answer>")) == {"trace is multiple": 1}
    assert tally(third("a\n\nb</think>Six")) == {"trace is no_open": 1}
    assert tally(third(f"{thought}<answer>Six</answer>", "length")) == {"trace has no end token": 1}
    assert tally(third(f"{thought}Six", "length")) == {"draws disagree": 1}  # a cut answer is not right
    assert tally(third("<think>I say Six")) == {"draws disagree": 1}  # nor is an unfinished thought


def test_the_matcher_is_the_callers(tiny_tokenizer):
    samples = [s for args in FOUR[:2] for s in draws(tiny_tokenizer, *args)]
    samples += [s for s in draws(tiny_tokenizer, 3, (0, 0, 0), (0, 0, 0)) if s["mode"] == "off"]
    thought = "<think>a\n\nb\n\nc\n\nd</think>"
    samples += [sample(tiny_tokenizer, 3, "on", d, True, f"{thought}It is Six.") for d in range(3)]
    assert data.select_candidates(samples, tiny_tokenizer, **SMALL)[1]["all"]["chosen"] == 1
    assert data.select_candidates(samples, tiny_tokenizer, matcher="contains", **SMALL)[1]["all"]["chosen"] == 2
    assert data.select_candidates(samples, tiny_tokenizer, matcher="words", **SMALL)[1]["all"]["chosen"] == 2
    boxed = [s | {"answers": ["{"]} for s in draws(tiny_tokenizer, 4, (1, 1, 1), (0, 0, 0))]
    tally = data.select_candidates([*samples, *boxed], tiny_tokenizer, matcher="verifier", **SMALL)[1]["all"]
    assert (tally["chosen"], tally["gold has no value"]) == (1, 1)


def test_bad_samples_are_named(tiny_tokenizer):
    samples = [s for args in FOUR for s in draws(tiny_tokenizer, *args)]

    def refused(rows, reason, **other):
        with pytest.raises(InputError, match=reason) as caught:
            data.select_candidates(rows, tiny_tokenizer, **(SMALL | other))
        assert "\n" not in str(caught.value)

    refused([], "no chosen row came out of the samples .questions 0")
    refused(samples[:6] + samples[12:], "no rejected row .*right in both modes 1, wrong in both modes 1")
    refused(samples[6:], "no chosen row")
    refused(samples + samples[:1], "draw 0 of 'q1', thinking on, comes twice")
    refused(samples[1:], "draw 0 of 'q1', thinking on, is missing; finish sampling")
    refused(samples, "draw 3 of 'q1'", n_draws=4)
    refused([samples[0] | {"mode": "maybe"}], "mode 'maybe'")
    refused([{k: v for k, v in samples[0].items() if k != "finish"}], "field 'finish' is missing")
    refused([samples[0] | {"text": samples[0]["text"] + " "}, *samples[1:]], "ids of 'q1' do not spell its text")


# ---------- training rows, packing


def record(tokenizer, k=1, **other):
    text = "<think>\nOne.\n\nTwo.\n\nThree.\n</think>\n\n<answer>Six</answer>"
    spans = [[a, b] for a, b in data.split_segments(text, 7, text.index("</think>"))]
    row = {"id": f"q{k}", "prompt": "Q", "completion": text, "label": True, "prompt_ids": [k, 2]}
    row["completion_ids"] = tokenizer.encode(text + "<|im_end|>").ids
    return row | {"spans": spans, "labels": [["framing"], [], ["retrieval"]], "w": [0.5, 2.0, 1.5]} | other


def test_training_rows_carry_their_weights(tiny_tokenizer, tmp_path):
    rows = [record(tiny_tokenizer), record(tiny_tokenizer, 2, label=False, spans=[], labels=[], w=[])]
    loaded = data.load_train(write(tmp_path / "t.jsonl", rows))
    assert loaded == rows
    first, second = data.to_rows(loaded, tiny_tokenizer)
    assert (first.id, first.chosen, first.prompt_ids) == ("q1", True, [1, 2]) and second.chosen is False
    assert first.w.dtype == torch.float32 and first.w.shape == (len(first.completion_ids),)
    words = [tiny_tokenizer.decode([i], skip_special_tokens=False) for i in first.completion_ids]
    seen, expected = 0, []  # the three segments, counted off by the characters written so far
    for word in words:
        expected.append(next(w for w, end in zip((1, 0.5, 2, 1.5, 1), (7, 14, 20, 27, 999), strict=True) if seen < end))
        seen += len(word)
    assert first.w.tolist() == expected
    assert second.w.tolist() == [1.0] * len(second.completion_ids)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": 1}, "field 'label' must be true or false"),
        ({"w": [1.0, 1.0]}, "3 spans, 3 label sets and 2 weights"),
        ({"labels": [[]]}, "3 spans, 1 label sets"),
        ({"w": [1.0, -1.0, 1.0]}, "field 'w' must hold positive numbers"),
        ({"w": [1.0, "1", 1.0]}, "field 'w' must hold positive numbers"),
        ({"w": [1.0, 1e999, 1.0]}, "not a JSON row|positive numbers"),
        ({"w": None}, "must be lists"),
        ({"completion_ids": []}, "field 'completion_ids' must be a list of one or more"),
        ({"prompt_ids": []}, "field 'prompt_ids' must be a list of one or more"),
        ({"prompt_ids": [1.5]}, "field 'prompt_ids' must be"),
        ({"prompt_ids": [True]}, "field 'prompt_ids' must be"),
        ({"completion": 3}, "field 'completion' must be a text"),
        ({"spans": [[7, 14], [13, 20], [20, 27]]}, "ascending, apart and inside"),
        ({"spans": [[7, 14], [14, 20], [20, 999]]}, "ascending, apart and inside"),
        ({"spans": [[7, 14], [14, 14], [20, 27]]}, "must hold pairs"),
        ({"spans": [[7, 14], [14], [20, 27]]}, "must hold pairs"),
        ({"spans": [[-1, 14], [14, 20], [20, 27]]}, "ascending, apart and inside"),
        ({"id": "q1"}, "id 'q1' was used"),
    ],
)
def test_bad_training_rows_are_named(tiny_tokenizer, tmp_path, change, reason):
    lines = [json.dumps(record(tiny_tokenizer)), json.dumps(record(tiny_tokenizer, 2) | change)]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=f"t.jsonl:2: .*({reason}).*; "):
        data.load_train(path)


def test_training_rows_of_another_tokenizer_or_none(tiny_tokenizer, tmp_path):
    with pytest.raises(InputError, match="training row 'q1': its ids do not spell its text"):
        data.to_rows([record(tiny_tokenizer, completion="<think>\nOther")], tiny_tokenizer)
    with pytest.raises(InputError, match="holds no training row"):
        data.load_train(write(tmp_path / "t.jsonl", []))


def test_shuffled_weights_stay_in_their_class():
    chance = random.Random(3)
    rows = [
        {"id": k, "label": k % 3 > 0, "w": [chance.random() for _ in range(chance.randint(0, 6))]} for k in range(40)
    ]
    before = json.dumps(rows)
    shuffled = data.shuffle_weights(rows, seed=1)
    assert json.dumps(rows) == before
    for label in (True, False):
        old, new = ([x for r in some if r["label"] is label for x in r["w"]] for some in (rows, shuffled))
        assert old != new and sorted(old) == sorted(new)
    assert [len(r["w"]) for r in rows] == [len(r["w"]) for r in shuffled]
    assert shuffled == data.shuffle_weights(rows, seed=1) != data.shuffle_weights(rows, seed=2)


def test_mean_weights_by_hand():
    """Chosen steps weigh 1, 2 and 3, rejected ones 4 and 8; a row without a step stays without."""
    rows = [{"label": True, "w": [1.0, 2.0]}, {"label": False, "w": [4.0, 8.0]}, {"label": True, "w": [3.0]}]
    rows.append({"label": False, "w": []})
    want = [[2.0, 2.0], [6.0, 6.0], [2.0], []]
    assert [row["w"] for row in data.reweighted(rows, "mean", seed=0)] == want


def test_packing_by_hand():
    rows = [([10, 11], [12, 13, 14], torch.tensor([1.0, 0.5, 2.0])), ([20], [21], torch.tensor([3.0]))]
    batch = data.pack(rows)
    assert batch.ids.tolist() == [10, 11, 12, 13, 14, 20, 21]
    assert batch.cu_seqlens.tolist() == [0, 5, 7]
    assert batch.predict.tolist() == [1, 2, 3, 5]
    assert batch.targets.tolist() == [12, 13, 14, 21]
    assert batch.w.tolist() == [1.0, 0.5, 2.0, 3.0]
    assert batch.cu_targets.tolist() == [0, 3, 4]
    for name in ("ids", "cu_seqlens", "predict", "targets", "cu_targets"):
        assert getattr(batch, name).dtype == torch.int64, name
    assert batch.w.dtype == torch.float32


def test_packing_predicts_the_next_token_of_the_same_row():
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows = []
        for _ in range(rng.integers(1, 6)):
            p, c = (rng.integers(0, 1000, rng.integers(1, 9)).tolist() for _ in range(2))
            rows.append((p, c, torch.from_numpy(rng.random(len(c)))))
        batch = data.pack(rows).to("cpu")
        assert torch.equal(batch.ids[batch.predict + 1], batch.targets)
        for b, (p, c, w) in enumerate(rows):
            assert batch.ids[batch.cu_seqlens[b] : batch.cu_seqlens[b + 1]].tolist() == p + c
            part = slice(batch.cu_targets[b], batch.cu_targets[b + 1])
            assert batch.targets[part].tolist() == c and torch.equal(batch.w[part], w.float())
            assert (batch.predict[part] >= batch.cu_seqlens[b]).all()


@pytest.mark.parametrize(("p", "c", "n"), [([], [1], 1), ([1], [], 0), ([1], [1, 2], 1)])
def test_rows_that_cannot_be_packed(p, c, n):
    with pytest.raises(AssertionError):
        data.pack([([1], [2], torch.ones(1)), (p, c, torch.ones(n))])
    with pytest.raises(AssertionError):
        data.pack([])


# ---------- one question's way


def test_one_question_from_samples_to_a_batch(tiny_tokenizer, tmp_path):
    """No text is encoded twice on the way: the ids in the batch are the sampled ones."""
    samples = [s for args in FOUR[:2] for s in draws(tiny_tokenizer, *args)]
    candidates, _ = data.select_candidates(samples, tiny_tokenizer, **SMALL)
    records = [
        {
            "id": c["id"],
            "prompt": c["prompt"],
            "completion": c["completion"],
            "label": c["chosen"],
            "prompt_ids": c["prompt_ids"],
            "completion_ids": c["completion_ids"],
            "spans": c["spans"],
            "labels": [["framing"]] * 4,
            "w": [0.5, 2.0, 1.5, 0.75],
        }
        for c in candidates
    ]
    rows = data.to_rows(data.load_train(write(tmp_path / "t.jsonl", records)), tiny_tokenizer)
    batch = data.pack([(r.prompt_ids, r.completion_ids, r.w) for r in rows])
    assert batch.targets.tolist() == samples[0]["ids"] + samples[6]["ids"]
    assert batch.ids.tolist() == [1, *samples[0]["ids"], 2, *samples[6]["ids"]]
    assert set(batch.w.tolist()) == {1.0, 0.5, 2.0, 1.5, 0.75}
    assert batch.w[0] == 1.0 and batch.w[-1] == 1.0  # <think> and the end token
