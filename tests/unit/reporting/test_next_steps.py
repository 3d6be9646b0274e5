"""What a report advises next, as commands that can be pasted."""

import dataclasses
import math
import shlex
import subprocess
from typing import Any

import pytest
from msgspec.structs import replace

from drllm.cli.parser import parse
from drllm.config import (
    EvaluateConfig,
    ModelConfig,
    SearchConfig,
    SuperviseConfig,
    TrainConfig,
    TuneConfig,
)
from drllm.records.results import StepRecord
from drllm.reporting.commands import SETTINGS_FILE, evaluate_command
from drllm.reporting.next_steps import suggest_steps
from drllm.reporting.run import Run, read_run
from drllm.statistics.verdicts import judge_counts

EVEN = judge_counts(9, 9, 60)  # nothing is shown


def clone(run: Run, evaluation: Any) -> Run:
    return dataclasses.replace(run, evaluations=[evaluation])


def parsed(command: str) -> Any:
    """Return a command as the command line understands it; nothing in it is left to fill in."""
    assert "…" not in command
    program, *words = shlex.split(command)
    assert program == "drllm"
    return parse(words)


def commands(run: Run, verb: str) -> list[Any]:
    """Return the advised commands of a verb, after parsing all of them."""
    lines = [parsed(command) for _, command in suggest_steps(run)]
    return [line for line in lines if line.verb == verb]


def test_too_few_questions_are_to_be_more_by_the_number_that_would_do(run):
    (evaluation,) = run.evaluations
    few = judge_counts(3, 6, 60)
    against = replace(evaluation.routed.against_base, accuracy=few)
    routed = replace(evaluation.routed, against_base=against)
    run = clone(run, replace(evaluation, systems=(evaluation.base, routed)))
    limits = [line.get_settings(EvaluateConfig).limit for line in commands(run, "evaluate")]
    assert 10 * math.ceil(few.needed / 10) in limits


def test_routers_that_are_worse_need_more_or_other_targets(run):
    [search] = commands(run, "search")
    config = search.get_settings(SearchConfig)
    assert (config.limit, config.num_simulations) == (4 * len(run.search), 30)
    assert config.output_dir != str(run.folder)  # whose search stays
    [supervise] = commands(run, "supervise")
    assert supervise.get_settings(SuperviseConfig).target == "least_kl"
    assert supervise.values["search"] == [str(run.folder / "search.jsonl")]


def test_targets_of_the_default_saving_are_to_save_half_of_it(run):
    manifest = {"config": {"target": "least_kl", "min_saving": None}}
    named = [source for source in run.sources if source.name == "supervision.jsonl"]
    run = dataclasses.replace(run, sources=[dataclasses.replace(named[0], manifest=manifest)])
    [supervise] = commands(run, "supervise")
    config = supervise.get_settings(SuperviseConfig)
    assert (config.target, config.min_saving) == ("least_kl", 0.025)


def test_one_training_asks_for_others_with_its_settings(run):
    router_config = {"base_model": "mine", "training": {"settings": {"num_epochs": 3}}}
    [train] = commands(dataclasses.replace(run, router_config=router_config), "train")
    assert (
        train.get_settings(TrainConfig).num_epochs,
        train.get_settings(TrainConfig).num_seeds,
    ) == (3, 3)


def test_one_depth_asks_for_a_curve_and_a_curve_for_a_choice(run):
    (evaluation,) = run.evaluations
    [single] = commands(clone(run, replace(evaluation, curve=(), drop_test=None)), "evaluate")
    assert (
        single.get_settings(EvaluateConfig).curve,
        single.get_settings(EvaluateConfig).max_drop,
    ) != (None, 2)
    [several] = commands(clone(run, replace(evaluation, drop_test=None)), "evaluate")
    assert several.get_settings(EvaluateConfig).max_drop == 2
    assert several.values["output_dir"] != str(run.folder / "eval")


def only_path(run: Run, evaluation: Any, step: StepRecord) -> Run:
    """Return a run with base and one static path that is as good."""
    even = replace(evaluation.systems[1].against_base, accuracy=EVEN, text_loss=None)
    path = replace(evaluation.systems[1], against_base=even)
    systems = (evaluation.base, path)
    return clone(run, replace(evaluation, systems=systems, paths={path.name: (step,)}))


def test_a_path_of_whole_layers_is_offered_for_export(run, with_paths):
    evaluation = with_paths(run.evaluations[0], 1, routed=False)
    evaluation = replace(evaluation, config={"paths": "tuned/paths.json"})
    [export] = commands(only_path(run, evaluation, StepRecord(layer=0)), "export")
    assert export.values["path"] == "tuned/paths.json:skip1"


def test_of_static_paths_beside_routers_the_one_of_the_verdict_is_offered(run, with_paths):
    evaluation = with_paths(run.evaluations[0], 2)
    even = replace(evaluation.routed.against_base, accuracy=EVEN, text_loss=None)
    unbeaten = [
        replace(system, routed_against=even, reads_question=False, draws=1)
        for system in evaluation.systems[2:]
    ]
    systems = (*evaluation.systems[:2], *unbeaten)
    config = {"paths": "a/skip1.json,b/skip2.json"}
    evaluation = replace(evaluation, systems=systems, config=config)
    best = evaluation.best_path
    assert best.executions <= evaluation.routed.executions
    [export] = commands(clone(run, evaluation), "export")
    assert export.values["path"].endswith(f"/{best.name}.json")
    [what] = [
        what for what, command in suggest_steps(clone(run, evaluation)) if "export" in command
    ]
    assert f"minus {best.name}," in what


def test_a_baseline_that_is_as_good_asks_for_a_path_of_the_same_model(run):
    (evaluation,) = run.evaluations
    even = replace(evaluation.routed.against_base, accuracy=EVEN, text_loss=None)
    last = evaluation.system("last layers")
    rival = replace(last, routed_against=even, executions=evaluation.routed.executions)
    systems = (*evaluation.systems[:2], rival)
    [tune] = commands(clone(run, replace(evaluation, systems=systems)), "tune")
    assert tune.get_settings(ModelConfig).model == evaluation.model["id"]
    assert tune.get_settings(TuneConfig).tasks == evaluation.task


@pytest.mark.parametrize("accuracies", [(0.3, 0.4, 0.3), (0.7, 0.3, 0.3), (0.7, 0.7, 0.6)])
def test_every_command_can_be_pasted(folder, accuracies):
    folder.everything(accuracies=accuracies)
    folder.static_paths()
    steps = suggest_steps(read_run(folder.path))
    assert steps
    for _, command in steps:
        parsed(command)


@pytest.mark.parametrize("there", [{}, {"supervision": ()}, {"router_config": {"L": 1}}])
def test_the_next_stage_of_a_run_folder_can_be_pasted(tmp_path, there):
    [(_, command)] = suggest_steps(Run(folder=tmp_path / "my run", **there))
    parsed(command)


def test_settings_of_every_kind_can_stand_in_a_command():
    config = {"tasks": "a,b", "chat": True, "max_drop": 2.0, "supervision": "my runs/s.jsonl"}
    config |= {"seed": 0}  # the default, which is left out
    command = evaluate_command({"routers": "r", "config": config})
    expected = "drllm evaluate --routers r --tasks a,b --chat --supervision 'my runs/s.jsonl' "
    assert command == expected + "--max-drop 2.0"
    assert parsed(command).get_settings(EvaluateConfig).chat


def test_settings_by_task_are_written_to_a_file_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = evaluate_command({"config": {"tasks": "a", "limits": {"a": 3}}})
    write, rest = command.split(" && ")
    subprocess.run(write, shell=True, check=True)
    assert [file.name for file in tmp_path.iterdir()] == [SETTINGS_FILE]
    assert parsed(rest).get_settings(EvaluateConfig).limits == {"a": 3}


def test_settings_that_others_leave_without_effect_are_left_out():
    config = {"tasks": "a", "latency_rounds": 2}  # measured always, in earlier versions
    assert evaluate_command({"config": config}) == "drllm evaluate --tasks a"
