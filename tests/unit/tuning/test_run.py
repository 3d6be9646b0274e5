"""The stage on a tiny model: what is found, kept, resumed and refused."""

import json
import shutil
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
from peft import LoraConfig, inject_adapter_in_model

from drllm.config import ModelConfig
from drllm.errors import ConfigError, PathError
from drllm.models.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.records.static_paths import load_path, read_paths
from drllm.statistics.words import signed
from drllm.tasks.files import FileTask
from drllm.tuning.beam import Beam
from drllm.tuning.level_lines import draw_interval
from drllm.tuning.path_scorer import score_paths
from drllm.tuning.progress import estimate_level_pairs
from drllm.tuning.run import PARTIAL_FOLDER, tune
from drllm.tuning.score_table import MOST_PAIRS
from drllm.work.listener import Listener
from drllm.work.ray import RayExecutor
from drllm.work.store import ResultStore

SMALL = {"num_fit": 30, "num_judged": 40, "max_skipped": 2, "beam": 2, "repair": "none"}


def tuned(routed, folder=None, **settings):
    return tune(routed, "builtin_facts", None, folder, **{**SMALL, **settings})


class Noting(Listener):
    """Keeps what is said."""

    def __init__(self):
        self.lines, self.progressed = [], []

    def note(self, text):
        self.lines += text.splitlines()

    @contextmanager
    def progress(self, title, unit):
        yield lambda done, total, note: self.progressed.append((done, total, note))


@pytest.fixture(scope="module")
def heard():
    """What the unbroken run says."""
    return Noting()


@contextmanager
def count_scored():
    """Give a list to which every scoring adds its number of paths times questions."""
    counts = []

    def count(routed, items, paths, *settings):
        counts.append(len(paths) * len(items))
        return score_paths(routed, items, paths, *settings)

    with mock.patch("drllm.tuning.score_blocks.score_paths", count):
        yield counts


@pytest.fixture(scope="module")
def scored():
    """How much the unbroken run scored at a time."""
    return []


@pytest.fixture(scope="module")
def unbroken(routed, heard, scored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    with count_scored() as counts:
        found = tuned(routed, folder, max_loss=10.0, listener=heard)
    scored += counts
    return found, folder


def test_the_paths_go_from_the_full_one_to_the_shortest(unbroken):
    found, _ = unbroken
    assert found.paths[0].name == "full"
    assert found.paths[0].path == StaticPath(range(6))
    executions = [path.executions for path in found.paths]
    assert executions == sorted(executions, reverse=True)
    assert [path.executions for path in found.paths] == [
        float(len(path.path.layers)) for path in found.paths
    ]


def test_a_path_is_dominated_where_a_shorter_one_does_as_well(unbroken):
    paths = unbroken[0].paths[1:]
    gains = [next(m.change[0] for m in path.measured if m.part == "select") for path in paths]
    assert [path.dominated for path in paths] == [
        any(later >= gain for later in gains[place + 1 :]) for place, gain in enumerate(gains)
    ]
    assert len({path.dominated for path in paths}) == 2


def test_every_path_is_measured_on_what_it_was_fitted_chosen_and_tested_on(unbroken):
    for path in unbroken[0].paths:
        assert [m.part for m in path.measured] == ["fit", "select", "test"]
        tested = path.measured[-1]
        assert tested.num_questions == 40
        assert (tested.against_full is None) == (path.name == "full")
        assert path.measured[0].accuracy is None


def test_the_file_is_what_was_returned_and_is_not_made_again(unbroken, routed, monkeypatch):
    found, folder = unbroken
    assert read_paths(folder / "paths.json") == found
    assert not (folder / PARTIAL_FOLDER).exists()
    monkeypatch.setattr("drllm.tuning.score_blocks.score_paths", None)
    assert tuned(routed, folder, max_loss=10.0) == found


def test_a_clean_up_that_was_killed_is_ended_by_the_next_start(routed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ResultStore, "remove", lambda store: None)
        tuned(routed, tmp_path, max_skipped=1)
    assert (tmp_path / PARTIAL_FOLDER).exists()
    tuned(routed, tmp_path, max_skipped=1)
    assert not (tmp_path / PARTIAL_FOLDER).exists()


def test_another_tuning_in_the_same_folder_is_refused(unbroken, routed):
    with pytest.raises(ConfigError, match="beam 2, now 1"):
        tuned(routed, unbroken[1], max_loss=10.0, beam=1)


def test_a_finished_tuning_on_other_questions_is_refused(routed, tmp_path):
    file, settings = tmp_path / "mine.jsonl", {**SMALL, "num_fit": 8, "max_skipped": 1}

    def run(number):
        rows = (f'{{"prompt": "Say {i + number}."}}\n' for i in range(40))
        file.write_text("".join(rows))
        return tune(routed, str(file), None, tmp_path / "out", **settings)

    assert run(0) == run(0)
    with pytest.raises(ConfigError, match="other questions"):
        run(1)


def letters(tmp_path, grader):
    """Return a task of questions whose answers are generated."""
    rows = (
        {"question": f"Letter number {n}?", "answer": "AB"[n % 2], "grader": grader}
        for n in range(60)
    )
    return FileTask(tmp_path / "mine.jsonl", (), enumerate(rows, 1))


@pytest.mark.parametrize("grade_answers", [True, False])
def test_answers_are_generated_only_to_be_graded(routed, tmp_path, grade_answers):
    found = tune(
        routed,
        letters(tmp_path, "exact"),
        repair="none",
        num_fit=4,
        num_judged=4,
        max_skipped=1,
        beam=1,
        grade_answers=grade_answers,
    )
    for path in found.paths:
        for part in ("select", "test"):
            score = path.on("mine", part)
            assert score.text_loss is not None
            assert (score.accuracy is not None) == grade_answers


TEMPLATE = "{{ messages[0]['content'] }}!"


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("changed", ["grader", "chat template"])
def test_results_of_other_prompts_are_refused(routed, tmp_path, monkeypatch, changed, is_finished):
    def run(grader, listener=None):
        task = letters(tmp_path, grader)
        settings = {"num_fit": 4, "num_judged": 4, "max_skipped": 1, "beam": 1}
        return tune(
            routed, task, None, tmp_path / "out", repair="none", listener=listener, **settings
        )

    if is_finished:
        assert run("exact") == run("exact")
    else:
        with pytest.raises(KeyboardInterrupt):
            run("exact", Stopped())
    if changed == "chat template":
        monkeypatch.setattr(routed.tokenizer, "chat_template", TEMPLATE)
    with pytest.raises(ConfigError, match=r"was made with other (tuning )?prompts"):
        run("letter" if changed == "grader" else "exact")


def test_a_finished_tuning_without_a_digest_of_its_prompts_is_known_again(
    unbroken, routed, tmp_path
):
    written = json.loads((unbroken[1] / "paths.json").read_text())
    del written["prompts_sha256"]
    (tmp_path / "paths.json").write_text(json.dumps(written))
    assert tuned(routed, tmp_path, max_loss=10.0).paths == unbroken[0].paths


def test_a_path_is_read_by_its_name(unbroken):
    found, folder = unbroken
    last = found.paths[-1]
    assert load_path(f"{folder}/paths.json:{last.name}").path(6) == last.path
    with pytest.raises(PathError, match="name one of them"):
        load_path(str(folder / "paths.json"))
    with pytest.raises(PathError, match="skip9"):
        load_path(f"{folder}/paths.json:skip9")


def test_every_level_is_said_in_a_line_with_its_interval_drawn(unbroken, heard):
    estimate, axis, *levels = heard.lines
    assert estimate.startswith("at most ")
    assert axis.endswith("+0.2")
    assert max(map(len, heard.lines[1::2])) <= 79
    for path, line, edits in zip(unbroken[0].paths[1:], levels[::2], levels[1::2], strict=True):
        mean, low, high = next(m.change for m in path.measured if m.part == "select")
        assert line.startswith(f"{6 - path.executions:g} saved  {signed(mean, 3)} nats (")
        assert f"({signed(low, 3)} to {signed(high, 3)})" in line
        assert line.endswith(draw_interval(mean, low, high))
        assert edits.strip() == path.path.edits(6)


def test_how_far_it_is_is_told_in_scores_within_a_level_too_and_never_goes_back(
    unbroken, scored, heard
):
    done = [done for done, _, _ in heard.progressed]
    assert done == sorted(done)
    assert all(done <= total for done, total, _ in heard.progressed)
    assert heard.progressed[0] == (6 * 16, heard.progressed[1][1], "comparing 6 paths")
    assert heard.progressed[-1][:2] == (sum(scored), sum(scored))


def test_no_more_is_scored_at_once_than_a_kill_may_lose(unbroken, scored):
    assert max(scored) <= MOST_PAIRS


class Stopped(Listener):
    """Interrupts a run at its first level."""

    @contextmanager
    def progress(self, title, unit):
        def stop(done, total, note=""):
            raise KeyboardInterrupt

        yield stop


def test_an_interrupted_run_is_resumed_and_ends_as_an_unbroken_one(
    unbroken, scored, routed, tmp_path
):
    with count_scored() as counts:
        with pytest.raises(KeyboardInterrupt):
            tuned(routed, tmp_path, max_loss=10.0, listener=Stopped())
        assert list((tmp_path / PARTIAL_FOLDER).iterdir())
        found = tuned(routed, tmp_path, max_loss=10.0)
    assert found.paths == unbroken[0].paths
    assert sum(counts) == sum(scored), "nothing was scored twice"


def test_the_second_level_is_expected_to_take_longer_since_it_has_more_candidates():
    beam = Beam(num_layers=30, width=3, max_saved=5, num_questions=24)
    items = {"fit": [None] * 24, "select": [None] * 20, "test": [None] * 20}
    items |= {"texts of select": [], "texts of test": []}
    task = SimpleNamespace(items=items, prompts={})
    first, second = (estimate_level_pairs(beam, [task], saved) for saved in (1, 2))
    assert 2 * first < second < 3 * first


def test_when_time_is_over_no_further_level_is_begun_until_there_is_more(
    unbroken, scored, routed, tmp_path
):
    heard = Noting()
    found = tuned(routed, tmp_path, max_loss=10.0, minutes=1e-9, listener=heard)
    assert any("beyond 0.01 minutes" in line for line in heard.lines)
    assert [path.name for path in found.paths] == ["full", "skip1"]
    assert found.is_cut
    with count_scored() as counts:
        whole = tuned(routed, tmp_path, max_loss=10.0)
    assert whole.paths == unbroken[0].paths
    assert 0 < sum(counts) < sum(scored), "what was scored is kept"


def test_a_level_whose_paths_all_lose_too_much_is_said_to_end_there(routed, heard, unbroken):
    strict = Noting()
    found = tuned(routed, objective="kl", max_loss=0.0, listener=strict)
    assert [path.name for path in found.paths] == ["full", "skip1"]
    assert sum("more than 0 nats" in line for line in strict.lines) == 1
    assert not any("the search ends here" in line for line in heard.lines)


def test_a_finished_tuning_in_another_precision_is_refused(unbroken, routed, tmp_path):
    written = json.loads((unbroken[1] / "paths.json").read_text())
    written["runtime"]["dtype"] = "bfloat16"
    (tmp_path / "paths.json").write_text(json.dumps(written))
    with pytest.raises(ConfigError, match="bfloat16"):
        tuned(routed, tmp_path, max_loss=10.0)


def test_a_finished_tuning_is_not_returned_for_the_model_with_an_adapter(
    unbroken, routed, tiny_llama
):
    config = LoraConfig(target_modules=["q_proj"])
    adapted = inject_adapter_in_model(config, tiny_llama(max_position_embeddings=1024))
    with pytest.raises(ConfigError, match=r"no runtime adapters, now \"[0-9a-f]{16}\""):
        tuned(RoutedModel(adapted, tokenizer=routed.tokenizer), unbroken[1], max_loss=10.0)


def test_the_loss_of_right_options_can_be_what_is_kept_high(routed):
    found = tuned(routed, max_loss=10.0, max_skipped=1, objective="next_token_loss")
    assert found.paths[1].on("builtin_facts", "test").accuracy is None


@pytest.mark.thorough
def test_several_tasks_are_kept_high_together_and_each_is_measured(routed):
    tasks = ["builtin_facts", "builtin_arithmetic"]
    found = tune(routed, tasks, None, None, **{**SMALL, "max_skipped": 1, "num_judged": 30})
    assert found.objective == {
        "builtin_facts": "gold_logprob",
        "builtin_arithmetic": "next_token_loss",
    }
    assert {m.task for m in found.paths[-1].measured} == set(tasks)


@pytest.mark.thorough
def test_two_workers_of_ray_give_the_paths_of_one_process_also_where_one_dies(
    model_folder, monkeypatch, tmp_path
):
    pytest.importorskip("ray")
    monkeypatch.setattr("drllm.tuning.score_table.MOST_PAIRS", 12)
    monkeypatch.setattr("drllm.tuning.score_table.MOST_ANSWERS", 2)
    model = ModelConfig(model=str(model_folder()), device="cpu", dtype="float32")
    tasks = ["builtin_facts", "builtin_arithmetic"]
    settings = {"num_fit": 8, "num_judged": 6, "max_skipped": 2, "max_loss": 10.0}
    alone = tune(model, tasks, None, tmp_path / "alone", **settings)
    finish_job = RayExecutor._finish_job
    killed = []

    def kill_the_first(executor, seat, jobs):
        finished = finish_job(executor, seat, jobs)
        if not killed:
            killed.append(seat)
            executor.ray.kill(seat.worker)
        return finished

    monkeypatch.setattr(RayExecutor, "_finish_job", kill_the_first)
    ray = {"executor": "ray", "num_workers": 2}
    found = tune(model, tasks, None, tmp_path / "ray", **settings, **ray)
    assert len(killed) == 1
    assert found.paths == alone.paths
    assert (found.model, found.runtime) == (alone.model, alone.runtime)
    assert list((tmp_path / "ray").iterdir()) == [tmp_path / "ray" / "paths.json"]
    assert tune(model, tasks, None, tmp_path / "ray", **settings) == found, "it is known again"


def test_a_model_object_is_refused_with_ray(routed):
    with pytest.raises(ConfigError, match="takes a model's name or folder, not a RoutedModel"):
        tuned(routed, executor="ray")


def test_prompts_alone_are_tuned_on_by_their_kl(drllm, model_folder, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "Say {i}."}}\n' for i in range(40)))
    said = drllm(
        f"tune --device cpu --max-skipped 1 --max-loss 10 --beam 1 --tasks {file} --model",
        model_folder(),
        "--output-dir",
        tmp_path / "tuned",
    )
    assert "skip1" in said.out
    found = read_paths(tmp_path / "tuned" / "paths.json")
    assert found.objective == {"prompts": "kl"}
    for part in found.paths[1].measured:
        assert part.objective == part.change[0] < 0
        assert part.accuracy is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_skipped": 6}, "at most 5"),
        ({"max_skipped": 0.4}, "less than one layer"),
        ({"max_skipped": 5, "repair": "refit"}, "at most 4"),
        ({"max_loss_increase": 0.1}, "--max-loss-increase was removed"),
        ({"epsilon": 2.0}, "--epsilon was removed"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_scored(
    routed, settings, says, monkeypatch
):
    monkeypatch.setattr("drllm.tuning.score_blocks.score_paths", None)
    with pytest.raises(ConfigError, match=says):
        tuned(routed, **settings)


def test_a_model_of_one_layer_is_refused_since_it_has_none_to_skip(tiny_base):
    base = tiny_base(num_layers=1)
    with pytest.raises(ConfigError, match="the model has only one layer"):
        tune(base, "builtin_facts", repair="none")


def test_a_model_of_two_layers_is_refused_since_both_stay_under_repair(tiny_base):
    with pytest.raises(ConfigError, match=r"the model has two layers, .* give --repair none"):
        tune(tiny_base(num_layers=2), "builtin_facts")


def test_gold_answers_of_a_task_without_options_are_refused(routed):
    with pytest.raises(ConfigError, match="next_token_loss"):
        tune(routed, "builtin_arithmetic", objective="gold_logprob")


def test_the_command_prints_every_path_and_where_the_file_lies(drllm, model_folder, tmp_path):
    said = drllm(
        "tune --device cpu --tasks builtin_facts --num-fit 24 --num-judged 24 --max-skipped 1 "
        "--beam 1 --model",
        model_folder(),
        "--output-dir",
        tmp_path,
    ).out
    names = [path["name"] for path in json.loads((tmp_path / "paths.json").read_text())["paths"]]
    assert all(name in said for name in names)
    assert str(tmp_path / "paths.json") in said
    assert drllm("show", tmp_path / "paths.json").out in said
    assert "24 to find paths, 24 to choose among them, 24 to test" in " ".join(said.split())


def test_a_finished_tuning_of_an_earlier_version_is_known_again(unbroken, routed, tmp_path):
    """Its settings hold some that there are no more, and it may have a certificate."""
    found, folder = unbroken
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    written = json.loads((tmp_path / "paths.json").read_text())
    written["config"] |= {"epsilon": 2.0, "max_loss_increase": None}
    written["choice"] = {"limits": {"epsilon": 2.0}, "obstacle": "too few questions"}
    (tmp_path / "paths.json").write_text(json.dumps(written))
    again = tuned(routed, tmp_path, max_loss=10.0)
    assert again.paths == found.paths
    assert any("certificate" in note for note in again.notes)
    assert not any("certificate" in note for note in found.notes)
