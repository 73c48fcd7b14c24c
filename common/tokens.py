"""A checkpoint's tokenizer: text to ids, and sampled ids back to text with the characters every token covers.

The characters of a token come from the token's own bytes (`token_offsets`); nothing is ever tokenised a second time.
What becomes of each option of tokenizer.json, as transformers has it:

  truncation, padding         reset: transformers resets them on every call, and a prompt is never cut
  added_tokens                honoured, with lstrip, rstrip, single_word, normalized and special
  normalizer, pre_tokenizer   honoured; a pre_tokenizer without ByteLevel is refused, its texts could not be decoded
  post_processor              not applied: the chat template has written the special tokens
  decoder                     refused unless ByteLevel
  model                       refused unless BPE; dropout (ids by chance), continuing_subword_prefix and
                              end_of_word_suffix (tokens that are not their bytes) are refused; unk_token, fuse_unk,
                              byte_fallback and ignore_merges are honoured

and of tokenizer_config.json: split_special_tokens true is refused (the template's special tokens would be text), and a
token in added_tokens_decoder, additional_special_tokens or extra_special_tokens that tokenizer.json has not, or under
another id (transformers would add it, with an id that the model has no row for);
add_bos_token, add_eos_token, clean_up_tokenization_spaces, model_max_length and padding_side touch nothing that is used
here. Left out: tokenizers that are not byte-level BPE.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common.errors import InputError
from common.files import read_json, read_text
from common.hub import member
from common.rows import LARGEST_ID

Span = tuple[int, int]  # characters [c0, c1) of a completion


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer.json of a checkpoint directory. Raises InputError when it is missing, bad or not byte-level."""
    path = member(folder, "tokenizer.json")
    text = read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more precise than Exception
        raise InputError(f"{path}: not a tokenizer ({error}); restore the file") from None
    _check_byte_level(tokenizer)
    _check_model(path, tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = member(folder, "tokenizer_config.json")
    if config.exists():
        _check_config(config, tokenizer)
    return tokenizer


def _check_config(path: Path, tokenizer: Tokenizer) -> None:
    """Raise InputError where tokenizer_config.json would make another tokenizer of it than tokenizer.json."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: must hold one JSON object; restore the file")
    if config.get("split_special_tokens"):
        raise InputError(f"{path}: split_special_tokens is true, which makes text of special tokens; set it false")
    for name, kinds in (("added_tokens_decoder", dict), ("additional_special_tokens", list)):
        if not isinstance(config.get(name) or kinds(), kinds):
            raise InputError(f"{path}: {name} must be a {kinds.__name__}; take the file from the checkpoint again")
    more = config.get("extra_special_tokens") or []
    if not isinstance(more, list | dict):
        raise InputError(f"{path}: extra_special_tokens must be a list or a dict; take the file again")
    named = [*(config.get("additional_special_tokens") or []), *(more.values() if isinstance(more, dict) else more)]
    added = config.get("added_tokens_decoder") or {}
    for key, token in [*((None, token) for token in named), *added.items()]:
        content = token.get("content") if isinstance(token, dict) else token
        found = tokenizer.token_to_id(content) if isinstance(content, str) else None
        if found is None or (key is not None and str(found) != key):
            where = f"{content!r} with the id {key}" if key is not None else repr(content)
            raise InputError(f"{path}: {where} is no token of tokenizer.json; take both files from one checkpoint")


def _check_byte_level(tokenizer: Tokenizer) -> None:
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise InputError(f"tokenizer: the decoder is {tokenizer.decoder}, not ByteLevel; use a byte-level BPE model")


def _check_model(path: Path, tokenizer: Tokenizer) -> None:
    """Raise InputError at an option by which ids would come by chance or not spell their text."""
    model, first = tokenizer.model, tokenizer.pre_tokenizer
    if not isinstance(model, models.BPE):
        raise InputError(f"{path}: the model is {type(model).__name__}, not BPE; use a byte-level BPE model")
    steps = _steps(first) if isinstance(first, pre_tokenizers.Sequence) else [first]
    if not any(isinstance(step, pre_tokenizers.ByteLevel) for step in steps):
        raise InputError(f"{path}: the pre_tokenizer is {first}, without ByteLevel; use a byte-level BPE model")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if getattr(model, name):
            raise InputError(f"{path}: {name} is {getattr(model, name)!r}; supported: null")


def _steps(sequence: pre_tokenizers.Sequence) -> list[pre_tokenizers.PreTokenizer]:
    """The parts of a sequence, which has no length of its own."""
    parts: list[pre_tokenizers.PreTokenizer] = []
    with contextlib.suppress(IndexError):
        while True:
            parts.append(sequence[len(parts)])
    return parts


def load_stop_ids(folder: str | Path, tokenizer: Tokenizer) -> set[int]:
    """Tokens that end a completion: eos_token_id of generation_config.json if it is there, else of config.json.

    Raises InputError when there is none, or one the tokenizer does not have.
    """
    paths = [member(folder, name) for name in ("generation_config.json", "config.json")]
    read = [(path, read_json(path)) for path in paths if path.exists()]
    if odd := [path for path, config in read if not isinstance(config, dict)]:
        raise InputError(f"{odd[0]}: must hold one JSON object; restore the file")
    found = [(path, config.get("eos_token_id")) for path, config in read]
    path, ids = next(((path, ids) for path, ids in found if ids is not None), (paths[-1], []))
    ids = ids if isinstance(ids, list) else [ids]
    if not ids or not all(type(i) is int and 0 <= i < LARGEST_ID and tokenizer.id_to_token(i) for i in ids):
        raise InputError(f"{path}: eos_token_id is {ids}; it must name tokens of tokenizer.json, restore both files")
    return set(ids)


def unused_ids(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The ids of a model's head that the tokenizer has no token for: rows that pad it, and holes between tokens."""
    return sorted(set(range(vocab_size)) - set(tokenizer.get_vocab(with_added_tokens=True).values()))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a rendered prompt. The chat template has written the special tokens, so none are added."""
    return tokenizer.encode(text, add_special_tokens=False).ids


# Around a piece of a prompt that is text whatever it spells: characters for private use, which no template writes.
OPEN, SHUT = "\ue000", "\ue001"
GUARDED = re.compile(f"{OPEN}([{OPEN}{SHUT}]|[^{OPEN}{SHUT}]+){SHUT}")


def control_tokens(tokenizer: Tokenizer, template: str, more: Sequence[str] = ()) -> re.Pattern[str]:
    """The tokens that mean something to a model beyond their letters: special ones, those that the chat template
    writes (as in transformers' sanitize_control_tokens), and `more` that are tokens; and the two marks."""
    added = tokenizer.get_added_tokens_decoder().values()
    found = {t.content for t in added if t.special or (t.content in template and not t.content.isspace())}
    found |= {t.content for t in added if t.content in more} | {OPEN, SHUT}
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))))


def guarded(text: str, control: re.Pattern[str]) -> str:
    """A text from outside for a place in a prompt: `encode_guarded` will read the control tokens in it as text."""
    return control.sub(rf"{OPEN}\g<0>{SHUT}", text)


def unguarded(text: str) -> str:
    """The prompt as it reads, without the marks."""
    return GUARDED.sub(r"\1", text)


def encode_guarded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a rendered prompt with guarded pieces: the control tokens in them are spelt out, all others are tokens.

    The ids are transformers' with sanitize_control_tokens. Raises InputError where the letters of a token make the
    token itself, as a vocabulary without special tokens would.
    """
    ids: list[int] = []
    for k, piece in enumerate(GUARDED.split(text)):  # text, guarded, text, guarded, ..., text
        if not piece or k % 2 == 0:
            ids += encode(tokenizer, piece) if piece else []
            continue
        plain = tokenizer.normalizer.normalize_str(piece) if tokenizer.normalizer else piece
        words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(plain)]
        spelt = [token.id for word in words for token in tokenizer.model.tokenize(word)]
        if tokenizer.token_to_id(piece) in spelt:
            raise InputError(f"the tokenizer makes {piece!r} of its letters; take it out of the question or result")
        ids += spelt
    return ids


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes every byte as one visible character: itself where it is one, else from U+0100 upwards."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + k): b for k, b in enumerate(others)}


BYTE_OF_CHAR = _byte_alphabet()


class _Pieces(dict[int, bytes]):
    """The bytes that an id of a byte-level tokenizer stands for, looked up once an id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        _check_byte_level(tokenizer)
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        super().__init__({i: token.content.encode("utf-8") for i, token in added.items()})

    def __missing__(self, i: int) -> bytes:
        if i < 0:
            raise InputError(f"token id {i} is none; use the tokenizer the text was sampled with")
        token = self.tokenizer.id_to_token(i)
        self[i] = b"" if token is None else bytes([BYTE_OF_CHAR[c] for c in token])
        return self[i]


@lru_cache(maxsize=4)
def _pieces(tokenizer: Tokenizer, size: int) -> _Pieces:
    """The table of a tokenizer of this size: tokens can be added to it later."""
    return _Pieces(tokenizer)


def _bytes_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes]:
    """What each id stands for."""
    return list(map(_pieces(tokenizer, tokenizer.get_vocab_size()).__getitem__, ids))


def token_offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of sampled ids and the character range of each: what decoding gives, added tokens included.

    A token's range runs from the character that holds its first byte to the one that holds its last byte, so the tokens
    of a split character share it. Bytes that are not UTF-8 show up as U+FFFD, as in `tokenizer.decode`. For ids that
    `tokenizer.encode` gave, the starts are those of its own offsets. An id beyond the tokenizer, as the rows that pad
    an embedding have and a model can sample, is no text, as in transformers: an empty range where it stands.
    Raises InputError at a negative id, or when the tokenizer is not byte-level.
    """
    pieces = _bytes_of(tokenizer, ids)
    text, char_of_byte = _decode(b"".join(pieces))
    lengths = np.array([len(p) for p in pieces], dtype=np.int64)
    ends = lengths.cumsum()
    char_of_byte = np.append(char_of_byte, len(text))  # where a token without text stands at the end
    first, last = char_of_byte[ends - lengths], char_of_byte[ends - 1]
    return text, list(zip(first.tolist(), np.where(lengths > 0, last + 1, first).tolist(), strict=True))


def _decode(raw: bytes) -> tuple[str, np.ndarray]:
    """`raw` as text, U+FFFD for what is not UTF-8, and the index of the character each byte is part of, (bytes,)."""
    text, index = "", [np.empty(0, dtype=np.int64)]
    while raw:
        try:
            part, good, bad = raw.decode("utf-8"), len(raw), 0
        except UnicodeDecodeError as error:  # the longest broken sequence is one U+FFFD, as everywhere
            part, good, bad = raw[: error.start].decode("utf-8"), error.start, error.end - error.start
        opens = (np.frombuffer(raw[:good], dtype=np.uint8) & 0xC0) != 0x80  # a byte 10xxxxxx continues a character
        index += [len(text) + opens.cumsum() - 1, np.full(bad, len(text) + len(part))]
        text += part + ("\ufffd" if bad else "")
        raw = raw[good + bad :]
    return text, np.concatenate(index)


LEAST_SPELT = 0.9  # of the letters that ids spell, in a server's text


def speller(tokenizer: Tokenizer) -> Callable[[Sequence[int], str], bool]:
    """A function that says whether a server's text is that of its ids.

    Not letter by letter: servers leave out the token that stopped them and other special tokens, put blanks around
    added ones, cut a character that is not finished, and drop a token now and then where they decode piece by piece.
    So added tokens, white space and broken characters do not count, and up to a tenth of the rest may be missing in
    the text. It must hold nothing else.
    """
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.content}
    longest_first = sorted(added, key=len, reverse=True)
    passed = re.compile("|".join([*map(re.escape, longest_first), r"\s", "\ufffd"]))

    def spells(ids: Sequence[int], text: str) -> bool:
        spelt = b"".join(_bytes_of(tokenizer, ids)).decode("utf-8", "replace")
        own, given = passed.sub("", spelt), passed.sub("", text)
        left = iter(own)
        return own == given or (len(given) >= LEAST_SPELT * len(own) and all(c in left for c in given))

    return spells
