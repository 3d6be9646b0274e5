"""Questions that fail: how often they are tried, and what they leave alone."""

from __future__ import annotations

import json

import pytest

from drllm.config import SearchConfig
from drllm.errors import ModelError
from drllm.search.questions import Block
from drllm.search.retry import ATTEMPTS, given_up, searched

CONFIG = SearchConfig(num_simulations=4)


@pytest.fixture
def block(facts):
    return Block(0, facts, tuple(facts.examples("search")[:3]))


class Failing:
    """Fails the first forward passes of a model, as a device that runs full would."""

    def __init__(self, routed, error, times):
        self.error = error
        self.left = times
        self.hook = routed.model.get_input_embeddings().register_forward_pre_hook(self)

    def __call__(self, module, inputs):
        if self.left:
            self.left -= 1
            raise self.error

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


def rows(result):
    return [{**json.loads(line), "seconds": 0} for line in result.lines.splitlines()]


def test_a_block_without_failures_is_searched_at_once(routed, block):
    result = searched(routed, block, CONFIG)
    assert [example.id for example in block.examples] == [row["id"] for row in rows(result)]
    assert (result.tally.questions, result.tally.failed, result.tally.paths) == (3, 0, 15)


def test_a_passing_failure_sets_nothing_aside(routed, block):
    with Failing(routed, ModelError("full"), times=1):
        result = searched(routed, block, CONFIG)
    assert (result.tally.questions, result.tally.failed) == (3, 0)
    expected = rows(searched(routed, block, CONFIG))
    for row, wanted in zip(rows(result), expected, strict=True):
        decisions = [(path["decisions"], path["reward"]) for path in row["paths"]]
        assert decisions == [(path["decisions"], path["reward"]) for path in wanted["paths"]]


def test_a_question_is_tried_three_times_before_it_is_set_aside(routed, block):
    with Failing(routed, ModelError("full\n of it"), times=ATTEMPTS) as failing:
        result = searched(routed, block, CONFIG)
    assert failing.left == 0
    first, *others = [json.loads(line) for line in reversed(result.lines.splitlines())]
    assert first == {
        "id": block.examples[0].id,
        "task": "builtin_facts",
        "question": block.examples[0].question,
        "error": "ModelError: full of it",
        "attempts": ATTEMPTS,
    }
    assert all("paths" in row for row in others)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()])
def test_what_is_no_fault_of_a_question_ends_the_search(routed, block, error):
    with Failing(routed, error, times=1), pytest.raises(type(error)):
        searched(routed, block, CONFIG)


def test_a_block_that_is_given_up_names_every_question(block):
    result = given_up(block, "its worker process died", 3)
    assert [example.id for example in block.examples] == [row["id"] for row in rows(result)]
    assert (result.tally.questions, result.tally.failed) == (3, 3)
