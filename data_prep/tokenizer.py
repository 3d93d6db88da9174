"""A sentencepiece model as an exact, reversible map between text and token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data_prep.errors import DepthpipeError

END_OF_DOCUMENT_PIECE = "<|endofdocument|>"
# sentencepiece stores a space as this character, so a text that contains the character itself would come back with a
# space in its place. Such a character is always encoded as its three bytes instead.
SPACE_SYMBOL = "\u2581"


class Tokenizer:
    """Encodes text to ids and back; `decode(encode(text)) == text` whenever `is_lossless`.

    Text that spells a special token (`<|endofdocument|>`) stays text: it never becomes the special id.
    """

    def __init__(self, path: Path, model: bytes) -> None:
        self.path = path
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model, num_threads=1)
        self.vocab_size: int = self.processor.get_piece_size()
        self.end_of_document_id: int = self.processor.eos_id()
        byte_pieces = {self.processor.id_to_piece(i): i for i in range(self.vocab_size) if self.processor.is_byte(i)}
        self.has_byte_fallback = len(byte_pieces) == 256
        self.space_symbol_ids: list[int] | None = None
        if self.has_byte_fallback:
            self.space_symbol_ids = [byte_pieces[f"<0x{byte:02X}>"] for byte in SPACE_SYMBOL.encode()]

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a sentencepiece `.model` file. Raises DepthpipeError when it is missing, no model, or has no end id."""
        path = Path(path)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise DepthpipeError(f"{path}: cannot read the tokenizer ({error.strerror}): check --tokenizer") from None
        try:
            tokenizer = cls(path, model)
        except Exception:
            raise DepthpipeError(
                f"{path}: not a sentencepiece model: make one with `depthpipe tokenizer train`"
            ) from None
        if tokenizer.end_of_document_id < 0:
            raise DepthpipeError(f"{path}: the model has no end-of-document id: train it with an eos piece")
        return tokenizer

    @property
    def is_lossless(self) -> bool:
        """Whether every text comes back exactly: no normalisation, no added or removed space, bytes for the rest."""
        normalizer = self.proto.normalizer_spec
        return (
            self.has_byte_fallback
            and not normalizer.precompiled_charsmap
            and not normalizer.normalization_rule_tsv
            and not normalizer.add_dummy_prefix
            and not normalizer.remove_extra_whitespaces
            and normalizer.escape_whitespaces
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without the end-of-document id."""
        if self.space_symbol_ids is None or SPACE_SYMBOL not in text:
            return list(self.processor.encode(text))
        ids: list[int] = []
        for position, part in enumerate(text.split(SPACE_SYMBOL)):
            if position:
                ids += self.space_symbol_ids
            ids += self.processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; the end-of-document id and other control ids decode to nothing."""
        return str(self.processor.decode([int(i) for i in ids]))
