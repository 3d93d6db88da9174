"""The model as a DeepSpeed PipelineModule: this rank's layers, tensors in and tensors out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule
from torch import Tensor, nn

from model.config import ModelConfig
from model.depth_buffer import DepthBuffer
from model.layers import build_layer, forward_layers
from model.loss import cross_entropy
from pipeline.plan import StagePlan


class _DepthLayerSpec(LayerSpec):
    """A layer of the model, built only on the rank that owns it, from (configuration, index, seed) alone.

    The parent wants a class to call; our layers come from a function. It gets what else it reads of a specification.
    """

    def __init__(self, config: ModelConfig, index: int, seed: int) -> None:
        self.typename = type(self)
        self.module_args = (index,)
        self.module_kwargs: dict[str, Any] = {}
        self.global_rank = -1
        self._build_arguments = (config, index, seed)

    def build(self, log: bool = False) -> nn.Module:
        return build_layer(*self._build_arguments)


class DepthPipelineModule(PipelineModule):
    """One stage of the model, cut where the plan says.

    ``forward`` takes token ids ``[micro_batch, sequence]`` on the first stage and the hop's tensors, each
    ``[micro_batch, sequence, hidden]``, on the others; and, where attention stays inside documents, the number of each
    token's document, int32 ``[micro_batch, sequence]``. It returns the hop's tensors, or on the last stage the logits
    ``[micro_batch, sequence, vocab]``.
    """

    def __init__(self, config: ModelConfig, plan: StagePlan, seed: int, *, checkpoint_layers: bool, topology: Any):
        self.plan = plan
        self.checkpoint_layers = checkpoint_layers
        specs = [_DepthLayerSpec(config, index, seed) for index in range(config.num_hidden_layers + 2)]
        super().__init__(layers=specs, topology=topology, loss_fn=cross_entropy, activation_checkpoint_interval=0)

    def forward(
        self, inputs: Tensor | tuple[Tensor, ...], documents: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        entering = inputs if isinstance(inputs, Tensor) else DepthBuffer.from_tensors(inputs)
        leaving = forward_layers(self.forward_funcs, entering, checkpoint=self.checkpoint_layers, documents=documents)
        return leaving.tensors() if isinstance(leaving, DepthBuffer) else leaving

    @property
    def num_layers(self) -> int:
        """Pipeline layers of the whole model, embedding and head included."""
        return len(self._layer_specs)

    def held_layers(self) -> Iterator[tuple[int, nn.Module]]:
        """This rank's layers and their numbers."""
        yield from enumerate(self.forward_funcs, start=self._local_start)

    def tied_weights(self) -> list[nn.Parameter]:
        """The embedding's weight and the output head's, as far as this rank holds them."""
        ends = [layer for index, layer in self.held_layers() if index in (0, self.num_layers - 1)]
        return [weight for layer in ends for name, weight in layer.named_parameters() if name == "weight"]

    def activate_phase(self, phase: int) -> None:
        """Expose the layers of `phase` as the forward pass; there is one phase here."""

    def _partition_layers(self, method: str = "plan") -> None:
        self.parts = list(self.plan.bounds)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.parts[stage], self.parts[stage + 1])


class TwoStageModule(DualPipeVModule, DepthPipelineModule):
    """Stages ``r`` and ``2P - 1 - r`` of the model for DualPipeV; ``activate_phase`` chooses which one computes."""

    def held_layers(self) -> Iterator[tuple[int, nn.Module]]:
        for layers, (start, _) in zip(self.phase_funcs, self.phase_bounds, strict=True):
            yield from enumerate(layers, start=start)
