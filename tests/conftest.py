"""What several test files need: the repository on the path, public data where there is some, a tiny real tokenizer."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suites run side by side with other work
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born deaf to it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from common import tokens  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """A skipped test always says why."""
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Large files first: they take longest, and one that starts last would keep a single worker busy at the end."""
    items.sort(key=lambda item: (-item.path.stat().st_size, item.path))  # stable: the order within a file stays


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A program that ran in this process and was stopped stays deaf to further signals: it is ending. Tests go on."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for n, handler in before.items():
        signal.signal(n, handler)


def shared_data() -> Path:
    """The folder with public data sets and the Qwen3 tokenizer: $MRALIGN_SHARED, else ../shared/data. Skips without."""
    folder = Path(os.environ.get("MRALIGN_SHARED", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no public data at {folder}; set MRALIGN_SHARED to use it")
    return folder


CORPUS = [
    "Okay, the user asks for the capital of France.\n\nI recall that it is Paris.\n\nSo the answer is Paris.\n",
    "Wait, is that right?\n\nLet me check: Lyon is a city, not the capital.\n\n\nYes.\r\n\r\nParis, then!\n\nParis.",
    "日本の首都は東京です。\n\n東京。\n\nСтолица России - Москва.\n\nCafé crème, naïve façade.",
] * 4


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE as Qwen's, but tiny: its pre-tokenizer lets ".\\n\\n" be one token, over a segment's end."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    split = pre_tokenizers.Split(words, behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    names = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
    tokenizer.add_tokens([AddedToken(name, special=name.startswith("<|"), normalized=False) for name in names])
    return tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """`build_tokenizer`, made once."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> Tokenizer:
    """The real Qwen3 tokenizer; skips where there is no public data."""
    return tokens.load_tokenizer(shared_data() / "qwen3_tokenizer")


def cells(text: str) -> list[list[str]]:
    """The cells of every line of a text with Markdown tables; how wide a column is and where it leans do not count."""
    lines = (line for line in text.strip().splitlines() if not set(line) <= set("|-: ") or not line)
    return [[cell.strip() for cell in line.split("|")] for line in lines]
