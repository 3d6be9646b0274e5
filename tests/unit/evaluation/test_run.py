"""The evaluation stage on a tiny model, against asking question by question."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import time
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from drllm.config import EvaluateConfig
from drllm.errors import CheckpointError, ConfigError, ModelError, RecordError
from drllm.evaluation import latency, systems
from drllm.evaluation import run as stage
from drllm.evaluation.baselines.own_routes import permuted, share_unchanged
from drllm.evaluation.baselines.registry import depths, named
from drllm.evaluation.latency import device_clock, measure
from drllm.evaluation.lm_eval.folders import task_folder
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.task import AskedTask
from drllm.evaluation.questions import is_fitted
from drllm.evaluation.run import evaluate
from drllm.evaluation.systems import TaskRun
from drllm.listener import Listener
from drllm.models.base.identity import fingerprint
from drllm.models.base.load import BaseModel
from drllm.models.base.prompts import encode
from drllm.models.routers.checkpoint import load_routers, save_routers
from drllm.models.routers.stack import RouterConfig, RouterStack
from drllm.models.routing.policies import RouterPolicy
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import to_path
from drllm.records import read_json_lines, read_manifest
from drllm.records.latency import read_latency
from drllm.records.results import read_results
from drllm.statistics import non_inferiority
from drllm.statistics.paired import holm
from drllm.tasks.registry import get_task

NUM_QUESTIONS = 24
SYSTEMS = [
    "base",
    "routed",
    "permuted routes",
    "random decisions",
    "label frequency",
    "last layers",
    "evenly spaced",
]
TOLERANCE = 1e-4
"""Nats between a continuation among others and alone (design figure; below 2e-5 here)."""


@pytest.fixture(scope="module")
def base(tiny_llama, tiny_tokenizer):
    model = tiny_llama(max_position_embeddings=1024)
    return BaseModel(model=model, tokenizer=tiny_tokenizer, name="tiny", revision=None)


def new_routers(base, num_layers=6, seed=3):
    config = RouterConfig(
        num_layers=num_layers,
        hidden_size=32,
        base_model="tiny",
        base_fingerprint=fingerprint(base.model),
        label_counts=((2, 7, 1),) * num_layers,
    )
    stack = RouterStack(config, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        stack.decision_weight.mul_(3)
    return stack


@pytest.fixture(scope="module")
def routers_dir(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routers")
    save_routers(new_routers(base), folder)
    return folder


@pytest.fixture(scope="module")
def task():
    return get_task("builtin_facts")


def settings(**values):
    small = {"limit": NUM_QUESTIONS, "batch_size": 5, "num_texts": 6, "latency_rounds": 0, **values}
    config = EvaluateConfig(**small)
    few = {}
    drawn = named("permuted-routes,random-decisions,label-frequency")
    if "num_random_draws" not in values and set(drawn) & set(named(config.baselines)):
        few["num_random_draws"] = 3
    if "num_calibration" not in values and is_fitted(config):
        few["num_calibration"] = 12
    return dataclasses.replace(config, **few)


class Hearing(Listener):
    """Keeps what it is told of progress, and the notes."""

    def __init__(self):
        self.calls, self.notes = [], []

    @contextmanager
    def progress(self, title, unit):
        yield lambda *args: self.calls.append(args)

    def note(self, text):
        self.notes.append(text)


def run_evaluation(base, routers, tasks, config, folder, calls=None):
    """Evaluate, and return the files of the tasks."""
    listener = Hearing()
    try:
        results = evaluate(base, tasks, config, folder, routers=routers, listener=listener)
    finally:
        if calls is not None:
            calls += listener.calls
    assert [result.task for result in results] == [task.name for task in tasks]
    return [folder / f"{result.task}.json" for result in results]


@pytest.fixture(scope="module")
def evaluated(base, routers_dir, task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    calls = []
    [path] = run_evaluation(base, routers_dir, [task], settings(), folder, calls)
    samples = [row for _, row in read_json_lines(folder / "samples.jsonl", dict[str, Any])]
    return json.loads(path.read_text()), samples, calls


def alone(base, decisions, task, example):
    """Ask one question of a plain model whose layer list is the path, choice by choice."""
    model = copy.deepcopy(base.model)
    path = to_path(decisions)
    model.model.layers = nn.ModuleList([model.model.layers[index] for index in path])
    model.config.num_hidden_layers = len(path)
    prompt = task.prompt(example, "loglikelihood")
    context, sums = encode(base.tokenizer, prompt.text), []
    for continuation in prompt.continuations:
        row = encode(base.tokenizer, prompt.text + continuation)
        logprobs = model(torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
        sums.append(sum(float(logprobs[i - 1, row[i]]) for i in range(len(context), len(row))))
    gold = sums[example.gold] - math.log(sum(math.exp(value) for value in sums))
    return float(sums.index(max(sums)) == example.gold), gold


@pytest.mark.parametrize("system", ["base", "routed"])
def test_every_sample_equals_the_question_asked_alone(evaluated, base, task, system):
    _, samples, _ = evaluated
    examples = {example.id: example for example in task.examples("test")}
    for sample in samples:
        outcome = sample["systems"][system]
        correct, gold = alone(base, outcome["decisions"], task, examples[sample["id"]])
        assert correct == outcome["correct"]
        assert gold == pytest.approx(outcome["gold_logprob"], abs=1e-4)


def test_routes_are_those_of_the_question_alone(evaluated, base, routers_dir, task):
    _, samples, _ = evaluated
    examples = {example.id: example for example in task.examples("test")}
    routed = RoutedModel(base.model, load_routers(routers_dir))
    seen = set()
    for sample in samples:
        text = task.prompt(examples[sample["id"]], "loglikelihood").text
        routed.model(torch.tensor([encode(base.tokenizer, text)]))
        route = routed.last_route[0].tolist()
        assert route == sample["systems"]["routed"]["decisions"]
        seen.add(tuple(route))
    routed.detach()
    assert len(seen) > 1, "the sample must hold several routes"
    assert isinstance(routed.driver.policy, RouterPolicy)


def test_the_table_holds_every_system_with_interval_executions_and_seconds(evaluated):
    result, samples, _ = evaluated
    rows = {row["name"]: row for row in result["systems"]}
    assert list(rows) == SYSTEMS
    assert len(samples) == result["num_questions"] == NUM_QUESTIONS
    for name, row in rows.items():
        mean = sum(sample["systems"][name]["correct"] for sample in samples) / NUM_QUESTIONS
        assert row["accuracy"] == pytest.approx(mean)
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert row["seconds"] > 0
    assert rows["base"]["executions"] == 6


def test_baselines_run_at_the_routed_model_s_executions(evaluated):
    rows = {row["name"]: row for row in evaluated[0]["systems"]}
    for name in ("permuted routes", "random decisions"):
        assert rows[name]["executions"] == pytest.approx(rows["routed"]["executions"])
        assert rows[name]["draws"] == 3
    # Equal on average only: 3 draws of 24 questions, a row's standard deviation is about 1.2.
    assert rows["label frequency"]["executions"] == pytest.approx(
        rows["routed"]["executions"], abs=0.5
    )
    assert rows["routed"]["executions"] > 6, "the sample must be a test of what comes next"
    for name in ("last layers", "evenly spaced"):  # there is nothing to drop
        assert rows[name]["executions"] == 6
    assert "Last layers: runs 6 layers, having none to drop." in evaluated[0]["findings"]


def test_labels_that_cannot_reach_the_routed_executions_are_said_not_to(
    base, routers_dir, task, tmp_path
):
    routers = load_routers(routers_dir)
    config = dataclasses.replace(routers.config, label_counts=((0, 10, 0),) * 6)
    only_execute = RouterStack(config)
    only_execute.load_state_dict(routers.state_dict())
    save_routers(only_execute, tmp_path / "routers")
    config = settings(baselines="label-frequency", limit=8)
    [path] = run_evaluation(base, tmp_path / "routers", [task], config, tmp_path / "eval")
    result = json.loads(path.read_text())
    rows = {row["name"]: row for row in result["systems"]}
    assert rows["label frequency"]["executions"] == 6
    assert rows["routed"]["executions"] != 6
    assert (
        "Label frequency: not at equal executions: whatever the tilt, the labels give no nearer "
        f"mean than 6.00 where the routed model has "
        f"{rows['routed']['executions']:.2f}."
    ) in result["findings"]


def test_routes_left_in_place_by_the_permutation_are_counted(evaluated):
    result, samples, _ = evaluated
    rows = {row["name"]: row for row in result["systems"]}
    routes = torch.tensor([sample["systems"]["routed"]["decisions"] for sample in samples])
    generator = torch.Generator().manual_seed(0)
    shares = [share_unchanged(routes, permuted(routes, generator)) for _ in range(3)]
    assert rows["permuted routes"]["unchanged_routes"] == pytest.approx(sum(shares) / 3)
    assert sum(shares) > 0, "the sample must hold questions of the same route"
    assert [name for name, row in rows.items() if row["unchanged_routes"] is not None] == [
        "permuted routes"
    ]


@pytest.mark.parametrize(("device", "waits"), [("cuda:0", 1), ("cpu", 0)])
def test_the_clock_waits_for_a_gpu_to_finish(device, waits, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    before = time.perf_counter()
    assert before <= device_clock(torch.device(device))() <= time.perf_counter()
    assert waited == [torch.device(device)] * waits


@pytest.fixture
def two_tasks(task):
    """Return the task and a smaller one with other questions."""

    class Half(type(task)):
        name = "half"

        def examples(self, split, data_dir=None):
            examples = super().examples(split, data_dir)[24:36]
            return [dataclasses.replace(example, task="half") for example in examples]

    return [task, Half()]


def test_several_tasks_are_corrected_system_by_system(base, routers_dir, two_tasks, tmp_path):
    config = settings(baselines="permuted-routes,last-layers", num_random_draws=1, limit=12)
    paths = run_evaluation(base, routers_dir, two_tasks, config, tmp_path)
    results = [json.loads(path.read_text()) for path in paths]
    for rows in zip(*(result["systems"] for result in results), strict=True):
        if rows[0]["name"] != "base":
            found = [row["against_base"]["accuracy"] for row in rows]
            assert [each["p_corrected"] for each in found] == holm([each["p"] for each in found])
    for result in results:
        routed = result["systems"][1]["against_base"]["accuracy"]
        said = f"corrected for 2 tests {routed['p_corrected']:.3g}"
        assert said in " ".join(result["findings"])


def test_rows_hold_their_paired_differences_to_base_and_routed(evaluated):
    result, samples, _ = evaluated
    outcomes = [sample["systems"] for sample in samples]
    for row in result["systems"]:
        name = row["name"]
        assert (row["against_base"] is None) == (name == "base")
        assert (row["routed_against"] is None) == (name in ("base", "routed"))
        for found, first, second in (
            (row["against_base"], name, "base"),
            (row["routed_against"], "routed", name),
        ):
            for key, field in (("accuracy", "correct"), ("gold_logprob", "gold_logprob")):
                if found is not None:
                    mean = sum(each[first][field] - each[second][field] for each in outcomes)
                    assert found[key]["mean"] == pytest.approx(mean / NUM_QUESTIONS, abs=1e-9)
                    low, high = found[key]["interval"]
                    assert low <= found[key]["mean"] + 1e-9
                    assert high >= found[key]["mean"] - 1e-9
            if found is not None:
                assert found["text_loss"]["mean"] is not None


def test_chance_and_findings_and_provenance_are_written(evaluated, base):
    result, _, _ = evaluated
    assert result["chance"] == 0.25
    assert len(result["findings"]) >= 3
    assert result["model"] == base.identity
    assert result["runtime"] == base.runtime
    assert len(result["routers_sha256"]) == 64
    assert result["config"]["seed"] == 0


def test_progress_ends_at_the_total(evaluated):
    _, _, calls = evaluated
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, *_ in calls] == sorted(done for done, *_ in calls)


def test_the_same_seed_gives_the_same_result_and_the_model_is_given_back_untouched(
    base, routers_dir, task, evaluated, tmp_path
):
    config = settings(baselines="permuted-routes,last-layers")
    [path] = run_evaluation(base, routers_dir, [task], config, tmp_path)
    first = {row["name"]: row for row in evaluated[0]["systems"]}
    for row in json.loads(path.read_text())["systems"]:
        assert {**first[row["name"]], "seconds": None} == {**row, "seconds": None}
    assert read_manifest(tmp_path / "samples.jsonl", "samples") is not None
    assert all("forward" not in layer.__dict__ for layer in base.model.model.layers)


def test_routers_of_another_model_are_refused(base, task, tmp_path):
    save_routers(new_routers(base, num_layers=5), tmp_path / "routers")
    with pytest.raises(CheckpointError, match="num_layers 5"):
        run_evaluation(base, tmp_path / "routers", [task], settings(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_routed_model_is_evaluated_with_its_own_routers_and_given_back(
    base, routers_dir, task, evaluated, tmp_path
):
    routed = RoutedModel(base.model, load_routers(routers_dir), tokenizer=base.tokenizer)
    try:
        [result] = evaluate(routed, [task], settings(baselines="none"))
        [kept] = evaluate(routed, ["builtin_facts"], settings(baselines="none"), tmp_path)
        with pytest.raises(ConfigError, match="its own routers"):
            evaluate(routed, [task], settings(baselines="none"), routers=routers_dir)
        with routed.fixed([1] * 6):
            routed.model(torch.tensor([[5, 6]]))
        assert routed.last_route.tolist() == [[1] * 6]
    finally:
        routed.detach()
    for system, again, expected in zip(
        result.systems, kept.systems, evaluated[0]["systems"], strict=False
    ):
        assert system.accuracy == again.accuracy == expected["accuracy"]
        assert system.gold_logprob == pytest.approx(expected["gold_logprob"])
    [read] = read_results(tmp_path)
    assert len(read.samples) == NUM_QUESTIONS
    assert load_routers(kept.routers).config.num_layers == 6


def test_a_model_needs_routers_and_a_tokenizer(base, routers_dir, task):
    with pytest.raises(ConfigError, match="no routers are given"):
        evaluate(base, [task], settings())
    with pytest.raises(ConfigError, match="without a tokenizer"):
        evaluate(base.model, [task], settings(), routers=routers_dir)


def test_routers_trained_on_prompts_of_another_form_are_said(base, task, tmp_path):
    stack = new_routers(base)
    config = dataclasses.replace(stack.config, training={"rewards": ["letter"]})
    other = RouterStack(config)
    other.load_state_dict(stack.state_dict())
    listener = Hearing()
    evaluate(base, [task], settings(limit=4, baselines="none"), routers=other, listener=listener)
    assert "trained on prompts for letter" in listener.notes[0]


# --- depths, and the certified choice ----------------------------------------------------------


def test_a_curve_has_every_system_at_every_depth_that_the_routers_can_be_brought_to(
    base, routers_dir, task, tmp_path
):
    config = settings(curve="0.1,0.3", baselines="permuted-routes,last-layers", limit=12)
    [path] = run_evaluation(base, routers_dir, [task], config, tmp_path)
    result = json.loads(path.read_text())
    first, *points = result["curve"]
    assert (first["system"], first["executions"], first["against_base"]) == ("base", 6.0, None)
    reached = {point["setting"] for point in points}
    missed = [finding for finding in result["findings"] if finding.startswith("Not evaluated at")]
    assert len(reached) + len(missed) == 2
    assert reached <= {"10 % saved", "30 % saved"}
    assert len(reached) >= 1, "the sample must be a test"
    for setting in reached:
        at = {point["system"]: point for point in points if point["setting"] == setting}
        assert {"routed", "permuted routes", "last layers"} == set(at)
        executions = at["routed"]["executions"]
        assert at["permuted routes"]["executions"] == pytest.approx(executions)
        assert at["last layers"]["executions"] == pytest.approx(executions, abs=0.5 / 12)
        assert at["routed"]["text_loss"] > 0
    assert [row["name"] for row in result["systems"]] == [
        "base",
        "routed",
        "permuted routes",
        "last layers",
    ]


def test_a_certified_choice_says_what_so_few_questions_can_show(base, routers_dir, task, tmp_path):
    config = settings(curve="0.1", epsilon=2.0, baselines="none", limit=12, num_texts=30)
    [path] = run_evaluation(base, routers_dir, [task], config, tmp_path)
    result = json.loads(path.read_text())
    assert result["choice"]["limits"]["epsilon"] == 2.0
    assert result["choice"]["confirmation"] is None
    assert any(finding.startswith("None is certified") for finding in result["findings"])


def test_a_depth_is_never_chosen_on_the_questions_that_it_is_tested_on(
    base, routers_dir, task, tmp_path
):
    config = settings(
        split="select", curve="0.1", epsilon=2.0, baselines="none", limit=30, num_texts=30
    )
    calls = []
    run_evaluation(base, routers_dir, [task], config, tmp_path, calls)
    names = {name for _, _, name in calls}
    assert "builtin_facts: base on fit" in names
    assert not any(name.endswith("on select") for name in names)


@pytest.fixture
def _base_above_chance(monkeypatch):
    """Let a model without skill be one with something to lose."""
    monkeypatch.setattr(non_inferiority, "_guessing", lambda *_: None)


@pytest.mark.usefixtures("_base_above_chance")
def test_a_choice_is_held_to_worked_answers_of_another_task_that_serve_it_once(
    base, routers_dir, task, tmp_path
):
    config = settings(
        curve="0.1,0.3",
        epsilon=100.0,
        max_loss_increase=100.0,
        worked_answers="builtin_arithmetic",
        baselines="none",
        limit=30,
        num_texts=30,
    )
    calls = []
    [path] = run_evaluation(base, routers_dir, [task], config, tmp_path, calls)
    choice = json.loads(path.read_text())["choice"]
    assert choice["worked_answers"] == "builtin_arithmetic"
    assert choice["trials"][-1]["failures"] == []
    assert choice["confirmation"]["failures"] == []
    for trial in (*choice["trials"], choice["confirmation"]):
        assert trial["worked"]["num_texts"] == 30
        assert trial["worked"]["increase"] < trial["worked"]["maximum"]
        assert trial["worked"]["increase"] != trial["texts"]["increase"]
    said = [name for _, _, name in calls if "worked answers" in name]
    assert "base on worked answers of builtin_arithmetic, select" in said
    chosen = choice["confirmation"]["name"].removeprefix("routed, ")
    assert [name for name in dict.fromkeys(said) if name.endswith(", test")] == [
        "base on worked answers of builtin_arithmetic, test",
        f"builtin_facts: routed at {chosen} on worked answers of builtin_arithmetic, test",
    ]
    assert calls[-1][0] <= calls[-1][1]
    read = {
        split: {row["prompt"] for row in rows_of(tmp_path / "tasks" / f"worked-{split}")}
        for split in ("select", "test")
    }
    assert [len(prompts) for prompts in read.values()] == [30, 30]
    assert not read["select"] & read["test"]


def rows_of(folder):
    [file] = (folder / "rows").glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_loss_of_a_worked_answer_is_that_behind_its_prompt_under_the_prompts_own_route(
    base, routers_dir, tmp_path
):
    lm = RoutedLM(base, routers=str(routers_dir), batch_size=4)
    try:
        [written], files = task_folder(
            [get_task("builtin_arithmetic")],
            split="select",
            limit=8,
            seed=0,
            data_dir=None,
        )
        files.write(tmp_path)
        asked = AskedTask(written, tmp_path, lm, chat=False)
        policy = RouterPolicy(lm.routed.routers)
        read = TaskRun(lm, asked, num_texts=8).texts("routed", policy)
        routes = []
        for prompt in asked.prompts():
            with lm.routed.using(policy), torch.no_grad():
                lm.routed.model(torch.tensor([encode(base.tokenizer, prompt)]))
            routes.append(tuple(lm.routed.last_route[0].tolist()))
    finally:
        lm.routed.detach()
    assert read.routes == [routes]
    assert len(set(routes)) > 1, "the sample must be a test"
    assert read.executions == pytest.approx(sum(map(sum, routes)) / 8)
    for place, (prompt, route) in enumerate(zip(asked.prompts(), routes, strict=True)):
        model = copy.deepcopy(base.model)
        path = to_path(route)
        model.model.layers = nn.ModuleList([model.model.layers[index] for index in path])
        model.config.num_hidden_layers = len(path)
        context = encode(base.tokenizer, prompt)
        answer = list(asked.text(place).continuation)
        ids = torch.tensor([[*context, *answer]])
        labels = ids.clone()
        labels[:, : len(context)] = -100
        with torch.no_grad():
            loss = float(model(ids, labels=labels, use_cache=False).loss)
        assert read.text_loss[place] == pytest.approx(loss, abs=TOLERANCE)


def test_depths_are_shares_each_named_once():
    assert depths("0.3,0.1") == [0.1, 0.3]
    assert depths(None) == []
    for wrong in ("0", "1", "x", "0.1,0.1", "-0.2", ""):
        with pytest.raises(ConfigError, match="--curve is"):
            depths(wrong)


# --- what is asked, what is read ---------------------------------------------------------------


def test_the_loss_of_a_text_is_that_of_the_question_with_its_right_answer_under_its_route(
    evaluated, base, task
):
    result, samples, _ = evaluated
    examples = {example.id: example for example in task.examples("test")}
    rows = {row["name"]: row for row in result["systems"]}
    for name in ("base", "routed", "last layers"):
        losses = []
        for sample in samples[:6]:
            model = copy.deepcopy(base.model)
            path = to_path(sample["systems"][name]["decisions"])
            model.model.layers = nn.ModuleList([model.model.layers[index] for index in path])
            model.config.num_hidden_layers = len(path)
            prompt = task.prompt(examples[sample["id"]], "loglikelihood")
            ids = torch.tensor(
                [encode(base.tokenizer, prompt.text + prompt.continuations[prompt.gold])]
            )
            with torch.no_grad():
                losses.append(float(model(ids, labels=ids, use_cache=False).loss))
        assert rows[name]["text_loss"] == pytest.approx(sum(losses) / 6, abs=TOLERANCE)


def test_generated_answers_are_evaluated_under_each_route(base, routers_dir, tmp_path):
    config = settings(tasks="builtin_arithmetic", limit=4, num_random_draws=2)
    tasks = [get_task("builtin_arithmetic")]
    [path] = run_evaluation(base, routers_dir, tasks, config, tmp_path)
    result = json.loads(path.read_text())
    assert result["kind"] == "generated"
    rows = {row["name"]: row for row in result["systems"]}
    assert list(rows) == SYSTEMS
    assert rows["routed"]["gold_logprob"] is None
    assert rows["base"]["decode_executions"] == 6
    assert rows["permuted routes"]["executions"] == pytest.approx(rows["routed"]["executions"])


def test_baselines_that_lack_what_they_are_fitted_on_are_named(base, routers_dir, task, tmp_path):
    config = settings(baselines="all", limit=8, num_random_draws=1)
    [path] = run_evaluation(base, routers_dir, [task], config, tmp_path)
    result = json.loads(path.read_text())
    lacking = {"best program", "program predictor", "sequence router"}
    assert [*SYSTEMS[:2], *(name for name in named("all") if name not in lacking)] == [
        row["name"] for row in result["systems"]
    ]
    for name in lacking:
        assert any(
            f"{name.capitalize()} isn't compared: it needs" in text for text in result["findings"]
        )


def test_the_cost_of_a_prompt_falls_with_the_executions_and_is_said_to_be_derived(evaluated):
    rows = {row["name"]: row for row in evaluated[0]["systems"]}
    base, routed = rows["base"], rows["routed"]
    # All layers are alike, so K/V go with the executions; FLOPs hold the output head besides.
    share = routed["executions"] / base["executions"]
    assert routed["kv_bytes_per_token"] == pytest.approx(share * base["kv_bytes_per_token"])
    assert base["kv_bytes_per_token"] == 6 * 2 * 16 * 4  # layers, K and V, their width, bytes
    assert base["prompt_flops"]["weights"] > base["prompt_flops"]["attention"] > 0
    assert rows["permuted routes"]["prompt_flops"]["attention"] > 0


def test_depths_of_a_task_can_be_those_of_another(base, routers_dir, two_tasks, tmp_path):
    first, second = two_tasks
    own = settings(curve="0.1", baselines="block-influence", epsilon=50.0, limit=12, num_texts=30)
    alone, both = tmp_path / "alone", tmp_path / "both"
    [path] = run_evaluation(base, routers_dir, [first], own, alone)
    named = dataclasses.replace(own, fitted_on=f"{second.name}={first.name}")
    calls = []
    paths = run_evaluation(base, routers_dir, two_tasks, named, both, calls)
    expected, one, other = (json.loads(each.read_text()) for each in (path, *paths))
    assert one["choice"]["trials"] == other["choice"]["trials"] == expected["choice"]["trials"]
    assert one["choice"]["smallest"] == other["choice"]["smallest"]
    assert any(f"fitted and chosen on questions of {first.name}" in f for f in other["findings"])
    assert not any("fitted and chosen on" in finding for finding in one["findings"])
    names = [name for _, _, name in calls]
    assert f"{first.name}: base on select" in names
    assert f"{second.name}: base on select" not in names


# --- several seeds -----------------------------------------------------------------------------


def test_routers_of_other_seeds_are_what_they_are_when_evaluated_alone(
    base, routers_dir, task, tmp_path
):
    save_routers(new_routers(base, seed=5), tmp_path / "other")
    config = settings(curve="0.1", baselines="permuted-routes", limit=12)
    alone = {}
    for folder in (routers_dir, tmp_path / "other"):
        [path] = run_evaluation(base, folder, [task], config, tmp_path / f"{folder.name} alone")
        alone[folder] = json.loads(path.read_text())
    calls = []
    both = [routers_dir, tmp_path / "other"]
    [path] = run_evaluation(base, both, [task], config, tmp_path / "both", calls)
    result = json.loads(path.read_text())
    done, total, _ = calls[-1]
    assert done <= total
    trained, *at_depth = result["seeds"]
    both = [each["systems"] for each in alone.values()]
    for key in ("accuracy", "executions", "gold_logprob", "text_loss"):
        values = [next(row for row in rows if row["name"] == "routed")[key] for rows in both]
        assert trained[key]["lowest"] == pytest.approx(min(values))
        assert trained[key]["highest"] == pytest.approx(max(values))
    means = [row["against_base"]["accuracy"]["mean"] for rows in both for row in rows[1:2]]
    assert trained["against_base"]["accuracy"]["mean"] == pytest.approx(sum(means) / 2)
    permuted = [rows[2]["routed_against"]["accuracy"]["mean"] for rows in both]
    assert trained["against_permuted"]["accuracy"]["mean"] == pytest.approx(sum(permuted) / 2)
    for row in at_depth:
        points = [
            point
            for each in alone.values()
            for point in each["curve"]
            if (point["system"], point["setting"]) == ("routed", row["setting"])
        ]
        assert row["num_seeds"] == len(points)
        assert row["executions"]["mean"] == pytest.approx(
            sum(point["executions"] for point in points) / len(points)
        )
    assert any(finding.startswith("Routers of 2 seeds") for finding in result["findings"])
    assert list(result["other_seeds"]) == [str(tmp_path / "other")]
    assert result["systems"] == [
        {**row, "seconds": mine["seconds"]}
        for row, mine in zip(alone[routers_dir]["systems"], result["systems"], strict=True)
    ]


def test_routers_of_another_model_among_the_seeds_are_refused(base, routers_dir, task, tmp_path):
    save_routers(new_routers(base, num_layers=5), tmp_path / "other")
    with pytest.raises(CheckpointError, match="num_layers"):
        run_evaluation(
            base, [routers_dir, tmp_path / "other"], [task], settings(), tmp_path / "eval"
        )
    assert not (tmp_path / "eval").exists()


# --- measured time ----------------------------------------------------------------------------


def test_time_is_measured_once_for_all_tasks_on_their_prompts(
    base, routers_dir, two_tasks, tmp_path, monkeypatch
):
    given = []

    def note(model, systems, prompts, rounds, clock):
        given.append(prompts)
        return measure(model, systems, prompts, rounds, clock)

    monkeypatch.setattr(latency, "measure", note)
    calls = []
    config = settings(limit=6, latency_rounds=2, baselines="none")
    run_evaluation(base, routers_dir, two_tasks, config, tmp_path, calls)
    [prompts] = given
    asked = [
        encode(base.tokenizer, task.prompt(example, "loglikelihood").text)[-len(prompts[0]) :]
        for task in two_tasks
        for example in task.examples("test")
    ]
    assert len(prompts) == 12  # six of each
    assert all(prompt in asked for prompt in prompts)
    assert read_latency(tmp_path).measured.num_rounds == 2
    assert [call[:2] for call in calls[-2:]] == [(4, 5), (5, 5)]
    result = json.loads((tmp_path / "builtin_facts.json").read_text())
    assert [row["name"] for row in result["systems"]] == ["base", "routed"]
    assert all("forward" not in layer.__dict__ for layer in base.model.model.layers)


def test_without_rounds_no_time_stands_beside_the_results(base, routers_dir, task, tmp_path):
    (tmp_path / "latency.json").write_text("of an earlier evaluation")
    run_evaluation(base, routers_dir, [task], settings(limit=4, baselines="none"), tmp_path)
    assert not (tmp_path / "latency.json").exists()


def test_an_evaluation_that_goes_on_measures_time_anew_as_often_as_it_is_told(
    base, routers_dir, task, tmp_path, monkeypatch
):
    config = settings(limit=4, baselines="none", latency_rounds=2)
    with monkeypatch.context() as broken_off:
        broken_off.setattr(stage, "write_latency", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_evaluation(base, routers_dir, [task], config, tmp_path)
    assert not list(tmp_path.glob("*.json"))
    monkeypatch.setattr(systems.TaskRun, "_ask", lambda *_: pytest.fail("all was asked"))
    once = dataclasses.replace(config, latency_rounds=1)
    run_evaluation(base, routers_dir, [task], once, tmp_path)
    assert read_latency(tmp_path).measured.num_rounds == 1


# --- interruptions -----------------------------------------------------------------------------


BROKEN_OFF = {
    "baselines": "permuted-routes,confidence-exit,block-repeat",
    "limit": 14,
    "batch_size": 2,
    "num_calibration": 4,
    "num_random_draws": 2,
}
"""Decided by routers, plans, another policy and a path; four blocks of four questions."""


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(systems, "LEAST_SCORED", 4)


def without_times(folder):
    result = json.loads((folder / "builtin_facts.json").read_text())
    rows = [{**row, "seconds": None} for row in result.pop("systems")]
    return {**result, "created": None}, rows


@pytest.mark.usefixtures("small_blocks")
def test_an_evaluation_interrupted_at_random_questions_ends_as_an_unbroken_one(
    base, routers_dir, task, tmp_path, monkeypatch
):
    moments, asked = random.Random(5), []
    breaks = False

    ask = systems.TaskRun._ask

    def interrupted(self, block, *args):
        if breaks and moments.random() < 1 / 6:
            raise KeyboardInterrupt
        answers = ask(self, block, *args)
        asked.append(block)
        return answers

    monkeypatch.setattr(systems.TaskRun, "_ask", interrupted)
    config = settings(**BROKEN_OFF)
    run_evaluation(base, routers_dir, [task], config, tmp_path / "unbroken")
    whole = list(asked)
    assert whole == whole[:4] * 5

    asked.clear()
    breaks, moments_in_it = True, 0
    while True:
        try:
            run_evaluation(base, routers_dir, [task], config, tmp_path / "broken")
        except KeyboardInterrupt:
            moments_in_it += len(list((tmp_path / "broken" / "partial").glob("*.*.json"))) > 1
            assert not (tmp_path / "broken" / "builtin_facts.json").exists()
            continue
        break
    assert moments_in_it >= 2, "the sample must break off inside of systems"
    assert asked == whole, "no block is asked twice"
    assert without_times(tmp_path / "broken") == without_times(tmp_path / "unbroken")
    first, second = (tmp_path / name / "samples.jsonl" for name in ("broken", "unbroken"))
    assert first.read_bytes() == second.read_bytes()
    assert not (tmp_path / "broken" / "partial").exists()


@pytest.mark.parametrize("other", ["settings", "questions", "dtype"])
def test_an_interrupted_evaluation_is_not_continued_as_another(
    other, base, routers_dir, task, tmp_path, monkeypatch
):
    monkeypatch.setattr(systems, "_mean", lambda *_: 1 / 0)
    config = settings(limit=4, baselines="none")
    with pytest.raises(ZeroDivisionError):
        run_evaluation(base, routers_dir, [task], config, tmp_path)
    if other == "settings":
        config = dataclasses.replace(config, seed=1)
    elif other == "questions":
        examples = type(task).examples
        monkeypatch.setattr(type(task), "examples", lambda *args: [*reversed(examples(*args)[:30])])
    else:
        half = copy.deepcopy(base.model).to(torch.bfloat16)
        base = dataclasses.replace(base, model=half)
    said = {"settings": "seed 0, now 1", "questions": "other .*questions", "dtype": "dtype"}[other]
    with pytest.raises(ConfigError, match=f"interrupted evaluation was made with .*{said}"):
        run_evaluation(base, routers_dir, [task], config, tmp_path)


@pytest.mark.parametrize("other", ["settings", "routers"])
def test_finished_results_are_not_replaced_by_those_of_another_evaluation(
    other, base, routers_dir, task, tmp_path
):
    config = settings(limit=4, baselines="none")
    [path] = run_evaluation(base, routers_dir, [task], config, tmp_path / "eval")
    before = path.read_bytes()
    if other == "settings":
        config, said = dataclasses.replace(config, seed=1), "seed 0, now 1"
    else:
        save_routers(new_routers(base, seed=9), tmp_path / "other")
        routers_dir, said = tmp_path / "other", "other routers"
    with pytest.raises(ConfigError, match=f"was made with {said}.*another --output-dir"):
        run_evaluation(base, routers_dir, [task], config, tmp_path / "eval")
    assert path.read_bytes() == before


def test_a_folder_with_foreign_files_is_refused_before_anything_is_asked(
    base, routers_dir, task, tmp_path, monkeypatch
):
    monkeypatch.setattr(systems.TaskRun, "_ask", lambda *_: pytest.fail("asked"))
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(RecordError, match=r"notes\.json isn't a result"):
        run_evaluation(base, routers_dir, [task], settings(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.json"]


@pytest.mark.usefixtures("small_blocks")
def test_blocks_change_no_outcome(base, routers_dir, task, evaluated, tmp_path):
    config = settings(baselines="permuted-routes,last-layers")
    run_evaluation(base, routers_dir, [task], config, tmp_path)
    samples = [row for _, row in read_json_lines(tmp_path / "samples.jsonl", dict[str, Any])]
    for sample, whole in zip(samples, evaluated[1], strict=True):
        for name, outcome in sample["systems"].items():
            other = whole["systems"][name]
            assert outcome["correct"] == pytest.approx(other["correct"])
            assert outcome["gold_logprob"] == pytest.approx(other["gold_logprob"], abs=TOLERANCE)
            assert outcome.get("decisions") == other.get("decisions")


def test_numbers_that_cannot_be_compared_are_not_kept(base, routers_dir, task, tmp_path):
    broken = copy.deepcopy(base.model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"a log-probability of question .* is nan; load"):
        run_evaluation(
            dataclasses.replace(base, model=broken), routers_dir, [task], settings(), tmp_path
        )
    assert not (tmp_path / "partial").exists()
