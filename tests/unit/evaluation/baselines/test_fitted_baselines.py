"""What stands in the way of comparing a baseline."""

from drllm.evaluation.baselines.base import BASELINES
from drllm.evaluation.baselines.material import Material


def test_what_a_baseline_needs_and_there_is_not_is_named(routed):
    material = Material(prompts=[[1, 2]])

    def obstacle(name):
        return BASELINES.get(name)(routed, material).find_obstacle(3.0)

    assert obstacle("sequence router") == (
        "it needs the routers' targets; give them as --supervision"
    )
    assert obstacle("block influence") is None
