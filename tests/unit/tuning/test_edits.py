"""The edits of a path."""

from drllm.paths import ATTENTION, MLP, StaticPath, Step
from drllm.tuning.beam import LAYERS, SUBLAYERS, repeats, skips


def test_every_layer_can_be_skipped_once():
    full = StaticPath(range(3))
    assert {path.steps for path in skips(full, LAYERS)} == {(0, 1), (0, 2), (1, 2)}


def test_with_sublayers_the_attention_or_the_mlp_of_a_whole_layer_can_be_skipped():
    path = StaticPath([0, Step(1, MLP)])
    assert {found.steps for found in skips(path, SUBLAYERS)} == {
        (Step(1, MLP),),
        (0,),
        (Step(0, ATTENTION), Step(1, MLP)),
        (Step(0, MLP), Step(1, MLP)),
    }


def test_the_last_step_is_never_skipped():
    assert list(skips(StaticPath([3]), LAYERS)) == []


def test_what_was_repeated_is_not_skipped():
    path = StaticPath([0, 1, Step(1, scale=0.5)])
    assert [found.steps for found in skips(path, LAYERS)] == [(1, Step(1, scale=0.5))]


def test_blocks_of_one_to_seven_layers_are_repeated_at_three_weights():
    found = list(repeats(10))
    sizes = {len(path.steps) - 10 for path in found}
    assert sizes == set(range(1, 8))
    assert len(set(found)) == len(found) == 3 * sum(10 - size + 1 for size in sizes)
    assert StaticPath([0, 1, 2, Step(1, scale=0.5), Step(2, scale=0.5), *range(3, 10)]) in found
