"""The tensors of a checkpoint: every weight with its optimizer moments, in fp32, under names that know no rank.

Each rank writes what its optimizer holds and reads what it needs, so a run resumes on any number of stages and
replicas. torch's distributed checkpoint moves the bytes and finds the files that have a part that is asked for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from data_prep.errors import DepthpipeError

if TYPE_CHECKING:
    from pipeline.engine import DepthPipelineEngine

METADATA_FILE = ".metadata"  # torch's list of the tensors, which files hold them and where
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of a weight's gradients


@dataclass(frozen=True)
class Part:
    """Consecutive elements of one flattened tensor of the model, in this rank's memory.

    Attributes:
        name: ``layers.{index}.{parameter}``, for a moment with ``.exp_avg`` or ``.exp_avg_sq`` behind it.
        data: the elements, a view of one dimension.
        start: the place of the first of them in the flattened tensor.
        size: elements of the whole tensor.
    """

    name: str
    data: Tensor
    start: int
    size: int

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Part:
        return cls(name, tensor.detach().view(-1), 0, tensor.numel())

    @property
    def offset(self) -> torch.Size:
        return torch.Size([self.start])

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(self.offset, self.data.size())


def save_training_state(engine: DepthPipelineEngine, directory: Path) -> None:
    """Write all weights and moments to `directory`, each element once. Every rank calls this.

    Raises:
        DepthpipeError: if a rank cannot write.
    """
    _check_shares(engine)
    parts = list(_optimizer_parts(engine))
    try:
        dcp.save({}, storage_writer=dcp.FileSystemWriter(directory), planner=_SaveParts(parts))
    except CheckpointException as error:
        raise DepthpipeError(
            f"{directory}: cannot be written ({_reason(error)}); make room there and run the same command again"
        ) from None


def load_training_state(engine: DepthPipelineEngine, directory: Path, step: int) -> None:
    """Restore weights and moments after optimizer step `step`, as far as this rank holds them. Every rank calls this.

    Raises:
        DepthpipeError: if the directory is not whole or cannot be read.
    """
    optimizer = engine.basic_optimizer
    for group in optimizer.param_groups:
        for stepped in group["params"]:
            moments = {moment: torch.zeros_like(stepped) for moment in MOMENTS}
            count = torch.tensor(float(step), dtype=torch.float32, device=stepped.device)
            optimizer.state[stepped] = {"step": count, **moments}
    read_parts(directory, list(_optimizer_parts(engine)))
    # Under ZeRO the optimizer steps copies of its share of the weights; those that compute are others.
    others = [(name, parameter) for name, parameter in _parameters(engine) if _is_copied(parameter)]
    read_parts(directory, [Part.whole(name, parameter) for name, parameter in others])


def read_parts(directory: Path, parts: Sequence[Part], *, alone: bool = False) -> None:
    """Fill the parts' tensors from the checkpoint in `directory`, whatever their dtype and device.

    Every rank calls this, with its own parts; or one process with `alone`.

    Raises:
        DepthpipeError: if the directory is not whole or cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what `alone` asks for
            dcp.load({}, storage_reader=dcp.FileSystemReader(directory), planner=_LoadParts(parts), no_dist=alone)
    except CheckpointException as error:
        raise DepthpipeError(f"{directory}: cannot be read ({_reason(error)})") from None


def _parameters(engine: DepthPipelineEngine) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for index, layer in engine.module.held_layers():
        for name, parameter in layer.named_parameters():
            yield f"layers.{index}.{name}", parameter


def _optimizer_parts(engine: DepthPipelineEngine) -> Iterator[Part]:
    """Weights and moments as this rank's optimizer holds them: whole ones, or its share of them under ZeRO."""
    optimizer = engine.basic_optimizer
    for name, parameter in _parameters(engine):
        stepped, elements, start = parameter, slice(None), 0
        if _is_copied(parameter):
            share = parameter._hp_mapping  # type: ignore[attr-defined]
            if share is None:
                continue
            stepped = optimizer.param_groups[share.param_group_index]["params"][0]
            first = share.hp_fragment_address.start
            elements = slice(first, first + share.hp_fragment_address.numel)
            start = share.lp_fragment_address.start
        state = optimizer.state[stepped]
        tensors = {name: stepped.detach(), **{f"{name}.{moment}": state[moment] for moment in MOMENTS}}
        for key, tensor in tensors.items():
            yield Part(key, tensor.view(-1)[elements], start, parameter.numel())


def _check_shares(engine: DepthPipelineEngine) -> None:
    """Raise RuntimeError unless the optimizer's memory is where DeepSpeed says: it holds the weights that compute."""
    for name, parameter in _parameters(engine):
        share = parameter._hp_mapping if _is_copied(parameter) else None  # type: ignore[attr-defined]
        if share is not None:
            at = share.lp_fragment_address
            computing = parameter.detach().view(-1)[at.start : at.start + at.numel]
            if not torch.equal(computing, share.hp_fragment.to(computing.dtype)):
                raise RuntimeError(f"{name}: DeepSpeed's optimizer holds other values than the model computes with")


def _is_copied(parameter: torch.nn.Parameter) -> bool:
    """Whether DeepSpeed's optimizer steps elements of a flat tensor of its own in the parameter's place."""
    return hasattr(parameter, "_hp_mapping")


class _SaveParts(DefaultSavePlanner):
    """Writes parts. The base class puts together what all ranks write, and checks that nothing is written twice."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(flatten_state_dict=False)
        self._parts = {MetadataIndex(part.name, part.offset): part for part in parts}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._item(index, part) for index, part in self._parts.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._parts[index].data

    @staticmethod
    def _item(index: MetadataIndex, part: Part) -> WriteItem:
        properties = TensorProperties(dtype=part.data.dtype)
        data = TensorWriteData(part.chunk, properties, torch.Size([part.size]))
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


class _LoadParts(DefaultLoadPlanner):
    """Reads parts, each from as many files as it takes."""

    metadata: Metadata

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(flatten_state_dict=False)
        self._parts = {MetadataIndex(part.name, part.offset): part for part in parts}

    def create_local_plan(self) -> LoadPlan:
        items = []
        for part in self._parts.values():
            stored = self.metadata.state_dict_metadata.get(part.name)
            if not isinstance(stored, TensorStorageMetadata) or math.prod(stored.size) != part.size:
                raise ValueError(f"it has no {part.name} of {part.size} elements")
            items += create_read_items_for_chunk_list(part.name, stored, [part.chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._parts[index].data


def _reason(error: CheckpointException) -> str:
    """What went wrong on the first rank that failed, in one sentence."""
    cause: Any = next(iter(error.failures.values()))[0]
    return (str(cause) or repr(cause)).splitlines()[0].partition(". ")[0]
