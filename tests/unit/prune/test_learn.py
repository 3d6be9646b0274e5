"""Learning right answers: what it lowers, what it leaves alone, and how it goes on after a kill."""

import itertools
import json
import time
from contextlib import contextmanager, nullcontext

import pytest
import torch

from drllm.errors import ConfigError, RoutingError
from drllm.model.submodel import shorten
from drllm.prune.learn import learn
from drllm.prune.repairs import lora, refit
from drllm.prune.repairs.base import REPAIRS, Repair
from drllm.work.listener import Listener

SKIP = [2, 3]
LEARNED = {"steps": 12, "learning_rate": 5e-3, "refit_tokens": 600, "rank": 4}
"""Few steps, and no clock, so that two runs are the same."""
ROWS = {
    "options": lambda n: {"question": f"is {n} a number?", "choices": ["yes", "no"], "answer": 0},
    "answers in text": lambda n: {
        "question": f"what is {n}?",
        "answer": "a number",
        "grader": "exact",
    },
    "chats": lambda n: {
        "messages": [
            {"role": "user", "content": f"what is {n}?"},
            {"role": "assistant", "content": "a number"},
        ]
    },
    "prompts alone": lambda n: {"prompt": f"say {n}"},
}


@pytest.fixture
def base(tiny_base):
    return tiny_base()


@pytest.fixture
def write_file(tmp_path):
    """A function that writes a file of questions of a kind, and returns its name."""

    def write(kind="options", number=48):
        file = tmp_path / f"{kind.replace(' ', '-')}.jsonl"
        file.write_text("".join(json.dumps(ROWS[kind](n)) + "\n" for n in range(number)))
        return str(file)

    return write


def copy_weights(model):
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def assert_same_weights(model, weights):
    found = dict(model.named_parameters())
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name], weight), name


def list_attributes(model):
    """Return the names of all attributes of a model and its modules, with the modules' classes."""
    return {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}


class Interrupting(Listener):
    """Interrupts the training before a step, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def progress(self, title, unit):
        calls = []

        def count(*_args):
            calls.append(1)
            if title == "learning" and len(calls) > self.step:
                raise KeyboardInterrupt

        return nullcontext(count)


class Noting(Listener):
    """Keeps the notes."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


# What it does.


def test_a_task_that_can_be_learned_is_and_the_full_model_stays_as_it_is(base, write_file):
    full = copy_weights(base.model)
    short = shorten(base.model, SKIP)
    report = learn(short, write_file(), teacher=base, **LEARNED | {"steps": 40})
    assert [each["name"] for each in report["repairs"]] == ["refit", "lora"]
    assert report["repairs"][1]["kept"]
    assert report["repairs"][1]["after"] < 0.5 * report["repairs"][1]["before"]
    assert report["repairs"][1]["draws"] == 40 * 4
    assert_same_weights(base.model, full)
    assert not any(weight.requires_grad for weight in [*short.parameters()])
    json.dumps(report)


def test_the_curve_has_a_check_at_the_start_and_at_the_end(base, write_file):
    report = learn(shorten(base.model, SKIP), write_file(), teacher=base, **LEARNED)
    curve = report["repairs"][1]["curve"]
    assert [curve[0]["step"], curve[-1]["step"]] == [0, 12]
    assert len(curve) == lora.CHECKS + 1


def test_checks_that_take_long_are_made_less_often(base, write_file, monkeypatch):
    def check_slowly(student, teacher, items):
        time.sleep(0.3)
        return 1.0

    monkeypatch.setattr(lora, "measure_loss", check_slowly)
    short = shorten(base.model, SKIP)
    settings = {"learning_rate": 5e-3, "rank": 4}
    report = learn(short, write_file(), teacher=base, minutes=0.02, repairs="lora", **settings)
    [entry] = report["repairs"]
    assert len(entry["curve"]) == 2


def test_the_weights_of_the_best_check_stay(base, write_file, monkeypatch):
    checks = itertools.count()
    monkeypatch.setattr(lora, "measure_loss", lambda *_args: float(next(checks)))
    settings = LEARNED | {"repairs": "lora"}
    report = learn(shorten(base.model, SKIP), write_file(), teacher=base, **settings)
    assert report["repairs"][0]["after"] == report["repairs"][0]["before"]


@pytest.mark.parametrize("kind", ROWS)
def test_each_kind_of_question_is_learned_beside_texts(kind, base, write_file):
    texts = [f"some text, number {n}" for n in range(40)]
    short = shorten(base.model, SKIP)
    settings = LEARNED | {"steps": 2, "max_tokens": 100}
    report = learn(short, write_file(kind), teacher=base, texts=texts, **settings)
    assert [each["name"] for each in report["repairs"]] == ["refit", "lora"]
    for each in report["repairs"]:
        assert each["after"] > 0
        assert each["kept"] == (each["after"] < each["before"])


def test_no_minutes_are_the_refit_alone(base, write_file):
    by_itself = shorten(base.model, SKIP)
    learn(by_itself, write_file(), teacher=base, repairs="refit", refit_tokens=600)
    short = shorten(base.model, SKIP)
    report = learn(short, write_file(), teacher=base, minutes=0, refit_tokens=600)
    assert [each["name"] for each in report["repairs"]] == ["refit"]
    assert_same_weights(short, copy_weights(by_itself))


def test_a_loss_that_is_no_number_ends_in_one_line_and_the_model_is_as_before(base, write_file):
    short = shorten(base.model, SKIP)
    before = copy_weights(short)
    attributes = list_attributes(short)
    settings = LEARNED | {"learning_rate": 1e30, "repairs": "lora"}
    with pytest.raises(ConfigError, match="learning-rate") as caught:
        learn(short, write_file(), teacher=base, **settings)
    assert "\n" not in str(caught.value)
    assert_same_weights(short, before)
    assert list_attributes(short) == attributes


@pytest.mark.filterwarnings(  # transformers 5 has a new name for it, and 4 only the old one
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)
def test_checkpointed_activations_give_the_same_weights(base, write_file, monkeypatch):
    plain = shorten(base.model, SKIP)
    settings = LEARNED | {"repairs": "lora"}
    learn(plain, write_file(), teacher=base, **settings)
    calls = []
    original = torch.utils.checkpoint.checkpoint

    def count(*args, **options):
        calls.append(1)
        return original(*args, **options)

    monkeypatch.setattr("torch.utils.checkpoint.checkpoint", count)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", count)
    monkeypatch.setattr(lora, "SHARE_FOR_ACTIVATIONS", 0)
    short = shorten(base.model, SKIP)
    learn(short, write_file(), teacher=base, **settings)
    assert len(calls) == 12 * 4  # steps and layers
    for own, other in zip(short.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-3)
    assert not short.is_gradient_checkpointing
    assert not any(module.training for module in short.modules())


# LoRA is gone afterwards.


def test_nothing_of_lora_is_left(base, write_file, tmp_path):
    short = shorten(base.model, SKIP)
    before = list_attributes(short)
    learn(short, write_file(), teacher=base, **LEARNED)
    assert list_attributes(short) == before
    short.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("adapter*"))


def test_a_model_learns_a_second_time_and_so_does_a_shorter_one_of_it(base, write_file):
    short = shorten(base.model, SKIP)
    learn(short, write_file(), teacher=base, **LEARNED)
    learned = copy_weights(short)
    shorter = shorten(short, [2])
    for model in (shorter, short):
        report = learn(model, write_file(), teacher=base, **LEARNED | {"steps": 3})
        assert [each["name"] for each in report["repairs"]] == ["refit", "lora"]
        if model is shorter:
            assert_same_weights(short, learned)


# Repairs.


@contextmanager
def registered(monkeypatch, name, repair):
    """Register a repair inside the block."""
    assert "refit" in REPAIRS  # imports those of the package
    with monkeypatch.context() as patch:
        patch.setitem(REPAIRS._entries, name, repair)
        yield


class Scaled(Repair):
    """Gives the head a new weight, times a number."""

    factor = -3.0

    def check(self, model, teacher):
        if self.factor == 0:
            raise RoutingError("no factor")

    def fit(self, model, teacher, lessons, work, listener):
        head = model.lm_head
        head.weight = torch.nn.Parameter(self.factor * head.weight, requires_grad=False)
        return {"before": 1.0, "after": abs(self.factor), "factor": self.factor}


def test_a_repair_that_makes_the_model_worse_is_undone(base, write_file, monkeypatch, tmp_path):
    short = shorten(base.model, SKIP)
    weights = copy_weights(short)
    places = {name: each.data_ptr() for name, each in short.named_parameters()}
    noting = Noting()
    with registered(monkeypatch, "scaled", Scaled):
        report = learn(
            short,
            write_file(),
            teacher=base,
            repairs="scaled",
            work=tmp_path / "work",
            listener=noting,
        )
    [entry] = report["repairs"]
    assert not entry["kept"]
    assert entry["after"] > entry["before"]
    assert_same_weights(short, weights)
    assert {name: each.data_ptr() for name, each in short.named_parameters()} == places
    assert "undone" in noting.notes[-1]


def test_a_new_repair_is_a_class_and_its_name(base, write_file, monkeypatch):
    class Sharper(Scaled):
        factor = 0.5

    short = shorten(base.model, SKIP)
    with registered(monkeypatch, "sharper", Sharper):
        report = learn(short, write_file(), teacher=base, repairs="refit,sharper", refit_tokens=600)
    assert [each["name"] for each in report["repairs"]] == ["refit", "sharper"]
    assert report["repairs"][1]["factor"] == 0.5


def test_an_unknown_repair_is_refused_with_the_nearest_name(base, write_file):
    with pytest.raises(ConfigError, match="refit"):
        learn(shorten(base.model, SKIP), write_file(), teacher=base, repairs="refti")


def test_an_impossible_repair_is_left_out_unless_it_was_asked_for(base, write_file, monkeypatch):
    def refuse(*_args):
        raise RoutingError("packed")

    monkeypatch.setattr(refit.Refit, "check", refuse)
    noting = Noting()
    short = shorten(base.model, SKIP)
    report = learn(short, write_file(), teacher=base, listener=noting, **LEARNED)
    assert [each["name"] for each in report["repairs"]] == ["lora"]
    assert any("packed" in note for note in noting.notes)
    with pytest.raises(RoutingError, match="packed"):
        learn(short, write_file(), teacher=base, repairs="refit", steps=1)


# After an interruption.


@pytest.fixture
def interrupted(base, write_file, tmp_path, monkeypatch):
    """The folder of a training that was interrupted after six steps, and the refits so far."""
    solved = []
    solve_gaps = refit.solve_gaps
    monkeypatch.setattr(refit, "solve_gaps", lambda *args: solved.append(1) or solve_gaps(*args))
    monkeypatch.setattr(lora, "SAVE_SECONDS", -1)
    work = tmp_path / "work"
    short = shorten(base.model, SKIP)
    before = list_attributes(short)
    with pytest.raises(KeyboardInterrupt):
        learn(short, write_file(), teacher=base, work=work, listener=Interrupting(6), **LEARNED)
    assert list_attributes(short) == before
    assert (work / lora.STATE_FILE).exists()
    return work, solved


def test_an_interrupted_training_goes_on_to_the_weights_of_an_uninterrupted_one(
    interrupted, base, write_file, monkeypatch
):
    work, solved = interrupted
    steps = []
    original = lora.compute_losses

    def count(student, teacher, items):
        if torch.is_grad_enabled():
            steps.append(1)
        return original(student, teacher, items)

    monkeypatch.setattr(lora, "compute_losses", count)
    resumed = shorten(base.model, SKIP)
    report = learn(resumed, write_file(), teacher=base, work=work, **LEARNED)
    assert len(steps) == 12 - 6
    assert len(solved) == 1  # the refit isn't solved again
    assert not (work / lora.STATE_FILE).exists()
    whole = shorten(base.model, SKIP)
    expected = learn(whole, write_file(), teacher=base, **LEARNED)
    assert_same_weights(resumed, copy_weights(whole))
    curves = [
        [(point["step"], point["check"]) for point in each["repairs"][1]["curve"]]
        for each in (report, expected)
    ]
    assert curves[0] == curves[1]


def test_a_finished_run_is_read(interrupted, base, write_file, monkeypatch):
    work, solved = interrupted
    first = shorten(base.model, SKIP)
    report = learn(first, write_file(), teacher=base, work=work, **LEARNED)
    monkeypatch.setattr(lora.Lora, "fit", None)
    second = shorten(base.model, SKIP)
    assert learn(second, write_file(), teacher=base, work=work, **LEARNED) == report
    assert_same_weights(second, copy_weights(first))
    assert len(solved) == 1


@pytest.mark.parametrize("change", ["settings", "layers", "questions", "model"])
def test_the_folder_of_another_run_is_refused(change, interrupted, base, write_file, tiny_base):
    work, _ = interrupted
    settings = LEARNED | ({"learning_rate": 1e-3} if change == "settings" else {})
    other = tiny_base(seed=1) if change == "model" else base
    short = shorten(other.model, [1, 3] if change == "layers" else SKIP)
    number = 40 if change == "questions" else 48
    with pytest.raises(ConfigError, match="delete") as caught:
        learn(short, write_file(number=number), teacher=other, work=work, **settings)
    assert "\n" not in str(caught.value)
