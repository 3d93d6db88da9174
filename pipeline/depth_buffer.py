"""What crosses a hop: the tensors of a depth buffer forward, their gradients backward.

Both sides of a hop know from the stage plan how many tensors cross it and their shape, so nothing but the tensors' own
bytes travels. One batched group of messages per micro-batch and direction; a receive is posted one micro-batch ahead
into the memory where the stage will use it; a send is left running while the stage computes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


class TransportError(RuntimeError):
    """A depth buffer or its gradients do not have the form that the hop was laid out for."""


@dataclass(frozen=True)
class HopLayout:
    """The form of what crosses one hop, in both directions.

    Attributes:
        num_tensors: finished sources and the running partial that are alive at the cut.
        shape: ``(micro_batch, sequence, hidden)`` of each.
        dtype: the training dtype.
    """

    num_tensors: int
    shape: tuple[int, int, int]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of one micro-batch in one direction."""
        return self.num_tensors * self.shape[0] * self.shape[1] * self.shape[2] * self.dtype.itemsize

    def check(self, tensors: Sequence[Tensor | None], what: str) -> None:
        """Raise TransportError, naming `what` and the tensor, unless `tensors` have this form."""
        if len(tensors) != self.num_tensors:
            raise TransportError(f"{what}: {len(tensors)} tensors where the hop carries {self.num_tensors}")
        for index, tensor in enumerate(tensors):
            name = "the partial" if index == self.num_tensors - 1 else f"source {index}"
            if tensor is None:
                raise TransportError(f"{what}: {name} is missing; a contribution was lost before the hop")
            if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
                raise TransportError(
                    f"{what}: {name} is {tuple(tensor.shape)} {tensor.dtype}, the hop carries {self.shape} {self.dtype}"
                )


class Sender:
    """Sends one micro-batch after another to a peer without waiting.

    Args:
        layout: form of each message group.
        peer: global rank that receives.
        group: process group of this direction alone, so that the two directions of a hop never wait for each other.
        name: the hop in words, for errors.
    """

    def __init__(self, layout: HopLayout, peer: int, group: dist.ProcessGroup, name: str) -> None:
        self.layout, self.peer, self.group, self.name = layout, peer, group, name
        self.bytes_sent = 0
        self._micro_batch = self._micro_batches = 0
        self._under_way: deque[tuple[list[dist.Work], tuple[Tensor, ...]]] = deque()

    def begin(self, micro_batches: int) -> None:
        """Start a step of that many micro-batches."""
        self._micro_batch, self._micro_batches = 0, micro_batches

    def send(self, tensors: Sequence[Tensor | None]) -> None:
        """Start sending; the tensors must not change until they have arrived."""
        self.layout.check(tensors, f"{self.name}, micro-batch {self._micro_batch}")
        while self._under_way and all(work.is_completed() for work in self._under_way[0][0]):
            self._wait_oldest()
        payload = tuple(tensor.detach().contiguous() for tensor in tensors if tensor is not None)
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, self.peer, self.group) for tensor in payload])
        self._under_way.append((works, payload))
        self.bytes_sent += self.layout.num_bytes
        self._micro_batch += 1

    def finish(self) -> None:
        """Wait until every micro-batch has been handed over. Raises TransportError if one was never sent."""
        while self._under_way:
            self._wait_oldest()
        if self._micro_batch != self._micro_batches:
            raise TransportError(f"{self.name}: {self._micro_batch} of {self._micro_batches} micro-batches were sent")

    def _wait_oldest(self) -> None:
        for work in self._under_way.popleft()[0]:
            work.wait()


class Receiver:
    """Receives one micro-batch after another from a peer, always one ahead of its use.

    Args:
        layout, peer, group, name: as for :class:`Sender`.
        device: where the tensors arrive.
    """

    def __init__(self, layout: HopLayout, peer: int, group: dist.ProcessGroup, name: str, device: torch.device) -> None:
        self.layout, self.peer, self.group, self.name, self.device = layout, peer, group, name, device
        self.clock = WaitClock(device)
        self._posted: deque[tuple[list[dist.Work], Tensor]] = deque()
        self._to_post = 0

    def begin(self, micro_batches: int) -> None:
        """Start a step of that many micro-batches: post the first receive."""
        self._to_post = micro_batches
        self._post()

    def receive(self) -> tuple[Tensor, ...]:
        """The next micro-batch's tensors, slices of one fresh buffer; posts the receive after it."""
        self._post()
        works, buffer = self._posted.popleft()
        with self.clock.waiting():
            for work in works:
                try:
                    work.wait()
                except RuntimeError as error:
                    reason = str(error).splitlines()[0]
                    raise TransportError(f"{self.name}: lost rank {self.peer} ({reason})") from error
        return _slices(buffer)

    def finish(self) -> None:
        """The step is over. Raises TransportError if a micro-batch that was expected has not been taken."""
        if self._posted or self._to_post:
            left = len(self._posted) + self._to_post
            raise TransportError(f"{self.name}: {left} expected micro-batches were not used")

    def _post(self) -> None:
        if self._to_post == 0:
            return
        self._to_post -= 1
        buffer = torch.empty((self.layout.num_tensors, *self.layout.shape), dtype=self.layout.dtype, device=self.device)
        operations = [dist.P2POp(dist.irecv, tensor, self.peer, self.group) for tensor in _slices(buffer)]
        self._posted.append((dist.batch_isend_irecv(operations), buffer))


class WaitClock:
    """Adds up the time that computation has waited for messages.

    On CPU the process itself waits. On CUDA waiting is an entry in the stream's queue, so the stream is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is waiting."""
        if self._device.type == "cuda":
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            yield
            after.record()
            self._events.append((before, after))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """Seconds so far; on CUDA this waits for the stream."""
        for before, after in self._events:
            after.synchronize()
            self._seconds += before.elapsed_time(after) / 1000
        self._events.clear()
        return self._seconds


def _slices(buffer: Tensor) -> tuple[Tensor, ...]:
    """The tensors of a received buffer. Not ``unbind``: autograd forbids in-place work on views that it returns."""
    return tuple(buffer[index] for index in range(buffer.shape[0]))
