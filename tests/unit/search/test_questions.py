"""Which questions are asked, in which blocks: limits, lengths, shards."""

from __future__ import annotations

import itertools
import json

import pytest

from drllm.config import SearchConfig
from drllm.errors import ConfigError, TaskError
from drllm.records import question_key
from drllm.search.questions import asked_of, blocks_of, in_shard, num_questions, parse_shard
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


# --- questions of several tasks ----------------------------------------------------------------


@pytest.fixture
def overlapping(tmp_path):
    """Two tasks of 60 questions, of which 30 are the same but for case and white space."""
    names = []
    for name, numbers, wording in (
        ("one", range(60), "What is {} plus 1?"),
        ("two", range(30, 90), " what is {}  plus 1?"),
    ):
        rows = [
            {"question": wording.format(n), "answer": n + 1, "grader": "exact"} for n in numbers
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        names.append(str(path))
    return [get_task(name) for name in names]


def keys(examples):
    return [question_key(example.question) for example in examples]


def test_a_question_of_two_tasks_is_asked_of_the_first_one(overlapping, caplog):
    first, second = (task.examples("search") for task in overlapping)
    shared = set(keys(first)) & set(keys(second))
    assert 0 < len(shared) < len(second)

    one, two = asked_of(overlapping, SearchConfig())
    assert (list(one.examples), one.copies) == (first, 0)
    assert list(two.examples) == [e for e in second if question_key(e.question) not in shared]
    assert two.copies == len(shared)

    blocks = blocks_of(overlapping, SearchConfig(block_size=4))
    in_order = sorted(
        (place, example.task, example.id)
        for block in blocks
        for place, example in zip(block.places, block.examples, strict=True)
    )
    assert [number for number, _, _ in in_order] == list(range(num_questions(blocks)))
    wanted = [(e.task, e.id) for e in (*one.examples, *two.examples)]
    assert [(task, name) for _, task, name in in_order] == wanted
    [warning] = caplog.records
    told = f"since an earlier task of this search has them too: {len(shared)}"
    assert warning.getMessage() == f"questions left out, {told}"


def test_a_task_of_copies_alone_has_no_block(overlapping, caplog):
    again = type(overlapping[0])(overlapping[0].path)
    again.name = "again"

    blocks = blocks_of([overlapping[0], again], SearchConfig())

    assert {block.task.name for block in blocks} == {"one"}
    assert num_questions(blocks) == len(overlapping[0].examples("search"))


def test_tasks_without_a_question_in_common_are_asked_in_silence(facts, caplog):
    blocks_of([facts, get_task("builtin_arithmetic")], SearchConfig())

    assert caplog.records == []


@pytest.mark.parametrize("limit", [None, 20])
def test_shards_leave_out_the_same_copies_as_the_whole(overlapping, limit):
    whole = asked_of(overlapping, SearchConfig(limit=limit))
    parts = [asked_of(overlapping, SearchConfig(limit=limit, shard=f"{n}/2")) for n in (1, 2)]

    for number, one in enumerate(whole):
        shards = [part[number] for part in parts]
        assert one.copies == sum(part.copies for part in shards)
        assert sorted(keys(one.examples)) == sorted(
            key for part in shards for key in keys(part.examples)
        )
    assert whole[1].copies > 0
