"""Tasks of the harness itself: asked and scored as it does, question by question."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from drllm.config import EvaluateConfig
from drllm.errors import TaskError
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.task import draw_stock_task
from drllm.evaluation.questions import select_tasks
from drllm.evaluation.stage import evaluate
from drllm.records.results import read_results
from drllm.tasks.harness import LmEvalTask
from harness_files import GENERATED, OPTIONS, ROWS, written_task
from slow_way import routers_for


@pytest.fixture(scope="module")
def base(tiny_base):
    return tiny_base(max_position_embeddings=1024)


@pytest.fixture
def task_file(tmp_path):
    """A function that writes a task file of the harness, and returns its name."""

    def write(settings, rows=ROWS, **changes: Any):
        return written_task(tmp_path, settings, {"test": rows}, **changes)

    return write


def config_of(tasks, **values: Any):
    few = {"num_texts": 4, "baselines": "permuted-routes", "trust_task_code": True, **values}
    return EvaluateConfig(tasks=tasks, **few)


@pytest.mark.usefixtures("no_environment_report")
@pytest.mark.parametrize("settings", [OPTIONS, GENERATED])
def test_base_scores_what_the_harness_scores_and_every_system_has_every_question(
    settings, base, task_file, tmp_path
):
    name = task_file(settings)
    config = config_of(name, num_random_draws=2)
    [result] = evaluate(
        base, config=config, output_dir=tmp_path / "eval", routers=routers_for(base)
    )
    lm, manager = RoutedLM(base, batch_size=4), TaskManager(include_defaults=False)
    try:
        theirs = simple_evaluate(lm, tasks=[name], task_manager=manager, bootstrap_iters=0)
    finally:
        lm.routed.detach()
    assert theirs is not None
    metric = "exact_match" if settings is GENERATED else "acc"
    expected = theirs["results"][settings["task"]]
    assert (result.task, result.num_questions, result.metric) == (settings["task"], 12, metric)
    assert result.num_fewshot == settings.get("num_fewshot", 0)
    assert result.base.metrics == {
        metric["metric"]: pytest.approx(expected[f"{metric['metric']},none"])
        for metric in settings["metric_list"]
    }
    assert [system.name for system in result.systems] == ["base", "routed", "permuted routes"]
    [read] = read_results(tmp_path / "eval")
    assert len({sample.id for sample in read.samples}) == 12
    first = read.samples[0]
    assert first.question.startswith("Is 0 larger than 0?")
    assert first.choices == (("no", "yes") if settings is OPTIONS else ())


def test_a_limit_draws_questions_and_any_of_several_right_options_counts(base, task_file, tmp_path):
    name = task_file(OPTIONS, [{**row, "yes": "[0, 1]"} for row in ROWS])
    config = config_of(name, limit=5, baselines="none", num_fewshot=0)
    [result] = evaluate(base, config=config, routers=routers_for(base))
    assert (result.num_questions, result.num_fewshot) == (5, 0)
    assert result.base.accuracy == 1
    assert result.base.gold_logprob == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_type": "loglikelihood_rolling"}, "is of kind loglikelihood_rolling"),
        ({"unsafe_code": True}, "runs code"),
    ],
)
def test_what_an_evaluation_does_not_do_is_refused_by_name(changes, message, task_file):
    with pytest.raises(TaskError, match=message):
        LmEvalTask(task_file(OPTIONS, **changes))


def test_a_group_is_all_of_its_tasks_or_refused_with_their_names(task_file, tmp_path):
    for settings in (OPTIONS, {**OPTIONS, "task": "again"}, GENERATED):
        task_file(settings)

    def group(*names):
        path = tmp_path / "group.yaml"
        path.write_text(yaml.safe_dump({"group": "both", "task": [*names]}))
        return LmEvalTask(str(path))

    task = draw_stock_task(group("larger", "again"), None, None, 0, None)
    assert task.leaves == {"larger": 12, "again": 12}
    with pytest.raises(TaskError, match="name one of larger, says"):
        group("larger", "says")


def test_nothing_is_fitted_on_questions_that_are_reported(tmp_path, base):
    train = [{**row, "q": f"Say: {row['q']}"} for row in ROWS]
    name = written_task(tmp_path, OPTIONS, {"train": train, "test": ROWS})
    for values in ({"split": "select"}, {"curve": "0.1"}):
        with pytest.raises(TaskError, match="has only test questions"):
            select_tasks(config_of(name, **values))


def test_a_set_that_is_reported_whole_is_asked_in_part_where_routers_learned_from_it(
    base, task_file
):
    name, routers = task_file(OPTIONS), routers_for(base)
    routers.config = replace(routers.config, training={"tasks": {"larger": 6}})
    [result] = evaluate(base, config=config_of(name, baselines="none"), routers=routers)
    assert result.num_questions == len(LmEvalTask(name).examples("test")) < 12
    assert "others are to be fitted on" in " ".join(result.notes)


@pytest.mark.thorough  # lists thousands of files
def test_an_unknown_name_and_a_set_that_cannot_be_reached_are_one_line_each(monkeypatch, capfd):
    with pytest.raises(TaskError, match=r"'boolqq'.*'boolq'"):
        select_tasks(config_of("boolqq"))

    def unreached(*_: Any, **__: Any):
        logging.getLogger("huggingface_hub").warning("Retrying in 1s")
        raise ConnectionError("Couldn't reach the Hub\n(offline)")

    monkeypatch.setattr(ConfigurableTask, "download", unreached)
    with pytest.raises(TaskError, match="'boolq' of the harness can't be loaded") as caught:
        select_tasks(config_of("boolq"))
    assert "\n" not in str(caught.value)
    assert "Retrying" not in "".join(capfd.readouterr())
