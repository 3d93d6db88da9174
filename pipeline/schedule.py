"""The order of a stage's work: one forward, one backward (1F1B), and forward only for evaluation.

DeepSpeed's own 1F1B pairs blocking sends and receives step by step. Here communication is asynchronous: a stage sends as
soon as it has computed, and receives are posted ahead. The schedule only fixes the order of the computations.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    ReduceTiedGrads,
    SendActivation,
    SendGrad,
)


class OneForwardOneBackward(PipeSchedule):
    """1F1B: a stage runs ahead by the number of stages behind it, then alternates, then drains.

    Micro-batches go forward and backward in order on every stage, so gradients accumulate in the same order at every
    pipeline degree. At most ``stages - stage_id`` micro-batches are alive on a stage.
    """

    def steps(self) -> Iterator[list[PipeInstruction]]:
        ahead = min(self.stages - self.stage_id - 1, self.micro_batches)
        for micro_batch in range(ahead):
            yield self._forward(micro_batch)
        for micro_batch in range(self.micro_batches):
            if micro_batch + ahead < self.micro_batches:
                yield self._forward(micro_batch + ahead)
            yield self._backward(micro_batch)
        yield [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]

    def num_pipe_buffers(self) -> int:
        return min(self.stages - self.stage_id, self.micro_batches)

    def _forward(self, micro_batch: int) -> list[PipeInstruction]:
        return _forward(self, micro_batch % self.num_pipe_buffers())

    def _backward(self, micro_batch: int) -> list[PipeInstruction]:
        buffer = micro_batch % self.num_pipe_buffers()
        receive = [] if self.stage_id == self.stages - 1 else [RecvGrad(buffer)]
        send = [] if self.stage_id == 0 else [SendGrad(buffer)]
        return [*receive, BackwardPass(buffer), *send]


class ForwardOnly(PipeSchedule):
    """Evaluation: every stage passes the micro-batches on in order."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for _ in range(self.micro_batches):
            yield _forward(self, 0)

    def num_pipe_buffers(self) -> int:
        return 1


def _forward(schedule: PipeSchedule, buffer: int) -> list[PipeInstruction]:
    first, last = schedule.stage_id == 0, schedule.stage_id == schedule.stages - 1
    receive = [] if first else [RecvActivation(buffer)]
    load = [LoadMicroBatch(buffer)] if first or last else []
    send = [] if last else [SendActivation(buffer)]
    return [*receive, *load, ForwardPass(buffer), *send]
