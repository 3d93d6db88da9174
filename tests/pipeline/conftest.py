"""A small real dataset, and the command line as a person uses it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipeline.cli import main
from pipeline.metrics import StepMetrics

# A step of an invented run.
METRICS = StepMetrics(
    step=1,
    tokens=16384,
    loss=9.1234,
    grad_norm=0.75,
    lr=3e-3,
    step_time_s=1.25,
    tokens_per_second=13107.2,
    tokens_per_second_per_device=6553.6,
    mfu=0.382,
    data_wait_s=0.005,
    bubble_fraction=0.0588,
    memory_bytes=812 << 20,
    time=0.0,
)
REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the standard library's packages as tokens, in several shards: ``train/``, ``validation/``, tokenizer."""
    directory = tmp_path_factory.mktemp("dataset")
    packages = [str(Path(sysconfig.get_path("stdlib")) / name) for name in ("json", "email", "asyncio")]
    model = str(directory / "tokenizer.model")
    corpus = [*packages, "--include", "*.py"]
    assert main(["tokenizer", "train", *corpus, "--out", model, "--vocab-size", "512"]) == 0
    out = str(directory / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.plan.MIN_UNIT_BYTES", 150_000)
        assert main(["tokenize", *corpus, "--tokenizer", model, "--out", out, "--validation-fraction", "0.2"]) == 0
    return directory / "data"


@pytest.fixture
def write_config(dataset: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration that trains in seconds; sections are merged over it. Returns the file's path."""

    def write(**sections: dict[str, Any]) -> Path:
        return write_config_file(tmp_path / "config.yaml", dataset, tmp_path / "run", **sections)

    return write


def write_config_file(path: Path, dataset: Path, run_dir: Path, **sections: dict[str, Any]) -> Path:
    config: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run_dir), "seed": 5},
        "model": {
            "residual": "block",
            "layers_per_block": 2,
            "num_hidden_layers": 3,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
        },
        "data": {
            "train": str(dataset / "train"),
            "validation": str(dataset / "validation"),
            "sequence_length": 64,
        },
        "parallel": {"pipeline": 2},
        "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "optimizer": {"lr": 1.0e-2, "warmup_steps": 2},
        "checkpoint": {"every": 8},
    }
    for name, keys in sections.items():
        config.setdefault(name, {}).update(keys)
    path.write_text(yaml.safe_dump(config))
    return path


def start_depthpipe(*arguments: str | Path) -> subprocess.Popen[str]:
    """``depthpipe`` in a process of its own."""
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.fixture
def started() -> Iterator[Callable[[subprocess.Popen[str]], subprocess.Popen[str]]]:
    """Register a process that is to be ended with the test, however that ends."""
    processes: list[subprocess.Popen[str]] = []

    def register(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
        processes.append(process)
        return process

    yield register
    for process in processes:
        process.kill()  # its workers end with it


def depthpipe(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
    """Run ``depthpipe`` to its end; returns what it printed on stdout and stderr."""
    process = start_depthpipe(*arguments)
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, f"exit code {process.returncode}:\n{out}\n{err}"
    return out, err


def workers_of(run: Path) -> list[psutil.Process]:
    """The worker processes whose configuration is `run` (a path on their command line)."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if "launch" in words and str(run) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found
