"""Rounds on the routers' own routes, against hooks that listen and passes made one by one."""

import copy
import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killable import (
    BASE,
    CONFIG,
    MODEL,
    D,
    L,
    Letters,
    N,
    kills_that_changed_nothing,
    make_records,
    pooled,
    run_script,
    train,
)
from msgspec import structs
from small import BrokenOffError, W, assert_windows, files_of

from drllm.errors import CheckpointError, ConfigError
from drllm.models.routers.checkpoint import load_routers
from drllm.models.routers.stack import RouterConfig, RouterStack
from drllm.models.routing.routed_model import RoutedModel
from drllm.training import stage
from drllm.training.checkpoint import CHECKPOINT_FILE, is_finished
from drllm.training.feature_store import Store
from drllm.training.features import Aggregate, collect, digest, each_once, sizes
from drllm.training.stage import discard, train_on
from drllm.training.trainer import Trainer, hold_out

IDENTITY = BASE.identity
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""Features are float32; prompts in other batches differ in the last bits."""
KILLED_ONCE = replace(CONFIG, num_epochs=1, num_seeds=1, on_policy_rounds=1)
ONE = replace(CONFIG, num_seeds=1, on_policy_rounds=1)
FILES = ["README.md", "config.json", "layers.json", "metrics.jsonl"]
FILES += ["router_config.json", "routers.safetensors"]


def new_routers(seed: int = 0) -> RouterStack:
    """Routers with random weights, whose decisions differ between prompts."""
    config = RouterConfig(num_layers=L, hidden_size=D, num_windows=W, router_width=5)
    routers = RouterStack(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        routers.decision_weight.mul_(5)
    return routers


def weights(folder: Path) -> bytes:
    return (folder / "routers.safetensors").read_bytes()


def tokens(record: Any) -> list[int]:
    return Letters()(record.prompt)["input_ids"]


def heard(routers: RouterStack, prompt: list[int]) -> tuple[list[torch.Tensor], list[int]]:
    """Route one prompt alone; what each layer was given, `[T, D]`, and the route."""
    routed = RoutedModel(copy.deepcopy(MODEL), routers)
    inputs: list[torch.Tensor] = []
    for layer in routed.model.model.layers:
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
    routed.model(input_ids=torch.tensor([prompt]))
    return inputs, routed.last_route[0].tolist()


def test_features_of_routers_are_what_a_hook_hears_at_inference_and_labels_stay():
    records, routers = make_records(N), new_routers()
    features = pooled(records, routers=routers)
    routes = []
    for row, record in enumerate(records):
        inputs, route = heard(routers, tokens(record))
        routes.append(route)
        assert len(inputs) == L
        assert_windows(features.rows([row])[0], inputs, **CLOSE)
        assert int(features.filled[row]) == min(len(inputs[0]), W)
    assert features.labels.tolist() == [list(r.optimal_layer_config) for r in records]
    assert {0, 1, 2} <= {decision for route in routes for decision in route}
    assert routes != features.labels.tolist()


def test_features_on_disk_are_of_certain_routers(tmp_path):
    records, store = make_records(N), tmp_path / "features"
    features = pooled(records, store=Store(store), routers=new_routers())
    again = pooled(records, store=Store(store), routers=new_routers())
    assert torch.equal(features.means, again.means)
    for others in (new_routers(1), None):
        with pytest.raises(ConfigError, match="other targets routers"):
            pooled(records, store=Store(store), routers=others)


@pytest.fixture
def parts():
    records = make_records(N)
    first = pooled(records)
    return [first, pooled(records, routers=new_routers()), pooled(records[3:])]


def test_rows_of_an_aggregate_are_those_of_its_parts_one_after_the_other(parts):
    whole = Aggregate(parts)
    total = 3 * N - 3
    joined = torch.cat([part.means for part in parts])
    assert torch.equal(whole.rows(range(total)), joined)
    mixed = [2 * N + 4, 0, N, N - 1, 2 * N, 5, 5, total - 1]
    assert torch.equal(whole.rows(mixed), joined[mixed])
    assert whole.rows([]).shape == (0, L, W, D)
    assert whole.labels.shape == (total, L)
    assert [whole.questions[N], whole.questions[2 * N]] == [
        parts[0].questions[row] for row in (0, 3)
    ]
    assert len(whole.tasks) == len(whole.filled) == total
    assert each_once(whole, mixed) == [0, N - 1, 5, 5]


def test_an_aggregate_is_of_the_same_targets_whose_sizes_are_those_of_its_parts(parts):
    whole = Aggregate(parts)
    assert digest(whole) == digest(parts[0])
    assert torch.equal(sizes(whole), torch.cat([sizes(part) for part in parts]))


def test_a_question_is_held_out_in_every_round_and_its_labels_count_once(parts):
    config = replace(CONFIG, num_seeds=1, logit_adjustment=1.0)
    whole = Aggregate(parts)
    plan, alone = (Trainer(each, IDENTITY, config) for each in (whole, parts[0]))
    held_out = {whole.questions[row] for row in plan.held_out}
    assert held_out == {whole.questions[row] for row in alone.held_out}
    assert not held_out & {whole.questions[row] for row in plan.trained}
    assert len(plan.held_out) > 2 * len(alone.held_out) > 0
    assert each_once(whole, plan.held_out) == alone.held_out
    assert plan.once == alone.trained
    assert plan.label_counts == alone.label_counts
    assert plan.class_weights == alone.class_weights
    assert torch.equal(plan.offsets, alone.offsets)


def test_what_is_too_few_to_hold_out_stays_so_with_several_routes():
    questions = [f"question {row}" for row in range(9)]
    assert hold_out([*questions, *questions], 0.3, 0, num_targets=9) == (list(range(18)), [])
    assert hold_out([*questions, *questions], 0.3, 0)[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two seeds of two rounds."""
    folder = tmp_path_factory.mktemp("rounds") / "run"
    train(folder)
    return folder


def test_earlier_rounds_are_kept_as_the_trainings_with_fewer_rounds(finished, tmp_path):
    for rounds in (0, 1):
        fewer = tmp_path / str(rounds)
        train(fewer, replace(CONFIG, on_policy_rounds=rounds))
        for seed in (fewer, fewer / "seed_1"):
            kept = files_of(finished / seed.relative_to(fewer) / f"round_{rounds}")
            assert sorted(kept) == FILES
            assert kept == {name: (seed / name).read_bytes() for name in FILES}


def test_only_routers_are_left(finished):
    for seed in (finished, finished / "seed_1"):
        names = {path.name for path in seed.iterdir()} - {"seed_1"}
        assert names == {*FILES, "round_0", "round_1"}
    assert len({weights(path.parent) for path in finished.rglob("routers.safetensors")}) == 6


def test_the_saved_config_counts_each_target_once(finished):
    first, last = (load_routers(finished / name).config for name in ("round_0", "."))
    assert last.label_counts == first.label_counts
    for name in ("num_trained", "num_held_out", "tasks", "class_weights", "targets"):
        assert last.training[name] == first.training[name]
    assert last.training["steps"] > 2 * first.training["steps"]
    assert last.training["settings"]["on_policy_rounds"] == 2


def test_a_round_equals_training_by_hand_on_both_routes(tmp_path):
    """Class weights off, since by hand each label would count twice."""
    config = replace(ONE, class_weights="none")
    train(tmp_path / "run", config)

    alone = replace(config, on_policy_rounds=0)
    first = pooled(make_records(N))
    train_on(first, IDENTITY, alone, tmp_path / "0")
    second = pooled(make_records(N), routers=load_routers(tmp_path / "0"))
    joined = replace(
        first,
        means=torch.cat([first.means, second.means]),
        filled=first.filled.repeat(2),
        labels=first.labels.repeat(2, 1),
        questions=first.questions * 2,
        tasks=first.tasks * 2,
    )
    train_on(joined, IDENTITY, config, tmp_path / "1")
    assert weights(tmp_path / "run" / "round_0") == weights(tmp_path / "0")
    assert weights(tmp_path / "run") == weights(tmp_path / "1") != weights(tmp_path / "0")


def test_each_seed_follows_its_own_routes_and_keeps_no_others(tmp_path, monkeypatch):
    seen: list[tuple[Path, bytes]] = []

    def pool(*arguments, store, routers=None, **options):
        if routers is not None:
            others = [path for path in tmp_path.rglob("round_0/features") if path != store.folder]
            assert others == []
            seen.append((store.folder, routers.hidden_weight.detach().numpy().tobytes()))
        return collect(*arguments, store=store, routers=routers, **options)

    monkeypatch.setattr(stage, "collect", pool)
    train(tmp_path, replace(CONFIG, on_policy_rounds=1))
    assert [folder for folder, _ in seen] == [
        tmp_path / "round_0" / "features",
        tmp_path / "seed_1" / "round_0" / "features",
    ]
    assert seen[0][1] != seen[1][1]


def test_a_target_that_cannot_be_run_along_a_route_is_left_out_there_and_said(
    tmp_path, caplog, monkeypatch
):
    def pool(model, tokenizer, records, *, routers=None, **options):
        if routers is not None:
            records = [*records[:4], structs.replace(records[4], prompt="x" * 49), *records[5:]]
        return collect(model, tokenizer, records, routers=routers, **options)

    monkeypatch.setattr(stage, "collect", pool)
    train(tmp_path, ONE)
    assert "along the routes of round 0, 1 of 20 targets are left out (1 longer than" in caplog.text
    first, last = (load_routers(tmp_path / name).config for name in ("round_0", "."))
    assert last.label_counts == first.label_counts


@pytest.mark.parametrize("kills", [pytest.param(6, marks=pytest.mark.thorough)])
def test_rounds_killed_at_random_moments_end_bit_for_bit_as_unbroken_ones(tmp_path, kills):
    run_script("train_rounds", tmp_path, kills)
    assert kills_that_changed_nothing(tmp_path, 2 * 2 * len(FILES)) == kills


@pytest.mark.parametrize("round_number", [1, 2])
def test_a_finished_round_is_not_trained_again(finished, tmp_path, round_number, monkeypatch):
    trained, broken_off = [], [round_number]

    def fit(examples, identity, config, output, **options):
        if config.on_policy_rounds in broken_off:
            raise BrokenOffError
        trained.append(output)
        return train_on(examples, identity, config, output, **options)

    monkeypatch.setattr(stage, "train_on", fit)
    with pytest.raises(BrokenOffError):
        train(tmp_path)
    broken_off.clear()
    train(tmp_path)
    seeds = (tmp_path, tmp_path / "seed_1")
    rounds = [seed / name for seed in seeds for name in ("round_0", "round_1", ".")]
    assert trained == rounds
    assert files_of(tmp_path) == files_of(finished)


def test_broken_off_in_the_last_clean_up_routers_are_unfinished_or_nothing_is_left(
    tmp_path, monkeypatch
):
    """At each file and folder that is deleted; else no later call would delete the rest."""
    unlink, rmdir = Path.unlink, Path.rmdir
    for moment in itertools.count():
        folder, counter = tmp_path / str(moment), itertools.count()

        def breaks_off(counter=counter, moment=moment) -> None:
            if next(counter) == moment:
                raise BrokenOffError

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", lambda *p, at=breaks_off, **o: (at(), unlink(*p, **o)))
            patched.setattr(Path, "rmdir", lambda *p, at=breaks_off: (at(), rmdir(*p)))
            try:
                train(folder, KILLED_ONCE)
            except BrokenOffError:
                assert not (is_finished(folder) and list(folder.rglob("features")))
            else:
                break
    assert moment > 8


def test_a_folder_with_routers_of_fewer_rounds_is_refused_before_anything_is_trained(tmp_path):
    train(tmp_path, replace(ONE, on_policy_rounds=0))
    before = weights(tmp_path)
    with pytest.raises(CheckpointError, match="holds trained routers of another run"):
        train(tmp_path, ONE)
    assert weights(tmp_path) == before
    assert not (tmp_path / "round_0").exists()


def test_a_checkpoint_of_fewer_rounds_is_refused(tmp_path):
    def break_off(*_) -> None:
        if (tmp_path / CHECKPOINT_FILE).exists():
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        train(tmp_path, replace(ONE, on_policy_rounds=0), at=break_off)
    with pytest.raises(CheckpointError, match="on_policy_rounds 0, now 1"):
        train(tmp_path, ONE)


def test_what_a_training_has_left_can_be_discarded(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    discard(tmp_path / "run", CONFIG)
    kept = [name for name in FILES if name != "routers.safetensors"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [*kept, "seed_1"]
