"""Step time and memory of the depth-buffer engine beside DeepSpeed's stock pipeline engine.

Both engines run the same layers with the same weights, cut and micro-batches. In every round rank 0 takes the step
alone with plain autograd (the single-stage time), then the stock engine takes it, then ours; their losses must agree.

The stock engine gets the form of the model that suits it best: every read of the depth buffer by itself. Reads that
share a pass over the sources tie all of a stage's tensors into one graph, and walking that once per tensor took the
first of two stages 1.6 times (block) and 1.9 times (full) the processor time.

    python benchmarks/pipeline_engine.py
    python benchmarks/pipeline_engine.py --rounds 9 --stages 2 --residual full
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

# Before torch is imported, here and in the workers: their notices would stand between the lines of the table.
os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "5"}
sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from model.config import ModelConfig
from model.depth_attention import depth_attention
from model.depth_buffer import DepthBuffer
from model.language_model import LanguageModel
from model.layers import Embedding, OutputHead
from model.loss import cross_entropy
from pipeline.config import Config, DataSection, OptimizerSection, ParallelSection, RunSection, TrainSection
from pipeline.module import DepthPipelineModule
from pipeline.plan import plan_stages
from pipeline.runtime import build_engine, deepspeed_settings, join_process_group
from tests import worker_pool

MICRO_BATCHES = 8
SEQUENCE = 128
SETTLING_STEPS = 1  # the first step allocates, and DeepSpeed's engine exchanges shapes in it
CORES = len(os.sched_getaffinity(0))
CASES = {"block": "8 blocks", "full": "32 sources"}


def main() -> int:
    arguments = parse_arguments()
    worker_pool.TIMEOUT_SECONDS = 900.0
    pool = worker_pool.WorkerPool()
    steps = table(
        "residual", "stages", "single", "stock", "ours", "faster", "CPU stock", "CPU ours", "bound", "reached"
    )
    stages = table(
        "residual", "stage", "tensors in", "forward", "backward", "wait", "peak stock", "peak ours", "of it weights"
    )
    remarks = []
    try:
        for count in arguments.stages:
            for residual in arguments.residual:
                config = make_config(residual, count)
                ranks = pool.run(count, measure, config, arguments.rounds)
                peaks = [pool.run(count, peak_memory, config, stock) for stock in (True, False)]
                steps.add_row(*step_row(residual, ranks))
                for row in stage_rows(residual, ranks, peaks):
                    stages.add_row(*row)
                remarks.append(account(residual, ranks))
    finally:
        pool.close()
    console = Console(width=120, highlight=False)
    console.print(f"{describe(config)}, {CORES} cores, {arguments.rounds} rounds")
    console.print(steps)
    console.print("Seconds per step, of the fastest round. faster: median over the rounds of stock / ours.")
    console.print("CPU: processor seconds of all ranks together; on a busy machine their ratio is the better measure.")
    console.print(f"bound: single x (m + p - 1) / (m p), or single / {CORES} where p ranks share {CORES} cores.\n")
    console.print(stages)
    console.print(
        "Seconds of one thread (forward, backward) and of waiting per step; MiB of tensors alive at the peak.\n"
    )
    for remark in remarks:
        console.print(remark)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Step time and memory of our engine beside DeepSpeed's stock PipelineEngine.",
        epilog="example: python benchmarks/pipeline_engine.py --rounds 9 --stages 2 --residual full",
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of single, stock, ours (default: 3)")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4], help="pipeline stages (default: 2 4)")
    parser.add_argument("--residual", nargs="+", choices=CASES, default=list(CASES), help="default: block full")
    return parser.parse_args()


def make_config(residual: Any, stages: int, micro_batches: int = MICRO_BATCHES) -> Config:
    return Config(
        run=RunSection(dir="unused", seed=7),
        model=ModelConfig(
            vocab_size=1024,
            residual=residual,
            layers_per_block=2,
            num_hidden_layers=16,
            hidden_size=256,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=704,
        ),
        data=DataSection(train="unused", sequence_length=SEQUENCE),
        train=TrainSection(steps=100, global_batch_size=micro_batches, micro_batch_size=1, precision="fp32"),
        optimizer=OptimizerSection(lr=1e-3, weight_decay=0.0, grad_clip=1.0),
        parallel=ParallelSection(pipeline=stages),
    )


# What the workers run.


class Batches:
    """Random tokens, the same for every rank and engine: micro-batches ``[1, sequence]`` without end."""

    def __init__(self, config: Config) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.vocab_size = config.model.vocab_size

    def __next__(self) -> tuple[Tensor, Tensor]:
        ids = torch.randint(self.vocab_size, (1, SEQUENCE + 1), generator=self.generator)
        return ids[:, :-1], ids[:, 1:]


class SingleStage:
    """The whole model on one rank by plain autograd: what a pipeline divides."""

    def __init__(self, config: Config) -> None:
        self.model = LanguageModel(config.model, config.run.seed)
        self.optimizer = make_optimizer(config, self.model)
        self.clip = config.optimizer.grad_clip

    def train_batch(self, batches: Batches) -> Tensor:
        total = torch.zeros(())
        for _ in range(MICRO_BATCHES):
            inputs, labels = next(batches)
            loss = cross_entropy(self.model(inputs), labels)
            (loss / MICRO_BATCHES).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / MICRO_BATCHES


def make_optimizer(config: Config, module: torch.nn.Module) -> torch.optim.Optimizer:
    betas = (config.optimizer.betas[0], config.optimizer.betas[1])
    return torch.optim.AdamW(module.parameters(), lr=config.optimizer.lr, betas=betas, weight_decay=0.0, fused=True)


class SeparateReads(DepthPipelineModule):
    """The same stage with every read of the depth buffer by itself; takes and returns tuples of tensors."""

    def forward(self, inputs: Any) -> Any:
        buffer = inputs if isinstance(inputs, Tensor) else DepthBuffer.from_tensors(inputs)
        for layer in self.forward_funcs:
            buffer = forward_alone(layer, buffer)
        return buffer.tensors() if isinstance(buffer, DepthBuffer) else buffer


def forward_alone(layer: Any, buffer: Any) -> Any:
    if isinstance(layer, Embedding):
        return layer(buffer)
    if isinstance(layer, OutputHead):
        return F.linear(layer.norm(read(layer.depth, buffer.tensors())), layer.weight)
    sources = buffer.tensors() if layer.is_block_start else buffer.sources
    partial = layer.attend(read(layer.attention_depth, buffer.tensors()))
    if not layer.is_block_start:
        partial = buffer.partial + partial
    transformed = layer.transform(read(layer.mlp_depth, (*sources, partial)))
    if layer.residual == "full":
        return DepthBuffer((*sources, partial), transformed)
    return DepthBuffer(sources, partial + transformed)


def read(depth: Any, tensors: tuple[Tensor, ...]) -> Tensor:
    return depth_attention(tensors, depth.query, depth.key_gain, depth.eps)


def stock_engine(config: Config) -> PipelineEngine:
    """DeepSpeed's engine with the same weights and the same cut as ours."""
    stages = config.parallel.pipeline
    module = SeparateReads(
        config.model,
        plan_stages(config.model, stages, SEQUENCE),
        config.run.seed,
        checkpoint_layers=False,
        topology=PipeDataParallelTopology(num_pp=stages, num_dp=1),
    )
    settings = deepspeed_settings(config)
    return PipelineEngine(
        args=None,
        model=module,
        optimizer=make_optimizer(config, module),
        mpu=module.mpu(),
        config=settings,
        config_class=DeepSpeedConfig(settings, module.mpu()),
    )


def measure(config: Config, rounds: int) -> dict[str, Any]:
    """This rank's seconds, losses and seconds per instruction, by kind of engine, for each round."""
    join_process_group(config)
    engines: dict[str, Any] = {"stock": stock_engine(config), "ours": build_engine(config)}
    ours = engines["ours"]
    if dist.get_rank() == 0:
        engines = {"single": SingleStage(config), **engines}
    batches = {name: Batches(config) for name in engines}
    clocks = {name: time_instructions(engine) for name, engine in engines.items() if name != "single"}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for _ in range(SETTLING_STEPS + rounds):
        for name in ("single", "stock", "ours"):
            dist.barrier()
            if name not in engines:
                continue
            clock = clocks.get(name, {})
            clock.clear()
            wall, processor, waited = time.perf_counter(), time.process_time(), ours.transport_wait_seconds
            loss = float(engines[name].train_batch(batches[name]))
            if name != "single":
                dist.barrier()
            found[name].append(
                {
                    "loss": loss,
                    "wall": time.perf_counter() - wall,
                    "processor": time.process_time() - processor,
                    "wait": ours.transport_wait_seconds - waited,
                    **clock,
                }
            )
    first_losses = [steps[0]["loss"] for steps in found.values()]
    last_losses = [steps[-1]["loss"] for steps in found.values()]
    if max(first_losses) - min(first_losses) > 1e-5 or max(last_losses) - min(last_losses) > 1e-3:
        raise AssertionError(f"the engines do not train alike: {first_losses}, {last_losses}")
    steps = {name: steps[SETTLING_STEPS:] for name, steps in found.items()}
    return {"steps": steps, "tensors_in": ours.plan.hop_tensors[ours.stage_id - 1] if ours.stage_id else 0}


def time_instructions(engine: Any) -> dict[str, float]:
    """Have `engine` add up, per instruction of its schedule, wall seconds and (``cpu ...``) this thread's seconds.

    What our engine waits for inside a computation is taken out of the wall seconds; the stock engine waits in
    instructions of their own.
    """
    clock: dict[str, float] = defaultdict(float)

    def timed(name: str, execute: Any) -> Any:
        def run(self: Any, **arguments: Any) -> None:
            waited = getattr(self, "transport_wait_seconds", 0.0)
            wall, thread = time.perf_counter(), time.thread_time()
            execute(self, **arguments)
            clock[f"cpu {name}"] += time.thread_time() - thread
            clock[name] += time.perf_counter() - wall
            clock[name] -= getattr(self, "transport_wait_seconds", 0.0) - waited

        return run

    engine._INSTRUCTION_MAP = {kind: timed(kind.__name__, run) for kind, run in engine._INSTRUCTION_MAP.items()}
    return clock


def peak_memory(config: Config, stock: bool) -> tuple[float, float]:
    """MiB of this rank's tensors at the peak of two steps, counted at the allocator; weights' and optimizer's share."""
    config = make_config(config.model.residual, config.parallel.pipeline, micro_batches=config.parallel.pipeline + 1)
    join_process_group(config)
    os.dup2(1, 2)  # the profiler's notices go where DeepSpeed's go
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine: Any = stock_engine(config) if stock else build_engine(config)
        batches = Batches(config)
        for _ in range(2):
            engine.train_batch(batches)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    weights = 4 * sum(parameter.nbytes for parameter in engine.module.parameters())
    return peak / 2**20, weights / 2**20


# What is made of their answers.


def describe(config: Config) -> str:
    model = config.model
    return (
        f"{model.num_hidden_layers} layers, hidden {model.hidden_size}, sequence {SEQUENCE}, "
        f"{MICRO_BATCHES} micro-batches of 1, fp32, one thread per rank"
    )


def table(*columns: str) -> Table:
    made = Table(box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="left" if column == "residual" else "right")
    return made


def fastest(ranks: list[dict[str, Any]], engine: str) -> list[dict[str, float]]:
    """Each rank's seconds in the round in which this engine was fastest: the least disturbed by other processes."""
    walls = [step["wall"] for step in ranks[0]["steps"][engine]]
    return [rank["steps"][engine][walls.index(min(walls))] for rank in ranks if engine in rank["steps"]]


def bound(single: float, stages: int) -> float:
    """The 1F1B ideal, unless the ranks have to share cores: then the work over the cores, if that is longer."""
    ideal = single * (MICRO_BATCHES + stages - 1) / (MICRO_BATCHES * stages)
    return max(ideal, single / CORES)


def step_row(residual: str, ranks: list[dict[str, Any]]) -> list[str]:
    count = len(ranks)
    steps = [fastest(ranks, engine) for engine in ("single", "stock", "ours")]
    single, stock, ours = (by_rank[0]["wall"] for by_rank in steps)
    pairs = zip(ranks[0]["steps"]["stock"], ranks[0]["steps"]["ours"], strict=True)
    faster = statistics.median(before["wall"] / after["wall"] for before, after in pairs)
    cpu = [sum(step["processor"] for step in by_rank) for by_rank in steps[1:]]
    ideal = bound(single, count)
    shared = f" on {CORES} cores" if count > CORES else ""
    return [
        f"{residual} ({CASES[residual]})",
        f"{count}{shared}",
        f"{single:.2f}",
        f"{stock:.2f}",
        f"{ours:.2f}",
        f"{faster:.2f}x",
        *(f"{seconds:.2f}" for seconds in cpu),
        f"{ideal:.2f}",
        f"{ideal / ours:.0%}",
    ]


def stage_rows(residual: str, ranks: list[dict[str, Any]], peaks: list[list[tuple[float, float]]]) -> list[list[str]]:
    rows = []
    for stage, (stock, ours) in enumerate(zip(*peaks, strict=True)):
        step = fastest(ranks, "ours")[stage]
        seconds = [f"{step[key]:.2f}" for key in ("cpu ForwardPass", "cpu BackwardPass", "wait")]
        memory = [f"{stock[0]:.0f}", f"{ours[0]:.0f}", f"{ours[1]:.0f}"]
        name = f"{stage + 1} of {len(ranks)}"
        rows.append([residual, name, str(ranks[stage]["tensors_in"] or "ids"), *seconds, *memory])
    return rows


def account(residual: str, ranks: list[dict[str, Any]]) -> str:
    """Where our step's time over the bound goes."""
    count = len(ranks)
    steps = fastest(ranks, "ours")
    ours, single = steps[0]["wall"], fastest(ranks, "single")[0]["wall"]
    name = f"{residual}, {count} stages, {ours:.2f} s"
    if count > CORES:
        busy = sum(step["processor"] for step in steps) / (ours * CORES)
        return f"{name}: {busy:.0%} of {CORES} cores' time went into it."
    stages = [(step["ForwardPass"] + step["BackwardPass"]) / MICRO_BATCHES for step in steps]
    # 1F1B passes one micro-batch through all the stages, and the slowest stage then does the others.
    computing = sum(stages) + (MICRO_BATCHES - 1) * max(stages)
    balanced = sum(stages) * (MICRO_BATCHES + count - 1) / count
    update = max(step["cpu OptimizerStep"] for step in steps)
    parts = {
        "bound": bound(single, count),
        "computing slower side by side than alone": balanced - bound(single, count),
        "imbalance of stages": computing - balanced,
        "optimizer": update,
        "transport and the rest": ours - computing - update,
    }
    return f"{name} = " + " + ".join(f"{seconds:.2f} {part}" for part, seconds in parts.items())


if __name__ == "__main__":
    sys.exit(main())
