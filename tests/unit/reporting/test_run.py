"""Reading a run folder: what may be missing, and what is refused with file and line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from drllm.errors import RecordError
from drllm.records import sha256
from drllm.reporting import write_report
from drllm.reporting.run import read_run


def test_a_full_folder_is_read_whole(make_folder):
    run = read_run(make_folder(num_layers=6).everything())
    assert run.num_layers == 6
    assert len(run.search) == 40
    assert len(run.supervision) == run.summary["targets"]
    assert len(run.epochs) == 50
    assert [evaluation.task for evaluation in run.evaluations] == ["arc_easy"]
    assert len(run.evaluations[0].samples) == 60
    assert run.model["id"] == "smollm2-135m"
    assert run.absent == ()


def test_every_source_carries_the_hash_of_its_file(make_folder):
    folder = make_folder()
    run = read_run(folder.everything())
    assert len(run.sources) == 8
    for source in run.sources:
        assert source.sha256 == sha256(folder.path / source.name)


@pytest.mark.parametrize(
    ("removed", "told", "section"),
    [
        ("search.jsonl", "search.jsonl is absent", "Skipping one layer and nothing"),
        ("supervision.jsonl", "supervision.jsonl is absent", "## Targets"),
        ("routers", "routers/metrics.jsonl is absent", "## Router metrics"),
        ("routers/metrics.jsonl", "routers/metrics.jsonl is absent", "## Router metrics"),
        ("routers/layers.json", "routers/layers.json is absent", "Routers of every layer"),
        ("eval", "eval/ holds no TASK.json", "## Systems compared"),
        ("eval/samples.jsonl", "eval/samples.jsonl is absent", "## Example questions"),
        ("eval/latency.json", "eval/latency.json is absent", "Time of base and routed"),
        ("run.yaml", "run.yaml is absent", "Recipe (run.yaml)"),
    ],
)
def test_a_missing_part_is_left_out_and_named_once(make_folder, text_of, removed, told, section):
    folder = make_folder()
    assert section in text_of(folder.everything())
    path = folder.path / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = text_of(folder.path)
    assert text.count(told) == 1
    assert section not in text


@pytest.mark.parametrize("kept", ["search", "supervision", "routers", "evaluation"])
def test_any_single_part_makes_a_report(make_folder, text_of, kept):
    folder = make_folder()
    folder.everything()
    parts = {
        "search": ["search.jsonl", "search.manifest.json"],
        "supervision": ["supervision.jsonl", "supervision.manifest.json"],
        "routers": ["routers"],
        "evaluation": ["eval"],
    }
    for part, names in parts.items():
        for name in names if part != kept else []:
            path = folder.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "## Provenance" in text_of(folder.path)


def test_files_without_manifests_are_read_as_the_users_own(make_folder, text_of):
    folder = make_folder()
    folder.everything()
    for name in ("search.manifest.json", "supervision.manifest.json"):
        (folder.path / name).unlink()
    text = text_of(folder.path)
    assert "questions, how many have such a path" in text
    assert "by reason" not in text  # only the supervision stage knows the reasons


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(RecordError, match="nowhere doesn't exist; give a folder"):
        write_report([tmp_path / "nowhere"])


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(RecordError, match="file is a file; give a folder"):
        write_report([tmp_path / "file"])


def test_an_empty_folder_is_refused_and_stays_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match=r"holds no search\.jsonl"):
        write_report([tmp_path / "empty"])
    assert list((tmp_path / "empty").iterdir()) == []


def change_result(folder: Any, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder.path / "eval" / "arc_easy.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def change_time(folder: Any, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder.path / "eval" / "latency.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def change_sample(folder: Any, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder.path / "eval" / "samples.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    values = json.loads(lines[2])
    change(values)
    lines[2] = json.dumps(values)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def change_metric(folder: Any, text: str) -> None:
    path = folder.path / "routers" / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[1] = text
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def change_layers(folder: Any, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder.path / "routers" / "layers.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def cut(folder: Any, name: str) -> None:
    path = folder.path / name
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: len(text) // 2], encoding="utf-8")


REFUSED: list[tuple[str, Callable[[Any], Any], str]] = [
    ("another schema", lambda f: change_result(f, lambda v: v.update(schema="x")), "says 'x'"),
    (
        "a future version",
        lambda f: change_result(f, lambda v: v.update(schema_version=99)),
        "schema version 99, this drllm reads up to 2",
    ),
    ("a missing key", lambda f: change_result(f, lambda v: v.pop("systems")), "'systems' is miss"),
    (
        "a system without accuracy",
        lambda f: change_result(f, lambda v: v["systems"][1].pop("accuracy")),
        "system 2: 'accuracy' is missing",
    ),
    (
        "an accuracy that is a text",
        lambda f: change_result(f, lambda v: v["systems"][0].update(accuracy="high")),
        "system 1: 'accuracy' is 'high'; expected a number",
    ),
    (
        "an accuracy that is not finite",
        lambda f: change_result(f, lambda v: v["systems"][0].update(accuracy=float("nan"))),
        "'accuracy' is nan; expected a finite number",
    ),
    (
        "an interval beside the accuracy",
        lambda f: change_result(f, lambda v: v["systems"][0].update(interval=[0.9, 0.95])),
        "expected 0 <= low <= accuracy <= high <= 1",
    ),
    (
        "an interval of one end",
        lambda f: change_result(f, lambda v: v["systems"][0].update(interval=[0.1])),
        "expected two numbers",
    ),
    (
        "a system named twice",
        lambda f: change_result(f, lambda v: v["systems"].append(v["systems"][1])),
        "names system 'routed' twice",
    ),
    (
        "no base",
        lambda f: change_result(f, lambda v: v["systems"].pop(0)),
        "has no system 'base' to compare with",
    ),
    (
        "another number of questions",
        lambda f: change_result(f, lambda v: v.update(num_questions=61)),
        "counts 61 questions, samples.jsonl has 60",
    ),
    (
        "an accuracy that the samples don't give",
        lambda f: change_result(
            f, lambda v: v["systems"][1].update(accuracy=0.9, interval=[0.8, 1.0])
        ),
        "they are of different evaluations",
    ),
    ("a result cut off", lambda f: cut(f, "eval/arc_easy.json"), "arc_easy.json, line 1: not JSON"),
    ("a result that is a list", lambda f: f.write("eval/arc_easy.json", []), "not a JSON object"),
    ("a foreign file", lambda f: f.write("eval/other.json", {"a": 1}), "other.json says None"),
    (
        "one task in two files",
        lambda f: shutil.copy(f.path / "eval/arc_easy.json", f.path / "eval/again.json"),
        "holds task 'arc_easy', and so does another file",
    ),
    (
        "a difference that shows neither",
        lambda f: change_result(
            f, lambda v: v["systems"][1]["against_base"]["accuracy"].update(shown="equal")
        ),
        "system 2, 'against_base', 'accuracy': 'shown' is 'equal'; expected 'higher' or 'lower'",
    ),
    (
        "a difference whose interval is upside down",
        lambda f: change_result(
            f, lambda v: v["systems"][2]["routed_against"]["accuracy"].update(interval=[1, 0])
        ),
        "'interval' is [1, 0]; expected two numbers, the lower one first",
    ),
    (
        "a metric that is a text, in a system",
        lambda f: change_result(f, lambda v: v["systems"][1].update(metrics={"acc": "high"})),
        "system 2, 'metrics': 'acc' is 'high'; expected a number",
    ),
    (
        "a word for whether the question is read",
        lambda f: change_result(f, lambda v: v["systems"][2].update(reads_question="maybe")),
        "'reads_question' is 'maybe'; expected true, false or null",
    ),
    (
        "a curve with one point twice",
        lambda f: change_result(f, lambda v: v["curve"].append(v["curve"][1])),
        "'curve', row 2: 'routed, 10 % saved' is there twice",
    ),
    (
        "a point without a setting",
        lambda f: change_result(f, lambda v: v["curve"][3].pop("setting")),
        "'curve', row 4: 'setting' is missing",
    ),
    (
        "a point that the samples don't give",
        lambda f: change_result(f, lambda v: v["curve"][2].update(accuracy=0.9)),
        "gives 'routed, 20 % saved' accuracy 0.9, samples.jsonl gives",
    ),
    (
        "a choice without limits",
        lambda f: change_result(f, lambda v: v["choice"].pop("limits")),
        "'choice', 'limits': 'epsilon' is missing",
    ),
    (
        "a trial that doesn't say why it fails",
        lambda f: change_result(f, lambda v: v["choice"]["trials"][1].update(failures=[1])),
        "'choice', 'trials', row 2: 'failures' is [1]; expected texts",
    ),
    (
        "a reason that is no text",
        lambda f: change_result(f, lambda v: v.update(not_compared={"X": None})),
        "'not_compared': 'X' is None; expected a text",
    ),
    ("samples cut off", lambda f: cut(f, "eval/samples.jsonl"), "the line is cut off"),
    ("no samples in the file", lambda f: f.text("eval/samples.jsonl", ""), "is empty"),
    (
        "a decision of 3",
        lambda f: change_sample(f, lambda v: v["systems"]["routed"].update(decisions=[1, 3, 1, 1])),
        "samples.jsonl, line 3, 'systems', 'routed': 'decisions': decision 3",
    ),
    (
        "decisions that are texts",
        lambda f: change_sample(f, lambda v: v["systems"]["routed"].update(decisions=["1"] * 4)),
        "expected 0, 1 or 2 a layer",
    ),
    (
        "decisions of another depth",
        lambda f: change_sample(f, lambda v: v["systems"]["routed"].update(decisions=[1] * 5)),
        "has 5 decisions, arc_easy.json says 4 layers",
    ),
    (
        "a gold that is no choice",
        lambda f: change_sample(f, lambda v: v.update(gold=4)),
        "line 3: 'gold' is 4, the question has 4 choices",
    ),
    (
        "samples without systems",
        lambda f: change_sample(f, lambda v: v.pop("systems")),
        "line 3, 'systems': not a JSON object",
    ),
    (
        "times of another kind of file",
        lambda f: f.latency(schema="drllm.evaluation"),
        "latency.json says 'drllm.evaluation'; expected 'drllm.latency'",
    ),
    ("times of a later drllm", lambda f: f.latency(schema_version=3), "install a newer drllm"),
    (
        "times without a machine",
        lambda f: f.latency(machine=None),
        "latency.json: 'machine' is None; expected a text",
    ),
    (
        "a round that took no time",
        lambda f: change_time(f, lambda v: v["timings"][0].update(seconds=[0.1, 0.0, 0.1])),
        "'timings', row 1: 'seconds' is [0.1, 0.0, 0.1]; expected a positive number a round",
    ),
    (
        "a system with fewer rounds",
        lambda f: change_time(f, lambda v: v["timings"][2].update(seconds=[0.1])),
        "doesn't hold as many rounds of every system",
    ),
    (
        "times without comparisons",
        lambda f: f.latency(routed_to_base=[]),
        "or compares none",
    ),
    (
        "a median outside of its rounds",
        lambda f: change_time(f, lambda v: v["routed_to_base"][0].update(median=2.0)),
        "'routed_to_base', row 1: median 2.0",
    ),
    (
        "a comparison without base's times",
        lambda f: change_time(f, lambda v: v["timings"].pop(0)),
        "has no times of base",
    ),
    (
        "times of another base model",
        lambda f: f.latency(model={**f.model, "fingerprint": "f" * 16}),
        "mixes base models with different weights",
    ),
    ("search cut off", lambda f: cut(f, "search.jsonl"), "search.jsonl, line"),
    ("supervision cut off", lambda f: cut(f, "supervision.jsonl"), "supervision.jsonl, line"),
    (
        "layers of another version",
        lambda f: change_layers(f, lambda v: v.update(schema_version=2)),
        "says it is 'drllm.layers', version 2; expected 'drllm.layers', version 1",
    ),
    (
        "layers without the targets trained on",
        lambda f: change_layers(f, lambda v: v.pop("train")),
        "'train' is missing; train again",
    ),
    (
        "layers whose counts don't add up",
        lambda f: change_layers(f, lambda v: v["validation"].update(examples=13)),
        "'validation': 'confusion' isn't 3 x 3 counts a layer that add up to the 13 examples",
    ),
    (
        "parts of different depth",
        lambda f: change_layers(f, lambda v: v["train"]["confusion"].pop()),
        "layers.json mixes",
    ),
    ("metrics that are no JSON", lambda f: change_metric(f, "{"), "metrics.jsonl, line 2"),
    (
        "metrics of an unknown split",
        lambda f: change_metric(f, '{"epoch": 1, "split": "test"}'),
        "line 2: 'split' is 'test'; expected 'train' or 'validation'",
    ),
    (
        "metrics without an epoch",
        lambda f: change_metric(f, '{"split": "train"}'),
        "line 2: 'epoch' is missing",
    ),
    (
        "a metric that is a text",
        lambda f: change_metric(f, '{"epoch": 1, "split": "train", "macro_f1": "good"}'),
        "line 2: 'macro_f1' is 'good'; expected a number",
    ),
    (
        "routers without layers",
        lambda f: f.write("routers/router_config.json", {"num_windows": 8}),
        "'num_layers' is missing",
    ),
    (
        "routers of another depth",
        lambda f: f.write("routers/router_config.json", {"num_layers": 5, "num_windows": 8}),
        "mixes models of different depth",
    ),
    (
        "a recipe that is no text",
        lambda f: (f.path / "run.yaml").write_bytes(b"\xff"),
        "not a UTF-8",
    ),
]


@pytest.mark.parametrize(
    ("spoil", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_what_cannot_be_trusted_is_refused_in_one_line_and_nothing_is_written(
    make_folder, whole, spoil, message
):
    folder = make_folder()
    folder.everything(**whole)
    spoil(folder)
    with pytest.raises(RecordError) as error:
        write_report([folder.path])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (folder.path / "report.html").exists()
    assert not (folder.path / "report.md").exists()


def test_files_of_different_base_models_are_refused(make_folder):
    folder = make_folder()
    folder.everything()
    change_result(folder, lambda values: values["model"].update(fingerprint="f" * 16))
    with pytest.raises(RecordError, match="mixes base models with different weights"):
        read_run(folder.path)


def test_results_of_other_routers_are_refused(make_folder):
    folder = make_folder()
    folder.everything()
    weights = folder.text("routers/routers.safetensors", "weights")
    change_result(folder, lambda values: values.update(routers_sha256=sha256(weights)))
    read_run(folder.path)
    folder.text("routers/routers.safetensors", "newer weights")
    with pytest.raises(RecordError, match=r"arc_easy\.json was made with other routers"):
        read_run(folder.path)


def test_targets_of_another_search_are_noted_in_the_first_section(make_folder, text_of):
    folder = make_folder()
    folder.everything()
    assert read_run(folder.path).notes == ()
    folder.search(questions=10)
    md = text_of(folder.path)
    first = md.split("\n## ")[1]
    assert "were made from another search.jsonl than the one in this folder" in first


def test_samples_changed_after_writing_are_refused(make_folder):
    folder = make_folder()
    folder.everything()
    folder.write(
        "eval/samples.manifest.json",
        {
            "schema": "drllm.samples",
            "schema_version": 1,
            "model": {},
            "config": {},
            "sha256": "0" * 64,
        },
    )
    with pytest.raises(RecordError, match="was changed or cut off after it was written"):
        read_run(folder.path)


def test_samples_without_choices_can_be_reported(make_folder, text_of):
    folder = make_folder()
    folder.everything()
    path = folder.path / "eval" / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row.update(choices=[], gold=None)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    md = text_of(folder.path)
    assert "## Example questions" in md


def test_a_result_without_chance_is_refused(make_folder):
    folder = make_folder()
    folder.evaluation()
    change_result(folder, lambda values: values.update(chance=None))
    with pytest.raises(RecordError, match="'chance' is None; expected a number"):
        read_run(folder.path)


def test_a_result_without_measured_time_is_refused(make_folder):
    folder = make_folder()
    folder.evaluation()
    change_result(folder, lambda values: values["systems"][1].update(seconds=None))
    with pytest.raises(RecordError, match="system 2: 'seconds' is None; expected a number"):
        read_run(folder.path)


def test_corrected_p_values_are_read(make_folder):
    folder = make_folder()
    folder.evaluation()
    change_result(folder, lambda values: values["systems"][1].update(mcnemar_p_holm=0.5))
    [evaluation] = read_run(folder.path).evaluations
    assert [system.mcnemar_p_holm for system in evaluation.systems] == [None, 0.5, None, None]


def test_the_samples_of_several_tasks_are_kept_apart(make_folder, text_of):
    folder = make_folder()
    folder.evaluation()
    folder.evaluation(task="arc_challenge", questions=30, accuracies=(0.3, 0.4, 0.3))
    run = read_run(folder.path)
    counts = {evaluation.task: len(evaluation.samples) for evaluation in run.evaluations}
    assert counts == {"arc_challenge": 30, "arc_easy": 60}
    text = text_of(folder.path)
    for task in ("arc_challenge", "arc_easy"):
        assert text.count(f"\n## {task}\n") == 1
        assert "### Systems compared" in text.split(f"\n## {task}\n")[1]


def test_a_result_of_an_older_drllm_is_read_and_said_to_be_one(make_folder, text_of):
    folder = make_folder()
    folder.everything()
    new = ("kind", "metric", "num_fewshot", "curve", "choice", "not_compared", "inputs")
    of_systems = ("source", "fitted_on", "reads_question", "metrics", "text_loss")
    of_systems += ("prompt_flops", "kv_bytes_per_token")
    of_systems += ("decode_executions", "against_base", "routed_against")

    def age(values: dict[str, Any]) -> None:
        for name in new:
            values.pop(name)
        for system in values["systems"]:
            for name in of_systems:
                system.pop(name)

    change_result(folder, age)
    text = text_of(folder.path)
    assert "eval/arc_easy.json is of an older drllm, which wrote no sources of baselines" in text
    assert "| routed | 50.0 % |" in text
    assert "The routed model less each baseline" not in text
    assert "Depth curve" not in text


def test_a_folder_of_results_alone_is_read_too(make_folder, tmp_path, text_of):
    folder = make_folder()
    folder.evaluation()
    (folder.path / "eval").rename(tmp_path / "results")
    run = read_run(tmp_path / "results")
    assert [evaluation.task for evaluation in run.evaluations] == ["arc_easy"]
    assert sorted(source.name for source in run.sources) == ["arc_easy.json", "samples.jsonl"]
    assert "| arc_easy.json |" in text_of(tmp_path / "results")


def test_files_of_others_beside_a_run_are_no_results(make_folder):
    folder = make_folder()
    folder.search()
    folder.write("notes.json", {"mine": 1})
    assert read_run(folder.path).evaluations == ()
