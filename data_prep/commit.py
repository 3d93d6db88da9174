"""The end of a tokenizing job: finished units become the shards of a dataset, and its manifest appears.

Every step may be repeated, so a commit that was killed is simply run again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.documents import Counters
from data_prep.encoder import token_dtype
from data_prep.errors import DepthpipeError
from data_prep.manifest import MANIFEST, SEAL, TOKENIZER_FILE, Manifest, is_sealed, write_atomically, write_sealed
from data_prep.plan import PLAN_VERSION, Options, Plan
from data_prep.shards import ShardInfo
from data_prep.tokenizer import Tokenizer
from data_prep.worker import TRAIN, VALIDATION, UnitResult, unit_file, unit_record

JOB_FILE = "job.json"
UNFINISHED = "unfinished"


def begin(out: Path, plan: Plan, tokenizer: Tokenizer, *, alone: bool) -> None:
    """Record the job in `out`, or check that the one recorded there is this one.

    A job of which no unit is finished holds no work, and is begun anew where no other part of it is running (`alone`).
    """
    unfinished = out / UNFINISHED
    records = list(unfinished.glob("unit_*.json"))
    if (unfinished / JOB_FILE).exists() and (records or not alone):
        record = read_job(unfinished / JOB_FILE, f"remove {unfinished}")
        go_on(unfinished / JOB_FILE, record, plan, out, lambda: total([_read_unit(path) for path in records]).skipped)
        return
    for name in (MANIFEST, TRAIN, VALIDATION):
        if (out / name).exists():
            raise DepthpipeError(f"{out}: holds {name}, but not from this job: choose another --out or remove it")
    for path in unfinished.iterdir():
        if not path.name.startswith("lock-"):
            path.unlink()
    write_atomically(unfinished / TOKENIZER_FILE, tokenizer.path.read_bytes())
    write_sealed(unfinished / JOB_FILE, plan.to_json() | {"holds_input": plan.reads_from(out, tokenizer.path)})


def go_on(path: Path, record: dict[str, Any], plan: Plan, out: Path, skipped: Callable[[], int]) -> None:
    """Check that `plan` is the job of `record`, which lies at `path`, and note the options it goes on with."""
    options = dataclasses.asdict(plan.options)
    plan.check_same_as(record, out, skipped() if record["options"]["skip_bad"] else 0)
    if record["options"] != options:
        write_sealed(path, record | {"options": options})


def commit(out: Path) -> tuple[tuple[Path, ...], Counters]:
    """Move finished shards to their places, then write the manifests, then the record.

    Returns the dataset directories and what was counted. Raises DepthpipeError when a unit is missing or a half empty.
    """
    unfinished = out / UNFINISHED
    record = read_job(unfinished / JOB_FILE, f"remove {unfinished}")
    missing = [unit for unit in range(record["units"]) if not unit_record(unfinished, unit).exists()]
    if missing:
        raise DepthpipeError(
            f"{out}: {len(missing)} of {record['units']} units are not done: {_missing_parts(unfinished, missing)}"
        )
    results = [read_result(unfinished, unit) for unit in range(record["units"])]
    counters = total(results)
    directories = _dataset_directories(out, record)
    for half in directories:
        if not any(half in result.shards for result in results):
            raise DepthpipeError(_empty_half_message(out, half, Options(**record["options"]), counters))
    for half, directory in directories.items():
        _commit_half(directory, half, unfinished, results, record["options"]["chunk_tokens"])
    write_sealed(out / JOB_FILE, record | {"counters": vars(counters)})
    shutil.rmtree(unfinished)
    return tuple(directories.values()), counters


def collect_parts(out: Path, others: Sequence[Path]) -> None:
    """Copy the units that were finished in `others` into `out`; a unit's record comes last, as when it was made."""
    unfinished = out / UNFINISHED
    for other in (other / UNFINISHED for other in others):
        record = read_job(other / JOB_FILE, f"remove {other}")
        if not (unfinished / JOB_FILE).exists():
            write_atomically(unfinished / TOKENIZER_FILE, (other / TOKENIZER_FILE).read_bytes())
            write_sealed(unfinished / JOB_FILE, record)
        ours = read_job(unfinished / JOB_FILE, f"remove {unfinished}")
        if _content(record) != _content(ours):
            raise DepthpipeError(f"{other.parent}: a part of another job than {out}: check inputs and options of both")
        if record["options"]["skip_bad"] and not ours["options"]["skip_bad"]:
            write_sealed(unfinished / JOB_FILE, ours | {"options": record["options"]})
        for unit in range(record["units"]):
            if unit_record(other, unit).exists() and not unit_record(unfinished, unit).exists():
                for half in read_result(other, unit).shards:
                    source, target = unit_file(other, unit, half), unit_file(unfinished, unit, half)
                    shutil.copyfile(source, target.with_suffix(".copy"))
                    os.replace(target.with_suffix(".copy"), target)
                write_atomically(unit_record(unfinished, unit), unit_record(other, unit).read_bytes())


def open_finished(out: Path, record: dict[str, Any]) -> tuple[Path, ...]:
    """The dataset directories of a finished job, each with all its shards in place. Raises DepthpipeError if not."""
    directories = tuple(_dataset_directories(out, record).values())
    try:
        for directory in directories:
            manifest = Manifest.load(directory)
            for index in range(len(manifest.shards)):
                manifest.open_shard(index)
    except DepthpipeError as error:
        what = str(error).rpartition(": ")[0]  # the rest is a remedy for those who read a dataset
        raise DepthpipeError(f"{what}: {what_to_remove(out)} and run again") from None
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # a commit killed at its very end leaves it behind
    return directories


def what_to_remove(directory: Path) -> str:
    """How to make room for tokenizing again where the dataset `directory` (or its parent, whose half it is) lies."""
    out = directory.parent if (directory.parent / JOB_FILE).exists() else directory
    try:
        record = read_job(out / JOB_FILE, "")
        # A merged record may come from a machine where the inputs lay elsewhere.
        root = os.path.join(os.path.realpath(out), "")
        if not record["holds_input"] and not any(os.path.realpath(f[0]).startswith(root) for f in record["files"]):
            return f"remove {out}"
    except DepthpipeError:  # then who knows what else is there
        pass
    own = [name for name in (JOB_FILE, MANIFEST, "shards", TRAIN, VALIDATION, UNFINISHED) if (out / name).exists()]
    return f"remove {', '.join(own)} in {out}"


def read_result(unfinished: Path, unit: int) -> UnitResult:
    """The record of a finished unit."""
    return _read_unit(unit_record(unfinished, unit))


def _read_unit(path: Path) -> UnitResult:
    return UnitResult.from_json(_read_sealed(path, f"remove {path}"))


def read_job(path: Path, remedy: str | None = None) -> dict[str, Any]:
    """The record of a job. Raises DepthpipeError with `remedy`, or what to remove, when it is not as it was written."""
    record = _read_sealed(path, remedy)
    if record.get("version") != PLAN_VERSION:
        remedy = what_to_remove(path.parent) if remedy is None else remedy
        raise DepthpipeError(
            f"{path}: made by another version of depthpipe: {remedy} and run again, or choose another --out"
        )
    return record


def _read_sealed(path: Path, remedy: str | None) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        content: dict[str, Any] = json.loads(data)
    except FileNotFoundError:
        raise DepthpipeError(
            f"{path.parent}: no tokenizing job is there (no {path.name}): check the directory"
        ) from None
    except OSError as error:
        raise DepthpipeError(f"{path}: cannot read ({error.strerror}): check the directory") from None
    except ValueError:
        content, data = {}, b""
    is_older = isinstance(content, dict) and SEAL not in content and content.get("version") in range(PLAN_VERSION)
    if not is_older and not is_sealed(data):
        remedy = what_to_remove(path.parent) if remedy is None else remedy
        raise DepthpipeError(f"{path}: damaged or edited record: {remedy} and run again")
    return content


def _missing_parts(unfinished: Path, missing: Sequence[int]) -> str:
    """What to do about units that are not done: the parts by name where their locks tell how many there are."""
    counts = {int(path.name.rpartition("-")[2]) for path in unfinished.glob("lock-*-of-*")} - {0}
    if counts == {1}:
        return "run the same `depthpipe tokenize` command again"
    if len(counts) != 1:
        return "run the missing --part, or name the directories it was done in"
    count = counts.pop()
    parts = ", ".join(f"{part}/{count}" for part in sorted({unit % count + 1 for unit in missing}))
    return f"run the missing --part {parts}, or name the directories it was done in"


def _content(record: dict[str, Any]) -> list[Any]:
    """What parts of one job have in common, whatever machine they were done on."""
    return [record["fingerprint"], [fields[-1] for fields in record["files"]]]


def total(results: Sequence[UnitResult]) -> Counters:
    """What units counted, over both halves."""
    counters = Counters()
    for result in results:
        for counted in result.counters.values():
            counters.add(counted)
    return counters


def _commit_half(
    directory: Path, half: str, unfinished: Path, results: Sequence[UnitResult], chunk_tokens: int
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
    write_atomically(directory / TOKENIZER_FILE, (unfinished / TOKENIZER_FILE).read_bytes())
    tokenizer = Tokenizer.load(directory / TOKENIZER_FILE)
    manifest = Manifest(
        directory=directory,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        dtype=token_dtype(tokenizer.vocab_size),
        end_of_document_id=tokenizer.end_of_document_id,
        chunk_tokens=chunk_tokens,
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        text_bytes=sum(result.counters[half].text_bytes for result in results),
        shards=tuple(shards),
    )
    for index in range(len(shards)):
        manifest.open_shard(index)
    manifest.save()


def _dataset_directories(out: Path, record: dict[str, Any]) -> dict[str, Path]:
    if not record["options"]["validation_fraction"]:
        return {TRAIN: out}
    return {TRAIN: out / TRAIN, VALIDATION: out / VALIDATION}


def _empty_half_message(out: Path, half: str, options: Options, counters: Counters) -> str:
    if not counters.documents:
        return f"{out}: no document holds any text (skipped {counters.skipped}): check the inputs"
    return (
        f"{out}: no document fell to {half} ({counters.documents} documents, --validation-fraction "
        f"{options.validation_fraction}): change the fraction, remove {out / UNFINISHED}, and run again"
    )
