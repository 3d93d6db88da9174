"""Checkpoints of a run: ``checkpoints/step-00000200/`` holds DeepSpeed's files and ``state.json``.

A checkpoint is written under another name and renamed when every rank has finished, so a directory with that name is
whole.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from data_prep.errors import DepthpipeError

if TYPE_CHECKING:
    from pipeline.engine import DepthPipelineEngine

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        step: optimizer steps done.
        position: where the data stream goes on, as ``BatchLoader.position`` gave it.
        layout: what of the configuration the files depend on, by key.
    """

    path: Path
    step: int
    position: dict[str, Any]
    layout: dict[str, Any]

    def layer_file(self, index: int) -> Path:
        """The weights of pipeline layer `index` (0 the embedding)."""
        return self.path / _layer_name(index)


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
    engine: DepthPipelineEngine, run_dir: Path, step: int, position: dict[str, Any], layout: dict[str, Any], keep: int
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
    engine.save_checkpoint(str(directory), tag=partial.name, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        state = {"step": step, "position": position, "layout": layout}
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        _check_whole(partial, engine.module.num_layers)
        _remove(directory / name)
        os.rename(partial, directory / name)
        for old in _list(run_dir)[:-keep]:
            _remove(old)
    dist.barrier()


def load_checkpoint(engine: DepthPipelineEngine, checkpoint: Checkpoint, layout: dict[str, Any]) -> None:
    """Restore weights and optimizer. Every rank calls this.

    Raises:
        DepthpipeError: if the checkpoint was written with another layout, or cannot be read.
    """
    check_layout(checkpoint, layout)
    remedy = "remove it to resume from the one before"
    try:
        path, _ = engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
    except (OSError, RuntimeError, EOFError, AssertionError, pickle.UnpicklingError) as error:
        raise DepthpipeError(f"{checkpoint.path}: cannot be read ({str(error).splitlines()[0]}); {remedy}") from error
    if path is None:
        raise DepthpipeError(f"{checkpoint.path}: cannot be read; {remedy}")


def check_layout(checkpoint: Checkpoint, layout: dict[str, Any]) -> None:
    """Raise DepthpipeError, naming the key, where the run's configuration does not fit the checkpoint."""
    for key, value in layout.items():
        if checkpoint.layout.get(key) != value:
            raise DepthpipeError(
                f"{key}: {value} does not fit {checkpoint.path}, which was written with "
                f"{checkpoint.layout.get(key)}; set it back, or start over with `depthpipe train --restart`"
            )


def _check_whole(directory: Path, num_layers: int) -> None:
    """Every stage's files are here: on machines that share no directory they are not."""
    missing = [index for index in range(num_layers) if not (directory / _layer_name(index)).exists()]
    if missing:
        raise DepthpipeError(
            f"run.dir: {directory} lacks layers {missing} of the model; name a directory that all machines share"
        )


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill in the middle leaves nothing that looks like one."""
    if path.exists():
        leaving = path.with_name(f".{path.name}.leaving")
        os.rename(path, leaving)
        shutil.rmtree(leaving)


def _layer_name(index: int) -> str:
    return f"layer_{index:02d}-model_states.pt"


def _list(run_dir: Path) -> list[Path]:
    directory = run_dir / "checkpoints"
    names = sorted(path.name for path in directory.glob("step-*")) if directory.is_dir() else []
    return [directory / name for name in names if _NAME.fullmatch(name)]


def _read(path: Path) -> Checkpoint:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return Checkpoint(path, int(state["step"]), state["position"], state["layout"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DepthpipeError(f"{path}: not a whole checkpoint ({error}); remove it to use the one before") from None
