"""The table of scores: what is missing is scored in blocks, once, by whoever runs them."""

import dataclasses

import pytest

from drllm.models.scoring.score import Request
from drllm.paths import StaticPath
from drllm.tasks.examples import Prompt
from drllm.tuning import score_table
from drllm.tuning.objectives import GOLD, LOSS
from drllm.tuning.path_scorer import Item, PathScores
from drllm.tuning.score_blocks import AnswerGrades, PromptsToAnswer
from drllm.tuning.score_table import PathsOnPart, ScoreTable
from drllm.tuning.task_questions import TEXTS_OF, TaskQuestions
from drllm.work.store import ResultStore

FULL = StaticPath(range(4))
SHORT = StaticPath([0, 1, 3])


def value(path, item):
    """A score that tells the path and the question."""
    return -float(len(path.layers)) - len(item.request.context) / 100


class PretendedExecutor:
    """Runs blocks without a model, the last one first, as two workers on one machine."""

    num_workers = 2
    num_sharing = 2

    def __init__(self):
        self.blocks = []

    def run(self, blocks, function, keep=None, on_step=None):
        for block in reversed(blocks):
            self.blocks.append(block)
            if isinstance(block.data, PromptsToAnswer):
                grades = [len(prompt.text) / 10 for prompt in block.data.prompts]
                yield block, AnswerGrades(grades=grades, seconds=5.0)
                continue
            self.state_cache_gb = function.state_cache_gb
            rows = [[value(path, item) for item in block.data.items] for path in block.data.paths]
            right = [[1.0] * len(row) for row in rows] if block.data.objective == GOLD else []
            yield block, PathScores(objective=rows, right=right, seconds=3.0)


def make_task(objective=GOLD, name="toy", number=0):
    lengths = [7, 3, 9, 1, 5]
    items = [Item(Request((1,) * length, [(2,)])) for length in lengths]
    prompts = [Prompt(text="x" * length, reward="exact", answer="") for length in lengths]
    return TaskQuestions(
        key=f"{name} {number}",
        name=name,
        objective=objective,
        is_divided=False,
        chance=0.0,
        items={"fit": items, TEXTS_OF + "test": items[:2], "test": items},
        prompts={"test": prompts} if objective == LOSS else {},
    )


@pytest.fixture
def executor():
    return PretendedExecutor()


@pytest.fixture
def reports():
    return []


@pytest.fixture
def table(executor, reports, tmp_path, monkeypatch):
    monkeypatch.setattr(score_table, "MOST_PAIRS", 4)
    monkeypatch.setattr(score_table, "MOST_ANSWERS", 2)
    store = ResultStore(tmp_path / "kept", {}, stage="tuning")
    return ScoreTable(executor, store, 8.0, lambda *report: reports.append(report))


def expected(task, path, num=5):
    return [value(path, item) for item in task.items["fit"][:num]]


def test_scores_stand_at_their_questions_whatever_the_order_of_the_blocks(table, executor):
    task = make_task()
    table.fill([PathsOnPart(task, "fit", [FULL, SHORT])])
    assert table.objective(task, "fit", FULL) == expected(task, FULL)
    assert table.compare(task, "fit", SHORT, FULL) == pytest.approx([1.0] * 5)
    assert table.grades(task, "fit", SHORT) == [1.0] * 5
    lengths = [len(item.request.context) for b in executor.blocks[::-1] for item in b.data.items]
    assert lengths == sorted(lengths), "a block has questions of like length"
    assert [block.size for block in executor.blocks] == [2, 4, 4]


def test_further_questions_are_scored_beside_those_that_are_there(table, executor, reports):
    task = make_task()
    table.fill([PathsOnPart(task, "fit", [SHORT], limit=2)])
    assert table.objective(task, "fit", SHORT) == expected(task, SHORT, 2)
    requests = [PathsOnPart(task, "fit", [FULL, SHORT, SHORT])]
    executor.blocks.clear()
    table.fill(requests)
    assert table.objective(task, "fit", SHORT) == expected(task, SHORT)
    assert sum(block.size for block in executor.blocks) == 5 + 3
    assert sum(report[0] for report in reports) == 2 * 5
    executor.blocks.clear()
    table.fill(requests)
    assert not executor.blocks
    assert reports[0][2] == "scoring 1 path"


def test_a_killed_run_scores_only_what_is_not_kept(table, executor, reports):
    task = make_task()
    requests = [PathsOnPart(task, "fit", [FULL])]
    table.fill(requests)
    later = ScoreTable(executor, table._store, None, lambda *report: reports.append(report))
    num_blocks = len(executor.blocks)
    later.fill(requests)
    assert len(executor.blocks) == num_blocks
    assert later.objective(task, "fit", FULL) == table.objective(task, "fit", FULL)
    assert later.seconds == table.seconds == num_blocks * 3.0 / executor.num_workers


def test_two_tasks_of_one_name_have_scores_of_their_own(table):
    one, two = make_task(), make_task(number=1)
    two = dataclasses.replace(two, items={"fit": one.items["fit"][::-1]})
    table.fill(PathsOnPart(task, "fit", [FULL]) for task in (one, two))
    assert table.objective(one, "fit", FULL) == table.objective(two, "fit", FULL)[::-1]


def test_workers_of_one_machine_share_the_cache_of_states(table, executor):
    table.fill([PathsOnPart(make_task(), "fit", [FULL])])
    assert executor.state_cache_gb == 4.0


def test_answers_are_graded_along_each_path_once(table, executor, reports):
    task = make_task(LOSS)
    requests = [PathsOnPart(task, "test", [FULL, SHORT])]
    table.fill_grades(requests)
    assert table.grades(task, "test", SHORT) == [0.7, 0.3, 0.9, 0.1, 0.5]
    assert [len(block.data.prompts) for block in executor.blocks] == [1, 2, 2] * 2
    assert reports[-1] == (2, table.seconds, "answering along one path, question 5 of 5")
    assert table.seconds == len(executor.blocks) * 5.0 / executor.num_workers
    executor.blocks.clear()
    table.fill_grades(requests)
    assert not executor.blocks


def test_without_options_or_answers_there_are_no_grades(table):
    task = make_task("kl")
    table.fill([PathsOnPart(task, "test", [FULL])])
    assert table.grades(task, "test", FULL) == []


def test_texts_are_scored_by_their_loss(table, executor):
    table.fill([PathsOnPart(make_task(), TEXTS_OF + "test", [FULL])])
    assert {block.data.objective for block in executor.blocks} == {LOSS}
