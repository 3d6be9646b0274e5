"""The whole loop on a tiny model: all stages, again, and after a kill at any moment."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drllm.cli import main
from drllm.cli.parser import parse
from drllm.records.results import read_evaluation
from drllm.records.search import read_search
from drllm.reporting import stage as reporting
from drllm.search import CHUNKS_FOLDER, count_kept_batches

EVERY_FILE = """
run.yaml run.manifest.json
search.jsonl search.manifest.json
supervision.jsonl supervision.manifest.json supervision.rejected.jsonl
routers/router_config.json routers/routers.safetensors routers/metrics.jsonl routers/layers.json
routers/README.md routers/config.json
eval/builtin_facts.json eval/latency.json eval/samples.jsonl eval/samples.manifest.json
report.html report.md
report_figures/01-builtin-facts-systems.png report_figures/02-routes-by-layer.png
report_figures/03-router-metrics.png
"""
FILES = set(EVERY_FILE.split())


def files_of(folder: Path) -> dict[str, int]:
    """Return every file below a folder with its time of change, in nanoseconds."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


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
    monkeypatch.setattr(reporting, "list_pictures", lambda page: [])


@pytest.fixture
def rerun(recipe, tmp_path, run_copy, drllm) -> Callable[..., str]:
    """A function that carries out the recipe, a text in it changed, in a copy of the run.

    It returns what goes to standard error.
    """

    def rerun(old: str = "", new: str = "", *words: str) -> str:
        other = tmp_path / "other.yaml"
        assert old in recipe.read_text()
        other.write_text(recipe.read_text().replace(old, new, 1))
        return str(drllm("run", other, "--output-dir", run_copy, *words).err)

    return rerun


def test_a_recipe_leaves_every_file_and_nothing_else(finished_run: Path):
    assert set(files_of(finished_run)) == FILES


@pytest.mark.thorough  # Ray, and a process that imports torch
def test_a_recipe_may_leave_search_and_features_to_ray(
    finished_run, recipe, tmp_path, assert_same_run, leaving_things_open
):
    pytest.importorskip("ray")
    by_ray = tmp_path / "ray.yaml"
    text = recipe.read_text()
    for stage in ("search", "train"):
        assert f"{stage}: {{" in text
        text = text.replace(f"{stage}: {{", f"{stage}: {{executor: ray, num_workers: 1, ")
    by_ray.write_text(text)
    with leaving_things_open():
        assert main(["run", str(by_ray), "--output-dir", str(tmp_path / "run")]) == 0
    assert set(files_of(tmp_path / "run")) == FILES
    ours, theirs = (read_search(run / "search.jsonl") for run in (finished_run, tmp_path / "run"))
    assert_same_run(ours, theirs)


def test_the_same_recipe_or_the_one_in_the_folder_does_nothing_anew(finished_run, recipe, drllm):
    before = files_of(finished_run)
    for file in (recipe, finished_run / "run.yaml"):
        said = drllm("run", file, "--output-dir", finished_run)
        assert files_of(finished_run) == before
        assert said.err.count("already done") == 5
        assert f"page           {finished_run / 'report.html'}" in said.out


def test_a_run_and_its_report_end_with_commands_that_can_be_pasted(finished_run, recipe, drllm):
    run = drllm("run", recipe, "--output-dir", finished_run).out
    report = drllm("report", finished_run).out
    commands = [line.strip() for line in run.splitlines() if line.startswith("  drllm ")]
    assert 1 <= len(commands) <= 3
    headline = read_evaluation(finished_run / "eval" / "builtin_facts.json").headline
    assert headline in " ".join(run.split())
    assert headline in " ".join(report.split())
    assert commands == [line.strip() for line in report.splitlines() if line.startswith("  drllm ")]
    for command in commands:
        parse(shlex.split(command)[1:])


def test_other_training_settings_redo_the_training_and_what_follows(run_copy, rerun):
    before = files_of(run_copy)
    said = rerun("num_epochs: 2", "num_epochs: 3")
    after = files_of(run_copy)
    unchanged = {name for name in after if after[name] == before[name]}
    kept = {name for name in FILES if name.startswith(("search", "supervision"))}
    assert unchanged == kept
    assert len((run_copy / "routers" / "metrics.jsonl").read_text().splitlines()) == 3
    assert said.count("already done") == 2


def test_a_result_that_was_changed_by_hand_is_made_again(run_copy, rerun, quick_report):
    result = run_copy / "eval" / "builtin_facts.json"
    right = json.loads(result.read_text())
    result.write_text(result.read_text().replace('"accuracy": ', '"accuracy": 1.0e-9 + '))
    assert rerun().count("already done") == 3
    made_again = json.loads(result.read_text())
    for system, expected in zip(made_again["systems"], right["systems"], strict=True):
        assert system["accuracy"] == expected["accuracy"]
        assert system["gold_logprob"] == pytest.approx(expected["gold_logprob"], abs=1e-4)


def test_a_damaged_copy_of_the_recipe_is_written_anew(run_copy, rerun):
    kept = run_copy / "run.yaml"
    expected = kept.read_text()
    kept.write_bytes(b"\x1f\x8b")
    assert rerun().count("already done") == 5
    assert kept.read_text() == expected


def test_whether_and_how_time_is_measured_redoes_the_evaluation(run_copy, rerun, quick_report):
    timed = "latency: true, latency_rounds: 2, latency_read: 8, latency_written: 2,"
    more_often = timed.replace("rounds: 2", "rounds: 4")
    for settings, is_timed in ((more_often, True), ("", False)):
        assert "evaluate: already done" not in rerun(timed, settings)
        assert (run_copy / "eval" / "latency.json").exists() == is_timed


def test_other_tasks_leave_no_result_of_the_earlier_ones(run_copy, rerun, tmp_path, quick_report):
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
    rerun, tmp_path, quick_report
):
    (tmp_path / "data").mkdir()
    said = rerun("", "", "--data-dir", str(tmp_path / "data"))
    for stage in ("[1/5] search", "[2/5] supervise", "[3/5] train", "[4/5] evaluate"):
        assert f"{stage}: already done" in said


def test_a_recipe_with_several_seeds_evaluates_them_all(run_copy, rerun, quick_report):
    rerun("num_epochs: 2", "num_epochs: 2, num_seeds: 2")
    assert (run_copy / "routers" / "seed_1" / "routers.safetensors").is_file()
    result = json.loads((run_copy / "eval" / "builtin_facts.json").read_text())
    assert list(result["other_seeds"]) == [str(run_copy / "routers" / "seed_1")]


@pytest.fixture
def model(model_folder: Callable[..., Path]) -> list[str]:
    return ["--model", str(model_folder()), "--device", "cpu"]


@pytest.fixture
def train(run_copy: Path, model: list[str], drllm: Callable[..., Any]) -> Callable[..., Any]:
    """A function that trains one epoch on a copy of the run's targets, or on others."""
    command = "train --num-epochs 1 --warmup-steps 0 --supervision"

    def run(*words: object, targets: object = run_copy / "supervision.jsonl", status: int = 0):
        return drllm(command, targets, *model, *words, status=status)

    return run


def test_the_stages_one_by_one_end_in_an_evaluation(tmp_path, model_folder, monkeypatch, drllm):
    monkeypatch.chdir(tmp_path)
    model = ["--model-id", model_folder(), "--device", "cpu"]

    drllm("search --dataset builtin_facts --limit 6 --num_simulations 6", *model)
    drllm("supervise --search data/search.jsonl --output-dir data/paper --target paper")
    few = "--num-epochs 1 --warmup-steps 0"
    drllm(f"train --supervision data/supervision.jsonl --run-name first {few}", *model)
    few = "--tasks builtin_facts --limit 4 --num-random-draws 1"
    out = drllm(f"evaluate --routers checkpoints/first --device cpu {few}").out

    assert Path("data/paper/supervision.jsonl").is_file()
    assert Path("eval/builtin_facts.json").is_file()
    assert "builtin_facts, test: 4 questions" in out
    for system in ("base", "routed", "permuted routes", "random decisions", "label frequency"):
        assert re.search(rf"^ {system} .*\d\.\d", out, re.MULTILINE)


def test_features_that_are_kept_are_used_again_by_another_training(train, tmp_path):
    kept, weights = tmp_path / "kept", {}
    for name, others in (("first", []), ("again", []), ("other", ["--seed", "1"])):
        said = train(*others, "--features", kept, "--output", tmp_path / name).err
        assert (f"the routers' inputs in {kept} are used again" in said) == (name != "first")
        assert not (tmp_path / name / "features").exists()
        weights[name] = (tmp_path / name / "routers.safetensors").read_bytes()
    assert weights["first"] == weights["again"] != weights["other"]


def test_a_training_that_failed_behind_the_pass_goes_on_with_its_features(train, tmp_path):
    output = tmp_path / "routers"
    (output / "README.md").mkdir(parents=True)  # in the way of the card
    train("--output", output, status=2)
    assert list((output / "features").glob("features-*.safetensors"))
    (output / "README.md").rmdir()
    said = train("--output", output).err
    assert f"the routers' inputs in {output / 'features'} are used again" in said
    assert not (output / "features").exists()


def test_a_target_that_is_set_aside_is_said_and_listed(run_copy, train, tmp_path, drllm):
    (run_copy / "supervision.manifest.json").unlink()
    with (run_copy / "supervision.jsonl").open("a") as file:
        row = {"question": "long?", "prompt": "x" * 600, "answer": "", "id": "long"}
        file.write(json.dumps({**row, "optimal_layer_config": [1, 1, 1, 1]}) + "\n")

    said = train("--output", tmp_path / "routers").err

    rejected = tmp_path / "routers" / "rejected.jsonl"
    why = "targets are set aside (longer than the base model's context: 1)"
    assert f"{why}: {rejected}" in said
    [line] = rejected.read_text().splitlines()
    assert json.loads(line)["id"] == "long"
    assert "longer than the base model's context" in drllm("show", rejected).out


def test_several_seeds_are_trained_and_evaluated_together(train, tmp_path, drllm):
    both, second = tmp_path / "both", tmp_path / "second"
    seeds = ["--output", both, "--num-seeds", "2"]

    def weights(folder: Path) -> bytes:
        return (folder / "routers.safetensors").read_bytes()

    train(*seeds)
    train("--output", second, "--seed", "1")
    assert weights(both / "seed_1") == weights(second) != weights(both)
    assert "holds trained routers already" in train(*seeds, status=2).err

    shutil.rmtree(both / "seed_1")  # as a kill behind the first seed leaves it
    before = (both / "routers.safetensors").stat().st_mtime_ns
    other = train(*seeds, "--learning-rate", "0.1", status=2).err
    assert "holds trained routers of another run" in other
    train(*seeds)
    assert weights(both / "seed_1") == weights(second)
    assert (both / "routers.safetensors").stat().st_mtime_ns == before

    evaluate = ["--output-dir", tmp_path / "eval", "--routers", both, both / "seed_1"]
    command = "evaluate --tasks builtin_facts --device cpu --limit 4 --baselines none"
    twice = drllm(command, *evaluate, both, status=2).err
    assert "the same routers are given twice" in twice
    assert "Routers of 2 seeds: accuracy" in " ".join(drllm(command, *evaluate).out.split())


def test_several_seeds_are_trained_each_in_its_own_folder(
    run_copy, train, tmp_path, monkeypatch, drllm
):
    monkeypatch.chdir(tmp_path)
    drllm("supervise --search run/search.jsonl --output kl.jsonl --target least_kl")
    words = ["--run-name", "kl", "--num-seeds", "2", "--seed", "5"]
    out = train(*words, targets="kl.jsonl").out
    folders = [Path("checkpoints/kl"), Path("checkpoints/kl/seed_6")]
    configs = [json.loads((folder / "router_config.json").read_text()) for folder in folders]
    assert [config["training"]["settings"]["seed"] for config in configs] == [5, 6]
    assert all(f"routers        {folder}" in out for folder in folders)


@pytest.fixture
def search_again(run_copy: Path, model: list[str], drllm: Callable[..., Any]) -> Callable[..., Any]:
    """A function that repeats the run's search by its own verb, and returns what it says."""
    command = (
        "search --dataset builtin_facts --limit 6 --num-simulations 6 --block-size 3 --output-dir"
    )
    return lambda *more: drllm(command, run_copy, *model, *more)


def test_the_same_search_again_leaves_itself_and_targets_of_another_rule_unless_one_is_given(
    run_copy, search_again, drllm
):
    search, output = run_copy / "search.jsonl", run_copy / "supervision.jsonl"
    drllm("supervise --target paper", "--search", search, "--output", output)
    chosen, before = output.read_text(), search.stat().st_mtime_ns
    out = search_again().out
    assert "search.jsonl is complete already" in out
    assert search.stat().st_mtime_ns == before
    assert "supervision.jsonl was made from this search already" in out
    assert output.read_text() == chosen

    search_again("--target", "least_kl", "--min-saving", "0.2")
    manifest = json.loads((run_copy / "supervision.manifest.json").read_text())
    assert (manifest["config"]["target"], manifest["config"]["min_saving"]) == ("least_kl", 0.2)
    assert output.read_text() != chosen


def test_how_the_questions_of_a_file_are_divided_is_told(tmp_path, model, drllm):
    file = tmp_path / "mine.jsonl"
    row = '{{"question": "How many is {0}?", "choices": ["{0}", "none"], "answer": 0}}\n'
    file.write_text("".join(map(row.format, range(40))))
    out = " ".join(
        drllm("search --dry-run --num-simulations 2 --dataset", file, *model).out.split()
    )
    said = re.search(
        r"has 40 questions: (\d+) in search, (\d+) in fit, (\d+) in select, (\d+)", out
    )
    assert said is not None
    assert sum(map(int, said.groups())) == 40
    assert min(map(int, said.groups())) > 0


def test_targets_whose_manifest_a_kill_prevented_get_it_from_the_same_search_again(
    run_copy, search_again
):
    manifest = run_copy / "supervision.manifest.json"
    before = json.loads(manifest.read_text())
    manifest.unlink()
    search_again("--target", "shortest")
    after = json.loads(manifest.read_text())
    assert {**after, "created": ""} == {**before, "created": ""}
    assert after["rewards"] == ["loglikelihood"]


def test_targets_of_ones_own_stay_as_they_are(run_copy: Path, search_again: Callable[..., Any]):
    (run_copy / "supervision.manifest.json").unlink()
    output = run_copy / "supervision.jsonl"
    own = "".join(output.read_text().splitlines(keepends=True)[1:])
    output.write_text(own)
    said = search_again().err
    assert output.read_text() == own
    assert not (run_copy / "supervision.manifest.json").exists()
    assert "has no manifest, so drllm didn't write it; it stays as it is" in said


def trained_for(routers: Path, *rewards: str) -> str:
    """Rewrite what the routers' prompts were made for, and return their folder."""
    path = routers / "router_config.json"
    config = json.loads(path.read_text())
    assert config["training"]["rewards"] == ["loglikelihood"]
    config["training"]["rewards"] = list(rewards)
    path.write_text(json.dumps(config))
    return str(routers)


FORM = {"chat": False, "template": "Question: {prompt}\nAnswer:"}


def test_training_records_how_its_prompts_were_put(finished_run: Path):
    config = json.loads((finished_run / "routers" / "router_config.json").read_text())
    assert config["training"]["prompt_form"] == FORM


def test_routers_that_do_not_record_it_are_asked_through_the_chat_template(run_copy, drllm):
    routers = run_copy / "routers" / "router_config.json"
    config = json.loads(routers.read_text())
    del config["training"]["prompt_form"]
    routers.write_text(json.dumps(config))
    words = ["--routers", routers.parent]
    said = "through the chat template; the routers don't record the form of their own prompts"
    assert said in drllm("generate ice --device cpu --max-new-tokens 2", *words).err


@pytest.mark.parametrize(
    ("rewards", "notes"), [(["letter"], 1), (["letter", "loglikelihood"], 0), ([], 0)]
)
def test_evaluate_says_so_where_routers_were_trained_on_other_prompts(
    run_copy, tmp_path, rewards, notes, drllm
):
    places = [trained_for(run_copy / "routers", *rewards), "--output-dir", tmp_path / "eval"]
    command = "evaluate --tasks builtin_facts --device cpu --limit 2 --baselines none --routers"
    said = drllm(command, *places).err
    assert said.count("were trained on prompts for letter, but") == notes


def test_generate_without_routers_gives_the_base_models_answer(model, tiny_tokenizer, drllm):
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model[1])
    ids = torch.tensor([tiny_tokenizer("Name an ice.")["input_ids"]])
    output = plain.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = tiny_tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert expected.strip()

    out = drllm("generate --no-chat --max-new-tokens 6", "Name an ice.", *model).out

    assert out.startswith(expected.strip() + "\n")
    assert "4 of 4 a forward pass (100 %)" in out


@pytest.mark.parametrize("name", ["eval/builtin_facts.json", "eval/samples.jsonl", "paths.json"])
def test_show_names_a_damaged_part_of_a_run_and_does_not_leave_it_out(run_copy, name, drllm):
    file = run_copy / name
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"schema": "drllm')
    [line] = drllm("show", run_copy, status=2).err.splitlines()
    assert str(file) in line


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("", "search.jsonl"),
        ("search.jsonl", "paths tried    42, 7.0 a question"),
        ("supervision.jsonl", "targets        "),
        ("supervision.rejected.jsonl", "without a target"),
        ("routers", "4 layers of width 32"),
        ("routers/metrics.jsonl", "macro_f1"),
        ("routers/layers.json", "layer majority"),
        ("eval", "builtin_facts, test: 6 questions"),
        ("eval/builtin_facts.json", "builtin_facts, test: 6 questions"),
        ("eval/latency.json", "routed / base by rows of a batch"),
        ("eval/samples.jsonl", "samples        6; systems base, routed"),
        ("search.manifest.json", "paths tried"),
        ("run.manifest.json", "report.html"),
    ],
)
def test_everything_in_a_run_folder_can_be_shown(finished_run, place, shown, drllm):
    assert shown in drllm("show", finished_run / place).out


def test_a_run_folder_is_shown_without_torch(finished_run: Path):
    script = "import sys\nfrom drllm.cli import main\nstatus = main(sys.argv[1:])\n"
    script += "print(status, {'torch', 'transformers'} & set(sys.modules))"
    for words in ([finished_run], [finished_run, "--question", "x"]):
        line = [sys.executable, "-c", script, "show", *map(str, words)]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == f"{2 * (len(words) > 1)} set()"


@pytest.mark.thorough
def test_a_search_that_ctrl_c_stopped_goes_on_and_ends_as_an_unbroken_one(
    tmp_path, model, start, assert_same_run
):
    # Answered by a letter; the tiny model's babble is right at times.
    choices = {"answer": "C", "grader": "letter"}
    rows = [{"question": f"Is {n} A) odd, B) even or C) big?", **choices} for n in range(40)]
    dataset = tmp_path / "letters.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["search", *model, "--dataset", str(dataset), "--num-simulations", "8", "--limit", "10"]
    words += ["--block-size", "2", "--output-dir"]
    stopped, unbroken = tmp_path / "stopped", tmp_path / "unbroken"
    process, said = start([*words, str(stopped)])
    while not count_kept_batches(stopped / CHUNKS_FOLDER):
        assert process.is_alive(), said.read_text()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGINT)
    process.join()

    assert process.exitcode == 130
    assert "Traceback" not in said.read_text()
    again = shlex.join([*words, str(stopped)])
    sentence = f"interrupted; finished work is kept. To resume: drllm {again}"
    assert said.read_text().splitlines()[-1] == f"drllm: {sentence}"
    kept = [file for file in (stopped / CHUNKS_FOLDER).iterdir() if file.name.count(".") == 1]
    assert 1 <= count_kept_batches(stopped / CHUNKS_FOLDER) < 5  # the stop came in the middle of it
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
    assert {path.reward for record in expected for path in record.paths} == {0.0, 1.0}
