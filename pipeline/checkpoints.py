"""Checkpoints of a run: ``checkpoints/step-00000200/`` holds DeepSpeed's files and ``state.json``.

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
        return self.path / f"layer_{index:02d}-model_states.pt"


def latest_checkpoint(run_dir: str | Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None."""
    paths = _list(Path(run_dir))
    return _read(paths[-1]) if paths else None


def save_checkpoint(
    engine: DepthPipelineEngine, run_dir: Path, step: int, position: dict[str, Any], layout: dict[str, Any], keep: int
) -> None:
    """Write a checkpoint from all ranks, then remove all but the newest `keep`. Every rank calls this."""
    directory = run_dir / "checkpoints"
    name = f"step-{step:08d}"
    partial = f".{name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(directory / partial, ignore_errors=True)
        (directory / partial).mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(directory), tag=partial, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        state = {"step": step, "position": position, "layout": layout}
        (directory / partial / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(directory / name, ignore_errors=True)
        os.rename(directory / partial, directory / name)
        for old in _list(run_dir)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(engine: DepthPipelineEngine, checkpoint: Checkpoint, layout: dict[str, Any]) -> None:
    """Restore weights and optimizer. Every rank calls this.

    Raises:
        DepthpipeError: if the checkpoint was written with another layout.
    """
    check_layout(checkpoint, layout)
    path, _ = engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
    if path is None:
        raise DepthpipeError(f"{checkpoint.path}: not readable; remove it to resume from the one before")


def check_layout(checkpoint: Checkpoint, layout: dict[str, Any]) -> None:
    """Raise DepthpipeError, naming the key, where the run's configuration does not fit the checkpoint."""
    for key, value in layout.items():
        if checkpoint.layout.get(key) != value:
            raise DepthpipeError(
                f"{key}: {value} does not fit {checkpoint.path}, which was written with "
                f"{checkpoint.layout.get(key)}; set it back, or start over with --restart"
            )


def _list(run_dir: Path) -> list[Path]:
    directory = run_dir / "checkpoints"
    names = sorted(path.name for path in directory.glob("step-*")) if directory.is_dir() else []
    return [directory / name for name in names if _NAME.fullmatch(name)]


def _read(path: Path) -> Checkpoint:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return Checkpoint(path, int(state["step"]), state["position"], state["layout"])
    except (OSError, ValueError, KeyError) as error:
        raise DepthpipeError(f"{path}: not a whole checkpoint ({error}); remove it to use the one before") from None
