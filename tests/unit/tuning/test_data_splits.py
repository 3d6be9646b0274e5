"""Which questions fit, choose and test."""

import pytest

from drllm.config import TuneConfig
from drllm.errors import ConfigError, TaskError
from drllm.records.codec import hash_values
from drllm.records.splits import find_split, part_by_hash, question_key
from drllm.records.static_paths import FIT, PARTS, SELECT, TEST
from drllm.tasks.base import NoSplitError, Task
from drllm.tasks.examples import Example, with_options
from drllm.tasks.files import FileTask
from drllm.tasks.registry import get_task
from drllm.tuning.beam import make_rungs
from drllm.tuning.data_splits import assign_part, split_task, split_tasks
from drllm.tuning.objectives import GOLD, KL, LOSS, choose_objective, make_prompt


class OneSet(Task):
    """A set of which only one split is there."""

    name = description = "one set"

    def __init__(self, num):
        self.num = num

    def examples(self, split, data_dir=None):
        if split != "test":
            raise NoSplitError(f"no {split}")
        return [with_options(f"question {i}", ("a", "b"), 0, str(i)) for i in range(self.num)]


def keys(examples):
    return {question_key(example.question) for example in examples}


@pytest.mark.parametrize("task", [get_task("builtin_facts"), OneSet(500)], ids=["facts", "one set"])
def test_no_question_is_in_two_parts(task):
    parts = split_task(task, None, 100, 0).examples
    assert sum(len(keys(parts[part])) for part in PARTS) == len(
        set.union(*(keys(parts[part]) for part in PARTS))
    )


def test_a_task_with_four_splits_is_fitted_on_search_and_tested_on_test():
    task = get_task("builtin_facts")
    found = split_task(task, None, 100, 0)
    search = task.examples("search")
    assert len(found.examples[FIT]) == 100
    assert keys(found.examples[FIT]) <= keys(search)
    assert found.examples[SELECT] == task.examples("select")
    assert found.examples[TEST] == task.examples("test")
    assert len(found.spare) == len(task.examples("fit")) + len(search) - 100
    assert not found.is_divided


def test_a_set_of_one_split_is_divided_by_its_texts():
    found = split_task(OneSet(2000), None, 10_000, 0)
    shares = [len(found.examples[part]) / 2000 for part in PARTS]
    assert found.is_divided
    assert shares == pytest.approx([0.2, 0.4, 0.4], abs=0.03)


def test_no_question_that_was_certified_or_tested_on_is_fitted_on_now():
    """Commit 3820ce17 divided a set of one split in four parts."""
    bounds = {FIT: 0.2, SELECT: 0.4, "certify": 0.6, TEST: 1.0}
    now = {FIT: FIT, SELECT: SELECT, "certify": SELECT, TEST: TEST}
    for example in OneSet(2000).examples("test"):
        before = part_by_hash(f"tune:{question_key(example.question)}", bounds)
        assert assign_part(example.question) == now[before]


def test_the_digest_of_a_tunings_questions_is_that_of_earlier_files():
    [divided] = split_tasks(TuneConfig(tasks="builtin_facts"))
    name, examples = divided.digest_values()
    assert (name, list(examples)) == ("builtin_facts", [FIT, SELECT, "certify", TEST])
    old = "c0454f7030fb317d9f579b5731e1a43aaeb61e5dc4c7432618645e52fc540380"
    assert hash_values([divided.digest_values()]) == old


def test_a_file_that_cannot_be_read_is_an_error_and_no_missing_split():
    class Broken(OneSet):
        def examples(self, split, data_dir=None):
            if split == "search":
                raise TaskError("train.jsonl, line 3: no JSON")
            return super().examples("test")

    with pytest.raises(TaskError, match="line 3"):
        split_task(Broken(2000), None, 100, 0)


def read_tasks(folder, *numbers):
    """Return tasks of files whose questions have these numbers."""
    tasks = []
    for place, own_numbers in enumerate(numbers):
        rows = [
            {"question": f"Is {n} even?", "choices": ["yes", "no"], "answer": n % 2}
            for n in own_numbers
        ]
        tasks.append(FileTask(folder / f"{place}.jsonl", (), enumerate(rows, 1)))
    return tasks


def overlapping_tasks(folder):
    """Return a task with four splits, and one without `fit`, which is divided by other hashes."""
    others = [n for n in range(60) if find_split(f"Is {n} even?", "own") != "fit"]
    return read_tasks(folder, range(400), others)


def test_no_question_of_a_task_is_in_an_earlier_part_of_another_one(tmp_path, caplog):
    tasks = overlapping_tasks(tmp_path)
    alone = [split_task(task, None, 10_000, 0) for task in tasks]
    assert [splits.is_divided for splits in alone] == [False, True]
    found = split_tasks(TuneConfig(num_fit=10_000), tasks)
    tested = set.union(*(keys(splits.examples[TEST]) for splits in found))
    chosen = set.union(*(keys(splits.examples[SELECT]) for splits in found))
    num_left_out = 0
    for before, after in zip(alone, found, strict=True):
        assert after.examples[TEST] == before.examples[TEST]
        assert not keys(after.examples[SELECT]) & tested
        for examples in (after.examples[FIT], after.spare, after.all_to_fit):
            assert not keys(examples) & (tested | chosen)
        assert keys(before.examples[FIT]) - keys(after.examples[FIT]) <= tested | chosen
        for part in (FIT, SELECT):
            num_left_out += len(before.examples[part]) - len(after.examples[part])
    [warning] = caplog.records
    assert num_left_out > 0
    assert warning.getMessage().endswith(f"tests paths on them: {num_left_out}")


def test_tasks_without_common_questions_are_divided_as_each_alone(tmp_path, caplog):
    tasks = read_tasks(tmp_path, range(200), range(200, 400))
    alone = [split_task(task, None, 20, 0).digest_values() for task in tasks]
    found = split_tasks(TuneConfig(num_fit=20), tasks)
    assert [splits.digest_values() for splits in found] == alone
    assert not caplog.records


def test_a_task_whose_questions_are_all_tested_on_by_another_one_is_refused(tmp_path):
    first, _ = overlapping_tasks(tmp_path)
    tested = keys(split_task(first, None, 10_000, 0).examples[TEST])
    numbers = [n for n in range(400) if f"is {n} even?" in tested]
    [second] = read_tasks(tmp_path, numbers)
    with pytest.raises(TaskError, match=r"another task .* in the part 'fit'; tune these"):
        split_tasks(TuneConfig(), [first, second])


def test_right_options_that_are_only_read_are_not_generated():
    facts, arithmetic = (
        split_task(get_task(name), None, 30, 0) for name in ("builtin_facts", "builtin_arithmetic")
    )
    assert not facts.is_generated(LOSS)
    assert arithmetic.is_generated(LOSS)
    assert not arithmetic.is_generated(KL)


def test_too_few_questions_are_refused_with_the_part_that_has_none():
    with pytest.raises(TaskError, match="part '"):
        split_task(OneSet(2), None, 100, 0)


def test_a_worked_solution_is_read_after_its_question():
    task = get_task("gsm8k")
    example = Example(question="How many?", answer="3", solution="1 + 2 = 3 #### 3")
    prompt = make_prompt(task, example, LOSS)
    assert prompt.text + prompt.continuations[0] == "Question: How many?\nAnswer: 1 + 2 = 3 #### 3"
    assert make_prompt(task, example, KL) == task.prompt(example, "boxed")


def prompts_alone(folder):
    file = folder / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "Say {i}."}}\n' for i in range(40)))
    return file


def test_prompts_alone_are_kept_near_the_full_path(tmp_path):
    task = get_task(str(prompts_alone(tmp_path)))
    config = TuneConfig()
    assert choose_objective(task, config) == KL
    [divided] = split_tasks(config, task)
    prompt = make_prompt(task, divided.examples[FIT][0], KL)
    assert (prompt.text, prompt.chat) == (divided.examples[FIT][0].question, True)


@pytest.mark.parametrize("settings", [{"objective": LOSS}, {"objective": GOLD}])
def test_what_needs_answers_is_refused_for_prompts_alone(tmp_path, settings):
    with pytest.raises(ConfigError, match="needs right answers"):
        split_tasks(TuneConfig(**settings), str(prompts_alone(tmp_path)))


def test_rungs_ask_more_and_more_questions_and_keep_fewer_paths():
    for num in (5, 24, 60, 300):
        sizes, kept = zip(*make_rungs(num, 2), strict=True)
        assert list(sizes) == sorted(set(sizes))
        assert sizes[-1] == num
        assert list(kept) == sorted(kept, reverse=True)
        assert kept[-1] == 2  # as wide as asked, with few questions too
