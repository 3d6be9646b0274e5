"""What tests that start Ray share."""

import gc
import warnings
from contextlib import contextmanager


@contextmanager
def leaving_things_open():
    """Older versions of Ray leave files and processes to the garbage collector, which warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()
