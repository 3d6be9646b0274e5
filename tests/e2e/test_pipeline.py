"""The whole loop on a tiny model: all stages, again, and after a kill at any moment."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drllm.cli import main
from drllm.records import read_search
from drllm.reporting import stage as reporting
from drllm.search import CHUNKS_FOLDER, num_batches_kept

EVERY_FILE = """
run.yaml run.manifest.json
search.jsonl search.manifest.json
supervision.jsonl supervision.manifest.json supervision.rejected.jsonl
routers/router_config.json routers/routers.safetensors routers/metrics.jsonl routers/layers.json
routers/README.md
eval/builtin_facts.json eval/latency.json eval/samples.jsonl eval/samples.manifest.json
eval/tasks/test/builtin_facts.yaml eval/tasks/test/rows/builtin_facts-asked.jsonl
report.html report.md
report_figures/01-builtin-facts-systems.png report_figures/02-builtin-facts-baselines.png
report_figures/03-labels-and-routes.png report_figures/04-single-edits.png
report_figures/05-target-executions.png report_figures/06-router-metrics.png
report_figures/07-router-layers.png
"""
FILES = set(EVERY_FILE.split())


def files_of(folder: Path) -> dict[str, int]:
    """Return every file below a folder with its time of change, in nanoseconds.

    The hash of its rows is left out of a file's name.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    times = {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}
    return {re.sub(r"-[0-9a-f]{8,}(?=\.jsonl$)", "", name): at for name, at in times.items()}


@pytest.fixture
def run_copy(tmp_path: Path, finished_run: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the report be two files without content: its figures take longer than all else."""

    def report(folder: Path, listener: Any) -> tuple[Path, Path]:
        pages = folder / "report.html", folder / "report.md"
        for page in pages:
            page.write_text("")
        return pages

    monkeypatch.setattr(reporting, "report", report)
    monkeypatch.setattr(reporting, "figures_of", lambda page: [])


@pytest.fixture
def rerun(
    recipe: Path, tmp_path: Path, run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """A function that carries out the recipe, a text in it changed, in a copy of the run.

    It returns what goes to standard error.
    """

    def rerun(old: str = "", new: str = "", *words: str) -> str:
        other = tmp_path / "other.yaml"
        assert old in recipe.read_text()
        other.write_text(recipe.read_text().replace(old, new, 1))
        assert main(["run", str(other), "--output-dir", str(run_copy), *words]) == 0
        return capsys.readouterr().err

    return rerun


# --- a recipe ----------------------------------------------------------------------------------


def test_a_recipe_leaves_every_file_and_nothing_else(finished_run: Path):
    assert set(files_of(finished_run)) == FILES


@pytest.mark.thorough  # Ray, and a process that imports torch
def test_a_recipe_may_leave_the_search_to_ray(
    finished_run: Path, recipe: Path, tmp_path: Path, assert_same_run: Callable[..., None]
):
    pytest.importorskip("ray")
    by_ray = tmp_path / "ray.yaml"
    by_ray.write_text(
        recipe.read_text().replace("search: {", "search: {executor: ray, num_workers: 1, ")
    )

    assert main(["run", str(by_ray), "--output-dir", str(tmp_path / "run")]) == 0

    assert set(files_of(tmp_path / "run")) == FILES
    ours, theirs = (read_search(run / "search.jsonl") for run in (finished_run, tmp_path / "run"))
    assert_same_run(ours, theirs)


def test_the_same_recipe_or_the_one_in_the_folder_does_nothing_anew(
    finished_run: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
):
    before = files_of(finished_run)
    for file in (recipe, finished_run / "run.yaml"):
        assert main(["run", str(file), "--output-dir", str(finished_run)]) == 0

        out, err = capsys.readouterr()
        assert files_of(finished_run) == before
        assert err.count("done before") == 5
        assert f"report       {finished_run / 'report.html'}" in out


def test_other_training_settings_redo_the_training_and_what_follows(
    run_copy: Path, rerun: Callable[..., str]
):
    before = files_of(run_copy)
    said = rerun("num_epochs: 2", "num_epochs: 3")

    after = files_of(run_copy)
    unchanged = {name for name in after if after[name] == before[name]}
    kept = {name for name in FILES if name.startswith(("search", "supervision"))}
    kept |= {name for name in FILES if name.endswith("asked.jsonl")}  # the questions are the same
    assert unchanged == kept
    assert len((run_copy / "routers" / "metrics.jsonl").read_text().splitlines()) == 3
    assert said.count("done before") == 2


def test_a_result_that_was_changed_by_hand_is_made_again(
    run_copy: Path, rerun: Callable[..., str], quick_report: None
):
    result = run_copy / "eval" / "builtin_facts.json"
    right = json.loads(result.read_text())
    result.write_text(result.read_text().replace('"accuracy": ', '"accuracy": 1.0e-9 + '))

    assert rerun().count("done before") == 3

    made_again = json.loads(result.read_text())
    for system, expected in zip(made_again["systems"], right["systems"], strict=True):
        assert system["accuracy"] == expected["accuracy"]
        assert system["gold_logprob"] == pytest.approx(expected["gold_logprob"], abs=1e-4)


def test_whether_time_is_measured_redoes_the_evaluation_and_how_often_does_not(
    run_copy: Path, rerun: Callable[..., str], quick_report: None
):
    for rounds, redone in ((4, False), (0, True)):
        said = rerun("evaluate: {", f"evaluate: {{latency_rounds: {rounds}, ")
        assert ("evaluate: done before" not in said) == redone
        assert (run_copy / "eval" / "latency.json").exists() != redone


def test_other_tasks_leave_no_result_of_the_earlier_ones(
    run_copy: Path, rerun: Callable[..., str], tmp_path: Path, quick_report: None
):
    own = tmp_path / "own.jsonl"
    rows = [
        {"question": f"Which number follows {n}?", "choices": [str(n + 1), str(n)], "answer": 0}
        for n in range(40)
    ]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))

    rerun("tasks: builtin_facts", f"tasks: {own}")

    results = [path.name for path in (run_copy / "eval").glob("[!.s]*.json")]
    assert sorted(results) == ["latency.json", "own.json"]


def test_a_moved_data_folder_with_the_same_questions_redoes_the_report_only(
    rerun: Callable[..., str], tmp_path: Path, quick_report: None
):
    (tmp_path / "data").mkdir()

    said = rerun("", "", "--data-dir", str(tmp_path / "data"))

    for stage in ("[1/5] search", "[2/5] supervise", "[3/5] train", "[4/5] evaluate"):
        assert f"{stage}: done before" in said


def test_a_recipe_with_several_seeds_evaluates_them_all(
    run_copy: Path, rerun: Callable[..., str], quick_report: None
):
    rerun("num_epochs: 2", "num_epochs: 2, num_seeds: 2")

    assert (run_copy / "routers" / "seed_1" / "routers.safetensors").is_file()
    result = json.loads((run_copy / "eval" / "builtin_facts.json").read_text())
    assert list(result["other_seeds"]) == [str(run_copy / "routers" / "seed_1")]


def test_a_sweep_chooses_a_setting_on_select_and_tests_it_once(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_report: None
):
    sweep, out = tmp_path / "sweep.yaml", tmp_path / "sweep"
    text = recipe.read_text().replace("num_random_draws: 2}", "curve: '0.1', latency_rounds: 0}")
    sweep.write_text(text + "settings: {plain: {}, two: {train: {beta: 0.9, num_seeds: 2}}}\n")
    assert main(["sweep", str(sweep), "--output-dir", str(out)]) == 0
    found = json.loads((out / "sweep.json").read_text())
    assert [each["name"] for each in found["settings"]] == ["plain", "two"]
    for name in ("plain", "two"):
        result = json.loads((out / "settings" / name / "eval/builtin_facts.json").read_text())
        assert result["split"] == "select"
        assert {row["name"] for row in result["systems"]} == {"base", "routed"}
    tested = json.loads((out / "test" / "eval" / "builtin_facts.json").read_text())
    assert tested["split"] == "test"
    assert tested["routers"] == str(out / "settings" / found["chosen"] / "routers")
    assert (out / "test" / "report.html").is_file()
    assert (out / "sweep.png").is_file()
    shown = capsys.readouterr().out
    assert f"Chosen on select: {found['chosen']}" in " ".join(shown.split())

    before = files_of(out)
    assert main(["sweep", str(sweep), "--output-dir", str(out)]) == 0
    after = files_of(out)
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"sweep.json", "sweep.png"}
    assert main(["show", str(out)]) == 0
    assert "settings on select" in capsys.readouterr().out


# --- single verbs ------------------------------------------------------------------------------


@pytest.fixture
def model(model_folder: Callable[..., Path]) -> list[str]:
    return ["--model", str(model_folder()), "--device", "cpu"]


@pytest.fixture
def train_words(run_copy: Path, model: list[str]) -> list[str]:
    """A training on a copy of the run's targets, to be given an output."""
    settings = ["--num-epochs", "1", "--warmup-steps", "0"]
    return ["train", *model, *settings, "--supervision", str(run_copy / "supervision.jsonl")]


def test_the_stages_one_by_one_end_in_an_evaluation(
    tmp_path: Path,
    model: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    model[0] = "--model-id"

    assert main(["search", *model, "--limit", "6", "--num_simulations", "6"]) == 0
    supervised = ["supervise", "--search", "data/search.jsonl", "--output", "data/paper.jsonl"]
    assert main([*supervised, "--target", "paper"]) == 0
    trained = ["train", *model, "--supervision", "data/supervision.jsonl", "--run-name", "first"]
    assert main([*trained, "--num-epochs", "1", "--warmup-steps", "0"]) == 0
    evaluated = ["evaluate", "--routers", "checkpoints/first", "--device", "cpu", "--limit", "4"]
    assert main([*evaluated, "--num-random-draws", "1"]) == 0

    out = capsys.readouterr().out
    assert Path("data/paper.jsonl").is_file()
    assert Path("eval/builtin_facts.json").is_file()
    assert "builtin_facts, test: 4 questions" in out
    for system in ("base", "routed", "permuted routes", "random decisions", "label frequency"):
        assert re.search(rf"^ {system} .*\d–\d", out, re.MULTILINE)


def test_features_that_are_kept_are_used_again_by_another_training(
    train_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    kept, weights = tmp_path / "kept", {}
    for name, others in (("first", []), ("again", []), ("other", ["--seed", "1"])):
        words = [*train_words, *others, "--features", str(kept), "--output", str(tmp_path / name)]
        assert main(words) == 0
        said = capsys.readouterr().err
        assert (f"the routers' inputs in {kept} are used again" in said) == (name != "first")
        assert (f"the routers' inputs need 0.1 MB in {kept}, where " in said) == (name == "first")
        assert not (tmp_path / name / "features").exists()
        weights[name] = (tmp_path / name / "routers.safetensors").read_bytes()
    assert weights["first"] == weights["again"] != weights["other"]


def test_rounds_on_the_routers_own_routes_leave_routers_of_each_round(
    train_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    few = Path(train_words[-1]).read_text().splitlines()
    many = [
        row | {"id": str(number), "question": f"{row['question']} {number}"}
        for number, row in enumerate(map(json.loads, few * 4))
    ]
    supervision, output = tmp_path / "many.jsonl", tmp_path / "rounds"
    supervision.write_text("".join(json.dumps(row) + "\n" for row in many))
    words = [*train_words[:-1], str(supervision), "--on-policy-rounds", "1", "--calibrate"]
    assert main([*words, "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert f"the routers' inputs need 0.1 MB in {output / 'round_0' / 'features'}" in printed.err
    assert "calibration    temperature" in printed.out
    assert "(in the weights), expected calibration error" in printed.out
    assert {path.parent for path in output.rglob("router*")} == {output, output / "round_0"}
    assert not list(output.rglob("features"))


def test_a_training_that_failed_behind_the_pass_goes_on_with_its_features(
    train_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "routers"
    (output / "README.md").mkdir(parents=True)  # in the way of the card
    assert main([*train_words, "--output", str(output)]) == 2
    assert (output / "features" / "features.safetensors").exists()
    (output / "README.md").rmdir()
    capsys.readouterr()

    assert main([*train_words, "--output", str(output)]) == 0
    assert f"the routers' inputs in {output / 'features'} are used again" in capsys.readouterr().err
    assert not (output / "features").exists()


def test_a_target_that_is_set_aside_is_said_and_listed(
    run_copy: Path, train_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (run_copy / "supervision.manifest.json").unlink()
    with (run_copy / "supervision.jsonl").open("a") as file:
        row = {"question": "long?", "prompt": "x" * 600, "answer": "", "id": "long"}
        file.write(json.dumps({**row, "optimal_layer_config": [1, 1, 1, 1]}) + "\n")

    assert main([*train_words, "--output", str(tmp_path / "routers")]) == 0

    rejected = tmp_path / "routers" / "rejected.jsonl"
    why = "targets are set aside (1 longer than the base model's context)"
    assert f"{why}: {rejected}" in capsys.readouterr().err
    [line] = rejected.read_text().splitlines()
    assert json.loads(line)["id"] == "long"
    assert main(["show", str(rejected)]) == 0
    assert "longer than the base model's context" in capsys.readouterr().out


def test_several_seeds_are_trained_and_evaluated_together(
    train_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def train(name: str, *words: str) -> int:
        return main([*train_words, "--output", str(tmp_path / name), *words])

    def weights(name: str) -> bytes:
        return (tmp_path / name / "routers.safetensors").read_bytes()

    assert train("both", "--num-seeds", "2") == 0
    assert train("second", "--seed", "1") == 0
    assert weights("both/seed_1") == weights("second") != weights("both")
    assert train("both", "--num-seeds", "2") == 2
    assert "holds trained routers already" in capsys.readouterr().err

    shutil.rmtree(tmp_path / "both" / "seed_1")  # as a kill behind the first seed leaves it
    before = (tmp_path / "both" / "routers.safetensors").stat().st_mtime_ns
    assert train("both", "--num-seeds", "2", "--learning-rate", "0.1") == 2
    assert "holds trained routers of another run" in capsys.readouterr().err
    assert train("both", "--num-seeds", "2") == 0
    assert weights("both/seed_1") == weights("second")
    assert (tmp_path / "both" / "routers.safetensors").stat().st_mtime_ns == before

    folders = [str(tmp_path / "both"), str(tmp_path / "both" / "seed_1")]
    evaluate = ["evaluate", "--device", "cpu", "--limit", "4", "--baselines", "none"]
    evaluate += ["--output-dir", str(tmp_path / "eval"), "--routers", *folders]
    assert main([*evaluate, folders[0]]) == 2
    assert f"--routers names {folders[0]} twice" in capsys.readouterr().err
    assert main(evaluate) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Routers of 2 seeds: accuracy" in out


def test_several_seeds_are_trained_on_soft_targets_each_in_its_own_folder(
    run_copy: Path,
    train_words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    supervised = ["supervise", "--search", "run/search.jsonl", "--output", "soft.jsonl"]
    assert main([*supervised, "--target", "least_kl", "--path-weights", "closer"]) == 0
    trained = [*train_words[:-1], "soft.jsonl", "--run-name", "soft", "--soft-targets"]
    assert main([*trained, "--num-seeds", "2", "--seed", "5"]) == 0

    folders = [Path("checkpoints/soft"), Path("checkpoints/soft/seed_6")]
    configs = [json.loads((folder / "router_config.json").read_text()) for folder in folders]
    assert [config["training"]["settings"]["seed"] for config in configs] == [5, 6]
    out = capsys.readouterr().out
    assert all(f"routers        {folder}" in out for folder in folders)


@pytest.fixture
def search_again(
    run_copy: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> Callable[[], Any]:
    """A function that repeats the run's search by its own verb, and returns what it says."""
    words = ["search", *model, "--output-dir", str(run_copy), "--block-size", "3"]

    def again() -> Any:
        assert main([*words, "--limit", "6", "--num-simulations", "6"]) == 0
        return capsys.readouterr()

    return again


def test_the_same_search_again_leaves_itself_and_targets_of_another_rule_as_they_are(
    run_copy: Path, search_again: Callable[[], Any]
):
    search, output = run_copy / "search.jsonl", run_copy / "supervision.jsonl"
    words = ["supervise", "--search", str(search), "--output", str(output), "--target", "paper"]
    assert main(words) == 0
    chosen, before = output.read_text(), search.stat().st_mtime_ns

    out = search_again().out

    assert "search.jsonl is complete already" in out
    assert search.stat().st_mtime_ns == before
    assert "supervision.jsonl is made from this search already" in out
    assert output.read_text() == chosen


def test_targets_whose_manifest_a_kill_prevented_get_it_from_the_same_search_again(
    run_copy: Path, search_again: Callable[[], Any]
):
    manifest = run_copy / "supervision.manifest.json"
    before = json.loads(manifest.read_text())
    manifest.unlink()

    search_again()

    after = json.loads(manifest.read_text())
    assert {**after, "created": ""} == {**before, "created": ""}
    assert after["rewards"] == ["loglikelihood"]


def test_targets_of_ones_own_stay_as_they_are(run_copy: Path, search_again: Callable[[], Any]):
    (run_copy / "supervision.manifest.json").unlink()
    output = run_copy / "supervision.jsonl"
    own = "".join(output.read_text().splitlines(keepends=True)[1:])
    output.write_text(own)

    said = search_again().err

    assert output.read_text() == own
    assert not (run_copy / "supervision.manifest.json").exists()
    assert "has no manifest, so it isn't ours; it stays as it is" in said


def trained_for(routers: Path, *rewards: str) -> str:
    """Rewrite what the routers' prompts were made for, and return their folder."""
    path = routers / "router_config.json"
    config = json.loads(path.read_text())
    assert config["training"]["rewards"] == ["loglikelihood"]
    config["training"]["rewards"] = list(rewards)
    path.write_text(json.dumps(config))
    return str(routers)


@pytest.mark.parametrize(
    ("flags", "rewards", "notes"),
    [
        ([], ["loglikelihood"], 1),
        (["--no-chat"], ["loglikelihood"], 0),
        ([], ["loglikelihood", "letter"], 0),
        ([], [], 0),
    ],
)
def test_generate_says_so_where_routers_read_a_chat_template_but_were_trained_without(
    run_copy: Path,
    flags: list[str],
    rewards: list[str],
    notes: int,
    capsys: pytest.CaptureFixture[str],
):
    routers = trained_for(run_copy / "routers", *rewards)
    words = ["generate", "--routers", routers, "--device", "cpu", *flags]

    assert main([*words, "--max-new-tokens", "2", "What is ice?"]) == 0

    said = capsys.readouterr().err.splitlines()
    assert len(said) == notes
    assert all("with --no-chat they read as in training" in line for line in said)


@pytest.mark.parametrize(
    ("rewards", "notes"), [(["letter"], 1), (["letter", "loglikelihood"], 0), ([], 0)]
)
def test_evaluate_says_so_where_routers_were_trained_on_other_prompts(
    run_copy: Path, tmp_path: Path, rewards: list[str], notes: int, capsys: Any
):
    words = ["evaluate", "--routers", trained_for(run_copy / "routers", *rewards)]
    words += ["--device", "cpu", "--limit", "2", "--baselines", "none", "--latency-rounds", "0"]

    assert main([*words, "--output-dir", str(tmp_path / "eval")]) == 0

    assert capsys.readouterr().err.count("were trained on prompts for letter, the") == notes


def test_generate_draws_the_route_and_counts_its_cost(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["generate", "--routers", str(finished_run / "routers"), "--device", "cpu"]

    assert main([*words, "--max-new-tokens", "5", "What is ice?"]) == 0

    out = capsys.readouterr().out
    route = re.search(r"layer  0\n       ([█·2]{4})\n", out)
    assert route is not None
    executions = sum("·█2".index(mark) for mark in route[1])
    assert f"executions  {executions} of 4 a forward pass" in out
    assert re.search(r"time        prefill \d", out)


def test_generate_without_routers_gives_the_base_models_answer(
    model: list[str], tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
):
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model[1])
    ids = torch.tensor([tiny_tokenizer("Name an ice.")["input_ids"]])
    output = plain.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = tiny_tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert expected.strip()

    words = ["generate", *model, "--no-chat", "--max-new-tokens", "6", "Name an ice."]
    assert main(words) == 0

    out = capsys.readouterr().out
    assert out.startswith(expected.strip() + "\n")
    assert "4 of 4 a forward pass (100 %)" in out


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("", "search.jsonl"),
        ("search.jsonl", "paths tried    42, 7.0 a question"),
        ("supervision.jsonl", "targets        "),
        ("supervision.rejected.jsonl", "records have no target"),
        ("routers", "4 layers of width 32"),
        ("routers/metrics.jsonl", "macro_f1"),
        ("routers/layers.json", "layer majority"),
        ("eval", "builtin_facts, test: 6 questions"),
        ("eval/builtin_facts.json", "builtin_facts, test: 6 questions"),
        ("eval/latency.json", "Measured time of routed / base by rows of a batch: reading"),
        ("eval/samples.jsonl", "samples        6; systems base, routed"),
        ("search.manifest.json", "paths tried"),
        ("run.manifest.json", "report.html"),
    ],
)
def test_everything_in_a_run_folder_can_be_shown(
    finished_run: Path, place: str, shown: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["show", str(finished_run / place)]) == 0

    assert shown in capsys.readouterr().out


# --- kill, interrupt, go on --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "stop"),
    [
        ("builtin_facts", signal.SIGINT),
        ("letters", signal.SIGKILL),
        pytest.param("builtin_arithmetic", signal.SIGKILL, marks=pytest.mark.thorough),
    ],
)
def test_a_search_that_was_stopped_goes_on_and_ends_as_an_unbroken_one(
    dataset: str,
    stop: signal.Signals,
    tmp_path: Path,
    model: list[str],
    start: Callable[..., Any],
    assert_same_run: Callable[..., None],
):
    if dataset == "letters":  # answered by a letter; the tiny model's babble is right at times
        dataset = str(tmp_path / "letters.jsonl")
        choices = {"answer": "C", "grader": "letter"}
        rows = [{"question": f"Is {n} A) odd, B) even or C) big?", **choices} for n in range(40)]
        Path(dataset).write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["search", *model, "--dataset", dataset, "--num-simulations", "8", "--limit", "10"]
    words += ["--block-size", "2", "--output-dir"]
    stopped, unbroken = tmp_path / "stopped", tmp_path / "unbroken"
    process, said = start([*words, str(stopped)])
    while not num_batches_kept(stopped / CHUNKS_FOLDER):
        assert process.is_alive(), said.read_text()
        time.sleep(0.001)
    os.kill(process.pid, stop)
    process.join()

    if stop == signal.SIGINT:
        assert process.exitcode == 130
        assert "Traceback" not in said.read_text()
        sentence = "interrupted; finished work is kept. Run the same command to resume."
        assert said.read_text().splitlines()[-1] == f"drllm: {sentence}"
    kept = [file for file in (stopped / CHUNKS_FOLDER).iterdir() if file.name.count(".") == 1]
    assert 1 <= num_batches_kept(stopped / CHUNKS_FOLDER) < 5  # the stop came in the middle of it
    chunk = next(json.loads(f.read_text()) for f in kept if f.name.startswith("batch-"))
    assert not (stopped / "search.jsonl").exists()

    for folder in (stopped, unbroken):
        assert main([*words, str(folder)]) == 0

    assert not (stopped / CHUNKS_FOLDER).exists()
    lines = (stopped / "search.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(record in rows for record in chunk["records"])  # times too: not searched again
    resumed, expected = (read_search(run / "search.jsonl") for run in (stopped, unbroken))
    assert_same_run(resumed, expected)
    if dataset != "builtin_arithmetic":  # too hard for a model of random weights
        assert {path.reward for record in expected for path in record.paths} == {0.0, 1.0}
