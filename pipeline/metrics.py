"""The numbers of a run: one line of `metrics.jsonl` per logged step, TensorBoard beside it, and the way back in.

Reading needs neither torch nor tensorboard, so that the monitor starts at once.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from data_prep.errors import DepthpipeError

if TYPE_CHECKING:
    import torch

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One logged optimizer step. The names are stable: users' dashboards read them.

    Times and rates are means over the steps since the line before, so that a run that logs every tenth step
    loses nothing. A number that is not finite stands in the file as `null` (JSON knows no NaN) and is read back as NaN.
    """

    step: int  # optimizer steps done, this one included
    tokens: int  # tokens trained on since the run began, over all devices
    loss: float  # mean cross entropy of the step's global batch, nats per token
    grad_norm: float  # of all parameters together, before clipping
    lr: float  # learning rate that the step used
    step_time_s: float  # wall time of one step
    tokens_per_second: float  # of the whole run
    tokens_per_second_per_device: float
    mfu: float | None  # model FLOP/s over peak FLOP/s of the devices, 0..1; None where the peak is not known
    data_wait_s: float  # part of step_time_s in which training waited for data
    bubble_fraction: float  # part of a step in which a stage waits for its neighbours, 0..1
    memory_bytes: int  # peak of the fullest device; CPU: peak resident memory of the fullest process
    time: float  # seconds since the Unix epoch at the end of the step
    skipped_sequences: int = 0  # could not be read, and others took their places (data.on_bad_shard: skip)
    validation_loss: float | None = None  # nats per token, on the steps where it was measured

    @property
    def data_wait_fraction(self) -> float:
        """Share of the step that went into waiting for data, 0..1."""
        return self.data_wait_s / self.step_time_s if self.step_time_s else math.nan

    def to_json(self) -> str:
        """One line without its newline; floats at full precision; no `validation_loss` where none was measured."""
        record: dict[str, float | None] = {}
        for name in _FIELD_NAMES:
            value = getattr(self, name)
            if name != "validation_loss" or value is not None:
                record[name] = value if value is None or math.isfinite(value) else None
        return json.dumps(record, allow_nan=False)

    @classmethod
    def from_json(cls, line: bytes | str) -> StepMetrics:
        """The inverse of `to_json`. Keys of newer versions are passed over. ValueError says what is wrong."""
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        values = {}
        for name in _FIELD_NAMES:
            value = record.get(name, MISSING)
            if value is MISSING:
                if name in _OPTIONAL:
                    continue
                raise ValueError(f"no key '{name}'")
            if value is None and name not in _OPTIONAL:
                value = math.nan
            elif value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"'{name}' is not a number")
            values[name] = value
        if not isinstance(values["step"], int):
            raise ValueError("'step' is not a whole number")
        return cls(**values)


_FIELD_NAMES = tuple(field.name for field in fields(StepMetrics))
_OPTIONAL = ("mfu", "skipped_sequences", "validation_loss")
# TensorBoard puts what stands before the slash under one heading.
_TRAINING = ("loss", "validation_loss", "grad_norm", "lr", "tokens")
_SCALARS = {
    name: f"training/{name}" if name in _TRAINING else f"performance/{name}"
    for name in _FIELD_NAMES
    if name not in ("step", "time")
}


class MetricsWriter:
    """Appends to `metrics.jsonl`, and to TensorBoard's event files if asked to. One process of a run has one.

    A run that goes on from `start_step` first cuts what was logged after it, so that the file reads like the
    file of a run that was never interrupted; a new run has `start_step` 0.
    """

    def __init__(self, run_dir: str | os.PathLike[str], tensorboard: bool, start_step: int = 0) -> None:
        """Raises DepthpipeError where the file of the run that goes on is damaged (not for a torn last line)."""
        path = Path(run_dir) / METRICS_FILE
        _cut_after_step(path, start_step)
        # Unbuffered and O_APPEND: one write per line, so that readers and a kill find whole lines.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (lives as long as the writer)
        self._tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # 0.4 s of imports that readers do not need

            # purge_step tells TensorBoard to forget the steps that the interrupted run did after its checkpoint.
            purge_step = start_step + 1 if start_step else None
            self._tensorboard = SummaryWriter(Path(run_dir) / TENSORBOARD_DIR, purge_step=purge_step, flush_secs=10)

    def write(self, metrics: StepMetrics) -> None:
        """One line, one write."""
        self._file.write(metrics.to_json().encode() + b"\n")
        if self._tensorboard is not None:
            for name, tag in _SCALARS.items():
                value = getattr(metrics, name)
                if value is not None:
                    self._tensorboard.add_scalar(tag, value, metrics.step, walltime=metrics.time)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run_dir: str | os.PathLike[str], after_offset: int = 0) -> tuple[list[StepMetrics], int]:
    """The lines from byte `after_offset` on, and the offset to go on from. No file yet: no lines.

    A last line without its newline (being written, or torn by a kill) is left for the next call.
    A damaged line before it raises DepthpipeError that names file and line.
    """
    path = Path(run_dir) / METRICS_FILE
    try:
        with open(path, "rb") as file:
            file.seek(after_offset)
            data = file.read()
    except FileNotFoundError:
        return [], 0
    data = data[: data.rfind(b"\n") + 1]
    metrics = []
    position = after_offset
    for line in data.splitlines(keepends=True):
        metrics.append(parse_line(path, line, position))
        position += len(line)
    return metrics, position


def parse_line(path: Path, line: bytes, position: int) -> StepMetrics:
    """One line that starts at byte `position` of `path`. Raises DepthpipeError that names file and line."""
    try:
        return StepMetrics.from_json(line)
    except ValueError as error:
        with open(path, "rb") as file:
            number = file.read(position).count(b"\n") + 1
        raise DepthpipeError(
            f"{path}, line {number}: not a line of metrics ({error}); remove the line to read the rest"
        ) from None


def _cut_after_step(path: Path, step: int) -> None:
    """Keeps the lines with a step up to `step`. Drops a torn last line. The file is whole at every moment."""
    if not path.exists():
        return
    keep = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n") or parse_line(path, line, keep).step > step:
                break
            keep += len(line)
    if keep == path.stat().st_size:
        return
    temporary = path.with_suffix(".jsonl.tmp")
    with open(path, "rb") as source, open(temporary, "wb") as target:
        while keep:
            piece = source.read(min(keep, 1 << 20))
            target.write(piece)
            keep -= len(piece)
        target.flush()
        os.fsync(target.fileno())
    os.replace(temporary, path)


# Dense bf16 matrix FLOP/s from the makers' data sheets (without sparsity, accumulation in fp32), of what
# torch.cuda.get_device_name says. The first name that occurs in it as whole words counts.
_PEAK_FLOPS = (
    ("GB300", 2500e12),
    ("B300", 2250e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989.4e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835.5e12),
    ("H100", 989.4e12),
    ("H800", 989.4e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX A6000", 154.8e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI355X", 2500e12),
    ("MI325X", 1307.4e12),
    ("MI300X", 1307.4e12),
    ("MI250X", 191.5e12),  # one of its two dies, which is what torch calls a device
)


def peak_flops_per_second(device: torch.device | str, dtype: torch.dtype | None = None) -> float | None:
    """What MFU is measured against: the peak FLOP/s of one device. None for an accelerator that we do not know.

    Accelerators: the data sheet's dense bf16 rate, whatever the run's precision, so that MFU compares between runs.
    CPU: no data sheet holds for "the cores that this process may use", so a square matmul in `dtype` (default
    fp32) is timed at the process's thread count for about 0.2 s, and the fastest pass counts. Call once per run.
    """
    import torch

    device = torch.device(device)
    if device.type == "cpu":
        return _measured_matmul_flops(dtype or torch.float32)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return known_peak_flops(name)


def known_peak_flops(device_name: str) -> float | None:
    """The data sheet's rate for `device_name` as torch.cuda.get_device_name gives it (`NVIDIA H100 80GB HBM3`)."""
    if "MIG" in device_name or "Laptop" in device_name:  # a slice of the device, or a slower one of the same name
        return None
    return next((flops for known, flops in _PEAK_FLOPS if re.search(rf"\b{known}\b", device_name)), None)


def _measured_matmul_flops(dtype: torch.dtype, seconds: float = 0.2) -> float:
    import torch

    # About 1 ms a pass: shorter than the slice of a core that the scheduler gives, so that among 100 passes some
    # run undisturbed on a busy machine. (With three busy processes on two cores, this size keeps its 105 GFLOP/s,
    # where 1024 falls from 100 to 23.)
    size = 64 * round(6 * torch.get_num_threads() ** 0.5)
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    with torch.no_grad():
        torch.mm(left, right)  # the first call starts the threads
        fastest = math.inf
        deadline = time.perf_counter() + seconds
        while (start := time.perf_counter()) < deadline:
            torch.mm(left, right)
            fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
