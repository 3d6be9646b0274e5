import pytest
import torch

from drllm.errors import ConfigError
from drllm.records import SupervisionRecord, WeightedPath
from drllm.training.targets import check_soft_targets, soft_targets


def record(target: str, **paths: float) -> SupervisionRecord:
    """A target and its valid paths, by decisions behind a letter: `p102=0.5`."""
    valid = [
        WeightedPath(decisions=tuple(map(int, path[1:])), weight=weight)
        for path, weight in paths.items()
    ]
    return SupervisionRecord(
        question=target,
        optimal_layer_config=tuple(map(int, target)),
        answer="yes",
        valid_paths=tuple(valid),
    )


def test_each_layer_gets_the_share_of_the_weight_of_each_decision():
    [mix] = soft_targets([record("102", p102=1.0, p111=2.0, p101=1.0)])
    expected = [[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.75, 0.25]]
    assert mix.tolist() == expected


def test_a_target_without_valid_paths_keeps_its_decisions():
    _, hard = soft_targets([record("10", p10=1.0, p11=1.0), record("20")])
    assert hard.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]


def test_only_the_proportions_of_the_weights_count():
    one = soft_targets([record("10", p10=1.0, p11=3.0)])
    other = soft_targets([record("10", p10=1e-9, p11=3e-9)])
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("records", [[record("10")], [record("10", p10=2.0), record("11")]])
def test_targets_of_which_none_is_soft_are_refused(records):
    with pytest.raises(ConfigError, match="--soft-targets has no effect: no target has a valid"):
        check_soft_targets(records)
