"""What a report advises next, as commands that can be pasted."""

import dataclasses
import shlex
from pathlib import Path
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
)
from drllm.reporting.commands import evaluate_command
from drllm.reporting.next_steps import DEPTHS, suggest_steps
from drllm.reporting.run import Run, read_run
from drllm.statistics.exclusion import DropTest, Limits, TaskTest, Trial
from drllm.statistics.power import round_up
from drllm.statistics.verdicts import judge_counts
from run_folder import add_paths

EVEN = judge_counts(9, 9, 60)  # nothing is shown


def parse_command(command: str) -> Any:
    """Return a command as the command line understands it; nothing in it is left to fill in."""
    assert "…" not in command
    program, *words = shlex.split(command)
    assert program == "drllm"
    return parse(words)


def commands(run: Run, verb: str, **changes: Any) -> list[Any]:
    """Return the advised commands of a verb, after parsing all of them.

    Changes are those of the run's only evaluation.
    """
    if changes:
        run = dataclasses.replace(run, evaluations=[replace(run.evaluations[0], **changes)])
    lines = [parse_command(command) for _, command in suggest_steps(run)]
    return [line for line in lines if line.verb == verb]


@pytest.fixture
def evaluation(run: Run) -> Any:
    return run.evaluations[0]


@pytest.fixture
def even(evaluation: Any) -> Any:
    """Differences that show nothing."""
    return replace(evaluation.routed.against_base, accuracy=EVEN, text_loss=None)


def test_too_few_questions_are_to_be_more_by_the_number_that_would_do(run, evaluation):
    few = judge_counts(3, 6, 60)
    against = replace(evaluation.routed.against_base, accuracy=few)
    routed = replace(evaluation.routed, against_base=against)
    lines = commands(run, "evaluate", systems=(evaluation.base, routed), drop_test=None)
    limits = [line.get_settings(EvaluateConfig).limit for line in lines]
    assert round_up(few.needed) in limits


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
    [source] = [source for source in run.sources if source.name == "supervision.jsonl"]
    run = dataclasses.replace(run, sources=[dataclasses.replace(source, manifest=manifest)])
    [supervise] = commands(run, "supervise")
    config = supervise.get_settings(SuperviseConfig)
    assert (config.target, config.min_saving) == ("least_kl", 0.025)


def test_one_training_asks_for_others_with_its_settings(run):
    router_config = {"base_model": "mine", "training": {"settings": {"num_epochs": 3}}}
    [train] = commands(dataclasses.replace(run, router_config=router_config), "train")
    config = train.get_settings(TrainConfig)
    assert (config.num_epochs, config.num_seeds) == (3, 3)


def test_one_depth_asks_for_a_curve_and_a_curve_for_a_choice(run):
    [single] = commands(run, "evaluate", curve=(), drop_test=None)
    assert single.get_settings(EvaluateConfig).curve == DEPTHS
    base, routed, *others = run.evaluations[0].systems
    differences = routed.against_base
    accuracy = replace(differences.accuracy, needed=None, excluded_loss=0.01)
    routed = replace(routed, against_base=replace(differences, accuracy=accuracy))
    systems = (base, routed, *others)
    [several] = commands(run, "evaluate", drop_test=None, systems=systems)
    assert several.get_settings(EvaluateConfig).max_drop == 2
    assert several.values["output_dir"] != str(run.folder / "eval")


def test_a_path_of_whole_layers_is_offered_for_export(run, evaluation, even):
    result = add_paths(evaluation, 1, routed=False)
    base, path = result.systems
    name = "without 1"
    config = {"paths": "a.json,without:1"}
    path = replace(path, name=name, against_base=even)
    changes = {"systems": (base, path), "paths": {name: (0, 2)}}
    [export] = commands(run, "export", **changes, config=config, curve=())
    assert export.values["skip"] == "1"
    assert export.get_settings(ModelConfig).model == evaluation.model["id"]


@pytest.mark.parametrize("reason", ["base may be guessing", "the test failed"])
def test_a_path_that_the_headline_advises_against_is_not_offered(run, evaluation, even, reason):
    base, path = add_paths(evaluation, 1, routed=False).systems
    path = replace(path, name="without 1")
    drop_test = None
    if reason == "the test failed":
        failed = TaskTest(task=evaluation.task, failures=("a loss isn't excluded",))
        trial = Trial(name=path.name, tasks=(failed,))
        drop_test = DropTest(limits=Limits(max_drop=3), trials=(trial,))
    else:
        even = replace(even, accuracy=judge_counts(9, 9, 60, above_chance=False))
    systems = (base, replace(path, against_base=even))
    changes = {"systems": systems, "paths": {path.name: (0, 2)}}
    config = {"paths": "without:1"}
    lines = {"config": config, "curve": (), "drop_test": drop_test}
    assert commands(run, "export", **changes, **lines) == []
    [generate] = commands(run, "generate", **changes, **lines)
    assert generate.get_settings(ModelConfig).model == evaluation.model["id"]


def test_worked_examples_are_not_offered_where_there_are_some(run, evaluation, even):
    guessing = replace(even, accuracy=judge_counts(9, 9, 60, above_chance=False))
    systems = (evaluation.base, replace(evaluation.routed, against_base=guessing))
    changes = {"systems": systems, "drop_test": None, "curve": ()}
    lines = commands(run, "evaluate", **changes)
    assert 5 in [line.get_settings(EvaluateConfig).num_fewshot for line in lines]
    assert commands(run, "ls", **changes) == []
    assert len(commands(run, "ls", **changes, num_fewshot=5)) == 1


def test_after_a_path_shrink_is_offered_once_for_questions_of_ones_own(run, evaluation, even):
    result = add_paths(evaluation, 1, routed=False)
    base, path = result.systems
    changes = {"systems": (base, replace(path, against_base=even)), "paths": result.paths}
    for task in ("builtin_facts", "mine"):
        [shrink] = commands(run, "shrink", **changes, task=task, curve=())
        assert shrink.get_settings(ModelConfig).model == evaluation.model["id"]


def test_of_static_paths_beside_routers_the_one_of_the_verdict_is_offered(run, evaluation, even):
    result = add_paths(evaluation, 2)
    base, routed, *others = result.systems
    as_good = {"routed_against": even, "reads_question": False, "draws": 1, "against_base": even}
    unbeaten = [replace(system, **as_good) for system in others]
    config = {"paths": "a/skip1.json,b/skip2.json"}
    result = replace(result, systems=(base, routed, *unbeaten), config=config)
    best = result.best_path
    assert best.executions <= evaluation.routed.executions
    run = dataclasses.replace(run, evaluations=[result])
    [text] = [text for text, command in suggest_steps(run) if "drllm shrink" in command]
    assert f"minus {best.name}," in text


@pytest.mark.parametrize(
    ("available", "verb", "limit"),
    [(None, "evaluate", "needed"), (80, "evaluate", 80), (60, "ls", 0)],
)
def test_no_more_questions_are_to_be_asked_than_there_are(run, evaluation, available, verb, limit):
    few = judge_counts(3, 6, 60)
    against = replace(evaluation.routed.against_base, accuracy=few)
    routed = replace(evaluation.routed, against_base=against)
    result = replace(
        evaluation,
        systems=(evaluation.base, routed),
        curve=(),
        drop_test=None,
        num_available=available,
    )
    text, command = suggest_steps(dataclasses.replace(run, evaluations=[result]))[0]
    line = parse_command(command)
    assert line.verb == verb
    if verb == "evaluate":
        expected = round_up(few.needed) if limit == "needed" else limit
        assert line.get_settings(EvaluateConfig).limit == expected
    assert str(round_up(few.needed)) in text


@pytest.mark.parametrize(("num_questions", "limit"), [(1000, None), (200, 400)])
def test_where_texts_are_too_few_more_of_them_are_to_be_measured(
    run, evaluation, num_questions, limit
):
    failed = TaskTest(task=evaluation.task, failures=("the text may get worse",), needed=400)
    trial = Trial(name="routed", tasks=(failed,))
    drop_test = DropTest(limits=Limits(max_drop=3, max_loss_increase=0.05), trials=(trial,))
    result = replace(evaluation, num_questions=num_questions, drop_test=drop_test, curve=())
    text, command = suggest_steps(dataclasses.replace(run, evaluations=[result]))[0]
    settings = parse_command(command).get_settings(EvaluateConfig)
    assert (settings.limit, settings.num_texts) == (limit, 400)
    assert ("Measure the text of 400 questions instead of 100" in text) == (limit is None)


def test_an_evaluation_of_several_seeds_of_a_model_s_commit_is_repeated_with_them():
    seeds = {"r/seed_1": "hash", "r/seed_2": "hash"}
    model = {"id": "owner/name", "revision": "abc"}
    manifest = {"model": model, "routers": "r", "other_seeds": seeds, "config": {"tasks": "a"}}
    line = parse_command(evaluate_command(manifest))
    assert line.values["routers"] == ["r", "r/seed_1", "r/seed_2"]
    assert line.get_settings(ModelConfig).revision == "abc"


def test_commands_that_follow_an_evaluation_with_a_bypass_name_its_file(run, evaluation, even):
    routed = replace(evaluation.routed, against_base=even)
    changes = {"systems": (evaluation.base, routed), "drop_test": None, "curve": ()}
    for verb in ("evaluate", "generate"):
        lines = commands(run, verb, bypass="b/bypass.safetensors", **changes)
        assert lines
        for line in lines:
            assert line.get_settings(ModelConfig).bypass == "b/bypass.safetensors"


def test_beside_a_folder_of_results_alone_new_folders_stand_beside_it(run, evaluation):
    alone = dataclasses.replace(run, folder=Path("results/eval"), is_eval_folder=True)
    outputs = [line.values.get("output_dir") for line in commands(alone, "evaluate", curve=())]
    assert outputs
    assert {str(Path(str(output)).parent) for output in outputs} == {"results"}


@pytest.mark.parametrize("accuracies", [(0.3, 0.4, 0.3), (0.7, 0.3, 0.3), (0.7, 0.7, 0.6)])
def test_every_command_can_be_pasted(folder, accuracies):
    folder.everything(accuracies=accuracies)
    folder.static_paths()
    steps = suggest_steps(read_run(folder.path))
    assert steps
    for _, command in steps:
        parse_command(command)


@pytest.mark.parametrize("there", [{}, {"supervision": ()}, {"router_config": {"L": 1}}])
def test_the_next_stage_of_a_run_folder_can_be_pasted(tmp_path, there):
    [(_, command)] = suggest_steps(Run(folder=tmp_path / "my run", **there))
    parse_command(command)


def test_settings_of_every_kind_can_stand_in_a_command():
    config = {"tasks": "a,b", "chat": True, "max_drop": 2.0, "supervision": "my runs/s.jsonl"}
    config |= {"seed": 0}  # the default, which is left out
    command = evaluate_command({"routers": "r", "config": config})
    expected = "drllm evaluate --routers r --tasks a,b --chat --supervision 'my runs/s.jsonl' "
    assert command == expected + "--max-drop 2.0"
    assert parse_command(command).get_settings(EvaluateConfig).chat


@pytest.mark.parametrize(
    ("config", "end"),
    [
        ({"latency_rounds": 2}, " --latency-rounds 2"),  # as in the files of 3820ce17
        ({"latency": False, "latency_rounds": 8, "latency_written": 64}, ""),
        ({"latency": True, "latency_seconds": 60.0}, " --latency --latency-seconds 60.0"),
        ({"latency": True, "latency_rounds": 4}, " --latency-rounds 4 --latency"),
    ],
)
def test_an_evaluation_with_times_is_repeated_with_times(config, end):
    command = evaluate_command({"config": {"tasks": "a", **config}})
    assert sorted(command.split()) == sorted(f"drllm evaluate --tasks a{end}".split())
    assert parse_command(command).get_settings(EvaluateConfig).latency == bool(end)
