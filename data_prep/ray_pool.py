"""The units of a tokenizing job on a Ray cluster, for jobs that have outgrown `--part`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data_prep
from data_prep.errors import DepthpipeError
from data_prep.plan import Plan
from data_prep.tokenizer import Tokenizer
from data_prep.worker import UnitResult, UnitWorker

CONNECT_HELP = "start a cluster and set RAY_ADDRESS, or leave it unset to use this machine"


class RayPool:
    """Does what `WorkerPool` does, with actors of the cluster at RAY_ADDRESS, or of a local one where it is not set.

    Every node must see inputs and output under the same paths, as on a shared file system. A context manager.
    """

    def __init__(self, plan: Plan, tokenizer: Tokenizer, directory: Path, workers: int) -> None:
        """Raises DepthpipeError when Ray is not installed or its cluster not reachable."""
        try:
            import ray
        except ImportError:
            raise DepthpipeError("--ray: Ray is not installed: pip install ray") from None
        self._ray = ray
        self._done = (0, 0, 0)
        self._owns_ray = not ray.is_initialized()
        # An instance of ours reports nothing to Ray's makers, unless the user says so.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if self._owns_ray:
            try:
                ray.init(
                    os.environ.get("RAY_ADDRESS", "local"),  # or else Ray joins whatever was last started here
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    # The package travels to the nodes, which need only its dependencies.
                    runtime_env={"py_modules": [data_prep]},
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise DepthpipeError(f"--ray: no cluster ({str(error).splitlines()[0]}): {CONNECT_HELP}") from None
        actor = ray.remote(num_cpus=1, max_restarts=0)(_UnitActor)
        shared = ray.put((plan, tokenizer.path, tokenizer.model, directory.absolute()))
        self._actors = [actor.remote(shared) for _ in range(workers)]

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._owns_ray:
            self._ray.shutdown()

    def progress(self) -> tuple[int, int, int]:
        """Documents, tokens and bytes of text of the units that are finished."""
        return self._done

    def run(self, units: list[int], interval: float = 0.1) -> Iterator[UnitResult | None]:
        """Do `units`; yields as `WorkerPool.run` does. Raises DepthpipeError when a unit fails or a node is lost."""
        waiting = iter(units)
        busy: dict[Any, Any] = {}
        for actor, unit in zip(self._actors, waiting, strict=False):
            busy[actor.run.remote(unit)] = actor
        while busy:
            ready, _ = self._ray.wait(list(busy), timeout=interval)
            if not ready:
                yield None
            for reference in ready:
                actor = busy.pop(reference)
                result = self._result(reference)
                for unit in itertools.islice(waiting, 1):
                    busy[actor.run.remote(unit)] = actor
                yield result

    def _result(self, reference: Any) -> UnitResult:
        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            reason = str(error).splitlines()[0]
            raise DepthpipeError(f"--ray: a worker was lost ({reason}): run the same command again") from None
        if isinstance(outcome, DepthpipeError):
            raise outcome
        assert isinstance(outcome, UnitResult)
        counted = list(outcome.counters.values())
        self._done = (
            self._done[0] + sum(counters.documents for counters in counted),
            self._done[1] + sum(counters.tokens for counters in counted),
            self._done[2] + sum(counters.text_bytes for counters in counted),
        )
        return outcome


class _UnitActor:
    """A `UnitWorker` in a process of the cluster."""

    def __init__(self, job: tuple[Plan, Path, bytes, Path]) -> None:
        plan, tokenizer_path, model, directory = job
        self._worker = UnitWorker(plan, Tokenizer(tokenizer_path, model), directory)

    def run(self, unit: int) -> UnitResult | DepthpipeError:
        try:
            return self._worker.run(unit)
        except DepthpipeError as error:  # returned, because Ray would wrap it
            return error
