"""DeepSpeed's pipeline engine with a transport of its own for the depth buffer.

What changes against ``PipelineEngine``, and why (the stock behaviour was measured, see the benchmarks):

- one joint backward pass per stage and micro-batch; the stock engine walks the graph once per output tensor, which is
  slower and changes the order in which gradients accumulate;
- no metadata on the wire, no copies at the boundary, sends that overlap the next computation, receives posted ahead;
- a gradient norm that is summed in the same order at every pipeline degree, so clipping moves no bits;
- tied embeddings are two weights whose gradients are added once per step, so the sum has the same order everywhere.

Optimizer, ZeRO-1, bf16 and loss scaling are DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe import schedule as instructions
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER, PipelineEngine
from torch import Tensor

from pipeline.depth_buffer import HopLayout, Receiver, Sender
from pipeline.module import DepthPipelineModule
from pipeline.schedule import ForwardOnly, OneForwardOneBackward, TwoStagesPerRank


@dataclass
class _Stage:
    """A stage that this rank holds: its links, and its micro-batches under way by their number.

    Attributes:
        documents_in, documents_out: numbers of the documents, where attention stays inside them.
        inputs: what the stage computes on; received tensors, or token ids on the first stage.
        outputs: tensors that have left and whose gradients are to come back.
    """

    index: int
    activations_in: Receiver | None = None
    activations_out: Sender | None = None
    gradients_in: Receiver | None = None
    gradients_out: Sender | None = None
    documents_in: Receiver | None = None
    documents_out: Sender | None = None
    inputs: dict[int, Tensor | tuple[Tensor, ...]] = field(default_factory=dict)
    outputs: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    documents: dict[int, Tensor] = field(default_factory=dict)
    labels: dict[int, Tensor] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)


class DepthPipelineEngine(PipelineEngine):
    """Trains a :class:`DepthPipelineModule`, which holds one stage of this rank (1F1B) or two (DualPipeV).

    Args:
        hop_shape: ``(micro_batch, sequence, hidden)`` of the tensors that cross a hop.
        hop_dtype: the training dtype.
        tie_weights: whether the embedding and the output head are one weight.
        document_attention: whether micro-batches bring document numbers, which every stage needs.
        run_ahead: micro-batches that 1F1B runs ahead per stage behind; see `OneForwardOneBackward`.
        timeout: a neighbour that is silent for longer is lost.
        arguments: those of ``PipelineEngine``, by name.
    """

    module: DepthPipelineModule
    total_loss: Tensor | None
    _stages: list[_Stage] | None = None  # by phase; None while the parent's constructor runs
    _active: _Stage | None = None  # the stage that computes now

    def __init__(
        self,
        *,
        hop_shape: tuple[int, int, int],
        hop_dtype: torch.dtype,
        tie_weights: bool,
        document_attention: bool,
        run_ahead: int,
        timeout: timedelta,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.plan = self.module.plan
        self._timeout = timeout
        self._run_ahead = run_ahead
        self._documents = HopLayout(1, hop_shape[:2], torch.int32) if document_attention else None
        self._hops = [HopLayout(tensors, hop_shape, hop_dtype) for tensors in self.plan.hop_tensors]
        self._tied_group = self._make_tied_group() if tie_weights and self.num_stages > 1 else None
        self._ties_weights = tie_weights
        self._stages = self._connect()
        if tie_weights and self._holds_last:
            # DeepSpeed counts a replicated parameter once in its norm.
            setattr(self.module.tied_weights()[-1], "ds_pipe_replicated", True)  # noqa: B010

    # Where this rank is. DeepSpeed asks is_last_stage() both for "who has the loss" and for "is this its backward".

    @property
    def _last_index(self) -> int:
        return self.plan.num_stages - 1

    @property
    def _holds_first(self) -> bool:
        return self.stage_id == 0

    @property
    def _holds_last(self) -> bool:
        return self._rank_of(self._last_index) == self.stage_id

    def is_last_stage(self) -> bool:
        if self._stages is None:
            return bool(super().is_last_stage())
        return self._holds_last and (self._active is None or self._active.index == self._last_index)

    def _loss_stage_global_rank(self) -> int:
        return int(self.grid.stage_to_global(self._rank_of(self._last_index)))

    def _rank_of(self, stage: int) -> int:
        """The pipeline rank that holds `stage`; with two stages per rank they fold back like a V."""
        return stage if stage < self.num_pipeline_ranks else self.plan.num_stages - 1 - stage

    @property
    def num_pipeline_ranks(self) -> int:
        return int(self.grid.pipe_parallel_size)

    def _connect(self) -> list[_Stage]:
        """This rank's stages, with links to the stages before and after them that other ranks hold."""
        held = [stage for stage in range(self.plan.num_stages) if self._rank_of(stage) == self.stage_id]
        stages = [_Stage(index) for index in held]
        limit = self._run_ahead * self.plan.num_stages
        for hop, ranks, forward, backward in self._hop_groups():
            activations, gradients = f"depth buffer to stage {hop + 1}", f"gradients to stage {hop}"
            documents = f"document numbers to stage {hop + 1}"
            if self.global_rank == ranks[0]:
                stage = stages[held.index(hop)]
                stage.activations_out = Sender(self._hops[hop], ranks[1], forward, activations, limit)
                stage.gradients_in = Receiver(self._hops[hop], ranks[1], backward, gradients, self.device)
                if self._documents is not None:
                    stage.documents_out = Sender(self._documents, ranks[1], forward, documents, limit)
            else:
                stage = stages[held.index(hop + 1)]
                stage.activations_in = Receiver(self._hops[hop], ranks[0], forward, activations, self.device)
                stage.gradients_out = Sender(self._hops[hop], ranks[0], backward, gradients, limit)
                if self._documents is not None:
                    stage.documents_in = Receiver(self._documents, ranks[0], forward, documents, self.device)
        return stages

    def _hop_groups(self) -> list[tuple[int, list[int], dist.ProcessGroup, dist.ProcessGroup]]:
        """This rank's hops: number, ranks of its two sides, process groups of its forward and backward messages.

        Every direction of every hop has a group of its own, because NCCL runs the messages of a group one after
        another, and none may wait for one of another kind.
        """
        mine = []
        for pipeline in self.module.topology().get_axis_comm_lists("pipe"):
            for hop in range(self._last_index):
                ranks = [pipeline[self._rank_of(stage)] for stage in (hop, hop + 1)]
                if ranks[0] == ranks[1]:
                    continue
                # Every rank takes part in making every group.
                forward, backward = (dist.new_group(ranks, timeout=self._timeout) for _ in range(2))
                if self.global_rank in ranks:
                    for group in (forward, backward):  # NCCL connects at the first message and waits for both sides
                        dist.all_reduce(torch.zeros(1, device=self.device), group=group)
                    mine.append((hop, ranks, forward, backward))
        return mine

    def _make_tied_group(self) -> dist.ProcessGroup | None:
        """The ranks of this pipeline that hold the embedding and the head."""
        mine = None
        for ranks in self.module.topology().get_axis_comm_lists("pipe"):
            ends = sorted({ranks[0], ranks[self._rank_of(self._last_index)]})
            group = dist.new_group(ends, timeout=self._timeout)
            if self.global_rank in ends:
                mine = group
        return mine

    @property
    def transport_wait_seconds(self) -> float:
        """Seconds that this rank has waited for its neighbours since it started."""
        return sum(link.clock.seconds for link in self._links(Receiver))

    @property
    def transport_bytes_sent(self) -> int:
        """Bytes that this rank has sent to its neighbours since it started."""
        return sum(link.bytes_sent for link in self._links(Sender))

    def _links(self, kind: Any, training: bool = True) -> Iterator[Any]:
        for stage in self._stages or ():
            links = [stage.activations_in, stage.activations_out, stage.documents_in, stage.documents_out]
            for link in [*links, *([stage.gradients_in, stage.gradients_out] if training else [])]:
                if isinstance(link, kind):
                    yield link

    def train_batch(self, data_iter: Any = None) -> Tensor:
        loss: Tensor = super().train_batch(data_iter)
        self.timers(TRAIN_BATCH_TIMER).reset()  # DeepSpeed does when it prints, and would keep every step until then
        return loss

    def _train_schedule(self) -> instructions.PipeSchedule:
        place = self.micro_batches, self.num_pipeline_ranks, self.stage_id
        if len(self._stages or ()) == 1:
            return OneForwardOneBackward(*place, run_ahead=self._run_ahead)
        return TwoStagesPerRank(*place)

    def _inference_schedule(self, micro_batches: int) -> instructions.PipeSchedule:
        if len(self._stages or ()) == 1:
            return ForwardOnly(micro_batches, self.num_pipeline_ranks, self.stage_id)
        return TwoStagesPerRank(micro_batches, self.num_pipeline_ranks, self.stage_id, forward_only=True)

    def _exec_schedule(self, pipe_schedule: instructions.PipeSchedule) -> None:
        training = torch.is_grad_enabled()
        self._schedule_micro_batches = pipe_schedule.micro_batches
        for link in self._links((Sender, Receiver), training):
            link.begin(pipe_schedule.micro_batches)
        for stage in self._stages or ():
            for receiver in (stage.activations_in, stage.documents_in):
                if receiver is not None:
                    receiver.post_first()
        super()._exec_schedule(pipe_schedule)
        for link in self._links((Sender, Receiver), training):
            link.finish()

    @contextmanager
    def _computing(self, phase: int) -> Iterator[_Stage]:
        assert self._stages is not None
        self._active = self._stages[phase]
        self.module.activate_phase(phase)
        try:
            yield self._active
        finally:
            self._active = None

    # The instructions of a schedule. `buffer_id` counts micro-batches, of both phases where there are two.

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        assert self._stages is not None
        inputs, labels, *documents = self._next_batch()
        if self._holds_first:
            self._stages[0].inputs[buffer_id] = inputs.to(self.device, non_blocking=True)
            for numbers in documents:
                self._stages[0].documents[buffer_id] = numbers.to(self.device, non_blocking=True)
        if self._holds_last:
            self._stages[-1].labels[buffer_id] = labels.to(self.device, non_blocking=True)

    def _exec_forward_pass(self, buffer_id: int, phase: int = 0) -> None:
        micro_batch = buffer_id % self._schedule_micro_batches
        training = torch.is_grad_enabled()
        with self._computing(phase) as stage:
            if stage.activations_in is not None:
                received = stage.activations_in.receive()
                stage.inputs[micro_batch] = tuple(tensor.requires_grad_(training) for tensor in received)
            if stage.documents_in is not None:
                stage.documents[micro_batch] = stage.documents_in.receive()[0]
            documents = stage.documents.get(micro_batch)
            outputs = DeepSpeedEngine.forward(self, stage.inputs[micro_batch], documents)
            if stage.index == self._last_index:
                stage.documents.pop(micro_batch, None)
                self._keep_loss(self.module.loss_fn(outputs, stage.labels.pop(micro_batch)), stage, micro_batch)
            else:
                stage.outputs[micro_batch] = outputs
        if not training:
            del stage.inputs[micro_batch]
        if stage.activations_out is None and stage.index != self._last_index:
            self._turn_around(stage, micro_batch, training)

    def _keep_loss(self, loss: Tensor, stage: _Stage, micro_batch: int) -> None:
        if torch.is_grad_enabled():
            stage.losses[micro_batch] = loss
        value = loss.detach()
        self.fwd_outputs.append(value)
        total: Tensor | None = self.total_loss
        self.total_loss = value if total is None else total + value

    def _turn_around(self, stage: _Stage, micro_batch: int, training: bool) -> None:
        """The next stage is this rank's own: hand over without a message."""
        assert self._stages is not None
        outputs = stage.outputs[micro_batch] if training else stage.outputs.pop(micro_batch)
        entering = tuple(tensor.detach().requires_grad_(training) for tensor in outputs)
        self._stages[1].inputs[micro_batch] = entering
        if self._documents is not None:
            self._stages[1].documents[micro_batch] = stage.documents.pop(micro_batch)

    def _exec_send_activations(self, buffer_id: int, phase: int = 0) -> None:
        assert self._stages is not None
        stage, micro_batch = self._stages[phase], buffer_id % self._schedule_micro_batches
        assert stage.activations_out is not None
        stage.activations_out.send(stage.outputs[micro_batch])
        if stage.documents_out is not None:
            stage.documents_out.send([stage.documents.pop(micro_batch)])
        if not torch.is_grad_enabled():
            del stage.outputs[micro_batch]
        elif stage.gradients_in is not None:
            stage.gradients_in.post_first()

    def _exec_backward_pass(self, buffer_id: int, phase: int = 0) -> None:
        micro_batch = buffer_id % self._schedule_micro_batches
        with self._computing(phase) as stage:
            if stage.index == self._last_index:
                DeepSpeedEngine.backward(self, stage.losses.pop(micro_batch))
            else:
                self._backward_joint(stage.outputs.pop(micro_batch), self._gradients_of(stage, micro_batch))
        if stage.index == 0:
            del stage.inputs[micro_batch]

    def _gradients_of(self, stage: _Stage, micro_batch: int) -> tuple[Tensor, ...]:
        """The gradients of the tensors that left `stage`."""
        if stage.gradients_in is not None and stage.activations_out is not None:
            gradients = stage.gradients_in.receive()
            stage.activations_out.arrived(micro_batch)
            return gradients
        assert self._stages is not None
        entered = self._stages[1].inputs.pop(micro_batch)
        returned = tuple(tensor.grad for tensor in entered)
        self._hops[stage.index].check(returned, f"gradients to stage {stage.index}, micro-batch {micro_batch}")
        return returned  # type: ignore[return-value]

    def _backward_joint(self, outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
        """One walk of the stage's graph for all the tensors that left it."""
        if self.using_bf16_optimizer:
            self.optimizer.clear_lp_grads()
        self._running_engine_backward = True  # tells DeepSpeed's hooks that the engine itself runs this backward
        try:
            torch.autograd.backward(outputs, gradients)
        finally:
            self._running_engine_backward = False
        for timers in (self.engine_timers.backward_inner_timers, self.engine_timers.backward_timers):
            self._stop_timers(timers)  # a hook of DeepSpeed on the outputs has started them
        if self.using_bf16_optimizer and not self._config.bfloat16_config.immediate_grad_update:
            self.optimizer.update_hp_grads(clear_lp_grads=False)

    def _exec_send_grads(self, buffer_id: int, phase: int = 0) -> None:
        assert self._stages is not None
        stage, micro_batch = self._stages[phase], buffer_id % self._schedule_micro_batches
        assert stage.gradients_out is not None
        stage.gradients_out.send([tensor.grad for tensor in stage.inputs.pop(micro_batch)])

    def _exec_reduce_tied_grads(self) -> None:
        """Give the embedding and the head, where they are one weight, the sum of their gradients."""
        if not self._ties_weights:
            return
        gradients = [self._gradient(weight) for weight in self.module.tied_weights()]
        if len(gradients) == 2:
            gradients[0].add_(gradients[1])
            gradients[1].copy_(gradients[0])
        elif len(gradients) == 1:
            dist.all_reduce(gradients[0], group=self._tied_group)

    def _gradient(self, parameter: torch.nn.Parameter) -> Tensor:
        gradient = getattr(parameter, "_hp_grad" if self.using_bf16_optimizer else "grad")
        assert isinstance(gradient, Tensor)
        return gradient

    def clip_fp32_gradients(self) -> None:
        """Clip to the configured norm; called by DeepSpeed before an fp32 step without ZeRO.

        The squared norms of the pipeline's layers are put into one vector, gathered over the stages (each entry comes
        from one stage, so the sum is exact) and added up in layer order: the same bits at every pipeline degree.
        """
        squares = torch.zeros(self.module.num_layers, dtype=torch.float64)
        for index, layer in self.module.held_layers():
            tied_again = self._ties_weights and index == self.module.num_layers - 1
            counted = [p.grad for n, p in layer.named_parameters() if not (tied_again and n == "weight")]
            for norm in torch._foreach_norm([gradient for gradient in counted if gradient is not None]):
                squares[index] += norm.double().cpu() ** 2
        if self.is_pipe_parallel:
            squares = squares.to(self.device)
            dist.all_reduce(squares, group=self.grid.get_pipe_parallel_group())
        self._global_grad_norm = float(squares.cpu().sum().sqrt())
        scale = self.gradient_clipping() / (self._global_grad_norm + 1e-6)
        if scale < 1.0:
            torch._foreach_mul_([p.grad for p in self.module.parameters() if p.grad is not None], scale)

    _INSTRUCTION_MAP = {  # noqa: RUF012 - the base class reads it as a class attribute
        **PipelineEngine._INSTRUCTION_MAP,
        instructions.LoadMicroBatch: _exec_load_micro_batch,
        instructions.ForwardPass: _exec_forward_pass,
        instructions.BackwardPass: _exec_backward_pass,
        instructions.SendActivation: _exec_send_activations,
        instructions.SendGrad: _exec_send_grads,
        instructions.ReduceTiedGrads: _exec_reduce_tied_grads,
    }
