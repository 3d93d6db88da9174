"""Runs a tokenizing job: plan, workers, commit. Killed at any moment and run again, it goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.corpus import find_files
from data_prep.documents import Counters
from data_prep.encoder import Encoder, token_dtype
from data_prep.errors import DepthpipeError
from data_prep.manifest import MANIFEST, TOKENIZER_FILE, Manifest, write_json
from data_prep.plan import Options, Plan
from data_prep.shards import ShardInfo
from data_prep.tokenizer import Tokenizer
from data_prep.worker import TRAIN, VALIDATION, UnitResult, WorkerPool, unit_file, unit_record

JOB_FILE = "job.json"
UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Report:
    """What a job made: `reused` when everything was there already; the totals cover both halves."""

    datasets: tuple[Path, ...]
    counters: Counters
    seconds: float
    reused: bool = False
    finished: bool = True


# Called with documents, tokens, text bytes done so far, and the share of units finished (0 to 1).
ProgressCallback = Callable[[int, int, int, float], None]


def tokenize_corpus(
    inputs: Sequence[str],
    tokenizer_path: str | Path,
    out: str | Path,
    *,
    workers: int,
    options: Options | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    part: tuple[int, int] = (1, 1),
    progress: ProgressCallback = lambda *_: None,
) -> Report:
    """Tokenize `inputs` into the dataset directory `out` (with a validation fraction: `out/train`, `out/validation`).

    `part=(i, n)` does the i-th of n shares of the job and leaves the commit to `merge_parts`. Raises DepthpipeError for
    wrong input, and when `out` holds another job's work.
    """
    started = time.monotonic()
    out = Path(out)
    options = options or Options()
    tokenizer = Tokenizer.load(tokenizer_path)
    files = find_files(inputs, include, exclude)
    plan = Plan.make(files, tokenizer.fingerprint, options, cuttable=Encoder(tokenizer).cuttable)
    if (out / JOB_FILE).exists():
        return _reuse(out, plan)
    unfinished = out / UNFINISHED
    with _locked(unfinished, part):
        _begin(out, plan, tokenizer)
        own = range(part[0] - 1, len(plan.units), part[1])
        _do_units(plan, tokenizer, unfinished, own, workers, progress)
        if part != (1, 1):
            results = [_read_result(unfinished, unit) for unit in own]
            return Report((), _total(results), time.monotonic() - started, finished=False)
        datasets, counters = _commit(out, plan)
        return Report(datasets, counters, time.monotonic() - started)


@contextmanager
def _locked(unfinished: Path, part: tuple[int, int]) -> Iterator[None]:
    """One process at a time works on a part: a second one ends with a DepthpipeError."""
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        lock = open(unfinished / f"lock-{part[0]}-of-{part[1]}", "w")  # noqa: SIM115 (held open for the lock)
    except OSError as error:
        raise DepthpipeError(
            f"{unfinished.parent}: cannot write there ({error.strerror}): choose another --out"
        ) from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DepthpipeError(
                f"{unfinished.parent}: another `depthpipe tokenize` is writing there: wait for it"
            ) from None
        yield


def _reuse(out: Path, plan: Plan) -> Report:
    record = _read_json(out / JOB_FILE)
    plan.check_same_as(record, out)
    counters = Counters(**record["counters"])
    datasets = tuple(Path(directory) for directory in _dataset_directories(out, plan.options).values())
    for directory in datasets:
        manifest = Manifest.load(directory)
        for index in range(len(manifest.shards)):
            manifest.open_shard(index)
    return Report(datasets, counters, 0.0, reused=True)


def _begin(out: Path, plan: Plan, tokenizer: Tokenizer) -> None:
    """Record the job, or check that the one recorded is this one."""
    unfinished = out / UNFINISHED
    if (unfinished / JOB_FILE).exists():
        plan.check_same_as(_read_json(unfinished / JOB_FILE), out)
        return
    for name in (MANIFEST, TRAIN, VALIDATION):
        if (out / name).exists():
            raise DepthpipeError(f"{out}: holds {name}, but not from this job: choose another --out or remove it")
    shutil.copyfile(tokenizer.path, unfinished / TOKENIZER_FILE)
    write_json(unfinished / JOB_FILE, plan.to_json())


def _do_units(
    plan: Plan, tokenizer: Tokenizer, unfinished: Path, own: range, workers: int, progress: ProgressCallback
) -> None:
    done = [unit for unit in own if unit_record(unfinished, unit).exists()]
    before = _total([_read_result(unfinished, unit) for unit in done])
    missing = sorted(set(own) - set(done))
    if not missing:
        return
    finished = len(done)
    with WorkerPool(plan, tokenizer, unfinished, min(workers, len(missing))) as pool:
        for result in pool.run(missing):
            finished += result is not None
            documents, tokens, size = pool.progress()
            progress(
                before.documents + documents,
                before.tokens + tokens,
                before.text_bytes + size,
                finished / len(own),
            )


def _commit(out: Path, plan: Plan) -> tuple[tuple[Path, ...], Counters]:
    """Move finished shards to their places, then write the manifests, then the record. Every step may be repeated."""
    unfinished = out / UNFINISHED
    results = [_read_result(unfinished, unit) for unit in range(len(plan.units))]
    directories = _dataset_directories(out, plan.options)
    for half in directories:
        if not any(half in result.shards for result in results):
            raise DepthpipeError(_empty_half_message(out, half, plan, _total(results)))
    tokenizer = Tokenizer.load(unfinished / TOKENIZER_FILE)
    for half, directory in directories.items():
        _commit_half(directory, half, unfinished, results, tokenizer, plan)
    write_json(out / JOB_FILE, plan.to_json() | {"counters": vars(_total(results))})
    shutil.rmtree(unfinished)
    return tuple(directories.values()), _total(results)


def _commit_half(
    directory: Path, half: str, unfinished: Path, results: Sequence[UnitResult], tokenizer: Tokenizer, plan: Plan
) -> None:
    (directory / "shards").mkdir(parents=True, exist_ok=True)
    shards: list[ShardInfo] = []
    for unit, result in enumerate(results):
        if info := result.shards.get(half):
            file = f"shards/{len(shards):06d}.tar"
            finished = unit_file(unfinished, unit, half)
            if finished.exists():
                os.replace(finished, directory / file)
            shards.append(ShardInfo(file, info.tokens, info.documents, info.bytes, info.sha256))
    temporary = directory / f"{TOKENIZER_FILE}.partial"
    shutil.copyfile(unfinished / TOKENIZER_FILE, temporary)
    os.replace(temporary, directory / TOKENIZER_FILE)
    manifest = Manifest(
        directory=directory,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        dtype=token_dtype(tokenizer.vocab_size),
        end_of_document_id=tokenizer.end_of_document_id,
        chunk_tokens=plan.options.chunk_tokens,
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        text_bytes=sum(result.counters[half].text_bytes for result in results),
        shards=tuple(shards),
    )
    for index in range(len(shards)):
        manifest.open_shard(index)
    manifest.save()


def _dataset_directories(out: Path, options: Options) -> dict[str, Path]:
    if not options.validation_fraction:
        return {TRAIN: out}
    return {TRAIN: out / TRAIN, VALIDATION: out / VALIDATION}


def _empty_half_message(out: Path, half: str, plan: Plan, total: Counters) -> str:
    if not total.documents:
        return f"{plan.files[0].path}: no document holds any text (skipped {total.skipped}): check the inputs"
    return (
        f"{out}: no document fell to {half} ({total.documents} documents, --validation-fraction "
        f"{plan.options.validation_fraction}): change the fraction, remove {out}, and run again"
    )


def _total(results: Sequence[UnitResult]) -> Counters:
    total = Counters()
    for result in results:
        for counters in result.counters.values():
            total.add(counters)
    return total


def _read_result(unfinished: Path, unit: int) -> UnitResult:
    return UnitResult.from_json(_read_json(unit_record(unfinished, unit)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DepthpipeError(f"{path}: cannot read ({error}): remove {path.parent} and run again") from None
    return content
