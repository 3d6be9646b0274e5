"""What is said and drawn of the paths of a `paths.json`, in a report and on the terminal."""

import shlex
from typing import Any

import pytest

from drllm.cli.parser import parse
from drllm.records.static_paths import read_paths
from drllm.reporting.drawing import LIGHT, NARROW
from drllm.reporting.figures import draw_changes
from drllm.reporting.next_steps import suggest_steps
from drllm.reporting.path_sections import compare_test_with_fit
from drllm.reporting.run import read_run
from paths_json import written_paths


@pytest.fixture
def tuned(folder: Any) -> Any:
    """A folder with a paths.json and nothing else."""
    paths = {"full": [0, 1, 2, 3], "skip1": [0, 1, 3], "skip2": [0, 3]}
    written_paths(folder.path / "paths.json", folder.model, paths=paths, fitted=(0.08, 0.02, 0.14))
    return folder


def test_a_folder_of_tuned_paths_alone_makes_a_report(tuned, text_of):
    text = text_of(tuned.path)
    assert text.startswith("# Static paths of smollm2-135m on arc_easy, builtin_facts\n")
    assert "use path skip2 where a loss of 2.0 points is acceptable" in text.split("## ")[0]
    assert "Routers" not in text.split("## ")[0]
    [(_, line)] = suggest_steps(read_run(tuned.path))
    assert parse(shlex.split(line)[1:]).values["path"].endswith("paths.json:skip2")


def test_a_row_says_what_a_path_does_and_how_it_did_on_each_part(tuned, text_of):
    text = text_of(tuned.path).replace("\u00a0", " ")
    row = next(line for line in text.splitlines() if line.startswith("| skip2 | 2 | skips layers"))
    assert row.rstrip(" |").split(" | ")[3:] == [
        "+0.5 (−2.0 to +3.0)",
        "2.0",
        "+0.050 (−0.01 to +0.11)",
        "+0.050 (−0.01 to +0.11)",
        "+0.080 (+0.02 to +0.14)",
    ]
    assert "accuracy on test 62.0 %; next-token loss on test 2.500" in text  # of all paths


def test_a_path_that_a_shorter_one_does_better_than_is_marked(tuned, text_of):
    assert "a shorter path scored better" not in text_of(tuned.path)
    tuned.change("paths.json", lambda values: values["paths"][1].update(dominated=True))
    assert "skips layer 2 (a shorter path scored better on select)" in text_of(tuned.path)


def test_a_part_that_was_not_measured_has_no_line(tuned):
    def without_select(values):
        for path in values["paths"]:
            path["measured"] = [each for each in path["measured"] if each["part"] != "select"]

    tuned.change("paths.json", without_select)
    found = read_paths(tuned.path / "paths.json")
    [axes] = draw_changes(found, "arc_easy", LIGHT, NARROW).axes
    assert [len(line.get_xdata()) for line in axes.get_lines()] == [3, 0, 3]


def test_what_was_lost_from_fit_to_test_is_said_once_in_the_report_and_on_the_terminal(
    tuned, text_of, drllm
):
    said = compare_test_with_fit(read_paths(tuned.path / "paths.json"), "arc_easy")
    assert (
        "is 0.030 nats lower than on fit on average, 0.030 nats lower at worst" in said
    )  # 0.08 on fit, 0.05 on test
    assert compare_test_with_fit(read_paths(tuned.path / "paths.json"), "builtin_facts") == ""
    assert said in text_of(tuned.path)
    assert said in " ".join(drllm("show", tuned.path / "paths.json").out.split())


def test_a_set_that_was_divided_anew_is_named_in_the_report_and_on_the_terminal(
    tuned, text_of, drllm
):
    said, file = "of builtin_facts were divided again", tuned.path / "paths.json"
    assert said not in text_of(tuned.path)
    tuned.change("paths.json", lambda values: values.update(divided=["builtin_facts"]))
    assert said in text_of(tuned.path)
    assert said in " ".join(drllm("show", file).out.split())


def test_what_was_gained_from_fit_to_test_is_said_as_a_gain(tuned):
    def worse_on_fit(values):
        for path in values["paths"][1:]:
            path["measured"][0]["change"] = [-0.5, -0.6, -0.4]

    tuned.change("paths.json", worse_on_fit)
    assert "is 0.550 nats higher than on fit on" in compare_test_with_fit(
        read_paths(tuned.path / "paths.json"), "arc_easy"
    )


def test_changes_are_drawn_over_the_layers_saved_with_intervals_on_test(tuned):
    found = read_paths(tuned.path / "paths.json")
    [axes] = draw_changes(found, "arc_easy", LIGHT, NARROW).axes
    drawn = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in axes.get_lines()}
    assert drawn == {
        "fit": (0, 1, 2, 0, 0.08, 0.08),
        "select": (0, 1, 2, 0, 0.05, 0.05),
        "test": (0, 1, 2, 0, 0.05, 0.05),
    }
    [bars] = axes.collections
    assert [tuple(part[:, 1]) for part in bars.get_segments()][1:] == [(-0.01, 0.11)] * 2
