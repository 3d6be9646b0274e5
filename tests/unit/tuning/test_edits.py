"""The edits of a path."""

from drllm.paths import StaticPath
from drllm.tuning.beam import skip_one_layer


def test_every_layer_can_be_skipped_once():
    assert {path.layers for path in skip_one_layer(StaticPath(range(3)))} == {
        (0, 1),
        (0, 2),
        (1, 2),
    }


def test_the_last_layer_is_never_skipped():
    assert list(skip_one_layer(StaticPath([3]))) == []
