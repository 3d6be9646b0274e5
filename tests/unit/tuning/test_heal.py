"""Healing on a tiny model: what it learns, on what, what is kept of it, and what is refused."""

import hashlib
import json
import re
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch

from drllm import extras
from drllm.config import EvaluateConfig, HealConfig
from drllm.errors import ConfigError, PathError, RecordError, TaskError
from drllm.evaluation.request import refuse_tuning_questions
from drllm.models.routed_model import RoutedModel, unrouted
from drllm.models.routing.healed import install_path
from drllm.models.routing.injection import LayerCall
from drllm.paths import StaticPath
from drllm.records.healed import HEALED_FILE, read_healed
from drllm.records.static_paths import load_path
from drllm.tasks.registry import get_task
from drllm.tuning import distillation, heal_checks
from drllm.tuning import heal as healing
from drllm.tuning.distillation import Distillation
from drllm.tuning.heal import PARTIAL_FOLDER, HealRun, heal
from drllm.tuning.heal_texts import TextSource, digest_sources, read_sources, split_texts
from drllm.tuning.heal_training import make_batches
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
    found = [batch for _, batch in zip(range(40), make_batches(texts, config), strict=False)]
    again = [batch for _, batch in zip(range(40), make_batches(texts, config), strict=False)]
    assert found == again
    assert all(len(batch) * max(map(len, batch)) <= 128 for batch in found)
    named = [text[0] >= 1000 for batch in found for text in batch]
    assert 0.3 < sum(named) / len(named) < 0.7


def test_it_is_said_which_texts_are_cut_and_what_would_cut_none(routed):
    said = []

    class Noted(Listener):
        def note(self, text):
            said.append(text)

    long = [" ".join([f"word {n}"] * 60) for n in range(3)]
    tasks = {"tasks": [], "texts": ["Short.", "Also short.", *long], "steps": 1}
    healed(routed, **tasks, max_tokens=20, listener=Noted())
    assert "3 of 5 texts of texts" in said[0]
    whole = int(re.search("--max-tokens ([0-9]+)", said[0])[1])
    said.clear()
    healed(routed, **tasks, max_tokens=whole, listener=Noted())
    assert not any("cut" in each for each in said)


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
    for step in record["steps"]:
        step["scale"] = 1.0
    (tmp_path / HEALED_FILE).write_text(json.dumps(record))
    monkeypatch.setattr(healing, "split_texts", None)
    again = healed(routed, tmp_path)
    assert (again.curve, again.held_out) == (found.curve, found.held_out)


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
    with pytest.raises(ConfigError, match=r'pip install "drllm\[heal\]"'):
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


def test_it_ends_where_the_held_out_kl_has_not_fallen_for_long(routed, monkeypatch):
    monkeypatch.setattr("drllm.tuning.heal_training.PATIENCE", 2)
    found = healed(routed, path=StaticPath(range(6)))  # there is nothing to learn
    assert len(found.curve) < 11


def test_minutes_end_it_and_count_what_was_done_before(routed, tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(healing.time, "perf_counter", lambda: 1.0 * next(clock))
    timed = {"steps": None, "minutes": 1.0}
    with pytest.raises(StoppedError):
        healed(routed, tmp_path, listener=StopAt(3), **timed)
    found = healed(routed, tmp_path, **timed)
    assert 30 <= found.curve[-1].seconds <= 60


def test_it_ends_in_its_time_with_the_last_check_and_the_losses_by_source(routed, monkeypatch):
    """Measuring takes long beside a step, as on a small machine."""
    spent = [0.0]
    monkeypatch.setattr(healing.time, "perf_counter", lambda: spent[0])
    original_measure, original_step = heal_checks._measure, Distillation.compute_gradients

    def measure(routed, objective, paths, requests):
        spent[0] += 4.0 * (len(paths) + (objective == "kl"))
        return original_measure(routed, objective, paths, requests)

    def compute_gradients(this, batch):
        spent[0] += 1.0
        return original_step(this, batch)

    monkeypatch.setattr(heal_checks, "_measure", measure)
    monkeypatch.setattr(Distillation, "compute_gradients", compute_gradients)
    monkeypatch.setattr("drllm.tuning.heal_training.PATIENCE", 100)
    found = healed(routed, steps=None, minutes=2.0)
    assert 114 <= spent[0] <= 121  # one step more is begun than there is time for
    assert found.curve[-1].step > 1


def test_a_time_that_is_too_short_to_train_is_noted(routed, monkeypatch):
    notes = []

    class Noted(Listener):
        def note(self, text):
            notes.append(text)

    found = healed(routed, steps=None, minutes=1e-6, listener=Noted())
    assert [point.step for point in found.curve] == [0]
    assert "left no time to train" in notes[-1]


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
        ({"texts": "missing.txt"}, RecordError, "missing.txt"),
        ({"learning_rate": 1e18}, ConfigError, "lower --learning-rate"),
    ],
)
@pytest.mark.usefixtures("few_harness_tasks")
def test_what_makes_no_sense_is_refused_in_one_line(routed, settings, error, said):
    with pytest.raises(error, match=said) as raised:
        healed(routed, **settings)
    assert "\n" not in str(raised.value)
