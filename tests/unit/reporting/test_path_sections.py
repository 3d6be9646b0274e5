"""What is said and drawn of tuned paths and of a healed path, in a report and on the terminal."""

import shlex
from typing import Any

import pytest

from drllm.cli.parser import parse
from drllm.errors import RecordError
from drllm.paths import StaticPath
from drllm.records.codec import sha256, write_json
from drllm.records.healed import ADAPTER_FILE, HealedPath, HealPoint, Losses
from drllm.records.manifest import new_manifest
from drllm.records.path_losses import describe_losses
from drllm.records.static_paths import read_paths, steps_to_write
from drllm.reporting.drawing import LIGHT, NARROW
from drllm.reporting.figures import draw_changes, draw_kl
from drllm.reporting.next_steps import suggest_steps
from drllm.reporting.path_sections import compare_test_with_fit
from drllm.reporting.run import read_run
from drllm.reporting.stage import report
from paths_json import written_paths
from run_folder import report_text


def suggested_path(folder: Any) -> Any:
    """Return the path of the only command that the report advises next."""
    [(_, line)] = suggest_steps(read_run(folder.path))
    return parse(shlex.split(line)[1:]).values["path"]


@pytest.fixture
def tuned(folder: Any) -> Any:
    """A folder with a paths.json and nothing else."""
    paths = {"full": [0, 1, 2, 3], "skip1": [0, 1, 3], "skip2": [0, 3]}
    written_paths(folder.path / "paths.json", folder.model, paths=paths, fitted=(0.08, 0.02, 0.14))
    return folder


@pytest.fixture
def is_shown(tuned, drllm):
    """A function that tells whether a sentence stands in both report and terminal, or neither."""

    def tell(sentence: str) -> bool:
        shown = " ".join(drllm("show", tuned.path / "paths.json").out.split())
        assert (sentence in shown) == (sentence in report_text(tuned.path))
        return sentence in shown

    return tell


def test_a_folder_of_tuned_paths_alone_makes_a_report(tuned):
    text = report_text(tuned.path)
    assert text.startswith("# Static paths of smollm2-135m on arc_easy, builtin_facts\n")
    first = text.split("## ")[0]
    assert "use path skip2 (2 of 4 layers) if a loss of up to " in first
    assert "Routers" not in first
    assert suggested_path(tuned).endswith("paths.json:skip2")


def test_a_row_says_what_a_path_does_and_how_it_did_on_each_part(tuned):
    text = report_text(tuned.path)
    row = next(line for line in text.splitlines() if line.startswith("| skip2 | 2 | skips layers"))
    assert row.rstrip(" |").split(" | ")[3:] == [
        "+0.5 (−2.0 to +3.0)",
        "2.0",
        "+0.050 (−0.01 to +0.11)",
        "+0.050 (−0.01 to +0.11)",
        "+0.080 (+0.02 to +0.14)",
    ]
    assert "accuracy on test 62.0 %; next-token loss on test 2.500" in text  # of all paths


def test_a_path_that_a_shorter_one_does_better_than_is_marked(tuned):
    mark = "(a shorter path scored better on select)"
    assert mark not in report_text(tuned.path)
    tuned.change("paths.json", lambda values: values["paths"][1].update(dominated=True))
    assert f"skips layer 2 {mark}" in report_text(tuned.path)


def test_report_and_terminal_say_alike_what_each_path_loses(tuned, is_shown):
    record = read_paths(tuned.path / "paths.json")
    for path in record.paths[1:]:
        [sentence] = describe_losses(record, path)
        assert is_shown(sentence)


def test_a_set_that_was_divided_anew_is_named(tuned, is_shown):
    assert not is_shown("of builtin_facts were divided again")
    tuned.change("paths.json", lambda values: values.update(divided=["builtin_facts"]))
    assert is_shown("of builtin_facts were divided again")


@pytest.mark.parametrize(
    ("fitted", "change"), [(0.08, "0.030 nats lower"), (-0.5, "0.550 nats higher")]
)
def test_what_was_lost_or_gained_from_fit_to_test_is_said(tuned, is_shown, fitted, change):
    def fit(values):
        for path in values["paths"][1:]:
            path["measured"][0]["change"] = [fitted, fitted - 0.1, fitted + 0.1]

    tuned.change("paths.json", fit)
    record = read_paths(tuned.path / "paths.json")
    sentence = compare_test_with_fit(record, "arc_easy")  # 0.05 on test
    assert f"score {change} (beside full)" in sentence
    assert f"at worst {change}" in sentence
    assert is_shown(sentence)
    assert compare_test_with_fit(record, "builtin_facts") == ""


def test_changes_are_drawn_over_the_layers_saved_with_intervals_on_test(tuned):
    def draw() -> Any:
        record = read_paths(tuned.path / "paths.json")
        [axes] = draw_changes(record, "arc_easy", LIGHT, NARROW).axes
        return axes

    def leave_select_out(values):
        for path in values["paths"]:
            path["measured"] = [part for part in path["measured"] if part["part"] != "select"]

    lines = {line.get_label(): line.get_xydata().T.tolist() for line in draw().get_lines()}
    assert lines == {
        "fit": [[0, 1, 2], [0, 0.08, 0.08]],
        "select": [[0, 1, 2], [0, 0.05, 0.05]],
        "test": [[0, 1, 2], [0, 0.05, 0.05]],
    }
    [bars] = draw().collections
    assert [tuple(part[:, 1]) for part in bars.get_segments()][1:] == [(-0.01, 0.11)] * 2
    tuned.change("paths.json", leave_select_out)
    assert [len(line.get_xdata()) for line in draw().get_lines()] == [3, 0, 3]


CURVE = (
    HealPoint(step=0, tokens=0, seconds=1.0, held_out_kl=0.6),
    HealPoint(step=50, tokens=40_000, seconds=90.0, train_kl=0.4, held_out_kl=0.31),
    HealPoint(step=100, tokens=80_000, seconds=180.0, train_kl=0.3, held_out_kl=0.35),
)
LOSSES = {
    "arc_easy": Losses(full=2.0, path=3.0, healed=2.2, num_texts=16),
    "books": Losses(full=2.5, path=2.5, healed=2.4),
}


@pytest.fixture
def healed(folder: Any) -> Any:
    """A folder with a healed path and nothing else; nobody looks into its adapter here."""
    adapter = folder.text(ADAPTER_FILE, "weights")
    record = HealedPath(
        **new_manifest("healed_path", model=folder.model, config={"rank": 2}),
        name="skip1",
        steps=steps_to_write(StaticPath([0, 1, 3])),
        executions=3.0,
        num_layers=4,
        first_layer=0,
        rank=2,
        alpha=2,
        adapter_sha256=sha256(adapter),
        tasks=("arc_easy",),
        texts=("books",),
        curve=CURVE,
        held_out=LOSSES,
    )
    write_json(folder.path / "path.json", record)
    return folder


def test_a_healed_folder_alone_makes_a_report_that_says_first_what_healing_did(healed):
    page, md = report(healed.path)
    assert "Healed path" in page.read_text(encoding="utf-8")
    assert [each.name for each in (page.parent / "report_figures").iterdir()] == ["01-healing.png"]
    text = md.read_text(encoding="utf-8").replace("\u00a0", " ")
    assert text.startswith("# Healed path of smollm2-135m on arc_easy, books\n")
    first = text.split("## ")[0]
    assert first.index("ordinary checkpoint with drllm export") < first.index("runs 3 of 4")
    assert "runs 3 of 4 layers; it was trained for 3 minutes. Its KL from" in first
    # Of the adapter that is kept, not of the last step.
    assert "was 0.600 nats a token before and is 0.310 after 50 steps of training" in first
    assert "(40,000 tokens" in first
    assert "Routers" not in text
    assert suggested_path(healed) == str(healed.path / "path.json")


def test_a_row_has_a_sources_losses(healed, drllm):
    text = report_text(healed.path)
    assert "| source | texts | full path | path alone | trained |" in text
    assert "| arc_easy | 16 | 2.000 | 3.000 | 2.200 |" in text
    assert "| books | – | 2.500 | 2.500 | 2.400 |" in text
    shown = drllm("show", healed.path).out
    assert "2.200" in next(line for line in shown.splitlines() if "arc_easy" in line)


def test_a_refit_alone_is_reported_with_its_losses_and_without_a_curve(healed, drllm):
    gap = {"layer": 1, "next_layer": 3, "map": "1.mlp.down_proj", "ridge": 0.1}
    losses = {"full": 2.0, "path": 3.0, "refit": 2.5, "healed": 2.5}

    def make_refit(values):
        values |= {"rank": 0, "alpha": 0, "curve": [], "held_out": {"arc_easy": losses}}
        values["refit"] = {"gaps": [gap], "num_tokens": 50_000}

    healed.change("path.json", make_refit)
    text = report_text(healed.path)
    assert "repaired in closed form (1 layer's weights solved on 50,000 tokens). Next" in text
    assert "out of the repair: arc_easy +0.500 (+1.000 before the repair);" in text
    assert "what it does to accuracy" in text
    assert "| arc_easy | 2.000 | 3.000 | 2.500 |" in text
    assert not (healed.path / "report_figures").exists()
    shown = drllm("show", healed.path).out
    assert "1.mlp.down_proj" in shown
    assert "rank" not in shown


def test_the_curves_are_drawn_over_thousands_of_tokens():
    [axes] = draw_kl(CURVE, LIGHT, NARROW).axes
    training, held_out = axes.get_lines()
    assert held_out.get_xydata().tolist() == [[0, 0.6], [40, 0.31], [80, 0.35]]
    assert list(training.get_ydata())[1:] == [0.4, 0.3]  # the first is not a number


def test_a_run_folder_shows_the_healed_path_in_it_beside_its_other_parts(healed):
    run = healed.path.parent / "whole"
    run.mkdir()
    healed.path.rename(run / "healed")
    written_paths(run / "paths.json", healed.model, paths={"full": [0, 1, 2, 3], "a": [0, 1, 3]})
    text = report_text(run)
    assert text.startswith("# Static paths of smollm2-135m")
    first = text.split("## ")[0]
    assert "use path a (3 of 4 layers) if a loss of up to " in first
    assert "runs 3 of 4 layers" in first
    assert text.index("## Static paths") < text.index("## Healed path")


def test_a_path_json_of_somebody_elses_is_no_healed_path(folder):
    folder.text("path.json", '{"path": [0, 1, 3]}')
    with pytest.raises(RecordError, match="holds no"):
        read_run(folder.path)
