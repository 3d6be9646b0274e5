import bisect
import random

import pytest

from drllm.bisection import nearest_setting


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rises", [False, True])
def test_the_nearest_step_is_found_among_all_steps(seed, rises):
    rng = random.Random(seed)
    edges = sorted(rng.uniform(-5, 5) for _ in range(rng.randint(0, 30)))
    heights = sorted((rng.uniform(0, 30) for _ in range(len(edges) + 1)), reverse=not rises)

    def step(value):
        return heights[bisect.bisect(edges, value)]

    for wanted in [-1, 31, *(rng.uniform(0, 30) for _ in range(5))]:
        found = nearest_setting(step, wanted, -6.0, 6.0)
        assert found.executions == step(found.value)
        nearest = min(abs(height - wanted) for height in heights)
        assert abs(found.executions - wanted) == pytest.approx(nearest)


def test_a_knob_without_effect_gives_what_there_is():
    found = nearest_setting(lambda value: 7.0, 3.0, 0.0, 1.0)
    assert found.executions == 7.0


@pytest.mark.parametrize("wanted", [4.0, 4.4, 3.6])
def test_the_value_lies_well_within_its_step(wanted):
    found = nearest_setting(lambda value: 5.0 - (value > -1) - (value > 2), wanted, -64.0, 64.0)
    assert found.executions == 4.0
    assert -0.5 < found.value < 1.5
