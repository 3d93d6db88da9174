"""From a checked configuration to a DeepSpeed engine in this process: process group, stage, optimizer."""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from packaging.version import Version

from model.layers import no_weight_decay
from pipeline.config import Config, ConfigError
from pipeline.plan import FLOPS_PER_BYTE_ACCELERATOR, FLOPS_PER_BYTE_CPU, StagePlan, plan_stages

if TYPE_CHECKING:
    from pipeline.engine import DepthPipelineEngine

# Releases 0.16.0 to 0.19.2 scale the gradients of pipelines with several micro-batches wrongly; the loss looks right.
OLDEST_DEEPSPEED = Version("0.19.4")


def training_dtype(config: Config) -> torch.dtype:
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def check_processes(config: Config, world_size: int, local_world_size: int) -> None:
    """Raise ConfigError unless the processes that run, here and in all, are what the configuration asks for."""
    wanted = (
        f"parallel.pipeline {config.parallel.pipeline} x parallel.data {config.parallel.data} = "
        f"{config.parallel.world_size} processes"
    )
    if world_size != config.parallel.world_size:
        raise ConfigError(f"{wanted}, but {world_size} were started; change one of them")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else local_world_size
    if devices < local_world_size:
        raise ConfigError(
            f"{wanted}, {local_world_size} of them on this machine with {devices} GPU(s); lower parallel.pipeline or "
            "parallel.data, or set CUDA_VISIBLE_DEVICES= to run on CPU"
        )


def start_engine(config: Config) -> DepthPipelineEngine:
    """Join the process group that torchrun's environment variables describe and build this rank's stage."""
    if Version(version("deepspeed")) < OLDEST_DEEPSPEED:
        raise ConfigError(
            f"deepspeed {version('deepspeed')} computes wrong pipeline gradients; install {OLDEST_DEEPSPEED} or newer"
        )
    join_process_group(config)
    return build_engine(config)


def build_engine(config: Config) -> DepthPipelineEngine:
    """This rank's stage and its optimizer, in the process group that the rank has joined."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    from pipeline.engine import DepthPipelineEngine
    from pipeline.module import DepthPipelineModule, TwoStageModule

    plan = stage_plan(config)
    module = (DepthPipelineModule if config.parallel.schedule == "1f1b" else TwoStageModule)(
        config.model,
        plan,
        config.run.seed,
        checkpoint_layers=config.train.activation_checkpointing == "layer",
        topology=PipeDataParallelTopology(num_pp=config.parallel.pipeline, num_dp=config.parallel.data),
    )
    settings = deepspeed_settings(config)
    return DepthPipelineEngine(
        hop_shape=(config.train.micro_batch_size, config.data.sequence_length, config.model.hidden_size),
        hop_dtype=training_dtype(config),
        tie_weights=config.model.tie_word_embeddings,
        document_attention=config.data.document_attention,
        run_ahead=config.parallel.run_ahead,
        timeout=timedelta(seconds=config.parallel.timeout_s),
        args=None,
        model=module,
        optimizer=_optimizer(config, module),
        mpu=module.mpu(),
        config=settings,
        config_class=DeepSpeedConfig(settings, module.mpu()),
    )


def stage_plan(config: Config) -> StagePlan:
    """Where this machine cuts the model."""
    flops_per_byte = FLOPS_PER_BYTE_ACCELERATOR if torch.cuda.is_available() else FLOPS_PER_BYTE_CPU
    parallel = config.parallel
    return plan_stages(
        config.model,
        parallel.num_stages,
        config.data.sequence_length,
        parallel.split,
        flops_per_byte,
        training_dtype(config).itemsize,
    )


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's own configuration: what the run's configuration says, and the user's ``deepspeed`` section."""
    bf16 = training_dtype(config) is torch.bfloat16
    # Without ZeRO the optimizer works on the parameters themselves: nothing is flattened and no bit depends on the
    # cut. Data parallelism and bf16 (fp32 master weights) need ZeRO-1.
    zero_stage = 1 if bf16 or config.parallel.data > 1 else 0
    settings: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.micro_batches,
        # The norm is wanted with and without clipping, and DeepSpeed computes it only to clip.
        "gradient_clipping": config.optimizer.grad_clip or 1e30,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,  # the run prints its own lines
        "checkpoint": {"tag_validation": "Ignore"},
    }
    return _merged(settings, config.deepspeed)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over`, section by section."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def run_identity(config: Config) -> dict[str, Any]:
    """What of the configuration a resumed run must share with its checkpoint.

    A checkpoint says nothing of how the run is cut, on how many processes and in what precision: these may change.
    """
    return {
        **{f"model.{key}": value for key, value in dataclasses.asdict(config.model).items()},
        "train.global_batch_size": config.train.global_batch_size,
        "data.sequence_length": config.data.sequence_length,
        "data.document_attention": config.data.document_attention,
        "run.seed": config.run.seed,
    }


def set_learning_rate(engine: DepthPipelineEngine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def join_process_group(config: Config) -> None:
    """Meet the other ranks, and make the device and the backend known to torch and DeepSpeed.

    Raises:
        ConfigError: if a rank does not come in time; the message names it.
    """
    accelerated = torch.cuda.is_available()
    if accelerated:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=config.parallel.timeout_s)
    store = _meet(rank, world_size, timeout)
    backend = "nccl" if accelerated else "gloo"
    device = torch.device("cuda", torch.cuda.current_device()) if accelerated else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device)
    import deepspeed.ops

    # An optional all-reduce for CPUs that DeepSpeed would compile now, for a minute, and wait for ever if another
    # process was killed while it compiled.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def _meet(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store that the ranks share, when all of them are there. Raises ConfigError that names those that are not."""
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        tcp = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0 and not agent_serves,
            timeout=timeout,
            wait_for_workers=False,
        )
    except (dist.DistNetworkError, dist.DistStoreError):
        raise ConfigError(f"rank 0 did not answer at {address} within {timeout}; is it started there?") from None
    store = dist.PrefixStore(f"depthpipe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
    store.set(f"rank/{rank}", "here")
    keys = [f"rank/{other}" for other in range(world_size)]
    try:
        store.wait(keys, timeout)
    except dist.DistStoreError:
        missing = [other for other in range(world_size) if not store.check([keys[other]])]
        raise ConfigError(
            f"rank {', '.join(map(str, missing))} of {world_size} did not start within {timeout} "
            "(parallel.timeout_s); look at what its machine printed"
        ) from None
    return store


def _optimizer(config: Config, module: torch.nn.Module) -> torch.optim.Optimizer:
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in module.named_parameters():
        (plain if no_weight_decay(name, parameter) else decayed).append(parameter)
    settings = config.optimizer
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        fused=True,
    )
