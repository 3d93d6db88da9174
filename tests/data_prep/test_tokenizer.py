"""Text comes back exactly, and the fast encoder gives the plain encoder's ids."""

from __future__ import annotations

import io
import itertools
import string
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cuts import cut_rules, rules_from_pieces
from data_prep.encoder import Encoder
from data_prep.errors import DepthpipeError
from data_prep.tokenizer import END_OF_DOCUMENT_PIECE, Tokenizer
from data_prep.training import train_tokenizer

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
CODE_LIKE = st.lists(
    st.sampled_from(
        [
            "def ",
            "self",
            ".",
            "(",
            ")",
            ":",
            "\n",
            "    ",
            " ",
            "\t",
            "_x",
            "0",
            "1234567",
            "\u2581",
            "<unk>",
            "é",
            "日本",
        ]
    )
).map("".join)


@given(text=st.one_of(ANY_TEXT, CODE_LIKE))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_exactly_and_the_fast_encoder_agrees(
    text: str, tokenizer: Tokenizer, encoder: Encoder
) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document_id not in ids
    assert encoder.encode(text) == encoder.encode_plain(text)


@pytest.mark.parametrize(
    "text", [END_OF_DOCUMENT_PIECE, "<unk>", "<0x41>", "\u2581", " ", "\n\n", "\0", "\ufeff", "\r\n"]
)
def test_text_that_looks_special_stays_text(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_file_of_the_corpus_encodes_as_plain_sentencepiece_does(corpus: Path, tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer)
    assert encoder.rules is not None and encoder.cuttable
    texts = [path.read_bytes().decode() for path in sorted(corpus.rglob("*.py"))]
    for _ in range(2):  # with chunks that are new, and with chunks that are known
        for text in texts:
            assert encoder.encode(text) == encoder.encode_plain(text)
    end = np.array([tokenizer.end_of_document_id], dtype=encoder.dtype).tobytes()
    together = encoder.encode_fragments([(text, i % 3 > 0) for i, text in enumerate(texts)])
    assert together == b"".join(encoder.encode_plain(text) + end * (i % 3 > 0) for i, text in enumerate(texts))


@pytest.mark.parametrize("unit", ["word and 12 more\n", "x", "é", "    ", "日", "5", "a\u2581", "\0", "word12!é"])
def test_long_documents_encode_in_blocks_exactly(
    unit: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.encoder.BLOCK_BYTES", 1 << 12)
    encoder = Encoder(tokenizer)
    text = unit * (30_000 // len(unit))
    assert encoder.encode(text) == encoder.encode_plain(text)


def test_the_cache_is_bounded_and_stays_exact(
    corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [path.read_bytes().decode() for path in sorted(corpus.glob("*.py"))][:20]
    expected = [Encoder(tokenizer).encode_plain(text) for text in texts]
    monkeypatch.setattr("data_prep.encoder.BLOCK_BYTES", 1 << 12)
    for limit, value in (("MAX_CHUNKS", 50), ("MAX_POOL_TOKENS", 300)):
        with monkeypatch.context() as patch:
            patch.setattr(f"data_prep.encoder.{limit}", value)
            encoder = Encoder(tokenizer)
            assert [encoder.encode(text) for text in texts] == expected
            assert len(encoder._cache._entries) < 1500


def test_a_crowded_table_stays_exact(corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TABLE_BITS", 6), ("SLOT_MASK", 63), ("PROBES", 3)):
        monkeypatch.setattr(f"data_prep.encoder.{name}", value)
    encoder = Encoder(tokenizer)
    for path in sorted(corpus.glob("*.py"))[:8]:
        text = path.read_bytes().decode()
        assert encoder.encode(text) == encoder.encode_plain(text)
    assert (encoder._cache._entry_table >= 0).sum() > 32


@pytest.mark.parametrize(
    ("pieces", "text", "chunks"),
    [
        (["ab", " a", "((", "\n"], "ab a(( b12\n\n", ["ab", " a", "((", " b", "1", "2", "\n", "\n"]),
        (["ab", "12"], "ab1234567", ["ab", "1234567"]),
        (["a1", " 1"], "a1 b2 3", ["a1", " b", "2", " 3"]),
        ([" 2"], "a 3", ["a", " 3"]),
        (["don't", "''"], "don't('')", ["don't", "(", "''", ")"]),
        (["\na"], "x\na", ["x\na"]),
        (["é.", ".."], "é..a é\n", ["é..", "a", " é", "\n"]),
        (["é\n"], "é\na b", ["é\na", " b"]),
    ],
)
def test_text_is_cut_only_where_no_piece_crosses(pieces: list[str], text: str, chunks: list[str]) -> None:
    rules = rules_from_pieces(pieces)
    assert rules is not None
    assert [chunk.decode() for chunk in rules.chunks(text.encode())] == chunks


@given(pieces=st.lists(st.text("ab1 .!é日\n", min_size=2, max_size=4), max_size=6), data=st.data())
@settings(max_examples=300, deadline=None)
def test_no_piece_of_any_vocabulary_is_ever_cut(pieces: list[str], data: st.DataObject) -> None:
    """In any text, a boundary whose two characters stand side by side in a piece is never cut."""
    rules = rules_from_pieces(pieces)
    if rules is None:
        assert any(" " in piece.lstrip(" ") for piece in pieces)
        return
    text = data.draw(st.text("ab1 .!é日\n", max_size=30))
    ends = list(itertools.accumulate(len(chunk.decode()) for chunk in rules.chunks(text.encode())))
    pairs = {pair for piece in pieces for pair in itertools.pairwise(piece)}
    assert not any((text[end - 1], text[end]) in pairs for end in ends[:-1])


def test_a_space_inside_a_piece_means_the_plain_path() -> None:
    assert rules_from_pieces(["of the"]) is None


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"model_type": "bpe", "add_dummy_prefix": True},
        {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"},
        {"model_type": "bpe", "treat_whitespace_as_suffix": True},
        {"model_type": "bpe", "split_by_whitespace": False},
    ],
)
def test_models_whose_cut_is_not_proven_take_the_plain_path(
    options: dict[str, object], corpus: Path, tmp_path: Path
) -> None:
    lines = [line for path in sorted(corpus.rglob("*.py"))[:20] for line in path.read_text().splitlines() if line]
    lines += ["of the end"] * 5000
    defaults = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=600,
        byte_fallback=True,
        minloglevel=3,
        **(defaults | options),
    )
    path = tmp_path / "other.model"
    path.write_bytes(model.getvalue())
    tokenizer = Tokenizer.load(path)
    assert cut_rules(tokenizer) is None
    encoder = Encoder(tokenizer)
    assert encoder.encode("def of the:\n  x") == encoder.encode_plain("def of the:\n  x")


def test_training_again_on_the_same_text_reuses_and_on_other_text_trains(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the cat sat on the mat, again and again and again; " * 50 + string.printable * 3)
    out = tmp_path / "t.model"
    assert train_tokenizer([str(text)], out, 370)
    before = out.read_bytes()
    assert not train_tokenizer([str(text)], out, 370)
    text.write_text("another text altogether, with quite other words in it " * 50 + string.printable * 3)
    assert train_tokenizer([str(text)], out, 370)
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [(5000, r"use --vocab-size \d+"), (100, "characters alone need 26")],
    ids=["too many", "too few"],
)
def test_a_vocabulary_that_cannot_be_names_the_remedy(vocab_size: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world\n")
    with pytest.raises(DepthpipeError, match=message):
        train_tokenizer([str(tmp_path)], tmp_path / "t.model", vocab_size)


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(DepthpipeError, match=r"x\.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path / "x.model")
    with pytest.raises(DepthpipeError, match=r"y\.model: cannot read"):
        Tokenizer.load(tmp_path / "y.model")
