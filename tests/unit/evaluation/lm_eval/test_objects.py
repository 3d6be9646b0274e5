"""Task objects: the harness asks, shows and grades with them exactly as with a task folder."""

import json
import random
from typing import Any

import pytest

from drllm.errors import TaskError
from drllm.evaluation.lm_eval.folders import make_task_folder
from drllm.evaluation.lm_eval.grading import choose_answer, compute_gold_logprob, grade_answers
from drllm.evaluation.lm_eval.leaves import QUESTIONS, WORKED_EXAMPLES, Leaf, describe_task
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.objects import make_task_objects
from drllm.evaluation.lm_eval.task import RenderedTask
from drllm.tasks.base import Function, Task
from drllm.tasks.graded import GradedTask
from drllm.tasks.harness import load_harness_tasks
from drllm.tasks.registry import get_task

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it imports

OURS = ("builtin_facts", "builtin_arithmetic", "dart-3", "options", "answers", "graded")
"""Tasks with prompts of our own, besides the published sets."""


@pytest.fixture(scope="module")
def lm(tiny_base):
    return RoutedLM(tiny_base(max_position_embeddings=4096))


@pytest.fixture
def make_task(sets, hub, tmp_path):
    """A function that returns a task by its name in this file."""

    def make(name: str) -> Task:
        if name == "dart-3":
            hub.files["hkust-nlp/dart-math-pool-math", None, "train"] = [
                {"query": f"What is {n}?", "gt_ans": str(n), "level": 3} for n in range(60)
            ]
        if name not in ("options", "answers", "graded"):
            return get_task(name)
        if name == "options":
            rows = [
                {"question": f"Day {n}? {{{{x}}}} é\n", "choices": ["1999-12-31", "a"], "answer": 1}
                for n in range(60)
            ]
        else:
            rows = [
                {"question": f"Day {n}?", "answer": f"20{n:02}-05-05", "grader": "exact"}
                for n in range(60)
            ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if name == "graded":
            code = tmp_path / "grade.py"
            code.write_text("def length(example, text):\n    return min(1.0, len(text) / 99)\n")
            return GradedTask(get_task(str(path)), f"{code}:length")
        return get_task(str(path))

    return make


@pytest.fixture
def render_both(lm, tmp_path):
    """A function that renders a task by way of task objects, and by way of a folder."""

    def render(task: Task, *, chat: bool, **settings: Any) -> tuple[RenderedTask, RenderedTask]:
        settings = {"split": "test", "limit": 8, "seed": 3, "data_dir": None, **settings}
        described, leaves = describe_task(task, **settings)
        by_object = RenderedTask(described, make_task_objects(leaves), lm, chat=chat)
        [in_folder], files = make_task_folder([task], **settings)
        assert described == in_folder
        files.write(tmp_path / "tasks")
        tasks = load_harness_tasks(str(tmp_path / "tasks" / f"{in_folder.harness_name}.yaml"))
        return by_object, RenderedTask(in_folder, tasks, lm, chat=chat)

    return render


def describe_instance(instance):
    fields = ("request_type", "doc", "arguments", "idx", "metadata", "repeats")
    return {name: getattr(instance, name) for name in fields}


def make_answers(task: RenderedTask) -> list[list[Any]]:
    """Make answers to a task's requests; about half of the generated ones are right."""
    rng = random.Random(0)
    if task.has_options:
        return [
            [(-rng.random(), rng.random() < 0.5) for _ in instances] for instances in task.instances
        ]
    answers = []
    for place, (leaf, _) in enumerate(task.keys):
        right = task.leaves[leaf].doc_to_target(task.docs[place])
        answers.append([right if place % 2 else "no idea"])
    return answers


def assert_equal(ours: RenderedTask, theirs: RenderedTask) -> None:
    assert ours.keys == theirs.keys
    assert ours.docs == theirs.docs
    assert [list(doc) for doc in ours.docs] == [list(doc) for doc in theirs.docs]
    assert ours.ids == theirs.ids
    for own, other in zip(ours.instances, theirs.instances, strict=True):
        assert list(map(describe_instance, own)) == list(map(describe_instance, other))
    assert ours.digest() == theirs.digest()
    assert ours.prompt_tokens == theirs.prompt_tokens
    places = range(len(ours.keys))
    if ours.has_options:
        assert ours.requests() == theirs.requests()
        assert [ours.golds(place) for place in places] == [theirs.golds(place) for place in places]
    assert [ours.text(place) for place in places] == [theirs.text(place) for place in places]
    answers = make_answers(ours)
    grades = grade_answers(ours, answers)
    assert grades == grade_answers(theirs, answers)
    assert len({grade[ours.task.metric] for grade in grades}) > 1, "the sample must be a test"
    for place, question_answers in enumerate(answers):
        for judge in (
            (choose_answer, compute_gold_logprob) if ours.has_options else (choose_answer,)
        ):
            assert judge(ours, place, question_answers) == judge(theirs, place, question_answers)


@pytest.mark.parametrize("num_fewshot", [None, 2])
def test_a_published_set_is_asked_shown_and_graded_as_by_way_of_a_folder(
    set_name, num_fewshot, make_task, render_both
):
    split = "select" if set_name == "gsm8k" else "test"
    assert_equal(
        *render_both(make_task(set_name), split=split, chat=False, num_fewshot=num_fewshot)
    )


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_a_task_of_ours_is_asked_shown_and_graded_as_by_way_of_a_folder(
    name, num_fewshot, make_task, render_both
):
    assert_equal(*render_both(make_task(name), chat=False, num_fewshot=num_fewshot))


@pytest.mark.parametrize("name", ["piqa", "mmlu", "squad_v2", "builtin_facts", "graded"])
def test_worked_examples_are_the_same_turns_of_a_chat(name, make_task, render_both):
    ours, theirs = render_both(make_task(name), chat=True, num_fewshot=2)
    assert_equal(ours, theirs)


def test_nothing_is_written(make_task, tmp_path):
    task = make_task("piqa")
    before = sorted(tmp_path.rglob("*"))
    make_task_objects(describe_task(task, split="test", limit=2, seed=0, data_dir=None)[1])
    assert sorted(tmp_path.rglob("*")) == before


def make_leaf(rows, **settings: Any) -> Leaf:
    settings = {
        "output_type": "generate_until",
        "doc_to_text": "q",
        "doc_to_target": "a",
    } | settings
    return Leaf(
        name="leaf", file="", rows={QUESTIONS: rows, WORKED_EXAMPLES: []}, settings=settings
    )


def test_texts_that_look_like_dates_stay_texts_and_missing_values_are_none():
    rows = [{"q": "2001-01-01", "a": "b"}, {"q": "1999-12-31", "a": "c", "more": 1}]
    [task] = make_task_objects([make_leaf(rows)]).values()
    assert list(task.eval_docs) == [{**rows[0], "more": None}, rows[1]]
    assert task.doc_to_text(task.eval_docs[0]) == "2001-01-01"


def test_functions_are_found_by_name_wherever_a_setting_has_one():
    metric = {"metric": "exact_match", "aggregation": Function("statistics.median")}
    leaf = make_leaf(
        [{"q": "?", "a": "b"}], metric_list=[metric], doc_to_target=Function("json.dumps")
    )
    [task] = make_task_objects([leaf]).values()
    assert task.aggregation()["exact_match"]([1, 2, 9]) == 2
    assert task.doc_to_target({"a": 1}) == '{"a": 1}'
    assert isinstance(metric["aggregation"], Function), "the settings stay as they are"


def test_rows_with_values_of_several_types_in_a_column_are_refused():
    with pytest.raises(TaskError, match="'leaf' has rows that can't be put into a table"):
        make_task_objects([make_leaf([{"q": "?", "a": "b"}, {"q": ["?"], "a": "c"}])])
