"""Which questions are asked, in which blocks: limits, lengths, shards."""

from __future__ import annotations

import itertools

import pytest

from drllm.config import SearchConfig
from drllm.errors import ConfigError, TaskError
from drllm.search.questions import blocks_of, in_shard, num_questions, parse_shard
from drllm.tasks.base import choose, get_task


def ids(blocks):
    return [example.id for block in blocks for example in block.examples]


def test_every_question_is_in_one_block_of_its_task(facts):
    tasks = [facts, get_task("builtin_arithmetic")]
    blocks = blocks_of(tasks, SearchConfig(limit=9, block_size=4))
    assert [len(block.examples) for block in blocks] == [4, 4, 1, 4, 4, 1]
    assert list(range(6)) == [block.number for block in blocks]
    assert all({block.task.name} == {e.task for e in block.examples} for block in blocks)
    assert num_questions(blocks) == len(set(ids(blocks))) == 18


def test_questions_of_like_length_make_a_block(facts):
    blocks = blocks_of([facts], SearchConfig(block_size=5))
    for shorter, longer in itertools.pairwise(blocks):
        lengths = [
            [
                len(prompt.text) + sum(map(len, prompt.continuations))
                for prompt in (facts.prompt(e, "loglikelihood") for e in block.examples)
            ]
            for block in (shorter, longer)
        ]
        assert max(lengths[0]) <= min(lengths[1])


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("limit", [None, 40])
def test_shards_divide_the_questions(facts, parts, limit):
    whole = ids(blocks_of([facts], SearchConfig(limit=limit)))
    shards = [
        ids(blocks_of([facts], SearchConfig(limit=limit, shard=f"{part}/{parts}")))
        for part in range(1, parts + 1)
    ]
    assert sorted(whole) == sorted(itertools.chain(*shards))
    assert max(map(len, shards)) < 2.5 * len(whole) / parts


def test_a_task_without_questions_in_a_shard_is_left_out_of_it(facts):
    tasks = [facts, get_task("builtin_arithmetic")]

    def shards(seed):
        """Return the shards' questions by task, or None where all are in one shard."""
        drawn = [choose(task.examples("search"), 1, seed)[0] for task in tasks]
        if in_shard(drawn[0], 1, 2) == in_shard(drawn[1], 1, 2):
            return None
        configs = [SearchConfig(limit=1, seed=seed, shard=f"{part}/2") for part in (1, 2)]
        return [blocks_of(tasks, config) for config in configs]

    apart = next(filter(None, map(shards, range(20))))
    assert [num_questions(blocks) for blocks in apart] == [1, 1]
    assert apart[0][0].task is not apart[1][0].task


def test_a_shard_without_any_question_is_refused(facts):
    [example] = blocks_of([facts], SearchConfig(limit=1))[0].examples
    part = 1 if not in_shard(example, 1, 2) else 2
    with pytest.raises(TaskError, match=f"--shard {part}/2 holds no questions; give fewer"):
        blocks_of([facts], SearchConfig(limit=1, shard=f"{part}/2"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1/1", "has no effect; leave it out"),
        ("0/4", "the first is 1/4, the last 4/4"),
        ("5/4", "the first is 1/4, the last 4/4"),
        ("1/0", "at least two parts"),
        ("1", "give i/n, for example 1/8"),
        ("a/b", "give i/n"),
        ("-1/4", "give i/n"),
        ("1/4 ", "give i/n"),
        ("", "give i/n"),
    ],
)
def test_a_shard_that_makes_no_sense_is_refused(facts, text, says):
    with pytest.raises(ConfigError, match=says):
        parse_shard(text)
    with pytest.raises(ConfigError, match=says):
        blocks_of([facts], SearchConfig(shard=text))
