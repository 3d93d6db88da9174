"""The model as a DeepSpeed PipelineModule: this rank's layers, tensors in and tensors out."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule
from torch import Tensor

from model.config import ModelConfig
from model.depth_buffer import DepthBuffer
from model.layers import build_layer, forward_layers
from model.loss import cross_entropy
from pipeline.plan import StagePlan


class _DepthLayerSpec(LayerSpec):
    """A layer of the model, built only on the rank that owns it, from (configuration, index, seed) alone."""

    def __init__(self, config: ModelConfig, index: int, seed: int) -> None:
        self.typename = type(self)
        self.module_args = (index,)
        self.module_kwargs: dict[str, Any] = {}
        self.global_rank = -1
        self._build_arguments = (config, index, seed)

    def build(self, log: bool = False) -> Any:
        return build_layer(*self._build_arguments)


class DepthPipelineModule(PipelineModule):
    """Stage ``stage_id`` of the model, cut where the plan says.

    ``forward`` takes token ids ``[micro_batch, sequence]`` on the first stage and the hop's tensors, each
    ``[micro_batch, sequence, hidden]``, on the others. It returns the hop's tensors, or on the last stage the logits
    ``[micro_batch, sequence, vocab]``.
    """

    def __init__(self, config: ModelConfig, plan: StagePlan, seed: int, *, checkpoint_layers: bool, topology: Any):
        self.plan = plan
        self.checkpoint_layers = checkpoint_layers
        specs = [_DepthLayerSpec(config, index, seed) for index in range(config.num_hidden_layers + 2)]
        super().__init__(layers=specs, topology=topology, loss_fn=cross_entropy, activation_checkpoint_interval=0)

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        entering = inputs if isinstance(inputs, Tensor) else DepthBuffer.from_tensors(inputs)
        leaving = forward_layers(self.forward_funcs, entering)
        return leaving.tensors() if isinstance(leaving, DepthBuffer) else leaving

    def _partition_layers(self, method: str = "plan") -> None:
        self.parts = list(self.plan.bounds)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.parts[stage], self.parts[stage + 1])
