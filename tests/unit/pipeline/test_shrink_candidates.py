"""Which tuned paths are healed and measured."""

import pytest

from drllm.pipeline.shrink_candidates import choose_candidates, find_loss_increase
from drllm.records.results import StepRecord
from drllm.records.static_paths import NamedPath, PathScore, StaticPaths

FULL_LOSS = 3.0


def make_record(increases):
    """A tuning whose path without k layers has the k-th increase of its text's loss."""
    paths = [make_path(0, 0.0)]
    for number, increase in enumerate(increases, start=1):
        paths.append(make_path(number, increase))
    return StaticPaths(
        schema="drllm.paths",
        schema_version=1,
        drllm_version="0",
        created="",
        model={},
        config={},
        inputs={},
        libraries={},
        tasks=("sums",),
        objective={"sums": "next_token_loss"},
        num_layers=10,
        paths=tuple(paths),
    )


def make_path(num_skipped, increase):
    score = PathScore(
        task="sums", part="select", num_questions=9, objective=0.0, text_loss=FULL_LOSS + increase
    )
    return NamedPath(
        name=f"skip{num_skipped}" if num_skipped else "full",
        steps=tuple(StepRecord(layer=layer) for layer in range(10 - num_skipped)),
        executions=10 - num_skipped,
        measured=(score,),
        repaired=(score,) if num_skipped else (),
    )


def names(record, limit, number):
    return [path.name for path in choose_candidates(record, limit, number)]


def test_paths_beyond_hope_are_left_out():
    record = make_record([0.02, 0.1, 0.3, 0.9])
    assert names(record, 0.05, 4) == ["skip1", "skip2"]
    assert names(record, 0.15, 4) == ["skip1", "skip2", "skip3"]


def test_the_longest_path_is_healed_even_beyond_hope():
    assert names(make_record([0.9, 1.2]), 0.05, 3) == ["skip1"]


@pytest.mark.parametrize(
    ("number", "expected"),
    [(1, ["skip5"]), (2, ["skip2", "skip5"]), (3, ["skip2", "skip3", "skip5"])],
)
def test_candidates_lie_at_equal_distances(number, expected):
    assert names(make_record([0.01] * 5), 0.05, number) == expected


def test_the_increase_is_that_of_the_repaired_path():
    record = make_record([0.25])
    assert find_loss_increase(record, record.paths[1]) == pytest.approx(0.25)
