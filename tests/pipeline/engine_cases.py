"""What the workers of the engine tests run: one rank's part of a few training steps, on tokens made from a seed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data_prep.errors import DepthpipeError
from data_prep.stream import BatchLoader, DatasetSource, SequenceStream
from model.config import ModelConfig
from model.language_model import LanguageModel
from model.layers import build_layer, forward_layers
from model.loss import cross_entropy
from pipeline.agreement import check_same_data
from pipeline.checkpoints import agree_on_checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from pipeline.config import Config, DataSection, OptimizerSection, ParallelSection, RunSection, TrainSection
from pipeline.meter import Meter
from pipeline.runtime import join_process_group, run_identity

MODEL = ModelConfig(
    vocab_size=96,
    residual="block",
    layers_per_block=3,
    num_hidden_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)
MICRO_BATCH, SEQUENCE = 2, 16


def make_config(model: ModelConfig = MODEL, *, pipeline: int = 1, micro_batches: int = 6, **changes: Any) -> Config:
    """A configuration without files; `changes` name fields of its sections."""
    config = Config(
        run=RunSection(dir="unused", seed=7),
        model=model,
        data=DataSection(train="unused", sequence_length=SEQUENCE),
        train=TrainSection(
            steps=50,
            global_batch_size=micro_batches * MICRO_BATCH * changes.get("data", 1),
            micro_batch_size=MICRO_BATCH,
            precision="fp32",
        ),
        optimizer=OptimizerSection(lr=1e-2, grad_clip=0.5),
        parallel=ParallelSection(pipeline=pipeline),
    )
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        for name in ("data", "train", "optimizer", "parallel"):
            if not (name == "data" and key == "data") and key in {
                field.name for field in dataclasses.fields(getattr(config, name))
            }:
                sections.setdefault(name, {})[key] = value
    replaced = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **replaced)


class Batches:
    """Micro-batches of arithmetic progressions (so there is something to learn), the same for everyone."""

    def __init__(self, config: Config, data_rank: int = 0, seed: int = 1) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._config, self._rank = config, data_rank
        self._queue: list[tuple[Tensor, ...]] = []

    def __next__(self) -> tuple[Tensor, ...]:
        if not self._queue:
            batch = self._config.train.global_batch_size
            start = torch.randint(96, (batch, 1), generator=self._generator)
            ids = (start + 5 * torch.arange(SEQUENCE + 1)) % 96
            mine = ids.chunk(self._config.parallel.data)[self._rank]
            documents = (torch.arange(SEQUENCE) >= SEQUENCE // 3).int()
            extra = (documents.expand(MICRO_BATCH, -1),) if self._config.data.document_attention else ()
            self._queue = [(part[:, :-1], part[:, 1:], *extra) for part in mine.split(MICRO_BATCH)]
        return self._queue.pop(0)


def start(config: Config) -> Any:
    """An engine whose depth queries are not zero: zero queries hide faults of the read."""
    import pipeline.module
    from pipeline.runtime import start_engine

    def build_with_queries(model: ModelConfig, index: int, seed: int) -> torch.nn.Module:
        layer = build_layer(model, index, seed)
        set_queries(layer, index)
        return layer

    pipeline.module.build_layer = build_with_queries  # before the optimizer copies the weights
    return start_engine(config)


def set_queries(layer: torch.nn.Module, index: int) -> None:
    """Draw the depth queries of pipeline layer `index`, wherever it is."""
    generator = torch.Generator()
    for name, parameter in layer.named_parameters():
        if name.endswith("query"):
            generator.manual_seed(index * 2 + ("mlp" in name))
            parameter.data.normal_(generator=generator)


def gradients_of_plain_model(config: Config) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the same step by plain autograd on the whole model, without pipeline or DeepSpeed."""
    model = LanguageModel(config.model, config.run.seed)
    for index, layer in enumerate(model.layers):
        set_queries(layer, index)
    batches = Batches(config)
    total = torch.zeros(())
    for _ in range(config.micro_batches):
        inputs, labels, *documents = next(batches)
        logits = forward_layers(list(model.layers), inputs, documents=documents[0] if documents else None)
        loss = cross_entropy(logits, labels)
        (loss / config.micro_batches).backward()
        total += loss.detach()
    gradients = {name: parameter.grad for name, parameter in model.layers.named_parameters()}
    return float(total / config.micro_batches), gradients


def gradients_before_step(config: Config) -> tuple[float, dict[str, Tensor], int]:
    """Loss and gradients of one step, by name (``{layer}.{parameter}``), before the optimizer sees them; bytes sent."""
    engine = start(config)
    found: dict[str, Tensor] = {}

    def keep_gradients(*_: Any) -> None:
        found.update({name: parameter.grad.clone() for name, parameter in engine.module.named_parameters()})

    engine._take_model_step = keep_gradients
    loss = engine.train_batch(Batches(config))
    return float(loss), found, engine.transport_bytes_sent


def validation_losses(config: Config) -> list[float]:
    """Validation loss before, between and after two training steps, and the training losses."""
    engine = start(config)
    training, found = Batches(config), []
    for _ in range(2):
        found += [float(engine.eval_batch(Batches(config, seed=9))), float(engine.train_batch(training))]
    return [*found, float(engine.eval_batch(Batches(config, seed=9)))]


def losses_around_checkpoint(config: Config, run_dir: Path, resume: bool) -> list[float]:
    """Losses of steps three and four: after a checkpoint was written, or by an engine that resumes from it."""
    engine = start(config)
    batches = Batches(config, engine.grid.get_data_parallel_id())
    identity = run_identity(config)
    if resume:
        checkpoint = latest_checkpoint(run_dir)
        assert checkpoint is not None and checkpoint.position == {"samples": 2}
        load_checkpoint(engine, checkpoint, identity)
        for _ in range(2 * config.micro_batches):
            next(batches)
    else:
        for _ in range(2):
            engine.train_batch(batches)
        save_checkpoint(engine, run_dir, 2, {"samples": 2}, identity, keep=1)
    return [float(engine.train_batch(batches)) for _ in range(2)]


def resume_error(config: Config, run_dir: Path) -> str:
    """What a rank says that resumes from the latest checkpoint."""
    engine = start(config)
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    try:
        load_checkpoint(engine, checkpoint, run_identity(config))
    except DepthpipeError as error:
        return str(error)
    return "nothing"


def disagreement(config: Config, paths: list[Path], check: Literal["run directory", "dataset"]) -> str:
    """What a rank says when the ranks compare run directories or datasets, each with its own of `paths`."""
    join_process_group(config)
    mine = paths[torch.distributed.get_rank()]
    try:
        if check == "run directory":
            agree_on_checkpoint(mine)
        else:
            check_same_data(SequenceStream([DatasetSource(str(mine))], SEQUENCE, seed=7))
    except DepthpipeError as error:
        return str(error)
    return "nothing"


def with_fault(config: Config, fault: str) -> str:
    """One step in which stage 1 does something wrong at its hop to stage 0; returns what this rank raises."""
    engine = start(config)
    if engine.stage_id == 1:
        sender = engine._stages[0].gradients_out
        send = sender.send

        def faulty(tensors: list[Tensor]) -> None:
            wrong: dict[str, list[Tensor | None]] = {
                "dropped": [None, *tensors[1:]],
                "shape": [tensors[0][:, :-1], *tensors[1:]],
                "dtype": [tensors[0].double(), *tensors[1:]],
                "count": tensors[:-1],
            }
            send(wrong[fault])

        sender.send = faulty
    try:
        engine.train_batch(Batches(config))
    except Exception as error:
        # Leave at once, as a worker of a run does: the neighbours see the connection close.
        torch.distributed.destroy_process_group()
        return f"{type(error).__name__}: {error}"
    return "nothing"


def losses_of_steps(config: Config, steps: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    engine = start(config)
    batches = Batches(config, engine.grid.get_data_parallel_id())
    results = []
    for _ in range(steps):
        loss = float(engine.train_batch(batches))
        results.append((loss, float(engine.get_global_grad_norm())))
    return results


def skipped_sequences(config: Config, datasets: list[Path]) -> list[int] | str:
    """How many sequences each of four steps skipped, each rank reading its own dataset; or what this rank raises."""
    engine = start(config)
    rank = torch.distributed.get_rank()
    stream = SequenceStream([DatasetSource(str(datasets[rank]))], SEQUENCE, seed=7, on_bad_shard="skip")
    loader = BatchLoader(
        stream,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=MICRO_BATCH,
        data_parallel_rank=0,
        data_parallel_size=1,
        columns="labels" if rank else "inputs",
    )
    meter = Meter(config, engine, loader, 0)
    found = []
    try:
        for step in range(1, 5):
            loss = float(engine.train_batch(loader))
            found.append(meter.measure(step, loss, lr=0.0).skipped_sequences)
    except DepthpipeError as error:
        return str(error)
    finally:
        loader.close()
    return found
