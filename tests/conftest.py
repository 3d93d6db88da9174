"""Fixtures that more than one package's tests use."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

from tests.worker_pool import WorkerPool

# Before any process of a test takes its environment from here: nothing is written into the user's own cache.
CACHE = tempfile.TemporaryDirectory(prefix="depthpipe-cache-")
os.environ["XDG_CACHE_HOME"] = CACHE.name


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """The shared pool of worker processes."""
    pool = WorkerPool()
    yield pool
    pool.close()
