"""One read over depth, forward and backward: ours beside the straightforward form, and what each choice in ours costs.

Every round times all rows one after the other, so that what disturbs the machine disturbs them alike; the table shows
medians. On one CPU thread, as a pipeline's rank has it, the clock is that thread's own CPU time, so that a busy machine
measures nearly as well as an idle one; else it is the wall's. The limit is the bytes that must move (sources and result
once each way, gradients once) over the measured bandwidth of a copy.

    python benchmarks/depth_attention.py
    python benchmarks/depth_attention.py --threads 2 --tokens 2048 --hidden 512

On CPU most of the straightforward form's time, and half of ours, goes into fresh pages from the kernel. The same table
where freed memory is kept and pages are large, which is what a long run can choose:

    THP_MEM_ALLOC_ENABLE=1 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_MMAP_THRESHOLD_=8589934592 \\
        python benchmarks/depth_attention.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model.depth_attention import depth_attention, inverse_rms, read_finished, reference

EPS = 1e-5
READERS = 4  # two layers in a block


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    shape = (arguments.tokens, arguments.hidden)
    sources = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(arguments.sources)]
    queries = [
        (0.1 * torch.randn(arguments.hidden, device=device, dtype=dtype)).requires_grad_() for _ in range(READERS)
    ]
    gain = torch.ones(arguments.hidden, device=device, dtype=dtype, requires_grad=True)
    bandwidth = copy_bandwidth(sources[0])
    tensor_bytes = sources[0].nbytes
    n = len(sources)

    single = {
        "straightforward": lambda: [reference(sources, queries[0], gain, EPS)],
        "depth_attention": lambda: [depth_attention(sources, queries[0], gain, EPS)],
    }
    shared = {
        "straightforward, each": lambda: [reference(sources, query, gain, EPS) for query in queries],
        "depth_attention, each": lambda: [depth_attention(sources, query, gain, EPS) for query in queries],
        "read_finished, one pass": lambda: read_together(sources, queries, gain),
    }
    console = Console(width=100)
    console.print(
        f"{n} sources, {arguments.tokens} tokens, hidden {arguments.hidden}, {arguments.dtype}, {device.type}, "
        f"{arguments.threads} thread(s); copies move {bandwidth / 1e9:.0f} GB/s; medians of {arguments.rounds} rounds"
    )
    for title, rows, readers in ((("one read"), single, 1), (f"{READERS} reads of the same sources", shared, READERS)):
        # Forward reads the sources and writes results; backward reads sources and results' gradients, writes gradients.
        limit = (3 * n + 2 * readers) * tensor_bytes / bandwidth
        leaves = [*sources, *queries[:readers], gain]
        console.print(make_table(title, time_rows(rows, leaves, arguments.rounds), limit))
    console.print(logits_table(sources[0], arguments.rounds))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def read_together(sources: Sequence[Tensor], queries: Sequence[Tensor], gain: Tensor) -> list[Tensor]:
    statistics = [inverse_rms(source, EPS) for source in sources]
    reads, _ = read_finished(sources, statistics, [query.float() * gain.float() for query in queries])
    return [mean.to(sources[0].dtype) for mean, _ in reads]


def time_rows(
    rows: dict[str, Callable[[], list[Tensor]]], leaves: list[Tensor], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of forward and of backward, per row and round; a first round is not counted."""
    seconds = defaultdict(list)
    upstream = torch.randn_like(leaves[0])
    for _ in range(rounds + 1):
        for name, forward in rows.items():
            begin = clock()
            results = forward()
            middle = clock()
            torch.autograd.grad(results, leaves, [upstream] * len(results))
            seconds[name].append((middle - begin, clock() - middle))
            del results
    return {name: values[1:] for name, values in seconds.items()}


def make_table(title: str, seconds: dict[str, list[tuple[float, float]]], limit: float) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("", "forward ms", "backward ms", "sum ms", "faster", "limit ms", "reached"):
        table.add_column(column, justify="right" if column else "left")
    slowest = [sum(pair) for pair in next(iter(seconds.values()))]
    for name, pairs in seconds.items():
        totals = [sum(pair) for pair in pairs]
        faster = statistics.median(slow / total for slow, total in zip(slowest, totals, strict=True))
        forward, backward = (statistics.median(column) for column in zip(*pairs, strict=True))
        total = statistics.median(totals)
        milliseconds = [f"{1e3 * value:.1f}" for value in (forward, backward, total)]
        table.add_row(name, *milliseconds, f"{faster:.1f}", f"{1e3 * limit:.1f}", f"{limit / total:.0%}")
    return table


def logits_table(source: Tensor, rounds: int) -> Table:
    """Why each reader has its own matrix-vector product: whether a reader's bits depend on the others, and the time."""
    forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "a product per reader": lambda rows, keys: torch.stack([rows @ key for key in keys.T.contiguous()], 1),
        "one matrix product": lambda rows, keys: rows @ keys,
    }
    rows = source.detach().float()[: max(1, (1 << 18) // source.shape[1])]
    all_keys = torch.randn(source.shape[1], 24, device=source.device)  # 12 layers in a block
    table = Table(title="logits of the readers of one block, one chunk in cache", title_justify="left")
    for column in ("", "4 readers, us", "24 readers, us", "same bits for the first 4"):
        table.add_column(column, justify="right" if column else "left")
    for name, form in forms.items():
        medians = []
        for count in (4, 24):
            keys, seconds = all_keys[:, :count].contiguous(), []
            for _ in range(20 * rounds):
                begin = clock()
                form(rows, keys)
                seconds.append(clock() - begin)
            medians.append(f"{1e6 * statistics.median(seconds):.0f}")
        same = torch.equal(form(rows, all_keys)[:, :4], form(rows, all_keys[:, :4].contiguous()))
        table.add_row(name, *medians, "yes" if same else "no")
    return table


def copy_bandwidth(like: Tensor) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.ones(1 << 26, device=like.device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        begin = clock()
        target.copy_(source)
        seconds.append(clock() - begin)
    return 2 * source.nbytes / min(seconds)


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


if __name__ == "__main__":
    main()
