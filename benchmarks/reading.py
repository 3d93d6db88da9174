"""Sequences per second from shards, and seconds to resume, beside memory-mapped windows, other loaders, webdataset.

The same random tokens are written in each tool's own format. In each round every row runs once, in turn; the table
shows medians, and medians of the ratios of one round. `in process` is the reader alone (rows of 2049 uint16 tokens,
shuffled); `loader` ends in what a training loop takes, int64 tensors of inputs and of labels: ours from its background
thread, the others' from their own loader over the same process.

    python benchmarks/reading.py
    python benchmarks/reading.py --megatokens 200 --rounds 5 --peers-python /path/to/venv/bin/python
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

import numpy as np
import torch
import webdataset
from data_peers import inputs_and_labels
from rich.console import Console
from rich.table import Table
from tokenizing import add_common_arguments, installed_peers, run_peer

from data_prep.manifest import Manifest
from data_prep.shards import CHUNK_TOKENS, ShardInfo, ShardWriter
from data_prep.stream import BatchLoader, Columns, DatasetSource, SequenceStream

LENGTH = 2048
BATCH = 64
VOCAB_SIZE = 65_000
SHARD_TOKENS = 1 << 24
console = Console(highlight=False, width=120)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        tokens = np.random.default_rng(0).integers(2, VOCAB_SIZE, arguments.megatokens << 20, dtype=np.uint16)
        np.save(work / "tokens.npy", tokens)
        write_ours(work / "ours", tokens)
        peers = [peer for peer in installed_peers(arguments.peers_python) if peer != "datatrove"]
        for peer in peers:
            (work / peer).mkdir()
            run_peer(arguments.peers_python, f"write_{peer}", str(work / "tokens.npy"), str(work / peer))
        console.print(
            f"{len(tokens) / 1e6:.0f} M tokens, sequence length {LENGTH}, {arguments.sequences:,} sequences a row"
        )
        results: dict[str, list[dict[str, float]]] = defaultdict(list)
        for _ in range(arguments.rounds):
            results["depthpipe"].append(measure_ours(work / "ours", arguments.sequences))
            results["numpy.memmap windows"].append(measure_memmap(work / "tokens.npy", arguments.sequences))
            for peer in peers:
                answer = run_peer(arguments.peers_python, "read", peer, str(work / peer), arguments.sequences)
                results[peer].append(answer["result"])
            results["webdataset, replay"].append({"resume": measure_replay(work / "ours")})
        print_rates(results)
        print_resume(results)


def write_ours(directory: Path, tokens: np.ndarray) -> None:
    (directory / "shards").mkdir(parents=True)
    shards: list[ShardInfo] = []
    for number, start in enumerate(range(0, len(tokens), SHARD_TOKENS)):
        writer = ShardWriter(directory / "shards" / f"{number:06d}.tar", np.dtype("<u2"))
        writer.append(tokens[start : start + SHARD_TOKENS].tobytes())
        info = writer.finish()
        assert info
        shards.append(ShardInfo(f"shards/{info.file}", info.tokens, 0, info.bytes, info.sha256))
    Manifest(
        directory=directory,
        tokenizer_fingerprint="random",
        vocab_size=VOCAB_SIZE,
        dtype="uint16",
        end_of_document_id=1,
        chunk_tokens=CHUNK_TOKENS,
        tokens=len(tokens),
        documents=0,
        text_bytes=0,
        shards=tuple(shards),
    ).save()


def measure_ours(directory: Path, sequences: int) -> dict[str, float]:
    stream = SequenceStream([DatasetSource(str(directory))], LENGTH, seed=0)
    numbers = iter(range(1 << 40))
    in_process = rate(lambda: stream.read(BATCH * next(numbers) + np.arange(BATCH)), sequences)
    loader = open_loader(directory, None, "inputs")
    one_column = rate(lambda: next(loader), sequences)
    loader.close()
    loader = open_loader(directory, None)
    loaded = rate(lambda: next(loader), sequences)
    position = loader.position()
    loader.close()
    position["samples"] = int(0.9 * stream.sequences_per_epoch[0])
    started = time.perf_counter()
    loader = open_loader(directory, position)
    next(loader)
    resumed = time.perf_counter() - started
    loader.close()
    return {"in process": in_process, "loader": loaded, "one column": one_column, "resume": resumed}


def open_loader(directory: Path, position: dict | None, columns: Columns = "both") -> BatchLoader:
    return BatchLoader(
        SequenceStream([DatasetSource(str(directory))], LENGTH, seed=0),
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        data_parallel_rank=0,
        data_parallel_size=1,
        position=position,
        columns=columns,
    )


class MemoryMappedWindows(torch.utils.data.IterableDataset):
    """Random windows of a memory map: the least that reading can be."""

    def __init__(self, path: Path) -> None:
        self.tokens = np.load(path, mmap_mode="r")

    def __iter__(self):
        rng = np.random.default_rng(0)
        while True:
            for start in rng.integers(0, len(self.tokens) - LENGTH - 1, BATCH).tolist():
                yield np.array(self.tokens[start : start + LENGTH + 1])


def measure_memmap(path: Path, sequences: int) -> dict[str, float]:
    tokens = np.load(path, mmap_mode="r")
    rng = np.random.default_rng(0)
    out = np.empty((BATCH, LENGTH + 1), dtype=np.uint16)

    def read() -> None:
        for row, start in enumerate(rng.integers(0, len(tokens) - LENGTH - 1, BATCH).tolist()):
            out[row] = tokens[start : start + LENGTH + 1]

    in_process = rate(read, sequences)
    loader = iter(torch.utils.data.DataLoader(MemoryMappedWindows(path), batch_size=BATCH))
    return {"in process": in_process, "loader": rate(lambda: inputs_and_labels(next(loader)), sequences)}


def measure_replay(directory: Path) -> float:
    """Plain webdataset has no position: it reads everything again up to the place (here only that, no shuffling)."""
    manifest = Manifest.load(directory)
    urls = [str(directory / shard.file) for shard in manifest.shards]
    skipped = int(0.9 * manifest.tokens)
    started = time.perf_counter()
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        skipped -= len(sample["npy"])
        if skipped < 0:
            break
    return time.perf_counter() - started


def rate(read: Callable[[], object], sequences: int) -> float:
    for _ in range(8):  # opening files is not reading
        read()
    started = time.perf_counter()
    for _ in range(sequences // BATCH):
        read()
    return sequences // BATCH * BATCH / (time.perf_counter() - started)


def print_rates(results: dict[str, list[dict[str, float]]]) -> None:
    table = Table("sequences per second", "in process", "depthpipe is", "loader", "depthpipe is")
    for name, rounds in results.items():
        if "loader" not in rounds[0]:
            continue
        cells = []
        for kind in ("in process", "loader"):
            ratios = [ours[kind] / theirs[kind] for ours, theirs in zip(results["depthpipe"], rounds, strict=True)]
            cells.append(f"{statistics.median(values[kind] for values in rounds):,.0f}")
            cells.append("" if name == "depthpipe" else f"{statistics.median(ratios):.2f} times")
        table.add_row(name, *cells)
    one_column = statistics.median(values["one column"] for values in results["depthpipe"])
    console.print(table)
    console.print(f"depthpipe's loader for a stage that reads inputs alone: {one_column:,.0f} sequences per second")


def print_resume(results: dict[str, list[dict[str, float]]]) -> None:
    table = Table("resume at 90 % of an epoch", "milliseconds to the first batch")
    for name, rounds in results.items():
        if "resume" in rounds[0]:
            table.add_row(name, f"{1000 * statistics.median(values['resume'] for values in rounds):,.1f}")
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatokens", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=20_000)
    add_common_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
