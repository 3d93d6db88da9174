"""What crosses a hop: the tensors of a depth buffer forward, their gradients backward.

Both sides of a hop know from the stage plan how many tensors cross it and their shape, so nothing but the tensors' own
bytes travels. One batched group of messages per micro-batch and direction; a receive is posted one micro-batch ahead
into the memory where the stage will use it; a send is left running while the stage computes on.
"""

from __future__ import annotations

import math
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
        num_tensors: finished sources and the running partial that are alive at the cut; 1 for document numbers.
        shape: ``(micro_batch, sequence, hidden)`` of each; ``(micro_batch, sequence)`` of document numbers.
        dtype: the training dtype; int32 of document numbers.
    """

    num_tensors: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of one micro-batch in one direction."""
        return self.num_tensors * math.prod(self.shape) * self.dtype.itemsize

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
        name: what is sent where, for errors.
        limit: micro-batches under way at most; their memory is held. Where no stage runs further ahead of the next one
            than this, sending never waits.
    """

    def __init__(self, layout: HopLayout, peer: int, group: dist.ProcessGroup, name: str, limit: int) -> None:
        self.layout, self.peer, self.group, self.name, self.limit = layout, peer, group, name, limit
        self.bytes_sent = 0
        self._sent = self._expected = 0
        self._under_way: deque[tuple[int, list[dist.Work], tuple[Tensor, ...]]] = deque()

    def begin(self, micro_batches: int) -> None:
        """Start a step of that many micro-batches."""
        self._sent, self._expected = 0, micro_batches

    def send(self, tensors: Sequence[Tensor | None]) -> None:
        """Start sending; the tensors must not change until they have arrived."""
        self.layout.check(tensors, f"{self.name}, micro-batch {self._sent}")
        payload = tuple(tensor.detach().contiguous() for tensor in tensors if tensor is not None)
        operations = [dist.P2POp(dist.isend, tensor, self.peer, self.group) for tensor in payload]
        with _naming_the_lost(self.name, self.peer):
            works = dist.batch_isend_irecv(operations)
        self._under_way.append((self._sent, works, payload))
        self.bytes_sent += sum(tensor.nbytes for tensor in payload)
        self._sent += 1
        # gloo says that a message is complete only when it is waited for.
        while len(self._under_way) > self.limit:
            self._wait_oldest()

    def arrived(self, micro_batch: int) -> None:
        """The peer has answered this micro-batch: let go of the memory of it and of those before."""
        while self._under_way and self._under_way[0][0] <= micro_batch:
            self._wait_oldest()

    def finish(self) -> None:
        """Wait until every micro-batch has been handed over. Raises TransportError if one was never sent."""
        while self._under_way:
            self._wait_oldest()
        if self._sent != self._expected:
            raise TransportError(f"{self.name}: {self._sent} of {self._expected} micro-batches were sent")

    def _wait_oldest(self) -> None:
        with _naming_the_lost(self.name, self.peer):
            for work in self._under_way.popleft()[1]:
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
        self._posts = self._expected = 0

    def begin(self, micro_batches: int) -> None:
        """Start a step of that many micro-batches."""
        self._posts, self._expected = 0, micro_batches

    def post_first(self) -> None:
        """Post the first receive of the step, if none is.

        Not before everything that it depends on has been launched: on CUDA a receive occupies the device until its
        message comes, and whatever waits for the whole device would wait for it.
        """
        if self._posts == 0:
            self._post()

    def receive(self) -> tuple[Tensor, ...]:
        """The next micro-batch's tensors, slices of one fresh buffer; posts the receive after it."""
        self.post_first()
        if self._posts < self._expected:
            self._post()
        works, buffer = self._posted.popleft()
        with self.clock.waiting(), _naming_the_lost(self.name, self.peer):
            for work in works:
                work.wait()
        return _slices(buffer)

    def finish(self) -> None:
        """The step is over. Raises TransportError if a micro-batch that was expected has not been taken."""
        left = len(self._posted) + self._expected - self._posts
        if left:
            raise TransportError(f"{self.name}: {left} expected micro-batches were not used")

    def _post(self) -> None:
        self._posts += 1
        buffer = torch.empty((self.layout.num_tensors, *self.layout.shape), dtype=self.layout.dtype, device=self.device)
        operations = [dist.P2POp(dist.irecv, tensor, self.peer, self.group) for tensor in _slices(buffer)]
        with _naming_the_lost(self.name, self.peer):
            self._posted.append((dist.batch_isend_irecv(operations), buffer))


@contextmanager
def _naming_the_lost(name: str, peer: int) -> Iterator[None]:
    """Turn what the network says into an error that names the rank."""
    try:
        yield
    except RuntimeError as error:
        raise TransportError(f"{name}: lost rank {peer} ({str(error).splitlines()[0]})") from error


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
