"""Work that is killed again and again ends with the files of an undisturbed run, and no others."""

import itertools
import shutil
from random import Random

import pytest

from interrupted_stages import STAGES, UndisturbedRun, assert_done, run_undisturbed
from killable_command import Operation, start_server

KINDS = ("seconds", "operation", "seconds", "deletion", "operation")
"""How the moments of the five kills of a round are drawn."""


def draw_moment(
    kind: str, undisturbed: UndisturbedRun, random: Random, round_number: int
) -> float | Operation:
    """Return when to kill a run: after so many seconds, or before an operation.

    Deletions are taken in turn, the last one first, since a stage ends with its clean-up.
    """
    if kind == "seconds":
        return random.uniform(0, undisturbed.seconds)
    if kind == "operation":
        return random.choice(undisturbed.operations)
    deletions = undisturbed.deletions
    return deletions[-1 - round_number % len(deletions)]


CASES = [
    pytest.param("search", ("operation", "deletion"), 1, id="search-twice"),
    *[
        pytest.param(name, KINDS, 4, id=f"{name}-20-times", marks=pytest.mark.thorough)
        for name in STAGES
    ],
]


@pytest.mark.parametrize(("name", "kinds", "num_rounds"), CASES)
def test_a_stage_killed_at_random_moments_ends_with_the_files_of_an_undisturbed_run(
    name, kinds, num_rounds, make_command, drllm
):
    stage = STAGES[name]
    start_server()
    undisturbed = run_undisturbed(stage, make_command("undisturbed"))
    killed = make_command("killed")
    random = Random(name)
    num_with_results = 0
    for round_number, kind in itertools.product(range(num_rounds), kinds):
        while not killed.run_and_kill(draw_moment(kind, undisturbed, random, round_number)):
            assert_done(stage, killed, undisturbed.contents, drllm)
            shutil.rmtree(killed.folder)
        num_with_results += any(killed.folder.glob(f"{stage.kept}*"))
    killed.run()
    assert_done(stage, killed, undisturbed.contents, drllm)
    assert num_with_results > 0, "no kill came in the midst of the work"
