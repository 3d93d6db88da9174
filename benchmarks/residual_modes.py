"""A training step with `residual: standard`, `block` and `full`: what depth attention costs a whole model.

The model is 16 layers, hidden 512; `block` has 8 blocks. Beside them `block` with the straightforward reads that the
paper's pseudo-code suggests (stack, normalise, einsum: one read per sublayer, autograd's backward). Every round takes
one step of each, one after the other; the table shows medians over rounds and of the ratios within a round. On one CPU
thread the clock is the thread's own CPU time. Peak memory is that of a fresh process which takes two steps.

    python benchmarks/residual_modes.py
    python benchmarks/residual_modes.py --threads 2 --batch 4 --rounds 9
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler's notices would stand between the lines of the table
sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model.config import ModelConfig
from model.depth_attention import reference
from model.language_model import LanguageModel
from model.layers import forward_layers
from model.loss import cross_entropy
from model.sublayers import DepthAttention

SEQUENCE = 512
# mode: residual, form of the forward pass
MODES = {
    "standard": ("standard", "plain"),
    "block": ("block", "plain"),
    "full": ("full", "plain"),
    "block, straightforward": ("block", "straightforward"),
    "standard, checkpointed": ("standard", "checkpointed"),
    "block, checkpointed": ("block", "checkpointed"),
}
READS = ("_ReadFinished", "_ReadFinishedBackward", "_MergePartial", "_MergePartialBackward", "aten::linalg_vector_norm")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    steps = {mode: make_step(mode, arguments.batch) for mode in MODES}
    for step in steps.values():
        step()
    seconds = defaultdict(list)
    for _ in range(arguments.rounds):
        for mode, step in steps.items():
            begin = clock()
            step()
            seconds[mode].append(clock() - begin)

    # For the processes that measure memory: what they free goes back, so that the peak is what was in use at once.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    table = Table(title="one training step, no optimizer", title_justify="left")
    for column in ("residual", "seconds", "tokens/s", "vs standard", "in reads", "peak MiB"):
        table.add_column(column, justify="left" if column == "residual" else "right")
    for mode, step in steps.items():
        base = seconds["standard, checkpointed" if "checkpointed" in mode else "standard"]
        ratio = statistics.median(a / b for a, b in zip(seconds[mode], base, strict=True))
        median = statistics.median(seconds[mode])
        peak = (
            multiprocessing.get_context("spawn").Pool(1).apply(peak_memory, (mode, arguments.batch, arguments.threads))
        )
        row = (f"{median:.2f}", f"{arguments.batch * SEQUENCE / median:.0f}", f"{ratio:.3f}", share_of_reads(step))
        table.add_row(mode, *row, f"{peak / 2**20:.0f}")
    console = Console(width=100)
    console.print(
        f"16 layers, hidden 512, sequence {SEQUENCE}, batch {arguments.batch}, {arguments.threads} thread(s), "
        f"medians of {arguments.rounds} rounds"
    )
    console.print(table)
    console.print("checkpointed rows stand against standard, checkpointed; `in reads` is a profiled step's share")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def make_step(mode: str, batch: int) -> Callable[[], None]:
    residual, form = MODES[mode]
    model = LanguageModel(ModelConfig(8192, residual, 2, 16, 512, 8, 4, 1408), seed=1)
    tokens = torch.randint(8192, (batch, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))
    forward: Callable[[Tensor], Tensor] = model
    if form == "checkpointed":
        forward = partial(forward_layers, list(model.layers), checkpoint=True)
    if form == "straightforward":
        forward = partial(forward_straightforward, model)

    def step() -> None:
        model.zero_grad()
        cross_entropy(forward(tokens[:, :-1]), tokens[:, 1:]).backward()

    return step


def forward_straightforward(model: LanguageModel, ids: Tensor) -> Tensor:
    """The paper's figure 2, with its operator as written."""
    embedding, *layers, head = model.layers
    blocks, partial = [], embedding(ids).partial
    for layer in layers:
        hidden = read([*blocks, partial], layer.attention_depth)
        if layer.is_block_start:
            blocks, partial = [*blocks, partial], layer.attend(hidden)
        else:
            partial = partial + layer.attend(hidden)
        partial = partial + layer.transform(read([*blocks, partial], layer.mlp_depth))
    return torch.nn.functional.linear(head.norm(read([*blocks, partial], head.depth)), head.weight)


def read(sources: list[Tensor], depth: DepthAttention) -> Tensor:
    return reference(sources, depth.query, depth.key_gain, depth.eps)


def share_of_reads(step: Callable[[], None]) -> str:
    with torch.profiler.profile() as profile:
        step()
    events = profile.key_averages()
    reads = sum(event.cpu_time_total for event in events if event.key in READS)
    return f"{reads / sum(event.self_cpu_time_total for event in events):.1%}"


def peak_memory(mode: str, batch: int, threads: int) -> int:
    """Growth of this process's highest resident size over a training step, in bytes."""
    torch.set_num_threads(threads)
    step = make_step(mode, batch)
    Path("/proc/self/clear_refs").write_text("5")
    before = highest_resident_size()
    step()
    step()
    return highest_resident_size() - before


def highest_resident_size() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


if __name__ == "__main__":
    main()
