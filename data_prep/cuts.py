"""Where text may be cut without changing its tokens, derived from a model's own vocabulary.

BPE merges two neighbours only when their concatenation is a piece of the vocabulary. Where no piece contains the two
characters on either side of a boundary, no merge crosses it, and both sides encode independently.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from data_prep.tokenizer import SPACE_SYMBOL, Tokenizer

MODEL_TYPE_BPE = 2  # sentencepiece.TrainerSpec.ModelType.BPE
PIECE_NORMAL, PIECE_USER_DEFINED, PIECE_UNUSED = 1, 4, 5  # sentencepiece.ModelProto.SentencePiece.Type
END_BYTE = 0xFF  # occurs in no UTF-8 text: it stands for the end of a document

# Classes of bytes. Bytes of characters beyond ASCII are JOINING: nothing is cut beside them but at spaces and isolated
# characters.
WORD, PUNCTUATION, DIGIT, SPACE, ISOLATED, JOINING = range(6)
ISOLATED_CHARACTERS = "\n\t\r\f\v\0"
DIGITS = "0123456789"


@dataclass(frozen=True)
class CutRules:
    """`byte_class` [256] gives the class of a byte; text is cut between bytes of classes a, b if `cut[a, b]`."""

    byte_class: npt.NDArray[np.uint8]
    cut: npt.NDArray[np.bool_]

    @property
    def cuts_at_newlines(self) -> bool:
        """Whether a document may be cut after any newline (it may before any run of spaces)."""
        return bool(self.byte_class[ord("\n")] == ISOLATED)

    def chunks(self, data: bytes) -> list[bytes]:
        """`data` cut wherever the rules allow."""
        classes = self.byte_class[np.frombuffer(data, np.uint8)]
        bounds = [0, *(np.flatnonzero(self.cut[classes[:-1], classes[1:]]) + 1).tolist(), len(data)]
        return [data[start:stop] for start, stop in pairwise(bounds)]


def cut_rules(tokenizer: Tokenizer) -> CutRules | None:
    """The rules for a model, or None where they are not provable: no BPE, or a normaliser that rewrites text."""
    spec = tokenizer.proto.trainer_spec
    if not tokenizer.is_lossless or spec.model_type != MODEL_TYPE_BPE or spec.treat_whitespace_as_suffix:
        return None
    types = (PIECE_NORMAL, PIECE_USER_DEFINED, PIECE_UNUSED)
    return rules_from_pieces(
        [piece.piece.replace(SPACE_SYMBOL, " ") for piece in tokenizer.proto.pieces if piece.type in types]
    )


def rules_from_pieces(pieces: Iterable[str]) -> CutRules | None:
    """The rules for pieces written with plain spaces; None when a piece has a space after anything else."""
    pieces = list(pieces)
    pairs = {pair for piece in pieces for pair in pairwise(piece)}
    if any(right == " " != left for left, right in pairs):
        return None
    byte_class = _byte_classes(pairs)
    cut = np.ones((6, 6), dtype=bool)
    for kind in (WORD, PUNCTUATION, SPACE, JOINING):
        cut[kind, kind] = False
    cut[SPACE, [WORD, PUNCTUATION, JOINING]] = False
    cut[JOINING, [WORD, PUNCTUATION, DIGIT]] = False
    cut[[WORD, PUNCTUATION, DIGIT], JOINING] = False
    cut[DIGIT, DIGIT] = not any(left in DIGITS and right in DIGITS for left, right in pairs)
    cut[SPACE, DIGIT] = not any(left == " " and right in DIGITS for left, right in pairs)
    rules = CutRules(byte_class, cut)
    if any(len(rules.chunks(piece.encode())) > 1 for piece in pieces):
        return None  # a last check of the whole against every piece: a cut through one would change ids
    return rules


def _byte_classes(pairs: set[tuple[str, str]]) -> npt.NDArray[np.uint8]:
    """Classes such that no pair crosses two of them where text would be cut.

    A character that some piece joins to one of another class becomes a word character, until no pair crosses.
    """
    classes = np.full(256, WORD, dtype=np.uint8)
    classes[[b for b in range(128) if not chr(b).isalnum()]] = PUNCTUATION
    classes[list(DIGITS.encode())] = DIGIT
    classes[list(ISOLATED_CHARACTERS.encode())] = ISOLATED
    classes[ord(" ")] = SPACE
    classes[128:] = JOINING
    classes[END_BYTE] = ISOLATED
    changed = True
    while changed:
        changed = False
        for left, right in pairs:
            first, second = (classes[ord(c)] if c.isascii() else JOINING for c in (left, right))
            if ISOLATED in (first, second) or (first != second and not {SPACE, JOINING} & {first, second}):
                for character in (left, right):
                    if character.isascii() and character != " " and classes[ord(character)] != WORD:
                        classes[ord(character)] = WORD
                        changed = True
    return classes
