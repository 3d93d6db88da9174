"""Tokens per second from text files to shards, beside the encoder alone and beside other tools.

The corpus is Python source (the running interpreter's library and installed packages) as JSON lines. In each round
every row runs once, in turn, with as many processes as there are cores; the table shows medians, and medians of the
ratios of one round. `bare` is sentencepiece on texts that are in memory already, summed over the cores. Ratios are
shown by the clock and by processor time: on an idle machine they agree, on a busy one the second still means something.

    python benchmarks/tokenizing.py
    python benchmarks/tokenizing.py --megabytes 200 --rounds 5 --peers-python /path/to/venv/bin/python

The peers live in an environment of their own:
pip install litdata mosaicml-streaming 'datatrove[processing]' sentencepiece
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

import numpy as np
import sentencepiece
from rich.console import Console
from rich.table import Table

from data_prep.corpus import find_files
from data_prep.job import tokenize_corpus
from data_prep.manifest import Manifest
from data_prep.training import train_tokenizer

CORES = len(os.sched_getaffinity(0))
PEERS = {"litdata": "litdata", "mosaic": "streaming", "datatrove": "datatrove"}
Rates = dict[str, list[tuple[float, float]]]  # tokens per second of clock and of processor time, by row and round
console = Console(highlight=False, width=120)


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        texts = write_corpus(work / "corpus", arguments.megabytes)
        model = work / "tokenizer.model"
        train_tokenizer([str(work / "corpus")], model, arguments.vocab_size, max_bytes=32 << 20)
        size = sum(len(text.encode()) for text in texts)
        console.print(
            f"{len(texts):,} documents, {size / 1e6:.0f} MB, {arguments.vocab_size:,} pieces, {CORES} processes"
        )
        peers = installed_peers(arguments.peers_python)
        if "datatrove" in peers:
            train_hugging_face(arguments.peers_python, work, arguments.vocab_size)
        rates: Rates = defaultdict(list)
        special = sum("\u2581" in text for text in texts)
        for number in range(arguments.rounds):
            tokens, digests = measure_bare(texts, model, rates)
            measure_ours(work, model, tokens, digests if number == 0 else None, special, rates)
            for peer in peers:
                measure_peer(arguments.peers_python, peer, work, model, tokens, rates)
        print_table(rates, size / tokens)


def write_corpus(directory: Path, megabytes: int) -> list[str]:
    """Real source files in random order, as 16 files of JSON lines."""
    directory.mkdir()
    roots = [sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]]
    paths = [file.path for file in find_files(roots, ["*.py"])]
    random.Random(0).shuffle(paths)
    texts, size = [], 0
    for path in paths:
        text = Path(path).read_bytes().decode("utf-8", "replace")
        if text:
            texts.append(text)
            size += len(text)
        if size > megabytes * 1_000_000:
            break
    for number in range(16):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[number::16])
        (directory / f"{number:02d}.jsonl").write_text("".join(lines))
    return texts


def measure_bare(texts: list[str], model: Path, rates: Rates) -> tuple[int, set[str]]:
    """The sum over cores of sentencepiece's own speed; and all ids, as digests of documents."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(CORES), context.Queue()
    processes = [
        context.Process(target=encode_bare, args=(texts[i::CORES], str(model), barrier, results)) for i in range(CORES)
    ]
    for process in processes:
        process.start()
    measured = [results.get() for _ in processes]
    for process in processes:
        process.join()
    tokens = sum(tokens for tokens, _, _, _ in measured)
    rates["bare sentencepiece, in memory"].append(
        (
            sum(tokens / seconds for tokens, seconds, _, _ in measured),
            tokens / sum(processor_seconds for _, _, processor_seconds, _ in measured),
        )
    )
    return tokens, set().union(*(digests for _, _, _, digests in measured))


def encode_bare(texts: list[str], model: str, barrier: Any, results: Any) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=model, num_threads=1)
    barrier.wait()
    started, started_processor = time.perf_counter(), time.process_time()
    encoded = [ids for i in range(0, len(texts), 64) for ids in processor.encode(texts[i : i + 64])]
    seconds, processor_seconds = time.perf_counter() - started, time.process_time() - started_processor
    digests = {digest(np.array(ids, dtype=np.uint16)) for ids in encoded}
    results.put((sum(map(len, encoded)) + len(encoded), seconds, processor_seconds, digests))


def digest(ids: np.ndarray) -> str:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()


def measure_ours(work: Path, model: Path, tokens: int, digests: set[str] | None, special: int, rates: Rates) -> None:
    out = work / "ours"
    with timed(rates["depthpipe, files to shards"], tokens):
        tokenize_corpus([str(work / "corpus")], model, out, workers=CORES)
    manifest = Manifest.load(out)
    if digests is not None:
        ids = np.concatenate([c for i in range(len(manifest.shards)) for c in manifest.open_shard(i).chunks()])
        ends = np.flatnonzero(ids == manifest.end_of_document_id)
        documents = [part[1:] if i else part for i, part in enumerate(np.split(ids, ends)[:-1])]
        different = len({digest(document) for document in documents} - digests)
        console.print(
            f"ids: {different} of {len(documents):,} documents differ from bare sentencepiece's; {special} hold the "
            "character U+2581, of which it would make a space"
        )
    shutil.rmtree(out)


def measure_peer(python: str, peer: str, work: Path, model: Path, tokens: int, rates: Rates) -> None:
    out = work / peer
    out.mkdir()
    files = sorted(map(str, (work / "corpus").glob("*.jsonl")))
    used = work / "tokenizer.json" if peer == "datatrove" else model
    # datatrove's byte-level tokenizer has other ids; its speed is counted in our tokens of the same text.
    with timed(rates[f"{peer}, files to shards"], tokens):
        run_peer(python, f"tokenize_{peer}", files, str(used), str(out), CORES)
    shutil.rmtree(out)


@contextmanager
def timed(rates: list[tuple[float, float]], tokens: int) -> Iterator[None]:
    """Adds the rates of what runs inside, child processes included."""
    started, before = time.perf_counter(), os.times()
    yield
    seconds, after = time.perf_counter() - started, os.times()
    rates.append((tokens / seconds, tokens / sum(after[i] - before[i] for i in range(4))))


def run_peer(python: str, *task: Any) -> Any:
    """Run a task of `data_peers.py` under the peers' interpreter."""
    script = Path(__file__).with_name("data_peers.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, script, json.dumps(task)], capture_output=True, text=True, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError(f"{task[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def installed_peers(python: str) -> list[str]:
    found = []
    for peer, module in PEERS.items():
        if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0:
            found.append(peer)
        else:
            console.print(f"{peer}: not installed for {python}, left out (see --peers-python)")
    return found


def train_hugging_face(python: str, work: Path, vocab_size: int) -> None:
    """A byte-level BPE of the same size, for datatrove."""
    code = (
        "import json, sys; from tokenizers import Tokenizer, models, pre_tokenizers, decoders, trainers, processors\n"
        "t = Tokenizer(models.BPE()); t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)\n"
        "t.decoder = decoders.ByteLevel()\n"
        f"trainer = trainers.BpeTrainer(vocab_size={vocab_size}, special_tokens=['<|endofdocument|>'],"
        " initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)\n"
        "texts = (json.loads(l)['text'] for i in range(2) for l in open(f'{sys.argv[1]}/corpus/{i:02d}.jsonl'))\n"
        "t.train_from_iterator(texts, trainer); t.save(sys.argv[1] + '/tokenizer.json')"
    )
    subprocess.run([python, "-c", code, str(work)], check=True, capture_output=True)


def print_table(rates: Rates, bytes_per_token: float) -> None:
    table = Table("", "Mtokens/s", "MB/s", "depthpipe by the clock", "by processor time")
    ours = rates["depthpipe, files to shards"]
    for name, values in rates.items():
        median = statistics.median(clock for clock, _ in values)
        cells = []
        for kind in (0, 1):
            ratios = [mine[kind] / theirs[kind] for mine, theirs in zip(ours, values, strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})")
        if name.startswith("datatrove"):
            cells[1] = "its workers' is not reported"
        shown = ["", ""] if values is ours else cells
        table.add_row(name, f"{median / 1e6:.2f}", f"{median * bytes_per_token / 1e6:.1f}", *shown)
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--vocab-size", type=int, default=16384)
    add_common_arguments(parser)
    return parser.parse_args()


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers-python", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument("--work", default=None, help="where to put temporary files")


if __name__ == "__main__":
    main()
