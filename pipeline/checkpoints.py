"""Checkpoints of a run: ``checkpoints/step-00000200/`` holds the tensors' files and ``state.json``.

A checkpoint is written under another name and renamed when every rank's files are on disk, so a directory with that
name is whole; ``state.json`` has their sizes and checksums.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from data_prep.errors import DepthpipeError
from data_prep.manifest import write_json
from pipeline.agreement import check_same_directory, gather, on_rank_0
from pipeline.checkpoint_tensors import METADATA_FILE, load_training_state, save_training_state

if TYPE_CHECKING:
    from pipeline.engine import DepthPipelineEngine

FORMAT = 1
READ_BYTES = 1 << 24
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        step: optimizer steps done.
        position: where the data stream goes on, as ``BatchLoader.position`` gave it.
        identity: what of the configuration makes the run what it is, by key.
        files: size in bytes and CRC-32 of each file of tensors, by name.
    """

    path: Path
    step: int
    position: dict[str, Any]
    identity: dict[str, Any]
    files: dict[str, tuple[int, int]]

    def damage(self, names: Iterable[str]) -> str | None:
        """What is wrong with the first of `names` that is not as it was written, or with the size of any file."""
        for name, (size, _) in self.files.items():
            path = self.path / name
            if not path.exists() or path.stat().st_size != size:
                return f"{path}: {'is missing' if not path.exists() else 'has another size than was written'}"
        for name in names:
            if _crc32(self.path / name) != self.files[name][1]:
                return f"{self.path / name}: is damaged (another checksum than was written)"
        return None

    def check_before_reading(self) -> None:
        """Raise DepthpipeError if a file is missing, has another size, or if the list of tensors is damaged."""
        if problem := self.damage([METADATA_FILE]):
            raise DepthpipeError(problem)


def latest_checkpoint(run_dir: str | Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None."""
    paths = _list(Path(run_dir))
    return _read(paths[-1]) if paths else None


def agree_on_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None: the same for every rank. Every rank calls this.

    Raises:
        DepthpipeError: if the ranks do not see one directory.
    """

    def look() -> tuple[str, str | None]:
        marker = f".{secrets.token_hex(8)}"
        (run_dir / marker).touch()
        paths = _list(run_dir)
        return marker, paths[-1].name if paths else None

    marker, newest = on_rank_0(look)
    try:
        check_same_directory(run_dir, marker)
    finally:
        on_rank_0((run_dir / marker).unlink)
    return _read(run_dir / "checkpoints" / newest) if newest else None


def save_checkpoint(
    engine: DepthPipelineEngine, run_dir: Path, step: int, position: dict[str, Any], identity: dict[str, Any], keep: int
) -> None:
    """Write a checkpoint from all ranks, then remove all but the newest `keep`. Every rank calls this.

    Raises:
        DepthpipeError: on every rank, if one cannot write.
    """
    directory = run_dir / "checkpoints"
    name = f"step-{step:08d}"
    partial = directory / f".{name}.partial"

    def begin() -> None:
        for left in directory.glob(".step-*"):  # of a run that was killed while it wrote or removed one
            shutil.rmtree(left)
        partial.mkdir(parents=True)

    def finish() -> None:
        state = {"format": FORMAT, "step": step, "position": position, "identity": identity, "files": files}
        write_json(partial / "state.json", state)
        _remove(directory / name)
        _sync(partial)
        os.rename(partial, directory / name)
        _sync(directory)
        for old in _list(run_dir)[:-keep]:
            _remove(old)

    on_rank_0(begin)
    save_training_state(engine, partial)
    files = {name: sums for of_rank in gather(_own_files(partial)) for name, sums in of_rank.items()}
    on_rank_0(finish)


def load_checkpoint(engine: DepthPipelineEngine, checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Restore weights and optimizer, on whatever stages and replicas there are now. Every rank calls this.

    Raises:
        DepthpipeError: if the checkpoint is of another run, or not as it was written.
    """
    check_identity(checkpoint, identity)
    share = sorted(checkpoint.files)[dist.get_rank() :: dist.get_world_size()]
    for problem in gather(checkpoint.damage(share)):
        if problem:
            raise DepthpipeError(f"{problem}; remove {checkpoint.path} to resume from the checkpoint before")
    load_training_state(engine, checkpoint.path, checkpoint.step)
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


def _own_files(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and checksum of the files that this rank has just written, and that memory still holds."""
    own = list(directory.glob(f"__{dist.get_rank()}_*"))
    if dist.get_rank() == 0:
        own.append(directory / METADATA_FILE)
    return {path.name: (path.stat().st_size, _crc32(path)) for path in own}


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            value = zlib.crc32(block, value)
    return value


def _sync(directory: Path) -> None:
    """Have the names in a directory on disk, too."""
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


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
        files = {name: (int(size), int(crc)) for name, (size, crc) in state["files"].items()}
        return Checkpoint(path, int(state["step"]), state["position"], state["identity"], files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DepthpipeError(f"{path}: not a whole checkpoint ({error}); remove it to use the one before") from None
