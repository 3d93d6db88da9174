"""The main job as a person runs it: train, interrupt, resume, look, generate. Real processes, real files."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import DepthpipeError
from pipeline.checkpoints import latest_checkpoint
from pipeline.depth import observe
from pipeline.generate import load_model
from pipeline.metrics import StepMetrics, read_metrics
from tests.pipeline.conftest import (
    ENVIRONMENT,
    REPOSITORY,
    depthpipe,
    start_depthpipe,
    workers_of,
    write_config_file,
)
from tests.worker_pool import free_port

STEPS = 20


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line.step, line.loss, line.grad_norm) for line in read_metrics(run)[0]]


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 20 steps in two pipeline stages."""
    directory = tmp_path_factory.mktemp("trained")
    config = write_config_file(directory / "config.yaml", dataset, directory / "run")
    out, _ = depthpipe("train", config)
    assert "20/20" in out and "trained" in out
    return directory / "run"


def test_the_model_learns_and_the_metrics_say_so(trained: Path) -> None:
    lines = read_metrics(trained)[0]
    assert [line.step for line in lines] == list(range(1, STEPS + 1))
    assert lines[0].loss == pytest.approx(math.log(512), abs=0.3)
    assert lines[-1].loss < lines[0].loss - 1
    assert lines[-1].validation_loss is not None
    assert abs(lines[-1].validation_loss - lines[-1].loss) < 0.5


def test_tokens_per_second_is_tokens_over_wall_time(trained: Path) -> None:
    # Step 8 and 16 write checkpoints and step 20 validates: those are not training, so time the steps between them.
    lines: dict[int, StepMetrics] = {line.step: line for line in read_metrics(trained)[0]}
    tokens = lines[16].tokens - lines[9].tokens
    reported = tokens / sum(lines[step].step_time_s for step in range(10, 17))
    wall = tokens / (lines[16].time - lines[9].time)
    assert reported == pytest.approx(wall, rel=0.02)
    assert lines[16].tokens_per_second == pytest.approx(512 / lines[16].step_time_s)


@pytest.mark.parametrize("pipeline", [1, 3])
def test_losses_do_not_depend_on_the_pipeline_degree(trained: Path, write_config: Any, pipeline: int) -> None:
    config = write_config(parallel={"pipeline": pipeline})
    depthpipe("train", config)
    run = config.parent / "run"
    assert losses(run) == losses(trained)
    assert read_metrics(run)[0][-1].validation_loss == read_metrics(trained)[0][-1].validation_loss


@pytest.mark.parametrize("residual", ["standard", "full"])
def test_every_residual_trains_from_one_changed_line(trained: Path, write_config: Any, residual: str) -> None:
    config = write_config()
    run = config.parent / "run"
    shutil.copytree(trained, run)  # an earlier run with another model is in the way
    out, _ = depthpipe("train", config, "--set", f"model.residual={residual}", "--restart")
    assert f"the earlier run is now {run}.old-1" in out
    assert losses(run.with_name("run.old-1")) == losses(trained)
    mine = losses(run)
    assert mine != losses(trained)
    assert mine[-1][1] < mine[0][1] - 1


def test_interrupted_and_resumed_is_as_if_never_interrupted(trained: Path, write_config: Any, started: Any) -> None:
    config = write_config()
    run = config.parent / "run"
    process = started(start_depthpipe("train", config))
    wait_for(lambda: (run / "checkpoints" / "step-00000008").exists(), 90, "checkpoint")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    wait_for(lambda: not workers_of(config), 10, "end of the workers")
    assert process.returncode == 130
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    assert f"the last checkpoint is step {checkpoint.step}" in err
    other = shutil.copytree(run, config.parent / "other")
    out, _ = depthpipe("train", config)
    assert f"resuming {run} after step {checkpoint.step}" in out
    assert losses(run) == losses(trained)
    depthpipe("train", config, *settings(f"run.dir={other}", "parallel.pipeline=1", "parallel.data=2"))
    for mine, theirs in zip(losses(other), losses(trained), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=0)


def settings(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def test_attention_can_stay_inside_documents(trained: Path, write_config: Any) -> None:
    config = write_config()
    depthpipe("train", config, "--set", "data.document_attention=true")
    across, inside = losses(trained), losses(config.parent / "run")
    assert inside != across
    assert inside[-1][1] == pytest.approx(across[-1][1], abs=0.1)


def test_a_killed_rank_ends_the_run_and_is_named(write_config: Any, started: Any) -> None:
    config = write_config(train={"steps": 10_000})
    process = started(start_depthpipe("train", config))
    wait_for(lambda: read_metrics(config.parent / "run")[0], 90, "first step")
    victim = next(worker for worker in workers_of(config) if worker.environ()["RANK"] == "1")
    victim.kill()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in err
    wait_for(lambda: not workers_of(config), 5, "end of the workers")


def test_a_killed_parent_leaves_no_worker(write_config: Any, started: Any) -> None:
    config = write_config(train={"steps": 10_000})
    process = started(start_depthpipe("train", config))
    wait_for(lambda: read_metrics(config.parent / "run")[0], 90, "first step")
    assert len(workers_of(config)) == 2
    process.kill()
    process.communicate(timeout=10)
    wait_for(lambda: not workers_of(config), 10, "end of the workers")


def test_a_finished_run_says_so(trained: Path) -> None:
    out, _ = depthpipe("train", trained.parent / "config.yaml")
    assert "has done its 20 steps" in out


def test_generate_continues_the_prompt_and_repeats_itself(trained: Path) -> None:
    arguments = ("generate", trained, "--prompt", "def f(", "--max-tokens", "12", "--seed", "3")
    first, _ = depthpipe(*arguments)
    assert first.startswith("def f(") and len(first) > len("def f(\n")
    assert depthpipe(*arguments)[0] == first


def test_a_damaged_checkpoint_is_named(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    for file in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        path = run / "checkpoints" / "step-00000020" / file
        sound = path.read_bytes()
        os.truncate(path, 1000)
        with pytest.raises(DepthpipeError, match=rf"{path}: has another size than was written"):
            load_model(run)
        path.write_bytes(sound)
    load_model(run)


def test_depth_shows_where_every_sublayer_reads(trained: Path) -> None:
    out, _ = depthpipe("depth", trained, "--sequences", "2")
    observer = observe(trained, 2)
    assert list(observer.weights) == [f"{layer}.{part}" for layer in range(3) for part in ("attention", "mlp")] + [
        "head"
    ]
    assert [len(weights) for weights in observer.weights.values()] == [1, 2, 2, 2, 2, 3, 3]
    assert all(float(weights.sum()) == pytest.approx(1) for weights in observer.weights.values())
    assert all(name in out for name in observer.weights)
    assert f"{observer.weights['head'][0]:.2f}" in out


def test_monitor_shows_the_finished_run(trained: Path) -> None:
    out, _ = depthpipe("monitor", trained, "--once")
    assert "20" in out and "finished" in out


def test_a_damaged_shard_ends_the_run_in_one_line(dataset: Path, write_config: Any, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(dataset / "train", damaged)
    shard = sorted((damaged / "shards").glob("*.tar"))[0]
    with open(shard, "r+b") as file:
        file.seek(shard.stat().st_size // 2)
        file.write(bytes(shard.stat().st_size // 4))
    _, err = depthpipe("train", write_config(data={"train": str(damaged)}), code=2)
    assert err.startswith("depthpipe: error: ") and err.count("\n") == 1
    assert str(shard) in err


def can_make_namespaces() -> bool:
    if shutil.which("ip") is None:
        return False
    name = f"depthpipe-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


needs_namespaces = pytest.mark.skipif(
    not can_make_namespaces(), reason="network namespaces need iproute2 and its privileges"
)


@needs_namespaces
def test_two_hosts_train_as_one(trained: Path, write_config: Any) -> None:
    config = write_config()
    processes: list[subprocess.Popen[bytes]] = []
    hosts = [f"depthpipe-{os.getpid()}-{side}" for side in "ab"]
    links = [f"dp{os.getpid()}{side}" for side in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        for host in hosts:
            ip("netns", "add", host)
        ip("link", "add", links[0], "netns", hosts[0], "type", "veth", "peer", "name", links[1], "netns", hosts[1])
        for number, (host, link) in enumerate(zip(hosts, links, strict=True), start=1):
            ip("-n", host, "addr", "add", f"10.201.7.{number}/24", "dev", link)
            ip("-n", host, "link", "set", link, "up")
            ip("-n", host, "link", "set", "lo", "up")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        meeting = ["--master-addr", "10.201.7.1", "--master-port", "29555"]
        for number, (host, link) in enumerate(zip(hosts, links, strict=True)):
            command = ["ip", "netns", "exec", host, *torchrun, "--node-rank", str(number), *meeting]
            command += ["--local-addr", f"10.201.7.{number + 1}", "-m", "pipeline", "launch", str(config)]
            environment = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": link}
            processes.append(subprocess.Popen(command, env=environment, cwd=REPOSITORY, stderr=subprocess.PIPE))
        for process in processes:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err.decode()
    finally:
        for process in processes:
            process.kill()
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)
    assert losses(config.parent / "run") == losses(trained)


def test_launch_outside_torchrun_says_what_to_do(write_config: Any) -> None:
    _, err = depthpipe("launch", write_config(), code=2)
    assert "torchrun" in err and err.count("\n") == 1


def test_run_directory_is_self_contained(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "logs",
        "tokenizer.model",
    }
    state = json.loads((trained / "checkpoints" / "step-00000020" / "state.json").read_text())
    assert state["step"] == STEPS


def test_a_rank_that_never_starts_is_named(write_config: Any) -> None:
    config = write_config(parallel={"pipeline": 2, "timeout_s": 3})
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    command = [sys.executable, "-m", "pipeline", "launch", str(config)]
    environment = {**ENVIRONMENT, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "rank 1 of 2 did not start" in done.stdout + done.stderr
