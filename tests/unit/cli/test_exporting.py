"""`drllm export`: the file that it reads, and what it says."""

import json
from pathlib import Path

import pytest

from drllm.errors import PathError, RecordError
from drllm.paths import to_path
from drllm.records.static_paths import load_path
from drllm.statistics.differences import Differences
from drllm.statistics.losses import describe_loss
from drllm.statistics.verdicts import judge_counts, judge_means
from healed_folder import written_healed
from paths_json import leave_grades_out, written_paths


def written(folder: Path, text: str) -> Path:
    file = folder / "plan"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('{"decisions": [1, 1, 0, 2, 1]}', (0, 1, 3, 3, 4)),
        ('{"path": [0, 1, 3, 3, 4]}', (0, 1, 3, 3, 4)),
        ('\ufeff{\n  "path": [4, 0]\n}\n', (4, 0)),
        ('{"path": [0, {"layer": 3}]}', (0, 3)),
        ('{"path": [{"layer": 3}, {"layer": 3, "run": "all", "scale": 1}]}', (3, 3)),
    ],
)
def test_every_form_gives_its_path(tmp_path: Path, text: str, path: tuple[int, ...]) -> None:
    assert load_path(str(written(tmp_path, text))).path(5).layers == path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (" \n", "expected JSON"),
        ("0 1 2", "expected `object`"),
        ('{"decisions": [1, 1', "cut off"),
        ("[0, 1, 2]", "array"),
        ("{}", "one of 'decisions' and 'path'"),
        ('{"path": [0], "decisions": [1]}', "one of 'decisions' and 'path'"),
        ('{"decision": [1, 1]}', "`decision`"),
        ('{"path": "0 1 2"}', "(at `path`)"),
        ('{"decisions": [1, 1.5, 1]}', "(at `decisions[1]`)"),
        ('{"path": [0, true]}', "(at `path[1]`)"),
        ('{"path": [0, null]}', "(at `path[1]`)"),
        ('{"path": []}', "(at `path`)"),
    ],
)
def test_a_file_of_another_form_is_refused_with_the_place(tmp_path, text, says):
    file = written(tmp_path, text)
    with pytest.raises((RecordError, PathError)) as caught:
        load_path(str(file))
    message = str(caught.value)
    assert says in message
    assert str(file) in message
    assert "\n" not in message
    assert len(message) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        ("decisions", (1, 1, 3, 1, 1), "decision 3 at layer 2"),
        ("decisions", (1, 1, 1, 1), "4 decisions were given for a model of 5 layers"),
        ("decisions", (0, 0, 0, 0, 0), "all layers are skipped"),
        ("path", (0, 5), "5 at position 1 of the path"),
        ("path", (0, -1), "-1 at position 1 of the path"),
    ],
)
def test_values_that_the_model_cannot_run_are_named(tmp_path, kind, values, says):
    file = written(tmp_path, json.dumps({kind: values}))
    with pytest.raises(PathError, match=f"^{file}: .*{says}"):
        load_path(str(file)).path(5)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, says in (("none", "doesn't exist"), ("", "is a folder"), ("binary", "UTF-8")):
        with pytest.raises(RecordError, match=says):
            load_path(str(tmp_path / name))


@pytest.fixture
def export(model_folder, drllm):
    """A function that exports a plan of a tiny model to a folder."""
    command = f"export --device cpu --model {model_folder(num_layers=5)} --path"
    return lambda plan, to, status=0: drllm(command, plan, "--output", to, status=status)


def test_the_checkpoint_is_written_and_described(export, tmp_path: Path) -> None:
    output = tmp_path / "out"
    said = export(written(tmp_path, '{"path": [0, 1, 2, 3, 1, 2, 3, 4]}'), output)
    # On a slow machine lines such as "loading the model …" may be there.
    assert [line for line in said.err.splitlines() if not line.endswith(" …")] == []
    for text in (
        f"export      {output}",
        "path        0 1 2 3 1 2 3 4",
        "layers      8, the base model has 5",
        "in float32; 0.1 MB of it are layers that are executed again",
        "logits equal the path's bit for bit",
    ):
        assert text in said.out
    assert json.loads((output / "config.json").read_text())["num_hidden_layers"] == 8


@pytest.mark.parametrize(
    ("step", "words"),
    [({"run": "mlp"}, "the mlp of layer 1 alone"), ({"scale": 0.5}, "layer 1 at weight 0.5")],
)
def test_what_older_versions_could_run_is_refused_with_the_version(export, tmp_path, step, words):
    plan = written(tmp_path, json.dumps({"path": [0, {"layer": 1, **step}, 2, 4]}))
    said = export(plan, tmp_path / "out", status=2).err
    assert f"a path that runs {words}" in said
    assert "0.1.0.dev0, commit 3820ce17" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_tuned_path_names_its_base_model_and_another_is_refused(model_folder, drllm, tmp_path):
    from drllm.model.load import load

    base = load(str(model_folder(num_layers=6)), device="cpu")
    file = written_paths(tmp_path / "paths.json", base.identity)
    said = drllm("export --device cpu --path", f"{file}:5.00", "--output", tmp_path / "out").out
    assert "path        0 1 3 4 5\n" in said
    assert "is excluded" in (tmp_path / "out" / "README.md").read_text()
    other = ("--model", model_folder(num_layers=6, seed=1), "--output", tmp_path / "no")
    said = drllm("export --device cpu --path", f"{file}:4.00", *other, status=2).err
    assert "fingerprint" in said
    assert said.count("\n") == 1


@pytest.fixture(scope="module")
def base(model_folder):
    """A tiny model of six layers."""
    from drllm.model.load import load

    return load(str(model_folder(num_layers=6)), device="cpu")


LOSSY = judge_counts(0, 30, 100)  # 30 points less, at least 22
TEXT = judge_means("text_loss", [1.2, 1.4] * 50, [0.0] * 100, seed=0)
UNSURE = judge_counts(0, 3, 100)  # 3 points less, which isn't shown


@pytest.mark.parametrize(
    ("losses", "words", "is_refused"),
    [
        (Differences(accuracy=LOSSY), "", True),
        (Differences(accuracy=LOSSY), "--max-drop 25", False),
        (Differences(accuracy=LOSSY), "--force", False),
        (Differences(accuracy=UNSURE), "", False),
        (Differences(accuracy=UNSURE, text_loss=TEXT), "", True),
        (Differences(accuracy=UNSURE, text_loss=TEXT), "--max-loss-increase 1.4", False),
    ],
    ids=["answers", "a higher bound", "forced", "not shown", "text", "a higher bound of text"],
)
def test_a_path_that_is_shown_to_lose_more_than_the_bound_needs_force(
    base, drllm, tmp_path, losses, words, is_refused
):
    file = written_paths(tmp_path / "paths.json", base.identity, test=losses)
    command = f"export --device cpu {words} --path"
    output = tmp_path / "out"
    result = drllm(command, f"{file}:5.00", "--output-dir", output, status=2 * is_refused)
    if is_refused:
        assert result.err.count("\n") == 1
        assert "--force" in result.err
        assert not output.exists()
        return
    sentence = describe_loss("5.00", losses)
    assert f"measured    on arc_easy, {sentence}\n" in result.out
    assert f"- on arc_easy, {sentence}\n" in (output / "README.md").read_text()


@pytest.mark.parametrize("objective", ["next_token_loss", "kl"])
def test_a_path_without_grades_needs_force_if_its_loss_is_shown_to_rise_too_much(
    base, drllm, tmp_path, objective
):
    file = written_paths(tmp_path / "paths.json", base.identity)
    words = ("--path", f"{file}:5.00", "--output-dir", tmp_path / "out")
    leave_grades_out(file, objective, (-1.5, -1.9, -1.1))
    error = drllm("export --device cpu", *words, status=2).err
    assert error.count("\n") == 1
    assert "lose 1.5 nats a token of " in error
    assert "(95 %: 1.1 to 1.9; 1 are allowed)" in error
    assert "--force" in error
    drllm("export --device cpu --max-loss-increase 1.2", *words)


def test_a_path_without_grades_whose_loss_falls_is_exported(base, drllm, tmp_path):
    file = written_paths(tmp_path / "paths.json", base.identity)
    leave_grades_out(file, "next_token_loss", (1.5, 1.1, 1.9))
    output = drllm("export --device cpu --path", f"{file}:5.00", "--output-dir", tmp_path / "o").out
    assert "its loss falls by 1.50 nats a token (1.10 to 1.90)" in output


def test_a_refit_doesnt_count_since_the_plain_path_is_exported(base, drllm, tmp_path):
    harmless = Differences(accuracy=judge_counts(0, 0, 400))
    lossy = Differences(accuracy=LOSSY)
    words = ("--output-dir", tmp_path / "out")
    file = written_paths(tmp_path / "paths.json", base.identity, test=lossy, repaired=harmless)
    assert "--force" in drllm("export --device cpu --path", f"{file}:5.00", *words, status=2).err
    file = written_paths(tmp_path / "paths.json", base.identity, test=harmless, repaired=lossy)
    measured = drllm("export --device cpu --path", f"{file}:5.00", *words).out.split("measured")[1:]
    assert "without its refit" in measured[0]
    assert "with its refit" in measured[1]


def test_a_path_without_a_record_is_exported_and_nothing_is_claimed(export, tmp_path: Path) -> None:
    result = export(written(tmp_path, '{"path": [0, 4]}'), tmp_path / "out")
    assert "measured    nothing" in result.out
    assert "What it loses" not in (tmp_path / "out" / "README.md").read_text()


def test_a_healed_path_is_exported_with_its_losses_by_source(base, drllm, tmp_path):
    written_healed(tmp_path / "healed", base.model, base.identity)
    words = ("--path", tmp_path / "healed", "--output-dir", tmp_path / "out")
    output = drllm("export --device cpu", "--model", base.name, *words).out
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (output, card):
        assert "arc_easy +0.200 (+1.000 before the repair)" in text
        assert "what it does to accuracy" in text


@pytest.mark.thorough  # the tiny model's checkpoint is loaded again and compared bit for bit
def test_a_real_model_exported_from_decisions_answers_as_the_routed_one(smollm2, tmp_path, drllm):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from drllm.models.routed_model import RoutedModel

    decisions = [1] * 30
    decisions[12], decisions[20] = 0, 2
    plan = written(tmp_path, json.dumps({"decisions": decisions}))
    output = tmp_path / "out"
    said = drllm("export --device cpu --path", plan, "--output", output).out
    assert " ".join(map(str, to_path(decisions))) in said
    tokenizer = AutoTokenizer.from_pretrained(output)
    plain = AutoModelForCausalLM.from_pretrained(output)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False}
    routed = RoutedModel(smollm2.model)
    try:
        with routed.fixed(decisions), torch.no_grad():
            expected = routed.model(**inputs).logits
            answer = routed.generate(**inputs, **options)
    finally:
        routed.detach()
    with torch.no_grad():
        # Equal weights elsewhere in memory: the last bits may differ (standard deviation about 6).
        torch.testing.assert_close(plain(**inputs).logits, expected, atol=1e-4, rtol=0)
    assert plain.generate(**inputs, **options).tolist() == answer.tolist()
