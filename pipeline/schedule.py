"""The order of a stage's work: one forward, one backward (1F1B), two stages per rank (DualPipeV), forward only.

DeepSpeed's own 1F1B pairs blocking sends and receives step by step. Here communication is asynchronous: a stage sends
as soon as it has computed, and a computation waits for what it needs. The schedule only fixes their order.
Micro-batches go forward and backward in order on every stage, so gradients accumulate in one order at every degree.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    CommitP2P,
    DualPipeVSchedule,
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
    """1F1B: a stage runs ahead by `run_ahead` micro-batches per stage behind it, then alternates, then drains.

    At most ``run_ahead * (stages - stage_id - 1) + 1`` micro-batches are alive on a stage. With 1 (classic 1F1B) a
    stage waits out every transfer there and back: there is nothing else that it may compute. With 2 (eager 1F1B,
    arXiv:2211.05322) transfers of up to half a stage's time per micro-batch are hidden, with 3 of up to all of it.
    """

    def __init__(self, micro_batches: int, stages: int, stage_id: int, run_ahead: int = 1) -> None:
        super().__init__(micro_batches, stages, stage_id)
        self.run_ahead = run_ahead

    def steps(self) -> Iterator[list[PipeInstruction]]:
        ahead = min(self.run_ahead * (self.stages - self.stage_id - 1), self.micro_batches)
        for micro_batch in range(ahead):
            yield _forward(self, micro_batch)
        for micro_batch in range(self.micro_batches):
            if micro_batch + ahead < self.micro_batches:
                yield _forward(self, micro_batch + ahead)
            send = [] if self.stage_id == 0 else [SendGrad(micro_batch)]
            yield [BackwardPass(micro_batch), *send]
        yield [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]

    def num_pipe_buffers(self) -> int:
        return 0  # the engine keeps micro-batches by their number


class ForwardOnly(PipeSchedule):
    """Evaluation: every stage passes the micro-batches on in order."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for micro_batch in range(self.micro_batches):
            yield _forward(self, micro_batch)

    def num_pipe_buffers(self) -> int:
        return 0


class TwoStagesPerRank(DualPipeVSchedule):
    """DeepSpeed's DualPipeV: rank ``r`` holds stage ``r`` (phase 0) and stage ``2 * stages - 1 - r`` (phase 1)."""

    def steps(self) -> Iterator[list[PipeInstruction]]:
        # Receives and commits say when to wait; here a computation waits for its own input.
        passive = (RecvActivation, RecvGrad, CommitP2P)
        for instructions in super().steps():
            yield [instruction for instruction in instructions if not isinstance(instruction, passive)]

    def num_pipe_buffers(self) -> int:
        return 0


def _forward(schedule: PipeSchedule, micro_batch: int) -> list[PipeInstruction]:
    first, last = schedule.stage_id == 0, schedule.stage_id == schedule.stages - 1
    load = [LoadMicroBatch(micro_batch)] if first or last else []
    send = [] if last else [SendActivation(micro_batch)]
    return [*load, ForwardPass(micro_batch), *send]
