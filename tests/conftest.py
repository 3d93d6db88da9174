"""Fixtures that more than one package's tests use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.worker_pool import WorkerPool


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """The shared pool of worker processes."""
    pool = WorkerPool()
    yield pool
    pool.close()
