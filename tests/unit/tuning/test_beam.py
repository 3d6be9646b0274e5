"""The beam search, on objectives that are known."""

import itertools
import random

import numpy as np

from drllm.paths import StaticPath
from drllm.tuning.beam import Beam

L = 8


def skipped(path):
    return frozenset(range(L)) - set(path.layers)


def worth(path, seed=0):
    """An objective of single layers and pairs of them; the same for the same path."""
    rng = random.Random(seed)
    single = [rng.uniform(-0.5, 0.1) for _ in range(L)]
    pair = {two: rng.gauss(0, 0.02) for two in itertools.combinations(range(L), 2)}
    out = sorted(skipped(path))
    return sum(single[i] for i in out) + sum(pair[two] for two in itertools.combinations(out, 2))


def measure(paths, num_questions):
    return np.array([worth(path) for path in paths])


def levels(grows=lambda path: True, measure=measure, **options):
    given = {"num_layers": L, "width": 3, "max_saved": 4, "num_questions": 48}
    beam = Beam(**{**given, **options})
    return list(beam.levels(measure, grows))


def test_levels_save_more_and_more_up_to_the_maximum():
    assert [level.saved for level in levels()] == [1, 2, 3, 4]


def test_the_first_level_holds_the_best_single_skips():
    single = sorted((StaticPath(set(range(L)) - {i}) for i in range(L)), key=worth, reverse=True)
    assert levels()[0].paths == tuple(single[:3])


def test_a_wide_beam_finds_the_best_of_all_subsets():
    for level in levels(width=100):
        size = L - int(level.saved)
        every = [StaticPath(kept) for kept in itertools.combinations(range(L), size)]
        assert level.paths[0] == max(every, key=worth)


def test_a_beam_of_one_is_greedy_removal():
    path = StaticPath(range(L))
    for level in levels(width=1):
        left = [[s for s in path.layers if s != layer] for layer in path.layers]
        path = max(map(StaticPath, left), key=worth)
        assert level.paths == (path,)


def test_a_path_that_does_not_grow_is_edited_no_further():
    found = levels(grows=lambda path: 0 in skipped(path))
    assert all(0 in skipped(path) for level in found[1:] for path in level.paths)
    assert [level.saved for level in levels(grows=lambda path: False)] == [1]


def test_few_questions_drop_most_candidates_before_all_are_asked():
    asked = []

    def counted(paths, num_questions):
        asked.append((len(paths), num_questions))
        return measure(paths, num_questions)

    levels(measure=counted, num_questions=240, max_saved=1, width=1)
    assert asked == [(8, 30), (4, 80), (2, 240)]


def test_no_level_saves_more_than_the_maximum_or_every_layer():
    assert [level.saved for level in levels(max_saved=2)] == [1, 2]
    assert [level.saved for level in levels(max_saved=L + 3)] == list(range(1, L))
