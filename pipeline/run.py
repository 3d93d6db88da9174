"""``depthpipe train``: look at the run directory, say what will happen, start the workers."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import DepthpipeError
from model.flops import num_parameters
from pipeline.config import Config, load_config
from pipeline.formatting import format_count
from pipeline.launch import launch_local

LOCK_FILE = ".lock"


def train_here(config_path: str, overrides: Sequence[str], *, restart: bool) -> int:
    """Train on this machine, from the latest checkpoint unless `restart`. Returns the exit code."""
    config = load_config(config_path, overrides)
    run_dir = Path(config.run.dir)
    if restart:
        with _only_run_in(run_dir):
            _move_aside(run_dir)
    done = _steps_done(config)
    if done >= config.train.steps:
        print(f"{run_dir} has done its {done} steps; raise train.steps to go on, or start over with --restart")
        return 0
    with _only_run_in(run_dir):
        print(describe(config))
        if done:
            print(f"resuming {run_dir} after step {done}")
        arguments = [config_path, *(word for override in overrides for word in ("--set", override))]
        code = launch_local(config, arguments)
    if code == 0:
        print(f"trained: {run_dir} holds metrics.jsonl, checkpoints/, tensorboard/; next: depthpipe generate {run_dir}")
    return code


def describe(config: Config) -> str:
    """The run in one line."""
    model, parallel = config.model, config.parallel
    return (
        f"{config.run.dir}: {format_count(num_parameters(model))} parameters, {model.num_hidden_layers} layers, "
        f"{model.residual} residuals; {parallel.pipeline} pipeline stage(s) x {parallel.data} data parallel; "
        f"{config.train.steps} steps of {config.tokens_per_step:,} tokens"
    )


def _steps_done(config: Config) -> int:
    """Steps of the run's latest checkpoint; raises DepthpipeError if the configuration does not fit it."""
    from pipeline.checkpoints import check_identity, latest_checkpoint
    from pipeline.runtime import run_identity

    checkpoint = latest_checkpoint(config.run.dir)
    if checkpoint is None:
        return 0
    check_identity(checkpoint, run_identity(config))
    return checkpoint.step


def _move_aside(run_dir: Path) -> None:
    if [path.name for path in run_dir.iterdir()] == [LOCK_FILE]:  # there was none
        return
    number = 1
    while (target := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
        number += 1
    run_dir.rename(target)
    print(f"the earlier run is now {target}")


@contextmanager
def _only_run_in(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; a second training there would write into the same files."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir / LOCK_FILE, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise DepthpipeError(f"run.dir: {run_dir} cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise DepthpipeError(f"{run_dir}: another training runs there; wait for it, or set another run.dir") from None
    try:
        yield
    finally:
        os.close(lock)
