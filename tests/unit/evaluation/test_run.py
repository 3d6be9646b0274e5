"""The evaluation stage on a tiny model, against asking question by question."""

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

from drllm.config import EvaluateConfig
from drllm.errors import CheckpointError, ConfigError, ModelError, RecordError
from drllm.evaluation import latency, outcomes, plan, stage
from drllm.evaluation.answers import QuestionRunner
from drllm.evaluation.baselines.base import read_curve, select_baselines
from drllm.evaluation.baselines.random_routes import permute_routes
from drllm.evaluation.latency import device_clock, measure
from drllm.evaluation.outcomes import TaskRuns
from drllm.evaluation.questions import needs_fitting
from drllm.evaluation.stage import evaluate
from drllm.model.identity import fingerprint
from drllm.model.load import BaseModel
from drllm.model.prompts import encode
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.checkpoint import load_routers, save_routers
from drllm.records.codec import read_json_lines
from drllm.records.latency import read_latency
from drllm.records.manifest import read_manifest
from drllm.records.results import read_results
from drllm.statistics.paired import holm
from drllm.tasks.examples import choose
from drllm.tasks.registry import get_task
from drllm.work.listener import Listener
from slow_way import ListedModel, tiny_routers

NUM_QUESTIONS = 24
SYSTEMS = [
    *("base", "routed", "permuted routes", "random decisions"),
    *("label frequency", "last layers", "evenly spaced"),
]
TOLERANCE = 1e-4
"""Nats between a continuation among others and alone (design figure; below 2e-5 here)."""


@pytest.fixture(scope="module")
def base(tiny_llama, tiny_tokenizer):
    model = tiny_llama(max_position_embeddings=1024)
    return BaseModel(model=model, tokenizer=tiny_tokenizer, name="tiny", revision=None)


def new_routers(base, seed=3, **values):
    fitting = {"num_windows": 8, "base_fingerprint": fingerprint(base.model)}
    labels = ((2, 7, 1),) * values.get("num_layers", 6)
    return tiny_routers(seed, router_width=128, **{**fitting, "label_counts": labels, **values})


@pytest.fixture(scope="module")
def routers_dir(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routers")
    save_routers(new_routers(base), folder)
    return folder


@pytest.fixture(scope="module")
def task():
    return get_task("builtin_facts")


def settings(**values):
    small = {"limit": NUM_QUESTIONS, "batch_size": 5, "num_texts": 6, **values}
    config = EvaluateConfig(**small)
    few = {}
    drawn = select_baselines("permuted-routes,random-decisions,label-frequency")
    if "num_random_draws" not in values and set(drawn) & set(select_baselines(config.baselines)):
        few["num_random_draws"] = 3
    if "num_calibration" not in values and needs_fitting(config):
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


@pytest.fixture(scope="module")
def run(base, routers_dir, task):
    """A function that evaluates, and returns the files of the tasks as they are read."""

    def evaluate_to(folder, model=base, tasks=(task,), routers=routers_dir, calls=None, **values):
        listener = Hearing()
        config = settings(**values)
        results = evaluate(model, tasks, config, folder, routers=routers, listener=listener)
        if calls is not None:
            calls += listener.calls
        assert [result.task for result in results] == [each.name for each in tasks]
        return [json.loads((folder / f"{result.task}.json").read_text()) for result in results]

    return evaluate_to


def samples_in(folder):
    return [row for _, row in read_json_lines(folder / "samples.jsonl", dict[str, Any])]


def by_name(result):
    return {row["name"]: row for row in result["systems"]}


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    calls = []
    [result] = run(folder, calls=calls)
    return result, samples_in(folder), calls


def loss_along(base, decisions, context, answer):
    """Return the mean loss of an answer's tokens in a plain model whose layer list is the path."""
    [logprob] = ListedModel(base.model, decisions).sums(context, [answer])
    return -logprob / len(answer)


@pytest.mark.parametrize("system", ["base", "routed"])
def test_every_sample_equals_the_question_asked_alone(evaluated, base, task, system):
    examples = {example.id: example for example in task.examples("test")}
    for sample in evaluated[1]:
        outcome, example = sample["systems"][system], examples[sample["id"]]
        prompt = task.prompt(example, "loglikelihood")
        context = encode(base.tokenizer, prompt.text)
        rows = [encode(base.tokenizer, prompt.text + text) for text in prompt.continuations]
        behind = [row[len(context) :] for row in rows]
        sums = ListedModel(base.model, outcome["decisions"]).sums(context, behind)
        gold = sums[example.gold] - math.log(sum(math.exp(value) for value in sums))
        assert outcome["answer"] == sums.index(max(sums))
        assert outcome["correct"] == float(outcome["answer"] == example.gold)
        assert gold == pytest.approx(outcome["gold_logprob"], abs=1e-4)


def test_the_loss_of_a_text_is_that_of_the_question_with_its_right_answer_under_its_route(
    evaluated, base, task
):
    result, samples, _ = evaluated
    examples = {example.id: example for example in task.examples("test")}
    for name in ("base", "routed", "last layers"):
        losses = []
        for sample in choose(samples, 6, seed=0):
            prompt = task.prompt(examples[sample["id"]], "loglikelihood")
            text = encode(base.tokenizer, prompt.text + prompt.continuations[prompt.gold])
            decisions = sample["systems"][name]["decisions"]
            losses.append(loss_along(base, decisions, text[:1], text[1:]))
        assert by_name(result)[name]["text_loss"] == pytest.approx(sum(losses) / 6, abs=TOLERANCE)


def test_routes_are_those_of_the_question_alone(evaluated, base, routers_dir, task):
    examples = {example.id: example for example in task.examples("test")}
    routed = RoutedModel(base.model, load_routers(routers_dir))
    seen = set()
    for sample in evaluated[1]:
        text = task.prompt(examples[sample["id"]], "loglikelihood").text
        routed.model(torch.tensor([encode(base.tokenizer, text)]))
        route = routed.last_route[0].tolist()
        assert route == sample["systems"]["routed"]["decisions"]
        seen.add(tuple(route))
    routed.detach()
    assert len(seen) > 1, "the sample must hold several routes"


def test_the_table_holds_every_system_and_the_file_says_what_was_evaluated(evaluated, base):
    result, samples, calls = evaluated
    rows = by_name(result)
    assert list(rows) == SYSTEMS
    assert len(samples) == result["num_questions"] == NUM_QUESTIONS
    for name, row in rows.items():
        mean = sum(sample["systems"][name]["correct"] for sample in samples) / NUM_QUESTIONS
        assert row["accuracy"] == pytest.approx(mean)
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert row["seconds"] > 0
    assert rows["base"]["executions"] == 6
    assert result["chance"] == 0.25
    assert "Next-token loss" in " ".join(result["findings"])
    assert (result["model"], result["runtime"]) == (base.identity, base.runtime)
    assert len(result["routers_sha256"]) == 64
    assert result["config"]["seed"] == 0
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, *_ in calls] == sorted(done for done, *_ in calls)


def test_baselines_run_at_the_routed_model_s_executions(evaluated):
    rows = by_name(evaluated[0])
    routed = rows["routed"]["executions"]
    for name in ("permuted routes", "random decisions"):
        assert rows[name]["executions"] == pytest.approx(routed)
        assert rows[name]["draws"] == 3
    # Equal on average only: 3 draws of 24 questions, a row's standard deviation is about 1.2.
    assert rows["label frequency"]["executions"] == pytest.approx(routed, abs=0.5)
    assert routed > 6, "the sample must be a test of what comes next"
    for name in ("last layers", "evenly spaced"):  # there is nothing to drop
        assert rows[name]["executions"] == 6
    assert "Last layers: runs all 6 layers, since it can't repeat any." in evaluated[0]["notes"]


def test_labels_that_cannot_reach_the_routed_executions_are_said_not_to(base, run, tmp_path):
    only_execute = new_routers(base, label_counts=((0, 10, 0),) * 6)
    [result] = run(tmp_path, routers=only_execute, baselines="label-frequency", limit=8)
    rows = by_name(result)
    assert rows["label frequency"]["executions"] == 6
    assert rows["routed"]["executions"] != 6
    assert (
        "Label frequency: not at equal executions: the nearest mean that tilted frequencies give "
        f"is 6.00, and the routed model has {rows['routed']['executions']:.2f}."
    ) in result["notes"]


def test_routers_without_label_counts_are_compared_with_all_other_baselines(run, base, tmp_path):
    routers = new_routers(base, label_counts=())
    baselines = "label-frequency,last-layers"
    [result] = run(tmp_path, routers=routers, baselines=baselines, limit=8)
    assert list(by_name(result)) == ["base", "routed", "last layers"]
    assert any("carry no label counts" in note for note in result["notes"])


def test_routes_left_in_place_by_the_permutation_are_counted(evaluated):
    result, samples, _ = evaluated
    routes = torch.tensor([sample["systems"]["routed"]["decisions"] for sample in samples])
    generator = torch.Generator().manual_seed(0)
    drawn = [permute_routes(routes, generator) for _ in range(3)]
    shares = [float((routes == each).all(dim=1).double().mean()) for each in drawn]
    assert sum(shares) > 0, "the sample must hold questions of the same route"
    for name, row in by_name(result).items():
        expected = pytest.approx(sum(shares) / 3) if name == "permuted routes" else None
        assert row["unchanged_routes"] == expected


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


def test_the_cost_of_a_prompt_falls_with_the_executions_and_is_said_to_be_derived(evaluated):
    rows = by_name(evaluated[0])
    base, routed = rows["base"], rows["routed"]
    # All layers are alike, so K/V go with the executions; FLOPs hold the output head besides.
    share = routed["executions"] / base["executions"]
    assert routed["kv_bytes_per_token"] == pytest.approx(share * base["kv_bytes_per_token"])
    assert base["kv_bytes_per_token"] == 6 * 2 * 16 * 4  # layers, K and V, their width, bytes
    assert base["prompt_flops"]["weights"] > base["prompt_flops"]["attention"] > 0
    assert rows["permuted routes"]["prompt_flops"]["attention"] > 0


def test_the_same_seed_gives_the_same_result_and_the_model_is_given_back_untouched(
    run, base, evaluated, tmp_path
):
    [result] = run(tmp_path, baselines="permuted-routes,last-layers")
    first = by_name(evaluated[0])
    for row in result["systems"]:
        assert {**first[row["name"]], "seconds": None} == {**row, "seconds": None}
    assert read_manifest(tmp_path / "samples.jsonl", "samples") is not None
    assert all("forward" not in layer.__dict__ for layer in base.model.model.layers)


@pytest.mark.parametrize("is_first", [True, False])
def test_routers_of_another_model_are_refused(is_first, run, base, routers_dir, tmp_path):
    save_routers(new_routers(base, num_layers=5), tmp_path / "other")
    routers = [tmp_path / "other"] if is_first else [routers_dir, tmp_path / "other"]
    with pytest.raises(CheckpointError, match="num_layers 5"):
        run(tmp_path / "eval", routers=routers)
    assert not (tmp_path / "eval").exists()


def test_a_routed_model_is_evaluated_with_its_own_routers_and_given_back(
    base, routers_dir, task, evaluated, tmp_path
):
    routed = RoutedModel(base.model, load_routers(routers_dir), tokenizer=base.tokenizer)
    config = settings(baselines="none")
    try:
        [result] = evaluate(routed, [task], config)
        [kept] = evaluate(routed, ["builtin_facts"], config, tmp_path)
        with pytest.raises(ConfigError, match="its own routers"):
            evaluate(routed, [task], config, routers=routers_dir)
        with routed.fixed([1] * 6):
            routed.model(torch.tensor([[5, 6]]))
        assert routed.last_route.tolist() == [[1] * 6]
    finally:
        routed.detach()
    both = zip(result.systems, kept.systems, strict=True)
    for (system, again), expected in zip(both, evaluated[0]["systems"], strict=False):
        assert system.accuracy == again.accuracy == expected["accuracy"]
        assert system.gold_logprob == pytest.approx(expected["gold_logprob"])
    [read] = read_results(tmp_path)
    assert len(read.samples) == NUM_QUESTIONS
    assert load_routers(kept.routers).config.num_layers == 6


def test_a_model_needs_routers_each_once_and_a_tokenizer(base, routers_dir, task):
    with pytest.raises(ConfigError, match="neither routers nor paths are given"):
        evaluate(base, [task], settings())
    with pytest.raises(ConfigError, match="the same routers are given twice"):
        evaluate(base, [task], settings(), routers=[routers_dir, routers_dir])
    with pytest.raises(ConfigError, match="without a tokenizer"):
        evaluate(base.model, [task], settings(), routers=routers_dir)


def test_routers_trained_on_prompts_of_another_form_are_said(base, task):
    other, listener = new_routers(base, training={"rewards": ["letter"]}), Hearing()
    evaluate(base, [task], settings(limit=4, baselines="none"), routers=other, listener=listener)
    assert "trained on prompts for letter" in listener.notes[0]


def test_generated_answers_are_evaluated_under_each_route(run, tmp_path):
    [result] = run(tmp_path, tasks=[get_task("builtin_arithmetic")], limit=4, num_random_draws=2)
    assert result["kind"] == "generated"
    rows = by_name(result)
    assert list(rows) == SYSTEMS
    assert rows["routed"]["gold_logprob"] is None
    for sample in samples_in(tmp_path):
        answered = {name: "answer" in outcome for name, outcome in sample["systems"].items()}
        assert answered == {name: name in ("base", "routed") for name in SYSTEMS}
    assert rows["base"]["decode_executions"] == 6
    assert rows["permuted routes"]["executions"] == pytest.approx(rows["routed"]["executions"])


def test_baselines_that_lack_what_they_are_fitted_on_are_named(run, tmp_path):
    [result] = run(tmp_path, baselines="all", limit=8, num_random_draws=1, num_calibration=4)
    lacking = {"sequence router"}
    expected = [*SYSTEMS[:2], *(name for name in select_baselines("all") if name not in lacking)]
    assert list(by_name(result)) == expected
    for name in lacking:
        start = f"{name.capitalize()} isn't compared: it needs"
        assert any(text.startswith(start) for text in result["notes"])


def test_a_curve_has_every_system_at_every_depth_that_the_routers_can_be_brought_to(run, tmp_path):
    baselines = "permuted-routes,last-layers"
    [result] = run(tmp_path, curve="0.1,0.3", baselines=baselines, limit=12)
    first, *points = result["curve"]
    assert (first["system"], first["executions"], first["against_base"]) == ("base", 6.0, None)
    reached = {point["setting"] for point in points}
    missed = [finding for finding in result["notes"] if finding.startswith("Not evaluated at")]
    assert len(reached) + len(missed) == 2
    assert reached <= {"10 % saved", "30 % saved"}
    assert reached, "the sample must be a test"
    for setting in reached:
        at = {point["system"]: point for point in points if point["setting"] == setting}
        assert set(at) == {"routed", "permuted routes", "last layers"}
        executions = at["routed"]["executions"]
        assert at["permuted routes"]["executions"] == pytest.approx(executions)
        assert at["last layers"]["executions"] == pytest.approx(executions, abs=0.5 / 12)
        assert at["routed"]["text_loss"] > 0
    assert list(by_name(result)) == ["base", "routed", "permuted routes", "last layers"]


def test_depths_are_tested_from_the_fewest_layers_left_out(run, tmp_path, monkeypatch):
    monkeypatch.setattr(TaskRuns, "above_chance", True)
    settings = {"curve": "0.3,0.1", "max_drop": 99.0, "baselines": "none", "num_texts": 2}
    [result] = run(tmp_path, limit=30, num_calibration=4, **settings)
    trials = result["drop_test"]["trials"]
    assert [trial["name"] for trial in trials] == ["routed, 10 % saved", "routed, 30 % saved"]
    assert result["drop_test"]["limits"] == {"max_drop": 99.0, "max_loss_increase": None}
    assert any(finding.startswith("Shown (95 %): routed, 30 %") for finding in result["findings"])


def test_the_routed_model_is_tested_where_no_depth_is_asked_for(run, tmp_path):
    [result] = run(tmp_path, limit=4, max_drop=2.0, baselines="none", num_texts=2)
    [trial] = result["drop_test"]["trials"]
    assert trial["name"] == "routed"
    assert any(finding.startswith("Not shown that routed") for finding in result["findings"])


def test_a_depth_that_is_not_reached_is_not_shown_to_lose_less(run, tmp_path):
    settings = {"curve": "0.99", "max_drop": 99.0, "baselines": "none", "num_texts": 2}
    [result] = run(tmp_path, limit=4, num_calibration=4, **settings)
    assert any(finding.startswith("Not evaluated at 99 %") for finding in result["notes"])
    [trial] = result["drop_test"]["trials"]
    assert trial["name"] == "routed, 99 % saved"
    assert any(
        finding.startswith("Not shown that routed, 99 % saved loses")
        for finding in result["findings"]
    )


def test_depths_are_shares_each_named_once():
    assert read_curve("0.3,0.1") == [0.1, 0.3]
    assert read_curve(None) == []
    for wrong in ("0", "1", "x", "0.1,0.1", "-0.2", ""):
        with pytest.raises(ConfigError, match="--curve is"):
            read_curve(wrong)


@pytest.mark.thorough
def test_routers_of_other_seeds_are_what_they_are_when_evaluated_alone(
    run, base, routers_dir, tmp_path
):
    save_routers(new_routers(base, seed=5), tmp_path / "other")
    folders = [routers_dir, tmp_path / "other"]
    few = {"curve": "0.1", "baselines": "permuted-routes", "limit": 8, "num_calibration": 4}
    alone = [run(tmp_path / f"{each.name} alone", routers=each, **few)[0] for each in folders]
    calls = []
    [result] = run(tmp_path / "both", routers=folders, calls=calls, **few)
    assert calls[-1][0] <= calls[-1][1]
    trained, *at_depth = result["seeds"]
    assert at_depth, "the sample must be a test"
    rows = [by_name(each) for each in alone]
    for key in ("accuracy", "executions", "gold_logprob", "text_loss"):
        values = [each["routed"][key] for each in rows]
        assert trained[key]["lowest"] == pytest.approx(min(values))
        assert trained[key]["highest"] == pytest.approx(max(values))
    gains = [each["routed"]["against_base"]["accuracy"]["mean"] for each in rows]
    assert trained["against_base"]["accuracy"]["mean"] == pytest.approx(sum(gains) / 2)
    gains = [each["permuted routes"]["routed_against"]["accuracy"]["mean"] for each in rows]
    assert trained["against_permuted"]["accuracy"]["mean"] == pytest.approx(sum(gains) / 2)
    for row in at_depth:
        executions = [
            point["executions"]
            for each in alone
            for point in each["curve"]
            if (point["system"], point["setting"]) == ("routed", row["setting"])
        ]
        assert row["num_seeds"] == len(executions)
        assert row["executions"]["mean"] == pytest.approx(sum(executions) / len(executions))
    assert any(note.startswith("Routers of 2 seeds") for note in result["notes"])
    assert list(result["other_seeds"]) == [str(tmp_path / "other")]
    for row, mine in zip(alone[0]["systems"], result["systems"], strict=True):
        assert {**row, "seconds": mine["seconds"]} == mine


def test_time_is_measured_once_and_tests_are_corrected_for_all_tasks(
    run, base, two_tasks, tmp_path, monkeypatch
):
    given, calls = [], []

    def note(model, systems, prompts, *numbers, **options):
        given.append(prompts)
        return measure(model, systems, prompts, *numbers, **options)

    monkeypatch.setattr(latency, "measure", note)
    few = {"limit": 6, "latency": True, "latency_rounds": 2}
    few |= {"latency_read": 8, "latency_written": 2}
    few |= {"baselines": "none"}
    results = run(tmp_path, tasks=two_tasks, calls=calls, **few)
    [prompts] = given
    asked = [
        encode(base.tokenizer, task.prompt(example, "loglikelihood").text)[-len(prompts[0]) :]
        for task in two_tasks
        for example in task.examples("test")
    ]
    assert len(prompts) == 12  # six of each
    assert all(prompt in asked for prompt in prompts)
    assert read_latency(tmp_path).measured.num_rounds == 2
    done, total, _ = calls[-1]
    assert done == total, "all that was planned is done"
    found = [by_name(result)["routed"]["against_base"]["accuracy"] for result in results]
    assert [each["p_corrected"] for each in found] == holm([each["p"] for each in found])
    for result, each in zip(results, found, strict=True):
        assert list(by_name(result)) == ["base", "routed"]
        assert f"{each['p_corrected']:.2g} corrected for 2 tests" in " ".join(result["findings"])
    assert all("forward" not in layer.__dict__ for layer in base.model.model.layers)


def test_an_evaluation_that_goes_on_measures_time_anew_as_often_as_it_is_told(
    run, tmp_path, monkeypatch
):
    few = {"limit": 4, "baselines": "none", "latency": True}
    few |= {"latency_read": 8, "latency_written": 2}
    with monkeypatch.context() as broken_off:
        broken_off.setattr(stage, "write_latency", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, **few, latency_rounds=2)
    assert not list(tmp_path.glob("*.json"))
    monkeypatch.setattr(QuestionRunner, "__call__", lambda *_: pytest.fail("all was asked"))
    run(tmp_path, **few, latency_rounds=1)
    assert read_latency(tmp_path).measured.num_rounds == 1


BROKEN_OFF = {
    "baselines": "permuted-routes,confidence-exit,last-layers",
    "limit": 14,
    "batch_size": 2,
    "num_calibration": 4,
    "num_random_draws": 2,
}
"""Decided by routers, plans and another policy; four blocks of four questions."""


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(plan, "MIN_BLOCK_SIZE", 4)


def without_times(folder):
    result = json.loads((folder / "builtin_facts.json").read_text())
    rows = [{**row, "seconds": None} for row in result.pop("systems")]
    return {**result, "created": None}, rows, (folder / "samples.jsonl").read_bytes()


@pytest.mark.usefixtures("small_blocks")
def test_an_evaluation_interrupted_at_random_questions_ends_as_an_unbroken_one(
    run, tmp_path, monkeypatch
):
    moments, asked = random.Random(5), []
    breaks, breaks_in_it = False, 0
    ask = QuestionRunner.__call__

    def interrupted(self, prepared, block, steps):
        if breaks and moments.random() < 1 / 6:
            raise KeyboardInterrupt
        answers = ask(self, prepared, block, steps)
        asked.append(block.ids)
        return answers

    monkeypatch.setattr(QuestionRunner, "__call__", interrupted)
    run(tmp_path / "unbroken", **BROKEN_OFF)
    whole = list(asked)
    assert whole == whole[:4] * 5
    asked.clear()
    breaks = True
    while True:
        try:
            run(tmp_path / "broken", **BROKEN_OFF)
        except KeyboardInterrupt:
            breaks_in_it += len(list((tmp_path / "broken" / "partial").glob("*.*.json"))) > 1
            assert not (tmp_path / "broken" / "builtin_facts.json").exists()
            continue
        break
    assert breaks_in_it >= 2, "the sample must break off inside of systems"
    assert asked == whole, "no block is asked twice"
    assert without_times(tmp_path / "broken") == without_times(tmp_path / "unbroken")
    assert not (tmp_path / "broken" / "partial").exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [("settings", "seed 0, now 1"), ("questions", "other .*questions"), ("dtype", "dtype")],
)
def test_an_interrupted_evaluation_is_not_continued_as_another(
    other, said, run, base, task, tmp_path, monkeypatch
):
    few = {"limit": 4, "baselines": "none"}
    monkeypatch.setattr(outcomes, "mean_over_draws", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, **few)
    if other == "settings":
        few["seed"] = 1
    elif other == "questions":
        examples = type(task).examples
        monkeypatch.setattr(type(task), "examples", lambda *args: [*reversed(examples(*args)[:30])])
    else:
        few["model"] = dataclasses.replace(base, model=copy.deepcopy(base.model).bfloat16())
    with pytest.raises(ConfigError, match=f"interrupted evaluation in .* was made with .*{said}"):
        run(tmp_path, **few)


@pytest.mark.parametrize("other", ["settings", "routers"])
def test_finished_results_are_not_replaced_by_those_of_another_evaluation(
    other, run, base, tmp_path
):
    few = {"limit": 4, "baselines": "none"}
    run(tmp_path / "eval", **few)
    before = (tmp_path / "eval" / "builtin_facts.json").read_bytes()
    save_routers(new_routers(base, seed=9), tmp_path / "other")
    changed = {"seed": 1} if other == "settings" else {"routers": tmp_path / "other"}
    said = "seed 0, now 1" if other == "settings" else "other routers"
    with pytest.raises(ConfigError, match=f"was made with {said}.*another --output-dir"):
        run(tmp_path / "eval", **few, **changed)
    assert (tmp_path / "eval" / "builtin_facts.json").read_bytes() == before


def test_finished_results_are_not_mixed_with_those_of_another_task(run, two_tasks, tmp_path):
    task, half = two_tasks
    few = {"limit": 4, "baselines": "none"}
    run(tmp_path, tasks=[task], **few)
    before = (tmp_path / "samples.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"task 'builtin_facts', which isn't.*\(.*: half\)"):
        run(tmp_path, tasks=[half], **few)
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_routers_of_an_earlier_evaluation_are_not_overwritten(base, task, tmp_path):
    few = settings(limit=4, baselines="none")
    evaluate(base, [task], few, tmp_path, routers=new_routers(base))
    weights = tmp_path / "routers" / "0" / "routers.safetensors"
    before = weights.read_bytes()
    with pytest.raises(ConfigError, match=r"has other routers.*another --output-dir, or delete"):
        evaluate(base, [task], few, tmp_path, routers=new_routers(base, seed=9))
    assert weights.read_bytes() == before


def test_routers_that_an_earlier_start_saved_are_used_again(base, task, tmp_path):
    few = settings(limit=4, baselines="none")
    evaluate(base, [task], few, tmp_path, routers=new_routers(base))
    weights = tmp_path / "routers" / "0" / "routers.safetensors"
    written = weights.stat().st_mtime_ns
    evaluate(base, [task], few, tmp_path, routers=new_routers(base))
    assert weights.stat().st_mtime_ns == written


def test_a_folder_with_foreign_files_is_refused_before_anything_is_asked(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(QuestionRunner, "__call__", lambda *_: pytest.fail("asked"))
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(RecordError, match=r"notes\.json isn't a result"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.json"]


@pytest.mark.usefixtures("small_blocks")
def test_blocks_change_no_outcome(run, evaluated, tmp_path):
    run(tmp_path, baselines="permuted-routes,last-layers")
    for sample, whole in zip(samples_in(tmp_path), evaluated[1], strict=True):
        for name, outcome in sample["systems"].items():
            other = whole["systems"][name]
            assert outcome["correct"] == pytest.approx(other["correct"])
            assert outcome["gold_logprob"] == pytest.approx(other["gold_logprob"], abs=TOLERANCE)
            assert outcome.get("decisions") == other.get("decisions")


def test_numbers_that_cannot_be_compared_are_not_kept(run, base, tmp_path):
    broken = copy.deepcopy(base.model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"a log-probability of question .* is nan; load"):
        run(tmp_path, model=dataclasses.replace(base, model=broken))
    assert not (tmp_path / "partial").exists()
