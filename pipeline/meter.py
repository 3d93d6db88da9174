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

from data_prep.stream import BatchLoader
from model.flops import flops_per_token
from pipeline.agreement import agreed_skips, skips_since
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

        Raises DepthpipeError where the stages of a replica have skipped different sequences.
        """
        waits = self._read_waits()
        stage_wait, data_wait = (now - before for now, before in zip(waits, self._waits, strict=True))
        skips = skips_since(self._loader, self._engine.grid.get_data_parallel_id())
        own = [stage_wait, data_wait, _memory_bytes(self._engine.device), *skips]
        row = torch.tensor(own, dtype=torch.float64)
        rows = [torch.empty_like(row, device=self._engine.device) for _ in range(self._ranks)]
        dist.all_gather(rows, row.to(self._engine.device))
        answers = torch.stack(rows).cpu()
        stage_waits, data_waits, memory = answers[:, :3].unbind(1)
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
            skipped_sequences=agreed_skips(answers[:, 3:].tolist()),
        )

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


def _memory_bytes(device: torch.device) -> int:
    """Peak memory: of the device, or of the process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
