"""A shrink of a tiny model: what it chooses, what it says, what it writes, and how it resumes."""

import json
import unicodedata

import pytest
from transformers import AutoModelForCausalLM

from drllm.config import ShrinkConfig
from drllm.errors import ConfigError, TaskError
from drllm.pipeline import shrink as stage
from drllm.pipeline import shrink_measurement, shrink_questions, shrink_speed
from drllm.pipeline.shrink import ShrinkRun, shrink
from drllm.pipeline.shrink_power import count_needed, find_power, smallest_excluded_drop
from drllm.pipeline.shrink_questions import read_questions
from drllm.records.shrink import SHRINK_FILE, read_shrink
from drllm.work.listener import Listener
from notes import Notes

SMALL = {"minutes": 0.03, "num_fit": 6, "rank": 2, "num_candidates": 2}


@pytest.fixture
def base(tiny_base):
    return tiny_base(max_position_embeddings=1024)


@pytest.fixture
def prompts(tmp_path):
    """A file of prompts without answers."""
    rows = [{"prompt": f"Say {number} in words."} for number in range(160)]
    return write_rows(tmp_path / "prompts.jsonl", rows)


@pytest.fixture
def questions(tmp_path):
    """A file of questions with options."""
    rows = []
    for number in range(60):
        choices = [str(number), str(number + 1)]
        rows.append({"question": f"What is {number} + 0?", "choices": choices, "answer": 0})
    return write_rows(tmp_path / "sums.jsonl", rows)


@pytest.fixture(autouse=True)
def little_work(monkeypatch):
    """Keep answers few and short, and measure time briefly."""
    monkeypatch.setattr(stage, "MAX_TOKENS", 16)
    monkeypatch.setattr(shrink_questions, "MAX_ANSWERS", 32)
    monkeypatch.setattr(shrink_speed, "MAX_ROUNDS", 1)


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_prompts_without_answers_are_judged_by_the_loss_of_the_full_models_answers(
    base, prompts, tmp_path
):
    output = tmp_path / "smaller"
    record = shrink(base, prompts, output_dir=output, max_loss_increase=0.2, **SMALL)
    assert record.verdict.startswith("OK: ")
    assert record.chosen is not None
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.num_hidden_layers == len(record.find(record.chosen).layers) < 6
    assert read_shrink(output / SHRINK_FILE) == record
    assert record.verdict in (output / "README.md").read_text()


def test_held_out_prompts_are_answered_themselves(base, prompts, tmp_path):
    """Paths are healed on the answers to other prompts."""
    config = ShrinkConfig(**SMALL)
    questions = read_questions(config, prompts)
    run = ShrinkRun(base, questions, config, tmp_path, Listener())
    [source], held_out = run.prepare_texts()
    [splits] = questions.tasks
    assert len(held_out["prompts"]) == len(splits.examples["test"])
    texts = [base.tokenizer.decode(tokens) for tokens in held_out["prompts"]]
    for example, text in zip(splits.examples["test"], texts, strict=True):
        assert example.question in text
    assert not set(texts) & set(source.texts)


def test_what_chooses_among_paths_repairs_none_of_them(base, prompts, tmp_path):
    rows = [{"text": f"The number {number} is even or odd."} for number in range(60)]
    file = write_rows(tmp_path / "numbers.jsonl", rows)
    config = ShrinkConfig(**SMALL)
    questions = read_questions(config, prompts, file)
    run = ShrinkRun(base, questions, config, tmp_path, Listener())
    sources, _ = run.prepare_texts()
    repaired_on = [text for source in questions.take_to_fit(sources) for text in source.texts]
    healed_on = [text for source in sources for text in source.texts]
    judged = [example.question for example in questions.tasks[0].examples["select"]]
    for part in ("select", "test"):
        [numbers] = questions.make_text_tasks(config.num_fit, str)
        judged += [example.question for example in numbers.examples[part]]
    assert len(judged) > 30
    assert not [question for question in judged if any(question in text for text in repaired_on)]
    healed = [question for question in judged if any(question in text for text in healed_on)]
    assert len(healed) > 30


def test_no_answers_are_generated_to_find_paths(base, tmp_path):
    rows = []
    for number in range(60):
        question = f"What is {number} + 0?"
        rows.append({"question": question, "answer": str(number), "grader": "exact"})
    file = write_rows(tmp_path / "sums.jsonl", rows)
    questions = read_questions(ShrinkConfig(**SMALL), file)
    run = ShrinkRun(base, questions, ShrinkConfig(**SMALL), tmp_path, Listener())
    sources, _ = run.prepare_texts()
    for path in run.tune_paths(sources).paths:
        score = path.on("sums", "select")
        assert score.text_loss is not None
        assert score.accuracy is None


def test_texts_and_answers_fit_into_a_short_context(tiny_base, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "MAX_TOKENS", 512)
    rows = [{"text": f"{number} " * 90} for number in range(160)]
    file = write_rows(tmp_path / "numbers.jsonl", rows)
    base = tiny_base(max_position_embeddings=96)
    record = shrink(base, prompts, texts=file, **SMALL)
    assert list(record.full.texts) == ["prompts", "numbers"]


def test_a_resumed_run_gets_the_minutes_it_began_with(base, prompts, tmp_path, monkeypatch):
    output = tmp_path / "smaller"
    with monkeypatch.context() as patch:
        patch.setattr(stage, "heal", None)
        with pytest.raises(TypeError):
            shrink(base, prompts, output_dir=output, **SMALL)
    with pytest.raises(ConfigError, match="minutes"):
        shrink(base, prompts, output_dir=output, **SMALL | {"minutes": 0.05})
    shrink(base, prompts, output_dir=output, **SMALL)


def test_each_candidate_has_no_warning_that_another_had(base, prompts):
    notes = Notes()
    shrink(base, prompts, listener=notes, **SMALL)
    warnings = [text for text in notes.texts if "of one kind" in text]
    assert len(warnings) == 1


def test_nothing_is_written_if_no_loss_can_be_excluded(base, questions, tmp_path):
    output = tmp_path / "smaller"
    record = shrink(base, questions, output_dir=output, **SMALL)
    assert record.chosen is None
    assert record.verdict.startswith("NOT SHOWN: ")
    assert not output.exists()
    # The model guesses on these questions, so the first candidate fails and no other is tested.
    assert [trial.passed for trial in record.trials] == [False]


def test_force_writes_the_candidate_that_failed_without_computing_again(
    base, questions, tmp_path, monkeypatch
):
    output = tmp_path / "smaller"
    failed = shrink(base, questions, output_dir=output, **SMALL).trials[-1].name
    monkeypatch.setattr(stage, "tune", None)
    monkeypatch.setattr(stage, "heal", None)
    monkeypatch.setattr(shrink_measurement, "evaluate", None)
    record = shrink(base, questions, output_dir=output, force=True, **SMALL)
    assert record.is_forced
    assert record.chosen == failed
    written = AutoModelForCausalLM.from_pretrained(output)
    assert written.config.num_hidden_layers == len(record.find(failed).layers)
    assert "--force" in record.verdict


def test_a_killed_shrink_resumes_with_what_it_has_done(base, prompts, tmp_path, monkeypatch):
    output = tmp_path / "smaller"

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shrink_measurement, "measure_speeds", stop)
        with pytest.raises(KeyboardInterrupt):
            shrink(base, prompts, output_dir=output, **SMALL)
    assert not output.exists()
    healed_before = sorted((tmp_path / "smaller.work").glob("healed-*/path.json"))
    contents = [file.read_bytes() for file in healed_before]
    shrink(base, prompts, output_dir=output, force=True, **SMALL)
    assert [file.read_bytes() for file in healed_before] == contents
    assert (output / SHRINK_FILE).exists()


def test_questions_are_measured_last_since_that_takes_longest(
    base, questions, tmp_path, monkeypatch
):
    """So a run that is killed while it measures time needn't measure them again."""

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(shrink_measurement, "measure_speeds", stop)
    monkeypatch.setattr(shrink_measurement, "evaluate", None)
    with pytest.raises(KeyboardInterrupt):
        shrink(base, questions, output_dir=tmp_path / "smaller", force=True, **SMALL)


def test_the_work_of_another_shrink_is_refused(base, prompts, tmp_path):
    output = tmp_path / "smaller"
    shrink(base, prompts, output_dir=output, layers=5, **SMALL)
    for file in output.iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match="layers"):
        shrink(base, prompts, output_dir=output, layers=4, **SMALL)


@pytest.mark.parametrize(("settings", "num_layers"), [({"layers": 4}, 4), ({"save": "17%"}, 5)])
def test_a_given_number_of_layers_is_written_whatever_it_loses(
    base, prompts, tmp_path, settings, num_layers
):
    record = shrink(base, prompts, output_dir=tmp_path / "smaller", **SMALL, **settings)
    assert record.limits is None
    assert [len(model.layers) for model in record.models] == [6, num_layers]
    assert record.chosen == record.candidates[0].name


def test_texts_are_tuned_on_and_judged_beside_the_questions(base, prompts, tmp_path):
    texts = [f"The number {number} comes after the number {number - 1}." for number in range(240)]
    file = write_rows(tmp_path / "numbers.jsonl", [{"text": text} for text in texts])
    record = shrink(base, prompts, texts=file, **SMALL)
    assert list(record.full.texts) == ["prompts", "numbers"]
    assert {test.task for test in record.trials[0].tasks} == {"prompts", "numbers"}


def test_what_is_held_out_finds_no_path(prompts, tmp_path):
    texts = [f"The number {number} comes after the number {number - 1}." for number in range(240)]
    file = write_rows(tmp_path / "numbers.jsonl", [{"text": text} for text in texts])
    questions = read_questions(ShrinkConfig(), prompts, file)
    [splits] = questions.tasks
    prompts_source, texts_source = questions.sources
    held_out = {example.question for example in splits.examples["test"]}
    assert held_out
    assert not held_out & {prompt.text for prompt in prompts_source.prompts}
    held_out_texts = set(questions.held_out_texts["numbers"])
    assert held_out_texts | set(texts_source.texts) == set(texts)
    assert not held_out_texts & set(texts_source.texts)
    [text_task] = questions.make_text_tasks(64, str)
    tuned_on = {example.question for part in text_task.examples.values() for example in part}
    assert tuned_on <= set(texts_source.texts)


def test_no_copy_of_a_held_out_text_in_another_unicode_form_finds_a_path(prompts, tmp_path):
    composed = [f"Où est le café numéro {number} ?" for number in range(120)]
    copies = [unicodedata.normalize("NFD", text) for text in composed]
    rows = [{"text": text} for text in composed + copies]
    questions = read_questions(ShrinkConfig(), prompts, write_rows(tmp_path / "cafe.jsonl", rows))
    held_out = {unicodedata.normalize("NFC", text) for text in questions.held_out_texts["cafe"]}
    assert held_out
    assert not held_out & set(questions.sources[1].texts)


def test_the_parts_of_a_text_task_are_disjoint(prompts, tmp_path):
    texts = [f"This is text number {number}." for number in range(40)]
    file = write_rows(tmp_path / "numbers.jsonl", [{"text": text} for text in texts])
    [text_task] = read_questions(ShrinkConfig(), prompts, file).make_text_tasks(64, str)
    parts = [{example.question for example in part} for part in text_task.examples.values()]
    assert all(parts)
    assert len(set.union(*parts)) == sum(map(len, parts))


def test_texts_with_the_name_of_the_questions_are_refused(prompts, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    rows = [{"text": f"text {number}"} for number in range(40)]
    with pytest.raises(TaskError, match="both called 'prompts'"):
        read_questions(ShrinkConfig(), prompts, write_rows(folder / "prompts.jsonl", rows))


def test_too_few_questions_are_known_before_any_work(questions):
    answers, texts = find_power(read_questions(ShrinkConfig(), questions), ShrinkConfig(max_drop=3))
    assert not answers.is_enough
    assert answers.sentence.endswith(
        "; for --max-drop 3 at least about 270 are needed and about 440 are probably enough; a "
        "file needs four times as many"
    )
    assert not texts.is_enough
    assert "at least 30 are needed; a file needs four times as many" in texts.sentence
    answers, _ = find_power(read_questions(ShrinkConfig(), questions), ShrinkConfig(max_drop=60))
    assert answers.is_enough


@pytest.mark.parametrize("max_drop", [1, 2, 3, 5, 10, 30])
def test_the_smallest_number_of_questions_that_is_named_passes_and_one_less_does_not(max_drop):
    limit = max_drop / 100
    fewest, probable = count_needed(limit)
    assert smallest_excluded_drop(fewest) < limit <= smallest_excluded_drop(fewest - 1)
    assert probable >= fewest


def test_more_questions_can_exclude_smaller_losses():
    drops = [smallest_excluded_drop(number) for number in (50, 250, 1000, 4000)]
    assert drops == sorted(drops, reverse=True)
    # 1.96 standard errors of a difference of which a twentieth of the answers changes
    assert drops[-1] == pytest.approx(1.96 * (0.05 / 4000) ** 0.5, rel=0.03)


@pytest.mark.parametrize("save", ["0", "100%", "many", "-5%"])
def test_a_share_that_is_none_is_refused(save):
    with pytest.raises(ConfigError, match="--save"):
        ShrinkConfig(save=save).check()


def test_two_numbers_of_layers_are_refused():
    with pytest.raises(ConfigError, match="give one of them"):
        ShrinkConfig(save="10%", layers=5).check()


@pytest.mark.parametrize("settings", [{"max_drop": 1}, {"max_loss_increase": 0.1}])
@pytest.mark.parametrize("number", [{"save": "10%"}, {"layers": 5}])
def test_a_limit_is_refused_where_the_number_of_layers_is_given(settings, number):
    with pytest.raises(ConfigError, match="has no effect with --"):
        ShrinkConfig(**settings, **number).check()
    ShrinkConfig(max_drop=3, **number).check()  # the default
    ShrinkConfig(**settings).check()


@pytest.mark.parametrize(
    ("tuning_minutes", "expected"),
    [(0, 15), (9, 15), (14, 11), (25, 10), (100, 10)],
)
def test_training_gets_half_of_the_time_or_what_a_long_search_leaves(
    tmp_path, tuning_minutes, expected
):
    config = ShrinkConfig(minutes=30.0)
    run = ShrinkRun(None, None, config, tmp_path, Listener())
    minutes = run.divide_time(60.0 * tuning_minutes, num_candidates=2)
    assert minutes == pytest.approx(expected / 2)
    assert run.divide_time(0.0, num_candidates=2) == minutes  # a resumed run
