"""One pool of worker processes for all multi-process tests: importing torch and DeepSpeed costs seconds, once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_SECONDS = 120.0


class WorkerError(AssertionError):
    """A worker raised; the message is its traceback."""


class WorkerPool:
    """Processes that run functions as the ranks of a process group. They start when they are first needed."""

    def __init__(self) -> None:
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(*arguments)`` on ranks 0 to world_size - 1; returns what each returned.

        The function must be importable (module level). A fresh default process group (gloo) exists while it runs.
        """
        while len(self._workers) < world_size:
            self._workers.append(_start())
        port = free_port()
        group = self._workers[:world_size]
        for rank, (_, connection) in enumerate(group):
            connection.send((rank, world_size, port, function, arguments))
        results: list[Any] = [None] * world_size
        waiting = {connection: rank for rank, (_, connection) in enumerate(group)}
        while waiting:
            ready = wait(list(waiting), TIMEOUT_SECONDS)
            if not ready:
                silent = sorted(waiting.values())
                self.close()
                raise WorkerError(f"ranks {silent} did not answer within {TIMEOUT_SECONDS} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    ok, result = connection.recv()
                except EOFError:
                    ok, result = False, f"rank {rank} ended"
                if not ok:
                    self.close()  # the others may wait for it for ever
                    raise WorkerError(f"rank {rank}:\n{result}")
                results[rank] = result
        return results

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []


def _start() -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(connection: Connection) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    log = tempfile.TemporaryFile()  # noqa: SIM115 - DeepSpeed prints a great deal
    os.dup2(log.fileno(), 1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about calls that DeepSpeed makes
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            rank, world_size, port, function, arguments = connection.recv()
        except EOFError:
            return
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        try:
            result = (True, function(*arguments))
        except BaseException:
            result = (False, traceback.format_exc())
        connection.send(result)
        _leave_process_group()


def _leave_process_group() -> None:
    import gc

    import torch.distributed as dist
    from deepspeed.comm import comm as deepspeed_comm

    if dist.is_initialized():
        dist.destroy_process_group()
    deepspeed_comm.cdb = None
    gc.collect()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
