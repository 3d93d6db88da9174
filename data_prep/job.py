"""Runs a tokenizing job: plan, workers, commit. Killed at any moment and run again, it goes on where it was."""

from __future__ import annotations

import fcntl
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_prep.commit import (
    JOB_FILE,
    UNFINISHED,
    begin,
    collect_parts,
    commit,
    go_on,
    open_finished,
    read_job,
    read_result,
    total,
)
from data_prep.corpus import find_files
from data_prep.documents import Counters
from data_prep.encoder import Encoder
from data_prep.errors import DepthpipeError
from data_prep.manifest import write_errors
from data_prep.plan import Options, Plan
from data_prep.ray_pool import RayPool
from data_prep.tokenizer import Tokenizer
from data_prep.worker import WorkerPool, unit_record


@dataclass(frozen=True)
class Report:
    """What a job made: `reused` when everything was there already; the totals cover both halves.

    `new_tokens` are those that this run encoded, in `seconds`.
    """

    datasets: tuple[Path, ...]
    counters: Counters
    seconds: float
    new_tokens: int = 0
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
    on_ray: bool = False,
    progress: ProgressCallback = lambda *_: None,
) -> Report:
    """Tokenize `inputs` into the dataset directory `out` (with a validation fraction: `out/train`, `out/validation`).

    `part=(i, n)` does the i-th of n shares of the job and leaves the commit to `merge_parts`. With `on_ray` the workers
    are actors of a Ray cluster. Raises DepthpipeError for wrong input, and when `out` holds another job's work.
    """
    started = time.monotonic()
    out = Path(out)
    tokenizer = Tokenizer.load(tokenizer_path)
    files = find_files(inputs, include, exclude, out)
    plan = Plan.make(files, tokenizer.fingerprint, options or Options(), cuttable=Encoder(tokenizer).cuttable)
    if (out / JOB_FILE).exists():
        record = read_job(out / JOB_FILE)
        go_on(out / JOB_FILE, record, plan, out, lambda: int(record["counters"]["skipped"]))
        return Report(open_finished(out, record), Counters.from_json(record["counters"]), 0.0, reused=True)
    with _locked(out / UNFINISHED, part), write_errors(out):
        begin(out, plan, tokenizer, alone=_is_alone(out / UNFINISHED, part))
        own = range(part[0] - 1, len(plan.units), part[1])
        tokens = _do_units(plan, tokenizer, out / UNFINISHED, own, workers, RayPool if on_ray else WorkerPool, progress)
        if part != (1, 1):
            counters = total([read_result(out / UNFINISHED, unit) for unit in own])
            return Report((), counters, time.monotonic() - started, tokens, finished=False)
        datasets, counters = commit(out)
        return Report(datasets, counters, time.monotonic() - started, tokens)


def merge_parts(out: str | Path, others: Sequence[str | Path] = ()) -> Report:
    """Commit a job that was done in parts in `out`.

    `others` are directories in which other machines did parts of the same job; their units are copied to `out` first.
    Raises DepthpipeError when units are missing, or a directory belongs to another job.
    """
    started = time.monotonic()
    out = Path(out)
    if (out / JOB_FILE).exists():
        record = read_job(out / JOB_FILE)
        return Report(open_finished(out, record), Counters.from_json(record["counters"]), 0.0, reused=True)
    with _locked(out / UNFINISHED, (0, 0)), write_errors(out):
        collect_parts(out, [Path(other) for other in others])
        datasets, counters = commit(out)
        return Report(datasets, counters, time.monotonic() - started)


def _do_units(
    plan: Plan,
    tokenizer: Tokenizer,
    unfinished: Path,
    own: range,
    workers: int,
    make_pool: type[WorkerPool] | type[RayPool],
    progress: ProgressCallback,
) -> int:
    """Do the units of `own` that are not finished. Returns the tokens they gave."""
    done = [unit for unit in own if unit_record(unfinished, unit).exists()]
    before = total([read_result(unfinished, unit) for unit in done])
    missing = sorted(set(own) - set(done))
    if not missing:
        return 0
    _remove_partial_files(unfinished, set(missing))
    finished, new_tokens = len(done), 0
    with make_pool(plan, tokenizer, unfinished, min(workers, len(missing))) as pool:
        # Not before the workers are forked: what shows progress may start a thread.
        progress(before.documents, before.tokens, before.text_bytes, finished / len(own))
        for result in pool.run(missing):
            if result:
                finished += 1
                new_tokens += total([result]).tokens
            documents, tokens, size = pool.progress()
            progress(
                before.documents + documents, before.tokens + tokens, before.text_bytes + size, finished / len(own)
            )
    return new_tokens


def _remove_partial_files(unfinished: Path, units: set[int]) -> None:
    """What a killed run left half-written of these units: never read, but it takes room."""
    for path in unfinished.glob("*.partial"):
        unit = re.match(r"[a-z]+_(\d{6})\.", path.name)
        if unit and int(unit[1]) in units:
            path.unlink(missing_ok=True)


def _is_alone(unfinished: Path, part: tuple[int, int]) -> bool:
    """Whether no other part of the job is running. Our own lock would be lost by looking at it."""
    for path in unfinished.glob("lock-*"):
        if path.name != f"lock-{part[0]}-of-{part[1]}":
            with open(path, "w") as lock:
                try:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    return False
    return True


@contextmanager
def _locked(unfinished: Path, part: tuple[int, int]) -> Iterator[None]:
    """One process at a time works on a part: a second one ends with a DepthpipeError."""
    created = not unfinished.exists()
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
        try:
            yield
        except DepthpipeError:
            if created and not (unfinished / JOB_FILE).exists():
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
