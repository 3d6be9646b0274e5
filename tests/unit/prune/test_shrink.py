"""Shrink: what a run writes and how it goes on, its verdicts, and the command line of its parts."""

import json
import re
import shutil

import pytest
from msgspec.structs import replace

import drllm as package
from drllm.errors import ConfigError
from drllm.prune import shrink as module
from drllm.prune.repairs import lora
from drllm.records.shortened import (
    FULL,
    OTHER_TEXT,
    TRAINED,
    LossResult,
    ModelResult,
    ShrinkRecord,
    TaskResult,
    read_shrink,
)
from drllm.statistics.exclusion import Limits, end_at_failure
from drllm.statistics.verdicts import judge_counts, judge_means

pytestmark = pytest.mark.filterwarnings(  # transformers renames it; PEFT still asks by the old name
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)

SETTINGS = {"layers": 3, "minutes": 0.02, "compare_trained": True}
FLAGS = "--layers 3 --minutes 0.02 --compare-trained"
LIMITS = Limits(max_drop=3.0, max_loss_increase=0.05)


def write_questions(file, number=80):
    rows = [
        {"question": f"is {n} odd?", "choices": ["yes", "no"], "answer": 0} for n in range(number)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


# One run.


@pytest.fixture(scope="session")
def shrunk(model_folder, tmp_path_factory):
    """The record of a run, its folder, its model, and its questions. No test may change them."""
    root = tmp_path_factory.mktemp("shrink")
    questions = write_questions(root / "odd.jsonl")
    model = str(model_folder())
    record = package.shrink(model, None, root / "smaller", tasks=questions, **SETTINGS)
    return record, root, model, questions


@pytest.fixture
def unfinished(shrunk, tmp_path, monkeypatch):
    """A copy of the run's work, killed while the last model was measured, and what is called."""
    _, root, model, questions = shrunk
    shutil.copytree(root / "smaller.work", tmp_path / "smaller.work")
    (tmp_path / "smaller.work" / "shrink.json").unlink()
    (tmp_path / "smaller.work" / "measured-3.json").unlink()
    called = []

    def count(owner, name):
        original = getattr(owner, name)

        def call(*args, **options):
            called.append(name)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    count(module, "choose_layers")
    count(module, "measure_model")
    count(lora, "compute_losses")
    return tmp_path / "smaller", model, questions, called


def test_a_run_writes_a_checkpoint_with_its_record_and_card(shrunk):
    record, root, _, _ = shrunk
    output = root / "smaller"
    assert read_shrink(output / "shrink.json") == record
    assert json.loads((output / "config.json").read_text())["num_hidden_layers"] == 3
    assert record.verdict in (output / "README.md").read_text()
    assert (output / "model.safetensors").exists()


def test_the_record_has_the_full_model_the_one_trained_alike_and_the_candidate(shrunk):
    record, _, _, _ = shrunk
    assert [model.name for model in record.models] == [FULL, TRAINED, "3"]
    full, trained, short = record.models
    assert [len(model.layers) for model in record.models] == [4, 4, 3]
    assert full.pooled is full.against_trained is trained.against_trained is None
    assert trained.pooled is not None
    assert short.against_trained.n == short.pooled.n == record.counts["odd"][2]
    assert sum(record.counts["odd"]) == 80
    assert full.speed == 1
    assert full.tasks["odd"].measure == "acc_norm"
    assert set(full.losses) == {OTHER_TEXT}
    assert trained.draws > 0
    assert "refit" not in trained.repairs
    assert record.chosen == "3"
    columns, rows = record.list_rows()
    assert {len(row) for row in rows} == {len(columns)}
    assert rows[1][0] == TRAINED


def test_a_killed_run_repeats_nothing_that_is_finished(shrunk, unfinished):
    record, _, _, _ = shrunk
    output, model, questions, called = unfinished
    resumed = package.shrink(model, None, output, tasks=questions, **SETTINGS)
    assert called == ["measure_model"]
    for own, other in zip(resumed.models, record.models, strict=True):
        assert replace(own, speed=1.0) == replace(other, speed=1.0)
    assert (output / "config.json").exists()


def test_the_command_goes_on_with_the_work_and_ends_with_the_verdict(shrunk, unfinished, drllm):
    output, model, questions, called = unfinished
    said = drllm("shrink", model, questions, output, *FLAGS.split(), status=0)
    assert called == ["measure_model"]
    assert read_shrink(output / "shrink.json").verdict in " ".join(said.out.split())


@pytest.mark.parametrize("change", ["settings", "questions", "model"])
def test_the_work_of_another_run_is_refused(change, unfinished, tmp_path, model_folder):
    output, model, questions, _ = unfinished
    settings = SETTINGS | ({"seed": 3} if change == "settings" else {})
    if change == "questions":
        questions = write_questions(tmp_path / "odd.jsonl", 70)
    if change == "model":
        model = str(model_folder(seed=1))
    with pytest.raises(ConfigError, match="delete"):
        package.shrink(model, None, output, tasks=questions, **settings)
    assert not output.exists()


# Verdicts.


def make_model(name, num_layers, won=0, lost=0, rise=0.0, other=None, kind="options"):
    """Return a model that wins and loses some of 1,000 questions, and whose loss rises."""
    accuracy = None if name == FULL else judge_counts(won, lost, 1000)
    tasks = {"sums": TaskResult(accuracy=0.5, measure="acc", against_full=accuracy)}
    losses = {}
    full = [3 + number / 100 for number in range(60)]
    text_loss = judge_means("text_loss", [loss + rise for loss in full], full, seed=0)
    if kind != "options":
        source = {"text": "sums", "texts": "prose"}[kind]
        losses[source] = LossResult(loss=3, against_full=None if name == FULL else text_loss)
    if kind == "texts":
        tasks = {}
        accuracy = None
    if other is not None:
        losses[OTHER_TEXT] = LossResult(loss=other, against_full=text_loss)
    return ModelResult(
        name=name,
        layers=tuple(range(num_layers)),
        num_bytes=10**6 * num_layers,
        tasks=tasks,
        losses=losses,
        pooled=accuracy,
    )


def make_record(*candidates, limits=LIMITS, trained=None, kind="options", other=None, **fields):
    """Return the record of some candidates, tested in their order."""
    models = [make_model(FULL, 6, kind=kind, other=other)]
    if trained is not None:
        models.append(make_model(TRAINED, 6, 50, 0))
    record = ShrinkRecord(
        schema="drllm.shrink",
        schema_version=1,
        drllm_version="0",
        created="",
        model={},
        config={},
        inputs={},
        libraries={},
        counts={"sums": (3000, 500, 1000)},
        runtime={},
        limits=limits,
        models=(*models, *candidates),
        **fields,
    )
    if limits is None:
        return replace(record, chosen=candidates[0].name)
    trials = [module._try(model, limits) for model in record.candidates]
    tested = end_at_failure(trials, limits)
    record = replace(record, trials=tested.trials, chosen=tested.chosen)
    if record.chosen is None and record.is_forced:
        record = replace(record, chosen=record.fallback.name)
    return record


def sentences_of(record):
    """Return the sentences of a verdict; none may have more than three."""
    sentences = re.split(r"(?<=\.) ", record.verdict)
    assert len(sentences) <= 3
    return sentences


def test_a_gain_is_told_with_its_interval_and_that_the_trained_model_was_not_measured():
    first, second, third = sentences_of(
        make_record(make_model("4", 4, 100, 20, other=4.6), other=3.1)
    )
    assert first.startswith("OK: 4 of 6 layers")
    assert "8.0 points more" in first
    assert "--compare-trained" in second
    assert "3.10 to 4.60" in third


def test_a_gain_beside_the_model_trained_alike_is_told_as_their_difference():
    model = replace(make_model("4", 4, 100, 20), against_trained=judge_counts(10, 15, 1000))
    _, second = sentences_of(make_record(model, trained=True))
    assert "−0.5 points" in second
    assert "--compare-trained" not in second


def test_a_loss_below_the_limits_without_a_gain_is_ok():
    first, second = sentences_of(make_record(make_model("4", 4, 10, 12)))
    assert first.startswith("OK: 4 of 6 layers lose less than 3 points")
    assert "nats" not in first
    assert "−" in second


def test_a_loss_that_is_not_excluded_is_not_shown_with_the_needed_questions():
    record = make_record(make_model("5", 5, 60, 75))
    first, second = sentences_of(record)
    assert first.startswith("NOT SHOWN: 5 of 6 layers")
    assert "questions in all" in second
    of_file = replace(record, files=("sums",))
    number, four_times = (
        int(re.search(r"About ([\d,]+)", each.verdict)[1].replace(",", ""))
        for each in (record, of_file)
    )
    assert four_times == pytest.approx(4 * number, rel=0.2)


def test_a_loss_beyond_the_limits_is_a_no():
    first, second = sentences_of(make_record(make_model("5", 5, 10, 150)))
    assert first.startswith("NO: 5 of 6 layers")
    assert "--force" in second


def test_a_forced_model_is_not_called_ok_even_with_a_gain_elsewhere():
    record = make_record(make_model("5", 5, 10, 150), is_forced=True)
    assert record.chosen == "5"
    first, second = sentences_of(record)
    assert first.startswith("NO: ")
    assert "written all the same" in second


@pytest.mark.parametrize(("won", "word"), [(0, "as requested"), (250, "points more")])
def test_a_given_number_of_layers_has_no_ok(won, word):
    model = replace(make_model("4", 4, won, 60, other=5.0))
    record = make_record(model, limits=None, other=3.0)
    first = sentences_of(record)[0]
    assert first.startswith("4 of 6 layers")
    assert word in first


@pytest.mark.parametrize(
    ("kind", "rise", "lost", "passes"),
    [
        ("options", 1.0, 5, True),  # the loss of text isn't measured
        ("options", 0.0, 100, False),
        ("text", 0.0, 5, True),
        ("text", 0.2, 5, False),
        ("text", 0.0, 100, False),
        ("texts", 0.01, 0, True),
        ("texts", 0.2, 0, False),
    ],
)
def test_the_limits_follow_the_kind_of_answers(kind, rise, lost, passes):
    model = make_model("5", 5, 5, lost, rise, other=9.0, kind=kind)
    record = make_record(model, kind=kind, other=3.0)
    assert record.trials[0].passed == passes
    assert (record.chosen == "5") == passes
    assert len(record.trials[0].tasks) == 1  # other text is told, and not tested
    sentences_of(record)


def test_testing_stops_at_the_first_candidate_that_fails():
    models = [
        make_model("5", 5, 10, 12),
        make_model("4", 4, 10, 150),
        make_model("3", 3, 100, 20),
    ]
    record = make_record(*models)
    assert [trial.name for trial in record.trials] == ["5", "4"]
    assert record.chosen == "5"
    outcomes = [row[-1] for row in record.list_rows()[1]]
    assert outcomes == ["", "written", "not passed", "not tested"]
    assert record.to_markdown().count("\n") == 1 + 4


# The command line.


@pytest.fixture
def files(shrunk, tmp_path):
    """Words of commands: a model, a file of questions, a new folder, and one that isn't empty."""
    _, _, model, questions = shrunk
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    new = tmp_path / "new"
    return {"M": model, "Q": questions, "NEW": str(new), "FULL": str(full), "DIR": str(tmp_path)}


def expand(command, files):
    return [files.get(word, word) for word in command.split()]


@pytest.mark.parametrize("verb", ["gaps", "learn", "export", "shrink"])
def test_the_help_of_each_verb_prints(verb, drllm):
    assert f"drllm {verb}" in drllm(f"{verb} --help").out


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("gaps --model M --tasks Q --layers 0 --output-dir NEW", "--layers"),
        ("gaps --model M --tasks Q --layers x --output-dir NEW", "--layers"),
        ("gaps --model M --output-dir NEW", "--tasks"),
        ("gaps --model M --tasks Q --layers 1 --output-dir NEW", "from 2 to 3"),
        ("learn --model M --tasks Q --skip 1-9 --output-dir NEW", "--skip"),
        ("learn --model M --tasks Q --skip 3-1 --output-dir NEW", "3-1"),
        ("learn --model M --tasks Q --skip 2 --repairs refti --output-dir NEW", "refit"),
        ("learn --model M --tasks Q --skip 2 --output-dir FULL", "empty"),
        ("learn --model M --tasks Q --skip 0 --repairs refit --output-dir NEW", "layer 0"),
        ("export --model M --skip 0-3 --output-dir NEW", "4 layers"),
        ("export --model M --skip 2,2 --output-dir NEW", "twice"),
        ("export --model M --skip DIR:3 --output-dir NEW", "paths.json"),
        ("shrink M Q NEW --layers 4", "--layers"),
        ("shrink M Q NEW --save 0%", "--save"),
        ("shrink M Q NEW --save 25% --layers 3", "--save"),
        ("shrink M Q NEW --layers 3 --max-drop 2", "--max-drop"),
        ("shrink M none.jsonl NEW --layers 3", "none.jsonl"),
        ("shrink M Q FULL --layers 3", "empty"),
    ],
)
def test_wrong_input_is_refused_in_one_line(command, word, files, drllm, tmp_path):
    if "DIR:3" in command:
        command = command.replace("DIR:3", f"{files['DIR']}:3")
    said = drllm("", *expand(command, files), status=2)
    [line] = [line for line in said.err.splitlines() if not line.endswith(" …")]
    assert word in line
    assert not (tmp_path / "new").exists()


def test_too_few_held_out_questions_end_before_the_work_with_status_1(files, drllm, tmp_path):
    said = drllm("", *expand("shrink M Q NEW", files), status=1)
    assert "NOT SHOWN" in said.out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full"]


def test_a_run_in_which_no_candidate_passes_ends_with_status_1(files, drllm, monkeypatch):
    record = make_record(make_model("5", 5, 10, 150))
    monkeypatch.setattr(module, "shrink", lambda *_args, **_options: record)
    said = drllm("", *expand("shrink M Q NEW --force", files), status=1)
    assert "NO: 5 of 6 layers" in " ".join(said.out.split())


def test_gaps_learn_and_export_work_one_after_another(files, drllm, tmp_path):
    said = drllm("", *expand("gaps --model M --tasks Q --layers 3 --output-dir NEW", files))
    layers = json.loads((tmp_path / "new" / "paths.json").read_text())["paths"][0]["skip"]
    assert "paths.json:3" in "".join(said.out.split())
    for verb, more in (("learn", ["--tasks", files["Q"], "--minutes", "0"]), ("export", [])):
        words = ["--model", files["M"], "--skip", f"{tmp_path / 'new'}:3"]
        drllm(verb, *words, *more, "--output-dir", tmp_path / verb)
        config = json.loads((tmp_path / verb / "config.json").read_text())
        assert config["kept_layers"] == [layer for layer in range(4) if layer not in layers]
