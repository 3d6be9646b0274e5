"""What a pass makes is freed with it: nothing of it waits for the garbage collector.

Tensors weigh little to the collector, which counts objects; so gigabytes would wait.
"""

import gc
import weakref

import pytest
import torch

from drllm.models.routed_model import RoutedModel
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.score import Request
from drllm.paths import StaticPath

PLANS = {
    "decisions": [1, 0, 2, 1, 1, 1],
    "a path in another order": StaticPath([3, 0, 5]),
}


@pytest.fixture
def routed(tiny_llama):
    return RoutedModel(tiny_llama())


@pytest.fixture
def garbage():
    """Return what waits for the garbage collector when it is asked for, of this test alone."""
    gc.collect()
    gc.disable()
    try:
        yield lambda: [each for each in found() if isinstance(each, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def found():
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    return gc.garbage


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_generation_leaves_no_tensor_behind(routed, garbage, plan):
    with routed.fixed(plan):
        routed.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert garbage() == []


def test_the_shared_states_of_a_batch_are_freed_with_it(routed, garbage):
    batch = ChoiceBatch(routed, [Request([5, 9, 30], [[4, 8], [61]])], 1.0)
    batch.scores([(0, StaticPath([0, 1, 3])), (0, (1,) * 6)], kl=True)
    states = weakref.ref(batch.states)
    del batch
    assert states() is None
    assert garbage() == []
