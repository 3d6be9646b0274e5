"""Static paths as systems of an evaluation, with routers and without, against the listed layers."""

import math
from contextlib import contextmanager
from typing import Any

import pytest

from drllm.config import EvaluateConfig
from drllm.errors import ConfigError, PathError
from drllm.evaluation import systems
from drllm.evaluation.answers import QuestionRunner
from drllm.evaluation.outcomes import TaskRuns
from drllm.evaluation.request import read_request
from drllm.evaluation.stage import evaluate
from drllm.model.identity import fingerprint
from drllm.model.load import BaseModel
from drllm.model.prompts import encode
from drllm.models.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.records.codec import read_json_lines
from drllm.records.results import read_results
from drllm.reporting.stage import report
from drllm.tasks.examples import choose
from drllm.tasks.registry import get_task
from drllm.work.listener import Listener
from slow_way import ListedModel, tiny_routers

NUM_QUESTIONS = 8
PATHS = {
    "four": StaticPath([0, 1, 3, 5]),
    "again": StaticPath([0, 3, 2, 3, 5]),
}
COSTS = {"four": 4.0, "again": 5.0}
TOLERANCE = 1e-4
END = 2


@pytest.fixture(scope="module")
def base(tiny_llama, tiny_tokenizer):
    model = tiny_llama(max_position_embeddings=1024)
    return BaseModel(model=model, tokenizer=tiny_tokenizer, name="tiny", revision=None)


@pytest.fixture(scope="module")
def routers(base):
    labels = {"base_fingerprint": fingerprint(base.model), "label_counts": ((2, 7, 1),) * 6}
    return tiny_routers(3, router_width=128, num_windows=8, **labels)


def small(**values):
    few: dict[str, Any] = {"limit": NUM_QUESTIONS, "num_texts": 4}
    return EvaluateConfig(**{**few, "batch_size": 5, **values})


class Hearing(Listener):
    """Checks that as much work is done in the end as was planned."""

    @contextmanager
    def progress(self, title, unit):
        calls = []
        yield lambda *args: calls.append(args)
        done, planned, _ = calls[-1]
        assert done == planned


def run(base, folder, paths=PATHS, task="builtin_facts", routers=(), **values):
    config, tasks = small(**values), [get_task(task)]
    evaluate(base, tasks, config, folder, paths=paths, routers=routers, listener=Hearing())
    [result] = read_results(folder)
    return result


@pytest.fixture(scope="module")
def evaluated(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    return run(base, folder), folder


@pytest.mark.parametrize("name", PATHS)
def test_each_question_is_answered_as_by_the_listed_layers(evaluated, base, name):
    listed = ListedModel(base.model, path=PATHS[name].layers)
    assert_outcomes(listed, base, *evaluated, name)


def assert_outcomes(listed, base, result, folder, name):
    task, losses = get_task("builtin_facts"), []
    examples = {example.id: example for example in task.examples("test")}
    samples = [row for _, row in read_json_lines(folder / "samples.jsonl", dict[str, Any])]
    for sample in samples:
        outcome, example = sample["systems"][name], examples[sample["id"]]
        prompt = task.prompt(example, "loglikelihood")
        context = encode(base.tokenizer, prompt.text)
        rows = [encode(base.tokenizer, prompt.text + text) for text in prompt.continuations]
        sums = listed.sums(context, [row[len(context) :] for row in rows])
        gold = sums[example.gold] - math.log(sum(math.exp(value) for value in sums))
        assert outcome["correct"] == float(sums.index(max(sums)) == example.gold)
        assert outcome["gold_logprob"] == pytest.approx(gold, abs=TOLERANCE)
        text = rows[example.gold]
        losses.append(-listed.sums(text[:1], [text[1:]])[0] / (len(text) - 1))
    loss = sum(choose(losses, 4, seed=0)) / 4  # of texts that are drawn
    assert result.system(name).text_loss == pytest.approx(loss, abs=TOLERANCE)


def test_without_routers_base_is_compared_with_the_paths(evaluated):
    result, _ = evaluated
    assert [system.name for system in result.systems] == ["base", *PATHS]
    assert [point.name for point in result.curve] == ["base", "again", "four"]
    assert (result.routed, result.routers, result.config["baselines"]) == (None, None, "none")
    for name, cost in COSTS.items():
        system = result.system(name)
        assert system.executions == pytest.approx(cost)
        assert system.against_base.accuracy.n == NUM_QUESTIONS
        assert system.routed_against is None
        assert system.reads_question is False
        assert system.prompt_flops.weights < result.base.prompt_flops.weights
    # K and V of four of the six layers, and of five executions that have an attention.
    kept = [system.kv_bytes_per_token / result.base.kv_bytes_per_token for system in result.systems]
    assert kept == pytest.approx([1, 4 / 6, 5 / 6])
    assert result.paths == {name: path.layers for name, path in PATHS.items()}
    assert result.headline_system is result.best_path
    assert result.best_path.accuracy == max(result.system(name).accuracy for name in PATHS)
    assert {result.system(name).against_base.accuracy.num_tests for name in PATHS} == {2}


def test_a_report_and_the_terminal_show_a_result_without_routers(evaluated, drllm, tmp_path):
    result, folder = evaluated
    best = result.best_path.name
    report(folder, output_dir=tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# Static paths of tiny on builtin_facts")
    assert f"{best} is the best of 2 paths on these questions." in page
    assert f"Path {best}: accuracy minus base's" in page
    for missing in ("routed minus system", "--routers", "Routers choose"):
        assert missing not in page
    shown = drllm("show", folder).out
    assert "four" in shown
    assert "on routed" not in shown


def test_with_routers_paths_are_compared_with_the_routed_model_too(
    evaluated, base, routers, tmp_path
):
    alone, _ = evaluated
    result = run(base, tmp_path, routers=routers, baselines="last-layers")
    assert [each.name for each in result.systems] == ["base", "routed", "last layers", *PATHS]
    for name in PATHS:
        ours, before = result.system(name), alone.system(name)
        assert (ours.accuracy, ours.executions) == (before.accuracy, before.executions)
        assert ours.gold_logprob == pytest.approx(before.gold_logprob, abs=TOLERANCE)
        assert ours.routed_against.accuracy.mean == pytest.approx(
            result.routed.accuracy - ours.accuracy
        )
    assert f"path {result.best_path.name} (" in result.headline


def test_answers_are_generated_under_a_path(base, tmp_path, monkeypatch):
    graded: dict[str, Any] = {}
    grade = systems.grade_system

    def keeping(system, questions, result, *args):
        graded[system.system.name] = questions.rendered, result.answers[0]
        return grade(system, questions, result, *args)

    monkeypatch.setattr(systems, "grade_system", keeping)
    result = run(base, tmp_path, task="builtin_arithmetic", limit=3)
    for name, path in PATHS.items():
        asked, answers = graded[name]
        listed = ListedModel(base.model, path=path.layers)
        for tokens, [answer] in zip(asked.prompt_tokens, answers, strict=True):
            new = listed.greedy(tokens, 15)  # as many as the task asks for
            new = new[: new.index(END)] if END in new else new
            assert answer == base.tokenizer.decode(new, skip_special_tokens=True)
        assert result.system(name).decode_executions == pytest.approx(COSTS[name])


def test_paths_are_tested_in_the_order_given_up_to_the_first_that_may_lose_too_much(
    base, tmp_path, monkeypatch
):
    monkeypatch.setattr(TaskRuns, "above_chance", True)
    enough = {"limit": 30, "num_texts": 30, "max_loss_increase": 100.0}
    paths = {"four": PATHS["four"], "five": StaticPath(range(5))}
    passed = run(base, tmp_path / "all", paths, max_drop=99.0, **enough)
    assert [trial.name for trial in passed.drop_test.trials] == ["four", "five"]
    assert passed.drop_test.chosen == passed.best_path.name == "five"
    assert passed.drop_test.sentence() in passed.findings
    assert passed.headline.startswith("Use path five (5 of 6 layers): it is shown to lose less")
    failed = run(base, tmp_path / "none", paths, max_drop=0.001, **enough)
    assert failed.drop_test.chosen is None
    assert failed.drop_test.untested == ("five",)


def test_the_old_name_of_the_limit_is_read(base, tmp_path):
    few = {"limit": 2, "num_texts": 2, "epsilon": 2.0}
    [result] = evaluate(base, "builtin_facts", None, tmp_path, paths={"four": PATHS["four"]}, **few)
    assert result.config["max_drop"] == result.drop_test.limits.max_drop == 2.0


@pytest.mark.parametrize(("max_drop", "status"), [(99, 0), (0.001, 1)])
def test_the_command_gives_the_answer_once_and_as_its_status(
    drllm, model_folder, tmp_path, monkeypatch, max_drop, status
):
    monkeypatch.setattr(TaskRuns, "above_chance", True)
    plan = tmp_path / "plan.json"
    plan.write_text('{"path": [0, 1, 2, 3, 4]}')
    folder, few = model_folder(num_layers=6), ("--limit", 30, "--num-texts", 2)
    words = ("--tasks", "builtin_facts", "--output-dir", tmp_path / "eval", *few)
    command = f"evaluate --device cpu --model {folder} --paths {plan} --max-drop {max_drop}"
    said = drllm(command, *words, status=status)
    [result] = read_results(tmp_path / "eval")
    out = " ".join(said.out.split())
    assert result.headline in out
    assert out.count(result.drop_test.sentence()) == 1
    assert (result.drop_test.chosen is None) == bool(status)


def test_two_paths_need_the_same_number_of_questions_in_table_and_curve(base, tmp_path):
    paths = {"four": PATHS["four"], "five": StaticPath(range(5))}
    result = run(base, tmp_path, paths, limit=20, num_texts=2)
    points = {point.name: point for point in result.curve}
    for system in result.systems[1:]:
        assert system.against_base.accuracy.p_corrected is not None
        assert points[system.name].against_base == system.against_base


def test_a_file_of_paths_may_be_given_as_a_path_of_python(tmp_path):
    file = tmp_path / "a,b.json"
    file.write_text('{"path": [0, 1, 2, 4, 5]}')
    config = EvaluateConfig(tasks="builtin_facts", limit=2)
    for paths in (file, [file], [str(file)]):
        request = read_request(config, paths=paths, has_routers=False)
        assert list(request.paths) == ["a,b"]
        assert request.config.paths == str(file)


def test_paths_that_cannot_be_systems_are_refused(base, tmp_path):
    file = tmp_path / "four.json"
    file.write_text('{"path": [0, 1, 2, 3]}')
    for paths, said in {
        f"{file},{file}": "two paths are called 'four'",
        "without:x": "give layers and ranges",
    }.items():
        with pytest.raises(PathError, match=said):
            run(base, tmp_path / "eval", paths)
    for name, path, said in (
        ("last layers", [0], "'last layers', as another system is"),
        ("routed", [0], "'routed', as another system is"),
        ("seven", [0, 6], "not a layer of a model of 6 layers"),
    ):
        with pytest.raises(PathError, match=said):
            run(base, tmp_path / "eval", {name: StaticPath(path)})
    assert not (tmp_path / "eval").exists()


def test_what_only_routers_have_is_refused_without_them(base, tmp_path):
    with pytest.raises(ConfigError, match="neither routers nor paths"):
        run(base, tmp_path, None)
    with pytest.raises(ConfigError, match="neither routers nor paths"):
        run(RoutedModel(base.model, tokenizer=base.tokenizer), tmp_path, None)
    refused = {"curve": "0.1", "baselines": "all", "num_calibration": 4, "latency": True}
    for name, value in refused.items():
        values = {name: value}
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} .* without routers"):
            run(base, tmp_path, **values)


def test_an_interrupted_evaluation_resumes_with_the_same_paths_alone(base, tmp_path, monkeypatch):
    asked, ask = [], QuestionRunner.__call__

    def once(self, prepared, block, steps):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(block.draws[0])
        return ask(self, prepared, block, steps)

    few = {"limit": 2, "num_texts": 2}
    monkeypatch.setattr(QuestionRunner, "__call__", once)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path, **few)
    changed = {**PATHS, "four": StaticPath([0, 1, 4, 5])}
    with pytest.raises(ConfigError, match=r"made with paths four layers"):
        run(base, tmp_path, changed, **few)

    def keeping(self, prepared, block, steps):
        asked.append(block.draws[0])
        return ask(self, prepared, block, steps)

    monkeypatch.setattr(QuestionRunner, "__call__", keeping)
    run(base, tmp_path, **few)
    assert asked[1:] == [*PATHS.values()]
    with pytest.raises(ConfigError, match=r"made with paths four.*another --output-dir"):
        run(base, tmp_path, changed, **few)
