"""Measures a run: wall time, waits and memory of all ranks, as one line of metrics."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from data_prep.errors import DepthpipeError
from data_prep.stream import BatchLoader
from model.flops import flops_per_token
from pipeline.config import Config
from pipeline.metrics import StepMetrics, peak_flops_per_second
from pipeline.runtime import training_dtype

if TYPE_CHECKING:
    from pipeline.engine import DepthPipelineEngine


class Meter:
    """Wall time of the training steps alone, and what the ranks did in it. Every rank has one and calls it alike."""

    def __init__(
        self, config: Config, engine: DepthPipelineEngine, loader: BatchLoader | None, start_step: int
    ) -> None:
        self._config, self._engine, self._loader = config, engine, loader
        self._ranks = dist.get_world_size()
        self._flops = flops_per_token(config.model, config.data.sequence_length) * config.tokens_per_step
        peak = peak_flops_per_second(engine.device, training_dtype(config))
        self._peak_flops = None if peak is None else peak * self._ranks
        dist.barrier()
        self._step = start_step
        self._start = time.perf_counter()
        self._waits = self._read_waits()

    def measure(self, step: int, loss: float, lr: float) -> StepMetrics:
        """The line of `step`: means over the steps since the line before.

        Raises DepthpipeError where the stages of a replica have read different data.
        """
        waits = self._read_waits()
        stage_wait, data_wait = (now - before for now, before in zip(waits, self._waits, strict=True))
        own = [stage_wait, data_wait, _memory_bytes(self._engine.device), *self._skipped()]
        row = torch.tensor(own, dtype=torch.float64)
        rows = [torch.empty_like(row, device=self._engine.device) for _ in range(self._ranks)]
        dist.all_gather(rows, row.to(self._engine.device))
        stage_waits, data_waits, memory, *skipped = torch.stack(rows).cpu().unbind(1)
        now, date = time.perf_counter(), time.time()
        seconds, steps = now - self._start, step - self._step
        self._start, self._step, self._waits = now, step, waits
        tokens_per_second = self._config.tokens_per_step * steps / seconds
        grad_norm = self._engine.get_global_grad_norm()
        return StepMetrics(
            step=step,
            tokens=step * self._config.tokens_per_step,
            loss=loss,
            grad_norm=math.nan if grad_norm is None else float(grad_norm),
            lr=lr,
            step_time_s=seconds / steps,
            tokens_per_second=tokens_per_second,
            tokens_per_second_per_device=tokens_per_second / self._ranks,
            mfu=None if self._peak_flops is None else self._flops * steps / seconds / self._peak_flops,
            data_wait_s=float(data_waits.max()) / steps,
            bubble_fraction=float(stage_waits.mean()) / seconds,
            memory_bytes=int(memory.max()),
            time=date,
            skipped_sequences=_agreed_skips(torch.stack(skipped, 1).tolist()),
        )

    def _skipped(self) -> list[int]:
        """Of the sequences that this rank could not read since the line before: its replica, their count, their sum.

        The replica is -1 where the rank reads none.
        """
        if self._loader is None:
            return [-1, 0, 0]
        new, self._loader.skipped = self._loader.skipped, []
        return [int(self._engine.grid.get_data_parallel_id()), len(new), sum(new)]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (validation, a checkpoint) counts neither as time nor as waiting of a training step."""
        start, waits = time.perf_counter(), self._read_waits()
        yield
        self._start += time.perf_counter() - start
        after = self._read_waits()
        self._waits = (self._waits[0] + after[0] - waits[0], self._waits[1] + after[1] - waits[1])

    def _read_waits(self) -> tuple[float, float]:
        """Seconds so far that this rank has waited for its neighbours, and for data."""
        return self._engine.transport_wait_seconds, self._loader.wait_seconds if self._loader else 0.0


def _agreed_skips(rows: list[list[float]]) -> int:
    """How many sequences were skipped. A replica's first stage reads inputs and its last stage their labels: had they
    skipped different ones, it would have learnt to answer one text with another.

    Raises DepthpipeError where a replica's stages have skipped different sequences.
    """
    found: dict[float, tuple[float, ...]] = {}
    for rank, (replica, *skips) in enumerate(rows):
        if replica >= 0 and found.setdefault(replica, tuple(skips)) != tuple(skips):
            raise DepthpipeError(
                f"data.on_bad_shard: rank {rank} could not read the same sequences as the first stage, so its copy of "
                "the data is another one; make them the same and resume from the last checkpoint"
            )
    return int(sum(count for count, _ in found.values()))


def _memory_bytes(device: torch.device) -> int:
    """Peak memory: of the device, or of the process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
