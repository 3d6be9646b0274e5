"""What an evaluation keeps of its systems and blocks, whatever interrupts it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drllm.errors import RecordError
from drllm.evaluation.blocks import Answered, blocks_of, joined
from drllm.evaluation.partial import Partial
from drllm.evaluation.systems import System

PLAN = {"config": {"seed": 0}}
BLOCKS = blocks_of([1] * 7, least=2, batch_size=1)
NAMES = ("arc: base", "arc: routed at 10 % saved", "arc: routed at 10.% saved")


class BrokenOffError(Exception):
    """Stands for a kill between two questions."""


class Asking:
    """Asks numbers instead of questions, and is interrupted before some of its calls.

    Args:
        breaks: Numbers of the calls, from 0, that are interrupted.
    """

    def __init__(self, breaks=frozenset()):
        self.breaks = breaks
        self.calls = 0
        self.asked = []

    def __call__(self, name, block, decided):
        if (call := self.calls) in self.breaks:
            self.calls += 1
            raise BrokenOffError
        self.calls += 1
        self.asked.append((name, block.number))
        answers = [
            [(crc32(f"{name} {decided}".encode()) / 7 + place / 3, False)] for place in block.places
        ]
        return Answered([answers], [[(1, place) for place in block.places]], seconds=call * 0.1)

    def system(self, name, decided="a plan"):
        """Return what runs a system."""

        def run(keep):
            found = joined(
                BLOCKS,
                [
                    keep(block, [decided], lambda block=block: self(name, block, decided))
                    for block in BLOCKS
                ],
            )
            gold = [answer for [(answer, _)] in found.answers[0]]
            return System(name, routes=found.routes, gold_logprob=gold, seconds=found.seconds)

        return run


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json"))


@settings(max_examples=25, deadline=None)  # every block is a file that is waited for
@given(st.sets(st.integers(0, 3 * len(BLOCKS) + 6), max_size=8))
def test_wherever_it_is_interrupted_no_block_is_asked_twice_and_the_outcome_is_the_same(breaks):
    unbroken = Asking()
    with TemporaryDirectory() as folder:
        expected = [Partial(Path(folder), PLAN).once(n, unbroken.system(n)) for n in NAMES]
    asking = Asking(breaks)
    with TemporaryDirectory() as folder:
        while True:
            partial = Partial(Path(folder) / "partial", PLAN)  # as a new start does
            try:
                found = [partial.once(name, asking.system(name)) for name in NAMES]
            except BrokenOffError:
                continue
            break
    assert asking.asked == unbroken.asked
    for each, other in zip(found, expected, strict=True):
        assert asdict(each) | {"seconds": 0} == asdict(other) | {"seconds": 0}
        assert all(isinstance(row, tuple) for row in each.routes[0])


def test_seconds_are_added_up_over_the_blocks_whenever_they_ran(tmp_path):
    asking = Asking(breaks={2})
    partial = Partial(tmp_path, PLAN)
    with pytest.raises(BrokenOffError):
        partial.once("base", asking.system("base"))
    system = Partial(tmp_path, PLAN).once("base", asking.system("base"))
    assert system.seconds == pytest.approx(0.1 * (0 + 1 + 3 + 4))  # the call of number 2 broke


def test_a_block_that_is_decided_otherwise_is_asked_again(tmp_path):
    first = Asking(breaks={3})
    with pytest.raises(BrokenOffError):
        Partial(tmp_path, PLAN).once("base", first.system("base", "a plan"))
    again = Asking()
    system = Partial(tmp_path, PLAN).once("base", again.system("base", "another"))
    assert len(again.asked) == len(BLOCKS)
    alone = Partial(tmp_path / "alone", PLAN).once("base", Asking().system("base", "another"))
    assert system.gold_logprob == alone.gold_logprob


def test_a_system_that_is_done_leaves_one_file_and_progress_moves_inside_of_it(tmp_path):
    partial, shares = Partial(tmp_path, PLAN), []
    partial.once("base", Asking().system("base"), shares.append)
    assert shares == pytest.approx([(number + 1) / len(BLOCKS) for number in range(len(BLOCKS))])
    [name, plan] = files(tmp_path)
    assert name.startswith("base-")
    assert plan == "plan.json"
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    partial.remove()
    assert not tmp_path.exists()


@pytest.mark.parametrize(
    "content", ["", '{"answers": [[', "[]", '{"answers": [[]], "routes": [], "seconds": 1}', "\xff"]
)
def test_a_broken_file_is_one_error_that_names_it(tmp_path, content):
    asking = Asking(breaks={2})
    with pytest.raises(BrokenOffError):
        Partial(tmp_path, PLAN).once("base", asking.system("base"))
    broken = next(path for path in tmp_path.glob("base-*/00001-*.json"))
    broken.write_bytes(content.encode("latin-1"))
    with pytest.raises(RecordError, match="is broken") as error:
        Partial(tmp_path, PLAN).once("base", asking.system("base"))
    assert str(broken) in str(error.value)
    assert "\n" not in str(error.value)
    broken.unlink()
    Partial(tmp_path, PLAN).once("base", asking.system("base"))
    assert [block for _, block in asking.asked] == [0, 1, 1, 2, 3]


def test_a_broken_system_is_one_error_that_names_it(tmp_path):
    Partial(tmp_path, PLAN).once("base", Asking().system("base"))
    [file] = tmp_path.glob("base-*.json")
    file.write_text('{"name": "base", "colour": 1}')
    with pytest.raises(RecordError, match=r"base-\w+\.json is broken \(.*colour"):
        Partial(tmp_path, PLAN).once("base", Asking().system("base"))


def test_what_another_evaluation_has_done_is_refused(tmp_path):
    Partial(tmp_path, PLAN).once("base", Asking().system("base"))
    with pytest.raises(RecordError, match=r"another evaluation .*other settings"):
        Partial(tmp_path, {"config": {"seed": 1}})


def test_other_questions_by_the_same_name_are_refused(tmp_path):
    partial = Partial(tmp_path, PLAN)
    partial.check_questions("arc, all of test", "aa")
    partial.check_questions("arc, all of select", "bb")
    partial.once("base", Asking().system("base"))
    again = Partial(tmp_path, PLAN)
    again.check_questions("arc, all of test", "aa")
    with pytest.raises(RecordError, match=r"other questions of arc, all of select"):
        again.check_questions("arc, all of select", "cc")


def test_a_start_that_came_to_nothing_stands_in_nobodys_way(tmp_path):
    partial = Partial(tmp_path / "partial", PLAN)
    partial.check_questions("arc, all of test", "aa")
    with pytest.raises(BrokenOffError):
        partial.once("base", Asking(breaks={0}).system("base"))
    assert not (tmp_path / "partial").exists()
    Partial(tmp_path / "partial", {"config": {"seed": 1}})


def test_candidates_are_measured_once_even_where_the_evaluation_is_interrupted(tmp_path):
    asked = []

    def measure(candidates):
        asked.append(candidates)
        return [sum(candidate) / 7 for candidate in candidates]

    first, second = [(1, 0, 1), (1, 1, 0)], [(1, 0, 1), (0, 1, 0)]
    for _ in range(2):  # each time as after an interruption
        partial = Partial(tmp_path, PLAN)
        assert partial.values("arc by answers", first, measure) == [2 / 7, 2 / 7]
        assert partial.values("arc by answers", second, measure) == [2 / 7, 1 / 7]
        assert partial.values("arc by loss", first, measure) == [2 / 7, 2 / 7]
    assert asked == [first, second, first]


@pytest.mark.parametrize("content", ["", "[0.5]", '["a", 1]', "3"])
def test_broken_values_of_candidates_are_one_error_that_names_the_file(tmp_path, content):
    Partial(tmp_path, PLAN).values("arc by loss", [(1, 0), (0, 1)], lambda _: [0.5, 0.25])
    [file] = tmp_path.glob("arc-by-loss-*.json")
    file.write_text(content)
    with pytest.raises(RecordError, match=r"arc-by-loss-\w+\.json is broken"):
        Partial(tmp_path, PLAN).values("arc by loss", [(1, 0), (0, 1)], lambda _: [0.5, 0.25])
