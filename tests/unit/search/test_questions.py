"""Which questions are asked, in which blocks: limits, lengths, shards."""

import itertools
from dataclasses import replace
from hashlib import sha256

import pytest

import drllm
from drllm.config import SearchConfig
from drllm.errors import ConfigError, TaskError
from drllm.records.splits import question_key
from drllm.search.questions import Shard, collect_questions, is_in_shard, split_into_batches
from drllm.tasks.examples import choose
from drllm.tasks.registry import get_task


def ids(questions):
    return [question.example.id for question in questions]


def test_every_question_is_in_one_batch_of_its_task(facts):
    tasks = [facts, get_task("builtin_arithmetic")]
    questions = collect_questions(tasks, SearchConfig(limit=9))
    batches = split_into_batches(questions, 4)
    assert [len(batch.questions) for batch in batches] == [4, 4, 1, 4, 4, 1]
    assert list(range(6)) == [batch.number for batch in batches]
    assert all({batch.task} == {q.example.task for q in batch.questions} for batch in batches)
    joined = [question for batch in batches for question in batch.questions]
    assert sorted(joined, key=lambda question: question.place) == questions
    assert [question.place for question in questions] == list(range(18))


def test_a_data_folder_that_is_none_is_refused_where_examples_are_given_too(facts):
    config = SearchConfig(data_dir="no/such/folder")
    with pytest.raises(TaskError, match="--data-dir no/such/folder is not a folder"):
        collect_questions(facts.examples("search")[:2], config)


def test_questions_of_like_length_make_a_batch(facts):
    batches = split_into_batches(collect_questions([facts], SearchConfig()), 5)
    lengths = [
        [len(q.prompt.text) + sum(map(len, q.prompt.continuations)) for q in batch.questions]
        for batch in batches
    ]
    assert all(max(a) <= min(b) for a, b in itertools.pairwise(lengths))


def test_examples_are_asked_as_their_tasks_ask_them(facts):
    tasks = [facts, get_task("builtin_arithmetic")]
    examples = [example for task in tasks for example in task.examples("search")[:3]]
    asked = collect_questions(examples, SearchConfig())
    assert [question.example for question in asked] == examples
    assert [question.prompt.reward for question in asked] == ["loglikelihood"] * 3 + ["boxed"] * 3


def test_questions_without_ids_get_them_from_their_texts(facts):
    examples = [replace(example, id="") for example in facts.examples("search")[:4]]
    found = ids(collect_questions(examples, SearchConfig()))
    assert found == [sha256(example.question.encode()).hexdigest()[:16] for example in examples]
    assert ids(collect_questions(examples[1:2], SearchConfig())) == found[1:2]


@pytest.mark.parametrize("same_id", ["7", ""])
def test_two_questions_of_a_task_with_the_same_id_are_refused(facts, same_id):
    first, second = (replace(each, id=same_id) for each in facts.examples("search")[:2])
    if not same_id:
        second = replace(second, question=first.question)
    with pytest.raises(TaskError, match="two questions of task 'builtin_facts' have the id"):
        collect_questions([first, second], SearchConfig())


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("limit", [None, 40])
def test_shards_divide_the_questions(facts, parts, limit):
    whole = ids(collect_questions([facts], SearchConfig(limit=limit)))
    shards = [
        ids(collect_questions([facts], SearchConfig(limit=limit, shard=f"{part}/{parts}")))
        for part in range(1, parts + 1)
    ]
    assert sorted(whole) == sorted(itertools.chain(*shards))
    assert max(map(len, shards)) < 2.5 * len(whole) / parts


def test_a_task_without_questions_in_a_shard_is_left_out_of_it(facts):
    tasks = [facts, get_task("builtin_arithmetic")]

    def shards(seed):
        """Return the shards' questions by task, or None where all are in one shard."""
        drawn = [choose(task.examples("search"), 1, seed)[0] for task in tasks]
        if is_in_shard(drawn[0], Shard(1, 2)) == is_in_shard(drawn[1], Shard(1, 2)):
            return None
        configs = [SearchConfig(limit=1, seed=seed, shard=f"{part}/2") for part in (1, 2)]
        return [collect_questions(tasks, config) for config in configs]

    apart = next(filter(None, map(shards, range(20))))
    assert [len(questions) for questions in apart] == [1, 1]
    assert apart[0][0].task != apart[1][0].task


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1/1", "has no effect; leave it out"),
        ("0/4", "give i/n with i from 1 to n"),
        ("5/4", "give i/n with i from 1 to n"),
        ("1/0", "give i/n"),
        ("1", "give i/n .*, for example 1/8"),
        ("a/b", "give i/n"),
        ("-1/4", "give i/n"),
        ("1/4 ", "give i/n"),
    ],
)
def test_a_shard_that_makes_no_sense_is_refused(facts, text, message):
    with pytest.raises(ConfigError, match=message):
        collect_questions([facts], SearchConfig(shard=text))


def test_prompts_without_answers_cannot_be_searched_without_kl(write_rows):
    file = write_rows("prompts", [{"prompt": f"Say {n}."} for n in range(20)])
    asked = collect_questions(str(file), SearchConfig())
    assert {(question.prompt.reward, question.retests) for question in asked} == {("kl", ())}
    with pytest.raises(ConfigError, match="--no-kl leaves no reward for prompts"):
        collect_questions(str(file), SearchConfig(kl=False))


@pytest.fixture
def overlapping(write_rows):
    """Two tasks of 60 questions, of which 30 are the same but for case and white space."""
    names = []
    for name, numbers, wording in (
        ("one", range(60), "What is {} plus 1?"),
        ("two", range(30, 90), " what is {}  plus 1?"),
    ):
        rows = [
            {"question": wording.format(n), "answer": n + 1, "grader": "exact"} for n in numbers
        ]
        names.append(str(write_rows(name, rows)))
    return [get_task(name) for name in names]


def keys(examples):
    return [question_key(example.question) for example in examples]


def test_a_question_of_two_tasks_is_asked_of_the_first_one(overlapping, caplog):
    first, second = (task.examples("search") for task in overlapping)
    shared = set(keys(first)) & set(keys(second))
    assert 0 < len(shared) < len(second)
    collect_questions([overlapping[0], get_task("builtin_facts")], SearchConfig())
    asked = collect_questions(overlapping, SearchConfig())
    left = [e for e in second if question_key(e.question) not in shared]
    assert [question.example for question in asked] == [*first, *left]
    [warning] = caplog.records  # none where tasks have no question in common
    assert warning.getMessage().endswith(f"has them too: {len(shared)}")


@pytest.mark.parametrize("limit", [None, 20])
def test_shards_leave_out_the_same_copies_as_the_whole(overlapping, limit):
    whole = collect_questions(overlapping, SearchConfig(limit=limit))
    parts = [
        collect_questions(overlapping, SearchConfig(limit=limit, shard=f"{n}/2")) for n in (1, 2)
    ]

    def places(questions):
        return sorted((question.task, question.example.id) for question in questions)

    assert places(whole) == places([*parts[0], *parts[1]])


def test_an_item_that_is_no_question_is_refused_and_not_left_out(facts):
    with pytest.raises(TaskError, match=r"the questions hold 'builtin_sums' \(str\); give"):
        collect_questions([facts, "builtin_sums"], SearchConfig())


def test_collected_questions_and_a_task_are_not_searched_as_the_questions_alone(facts):
    questions = collect_questions([facts], SearchConfig(limit=2))
    with pytest.raises(TaskError, match=r"\(SearchQuestion\); give a list of tasks"):
        drllm.search_paths("no/model", [*questions, facts])
