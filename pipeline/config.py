"""The configuration of a run: YAML to typed, checked dataclasses. A wrong key or value is one line that names it."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from model.config import ModelConfig
from pipeline.config_checks import ConfigError, check_datasets, check_together


@dataclass(frozen=True)
class RunSection:
    dir: str
    seed: int = 1234


@dataclass(frozen=True)
class WeightedDataset:
    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class DataSection:
    train: str | list[WeightedDataset]
    validation: str | None = None
    sequence_length: int = 512
    document_attention: bool = False  # attention and positions stay inside a document
    on_bad_shard: Literal["error", "skip"] = "error"
    cache_dir: str | None = None  # of shards of remote datasets; ~/.cache/depthpipe where absent
    cache_bytes: int | None = None  # how much of them stays; all of them where absent

    def train_datasets(self) -> list[WeightedDataset]:
        return [WeightedDataset(self.train)] if isinstance(self.train, str) else self.train


@dataclass(frozen=True)
class ParallelSection:
    pipeline: int = 1
    data: int = 1
    schedule: Literal["1f1b", "dualpipev"] = "1f1b"  # dualpipev: two stages per rank, folded like a V
    split: list[int] | None = None  # transformer layers of each stage; balanced by modelled time where absent
    run_ahead: int = 1  # 1f1b: micro-batches ahead per stage behind; 2 hides a slow link and stores more activations
    timeout_s: float = 600.0  # a rank that is silent for longer ends the run

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data

    @property
    def num_stages(self) -> int:
        return self.pipeline * (2 if self.schedule == "dualpipev" else 1)


@dataclass(frozen=True)
class TrainSection:
    steps: int
    global_batch_size: int  # sequences
    micro_batch_size: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on an accelerator, fp32 on CPU
    activation_checkpointing: Literal["none", "layer"] = "none"
    validation_every: int = 0  # steps; 0: at the end only
    validation_batches: int = 8  # global batches of validation sequences


@dataclass(frozen=True)
class OptimizerSection:
    lr: float
    name: Literal["adamw"] = "adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # 0: no clipping
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1  # cosine ends at lr * min_lr_ratio


@dataclass(frozen=True)
class CheckpointSection:
    every: int = 0  # steps; 0: at the end only
    keep: int = 3  # newest checkpoints that stay


@dataclass(frozen=True)
class MonitorSection:
    every: int = 1  # steps between lines of metrics.jsonl
    tensorboard: bool = True


@dataclass(frozen=True)
class Config:
    run: RunSection
    model: ModelConfig
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection
    parallel: ParallelSection = field(default_factory=ParallelSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    monitor: MonitorSection = field(default_factory=MonitorSection)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged into DeepSpeed's own configuration

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step on one data-parallel rank."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.parallel.data)

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.data.sequence_length

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key.path=value`` overrides (values are YAML) and check everything.

    ``model.vocab_size`` comes from the first training dataset where the file leaves it out.

    Raises:
        ConfigError: naming the file or key, and the remedy.
    """
    raw = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> Config:
    """Check a configuration given as nested dictionaries. Raises ConfigError."""
    _reject_unknown_keys(Config, raw, "")
    data = _parse(DataSection, raw.get("data", {}), "data")
    manifest = check_datasets(data)
    model = raw.setdefault("model", {})
    if isinstance(model, dict) and model.get("vocab_size") is None:
        model["vocab_size"] = manifest.vocab_size
    config = _parse(Config, raw, "")
    if config.model.vocab_size < manifest.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the tokenizer's {manifest.vocab_size} "
            f"({manifest.tokenizer_path}); leave the key out to take the tokenizer's"
        )
    check_together(config)
    return config


def load_run_model(run_dir: str | Path) -> ModelConfig:
    """The model of a run, from the ``config.yaml`` that training left in its directory. Raises ConfigError."""
    return _parse(ModelConfig, _read_run(run_dir).get("model"), "model")


def run_data(run_dir: str | Path) -> DataSection:
    """The ``data`` section of a run, likewise. Raises ConfigError."""
    data: DataSection = _parse(DataSection, _read_run(run_dir).get("data"), "data")
    return data


def _read_run(run_dir: str | Path) -> dict[str, Any]:
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir}: not a run (no config.yaml); name the run.dir of a training")
    return _read_yaml(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; start from one in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of sections; start from one in configs/")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: write it as key.path=value, for example --set train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from None
    node = raw
    *parents, last = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a section")
        node = child
    node[last] = value


def _parse(section: type[Any], raw: Any, prefix: str) -> Any:
    """Build dataclass `section` from `raw`; `prefix` is the dotted path of the section, for messages."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{prefix or 'configuration'}: expected a section of keys, found {raw!r}")
    _reject_unknown_keys(section, raw, prefix)
    hints = typing.get_type_hints(section)
    values = {}
    for item in dataclasses.fields(section):
        key = _join(prefix, item.name)
        if item.name in raw:
            values[item.name] = _convert(hints[item.name], raw[item.name], key)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{key}: missing; the configuration needs it")
    try:
        return section(**values)
    except ValueError as error:  # the model's own checks start their message with the key
        raise ConfigError(f"{_join(prefix, str(error))}") from None


def _reject_unknown_keys(section: type[Any], raw: dict[str, Any], prefix: str) -> None:
    known = [item.name for item in dataclasses.fields(section)]
    for name in raw:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {_join(prefix, close[0])}?" if close else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{_join(prefix, str(name))}: unknown key; {hint}")


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _parse(typing.cast("type[Any]", hint), value, key)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{key}: {value!r} is not one of {', '.join(map(str, arguments))}")
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, key)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{key}: expected a list, found {value!r}")
        return [_convert(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{key}: expected a section of keys, found {value!r}")
        return value
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 (no dot) as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}: {value} is not a finite number")
    if type(value) is not hint:
        raise ConfigError(f"{key}: expected {_type_name(hint)}, found {value!r}")
    return value


def _convert_union(arguments: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    error = None
    for argument in arguments:
        if argument is type(None):
            continue
        try:
            return _convert(argument, value, key)
        except ConfigError as failure:
            # A list is wrong because of one of its items: that message tells more than "expected text".
            if error is None or isinstance(value, (list, dict)):
                error = failure
    assert error is not None
    raise error


def _type_name(hint: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
