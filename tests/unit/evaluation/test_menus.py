"""A menu as the routed system of an evaluation, with what it has to be better than."""

from collections import Counter
from statistics import fmean
from typing import Any

import pytest

from drllm.errors import ConfigError, PathError
from drllm.evaluation.run import evaluate
from drllm.models.base.load import BaseModel
from drllm.models.routing.routed_model import RoutedModel, detach
from drllm.paths import StaticPath
from drllm.records.codec import read_json_lines
from drllm.records.menu import BEST_SINGLE, BY_KIND, PERMUTED_CHOICES, RIVALS, find_menu
from drllm.records.results import read_results
from drllm.reporting.stage import report
from drllm.tuning.menu import make_menu
from healed_folder import written_healed
from paths_json import written_plans
from slow_way import tiny_adapter, tiny_routers

TASKS = "builtin_facts,builtin_arithmetic"
PATHS = {  # of which three is healed
    "five": StaticPath([0, 1, 2, 3, 5]),
    "four": StaticPath([0, 1, 3, 5]),
    "three": StaticPath([0, 1, 5]),
}
FEW: dict[str, Any] = {"limit": 8, "num_texts": 4, "latency_rounds": 0, "batch_size": 5}


@pytest.fixture(scope="module")
def base(tiny_llama, tiny_tokenizer):
    model = tiny_llama(max_position_embeddings=1024)
    return BaseModel(model=model, tokenizer=tiny_tokenizer, name="tiny", revision=None)


@pytest.fixture(scope="module")
def menu(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("menu")
    adapter = tiny_adapter(RoutedModel(base.model), [5])
    detach(base.model)
    fields = {"path": [0, 1, 5], "name": "three", "first_layer": 2, "adapter": adapter}
    written_healed(folder / "healed", base.model, base.identity, **fields)
    plain = {name: path for name, path in PATHS.items() if name != "three"}
    paths = f"{written_plans(folder, plain)},{folder / 'healed'}"
    make_menu(base, TASKS, None, folder, paths=paths, executions=4.1, num_fit=10, num_judged=10)
    return find_menu(folder)


@pytest.fixture(scope="module")
def evaluated(base, menu, tmp_path_factory):
    """The results by task, and the folder they are in."""
    folder = tmp_path_factory.mktemp("eval")
    evaluate(base, TASKS, None, folder, menu=str(menu.file.parent), **FEW)
    return {each.task: each for each in read_results(folder)}, folder


def outcomes(folder):
    """The outcome of every system on every question, by task."""
    rows = [row for _, row in read_json_lines(folder / "samples.jsonl", dict[str, Any])]
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row["task"], []).append(row["systems"])
    return found


def test_the_menu_is_the_routed_system_and_its_paths_and_rivals_stand_beside_it(evaluated):
    for result in evaluated[0].values():
        names = ["base", "routed", *RIVALS, *PATHS]
        assert [system.name for system in result.systems] == names
        assert result.routed.description.startswith("the menu chooses a path")
        assert all(result.system(name).routed_against for name in (*RIVALS, *PATHS))


def test_each_question_is_answered_as_along_the_path_that_it_is_given(evaluated):
    results, folder = evaluated
    names, all_alike = {6: "base", 5: "five", 4: "four", 3: "three"}, []
    for task, questions in outcomes(folder).items():
        taken = [names[sum(systems["routed"]["decisions"])] for systems in questions]
        for name, systems in zip(taken, questions, strict=True):
            assert systems["routed"]["correct"] == systems[name]["correct"]
            if (gold := systems[name]["gold_logprob"]) is not None:
                assert systems["routed"]["gold_logprob"] == pytest.approx(gold, abs=1e-4)
        if len(set(taken)) == 1:
            routed, path = results[task].routed, results[task].system(taken[0])
            assert routed.text_loss == pytest.approx(path.text_loss, abs=1e-4)
            assert routed.prompt_flops == path.prompt_flops
            all_alike += taken[:1]
    assert "three" in all_alike  # with its adapter


def test_rivals_are_mixtures_of_the_paths_at_the_menus_mean_executions(evaluated, menu):
    results, folder = evaluated
    pooled = next(iter(results.values())).pooled
    questions = outcomes(folder)
    routes = [s["routed"]["decisions"] for each in questions.values() for s in each]
    assert pooled.num_questions == len(routes) == 16
    ours = fmean(map(sum, routes))
    assert pooled.executions["routed"] == pytest.approx(ours)
    assert pooled.executions[PERMUTED_CHOICES] == pytest.approx(ours)
    assert pooled.executions[BEST_SINGLE] <= ours + 1e-6
    counts = Counter(map(sum, routes))  # by which the paths are told apart
    names = {6: "base", 5: "five", 4: "four", 3: "three"}
    shares = {name: counts[number] / 16 for number, name in names.items()}
    for task, result in results.items():
        expected = sum(share * result.system(name).text_loss for name, share in shares.items())
        assert result.system(PERMUTED_CHOICES).text_loss == pytest.approx(expected)
        best = menu.record.best_for(task).replace("full", "base")
        assert result.system(BY_KIND).text_loss == pytest.approx(result.system(best).text_loss)
        for systems in questions[task]:
            expected = sum(share * systems[name]["correct"] for name, share in shares.items())
            assert systems[PERMUTED_CHOICES]["correct"] == pytest.approx(expected)


def test_the_best_single_path_is_chosen_where_the_paths_of_the_menu_were_measured(
    menu,
):
    record = menu.record
    value = {n: sum(record.select[t][n] for t in record.tasks) for n in record.executions}
    for name, most in record.executions.items():
        [shares, _] = record.rivals({name: 1.0}, record.tasks)[BEST_SINGLE]
        assert sum(value[n] * share for n, share in shares.items()) >= value[name]
        assert sum(record.executions[n] * share for n, share in shares.items()) <= most + 1e-6


def test_a_task_that_is_no_kind_of_the_menu_has_no_oracle(menu):
    assert BY_KIND not in menu.record.rivals({"five": 1.0}, ["builtin_facts", "arc_easy"])


def test_findings_say_how_the_menu_does_over_all_tasks(evaluated):
    for result in evaluated[0].values():
        over = [each for each in result.findings if each.startswith("Over 16 questions of")]
        for name, said in zip((*RIVALS, "base"), over, strict=True):
            assert f"the menu minus {name}: accuracy" in said
        assert result.findings[1] == over[0]


@pytest.mark.thorough
def test_a_report_shows_a_menu(evaluated, tmp_path):
    report(evaluated[1], output=tmp_path)
    assert "the menu minus best single path" in (tmp_path / "report.md").read_text()


def test_a_second_evaluation_in_the_folder_is_the_same_or_refused(base, menu, evaluated, tmp_path):
    _, folder = evaluated
    paths = written_plans(tmp_path, PATHS)
    plain = make_menu(base, TASKS, None, tmp_path, paths=paths, num_fit=10, num_judged=10)
    assert plain.price == 0
    with pytest.raises(ConfigError, match="other menu"):
        evaluate(base, TASKS, None, folder, menu=str(tmp_path), **FEW)


def test_questions_that_fitted_a_menu_are_refused(base, menu):
    for split in ("search", "select"):
        with pytest.raises(ConfigError, match=r"menu.json was tuned on builtin_facts.*on test"):
            evaluate(base, TASKS, None, menu=str(menu.file.parent), split=split, **FEW)


def test_what_cannot_stand_beside_a_menu_is_refused(base, menu, tmp_path):
    given: dict[str, Any] = {"menu": str(menu.file.parent), **FEW}
    with pytest.raises(ConfigError, match=r"--menu .* beside routers"):
        evaluate(base, TASKS, None, routers=tiny_routers(3), **given)
    with pytest.raises(PathError, match="'five', as another system is"):
        evaluate(base, TASKS, None, paths={"five": StaticPath([0, 1])}, **given)
    with pytest.raises(PathError, match="'best single path', as another system is"):
        evaluate(base, TASKS, None, paths={BEST_SINGLE: StaticPath([0, 1])}, **given)
    with pytest.raises(ConfigError, match=r"--curve .* without routers"):
        evaluate(base, TASKS, None, curve="0.1", **given)
    with pytest.raises(ConfigError, match=r"holds no menu\.json"):
        evaluate(base, TASKS, None, menu=str(tmp_path), **FEW)
