"""A small real corpus (modules of the standard library) with its tokenizer and datasets, made once per test session."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import pytest

from data_prep import containers, documents, plan
from data_prep import parquet as parquet_reader
from data_prep.encoder import Encoder
from data_prep.job import tokenize_corpus
from data_prep.plan import Options
from data_prep.tokenizer import Tokenizer
from data_prep.training import train_tokenizer

STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
PACKAGES = ("json", "email", "asyncio", "http", "logging")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree of about 2.3 MB with a few odd documents."""
    directory = tmp_path_factory.mktemp("corpus")
    for name in PACKAGES:
        for path in sorted((STANDARD_LIBRARY / name).glob("*.py")):
            target = directory / name / path.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    for path in sorted(STANDARD_LIBRARY.glob("[a-d]*.py")):
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / "odd.py").write_text(
        "\ttab \u2581 block\r\n\0 <|endofdocument|> <unk> \u00e9\u65e5\U0001f600   \n\n  x"
    )
    (directory / "empty.py").write_text("")
    return directory


@pytest.fixture(scope="session")
def tokenizer_path(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "code.model"
    train_tokenizer([str(corpus)], path, 2048, include=["*.py"])
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_path)


@pytest.fixture(scope="session")
def encoder(tokenizer: Tokenizer) -> Encoder:
    """One encoder for all tests: what it has seen before must make no difference."""
    return Encoder(tokenizer)


@pytest.fixture(scope="session")
def dataset(corpus: Path, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus tokenized whole: one dataset of several shards with small chunks. Tests must not change it."""
    out = tmp_path_factory.mktemp("dataset") / "data"
    tokenize_corpus([str(corpus)], tokenizer_path, out, workers=2, include=["*.py"], options=Options(chunk_tokens=4096))
    return out


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut everything into pieces far smaller than the documents."""
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 300)
    monkeypatch.setattr(plan, "MIN_SLICE_BYTES", 75)
    monkeypatch.setattr(containers, "STRIPE_BYTES", 64)
    monkeypatch.setattr(containers, "READ_BYTES", 50)
    monkeypatch.setattr(documents, "READ_BYTES", 40)
    monkeypatch.setattr(parquet_reader, "BATCH_ROWS", 3)
