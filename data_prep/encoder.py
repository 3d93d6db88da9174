"""Text to packed token ids, many times faster than the bare encoder and with identical ids.

Text is cut where no piece of the vocabulary can cross (`cuts.py`), each distinct chunk is encoded once, and everything
else is a look-up: whole blocks of text at a time, in NumPy, with no Python object for a chunk or a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.cuts import END_BYTE, cut_rules
from data_prep.tokenizer import SPACE_SYMBOL, Tokenizer

Int64Array = npt.NDArray[np.int64]
KeyArray = npt.NDArray[np.uint64]
TokenArray = npt.NDArray[np.unsignedinteger]

BLOCK_BYTES = 1 << 19  # the arrays of one block stay in the processor's cache
KEY_BYTES = 16  # chunks up to this long are found in the table by their bytes, longer ones in a dictionary
TABLE_BITS = 20
SLOT_MASK = (1 << TABLE_BITS) - 1
MAX_CHUNKS = 1 << 19  # both limits keep a worker's cache under about 200 MB
MAX_POOL_TOKENS = 1 << 23
PROBES = 8
END = bytes([END_BYTE])
SPACE_SYMBOL_BYTES = SPACE_SYMBOL.encode()
# By how many bytes of a word belong to a chunk: what to keep of the eight bytes read there.
WORD_MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], dtype=np.uint64)


def token_dtype(vocab_size: int) -> str:
    """Name of the smallest NumPy type that holds every id: `uint16` or `uint32`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class Encoder:
    """Gives the same ids as `Tokenizer.encode`, packed as little-endian uint16 or uint32 bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.dtype: np.dtype[np.unsignedinteger] = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
        self.rules = cut_rules(tokenizer)
        self._end = tokenizer.end_of_document_id.to_bytes(self.dtype.itemsize, "little")
        if self.rules:
            self._cut_after = self.rules.cut.reshape(-1)
            self._cache = _ChunkCache(self)

    @property
    def cuttable(self) -> bool:
        """Whether a document may be encoded in parts, cut after any newline and in front of any run of spaces."""
        return self.rules is not None and self.rules.cuts_at_newlines

    def encode(self, text: str) -> bytes:
        """Ids of `text`."""
        return self.encode_fragments([(text, False)])

    def encode_fragments(self, fragments: Sequence[tuple[str, bool]]) -> bytes:
        """Ids of (text, whether a document ends there), one after the other, with the end-of-document id where asked.

        Far faster for many fragments at once than one by one.
        """
        if self.rules is None:
            return b"".join(self.encode_plain(text) + (self._end if ends else b"") for text, ends in fragments)
        data = b"".join(part for text, ends in fragments for part in (text.encode(), END if ends else b""))
        return b"".join(ids.tobytes() for ids in self._encode_blocks(data))

    def encode_plain(self, text: str) -> bytes:
        """The ids straight from sentencepiece: the reference that `encode` must equal."""
        return np.array(self.tokenizer.encode(text), dtype=self.dtype).tobytes()

    def check(self, text: str) -> None:
        """Raises RuntimeError (a bug, never an input's fault) unless the fast path equals the plain one on `text`."""
        if self.encode(text) != self.encode_plain(text):
            raise RuntimeError(f"cached encoding differs from sentencepiece's with {self.tokenizer.path}: {text!r}")

    def _encode_blocks(self, data: bytes) -> Iterable[TokenArray]:
        start, size = 0, BLOCK_BYTES
        while start < len(data):
            block = data[start : start + size]
            starts = self._chunk_starts(block)
            if start + size < len(data):  # the block's end may have cut its last chunk
                if len(starts) == 1:
                    size *= 2
                    continue
                block, starts = block[: starts[-1]], starts[:-1]
            yield self._cache.ids(block, starts)
            start += len(block)
            size = BLOCK_BYTES

    def _chunk_starts(self, block: bytes) -> Int64Array:
        assert self.rules
        classes = self.rules.byte_class[np.frombuffer(block, np.uint8)]
        cuts = self._cut_after[classes[:-1] * np.uint8(len(self.rules.cut)) + classes[1:]]
        return np.concatenate([[0], np.flatnonzero(cuts) + 1])


class _ChunkCache:
    """Ids by chunk. Every chunk seen has an entry: a run of ids in one pool.

    Short chunks are found through an open-addressing table by their own bytes, padded with zeros (a NUL is a chunk of
    its own, so no two chunks share a key): equal keys are equal chunks, whatever the hash.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._tokenizer = encoder.tokenizer
        self._dtype = encoder.dtype
        self._clear()

    def ids(self, block: bytes, starts: Int64Array) -> TokenArray:
        """Ids of the chunks of `block` that begin at `starts`."""
        if len(self._entries) > MAX_CHUNKS or self._pool_used > MAX_POOL_TOKENS:
            self._clear()  # what is frequent is back at once
        lengths = np.diff(starts, append=len(block))
        keys = _keys(block, starts, lengths)
        entries = self._find(keys, lengths)
        (unknown,) = np.nonzero(entries < 0)
        if len(unknown):
            entries[unknown] = self._look_up(block, starts[unknown], lengths[unknown], keys[:, unknown])
        sizes = self._sizes[entries]
        ends = np.cumsum(sizes)
        places = np.repeat(self._offsets[entries] - (ends - sizes), sizes)
        places += np.arange(len(places))
        ids: TokenArray = self._pool[places]
        return ids

    def _clear(self) -> None:
        self._entries: dict[bytes, int] = {}
        self._key_table = np.zeros((2, 1 << TABLE_BITS), dtype=np.uint64)
        self._entry_table = np.full(1 << TABLE_BITS, -1, dtype=np.int32)
        self._offsets = np.zeros(1 << 12, dtype=np.int64)
        self._sizes = np.zeros(1 << 12, dtype=np.int64)
        self._pool: TokenArray = np.zeros(1 << 14, dtype=self._dtype)
        self._pool_used = 0

    def _find(self, keys: KeyArray, lengths: Int64Array) -> Int64Array:
        """Entries of chunks by the table; -1 where it has none."""
        slots = _hash(keys)
        entries = self._match(keys, slots)
        entries[lengths > KEY_BYTES] = -1
        (left,) = np.nonzero((entries < 0) & (lengths <= KEY_BYTES))
        for _ in range(PROBES - 1):
            left = left[self._entry_table[slots[left]] >= 0]  # an empty slot ends the search
            if not len(left):
                break
            slots[left] = (slots[left] + 1) & SLOT_MASK
            entries[left] = self._match(keys[:, left], slots[left])
            left = left[entries[left] < 0]
        return entries

    def _match(self, keys: KeyArray, slots: Int64Array) -> Int64Array:
        same = (self._key_table[0][slots] == keys[0]) & (self._key_table[1][slots] == keys[1])
        return np.where(same, self._entry_table[slots], -1).astype(np.int64)

    def _look_up(self, block: bytes, starts: Int64Array, lengths: Int64Array, keys: KeyArray) -> list[int]:
        """Entries by the dictionary, which has every chunk; new ones are encoded, and the short put into the table."""
        chunks = [block[start : start + size] for start, size in zip(starts.tolist(), lengths.tolist(), strict=True)]
        known = self._entries
        new = {chunk: place for place, chunk in enumerate(chunks) if chunk not in known}
        if new:
            first = len(known)
            known.update(zip(new, range(first, first + len(new)), strict=True))
            self._add(first, self._encode(list(new)))
            places = np.fromiter(new.values(), np.int64, len(new))
            short = lengths[places] <= KEY_BYTES
            self._insert(keys[:, places[short]], np.arange(first, first + len(new))[short])
        return [known[chunk] for chunk in chunks]

    def _encode(self, chunks: list[bytes]) -> list[list[int]]:
        texts = ["" if chunk == END else chunk.decode() for chunk in chunks]
        ids: list[list[int]] = self._tokenizer.processor.encode(texts)
        for place, chunk in enumerate(chunks):
            if chunk == END:
                ids[place] = [self._tokenizer.end_of_document_id]
            elif SPACE_SYMBOL_BYTES in chunk:
                ids[place] = self._tokenizer.encode(texts[place])
        return ids

    def _add(self, first: int, ids: list[list[int]]) -> None:
        """Make entries from number `first` on."""
        sizes = np.fromiter(map(len, ids), np.int64, len(ids))
        ends = self._pool_used + np.cumsum(sizes)
        self._offsets = _with_room(self._offsets, first + len(ids))
        self._sizes = _with_room(self._sizes, first + len(ids))
        self._pool = _with_room(self._pool, int(ends[-1]))
        self._offsets[first : first + len(ids)] = ends - sizes
        self._sizes[first : first + len(ids)] = sizes
        self._pool[self._pool_used : int(ends[-1])] = np.fromiter(chain.from_iterable(ids), self._dtype)
        self._pool_used = int(ends[-1])

    def _insert(self, keys: KeyArray, entries: Int64Array) -> None:
        """Put new entries into the table. Those that find no slot nearby stay with the dictionary alone."""
        slots = _hash(keys)
        for _ in range(PROBES):
            free = self._entry_table[slots] < 0
            self._entry_table[slots[free]] = entries[free]
            placed = self._entry_table[slots] == entries  # of several for one slot, the last
            self._key_table[:, slots[placed]] = keys[:, placed]
            keys, entries = keys[:, ~placed], entries[~placed]
            slots = (slots[~placed] + 1) & SLOT_MASK


def _keys(block: bytes, starts: Int64Array, lengths: Int64Array) -> KeyArray:
    """The first 16 bytes of each chunk, zero beyond its end: uint64 [2, chunks]."""
    padded = block + bytes(KEY_BYTES)
    words = np.ndarray(len(block) + 9, dtype="<u8", buffer=padded, strides=(1,))  # the eight bytes from each byte on
    keys = np.empty((2, len(starts)), dtype=np.uint64)
    keys[0] = words[starts] & WORD_MASKS[np.minimum(lengths, 8)]
    keys[1] = words[starts + 8] & WORD_MASKS[np.clip(lengths - 8, 0, 8)]
    return keys


def _hash(keys: KeyArray) -> Int64Array:
    mixed = (keys[0] * np.uint64(0x9E3779B97F4A7C15)) ^ (keys[1] * np.uint64(0xC2B2AE3D27D4EB4F))
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    slots: Int64Array = (mixed >> np.uint64(64 - TABLE_BITS)).astype(np.int64)
    return slots


def _with_room(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    if size <= len(array):
        return array
    larger = np.zeros(max(size, 2 * len(array)), dtype=array.dtype)
    larger[: len(array)] = array
    return larger
