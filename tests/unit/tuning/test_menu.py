"""Making a menu on a tiny model: what is chosen, kept, read again and refused."""

import shutil
from dataclasses import dataclass

import pytest
import torch

from drllm.config import MenuConfig
from drllm.errors import CheckpointError, ConfigError, PathError
from drllm.models.base.load import load
from drllm.models.routing.menu import load_menu
from drllm.models.routing.routed_model import RoutedModel, detach
from drllm.paths import StaticPath
from drllm.records.menu import best_mixture, find_menu
from drllm.records.static_paths import read_path
from drllm.tasks.registry import get_task
from drllm.tuning.judge import Judge, items_of
from drllm.tuning.menu import CHUNKS_FOLDER, _fit, _priced, make_menu
from drllm.tuning.parts import GOLD
from healed_folder import written_healed
from paths_json import written_plans
from slow_way import tiny_adapter

TASKS = "builtin_facts,builtin_arithmetic"
PATHS = {
    "five": StaticPath([0, 1, 2, 3, 5]),
    "four": StaticPath([0, 1, 3, 5]),
    "three": StaticPath([0, 1, 5]),
}
SMALL = {"num_fit": 10, "num_judged": 10}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The paths as `--paths` takes them."""
    return written_plans(tmp_path_factory.mktemp("paths"), PATHS)


@dataclass
class Priced:
    """What a price is looked for with: two kinds, and three paths of 6, 5 and 3 executions."""

    kinds: list[torch.Tensor]
    worth = torch.tensor([[0.0, -0.1, -2.0], [0.0, -0.5, 0.3]])
    costs = torch.tensor([6.0, 5.0, 3.0])

    def at(self, executions):
        config = MenuConfig(executions=executions)
        return _priced(self.kinds, self.worth, self.costs, 6, config)


@pytest.fixture(scope="module")
def separable():
    """States of two kinds that lie apart in one of eight directions, which others drown."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 60, 8, generator=generator) * torch.tensor([0.1] + [1e3] * 7)
    states[1, :, 0] += 1.0
    return states


def test_kinds_that_can_be_separated_get_the_path_that_suits_each(separable):
    kinds = _fit([*separable[:, :40]])
    told = Priced([kinds(each).softmax(dim=1) for each in separable[:, 40:]])
    price, (first, second) = told.at(None)
    assert (price, set(first), set(second)) == (0.0, {0}, {2})
    price, (first, second) = told.at(4.0)  # a layer more costs more than a tenth of a nat
    assert (set(first), set(second)) == ({1}, {2})
    assert 0.6 < price < 3.0  # of the kind that loses half a nat by it, no less


def test_the_lowest_price_is_taken_at_which_few_enough_layers_run(separable):
    told = Priced([each.softmax(dim=1) for each in (separable[:, :, :2] / 100)])
    means = []
    for executions in (5.5, 5.0, 4.0, 3.0):
        _, chosen = told.at(executions)
        means.append(sum(float(told.costs[each].mean()) for each in chosen) / 2)
        assert means[-1] <= executions
    assert means == sorted(means, reverse=True)
    with pytest.raises(ConfigError, match="--executions 2 is below the 3"):
        told.at(2.0)


def test_the_best_single_path_may_be_two_in_a_mixture_of_equal_cost():
    values, costs = {"a": 0.0, "b": -0.3, "c": -0.2}, {"a": 6.0, "b": 5.0, "c": 4.0}
    assert best_mixture(values, costs, 5.0) == {"a": 0.5, "c": 0.5}
    assert best_mixture(values, costs, 7.0) == {"a": 1.0}
    assert best_mixture(values, costs, 4.0) == {"c": 1.0}


@pytest.fixture(scope="module")
def made(routed, paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("menu")
    return make_menu(routed, TASKS, None, folder, paths=paths, executions=4.6, **SMALL), folder


def test_a_menu_is_read_as_it_was_made_and_not_made_again(made, routed, paths):
    record, folder = made
    assert find_menu(folder).record == record
    assert not (folder / CHUNKS_FOLDER).exists()
    with pytest.raises(ConfigError, match="holds a menu; choose another --output-dir"):
        make_menu(routed, TASKS, None, folder, paths=paths, executions=4.6, **SMALL)


def test_a_menu_keeps_to_the_executions_on_select_and_tells_kinds_apart(made):
    record, _ = made
    assert list(record.executions) == ["full", *PATHS]
    assert record.reads_at == 2
    costs = record.executions
    mean = sum(costs[n] * share for each in record.chosen.values() for n, share in each.items()) / 2
    assert mean <= 4.6
    for task in record.tasks:
        assert sum(record.chosen[task].values()) == pytest.approx(1.0)
        assert record.worth(task)["four"] == pytest.approx(
            record.select[task]["four"] - record.price * 4 / 6
        )


def test_paths_are_measured_on_no_question_that_a_healing_trains_on(routed, paths, monkeypatch):
    scores, read = Judge.scores, set()

    def noting(self, *args):
        read.update(tuple(item.question.context) for item in self.items)
        return scores(self, *args)

    monkeypatch.setattr(Judge, "scores", noting)
    make_menu(routed, TASKS, paths=paths, **SMALL)
    monkeypatch.undo()
    trained = set()
    for task in map(get_task, TASKS.split(",")):
        prompts = [task.prompt(each, task.rewards[0]) for each in task.examples("search")]
        trained |= {tuple(item.question.context) for item in items_of(routed, prompts, GOLD)}
    assert read
    assert read.isdisjoint(trained)


def test_a_loaded_menu_chooses_what_the_file_says(made, routed):
    record, folder = made
    menu = find_menu(folder)
    policy = load_menu(routed, menu)
    certain = torch.eye(2)
    policy.kinds.forward = lambda states: 1e3 * states  # of which kind is known
    best = [list(policy.paths)[place] for place in policy.choose(certain)]
    assert best == [record.best_for(task) for task in record.tasks]


def test_an_interrupted_run_resumes_and_makes_the_same_menu(
    made, routed, paths, tmp_path, monkeypatch
):
    scores, asked = Judge.scores, []

    def until(self, *args):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return scores(self, *args)

    settings = {"paths": paths, "executions": 4.6, **SMALL}
    monkeypatch.setattr(Judge, "scores", until)
    with pytest.raises(KeyboardInterrupt):
        make_menu(routed, TASKS, None, tmp_path, **settings)
    found = make_menu(routed, TASKS, None, tmp_path, **settings)
    assert len(asked) == 2 + 1  # one of two tasks was kept
    assert (found.paths, found.price, found.chosen) == (
        made[0].paths, made[0].price, made[0].chosen,
    )  # fmt: skip


def test_what_no_menu_can_be_made_of_is_refused(routed, paths, tmp_path):
    with pytest.raises(ConfigError, match="3 paths and 1 tasks"):
        make_menu(routed, "builtin_facts", paths=paths, **SMALL)
    with pytest.raises(ConfigError, match="0 paths and 2 tasks"):
        make_menu(routed, TASKS, **SMALL)
    with pytest.raises(PathError, match="leaves the full one at layer 2"):
        make_menu(routed, TASKS, paths=paths, reads_at=3, **SMALL)
    file = tmp_path / "full.json"
    file.write_text('{"path": [0, 1]}')
    with pytest.raises(PathError, match="called 'full', but isn't the full one"):
        make_menu(routed, TASKS, paths=str(file), **SMALL)


def test_a_menu_of_another_model_or_with_another_chooser_is_refused(
    made, routed, tiny_llama, tmp_path
):
    _, folder = made
    menu = find_menu(folder)
    other = RoutedModel(tiny_llama(seed=1))
    with pytest.raises(PathError, match="fingerprint"):
        load_menu(other, menu)
    shutil.copyfile(folder / "menu.json", tmp_path / "menu.json")
    with pytest.raises(CheckpointError, match=r"chooser\.safetensors is missing"):
        load_menu(routed, find_menu(tmp_path))
    (tmp_path / "chooser.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="isn't the chooser"):
        load_menu(routed, find_menu(tmp_path))


def test_where_one_path_is_wanted_a_menu_is_refused_in_one_line(
    made, drllm, model_folder, tmp_path
):
    _, folder = made
    with pytest.raises(PathError, match="is a menu, which chooses a path for each prompt"):
        read_path(str(folder))
    words = ("--model", model_folder(num_layers=6), "--path", folder, "--output", tmp_path / "out")
    said = drllm("export", *words, status=2).err
    assert len(said.splitlines()) == 1
    assert "is a menu" in said


def test_the_command_makes_a_menu_that_generates_and_loads(drllm, model_folder, tmp_path):
    base, folder, plan = model_folder(num_layers=6), tmp_path / "menu", tmp_path / "five.json"
    plan.write_text('{"path": [0, 1, 2, 3, 5]}')
    few = ("--num-fit", 8, "--num-judged", 6, "--executions", 5, "--output-dir", folder)
    shown = drllm("menu --device cpu --model", base, "--paths", plan, *few).out
    assert "five" in shown
    assert "price" in shown
    assert shown in drllm("show", folder).out
    said = drllm("generate --device cpu --max-new-tokens 2 --path", folder, "What is ice?").out
    assert "executions" in said
    few = ("--limit", 2, "--num-texts", 2, "--batch-size", 2, "--output-dir", tmp_path / "eval")
    said = drllm("evaluate --device cpu --tasks builtin_facts --menu", folder, *few).out
    assert "the menu minus best single path" in said
    said = drllm("evaluate --menu", tmp_path, "--output-dir", tmp_path / "no", status=2).err
    assert said == (
        f"drllm: --menu {tmp_path} holds no menu.json; give a folder of 'drllm menu' alone\n"
    )
    routed = RoutedModel.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        routed(torch.tensor([[5, 6, 7]]))
    assert tuple(routed.last_route[0].tolist()) in routed.policy.by_route


def test_healed_paths_come_with_a_menu_and_run_with_their_adapters(
    drllm, model_folder, tmp_path, monkeypatch
):
    base = load(str(model_folder(num_layers=6)), device="cpu")
    given = [tmp_path / name for name in ("less", "least")]
    for seed, (folder, path) in enumerate(zip(given, ([0, 1, 2, 3, 5], [0, 1, 5]), strict=True)):
        adapter = tiny_adapter(RoutedModel(base.model), [n for n in path if n > 1], seed)
        detach(base.model)
        fields = {"path": path, "first_layer": 2, "adapter": adapter, "name": folder.name}
        written_healed(folder, base.model, base.identity, **fields)
    paths, menu = ",".join(map(str, given)), tmp_path / "menu"
    record = make_menu(base, TASKS, None, menu, paths=paths, executions=5, **SMALL)
    assert list(record.executions) == ["full", "less", "least"]
    assert record.chosen_on == ("arc_easy",)
    assert record.reads_at == 2
    for folder in given:
        shutil.rmtree(folder)  # the menu has all that it needs
    ids = torch.tensor([[5, 6, 7, 8]])
    routed = RoutedModel.from_pretrained(menu, device="cpu")
    for place, path in enumerate(routed.policy.paths.values()):
        monkeypatch.setattr(routed.policy, "choose", lambda _, place=place: [place])
        with torch.no_grad():
            found = routed(ids).logits
            with routed.fixed(path):
                torch.testing.assert_close(found, routed(ids).logits)
    (menu / "adapters" / "less" / "adapter_model.safetensors").write_bytes(b"other")
    said = drllm("generate --device cpu --path", menu, "What?", status=2).err
    assert len(said.splitlines()) == 1
    assert "adapter" in said
