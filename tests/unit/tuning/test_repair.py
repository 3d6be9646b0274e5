"""A tuning that judges paths as they will be used: with the refit before each gap."""

import json
import re
import shlex
from contextlib import contextmanager
from statistics import fmean
from unittest import mock

import pytest

from drllm.cli.parser import parse
from drllm.config import HealConfig, ModelConfig, TuneConfig
from drllm.errors import ArchitectureError, ConfigError, TaskError
from drllm.models.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.records.static_paths import load_path, read_paths
from drllm.reporting.next_steps import suggest_steps
from drllm.reporting.run import read_run
from drllm.tuning.beam import Beam
from drllm.tuning.calibration import (
    MAX_TOKENS,
    choose_texts,
    describe_calibration,
    read_calibration,
)
from drllm.tuning.data_splits import split_tasks
from drllm.tuning.heal_tokens import tokenize_source
from drllm.tuning.path_scorer import score_paths
from drllm.tuning.refit import refit
from drllm.tuning.run import PARTIAL_FOLDER, tune
from drllm.tuning.stand_in import fit_stand_in
from drllm.tuning.task_questions import tokenize_task
from drllm.work.listener import Listener

FULL = StaticPath(range(6))
SMALL = {"num_fit": 30, "num_judged": 20, "max_skipped": 2, "beam": 2, "max_loss": 10.0}
PARTS = ["fit", "select", "test"]


class NoteListener(Listener):
    """Keeps the notes, and the progress of the tuning."""

    def __init__(self):
        self.notes = []
        self.progress_notes = []
        self.num_done = []

    def note(self, text):
        self.notes.append(text)

    @contextmanager
    def progress(self, title, unit):
        def keep(done, total, note=""):
            assert done <= total
            self.num_done.append(done)
            self.progress_notes.append(note)

        yield keep


@contextmanager
def count_refits():
    """Give a list to which every refit adds its path."""
    paths = []

    def count(routed, path, texts, **options):
        paths.append(path)
        return refit(routed, path, texts, **options)

    with mock.patch("drllm.tuning.score_blocks.refit", count):
        yield paths


@pytest.fixture(scope="module")
def listener():
    return NoteListener()


@pytest.fixture(scope="module")
def repaired(routed, listener, tmp_path_factory):
    """The record of a tuning with repair, and its folder."""
    folder = tmp_path_factory.mktemp("repaired")
    return tune(routed, "builtin_facts", None, folder, listener=listener, **SMALL), folder


@pytest.fixture(scope="module")
def config():
    return TuneConfig(**SMALL)


@pytest.fixture(scope="module")
def splits(config):
    return split_tasks(config, "builtin_facts")


@pytest.fixture(scope="module")
def texts_by_source(routed, config, splits):
    by_source = {}
    for source in read_calibration(config, splits):
        by_source[source.name] = tokenize_source(routed, source)
    return by_source


@pytest.fixture(scope="module")
def questions(routed, config, splits):
    return tokenize_task(routed, splits[0], config, 0)


def score(routed, questions, part, paths, crossings=None):
    """Return the objective of each path on each question of a part."""
    items = questions.items[part]
    return score_paths(routed, items, paths, questions.objective, 0.1, crossings).objective


def test_the_scores_of_a_path_are_with_its_refit_and_plain(
    repaired, routed, questions, texts_by_source
):
    record, _ = repaired
    assert record.repair == "refit"
    texts = choose_texts(texts_by_source, 50_000, seed=0)
    assert record.refit_tokens == sum(map(len, texts))
    for number, named in enumerate(record.paths[1:]):
        assert [score.part for score in named.measured] == PARTS
        assert [score.part for score in named.repaired] == PARTS
        adapter = f"by hand {number}"
        weights = {}
        for gap in refit(routed, named.path, texts):
            weights.update(gap.weights)
        routed.injection.add_adapter(adapter, refit=weights)
        for part in PARTS:
            [plain] = score(routed, questions, part, [named.path])
            [refitted] = score(routed, questions, part, [named.path.with_adapter(adapter)])
            assert named.plain_on("builtin_facts", part).objective == pytest.approx(fmean(plain))
            assert named.on("builtin_facts", part).objective == pytest.approx(fmean(refitted))
        routed.injection.adapters.drop(adapter)


def test_the_full_path_has_no_repair(repaired):
    full = repaired[0].paths[0]
    assert full.path == FULL
    assert full.repaired == ()
    assert full.on("builtin_facts", "test") == full.plain_on("builtin_facts", "test")


def test_candidates_are_compared_with_the_stand_in(repaired, routed, questions, texts_by_source):
    """The best path of the first level is the best of the beam on `select`."""
    maps = fit_stand_in(routed, choose_texts(texts_by_source, 10_000, seed=0))
    paths = [StaticPath(set(range(6)) - {layer}) for layer in range(1, 5)]
    on_fit = score(routed, questions, "fit", paths, maps)
    order = sorted(range(len(paths)), key=lambda place: -fmean(on_fit[place]))
    beam = [paths[place] for place in order[: SMALL["beam"]]]
    on_select = score(routed, questions, "select", beam, maps)
    means = [fmean(values) for values in on_select]
    assert repaired[0].paths[1].path == beam[means.index(max(means))]


def test_the_first_and_the_last_layer_stay(repaired, routed):
    last = routed.num_layers - 1
    for named in repaired[0].paths:
        assert (named.path.layers[0], named.path.layers[-1]) == (0, last)
    beam = Beam(num_layers=4, width=9, max_saved=9, num_questions=5, keeps_ends=True)
    levels = list(beam.levels(lambda paths, _num: [0.0] * len(paths), lambda path: True))
    assert levels[-1].paths == (StaticPath([0, 3]),)
    for level in levels:
        assert all((path.layers[0], path.layers[-1]) == (0, 3) for path in level.paths)
        assert len(level.paths) <= beam.most_candidates(level.saved)


def test_the_texts_are_counted_and_a_single_kind_is_warned_of(repaired, listener):
    record, _ = repaired
    first = listener.notes[0]
    assert f"{record.refit_tokens:,} tokens of builtin_facts" in first
    assert any("of one kind (builtin_facts)" in note for note in listener.notes)


def test_the_progress_never_goes_back_and_tells_of_each_gap(repaired, listener):
    assert listener.num_done == sorted(listener.num_done)
    for note in ("comparing 5 paths", "refitting the best path, gap 1"):
        assert any(note in progress_note for progress_note in listener.progress_notes)


def test_dominated_paths_are_found_by_the_scores_with_the_refit(repaired):
    paths = repaired[0].paths[1:]
    gains = [path.on("builtin_facts", "select").change[0] for path in paths]
    expected = []
    for place, gain in enumerate(gains):
        expected.append(any(later >= gain for later in gains[place + 1 :]))
    assert [path.dominated for path in paths] == expected


def test_a_finished_tuning_is_read_again_and_another_repair_is_refused(repaired, routed):
    record, folder = repaired
    assert read_paths(folder / "paths.json") == record
    with count_refits() as refits:
        assert tune(routed, "builtin_facts", None, folder, **SMALL) == record
    assert refits == []
    with pytest.raises(ConfigError, match='repair "refit", now none'):
        tune(routed, "builtin_facts", None, folder, repair="none", **SMALL)


def test_a_tuning_without_repair_has_the_files_of_earlier_versions(routed, tmp_path):
    """Its results can be read and resumed by its settings alone."""
    record = tune(routed, "builtin_facts", None, tmp_path, repair="none", **SMALL)
    assert record.repair == record.texts_sha256 == ""
    assert all(path.repaired == () for path in record.paths)
    written = json.loads((tmp_path / "paths.json").read_text())
    for name in ("repair", "refit_tokens", "texts_sha256"):
        del written[name]
    for name in ("repair", "refit_tokens", "text"):
        del written["config"][name]
    for path in written["paths"]:
        del path["repaired"]
    (tmp_path / "paths.json").write_text(json.dumps(written))
    assert tune(routed, "builtin_facts", None, tmp_path, repair="none", **SMALL).paths == (
        record.paths
    )
    with pytest.raises(ConfigError, match='no repair, now "refit"'):
        tune(routed, "builtin_facts", None, tmp_path, **SMALL)


def test_a_resumed_tuning_refits_no_path_again(repaired, routed, tmp_path):
    settings = {**SMALL, "max_skipped": 2}
    with count_refits() as refits:
        with (
            mock.patch("drllm.tuning.run.make_named_paths", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            tune(routed, "builtin_facts", None, tmp_path, **settings)
        assert len(refits) == 2
        record = tune(routed, "builtin_facts", None, tmp_path, **settings)
        assert len(refits) == 2
    assert record.paths == repaired[0].paths
    assert not (tmp_path / PARTIAL_FOLDER).exists()


def test_a_model_that_cannot_be_refitted_is_tuned_plain_with_the_reason(
    tiny_model, tiny_tokenizer, monkeypatch
):
    routed = RoutedModel(tiny_model("mixtral"), tokenizer=tiny_tokenizer)
    settings = {**SMALL, "max_skipped": 1, "num_fit": 8, "num_judged": 8}
    listener = NoteListener()
    record = tune(routed, "builtin_facts", None, None, listener=listener, **settings)
    assert record.repair == ""
    assert "without repair" in listener.notes[0]
    assert "experts" in listener.notes[0]
    plain = tune(routed, "builtin_facts", None, None, repair="none", **settings)
    assert record.paths == plain.paths
    monkeypatch.setattr("drllm.tuning.score_blocks.score_paths", None)  # nothing is scored
    with pytest.raises(ArchitectureError, match=r"experts.*--repair none"):
        tune(routed, "builtin_facts", None, None, repair="refit", **settings)


def test_without_memory_for_a_refit_paths_are_chosen_plain(routed, monkeypatch):
    monkeypatch.setattr("drllm.tuning.refit_memory.free_bytes", lambda device: 1000)
    listener = NoteListener()
    settings = {**SMALL, "max_skipped": 1, "num_fit": 5, "num_judged": 5, "beam": 1}
    record = tune(routed, "builtin_facts", listener=listener, **settings)
    assert record.repair == ""
    assert any("without repair: refitting 0.mlp" in note for note in listener.notes)
    with pytest.raises(ArchitectureError, match=r"GB are free; give --repair none"):
        tune(routed, "builtin_facts", repair="refit", **settings)


def test_a_model_with_a_norm_behind_its_mlps_is_tuned_under_repair(tiny_model, tiny_tokenizer):
    routed = RoutedModel(tiny_model("gemma2"), tokenizer=tiny_tokenizer)
    settings = {**SMALL, "max_skipped": 1, "num_fit": 8, "num_judged": 8, "repair": "refit"}
    record = tune(routed, "builtin_facts", **settings)
    shorter = record.paths[1]
    plain = shorter.plain_on("builtin_facts", "test")
    refitted = shorter.on("builtin_facts", "test")
    assert refitted.objective != plain.objective


def test_settings_of_a_repair_have_no_effect_without_one(routed):
    with pytest.raises(ConfigError, match=r"--text notes\.txt has no effect with --repair none"):
        tune(routed, "builtin_facts", repair="none", text="notes.txt")
    with pytest.raises(ConfigError, match="--refit-tokens 9 has no effect with --repair none"):
        tune(routed, "builtin_facts", repair="none", refit_tokens=9)


def test_only_questions_that_paths_may_be_fitted_on_repair_them(splits, config):
    [source] = read_calibration(config, splits)
    texts = {prompt.text for prompt in source.prompts}
    by_part = {part: splits[0].examples[part] for part in PARTS}
    assert len(texts) == len(splits[0].all_to_fit) > len(by_part["fit"])
    for example in by_part["fit"]:
        assert any(example.question in text for text in texts)
    for part in ("select", "test"):
        for example in by_part[part]:
            assert not any(example.question in text for text in texts)


def test_other_texts_are_read_as_heal_reads_them(splits, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("one text\n\nanother text\n")
    config = TuneConfig(**SMALL, text=str(file))
    questions, notes = read_calibration(config, splits)
    assert questions.name == "builtin_facts"
    assert (notes.name, len(notes.texts)) == ("notes", 2)
    assert read_calibration(config, splits, [notes]) == [notes]
    with pytest.raises(ConfigError, match="give a file of texts"):
        read_calibration(TuneConfig(text=str(tmp_path / "missing.txt")), splits)


def test_tasks_of_one_name_are_sources_of_their_own(splits, config):
    names = [source.name for source in read_calibration(config, [*splits, *splits])]
    assert names == ["builtin_facts (1)", "builtin_facts (2)"]


def test_texts_do_not_depend_on_the_order_of_a_file():
    many = [(number, 0, 0, 0) for number in range(20)]
    few = [(30, 1, 1, 1), (31, 1, 1, 1)]
    texts = choose_texts({"many": many, "few": few}, 48, seed=0)
    assert sorted(text[-1] for text in texts) == [0] * 10 + [1] * 2
    assert choose_texts({"many": many[::-1], "few": few[::-1]}, 48, seed=0) == texts
    assert choose_texts({"many": many, "few": few}, 48, seed=1) != texts


def test_long_texts_are_cut_and_a_text_counts_once():
    long_text = (1,) * MAX_TOKENS + (2, 3, 4)
    by_source = {"a": [long_text, (5,)], "b": [(2, 3, 4), (6, 7)]}
    texts = choose_texts(by_source, 10_000, seed=0)
    assert sorted(texts) == sorted([long_text[:MAX_TOKENS], (2, 3, 4), (6, 7)])


def test_texts_are_cut_to_the_context_of_a_model_with_learned_positions(tiny_model, tiny_tokenizer):
    model = tiny_model("gpt2", n_positions=64)
    text = "The quick brown fox jumps over the lazy dog. " * 40
    settings = {**SMALL, "max_skipped": 1, "num_fit": 5, "num_judged": 5, "beam": 1}
    record = tune(
        model, "builtin_facts", texts=[text, "And back."], tokenizer=tiny_tokenizer, **settings
    )
    assert record.repair == "refit"
    assert record.refit_tokens > 64


def test_a_single_text_is_refused():
    with pytest.raises(TaskError, match="there are 1 texts to repair paths with"):
        choose_texts({"a": [(1, 2, 3)]}, 100, seed=0)


def test_a_warning_where_texts_are_few_or_of_one_source():
    few = describe_calibration(["a", "b"], [(1, 2, 3)], 10**9)
    assert len(few) == 2
    assert "3 tokens are few" in few[1]
    many = describe_calibration(["a", "b"], [(1,) * 20_000], 10**9)
    assert len(many) == 1
    assert "1 GB" in many[0]


def test_prompts_without_answers_repair_paths_with_the_full_path_s_answers(
    routed, tmp_path, monkeypatch
):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "Say {number}."}}\n' for number in range(40)))
    texts = []

    def keep_texts(routed, path, calibration_texts, **options):
        texts.extend(calibration_texts)
        return refit(routed, path, calibration_texts, **options)

    monkeypatch.setattr("drllm.tuning.score_blocks.refit", keep_texts)
    settings = {**SMALL, "max_skipped": 1, "beam": 1}
    record = tune(routed, str(file), None, tmp_path / "out", **settings)
    assert record.paths[1].on("prompts", "test").change[0] < 0
    prompts = [tuple(routed.tokenizer.encode(f"Say {number}.")) for number in range(40)]
    assert all(len(text) > max(map(len, prompts)) for text in texts)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "paths.json"]


class StoppedError(Exception):
    pass


def test_a_note_says_how_long_answers_took_unless_an_earlier_run_has_kept_them(
    routed, tmp_path, monkeypatch
):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "Say {number}."}}\n' for number in range(40)))
    settings = {**SMALL, "max_skipped": 1, "beam": 1, "num_fit": 5, "num_judged": 5}
    before = NoteListener()
    with monkeypatch.context() as patch:
        patch.setattr("drllm.tuning.repair.choose_texts", mock.Mock(side_effect=StoppedError))
        with pytest.raises(StoppedError):
            tune(routed, str(file), None, tmp_path / "out", listener=before, **settings)
    [note] = [note for note in before.notes if "answered" in note]
    assert re.fullmatch(r"answered \d+ prompts of prompts in \d+\.\d s", note)
    later = NoteListener()
    tune(routed, str(file), None, tmp_path / "out", listener=later, **settings)
    assert not [note for note in later.notes if "answered" in note]


def test_the_prompts_that_are_answered_are_drawn_at_random(routed, tmp_path, monkeypatch):
    monkeypatch.setattr("drllm.tuning.repair.MAX_OPEN_PROMPTS", 4)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "Say {number}."}}\n' for number in range(100)))
    settings = {**SMALL, "max_skipped": 1, "beam": 1, "num_fit": 5, "num_judged": 5}
    prompts = []

    def record_prompts(_routed, conversations, _max_tokens):
        prompts.extend(conversations)
        return [(number, 5, 6) for number in range(len(conversations))]

    monkeypatch.setattr("drllm.tuning.score_blocks.answer_prompts", record_prompts)
    tune(routed, str(file), None, None, **settings)
    [splits] = split_tasks(TuneConfig(**settings), str(file))
    in_order = [example.question for example in splits.all_to_fit]
    assert len(prompts) == 4
    assert prompts != in_order[:4]
    assert set(prompts) <= set(in_order)


def test_generated_answers_are_graded_plain_and_with_the_refit(routed):
    settings = {**SMALL, "max_skipped": 1, "beam": 1, "num_fit": 8, "num_judged": 6}
    record = tune(routed, "builtin_arithmetic", **settings)
    shorter = record.paths[1]
    for find in (shorter.on, shorter.plain_on):
        tested = find("builtin_arithmetic", "test")
        assert tested.accuracy is not None
        assert tested.text_loss is not None


def test_a_report_advises_to_solve_the_refit_next(repaired):
    record, folder = repaired
    [(_, line)] = suggest_steps(read_run(folder))
    command = parse(shlex.split(line)[1:])
    assert command.verb == "heal"
    config = command.get_settings(HealConfig)
    assert config.path == f"{folder}/paths.json:{record.paths[-1].name}"
    assert config.minutes == 0
    assert config.tasks == "builtin_facts"


def test_a_path_that_runs_without_its_refit_says_so(repaired):
    record, folder = repaired
    path = load_path(f"{folder}/paths.json:{record.paths[1].name}")
    assert "runs here without it" in path.note
    assert f"drllm heal --path {folder}/paths.json:skip1 --minutes 0" in path.note
    assert load_path(f"{folder}/paths.json:full").note == ""


def test_the_command_shows_both_rows_of_a_path(drllm, repaired):
    _, folder = repaired
    output = " ".join(drllm("show", folder / "paths.json").out.split())
    assert "skip1, refit" in output
    assert "skip1, plain" in output
    assert "a refit restores the full path" in output


@pytest.mark.thorough
def test_workers_of_ray_repair_the_paths_as_one_process_does(model_folder, tmp_path):
    pytest.importorskip("ray")
    model = ModelConfig(model=str(model_folder()), device="cpu", dtype="float32")
    settings = {**SMALL, "num_fit": 8, "num_judged": 6}
    alone = tune(model, "builtin_facts", None, tmp_path / "alone", **settings)
    ray = {"executor": "ray", "num_workers": 2}
    record = tune(model, "builtin_facts", None, tmp_path / "ray", **settings, **ray)
    assert alone.repair == "refit"
    assert record.paths == alone.paths
