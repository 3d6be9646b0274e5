from dataclasses import replace

import pytest
import torch
from small import make_features

from drllm.errors import RecordError
from drllm.training.features import CONSTANT, digest, moments, shape, sizes


def slow_moments(features, index):
    """Mean and deviation of every component, one layer and example at a time."""
    mean, square = torch.zeros(2, *features.means.shape[1::2]).double()  # [L, D]
    for row in index:
        windows = features.means[row, :, : int(features.filled[row])].double()  # [L, filled, D]
        mean += windows.mean(dim=1) / len(index)
        square += windows.square().mean(dim=1) / len(index)
    return mean, (square - mean.square()).sqrt()


@pytest.mark.parametrize("index", [list(range(70)), [3], [69, 2, 2, 40]], ids=["all", "1", "some"])
def test_moments_equal_the_slow_loop(index):
    features = make_features(70)
    mean, deviation = moments(features, index)
    expected_mean, expected_deviation = slow_moments(features, index)
    torch.testing.assert_close(mean, expected_mean, rtol=0, atol=1e-12)
    varies = expected_deviation > 1e-3
    torch.testing.assert_close(deviation[varies], expected_deviation[varies], rtol=0, atol=1e-9)


def test_a_component_that_does_not_vary_is_not_blown_up():
    features = make_features(20)
    means = features.means.clone()
    means[:, 1, :, 2] = 7.0
    means[:, 2] = 0.0
    whole = replace(features, means=means, filled=torch.full((20,), means.shape[2]))
    _, deviation = moments(whole, range(20))
    size = means[:, 1].double().square().mean().sqrt()
    assert float(deviation[1, 2]) == pytest.approx(CONSTANT * float(size))
    assert deviation[2].tolist() == [1.0] * means.shape[3]


def test_the_digest_tells_targets_apart_and_not_last_bits():
    features = make_features()
    labels = features.labels.clone()
    labels[0, 0] = (labels[0, 0] + 1) % 3
    assert digest(features) != digest(replace(features, labels=labels))
    assert digest(features) == digest(replace(features, means=features.means * 1.1))
    soft = torch.full((12, 3, 3), 1 / 3)
    softened = [replace(features, soft=soft), replace(features, soft=soft * 0.5)]
    assert len({digest(each) for each in (features, *softened)}) == 3


def test_sizes_are_of_each_target_and_layer():
    features = make_features(40)
    torch.testing.assert_close(sizes(features), features.means.abs().mean(dim=(2, 3)))
    assert shape(features) == (40, *features.means.shape[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_by_question(value):
    features = make_features(40)
    means = features.means.clone()
    means[35, 1, 0, 3] = value
    with pytest.raises(RecordError, match="features of question 'question 35' hold NaN or infin"):
        sizes(replace(features, means=means))
