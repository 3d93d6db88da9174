"""Step time over a slow link: the overlapped transport beside a blocking one, and the least that the link allows.

Two stages run in two network namespaces of this machine, joined by a veth pair whose rate ``tc tbf`` limits in both
directions. The blocking transport sends the same messages in DeepSpeed's own 1F1B order: it waits for every send at
once and posts a receive only when it is needed. Needs root and iproute2; without them it says so and does nothing.

    python benchmarks/slow_link.py
    python benchmarks/slow_link.py --rounds 9 --residual full --rates 100 200
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

import torch.distributed as dist
from deepspeed.runtime.pipe import schedule as instructions
from pipeline_engine import Batches, describe, make_config, table
from rich.console import Console
from torch import Tensor

from pipeline.depth_buffer import Receiver, Sender, _slices
from pipeline.runtime import build_engine, join_process_group
from tests import worker_pool

HOSTS = ("depthpipe-bench-a", "depthpipe-bench-b")
LINKS = ("dpbench-a", "dpbench-b")
ADDRESSES = ("10.203.7.1", "10.203.7.2")
UNLIMITED = 0


def main() -> int:
    arguments = parse_arguments()
    if not may_make_namespaces():
        print("slow_link: needs ip, tc and the right to make network namespaces (root); nothing was measured")
        return 0
    worker_pool.TIMEOUT_SECONDS = 900.0
    results = table(
        "residual", "link", "MiB per step", "blocking", "overlapped", "faster", "compute", "bytes", "bound", "reached"
    )
    pool = worker_pool.WorkerPool()
    try:
        with two_hosts():
            for residual in arguments.residual:
                config = make_config(residual, stages=2)
                measured, *_ = pool.run(2, measure, config, [UNLIMITED, *arguments.rates], arguments.rounds)
                for row in rows(residual, measured):
                    results.add_row(*row)
    finally:
        pool.close()
    console = Console(width=120, highlight=False)
    console.print(f"2 stages, {describe(config)}; {arguments.rounds} rounds")
    console.print(results)
    console.print("Seconds per step, of the fastest round; MiB in each direction.")
    console.print("faster: median over the rounds of blocking / overlapped.")
    console.print(
        "compute: overlapped without a limit. bytes: those of one direction over the rate. bound: the larger."
    )
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Step time of overlapped and blocking transport over links of limited rate (needs root).",
        epilog="example: python benchmarks/slow_link.py --rounds 9 --residual full --rates 100 200",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of blocking, overlapped (default: 5)")
    parser.add_argument("--residual", nargs="+", choices=("block", "full"), default=["block", "full"])
    parser.add_argument("--rates", type=int, nargs="+", default=[1000, 200], help="Mbit/s (default: 1000 200)")
    return parser.parse_args()


def may_make_namespaces() -> bool:
    """Whether the tools and the privileges are there; root in a container often lacks the latter."""
    if not shutil.which("ip") or not shutil.which("tc"):
        return False
    remove_hosts()  # a run that was killed may have left them
    made = subprocess.run(["ip", "netns", "add", HOSTS[0]], capture_output=True).returncode == 0
    remove_hosts()
    return made


def remove_hosts() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], capture_output=True)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two network namespaces joined by a veth pair, gone again in the end."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", LINKS[0], "netns", HOSTS[0], "type", "veth", "peer", "name", LINKS[1], "netns", HOSTS[1])
        for host, link, address in zip(HOSTS, LINKS, ADDRESSES, strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", host, "link", "set", link, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield
    finally:
        remove_hosts()


# What the workers run.


def measure(config: Any, rates: list[int], rounds: int) -> dict[int, dict[str, list[float]]]:
    """Seconds of every step by rate (Mbit/s) and transport, and the bytes that rank 0 sent per step."""
    rank = int(os.environ["RANK"])
    enter_host(rank)
    join_process_group(config)
    overlapped, blocking = (build_engine(config) for _ in range(2))
    make_blocking(blocking)
    engines = {"blocking": blocking, "overlapped": overlapped}
    batches = {name: Batches(config) for name in engines}
    losses = {name: float(engine.train_batch(batches[name])) for name, engine in engines.items()}
    found: dict[int, dict[str, list[float]]] = {rate: defaultdict(list) for rate in rates}
    for _ in range(rounds):
        for rate in rates:
            limit_rate(LINKS[rank], rate)
            for name, engine in engines.items():
                dist.barrier()
                start, sent = time.perf_counter(), engine.transport_bytes_sent
                losses[name] = float(engine.train_batch(batches[name]))
                found[rate][name].append(time.perf_counter() - start)
            found[rate]["bytes"].append(engine.transport_bytes_sent - sent)
    if len(set(losses.values())) != 1:
        raise AssertionError(f"the transports do not train alike: {losses}")
    return found


def enter_host(rank: int) -> None:
    """Move this thread, and those that it will start, into its network namespace."""
    namespace = os.open(f"/run/netns/{HOSTS[rank]}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0) != 0:
        raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {HOSTS[rank]}")
    os.close(namespace)
    os.environ |= {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": LINKS[rank]}


def limit_rate(link: str, rate: int) -> None:
    """Limit what leaves `link` to `rate` Mbit/s. The queue holds what a TCP window has under way, so nothing drops."""
    queue = f"tbf rate {rate}mbit burst 128kb limit 16mb" if rate != UNLIMITED else "pfifo"
    subprocess.run(["tc", *f"qdisc replace dev {link} root {queue}".split()], check=True)


class BlockingSender(Sender):
    """Waits for every send at once."""

    def send(self, tensors: Any) -> None:
        super().send(tensors)
        while self._under_way:
            self._wait_oldest()


class BlockingReceiver(Receiver):
    """Posts a receive when it is needed, and waits for it."""

    def begin(self, micro_batches: int) -> None:
        self._arrived: deque[tuple[Tensor, ...]] = deque()
        super().begin(micro_batches)

    def _post(self) -> None:
        """Nothing is posted ahead."""

    def take(self) -> None:
        super()._post()
        works, buffer = self._posted.popleft()
        for work in works:
            work.wait()
        self._arrived.append(_slices(buffer))

    def receive(self) -> tuple[Tensor, ...]:
        return self._arrived.popleft()


class BlockingSchedule(instructions.TrainSchedule):
    """DeepSpeed's 1F1B, whose sends and receives pair up; `buffer_id` counts micro-batches, as our engine wants."""

    def num_pipe_buffers(self) -> int:
        return int(self.micro_batches)


def make_blocking(engine: Any) -> None:
    """Give an engine, in place of its own, blocking links and DeepSpeed's order of messages."""
    for link in engine._links((Sender, Receiver)):
        link.__class__ = BlockingSender if isinstance(link, Sender) else BlockingReceiver
    engine._train_schedule = lambda: BlockingSchedule(engine.micro_batches, engine.num_stages, engine.stage_id)
    engine._INSTRUCTION_MAP = {
        **engine._INSTRUCTION_MAP,
        instructions.RecvActivation: lambda self, buffer_id: self._stages[0].activations_in.take(),
        instructions.RecvGrad: lambda self, buffer_id: self._stages[0].gradients_in.take(),
    }


# What is made of their answers.


def rows(residual: str, measured: dict[int, dict[str, list[float]]]) -> Iterator[list[str]]:
    compute = min(measured[UNLIMITED]["overlapped"])
    for rate, found in measured.items():
        blocking, overlapped = (min(found[name]) for name in ("blocking", "overlapped"))
        faster = statistics.median(a / b for a, b in zip(found["blocking"], found["overlapped"], strict=True))
        sent = found["bytes"][0]
        transfer = 8 * sent / (rate * 1e6) if rate else 0.0
        bound = max(compute, transfer)
        yield [
            residual,
            f"{rate} Mbit/s" if rate else "unlimited",
            f"{sent / 2**20:.1f}",
            f"{blocking:.2f}",
            f"{overlapped:.2f}",
            f"{faster:.2f}x",
            f"{compute:.2f}",
            f"{transfer:.2f}",
            f"{bound:.2f}",
            f"{bound / overlapped:.0%}",
        ]


if __name__ == "__main__":
    sys.exit(main())
