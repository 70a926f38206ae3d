"""One Ray for all tests that need one; each test has a namespace of its own."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from timetier.actors.local_ray import LocalRay, start_local_ray, stop_local_ray, use_local_ray

# Ray reads its settings at its first import, which is that of the first test module.
_FOLDER = Path(tempfile.mkdtemp(prefix="tt"))
use_local_ray(_FOLDER)


def pytest_unconfigure() -> None:
    """Leave no folder behind, whichever tests were run."""
    shutil.rmtree(_FOLDER, ignore_errors=True)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[LocalRay]:
    """A local Ray of two CPUs, with dashboard and `ray://` server, as `timetier up` starts it."""
    yield start_local_ray(_FOLDER, num_cpus=2)
    stop_local_ray(_FOLDER)


@pytest.fixture(scope="session")
def ray_session(local_ray: LocalRay) -> Iterator[None]:
    """This process is connected to the local Ray."""
    import ray

    with contextlib.chdir(Path(__file__).parent.parent):  # from here Ray's workers find the actors of tests
        ray.init(local_ray.address, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture
def namespace() -> str:
    """A Ray namespace that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"
