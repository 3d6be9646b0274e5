"""What a stage takes is said once, from its first block."""

import pytest
import torch

from drllm.work.first_block import FirstBlock, measure_memory
from notes import Notes


@pytest.mark.parametrize(
    ("seconds", "share", "expected"),
    [
        (3.0, 0.1, "at most 30 s, "),
        (3.0, 0.05, "at most 1 min, "),
        (6.1, 0.1, "at most 2 min, "),
        (60.0, 0.01, "at most 1 h 40 min, "),
        (2.5, 0.9, "at most 3 s, "),
    ],
)
def test_the_time_of_the_whole_is_that_of_the_block_by_its_share(seconds, share, expected):
    listener = Notes()
    FirstBlock(listener, torch.device("cpu")).finish(share, seconds)
    [line] = listener.texts
    assert line.startswith(expected)
    assert line.endswith(" GB of memory")


def test_memory_of_other_processes_is_not_named():
    listener = Notes()
    FirstBlock(listener, torch.device("meta")).finish(0.1, 3.0)
    assert listener.texts == ["at most 30 s"]


def test_a_stage_of_one_block_says_nothing():
    listener = Notes()
    FirstBlock(listener, torch.device("cpu")).finish(1.0, 2.5)
    assert listener.texts == []


def test_only_the_first_block_that_did_something_counts():
    listener = Notes()
    block = FirstBlock(listener, torch.device("cpu"))
    block.finish(0.0, 9.0)
    block.finish(0.5, 1.0)
    block.finish(0.5, 30.0)
    assert [line.partition(",")[0] for line in listener.texts] == ["at most 2 s"]


def test_the_memory_is_that_of_this_process():
    before = measure_memory(torch.device("cpu"))
    kept = torch.ones(2**24)
    assert measure_memory(torch.device("cpu")) - before > 0.9 * kept.nbytes


@pytest.mark.parametrize(
    ("max_seconds", "words"),
    [(None, "at most 30 min"), (7200.0, "at most 30 min"), (600.0, "about 10 min")],
)
def test_a_limit_of_time_is_named_if_the_work_would_take_longer(max_seconds, words):
    listener = Notes()
    FirstBlock(listener, torch.device("meta"), max_seconds).finish(0.1, 180.0)
    [note] = listener.texts
    assert words in note
