"""Checkpoints of a run: ``checkpoints/step-00000200/`` holds the tensors' files and ``state.json``.

A checkpoint is written under another name and renamed when every rank has finished, so a directory with that name is
whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from data_prep.errors import DepthpipeError
from pipeline.checkpoint_tensors import files_of, load_training_state, save_training_state

if TYPE_CHECKING:
    from pipeline.engine import DepthPipelineEngine

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        step: optimizer steps done.
        position: where the data stream goes on, as ``BatchLoader.position`` gave it.
        identity: what of the configuration makes the run what it is, by key.
    """

    path: Path
    step: int
    position: dict[str, Any]
    identity: dict[str, Any]


def latest_checkpoint(run_dir: str | Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None."""
    paths = _list(Path(run_dir))
    return _read(paths[-1]) if paths else None


def agree_on_checkpoint(checkpoint: Checkpoint | None, run_dir: Path) -> None:
    """Every rank calls this with the checkpoint that it has found. Raises DepthpipeError if they are not the same."""
    steps: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, checkpoint.step if checkpoint else 0)
    if len(set(steps)) > 1:
        raise DepthpipeError(
            f"run.dir: {run_dir} is not the same directory for every rank (newest checkpoints: steps {steps}); "
            "name one that all machines share"
        )


def save_checkpoint(
    engine: DepthPipelineEngine, run_dir: Path, step: int, position: dict[str, Any], identity: dict[str, Any], keep: int
) -> None:
    """Write a checkpoint from all ranks, then remove all but the newest `keep`. Every rank calls this."""
    directory = run_dir / "checkpoints"
    name = f"step-{step:08d}"
    partial = directory / f".{name}.partial"
    if dist.get_rank() == 0:
        for left in directory.glob(".step-*"):  # of a run that was killed while it wrote or removed one
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    dist.barrier()
    save_training_state(engine, partial)
    dist.barrier()
    if dist.get_rank() == 0:
        _check_whole(partial)
        state = {"format": FORMAT, "step": step, "position": position, "identity": identity}
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        _remove(directory / name)
        os.rename(partial, directory / name)
        for old in _list(run_dir)[:-keep]:
            _remove(old)
    dist.barrier()


def load_checkpoint(engine: DepthPipelineEngine, checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Restore weights and optimizer, on whatever stages and replicas there are now. Every rank calls this.

    Raises:
        DepthpipeError: if the checkpoint is of another run, or cannot be read.
    """
    check_identity(checkpoint, identity)
    try:
        load_training_state(engine, checkpoint.path, checkpoint.step)
    except DepthpipeError as error:
        raise DepthpipeError(f"{error}; remove it to resume from the one before") from None
    engine.global_steps = checkpoint.step
    engine.global_samples = checkpoint.step * engine.train_batch_size()


def check_identity(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Raise DepthpipeError, naming the key, where the configuration is not that of the checkpoint's run."""
    for key, value in identity.items():
        if checkpoint.identity.get(key) != value:
            raise DepthpipeError(
                f"{key}: {value} does not fit {checkpoint.path}, which was written with "
                f"{checkpoint.identity.get(key)}; set it back, or start over with `depthpipe train --restart`"
            )


def _check_whole(directory: Path) -> None:
    """Every rank's file is here: on machines that share no directory they are not."""
    missing = [path.name for path in sorted(files_of(directory)) if not path.exists()]
    if missing:
        raise DepthpipeError(
            f"run.dir: {directory} lacks {', '.join(missing)}, which other ranks wrote; "
            "name a directory that all machines share"
        )


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill in the middle leaves nothing that looks like one."""
    if path.exists():
        leaving = path.with_name(f".{path.name}.leaving")
        os.rename(path, leaving)
        shutil.rmtree(leaving)


def _list(run_dir: Path) -> list[Path]:
    directory = run_dir / "checkpoints"
    names = sorted(path.name for path in directory.glob("step-*")) if directory.is_dir() else []
    return [directory / name for name in names if _NAME.fullmatch(name)]


def _read(path: Path) -> Checkpoint:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state.get("format") != FORMAT:
            raise DepthpipeError(
                f"{path}: checkpoint format {state.get('format')}, this depthpipe reads {FORMAT}; "
                "start over with `depthpipe train --restart`"
            )
        return Checkpoint(path, int(state["step"]), state["position"], state["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DepthpipeError(f"{path}: not a whole checkpoint ({error}); remove it to use the one before") from None
