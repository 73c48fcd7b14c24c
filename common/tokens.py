"""A checkpoint's tokenizer: text to ids, and sampled ids back to text with the characters every token covers.

The characters of a token come from the token's own bytes (`token_offsets`); nothing is ever tokenised a second time.
Left out: tokenizers that are not byte-level BPE.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders

from common.errors import InputError
from common.files import read_json, read_text
from common.hub import member

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
    return tokenizer


def _check_byte_level(tokenizer: Tokenizer) -> None:
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise InputError(f"tokenizer: the decoder is {tokenizer.decoder}, not ByteLevel; use a byte-level BPE model")


def load_stop_ids(folder: str | Path, tokenizer: Tokenizer) -> set[int]:
    """Tokens that end a completion: eos_token_id of generation_config.json if it is there, else of config.json.

    Raises InputError when there is none, or one the tokenizer does not have.
    """
    paths = [member(folder, name) for name in ("generation_config.json", "config.json")]
    found = [(path, read_json(path).get("eos_token_id")) for path in paths if path.exists()]
    path, ids = next(((path, ids) for path, ids in found if ids is not None), (paths[-1], []))
    ids = ids if isinstance(ids, list) else [ids]
    if not ids or not all(type(i) is int and i >= 0 and tokenizer.id_to_token(i) is not None for i in ids):
        raise InputError(f"{path}: eos_token_id is {ids}; it must name tokens of tokenizer.json, restore both files")
    return set(ids)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a rendered prompt. The chat template has written the special tokens, so none are added."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes every byte as one visible character: itself where it is one, else from U+0100 upwards."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + k): b for k, b in enumerate(others)}


BYTE_OF_CHAR = _byte_alphabet()


@lru_cache(maxsize=1 << 18)
def _token_bytes(token: str) -> bytes:
    """The bytes a byte-level BPE token stands for. Raises KeyError at a character outside the alphabet."""
    return bytes([BYTE_OF_CHAR[c] for c in token])


def token_offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of sampled ids and the character range of each: what decoding gives, added tokens included.

    A token's range runs from the character that holds its first byte to the one that holds its last byte, so the tokens
    of a split character share it. Bytes that are not UTF-8 show up as U+FFFD, as in `tokenizer.decode`. For ids that
    `tokenizer.encode` gave, the starts are those of its own offsets.
    Raises InputError at an id the tokenizer does not have, or when it is not byte-level.
    """
    _check_byte_level(tokenizer)
    added = {i: token.content.encode("utf-8") for i, token in tokenizer.get_added_tokens_decoder().items()}
    pieces = []
    for i in ids:
        token = tokenizer.id_to_token(i)
        if token is None:
            raise InputError(f"token id {i} is not in the tokenizer; use the tokenizer the text was sampled with")
        pieces.append(added[i] if i in added else _token_bytes(token))
    text, char_of_byte = _decode(b"".join(pieces))
    lengths = np.array([len(p) for p in pieces], dtype=np.int64)
    ends = lengths.cumsum()
    first, last = char_of_byte[ends - lengths], char_of_byte[ends - 1]
    return text, list(zip(first.tolist(), (last + 1).tolist(), strict=True))


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
