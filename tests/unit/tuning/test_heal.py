"""Healing on a tiny model: what it learns, on what, what is kept of it, and what is refused."""

import hashlib
import json
import re
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model

from drllm import extras
from drllm.config import EvaluateConfig, HealConfig
from drllm.errors import (
    ArchitectureError,
    ConfigError,
    ModelError,
    PathError,
    TaskError,
)
from drllm.evaluation.request import refuse_tuning_questions
from drllm.models.routed_model import RoutedModel, unrouted
from drllm.models.routing.healed import install_path
from drllm.models.routing.injection import LayerCall
from drllm.paths import StaticPath
from drllm.records.healed import HEALED_FILE, read_healed
from drllm.records.static_paths import load_path
from drllm.tasks.registry import get_task
from drllm.tasks.texts import choose_calibration_texts
from drllm.tuning import distillation, heal_checks
from drllm.tuning import heal as healing
from drllm.tuning import refit as refit_module
from drllm.tuning.distillation import Distillation
from drllm.tuning.heal import PARTIAL_FOLDER, HealRun, heal
from drllm.tuning.heal_checks import LossesBefore
from drllm.tuning.heal_repair import choose_path_repair
from drllm.tuning.heal_texts import (
    TextSource,
    digest_sources,
    read_sources,
    split_texts,
)
from drllm.tuning.heal_tokens import TextTokenizer
from drllm.tuning.heal_training import draw_batches
from drllm.tuning.refit import refit
from drllm.work.listener import Listener
from drllm.work.store import ResultStore

PATH = StaticPath([0, 1, 3, 5])
SMALL = {
    "rank": 4,
    "steps": 12,
    "batch_size": 4,
    "max_tokens": 48,
    "num_held_out": 6,
    "limit": 40,
    "learning_rate": 0.05,
    "autocast": False,
    "repair": "none",
}


@pytest.fixture(scope="module")
def model(tiny_llama):
    """A tiny model whose layers do enough for a path without some of them to differ."""
    made = tiny_llama(max_position_embeddings=1024)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "layers" in name and weight.dim() == 2:
                weight.mul_(4)
    return made


@pytest.fixture(scope="module")
def routed(model, tiny_tokenizer):
    return RoutedModel(model, tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def unbroken(routed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("healed")
    before = {name: weight.clone() for name, weight in routed.model.state_dict().items()}
    return healed(routed, folder), folder, before


def healed(routed, folder=None, path=PATH, tasks="builtin_facts", texts=None, **settings):
    listener = settings.pop("listener", None)
    given = {**SMALL, **settings}
    return heal(routed, path, tasks, texts, None, folder, listener=listener, **given)


class Notes(Listener):
    """Collects notes."""

    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)

    def find(self, words):
        """Return the only note with these words."""
        [note] = [text for text in self.texts if words in text]
        return note


class StoppedError(Exception):
    pass


class StopAt(Listener):
    """Interrupts a healing when it notes a line for the so-manieth time."""

    def __init__(self, number):
        self.left = number

    def note(self, text):
        self.left -= 1
        if not self.left:
            raise StoppedError


# --- what is learned ---


def test_an_adapter_brings_a_path_near_to_the_full_one_on_texts_it_never_saw(unbroken):
    found, _, _ = unbroken
    kls = [check.held_out_kl for check in found.curve]
    assert min(kls) < 0.85 * kls[0]


def test_the_base_model_stays_as_it_was(unbroken, routed):
    _, _, before = unbroken
    after = routed.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_weights_that_ask_for_gradients_get_none(model, tiny_tokenizer):
    model.requires_grad_(True)
    try:
        heal(model, PATH, "builtin_facts", tokenizer=tiny_tokenizer, **{**SMALL, "steps": 1})
        assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    finally:
        model.requires_grad_(False)


def test_the_adapter_is_on_the_paths_layers_from_the_first_one_on(unbroken, routed, tmp_path):
    assert unbroken[0].adapted_layers == [0, 1, 3, 5]
    found = healed(routed, tmp_path, first_layer=3, steps=2)
    assert found.path == StaticPath(PATH.layers, found.adapter)
    assert found.adapted_layers == [3, 5]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [3, 5]


def test_the_full_path_can_be_given_the_same_adapter_as_a_control(routed):
    found = healed(routed, path=StaticPath(range(6)), steps=2)
    assert found.curve[0].held_out_kl == pytest.approx(0, abs=1e-6)


@contextmanager
def begun(routed, path, folder, **settings):
    """A healing that is about to train, its adapter filled."""
    config = HealConfig(tasks="builtin_facts", **{**SMALL, **settings})
    with unrouted(routed) as base:
        own = RoutedModel(base.model, tokenizer=base.tokenizer)
        try:
            run = HealRun(base, own, path, "", read_sources(config), config, folder, Listener())
            training = run.begin_training()
            with torch.no_grad():
                for weight in training.parameters:
                    weight.normal_(std=0.1)
            yield run, training
        finally:
            own.detach()


@pytest.mark.parametrize(
    ("path", "first_layer"),
    [
        (PATH, 0),
        (PATH, 3),
        (StaticPath([0, 2, 1, 2, 3, 3, 4]), 2),
        (StaticPath(range(6)), 4),
    ],
)
def test_teacher_and_student_are_what_each_path_alone_gives(routed, tmp_path, path, first_layer):
    texts = [tuple(range(4, 16)), tuple(range(30, 37))]
    with (
        begun(routed, path, tmp_path, first_layer=first_layer) as (made, training),
        torch.no_grad(),
    ):
        states = training.distillation.last_states(texts)
        norm = made.routed.injection.decoder.norm
        for alone, found in zip([made.full, made.healed], states, strict=True):
            with made.routed.fixed(alone):
                expected = [
                    made.routed.injection.decoder(input_ids=torch.tensor([text]), use_cache=False)
                    for text in texts
                ]
            torch.testing.assert_close(norm(found), torch.cat([each[0][0] for each in expected]))


def test_a_step_has_the_gradient_of_the_mean_kl_however_many_tokens_the_head_sees_at_once(
    routed, tmp_path, monkeypatch
):
    texts = [tuple(range(4, 16)), tuple(range(30, 37))]
    monkeypatch.setattr(distillation, "LOGITS_AT_ONCE", 101 * 5)
    with begun(routed, PATH, tmp_path) as (made, training):
        logits = []
        for alone in (made.full, made.healed):
            with made.routed.fixed(alone):
                rows = [made.routed(torch.tensor([text])).logits[0] for text in texts]
            logits.append(torch.cat(rows).log_softmax(dim=-1))
        full, ours = logits
        kl = (full.exp() * (full - ours)).sum(dim=-1).mean()
        expected = torch.autograd.grad(kl, training.parameters)
        found = float(training.distillation.compute_gradients(texts))
        assert found == pytest.approx(float(kl.detach()), rel=1e-4)
        for weight, gradient in zip(training.parameters, expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-6)


def test_what_both_paths_begin_with_is_run_once(routed, tmp_path, monkeypatch):
    run = []
    original = LayerCall.run
    monkeypatch.setattr(
        LayerCall,
        "run",
        lambda call, *args, **named: run.append(call.index) or original(call, *args, **named),
    )
    with begun(routed, PATH, tmp_path, first_layer=2) as (_, training):
        run.clear()
        training.distillation.last_states([(1, 2, 3)])
    assert run == [0, 1, 2, 3, 4, 5, 3, 5]


def test_the_folder_has_the_best_adapter_and_what_it_makes_of_the_held_out_texts(
    unbroken, routed, tmp_path
):
    found, folder, _ = unbroken
    with begun(routed, PATH, tmp_path) as (made, _):
        path = install_path(made.routed.injection, load_path(str(folder)))
        store = ResultStore(tmp_path / "kept", {}, stage="healing")
        held_out = made.prepare_texts(store).held_out["builtin_facts"]
        by_path = []
        for alone in (made.full, PATH, path):
            with made.routed.fixed(alone), torch.no_grad():
                rows = [made.routed(torch.tensor([text])).logits[0] for text in held_out]
            by_path.append([values.log_softmax(dim=-1) for values in rows])
    losses, kls = [], []
    for rows in by_path:
        each = zip(rows, held_out, strict=True)
        losses.append([-values[range(len(text) - 1), text[1:]].mean() for values, text in each])
        each = zip(by_path[0], rows, strict=True)
        kls.append([(full.exp() * (full - ours)).sum(dim=-1).mean() for full, ours in each])
    losses, kls = (torch.tensor(values).mean(dim=1).tolist() for values in (losses, kls))
    told = found.held_out["builtin_facts"]
    assert [told.full, told.path, told.healed] == pytest.approx(losses, rel=1e-4)
    measured = [check.held_out_kl for check in found.curve]
    assert [measured[0], min(measured)] == pytest.approx(kls[1:], rel=1e-3)


# --- on what ---


def test_texts_are_on_one_side_with_all_their_sequences():
    texts = {
        "long": [tuple(range(n, n + 100)) for n in range(30)],
        "short": [(1, 2)] * 3 + [(3, 4)],
    }
    trained, held_out = split_texts(texts, HealConfig(max_tokens=40, num_held_out=8))
    assert [len(held_out[name]) for name in texts] == [4, 1]
    assert not set(trained["long"]) & set(held_out["long"])
    assert all(piece[0] != held[0] for held in held_out["long"] for piece in trained["long"])
    assert {*trained["short"], *held_out["short"]} == {(1, 2), (3, 4)}


def test_sources_take_turns_and_a_batch_has_its_tokens_of_like_length():
    texts = {"many": [(n,) * 20 for n in range(200)], "few": [(1000 + n,) * 7 for n in range(5)]}
    config = HealConfig(batch_size=4, max_tokens=32)
    found = [batch for _, batch in zip(range(40), draw_batches(texts, config), strict=False)]
    again = [batch for _, batch in zip(range(40), draw_batches(texts, config), strict=False)]
    assert found == again
    assert all(len(batch) * max(map(len, batch)) <= 128 for batch in found)
    named = [text[0] >= 1000 for batch in found for text in batch]
    assert 0.3 < sum(named) / len(named) < 0.7


def test_it_is_said_which_texts_are_cut_and_what_would_cut_none(routed):
    notes = Notes()
    long = [" ".join([f"word {n}"] * 60) for n in range(3)]
    tasks = {"tasks": [], "texts": ["Short.", "Also short.", *long], "steps": 1}
    healed(routed, **tasks, max_tokens=20, listener=notes)
    assert "3 of 5 texts of texts" in notes.texts[0]
    assert "split long texts yourself, at the end of a section; heal and bypass" in notes.texts[0]
    whole = int(re.search("--max-tokens ([0-9]+)", notes.texts[0])[1])
    later = Notes()
    healed(routed, **tasks, max_tokens=whole, listener=later)
    assert not any("cut" in text for text in later.texts)


def test_sequences_longer_than_what_the_model_reads_are_refused(routed):
    with pytest.raises(ConfigError, match="--max-tokens is 1025, and this model reads 1024 tokens"):
        healed(routed, max_tokens=1025)


def test_files_of_texts_are_read_by_rows_or_paragraphs(tmp_path):
    rows, plain = tmp_path / "rows.jsonl", tmp_path / "plain.txt"
    rows.write_text('{"text": "One."}\n{"text": "Two.", "more": 1}\n')
    plain.write_text("First\nlines.\n\n  \nSecond.\n")
    found = read_sources(HealConfig(text=f"{rows},{plain}"))
    assert [(each.name, list(each.texts)) for each in found] == [
        ("rows", ["One.", "Two."]),
        ("plain", ["First\nlines.", "Second.\n"]),
    ]


def test_prompts_alone_are_read_with_the_full_paths_own_answers(routed, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(f'{{"prompt": "Say {i}."}}\n' for i in range(20)))
    found = healed(routed, tasks=str(file), texts=["A text.", "Another text."], steps=2)
    assert (found.tasks, found.texts) == (("mine",), ("texts",))
    assert found.held_out.keys() == {"mine", "texts"}


# --- the refit before the training ---

REFIT_PATH = StaticPath([0, 2, 3, 5])  # with two gaps, whose refit lowers the loss
WORSE_PATH = PATH  # its refit doesn't: of this random model, the full path isn't the best one
MAPS = ("0.mlp.down_proj", "3.mlp.down_proj")


def repaired(routed, folder=None, path=REFIT_PATH, **settings):
    """Heal with the default repair, which is the refit where it is possible."""
    return healed(routed, folder, path, **{"repair": None, **settings})


def refitted(routed, folder=None, path=REFIT_PATH, **settings):
    """Heal by a refit alone."""
    small = {name: SMALL[name] for name in ("limit", "max_tokens", "num_held_out")}
    return heal(
        routed, path, "builtin_facts", None, None, folder, **{**small, "minutes": 0, **settings}
    )


@pytest.fixture(scope="module")
def refit_alone(routed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refitted")
    return refitted(routed, folder), folder


@pytest.fixture(scope="module")
def both(routed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    return repaired(routed, folder), folder


def read_weights(routed, folder):
    """Return the weights of a healed path's adapter."""
    own = RoutedModel(routed.detach(), tokenizer=routed.tokenizer)
    try:
        path = install_path(own.injection, load_path(str(folder)))
        return own.injection.adapters.weights(path.adapter)
    finally:
        own.detach()
        routed.injection.install()


def test_a_refit_alone_has_the_weights_that_the_solver_gives_on_texts_to_train_on(
    refit_alone, routed, tmp_path
):
    record, folder = refit_alone
    assert (record.rank, record.alpha, record.curve) == (0, 0, ())
    assert record.refit.modules == MAPS
    assert not (folder / "adapter_config.json").exists()
    with begun(routed, REFIT_PATH, tmp_path) as (made, _):
        texts = made.prepare_texts(ResultStore(tmp_path / "kept", {}, stage="healing"))
    [chosen] = choose_calibration_texts(texts.to_train, 50_000, 0).values()
    assert sorted(chosen) == sorted(texts.to_train["builtin_facts"])
    assert record.refit.num_tokens == sum(map(len, chosen))
    weights = read_weights(routed, folder).refit
    for gap in refit(routed, REFIT_PATH, chosen):
        torch.testing.assert_close(weights[gap.name], gap.weight)


def test_training_starts_from_the_refit_and_leaves_it_as_it_is(refit_alone, both, routed):
    [alone] = refit_alone[0].held_out.values()
    [losses] = both[0].held_out.values()
    assert (losses.full, losses.path, losses.refit) == (alone.full, alone.path, alone.refit)
    assert alone.healed == alone.refit < alone.path
    assert losses.healed != losses.refit
    weights = read_weights(routed, both[1])
    refit_weights = read_weights(routed, refit_alone[1]).refit
    assert weights.refit.keys() == refit_weights.keys()
    assert all(torch.equal(weights.refit[name], weight) for name, weight in refit_weights.items())
    assert not weights.lora.maps.keys() & set(MAPS)
    kls = [point.held_out_kl for point in both[0].curve]
    assert min(kls) < kls[0]


def test_the_check_before_the_first_step_is_that_of_the_refit(refit_alone, both, routed, tmp_path):
    own = RoutedModel(routed.detach(), tokenizer=routed.tokenizer)
    try:
        path = install_path(own.injection, load_path(str(refit_alone[1])))
        store = ResultStore(tmp_path / "kept", {}, stage="healing")
        config = HealConfig(tasks="builtin_facts", **SMALL)
        sources = read_sources(config)
        tokenizer = TextTokenizer(own, config.max_tokens, store, Listener())
        texts = split_texts(tokenizer.tokenize_sources(sources), config)
        kl = heal_checks.measure_kl(own, path, texts.held_out["builtin_facts"])
    finally:
        own.detach()
        routed.injection.install()
    assert both[0].curve[0].held_out_kl == pytest.approx(kl, rel=1e-5)


def test_the_base_model_stays_as_it_was_after_a_refit(both, unbroken, routed):
    after = routed.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in unbroken[2].items())


def test_a_refit_alone_needs_no_peft(routed, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert refitted(routed).refit is not None
    with pytest.raises(ConfigError, match="for the refit alone give --minutes 0"):
        repaired(routed)


def test_both_paths_share_no_layer_that_is_refitted(routed, tmp_path, monkeypatch):
    """Layer 0 is refitted, so the student runs its own, although LoRA begins at layer 3."""
    run = []
    original = LayerCall.run

    def record(call, *args, **named):
        run.append(call.index)
        return original(call, *args, **named)

    config = HealConfig(tasks="builtin_facts", **{**SMALL, "first_layer": 3})
    weights = {MAPS[0]: routed.injection.refittable_modules[MAPS[0]].weight + 0.1}
    with unrouted(routed) as base:
        own = RoutedModel(base.model, tokenizer=base.tokenizer)
        own.injection.add_adapter(healing.ADAPTER, refit=weights)
        made = HealRun(base, own, REFIT_PATH, "", [], config, tmp_path, Listener())
        training = made.begin_training()
        monkeypatch.setattr(LayerCall, "run", record)
        training.distillation.last_states([(1, 2, 3)])
        own.detach()
    assert run == [*range(6), 0, 2, 3, 5]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi", "qwen2_moe", "gemma2"])
def test_other_families_are_refitted_trained_and_read_again(
    family, tiny_model, tiny_tokenizer, tmp_path, monkeypatch
):
    """Conv1D, parallel attention, biases, a shared expert, which can't have LoRA, and a norm."""
    monkeypatch.setattr(heal_checks.LossesBefore, "is_improved", True)  # of a random model
    routed = RoutedModel(tiny_model(family), tokenizer=tiny_tokenizer)
    record = repaired(routed, tmp_path, steps=2)
    assert [gap.layer for gap in record.refit.gaps] == [0, 3]
    weights = read_weights(routed, tmp_path)
    assert weights.refit.keys() == set(record.refit.modules)
    assert weights.lora.layers() == [0, 2, 3, 5]
    assert not weights.lora.maps.keys() & weights.refit.keys()
    kls = [point.held_out_kl for point in record.curve]
    assert len(kls) == 3
    assert min(kls) < kls[0]


def test_a_refit_that_is_not_better_is_left_out_and_lora_starts_from_plain(routed, tmp_path):
    notes = Notes()
    record = repaired(routed, tmp_path / "a", WORSE_PATH, repair="refit", listener=notes)
    assert "LoRA starts from the plain path" in notes.find("doesn't lower")
    assert record.refit is None
    plain = healed(routed, tmp_path / "b", WORSE_PATH)
    assert record.adapter_sha256 == plain.adapter_sha256
    assert record.held_out == plain.held_out


def test_a_refit_alone_that_is_not_better_writes_nothing(routed, tmp_path):
    folder = tmp_path / "healed"
    with pytest.raises(ConfigError, match="doesn't lower the next-token loss") as raised:
        refitted(routed, folder, WORSE_PATH)
    assert "\n" not in str(raised.value)
    assert not folder.exists()


IMPOSSIBLE = {
    "repeats": (StaticPath([0, 1, 1, 3, 5]), "layer 1 comes after layer 1"),
    "begins later": (StaticPath([1, 2, 3, 5]), "begins with layer 1"),
    "is the full path": (StaticPath(range(6)), "no gap to refit"),
}


@pytest.mark.parametrize(("path", "reason"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_path_that_can_have_no_refit_is_healed_by_lora_alone(routed, tmp_path, path, reason):
    notes = Notes()
    record = repaired(routed, tmp_path, path, steps=1, listener=notes)
    assert reason in notes.find("LoRA is trained alone")
    assert record.refit is None
    assert healed(routed, tmp_path, path, steps=1) == record  # it is the healing without a repair
    for settings in ({"repair": "refit"}, {"minutes": 0, "steps": None, **UNTRAINED}):
        with pytest.raises(PathError, match=reason):
            repaired(routed, path=path, **settings)


UNTRAINED = {
    name: getattr(HealConfig(), name)
    for name in ("rank", "batch_size", "learning_rate", "autocast")
}
"""The defaults of settings that have no effect without training."""


@pytest.mark.parametrize("repair", [None, "refit"])
def test_a_model_that_can_have_no_refit_is_healed_by_lora_alone(tiny_model, repair):
    routed = RoutedModel(tiny_model("mixtral"))
    notes = Notes()
    config = HealConfig(repair=repair)
    if repair is None:
        assert choose_path_repair(routed, PATH, config, notes) == "none"
        assert "experts" in notes.find("LoRA is trained alone")
    else:
        with pytest.raises(ArchitectureError, match=r"experts.*--repair none"):
            choose_path_repair(routed, PATH, config, notes)


def test_texts_that_are_too_few_for_a_refit_are_trained_on_alone(routed):
    notes = Notes()
    texts = ["A text.", "Another text."]
    record = repaired(routed, tasks=[], texts=texts, steps=1, listener=notes)
    assert record.refit is None
    assert "needs 2 texts" in notes.find("LoRA is trained alone")
    with pytest.raises(TaskError, match="at least 2 texts"):
        repaired(routed, tasks=[], texts=texts, repair="refit")


@pytest.mark.parametrize(
    ("texts", "warnings"),
    [
        (None, ["of one kind (builtin_facts)", "are few for a refit"]),
        (["A text.", "Another text.", "A third one."], ["are few for a refit"]),
    ],
)
def test_texts_of_one_kind_and_too_few_tokens_get_a_warning_each(routed, texts, warnings):
    notes = Notes()
    refitted_texts = {"tasks": "builtin_facts", "texts": texts}
    heal(routed, REFIT_PATH, listener=notes, limit=40, minutes=0, max_tokens=48, **refitted_texts)
    noted = [text for text in notes.texts if "SmolLM2-135M" in text]
    assert len(noted) == len(warnings)
    for words in warnings:
        assert "nats a token" in notes.find(words)


def test_before_a_refit_its_size_is_noted_and_then_its_time(routed):
    notes = Notes()
    record = repaired(routed, steps=1, listener=notes)
    size = notes.find("refit of 2 gaps")
    assert f"on {record.refit.num_tokens:,} tokens" in size
    assert "GB of memory" in size
    time = notes.find("the refit takes at most")
    assert notes.texts.index(size) < notes.texts.index(time)


def test_a_refit_that_does_not_fit_into_memory_is_refused_beforehand(routed, monkeypatch, tmp_path):
    folder = tmp_path / "healed"
    monkeypatch.setattr("drllm.tuning.refit_memory.free_bytes", lambda device: 1000)
    with pytest.raises(ModelError, match=r"0\.mlp\.down_proj.* GB of memory") as raised:
        repaired(routed, folder)
    assert "\n" not in str(raised.value)
    assert not folder.exists()


@pytest.mark.parametrize("num_solved", [0, 1, 2])
def test_an_interrupted_refit_solves_only_the_gaps_that_are_left(
    both, routed, tmp_path, monkeypatch, num_solved
):
    solved = []
    original = refit_module.solve_change

    def solve(*args, **named):
        solved.append(args)
        if len(solved) == num_solved + 1:
            raise StoppedError
        return original(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(refit_module, "solve_change", solve)
        if num_solved == 2:  # in the training then
            patch.setattr(Distillation, "compute_gradients", solve)
        with pytest.raises(StoppedError):
            repaired(routed, tmp_path)
    solved.clear()
    monkeypatch.setattr(
        refit_module, "solve_change", lambda *a, **n: solved.append(a) or original(*a, **n)
    )
    record = repaired(routed, tmp_path)
    assert len(solved) == 2 - num_solved
    assert record.adapter_sha256 == both[0].adapter_sha256
    assert record.held_out == both[0].held_out
    assert not (tmp_path / PARTIAL_FOLDER).exists()


@pytest.mark.parametrize("number", [2, 5, 8])
def test_a_healing_with_a_refit_that_is_interrupted_ends_with_the_same_adapter(
    both, routed, tmp_path, number
):
    with pytest.raises(StoppedError):
        repaired(routed, tmp_path, listener=StopAt(number))
    record = repaired(routed, tmp_path)
    assert record.adapter_sha256 == both[0].adapter_sha256
    assert record.refit.gaps == both[0].refit.gaps


def test_a_finished_refit_is_not_solved_again_and_other_repairs_are_refused(
    both, routed, monkeypatch
):
    record, folder = both
    monkeypatch.setattr(healing, "split_texts", None)
    assert repaired(routed, folder) == record
    assert repaired(routed, folder, repair="refit") == record
    with pytest.raises(ConfigError, match='made with repair "refit", now none'):
        healed(routed, folder, REFIT_PATH)
    with pytest.raises(ConfigError, match="refit_tokens 50000, now 40000"):
        repaired(routed, folder, refit_tokens=40_000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repair": "none"}, "leave nothing to do"),
        ({"rank": 4}, "--rank 4 has no effect with --minutes 0"),
        ({"steps": 4}, "--steps 4 has no effect with --minutes 0"),
    ],
)
def test_settings_without_effect_on_a_refit_alone_are_refused(routed, settings, message):
    with pytest.raises(ConfigError, match=message):
        refitted(routed, **settings)


# --- what is kept ---


def test_the_folder_has_what_was_returned_and_is_not_made_again(unbroken, routed, monkeypatch):
    found, folder, _ = unbroken
    assert read_healed(folder / HEALED_FILE) == found
    assert not (folder / PARTIAL_FOLDER).exists()
    monkeypatch.setattr(healing, "split_texts", None)
    assert healed(routed, folder) == found


def test_a_clean_up_that_was_killed_is_ended_by_the_next_start(routed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ResultStore, "remove", lambda store: None)
        healed(routed, tmp_path, steps=2)
    assert (tmp_path / PARTIAL_FOLDER).exists()
    healed(routed, tmp_path, steps=2)
    assert not (tmp_path / PARTIAL_FOLDER).exists()


@pytest.mark.parametrize("number", [1, 5])
def test_an_interrupted_healing_ends_with_the_same_adapter(unbroken, routed, tmp_path, number):
    with pytest.raises(StoppedError):
        healed(routed, tmp_path, listener=StopAt(number))
    assert healed(routed, tmp_path).adapter_sha256 == unbroken[0].adapter_sha256


def test_a_finished_folder_is_read_without_training_even_by_older_settings(
    unbroken, routed, tmp_path, monkeypatch
):
    """As an older version wrote it: with empty routes, scales of 1 and a removed setting."""
    found, folder, _ = unbroken
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    record = json.loads((tmp_path / HEALED_FILE).read_text())
    assert record["others"] == []
    record["config"]["patience"] = 3
    del record["config"]["repair"]  # older settings have no refit
    del record["config"]["refit_tokens"]
    for step in record["steps"]:
        step["scale"] = 1.0
    (tmp_path / HEALED_FILE).write_text(json.dumps(record))
    monkeypatch.setattr(healing, "split_texts", None)
    again = healed(routed, tmp_path)
    assert (again.curve, again.held_out) == (found.curve, found.held_out)
    with pytest.raises(ConfigError, match='made with no repair, now "refit"'):
        healed(routed, tmp_path, repair=None)


def test_the_digest_of_sources_is_that_of_the_class_of_earlier_versions():
    @dataclass
    class Source:
        name: str
        prompts: object = ()
        texts: object = ()
        is_open: bool = False
        is_divided: bool = False

    sources = [
        TextSource(name="mine", texts=["One.", "TextSource(two)"]),
        TextSource(name="other", is_open=True, is_divided=True),
    ]
    earlier = [
        Source("mine", texts=["One.", "TextSource(two)"]),
        Source("other", is_open=True, is_divided=True),
    ]
    text = repr(earlier).replace(f"{Source.__qualname__}(", "Source(")
    assert digest_sources(sources) == hashlib.sha256(text.encode()).hexdigest()


def test_without_peft_healing_is_refused_before_anything_runs(routed, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "peft'):
        healed(routed)


def test_another_healing_in_the_same_folder_is_refused(unbroken, routed, tmp_path):
    with pytest.raises(ConfigError, match="rank 4, now 2"):
        healed(routed, unbroken[1], rank=2)
    with pytest.raises(ConfigError, match="path"):
        healed(routed, unbroken[1], path=StaticPath([0, 1, 3]))
    with pytest.raises(StoppedError):
        healed(routed, tmp_path, listener=StopAt(3))
    with pytest.raises(ConfigError, match="other texts"):
        healed(routed, tmp_path, texts=["A text.", "Another text."])


def test_a_healing_of_prompts_through_another_chat_template_is_refused(
    routed, tmp_path, monkeypatch
):
    rows = "".join(
        f'{{"question": "What is {n} and {n}?", "answer": "{2 * n}", "grader": "exact"}}\n'
        for n in range(60)
    )
    questions = tmp_path / "mine.jsonl"
    questions.write_text(rows)
    finished = tmp_path / "finished"
    interrupted = tmp_path / "interrupted"
    found = healed(routed, finished, tasks=str(questions), steps=2)
    assert healed(routed, finished, tasks=str(questions), steps=2) == found
    with pytest.raises(StoppedError):
        healed(routed, interrupted, tasks=str(questions), steps=2, listener=StopAt(2))
    monkeypatch.setattr(routed.tokenizer, "chat_template", "{{ messages[0]['content'] }}!")
    with pytest.raises(ConfigError, match=r"the healed path in .* was made with other prompts"):
        healed(routed, finished, tasks=str(questions), steps=2)
    with pytest.raises(ConfigError, match=r"the interrupted healing in .* with other prompts"):
        healed(routed, interrupted, tasks=str(questions), steps=2)


def test_a_healed_path_of_an_older_version_is_not_compared_by_its_prompts(
    unbroken, routed, tmp_path
):
    found, folder, _ = unbroken
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    record = json.loads((tmp_path / HEALED_FILE).read_text())
    del record["prompts_sha256"]
    (tmp_path / HEALED_FILE).write_text(json.dumps(record))
    assert healed(routed, tmp_path).adapter_sha256 == found.adapter_sha256


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_refit_beside_another_adapter_is_refused(
    tiny_llama, tiny_tokenizer, tmp_path, monkeypatch
):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), adapter)
    handle = RoutedModel(model, tokenizer=tiny_tokenizer)
    monkeypatch.setattr(LossesBefore, "is_improved", True)  # a tiny model's refit may not be
    refitted(handle, tmp_path)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(2)
    with pytest.raises(ConfigError, match="was made with runtime adapters"):
        refitted(handle, tmp_path)


def test_it_ends_where_the_held_out_kl_has_not_fallen_for_long(routed, monkeypatch):
    monkeypatch.setattr("drllm.tuning.heal_training.PATIENCE", 2)
    found = healed(routed, path=StaticPath(range(6)))  # there is nothing to learn
    assert 6 <= len(found.curve) < 11  # while the learning rate is high, it goes on


def test_minutes_end_it_and_count_what_was_done_before(routed, tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(healing.time, "perf_counter", lambda: 1.0 * next(clock))
    timed = {"steps": None, "minutes": 1.0}
    with pytest.raises(StoppedError):
        healed(routed, tmp_path, listener=StopAt(3), **timed)
    found = healed(routed, tmp_path, **timed)
    assert 30 <= found.curve[-1].seconds <= 60


@pytest.mark.parametrize("repair", ["none", "refit"])
def test_it_ends_in_its_time_with_the_last_check_and_the_losses_by_source(
    routed, monkeypatch, repair
):
    """Measuring takes long beside a step, as on a small machine. A refit's time isn't counted."""
    spent = [0.0]
    monkeypatch.setattr(healing.time, "perf_counter", lambda: spent[0])
    original_measure, original_step = heal_checks._measure, Distillation.compute_gradients

    def measure(routed, objective, paths, requests):
        spent[0] += 4.0 * (len(paths) + (objective == "kl"))
        return original_measure(routed, objective, paths, requests)

    def compute_gradients(this, batch):
        spent[0] += 1.0
        return original_step(this, batch)

    original_solve = refit_module.solve_change
    solve_seconds = [0.0]

    def solve(*args, **named):
        solve_seconds[0] += 300.0
        spent[0] += 300.0
        return original_solve(*args, **named)

    monkeypatch.setattr(refit_module, "solve_change", solve)
    monkeypatch.setattr(heal_checks, "_measure", measure)
    monkeypatch.setattr(Distillation, "compute_gradients", compute_gradients)
    monkeypatch.setattr("drllm.tuning.heal_training.PATIENCE", 100)
    found = healed(routed, path=REFIT_PATH, steps=None, minutes=2.0, repair=repair)
    assert solve_seconds[0] == (600.0 if repair == "refit" else 0.0)
    # One step more is begun than there is time for.
    assert 114 <= spent[0] - solve_seconds[0] <= 121
    assert found.curve[-1].step > 1


def test_a_time_that_is_too_short_to_train_is_noted(routed, monkeypatch):
    notes = Notes()
    found = healed(routed, steps=None, minutes=1e-6, listener=notes)
    assert [point.step for point in found.curve] == [0]
    assert notes.texts[-1].startswith("0.01 minutes left no time to train")


# --- what is refused ---


@pytest.mark.parametrize("split", ["search", "test"])
def test_questions_that_it_may_have_been_trained_on_are_not_reported(unbroken, split):
    config, tasks = EvaluateConfig(split=split), [get_task("builtin_facts")]
    plan = load_path(str(unbroken[1]))
    with pytest.raises(ConfigError, match="on test") if split == "search" else nullcontext():
        refuse_tuning_questions(plan, tasks, config)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"tasks": None}, ConfigError, "nothing to train on"),
        ({"path": None}, ConfigError, "--path"),
        ({"path": StaticPath([0, 9])}, PathError, "9"),
        ({"first_layer": 6}, ConfigError, "--first-layer 6 .* at most 5"),
        ({"tasks": "builtin_fact"}, TaskError, "builtin_facts"),
        ({"texts": ["Only one."]}, TaskError, "texts has 1 texts"),
        ({"texts": "notes.md"}, ConfigError, "notes.md"),
        ({"texts": "missing.txt"}, ConfigError, "missing.txt"),
        ({"learning_rate": 1e18}, ConfigError, "lower --learning-rate"),
    ],
)
@pytest.mark.usefixtures("few_harness_tasks")
def test_what_makes_no_sense_is_refused_in_one_line(routed, settings, error, said):
    with pytest.raises(error, match=said) as raised:
        healed(routed, **settings)
    assert "\n" not in str(raised.value)
