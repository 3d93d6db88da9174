"""One worker of a run: build the stage, feed it, step, measure, validate, checkpoint."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import torch.distributed as dist
from rich.console import Console

from data_prep.errors import EXIT_WRONG_INPUT, DepthpipeError
from data_prep.manifest import TOKENIZER_FILE, write_atomically
from data_prep.remote import load_manifest
from data_prep.stream import BatchLoader, DatasetSource, SequenceStream
from pipeline.agreement import agreed_skips, check_same_data, gather, skips_since
from pipeline.checkpoints import agree_on_checkpoint, load_checkpoint, save_checkpoint
from pipeline.config import Config, OptimizerSection, WeightedDataset, load_config
from pipeline.launch import WORKER_PARENT, end_with_parent
from pipeline.meter import Meter
from pipeline.metrics import MetricsWriter, StepMetrics
from pipeline.progress import SteadyFile, TrainProgress
from pipeline.runtime import check_processes, run_identity, set_learning_rate, start_engine

if TYPE_CHECKING:
    from pipeline.engine import DepthPipelineEngine


def run_worker(config_path: str, overrides: Sequence[str]) -> None:
    """Train in this process, as the rank that the environment names, and end it with exit code 0, 1 or 2.

    What libraries print goes to ``logs/rank-N.log``; rank 0's console shows the progress of the run.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    rank = int(os.environ["RANK"])
    errors = get_error_handler()
    errors.initialize()
    end_with_parent()
    console, log = sys.stderr, None
    try:
        config = load_config(config_path, overrides)
        log = Path(config.run.dir) / "logs" / f"rank-{rank}.log"
        console = _redirect_output(log)
        check_processes(config, int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        train(config, console)
    except Exception as error:
        errors.record_exception(error)
        traceback.print_exc()
        wrong_input = isinstance(error, DepthpipeError)
        if WORKER_PARENT not in os.environ:  # otherwise the parent prints what was recorded
            where = f"; its log is {log}" if log else ""
            line = f"error: {error}" if wrong_input else f"rank {rank} failed: {error!r}{where}"
            print(f"depthpipe: {line}", file=console, flush=True)
        os._exit(EXIT_WRONG_INPUT if wrong_input else 1)  # a process group that has lost a rank can hang in its exit
    dist.destroy_process_group()


def train(config: Config, console: TextIO) -> None:
    """Train from the latest checkpoint, or from the start, to ``train.steps``."""
    run_dir = Path(config.run.dir)
    identity = run_identity(config)
    engine = start_engine(config)
    checkpoint = agree_on_checkpoint(run_dir)
    start_step = 0
    if checkpoint is not None:
        load_checkpoint(engine, checkpoint, identity)
        start_step = checkpoint.step
    position = checkpoint.position if checkpoint else None
    with ExitStack() as stack:
        loader = _loader(config, engine, config.data.train_datasets(), position, stack)
        meter = Meter(config, engine, loader, start_step)
        report = _Report(config, console, start_step, stack) if dist.get_rank() == 0 else None
        for step in range(start_step + 1, config.train.steps + 1):
            last = step == config.train.steps
            lr = learning_rate(config.optimizer, step, config.train.steps)
            set_learning_rate(engine, lr)
            loss = float(engine.train_batch(loader))
            _check_finite(config, engine, step, loss)
            validates = config.data.validation is not None and (last or _due(step, config.train.validation_every))
            saves = last or _due(step, config.checkpoint.every)
            # Measuring compares what the stages could not read, so nothing is saved or validated without it.
            logs = saves or validates or _due(step, config.monitor.every)
            line = meter.measure(step, loss, lr) if logs else None
            if validates and line is not None:
                with meter.paused():
                    line = dataclasses.replace(line, validation_loss=validate(config, engine))
            if report is not None and line is not None:
                report.write(line)  # before the checkpoint: a run that resumes from it goes on behind this line
            if saves:
                position = loader.position() if loader else {}
                with meter.paused():
                    save_checkpoint(engine, run_dir, step, position, identity, config.checkpoint.keep)


def _check_finite(config: Config, engine: DepthPipelineEngine, step: int, loss: float) -> None:
    """A run that has diverged must not go on to replace its sound checkpoints."""
    norm = engine.get_global_grad_norm()
    if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
        raise DepthpipeError(
            f"step {step}: loss {loss}, gradient norm {norm}: the run has diverged; lower optimizer.lr "
            f"({config.optimizer.lr:g}) or raise optimizer.warmup_steps, and resume from the last checkpoint"
        )


def validate(config: Config, engine: DepthPipelineEngine) -> float:
    """Mean loss over the first ``train.validation_batches`` global batches of the validation set, or all of it."""
    assert config.data.validation is not None
    dataset = [WeightedDataset(config.data.validation)]
    sequences = _stream(config, dataset).sequences_per_epoch[0]
    batches = min(config.train.validation_batches, max(1, sequences // config.train.global_batch_size))
    with ExitStack() as stack:
        loader = _loader(config, engine, dataset, None, stack)
        losses = [float(engine.eval_batch(loader)) for _ in range(batches)]
        agreed_skips(gather(skips_since(loader, engine.grid.get_data_parallel_id())))
    return sum(losses) / len(losses)


def learning_rate(optimizer: OptimizerSection, step: int, steps: int) -> float:
    """Rate of optimizer step `step` (from 1): linear warm-up, then constant or a half cosine down to the last step."""
    if step <= optimizer.warmup_steps:
        return optimizer.lr * step / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    progress = (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps)
    floor = optimizer.min_lr_ratio
    return optimizer.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class _Report:
    """Rank 0's account of the run: metrics.jsonl, TensorBoard and the live line."""

    def __init__(self, config: Config, console: TextIO, start_step: int, stack: ExitStack) -> None:
        _describe_run(config)
        self._writer = stack.enter_context(MetricsWriter(config.run.dir, config.monitor.tensorboard, start_step))
        self._progress = stack.enter_context(
            TrainProgress(
                config.train.steps, start_step, config.tokens_per_step, Console(file=console, highlight=False)
            )
        )

    def write(self, line: StepMetrics) -> None:
        self._writer.write(line)
        self._progress.update(line)


def _loader(
    config: Config,
    engine: DepthPipelineEngine,
    datasets: list[WeightedDataset],
    position: dict[str, Any] | None,
    stack: ExitStack,
) -> BatchLoader | None:
    """This rank's batches: inputs on the first stage, labels on the last, nothing between them.

    Every rank calls this. Raises DepthpipeError where they do not read the same data.
    """
    first, last = engine.is_first_stage(), engine.is_last_stage()
    stream = _stream(config, datasets) if first or last else None
    check_same_data(stream)
    if stream is None:
        return None
    loader = BatchLoader(
        stream,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=engine.grid.get_data_parallel_id(),
        data_parallel_size=config.parallel.data,
        position=position,
        columns="both" if first and last else "inputs" if first else "labels",
        document_boundaries=config.data.document_attention and first,
    )
    stack.callback(loader.close)
    return loader


def _stream(config: Config, datasets: list[WeightedDataset]) -> SequenceStream:
    sources = [DatasetSource(dataset.path, dataset.weight) for dataset in datasets]
    return SequenceStream(
        sources,
        config.data.sequence_length,
        config.run.seed,
        on_bad_shard=config.data.on_bad_shard,
        cache_dir=config.data.cache_dir,
        cache_bytes=config.data.cache_bytes,
    )


def _describe_run(config: Config) -> None:
    """Leave in the run directory what later commands need to know of the run: its configuration and tokenizer."""
    run_dir = Path(config.run.dir)
    manifest = load_manifest(config.data.train_datasets()[0].path, config.data.cache_dir)
    write_atomically(run_dir / "config.yaml", config.to_yaml().encode())
    write_atomically(run_dir / TOKENIZER_FILE, manifest.tokenizer_path.read_bytes())


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _redirect_output(log: Path) -> TextIO:
    """Send this process's stdout and stderr to `log`; returns what stdout was, for the lines that people read."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise DepthpipeError(f"run.dir: {log} cannot be written ({error.strerror})") from None
    try:
        console = os.fdopen(os.dup(1), "w", encoding="utf-8")
    except OSError:  # started with stdout closed
        console = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    return cast(TextIO, SteadyFile(console))
