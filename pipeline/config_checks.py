"""What a configuration must satisfy beyond the types of its values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_prep.errors import DepthpipeError
from data_prep.manifest import Manifest
from data_prep.remote import load_manifest

if TYPE_CHECKING:
    from pipeline.config import Config, DataSection

OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
}


class ConfigError(DepthpipeError):
    """A configuration that cannot be run."""


def check_datasets(data: DataSection) -> Manifest:
    """The first training dataset's manifest.

    Raises:
        DepthpipeError: unless every dataset is there, long enough, and made with one tokenizer.
    """
    if not data.train_datasets():
        raise ConfigError("data.train: an empty list; name at least one dataset directory")
    first = load_manifest(data.train_datasets()[0].path, data.cache_dir)
    _check_length(first, data.train_datasets()[0].path, data.sequence_length)
    others = [dataset.path for dataset in data.train_datasets()[1:]]
    for path in [*others, *([data.validation] if data.validation else [])]:
        manifest = load_manifest(path, data.cache_dir)
        _check_length(manifest, path, data.sequence_length)
        if manifest.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise ConfigError(
                f"{path}: made with another tokenizer than {data.train_datasets()[0].path}; "
                "tokenize both with the same .model file"
            )
    return first


def _check_length(manifest: Manifest, path: str, sequence_length: int) -> None:
    if manifest.tokens <= sequence_length:
        raise ConfigError(
            f"{path}: its {manifest.tokens} tokens are not one sequence of data.sequence_length {sequence_length} "
            "and a label; tokenize more text, or lower it"
        )


def check_together(config: Config) -> None:
    """Raise ConfigError, naming the key, unless values are in range and the sections fit each other."""
    positive = {
        "data.sequence_length": config.data.sequence_length,
        "parallel.pipeline": config.parallel.pipeline,
        "parallel.data": config.parallel.data,
        "parallel.run_ahead": config.parallel.run_ahead,
        "parallel.timeout_s": config.parallel.timeout_s,
        "train.steps": config.train.steps,
        "train.global_batch_size": config.train.global_batch_size,
        "train.micro_batch_size": config.train.micro_batch_size,
        "train.validation_batches": config.train.validation_batches,
        "optimizer.lr": config.optimizer.lr,
        "checkpoint.keep": config.checkpoint.keep,
        "monitor.every": config.monitor.every,
    }
    for key, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{key}: {value} must be greater than zero")
    for key, value in {
        "train.validation_every": config.train.validation_every,
        "checkpoint.every": config.checkpoint.every,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "optimizer.grad_clip": config.optimizer.grad_clip,
        "optimizer.warmup_steps": config.optimizer.warmup_steps,
    }.items():
        if value < 0:
            raise ConfigError(f"{key}: {value} must not be negative")
    if not config.run.dir:
        raise ConfigError("run.dir: empty; name a directory for the run, for example runs/mine")
    if not 0 <= config.optimizer.min_lr_ratio <= 1:
        raise ConfigError(f"optimizer.min_lr_ratio: {config.optimizer.min_lr_ratio} must be between 0 and 1")
    if len(config.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise ConfigError(f"optimizer.betas: {config.optimizer.betas} must be two numbers in [0, 1)")
    for dataset in config.data.train_datasets():
        if dataset.weight <= 0:
            raise ConfigError(f"data.train: weight {dataset.weight} of {dataset.path} must be greater than zero")
    _check_parallel(config)
    _check_deepspeed(config.deepspeed)


def _check_deepspeed(section: dict[str, Any]) -> None:
    for key in section:
        if key in OWNED_DEEPSPEED_KEYS:
            raise ConfigError(f"deepspeed.{key}: set {OWNED_DEEPSPEED_KEYS[key]} instead")
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 1) not in (0, 1):
        raise ConfigError("deepspeed.zero_optimization: a section whose stage is 0 or 1; pipelines allow no other")
    if zero.get("round_robin_gradients"):  # DeepSpeed then misstates where a weight lies in the optimizer's memory
        raise ConfigError("deepspeed.zero_optimization.round_robin_gradients: checkpoints would be wrong; leave it out")


def _check_parallel(config: Config) -> None:
    stages, layers = config.parallel.num_stages, config.model.num_hidden_layers
    if stages > layers:
        most = layers * config.parallel.pipeline // stages
        raise ConfigError(
            f"parallel.pipeline: {stages} stages are more than the {layers} layers of model.num_hidden_layers; "
            f"set parallel.pipeline to {most} or less"
        )
    split = config.parallel.split
    if split is not None and (len(split) != stages or sum(split) != layers or min(split) < 1):
        raise ConfigError(
            f"parallel.split: {split} must name {stages} stages of at least one layer each "
            f"that sum to {layers} (model.num_hidden_layers)"
        )
    per_pass = config.train.micro_batch_size * config.parallel.data
    if config.train.global_batch_size % per_pass:
        raise ConfigError(
            f"train.global_batch_size: {config.train.global_batch_size} does not divide by "
            f"train.micro_batch_size x parallel.data = {per_pass}; "
            f"{max(1, config.train.global_batch_size // per_pass) * per_pass} would"
        )
    if config.parallel.schedule == "dualpipev" and config.micro_batches < stages:
        raise ConfigError(
            f"train.global_batch_size: {config.train.global_batch_size} makes {config.micro_batches} micro-batches; "
            f"parallel.schedule dualpipev needs {stages}: set it to {stages * per_pass} or more"
        )
