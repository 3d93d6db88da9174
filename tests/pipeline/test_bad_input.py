"""Every wrong input ends in one line that names the thing and the remedy, with exit code 2, before a process starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.manifest import write_sealed
from pipeline.cli import main

SETTINGS = [
    # what is set, and what the line must name
    ("model.hiden_size=64", ["model.hiden_size", "model.hidden_size"]),
    ("modle.hidden_size=64", ["modle", "model"]),
    ("model.hidden_size=many", ["model.hidden_size", "many"]),
    ("model.num_attention_heads=5", ["model.hidden_size", "num_attention_heads"]),
    ("model.residual=blocks", ["model.residual", "standard, block, full"]),
    ("model.vocab_size=100", ["model.vocab_size", "512"]),
    ("parallel.pipeline=4", ["parallel.pipeline", "num_hidden_layers", "3 or less"]),
    ("parallel.split=[1, 1]", ["parallel.split", "sum to 3"]),
    ("parallel.schedule=gpipe", ["parallel.schedule", "1f1b"]),
    ("parallel={pipeline: 2, schedule: dualpipev}", ["parallel.pipeline", "num_hidden_layers"]),
    ("train.global_batch_size=7", ["train.global_batch_size", "6 would"]),
    ("train.steps=0", ["train.steps"]),
    ("train.steps=1.5", ["train.steps", "whole number"]),
    ("train.steps=true", ["train.steps", "whole number"]),
    ("optimizer.lr=-1", ["optimizer.lr"]),
    ("optimizer.lr=.nan", ["optimizer.lr", "finite"]),
    ("optimizer.betas=[0.9]", ["optimizer.betas"]),
    ("data.train=nowhere", ["nowhere", "depthpipe tokenize"]),
    ("data.train=[]", ["data.train"]),
    ("data.train=[{path: nowhere, weigth: 1}]", ["data.train[0].weigth", "weight"]),
    ("data.sequence_length=0", ["data.sequence_length"]),
    ("deepspeed={train_batch_size: 3}", ["deepspeed.train_batch_size", "train.global_batch_size"]),
    ("deepspeed={zero_optimization: {stage: 2}}", ["deepspeed.zero_optimization", "0 or 1"]),
    ("optimizer.min_lr_ratio=-3", ["optimizer.min_lr_ratio", "between 0 and 1"]),
    ("run.dir=''", ["run.dir", "empty"]),
    ("data.sequence_length=100000000", ["train", "data.sequence_length"]),
    ("train.steps", ["--set train.steps", "key.path=value"]),
    ("train.steps.more=1", ["train.steps.more", "steps is a value"]),
    ("run.dir=/proc/nowhere", ["run.dir", "/proc/nowhere"]),
]


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must fail on its input; returns its one line."""
    code = main(list(map(str, arguments)))
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("depthpipe: error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(("setting", "named"), SETTINGS, ids=[setting for setting, _ in SETTINGS])
def test_wrong_configuration(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], setting: str, named: list[str]
) -> None:
    line = one_line(capsys, "train", write_config(), "--set", setting)
    assert all(name in line for name in named), line


def test_missing_configuration_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml" in one_line(capsys, "train", "nowhere.yaml")


@pytest.mark.parametrize("text", ["a: [", "- a\n", "just text", "run: 3\ndata: {train: x}"])
def test_configuration_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    one_line(capsys, "train", path)


def test_missing_section(write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config()
    sections = yaml.safe_load(path.read_text())
    del sections["optimizer"]
    path.write_text(yaml.safe_dump(sections))
    assert "optimizer: missing" in one_line(capsys, "train", path)


def test_validation_data_of_another_tokenizer(
    dataset: Path, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(dataset / "validation", other)
    manifest = json.loads((other / "manifest.json").read_text())
    write_sealed(other / "manifest.json", {**manifest, "tokenizer_fingerprint": "0" * 64})
    line = one_line(capsys, "train", write_config(data={"validation": str(other)}))
    assert str(other) in line and "made with another tokenizer" in line


@pytest.mark.parametrize("command", [("monitor", "--once"), ("generate",)])
def test_directory_that_is_not_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    assert str(tmp_path) in one_line(capsys, command[0], tmp_path, *command[1:])


def test_run_without_a_checkpoint(
    tmp_path: Path, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.config import load_config

    (tmp_path / "config.yaml").write_text(load_config(write_config()).to_yaml())
    assert "no checkpoint yet" in one_line(capsys, "generate", tmp_path)


@pytest.mark.parametrize(
    "option", [("--max-tokens", "0"), ("--temperature", "-1"), ("--temperature", "nan"), ("--top-p", "0")]
)
def test_sampling_out_of_range(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str]) -> None:
    assert option[0] in one_line(capsys, "generate", tmp_path, *option)


def test_checkpoint_of_another_model(
    tmp_path: Path, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.checkpoints import FORMAT
    from pipeline.config import load_config
    from pipeline.runtime import run_identity

    config = write_config()
    identity: dict[str, Any] = {**run_identity(load_config(config)), "model.hidden_size": 48}
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(
        json.dumps({"format": FORMAT, "step": 4, "position": {}, "identity": identity, "files": {}})
    )
    line = one_line(capsys, "train", config)
    assert "model.hidden_size" in line and "48" in line and "--restart" in line


def test_checkpoint_that_is_not_whole(
    tmp_path: Path, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    assert str(checkpoint) in one_line(capsys, "train", write_config())
