"""What the data benchmarks run under the peers' own interpreter: litdata, mosaicml-streaming, datatrove.

Not started by hand: `tokenizing.py` and `reading.py` start it with `--peers-python`, and read the JSON line it prints.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEQUENCE = 2049
BATCH = 64


def texts_of(path: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


# Tokenizing: files of JSON lines to shards on disk, `workers` processes, ids of one sentencepiece model.


class LitdataEncoder:
    """litdata calls it with one file at a time; it gives the ids of each document as one item."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.processor: Any = None

    def __call__(self, path: str) -> Iterator[Any]:
        import sentencepiece
        import torch

        if self.processor is None:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=self.model, num_threads=1)
        for text in texts_of(path):
            ids = np.array([*self.processor.encode(text), self.processor.eos_id()], dtype=np.int32)
            yield torch.from_numpy(ids).to(torch.uint16)


def tokenize_litdata(files: list[str], model: str, out: str, workers: int) -> None:
    from litdata import TokensLoader, optimize

    optimize(
        fn=LitdataEncoder(model),
        inputs=files,
        output_dir=out,
        chunk_size=SEQUENCE * 8192,
        item_loader=TokensLoader(),
        num_workers=workers,
    )


def write_mosaic_part(files: list[str], model: str, out: str) -> None:
    import sentencepiece
    from streaming import MDSWriter

    processor = sentencepiece.SentencePieceProcessor(model_file=model, num_threads=1)
    buffer: list[int] = []
    with MDSWriter(out=out, columns={"tokens": "ndarray:uint16"}) as writer:
        for path in files:
            for text in texts_of(path):
                buffer += processor.encode(text)
                buffer.append(processor.eos_id())
                whole = len(buffer) // SEQUENCE * SEQUENCE
                for start in range(0, whole, SEQUENCE):
                    writer.write({"tokens": np.array(buffer[start : start + SEQUENCE], dtype=np.uint16)})
                del buffer[:whole]


def tokenize_mosaic(files: list[str], model: str, out: str, workers: int) -> None:
    from streaming.base.util import merge_index

    parts = [(files[i::workers], model, f"{out}/{i}") for i in range(workers)]
    processes = [multiprocessing.Process(target=write_mosaic_part, args=part) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    merge_index(out, keep_local=True)


def tokenize_datatrove(files: list[str], model: str, out: str, workers: int) -> None:
    """`model` is a Hugging Face `tokenizer.json`: datatrove reads no sentencepiece model."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(Path(files[0]).parent), glob_pattern="*.jsonl", doc_progress=False),
            DocumentTokenizer(
                output_folder=f"{out}/tokens",
                local_working_dir=f"{out}/work",
                tokenizer_name_or_path=model,
                eos_token="<|endofdocument|>",
                shuffle_documents=False,
                max_tokens_per_file=int(1e9),
            ),
        ],
        tasks=len(files),
        workers=workers,
        logging_dir=f"{out}/logs",
    ).run()


# Reading: rows of SEQUENCE tokens, shuffled, from shards on the local disk.


def token_blocks(path: str, start: int, stop: int) -> Any:
    """A part of the tokens for litdata, in blocks as long as a document may be."""
    import torch

    tokens = np.load(path, mmap_mode="r")
    for first in range(start, stop, 1 << 16):
        yield torch.from_numpy(np.array(tokens[first : min(first + (1 << 16), stop)]))


class LitdataBlocks:
    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, bounds: tuple[int, int]) -> Iterator[Any]:
        yield from token_blocks(self.path, *bounds)


def write_litdata(path: str, out: str) -> None:
    from litdata import TokensLoader, optimize

    total = len(np.load(path, mmap_mode="r"))
    bounds = [(start, min(start + (1 << 22), total)) for start in range(0, total, 1 << 22)]
    optimize(
        fn=LitdataBlocks(path),
        inputs=bounds,
        output_dir=out,
        chunk_size=SEQUENCE * 4096,
        item_loader=TokensLoader(),
        num_workers=1,
    )


def write_mosaic(path: str, out: str) -> None:
    from streaming import MDSWriter

    tokens = np.load(path, mmap_mode="r")
    with MDSWriter(out=out, columns={"tokens": "ndarray:uint16"}) as writer:
        for start in range(0, len(tokens) - SEQUENCE + 1, SEQUENCE):
            writer.write({"tokens": np.array(tokens[start : start + SEQUENCE])})


def open_litdata(directory: str) -> tuple[Any, Any]:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    dataset = StreamingDataset(directory, item_loader=TokensLoader(block_size=SEQUENCE), shuffle=True, drop_last=True)
    return dataset, StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)


def open_mosaic(directory: str) -> tuple[Any, Any]:
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=directory, shuffle=True, batch_size=BATCH)
    return dataset, StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)


OPEN: dict[str, Callable[[str], tuple[Any, Any]]] = {"litdata": open_litdata, "mosaic": open_mosaic}


def read(peer: str, directory: str, sequences: int) -> dict[str, float]:
    """Sequences per second of the dataset itself and of its loader; seconds to the first batch at 90 % of an epoch."""
    dataset, loader = OPEN[peer](directory)
    length = len(dataset)
    in_process = rate(iter(dataset), min(sequences, length), 1)
    dataset, loader = OPEN[peer](directory)
    loaded = rate(map(inputs_and_labels, iter(loader)), min(sequences, length), BATCH)
    resumed = resume(peer, directory, length)
    return {"in process": in_process, "loader": loaded, "resume": resumed}


def inputs_and_labels(batch: Any) -> tuple[Any, Any]:
    """What a training loop takes, as depthpipe's loader gives it."""
    import torch

    rows = batch["tokens"] if isinstance(batch, dict) else batch
    return rows[:, :-1].to(torch.int64), rows[:, 1:].to(torch.int64)


def rate(rows: Iterator[Any], sequences: int, rows_each: int) -> float:
    for _ in range(8):  # opening files is not reading
        next(rows)
    count = sequences // rows_each - 16
    started = time.perf_counter()
    for _ in range(count):
        next(rows)
    return count * rows_each / (time.perf_counter() - started)


def resume(peer: str, directory: str, length: int) -> float:
    dataset, loader = OPEN[peer](directory)
    next(iter(loader))
    state = loader.state_dict()
    batches = int(length * 0.9) // BATCH
    if peer == "litdata":
        state["num_samples_yielded"] = (
            batches * BATCH
            if isinstance(state["num_samples_yielded"], int)
            else {key: batches * BATCH for key in state["num_samples_yielded"]}
        )
    else:
        state["sample_in_epoch"] = batches * BATCH
    del dataset, loader
    started = time.perf_counter()
    _, loader = OPEN[peer](directory)
    loader.load_state_dict(state)
    next(iter(loader))
    return time.perf_counter() - started


def main() -> None:
    task, *arguments = json.loads(sys.argv[1])
    started = time.perf_counter()
    result = globals()[task](*arguments)
    print("\nRESULT " + json.dumps({"seconds": time.perf_counter() - started, "result": result}))


if __name__ == "__main__":
    main()
