"""Text to packed token ids, several times faster than the bare encoder and with identical ids.

BPE merges two neighbours only when their concatenation is a piece of the vocabulary. Where no piece contains the two
characters on either side of a boundary, no merge crosses it, and both sides encode independently. Text is therefore cut
at such boundaries, each distinct chunk is encoded once, and everything else is a dictionary look-up.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from data_prep.tokenizer import SPACE_SYMBOL, Tokenizer

MODEL_TYPE_BPE = 2  # sentencepiece.TrainerSpec.ModelType.BPE
PIECE_NORMAL, PIECE_USER_DEFINED, PIECE_UNUSED = 1, 4, 5  # sentencepiece.ModelProto.SentencePiece.Type
MAX_CACHED_CHARACTERS = 64  # longer chunks hardly ever repeat
MAX_CACHED_CHUNKS = 1 << 20  # about 200 MB in each worker at worst
BLOCK_CHARACTERS = 1 << 20  # bounds the list of chunks held at once
ISOLATED = frozenset("\n\t\r\f\v\0" + SPACE_SYMBOL)  # each is a chunk of its own unless the vocabulary merges it
DIGITS = frozenset("0123456789")


def token_dtype(vocab_size: int) -> str:
    """Name of the smallest NumPy type that holds every id: `uint16` or `uint32`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class Encoder:
    """`encode(text)` gives the same ids as `Tokenizer.encode`, packed as little-endian uint16 or uint32 bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
        self.pattern = chunk_pattern(tokenizer)
        self._cache = _ChunkCache(self)

    @property
    def cuttable(self) -> bool:
        """Whether a document may be encoded in parts, cut after any newline and in front of any run of spaces."""
        return self.pattern is not None and self.pattern.findall("x\nx") == ["x", "\n", "x"]

    def encode(self, text: str) -> bytes:
        if self.pattern is None:
            return self.encode_plain(text)
        find_chunks, look_up = self.pattern.findall, self._cache.__getitem__
        if len(text) <= BLOCK_CHARACTERS:
            return b"".join(map(look_up, find_chunks(text)))
        return b"".join(b"".join(map(look_up, chunks)) for chunks in self._blocks_of_chunks(text))

    def encode_plain(self, text: str) -> bytes:
        """The ids straight from sentencepiece: the reference that `encode` must equal."""
        return np.array(self.tokenizer.encode(text), dtype=self.dtype).tobytes()

    def check(self, text: str) -> None:
        """Raises RuntimeError (a bug, never an input's fault) unless the fast path equals the plain one on `text`."""
        if self.encode(text) != self.encode_plain(text):
            raise RuntimeError(f"cached encoding differs from sentencepiece's with {self.tokenizer.path}: {text!r}")

    def _blocks_of_chunks(self, text: str) -> Iterable[list[str]]:
        assert self.pattern is not None
        start, size = 0, BLOCK_CHARACTERS
        while start < len(text):
            stop = start + size
            chunks = self.pattern.findall(text, start, stop)
            if stop < len(text):
                chunks.pop()  # the block's end may have cut it
                if not chunks:
                    size *= 2
                    continue
            yield chunks
            start += sum(map(len, chunks))
            size = BLOCK_CHARACTERS


class _ChunkCache(dict[str, bytes]):
    """Packed ids by chunk. Full, it starts afresh: what is frequent is back at once."""

    def __init__(self, encoder: Encoder) -> None:
        self._encode = encoder.encode_plain

    def __missing__(self, chunk: str) -> bytes:
        packed = self._encode(chunk)
        if len(chunk) <= MAX_CACHED_CHARACTERS:
            if len(self) >= MAX_CACHED_CHUNKS:
                self.clear()
            self[chunk] = packed
        return packed


def chunk_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """A pattern whose matches tile any text and cut it only where no piece of the vocabulary can cross.

    None where that is not provable (no BPE, a normaliser that rewrites text, a space inside a piece): such models take
    the plain path.
    """
    spec = tokenizer.proto.trainer_spec
    if not tokenizer.is_lossless or spec.model_type != MODEL_TYPE_BPE or spec.treat_whitespace_as_suffix:
        return None
    types = (PIECE_NORMAL, PIECE_USER_DEFINED, PIECE_UNUSED)
    pieces = [piece.piece.replace(SPACE_SYMBOL, " ") for piece in tokenizer.proto.pieces if piece.type in types]
    pattern = pattern_from_pieces(pieces)
    if pattern is None or any(len(pattern.findall(piece)) > 1 for piece in pieces):
        return None
    return pattern


def pattern_from_pieces(pieces: Iterable[str]) -> re.Pattern[str] | None:
    """The pattern of `chunk_pattern` for pieces written with plain spaces, or None."""
    pairs = {pair for piece in pieces for pair in pairwise(piece)}
    if any(right == " " != left for left, right in pairs):
        return None
    groups = _character_groups(pairs)
    punctuation, digits, isolated = (_character_class(groups[name]) for name in ("punctuation", "digits", "isolated"))
    digits_merge = any(left in groups["digits"] and right in groups["digits"] for left, right in pairs)
    digits_after_space = any(left == " " and right in groups["digits"] for left, right in pairs)
    alternatives = [
        rf" *[^ {punctuation}{digits}{isolated}]+",
        rf" *[{punctuation}]+" if punctuation else "",
        (" *" if digits_after_space else "") + rf"[{digits}]{'+' if digits_merge else '{1,3}'}" if digits else "",
        rf"[{isolated}]" if isolated else "",
        r" +",
    ]
    return re.compile("|".join(filter(None, alternatives)))


def _character_groups(pairs: set[tuple[str, str]]) -> dict[str, set[str]]:
    """Split characters into punctuation, digits, isolated ones and (by absence) words so that no pair crosses groups.

    A character that some piece joins to another group's character becomes a word character, until no pair crosses.
    """
    groups = {"punctuation": set(_punctuation()), "digits": set(DIGITS), "isolated": set(ISOLATED)}

    def group_of(character: str) -> str | None:
        return next((name for name, members in groups.items() if character in members), None)

    changed = True
    while changed:
        changed = False
        for left, right in pairs:
            left_group, right_group = group_of(left), group_of(right)
            if left == " ":
                crosses = right_group == "isolated"
            else:
                crosses = left_group != right_group or left_group == "isolated"
            if crosses:
                for members in groups.values():
                    changed |= bool(members & {left, right})
                    members -= {left, right}
    return groups


def _punctuation() -> Iterable[str]:
    """Punctuation, symbols, separators and controls of the basic multilingual plane, but not the plain space."""
    characters = map(chr, range(0x10000))
    return (c for c in characters if unicodedata.category(c)[0] in "PSZC" and c != " " and c not in ISOLATED)


def _character_class(characters: set[str]) -> str:
    """The inside of a regular expression's [...] for `characters`, as ranges: short classes match faster."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in ranges)
