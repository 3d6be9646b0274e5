"""Reading a run folder: what may be missing, and what is refused with file and line."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drllm.errors import RecordError
from drllm.records.codec import sha256
from drllm.reporting.run import read_run
from drllm.reporting.stage import report
from run_folder import WHOLE, report_text


@pytest.fixture(scope="module")
def full(new_folder: Callable[..., Any]) -> Any:
    """A folder with everything, which `copied` copies."""
    made = new_folder()
    made.everything(**WHOLE)
    return made


@pytest.fixture
def copied(full: Any, tmp_path: Path) -> Any:
    """A copy of the full folder that a test may spoil."""
    made = copy.copy(full)
    made.path = tmp_path / "run"
    shutil.copytree(full.path, made.path)
    made.samples = []
    return made


def remove(folder: Any, *names: str) -> None:
    for name in names:
        path = folder.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_full_folder_is_read_whole_and_every_source_has_its_hash(full):
    run = read_run(full.path)
    assert (run.num_layers, run.model["id"], run.absent) == (4, "smollm2-135m", [])
    assert len(run.search) == 40
    assert len(run.supervision) == run.summary["targets"]
    assert len(run.epochs) == 50
    [evaluation] = run.evaluations
    assert (evaluation.task, len(evaluation.samples)) == ("arc_easy", 60)
    assert len(run.sources) == 8
    for source in run.sources:
        assert source.sha256 == sha256(full.path / source.name)


@pytest.mark.parametrize(
    ("removed", "absent", "section"),
    [
        ("search.jsonl", "search.jsonl (what the search found)", "questions were searched"),
        ("supervision.jsonl", "supervision.jsonl (the targets)", "of them improving"),
        ("routers", "routers/metrics.jsonl (their metrics)", "## Router metrics"),
        ("routers/metrics.jsonl", "metrics.jsonl (their metrics)", "## Router metrics"),
        ("routers/layers.json", "(the routers layer by layer)", "labels hit | 0."),
        ("eval", "eval/TASK.json (accuracy and routes)", "## Systems"),
        ("eval/samples.jsonl", "(routes and questions)", "## Questions won and lost"),
        ("run.yaml", "run.yaml (the recipe)", "Recipe (run.yaml)"),
    ],
)
def test_a_missing_part_is_left_out_and_named_once(copied, removed, absent, section):
    assert section in report_text(copied.path)
    remove(copied, removed)
    text = report_text(copied.path)
    assert text.count(absent) == 1
    assert len(re.findall("^Not in this folder: ", text, re.MULTILINE)) == 1
    assert section not in text


@pytest.mark.parametrize("kept", ["search", "supervision", "routers", "eval"])
def test_any_single_part_makes_a_report(copied, kept):
    names = [path.name for path in copied.path.iterdir() if not path.name.startswith(kept)]
    remove(copied, *names)
    assert "## Provenance" in report_text(copied.path)


def test_files_without_manifests_are_read_as_the_users_own(copied):
    remove(copied, "search.manifest.json", "supervision.manifest.json")
    text = report_text(copied.path)
    assert "questions, how many have such a path" in text
    assert "by reason" not in text  # only the supervision stage knows the reasons


RESULT, SAMPLES = "eval/arc_easy.json", "eval/samples.jsonl"
TIMES, LAYERS = "eval/latency.json", "routers/layers.json"
METRICS, CONFIG = "routers/metrics.jsonl", "routers/router_config.json"
AWAY = {"accuracy": 0.9, "interval": [0.8, 1.0]}


def spoil(folder: Any, name: str, change: Any) -> None:
    """Change a JSON file, or a file's third line, by a function; or replace or halve the file."""
    path = folder.path / name
    if change == "half":
        change = path.read_bytes()[: path.stat().st_size // 2]
    if isinstance(change, bytes):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(change)
    elif isinstance(change, dict):
        folder.write(name, change)
    elif path.suffix == ".json":
        folder.change(name, change)
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        values = json.loads(lines[2])
        change(values)
        lines[2] = json.dumps(values)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def times(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda latency: change(latency["measured"]["timings"])


def routed(**fields: Any) -> Callable[[Any], Any]:
    return lambda sample: sample["systems"]["routed"].update(fields)


CHANGED_SAMPLES = {"schema": "drllm.samples", "schema_version": 1, "model": {}, "config": {}}
CHANGED_SAMPLES["sha256"] = "0" * 64
REFUSED: list[tuple[str, Any, str]] = [
    (RESULT, lambda v: v.update(schema="x"), "arc_easy.json has the schema 'x'"),
    (RESULT, lambda v: v.update(schema_version=99), "schema version 99"),
    (RESULT, lambda v: v.update(schema_version=1), "drllm 0.0.0 in an older form"),
    (RESULT, lambda v: v.pop("systems"), "`systems`"),
    (RESULT, lambda v: v["systems"][1].update(accuracy="high"), "`systems[1].accuracy`"),
    (RESULT, lambda v: v["systems"][0].update(accuracy=float("nan")), "NaN"),
    (RESULT, lambda v: v["systems"][1].update(executions=1e308), "`systems[1].executions`"),
    (RESULT, lambda v: v["systems"][0].update(interval=[0.9, 0.95]), "low <= accuracy"),
    (RESULT, lambda v: v["systems"][2].update(name="routed"), "'routed' is there twice"),
    (RESULT, lambda v: v["systems"][0].update(name="bass"), "no system 'base'"),
    (RESULT, lambda v: v.update(num_questions=61), "61 questions, but samples.jsonl"),
    (RESULT, lambda v: v["systems"][1].update(AWAY), "they are of different evaluations"),
    (RESULT, "half", "arc_easy.json"),
    ("eval/other.json", {"a": 1}, "other.json has the schema ''"),
    (RESULT, lambda v: v["systems"][1]["against_base"]["accuracy"].update(shown="a"), "'a'"),
    (RESULT, lambda v: v["curve"].append(v["curve"][1]), "'routed, 10 % saved' is there twice"),
    (RESULT, lambda v: v["curve"][2].update(AWAY), "'routed, 20 % saved' accuracy 0.9, but"),
    (SAMPLES, "half", "samples.jsonl, line"),
    (SAMPLES, routed(decisions=[1, 3, 1, 1]), "samples.jsonl, line 3"),
    (SAMPLES, routed(decisions=[1] * 5), "has 5 decisions, but arc_easy.json is of 4 layers"),
    (SAMPLES, routed(answer=4), "line 3: 'routed' answered with option 4"),
    (SAMPLES, lambda v: v.update(gold=4), "line 3: `gold` is 4"),
    ("eval/samples.manifest.json", CHANGED_SAMPLES, "was changed or cut off after it was written"),
    (TIMES, lambda v: v.update(schema="drllm.x"), "schema 'drllm.x'; expected 'drllm.latency'"),
    (TIMES, lambda v: v.update(schema_version=1), "older form"),
    (TIMES, times(lambda v: v[0].update(seconds=[0.1, 0.0, 0.1])), ".seconds[1]`"),
    (TIMES, times(lambda v: v[0].update(seconds=[0.1, 1e308, 0.1])), "`float` <= 1000000000.0"),
    (TIMES, lambda v: v["runtime"].update(dtype=True), "latency.json: 'dtype' of 'runtime' is T"),
    (RESULT, lambda v: v["runtime"].update(device=[0]), "'device' of 'runtime' is [0]"),
    ("search.manifest.json", lambda v: v.update(plan={"runtime": {"dtype": 3}}), "'dtype' of 'run"),
    ("search.manifest.json", lambda v: v.update(machine=3), "`machine`"),
    (TIMES, times(lambda v: v[2].update(seconds=[0.1])), "same number"),
    (TIMES, times(lambda v: v.pop(0)), "times of 'base' at"),
    (TIMES, times(lambda v: v.clear()), "times of 'base' at"),
    (TIMES, lambda v: v["model"].update(fingerprint="f" * 16), "base models with different wei"),
    ("search.jsonl", "half", "search.jsonl, line"),
    (LAYERS, lambda v: v.update(schema_version=99), "version 99"),
    (LAYERS, lambda v: v.pop("train"), "`train`"),
    (LAYERS, lambda v: v["validation"].update(examples=13), "number of examples (13)"),
    (LAYERS, lambda v: v["train"]["confusion"].pop(), "different numbers of layers"),
    (METRICS, lambda v: v.update(split="test"), "metrics.jsonl, line 3"),
    (METRICS, lambda v: v.update(macro_f1="good"), "metrics.jsonl, line 3"),
    (CONFIG, {"num_windows": 8}, "'num_layers' is missing"),
    (CONFIG, {"num_layers": 5, "num_windows": 8}, "mixes models of different depth"),
    ("run.yaml", b"\xff", "not a UTF-8"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_what_cannot_be_trusted_is_refused_in_one_line_and_nothing_is_written(
    copied, name, change, message
):
    spoil(copied, name, change)
    with pytest.raises(RecordError) as error:
        report(copied.path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(copied.path.glob("report*"))


def test_training_settings_that_cannot_be_read_are_left_out(copied):
    copied.change(CONFIG, lambda values: values.update(training=True))
    assert "## Provenance" in report_text(copied.path)


def test_one_task_in_two_files_is_refused(copied):
    shutil.copy(copied.path / RESULT, copied.path / "eval/again.json")
    with pytest.raises(RecordError, match="holds task 'arc_easy', and so does another file"):
        read_run(copied.path)


def test_results_of_other_routers_are_refused(copied):
    weights = copied.text("routers/routers.safetensors", "weights")
    for name in (RESULT, TIMES):
        copied.change(name, lambda values: values.update(routers_sha256=sha256(weights)))
    read_run(copied.path)
    copied.text("routers/routers.safetensors", "newer weights")
    with pytest.raises(RecordError, match="was made with other routers"):
        read_run(copied.path)


def test_targets_of_another_search_are_noted_before_the_first_section(copied):
    assert read_run(copied.path).notes == []
    copied.search(questions=10)
    first = report_text(copied.path).split("\n## ")[0]
    assert "were made from another search.jsonl than the one in this folder" in first


def test_samples_without_choices_can_be_reported(copied):
    lines = (copied.path / SAMPLES).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row.update(choices=[], gold=None)
        for outcome in row["systems"].values():
            outcome["answer"] = "so"
    copied.text(SAMPLES, "".join(json.dumps(row) + "\n" for row in rows))
    assert "## Questions won and lost" in report_text(copied.path)


def test_the_samples_of_several_tasks_are_kept_apart(folder):
    folder.evaluation()
    folder.evaluation(task="arc_challenge", questions=30, accuracies=(0.3, 0.4, 0.3))
    run = read_run(folder.path)
    counts = {evaluation.task: len(evaluation.samples) for evaluation in run.evaluations}
    assert counts == {"arc_challenge": 30, "arc_easy": 60}


def test_a_folder_of_results_alone_is_read_too(folder, tmp_path):
    folder.evaluation()
    results = (folder.path / "eval").rename(tmp_path / "results")
    run = read_run(results)
    assert [evaluation.task for evaluation in run.evaluations] == ["arc_easy"]
    assert sorted(source.name for source in run.sources) == ["arc_easy.json", "samples.jsonl"]
    assert "| arc_easy.json |" in report_text(results)


def test_a_damaged_result_is_named_where_it_is_all_that_the_folder_holds(folder):
    file = folder.text("arc_easy.json", "garbage")
    with pytest.raises(RecordError, match=re.escape(str(file))):
        read_run(folder.path)


def test_files_of_others_beside_a_run_are_no_results(folder):
    folder.search()
    folder.write("notes.json", {"mine": 1})
    assert not read_run(folder.path).evaluations
