"""Devices are pretended with what torch has from version 2.5 on."""

import pytest

from slow_way import TORCH


@pytest.fixture(autouse=True)
def _new_enough_torch():
    if TORCH < (2, 5):
        pytest.skip("torch before 2.5 doesn't show the graph and the attention that this needs")
