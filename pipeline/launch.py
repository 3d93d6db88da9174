"""Starting the processes of a run: this machine's own workers, or a place among those that torchrun has started."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import EXIT_WRONG_INPUT, DepthpipeError
from pipeline.checkpoints import latest_checkpoint
from pipeline.config import Config

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

WORKER_PARENT = "DEPTHPIPE_PARENT_PID"
SHUTDOWN_SECONDS = 5  # after which a worker that was asked to end is killed


def in_torchrun() -> bool:
    """Whether a launcher has given this process a place in a process group."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def launch_local(config: Config, arguments: Sequence[str]) -> int:
    """Run ``depthpipe launch`` with `arguments` in one process per device of the configuration, with torch's launcher.

    Returns:
        The exit code: 0, 1 after a failure, 2 after a wrong input, 130 after Ctrl-C. The reason has been printed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    from pipeline.runtime import check_processes

    processes = config.parallel.world_size
    check_processes(config, processes, processes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ[WORKER_PARENT] = str(os.getpid())
    logging.disable()  # torch's launcher speaks of signals and exit codes; the lines below say it shorter
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="depthpipe",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    try:
        launch_agent(launch_config, sys.executable, ["-u", "-m", "pipeline", "launch", *arguments])
    except (SignalException, KeyboardInterrupt):
        print(f"\n{_resumable(config)}", file=sys.stderr)
        return 130
    except ChildFailedError as failed:
        return _report_failure(failed.failures, config)
    return 0


def end_with_parent() -> None:
    """End this worker when the process that started it is gone, however that one ended."""
    parent = int(os.environ.get(WORKER_PARENT, "0"))
    # The default actions end the process at once, even inside a collective that is waiting in C++.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not parent:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _resumable(config: Config) -> str:
    """Where the same command would go on."""
    try:
        checkpoint = latest_checkpoint(config.run.dir)
    except DepthpipeError:
        checkpoint = None
    if checkpoint is None:
        return f"stopped before the first checkpoint; nothing of {config.run.dir} can be resumed"
    return f"stopped; the last checkpoint is step {checkpoint.step}: the same command resumes there"


def _report_failure(failures: dict[int, ProcessFailure], config: Config) -> int:
    """Print why the run ended: the rank that failed first, and where its log is."""
    for failure in failures.values():
        message, _ = _recorded(failure)
        if failure.exitcode == EXIT_WRONG_INPUT and message:
            print(f"depthpipe: error: {message.partition(': ')[2]}", file=sys.stderr)
            return EXIT_WRONG_INPUT
    rank, failure = min(failures.items(), key=lambda item: (_is_consequence(item[1]), item[1].timestamp))
    log = Path(config.run.dir) / "logs" / f"rank-{rank}.log"
    message, traceback = _recorded(failure)
    if traceback:
        print(traceback, file=sys.stderr)
    reason = f"failed: {message or f'exit code {failure.exitcode}'}"
    if failure.exitcode < 0:
        reason = f"was killed by {failure.signal_name()}"
    print(f"depthpipe: rank {rank} {reason}; its log is {log}", file=sys.stderr)
    print(_resumable(config), file=sys.stderr)
    return 1


def _is_consequence(failure: ProcessFailure) -> int:
    """How likely a failure is only the consequence of another one, from 0 up.

    When one rank is killed, its neighbours fail a moment later on a closed connection; when one fails, torch's launcher
    ends the others with SIGTERM.
    """
    if failure.exitcode >= 0:
        return 1
    return 2 if failure.exitcode == -signal.SIGTERM else 0


def _recorded(failure: ProcessFailure) -> tuple[str, str]:
    """Message and traceback that a worker left behind, empty if it left none."""
    record = failure.error_file_data.get("message")
    if isinstance(record, dict):
        return record["message"], record["extraInfo"]["py_callstack"]
    return "", ""
