"""Trains a tokenizer on a corpus: byte-pair encoding that gives every text back exactly."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from data_prep.corpus import CorpusFile, find_files
from data_prep.documents import DocumentReader
from data_prep.errors import DepthpipeError
from data_prep.manifest import write_json
from data_prep.plan import Options, Plan
from data_prep.tokenizer import END_OF_DOCUMENT_PIECE, SPACE_SYMBOL, Tokenizer

TRAINING_VERSION = 1
# Newline and tab are pieces of their own: sentencepiece's trainer reads lines, and uses the tab for itself.
WHOLE_PIECES = ["\n", "\t"]
LINE_BREAKS = re.compile(f"[\n\t\0{SPACE_SYMBOL}]")
MAX_LINE_CHARACTERS = 1024  # the trainer drops lines of more than 4192 bytes


def train_tokenizer(
    inputs: Sequence[str],
    out: str | Path,
    vocab_size: int,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    text_key: str = "text",
    documents: str = "file",
    skip_bad: bool = False,
    max_bytes: int = 256 << 20,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> bool:
    """Train a sentencepiece BPE model of `vocab_size` pieces on `inputs` and write it to `out`.

    Reads slices from all over the corpus until `max_bytes` of text. `progress(bytes read, bytes to read)`. Returns
    False when `out` was made from the same inputs with the same options before, and is reused. Raises DepthpipeError.
    """
    out = Path(out)
    files = find_files(inputs, include, exclude)
    settings = [TRAINING_VERSION, sentencepiece.__version__, vocab_size, text_key, documents, max_bytes]
    record_path = out.with_name(out.name + ".json")
    record = {"fingerprint": _fingerprint(files, settings)}
    if _is_reusable(out, record_path, record):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = _lines(files, Options(text_key=text_key, documents=documents, skip_bad=skip_bad), max_bytes, progress)
    model = _train(lines, vocab_size, str(inputs[0]))
    temporary = out.with_name(f"{out.name}.{os.getpid()}.partial")
    temporary.write_bytes(model)
    os.replace(temporary, out)
    write_json(record_path, record | {"sha256": hashlib.sha256(model).hexdigest()})
    return True


def _train(lines: Iterator[str], vocab_size: int, source: str) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=WHOLE_PIECES,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_DOCUMENT_PIECE,
            minloglevel=3,
        )
    except RuntimeError as error:
        message = str(error)
        if highest := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
            reason = f"the text gives at most {highest[1]} pieces: use --vocab-size {highest[1]} or more text"
        elif lowest := re.search(r"(\d+) vs (\d+)\. Increase vocab_size", message):
            reason = f"its characters alone need {lowest[2]} pieces: raise --vocab-size"
        elif "sentences_.empty()" in message:
            reason = f"no text in {source}: check the inputs"
        else:
            raise
        raise DepthpipeError(f"--vocab-size {vocab_size}: {reason}") from None
    return model.getvalue()


def _lines(
    files: Sequence[CorpusFile], options: Options, max_bytes: int, progress: Callable[[int, int], None]
) -> Iterator[str]:
    plan = Plan.make(files, "", options, cuttable=True)
    slices = [piece for unit in plan.units for piece in unit]
    random.Random(0).shuffle(slices)
    reader = DocumentReader(options.text_key, options.documents, cuttable=True, skip_bad=options.skip_bad)
    wanted = min(max_bytes, sum(file.size for file in files))
    read = 0
    for piece in slices:
        for fragment in reader.read(files[piece.file], piece.start, piece.stop):
            read += len(fragment.text)
            for line in LINE_BREAKS.split(fragment.text):
                for start in range(0, len(line), MAX_LINE_CHARACTERS):
                    yield line[start : start + MAX_LINE_CHARACTERS]
            if read >= max_bytes:
                progress(wanted, wanted)
                return
        progress(min(read, wanted), wanted)


def _fingerprint(files: Sequence[CorpusFile], settings: list[Any]) -> str:
    content = [settings, [(file.name, file.size, file.mtime_ns) for file in files]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _is_reusable(out: Path, record_path: Path, record: dict[str, str]) -> bool:
    try:
        known = json.loads(record_path.read_bytes())
        return bool(
            known["fingerprint"] == record["fingerprint"] and known["sha256"] == Tokenizer.load(out).fingerprint
        )
    except (OSError, ValueError, KeyError, DepthpipeError):
        return False
