"""Text comes back exactly, and the fast encoder gives the plain encoder's ids."""

from __future__ import annotations

import io
import string
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.encoder import BLOCK_CHARACTERS, Encoder, chunk_pattern, pattern_from_pieces
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
def test_any_text_comes_back_exactly_and_the_fast_encoder_agrees(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document_id not in ids
    encoder = Encoder(tokenizer)
    assert encoder.encode(text) == encoder.encode_plain(text)


@pytest.mark.parametrize(
    "text", [END_OF_DOCUMENT_PIECE, "<unk>", "<0x41>", "\u2581", " ", "\n\n", "\0", "\ufeff", "\r\n"]
)
def test_text_that_looks_special_stays_text(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_file_of_the_corpus_encodes_as_plain_sentencepiece_does(corpus: Path, tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer)
    assert encoder.pattern is not None
    for path in sorted(corpus.rglob("*.py")):
        text = path.read_bytes().decode()
        assert encoder.encode(text) == encoder.encode_plain(text), path


@pytest.mark.parametrize("unit", ["word and 12 more\n", "x", "é", "    ", "日", "5", "a\u2581"])
def test_long_documents_encode_in_blocks_exactly(unit: str, tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer)
    text = unit * (BLOCK_CHARACTERS // len(unit) + 99)
    assert encoder.encode(text) == encoder.encode_plain(text)


def test_the_cache_is_bounded_and_stays_exact(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.encoder.MAX_CACHED_CHUNKS", 8)
    encoder = Encoder(tokenizer)
    text = "".join(f" name{i} = value_{i % 7}\n" for i in range(200))
    assert encoder.encode(text) == encoder.encode_plain(text)
    assert len(encoder._cache) <= 8


@pytest.mark.parametrize(
    ("pieces", "text", "chunks"),
    [
        (["ab", " a", "((", "\n"], "ab a(( b1234\n\n", ["ab", " a", "((", " b", "123", "4", "\n", "\n"]),
        (["ab", "12"], "ab1234567", ["ab", "1234567"]),
        (["a1"], "a1 b2", ["a1", " b", "2"]),
        (["don't", "''"], "don't('')", ["don't", "(", "''", ")"]),
        (["\na"], "x\na", ["x\na"]),
    ],
)
def test_text_is_cut_only_where_no_piece_crosses(pieces: list[str], text: str, chunks: list[str]) -> None:
    pattern = pattern_from_pieces(pieces)
    assert pattern is not None
    assert pattern.findall(text) == chunks


def test_a_space_inside_a_piece_means_the_plain_path() -> None:
    assert pattern_from_pieces(["of the"]) is None


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
    assert chunk_pattern(tokenizer) is None
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
