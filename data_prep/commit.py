"""The end of a tokenizing job: finished units become the shards of a dataset, and its manifest appears.

Every step may be repeated, so a commit that was killed is simply run again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.documents import Counters
from data_prep.encoder import token_dtype
from data_prep.errors import DepthpipeError
from data_prep.manifest import MANIFEST, TOKENIZER_FILE, Manifest, write_atomically, write_json
from data_prep.plan import Options, Plan
from data_prep.shards import ShardInfo
from data_prep.tokenizer import Tokenizer
from data_prep.worker import TRAIN, VALIDATION, UnitResult, unit_file, unit_record

JOB_FILE = "job.json"
UNFINISHED = "unfinished"


def begin(out: Path, plan: Plan, tokenizer: Tokenizer) -> None:
    """Record the job in `out`, or check that the one recorded there is this one."""
    unfinished = out / UNFINISHED
    if (unfinished / JOB_FILE).exists():
        plan.check_same_as(read_json(unfinished / JOB_FILE), out)
        return
    for name in (MANIFEST, TRAIN, VALIDATION):
        if (out / name).exists():
            raise DepthpipeError(f"{out}: holds {name}, but not from this job: choose another --out or remove it")
    write_atomically(unfinished / TOKENIZER_FILE, tokenizer.path.read_bytes())
    write_json(unfinished / JOB_FILE, plan.to_json())


def commit(out: Path) -> tuple[tuple[Path, ...], Counters]:
    """Move finished shards to their places, then write the manifests, then the record.

    Returns the dataset directories and what was counted. Raises DepthpipeError when a unit is missing or a half empty.
    """
    unfinished = out / UNFINISHED
    record = read_json(unfinished / JOB_FILE)
    missing = [unit for unit in range(record["units"]) if not unit_record(unfinished, unit).exists()]
    if missing:
        raise DepthpipeError(
            f"{out}: {len(missing)} of {record['units']} units are not done: "
            "run the missing --part, or name the directories it was done in"
        )
    results = [read_result(unfinished, unit) for unit in range(record["units"])]
    counters = total(results)
    directories = _dataset_directories(out, record)
    for half in directories:
        if not any(half in result.shards for result in results):
            raise DepthpipeError(_empty_half_message(out, half, Options(**record["options"]), counters))
    for half, directory in directories.items():
        _commit_half(directory, half, unfinished, results, record["options"]["chunk_tokens"])
    write_json(out / JOB_FILE, record | {"counters": vars(counters)})
    shutil.rmtree(unfinished)
    return tuple(directories.values()), counters


def collect_parts(out: Path, others: Sequence[Path]) -> None:
    """Copy the units that were finished in `others` into `out`; a unit's record comes last, as when it was made."""
    unfinished = out / UNFINISHED
    for other in (other / UNFINISHED for other in others):
        record = read_json(other / JOB_FILE)
        if not (unfinished / JOB_FILE).exists():
            write_atomically(unfinished / TOKENIZER_FILE, (other / TOKENIZER_FILE).read_bytes())
            write_json(unfinished / JOB_FILE, record)
        if record["fingerprint"] != read_json(unfinished / JOB_FILE)["fingerprint"]:
            raise DepthpipeError(f"{other.parent}: a part of another job than {out}: check inputs and options of both")
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
    for directory in directories:
        manifest = Manifest.load(directory)
        for index in range(len(manifest.shards)):
            manifest.open_shard(index)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # a commit killed at its very end leaves it behind
    return directories


def read_result(unfinished: Path, unit: int) -> UnitResult:
    """The record of a finished unit."""
    return UnitResult.from_json(read_json(unit_record(unfinished, unit)))


def read_json(path: Path) -> dict[str, Any]:
    """Raises DepthpipeError when `path` cannot be read."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DepthpipeError(
            f"{path.parent}: no tokenizing job is there (no {path.name}): check the directory"
        ) from None
    except (OSError, ValueError) as error:
        raise DepthpipeError(f"{path}: cannot read ({error}): remove {path.parent} and run again") from None
    return content


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
