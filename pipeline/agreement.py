"""What all ranks must agree on, so that a run that goes on is one run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch.distributed as dist

from data_prep.errors import DepthpipeError
from data_prep.stream import BatchLoader, SequenceStream

T = TypeVar("T")


def on_rank_0(work: Callable[[], T]) -> T:
    """Do `work` on rank 0; every rank gets what it returns. Every rank calls this.

    Raises:
        DepthpipeError: on every rank, if `work` raises one or an OSError.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except DepthpipeError as error:
            answer[1] = str(error)
        except OSError as error:
            answer[1] = f"{error.filename}: cannot be written ({error.strerror})"
    dist.broadcast_object_list(answer, src=0)
    result, complaint = answer
    if complaint is not None:
        raise DepthpipeError(complaint)
    return cast(T, result)


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order. Every rank calls this."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_same_directory(run_dir: Path, marker: str) -> None:
    """Raise DepthpipeError, on every rank, unless all see the file `marker` that rank 0 has made in `run_dir`."""
    blind = [rank for rank, sees in enumerate(gather((run_dir / marker).exists())) if not sees]
    if blind:
        raise DepthpipeError(
            f"run.dir: {run_dir} is not the same directory on rank {_listed(blind)} as on rank 0; "
            "name one that all machines share"
        )


def check_same_data(stream: SequenceStream | None) -> None:
    """Raise DepthpipeError, on every rank, unless all that read (the others have None) read the same data in one order.

    The first stages read inputs and the last ones their labels.
    """
    digest = stream and hashlib.sha256(json.dumps(stream.identity(), sort_keys=True).encode()).hexdigest()
    digests = gather(digest)
    first = next(rank for rank, other in enumerate(digests) if other)
    others = [rank for rank, other in enumerate(digests) if other not in (None, digests[first])]
    if others:
        raise DepthpipeError(
            f"data: rank {_listed(others)} and rank {first} do not read the same datasets, although their paths are "
            "the same; give every machine the same copies"
        )


def skips_since(loader: BatchLoader | None, replica: int) -> list[int]:
    """What this rank says of the sequences that `loader` could not read since it was last asked.

    Returns:
        Replica (-1 where the rank reads none), how many, and a digest of their numbers, which a double holds exactly.
    """
    if loader is None:
        return [-1, 0, 0]
    skipped = loader.take_skipped()
    digest = hashlib.blake2b(np.sort(skipped).astype("<i8").tobytes(), digest_size=6).digest()
    return [replica, len(skipped), int.from_bytes(digest, "little")]


def agreed_skips(answers: Sequence[Sequence[float]]) -> int:
    """How many sequences were skipped, by what all ranks say of it.

    Had the first and the last stage of a replica skipped different ones, it would have learnt to answer one text with
    another.

    Raises:
        DepthpipeError: if they have.
    """
    found: dict[float, tuple[int, Sequence[float]]] = {}
    for rank, (replica, *skips) in enumerate(answers):
        if replica < 0:
            continue
        first, expected = found.setdefault(replica, (rank, skips))
        if skips != expected:
            raise DepthpipeError(
                f"data.on_bad_shard: rank {rank} and rank {first} could not read different sequences of the same data; "
                "mend the damaged copies and resume from the last checkpoint"
            )
    return int(sum(skips[0] for _, skips in found.values()))


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
