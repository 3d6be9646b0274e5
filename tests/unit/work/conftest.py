"""What the tests of the runner share: toys to import, and a Ray with cores to spare."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # toys.py


@pytest.fixture(scope="module")
def own_ray(leaving_things_open: Callable[[], AbstractContextManager[None]]) -> Iterator[Any]:
    """A Ray of this process with cores to spare, so that a test can start a third worker."""
    ray = pytest.importorskip("ray")
    folder = str(Path(__file__).parent)
    with leaving_things_open(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", folder, prepend=os.pathsep)  # for toys.py in the workers
        ray.init(
            address="local",
            num_cpus=2 * (os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    yield ray
    with leaving_things_open():
        ray.shutdown()
