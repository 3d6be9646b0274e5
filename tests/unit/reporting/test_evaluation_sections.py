"""What a report says of a test: verdict, tiles, plot, and the tables that a reader sees."""

import re
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from msgspec.structs import replace

from drllm.reporting.drawing import LIGHT, NARROW, WIDE, draw_png, spread_apart
from drllm.reporting.evaluation_sections import build_tiles, describe_times, find_most_accurate
from drllm.reporting.figures import draw_accuracy, group_curves


def table(text: str, header: str) -> list[list[str]]:
    """Return the cells of the first table whose header begins so, the header first."""
    rows = text.replace("\u00a0", " ").split(f"\n| {header}", 1)[1].split("\n\n", 1)[0]
    cells = [line.strip("| ").split(" | ") for line in f"{header}{rows}".splitlines()]
    return [cells[0], *cells[2:]]


def replace_systems(folder: Any, **fields: dict[str, Any]) -> None:
    """Give systems other values, by name."""

    def apply(values: dict[str, Any]) -> None:
        for row in values["systems"]:
            row.update(fields.get(row["name"].replace(" ", "_"), {}))

    folder.change("eval/arc_easy.json", apply)


@pytest.fixture
def folder(folder: Any) -> Any:
    folder.evaluation(accuracies=(0.7, 0.5, 0.5))
    return folder


def test_the_verdict_stands_first_and_what_else_was_found_below_the_table(folder, text_of):
    first, rest = text_of(folder.path).split("\n## ", 1)
    assert "\n**Accuracy is as high; layers are saved.**\n" in first
    assert "\n- Findings follow.\n" in rest
    assert "Accuracy is as high" not in rest


def test_what_is_shown_of_a_path_beside_routers_stands_in_the_verdict_and_nowhere_else(
    folder, text_of, drllm
):
    said = "One path saves layers too."
    folder.static_paths(findings=(said,))
    first, rest = text_of(folder.path).split("\n## ", 1)
    assert f"\n**Accuracy is as high; layers are saved.**\n\n**{said}**\n" in first
    assert "A static path runs the same layers for every question." in first
    assert said not in rest
    shown = drllm("show", folder.path / "eval").out
    assert shown.index(said) < shown.index("skip1") < shown.index("Findings follow.")
    assert shown.count(said) == 1


def test_tiles_hold_the_key_figures(run, with_paths):
    (evaluation,) = run.evaluations
    saved, accuracy, loss, time = build_tiles(evaluation, run.latency).tiles
    assert saved.title == "Layers saved"
    found = evaluation.routed.against_base
    assert accuracy.value == "−5.0 points"
    assert accuracy.label == found.accuracy.label
    assert loss.value == "+0.100 nats"
    assert loss.label == "worse"
    assert time.value == "too noisy to tell"
    assert build_tiles(evaluation, None).tiles[-1].value == "not measured"


def test_the_most_accurate_system_that_saves_layers_has_a_tile_of_its_own(run, with_paths):
    evaluation = with_paths(run.evaluations[0], 3)
    titles = [tile.title for tile in build_tiles(evaluation, run.latency).tiles]
    assert "Most accurate that saves layers: path skip1" in titles
    best = find_most_accurate(evaluation)
    assert best.name == "skip1"
    assert best.accuracy == max(s.accuracy for s in evaluation.systems[1:] if s.draws == 1)
    assert find_most_accurate(run.evaluations[0]).name == "routed"


def test_measured_time_is_one_line_with_what_it_shows(run, with_paths):
    assert describe_times(run.latency) == (
        "Measured time, routed / base by rows of a batch, 3 rounds of 16 tokens: too noisy "
        "to tell: reading 1 (0.90), reading 4 (0.90), reading 16 (0.90), decoding 1 (0.90), "
        "decoding 4 (0.90), decoding 16 (0.90)."
    )


def test_routes_that_run_more_layers_save_none(run):
    (evaluation,) = run.evaluations
    more = replace(evaluation.routed, executions=evaluation.num_layers * 1.1)
    systems = (evaluation.base, more, *evaluation.systems[2:])
    first = build_tiles(replace(evaluation, systems=systems), None).tiles[0]
    assert (first.title, first.value.replace("\u00a0", " ")) == ("More layers run", "10.0 %")


def test_systems_are_sorted_and_each_is_compared_with_the_routed_model(folder, text_of):
    header, *rows = table(text_of(folder.path), "system | layers run | accuracy")
    assert header[4:7] == ["routed minus it, points", "loss excluded above", "verdict"]
    names = [row[0] for row in rows]
    assert names == ["base", "**routed**", "permuted routes ×10", "last layers"]
    assert rows[0][4].startswith("−20.0 (")
    assert rows[1][4:] == ["**–**"] * 5
    assert rows[3][5:7] == ["0.0", "better"]


def test_what_is_not_known_of_costs_is_a_dash_and_what_is_not_measured_is_said(folder, text_of):
    replace_systems(folder, base={"prompt_flops": None, "kv_bytes_per_token": None})
    text = text_of(folder.path)
    assert table(text, "system | layers run, reading | saved")[1][3:6] == ["–", "–", "–"]
    assert "No time was measured; drllm evaluate --latency measures a routed model's." in text


def test_generated_answers_have_decoding_and_no_log_probability(folder, text_of):
    folder.change(
        "eval/arc_easy.json", lambda v: v.update(kind="generated", metric="exact_match", chance=0.0)
    )
    names = ("base", "routed", "permuted_routes", "last_layers")
    decoded = {name: {"gold_logprob": None, "decode_executions": n} for n, name in enumerate(names)}
    replace_systems(folder, **decoded)
    text = text_of(folder.path)
    assert "answers generated" in text
    assert "gold log-probability" not in text
    assert table(text, "system | layers run, reading | layers run, decoding")[2][2] == "**1.00**"


def test_grades_are_named_by_their_metric(folder, text_of):
    folder.grade()
    assert table(text_of(folder.path), "system | layers run")[0][2] == "f1, %"


def test_a_run_without_baselines_compares_routed_and_base(folder, text_of):
    folder.change("eval/arc_easy.json", lambda v: v.update(systems=v["systems"][:2]))
    assert [row[0] for row in table(text_of(folder.path), "system | layers run")[1:]] == [
        "base",
        "**routed**",
    ]


def test_a_handful_of_questions_makes_a_report(new_folder, text_of):
    folder = new_folder()
    folder.evaluation(questions=2, accuracies=(0.5, 0.5, 0.5), depths=(0.1,))
    assert "2 questions" in text_of(folder.path)


def test_a_system_has_its_depths_and_the_one_it_was_trained_for(run):
    (evaluation,) = run.evaluations
    placed = group_curves(evaluation)
    assert list(placed) == ["base", "routed", "permuted routes", "last layers"]
    executions = [each.executions for each in placed["routed"]]
    assert executions == pytest.approx(sorted([9.6, 10.8, evaluation.routed.executions]))


def crowded(evaluation: Any, number: int) -> Any:
    """Return a result with so many baselines, all at one depth and of about equal accuracy."""
    last = evaluation.systems[-1]
    more = [replace(last, name=f"a baseline called {n}", accuracy=0.25) for n in range(number)]
    return replace(evaluation, systems=(*evaluation.systems[:3], *more), curve=())


def test_static_paths_are_one_curve_from_the_full_path(run, with_paths):
    evaluation = with_paths(run.evaluations[0], 3)
    placed = group_curves(evaluation)
    assert [each.name for each in placed["static paths"]] == ["skip3", "skip2", "skip1", "base"]
    assert "skip1" not in placed
    [axes] = draw_accuracy(evaluation, LIGHT, WIDE).axes
    assert [9.0, 10.0, 11.0, 12.0] in [list(line.get_xdata()) for line in axes.get_lines()]
    assert "static paths" in [each.get_text() for each in axes.texts]


def test_without_routers_every_static_path_has_its_interval(run, with_paths):
    evaluation = with_paths(run.evaluations[0], 3, routed=False)
    [axes] = draw_accuracy(evaluation, LIGHT, WIDE).axes
    ends = [tuple(part[:, 1]) for each in axes.collections for part in each.get_segments()]
    for system in evaluation.systems:
        assert tuple(100 * end for end in system.interval) in [pytest.approx(end) for end in ends]


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("number", [1, 3, 8])
@pytest.mark.parametrize("routed", [True, False])
def test_names_of_static_paths_overlap_no_other(run, with_paths, width, number, routed):
    boxes = boxes_of(with_paths(run.evaluations[0], number, routed=routed), width)
    assert "static paths" in boxes
    if width == WIDE and number == 3:
        assert {"skip2", "skip3"} <= boxes.keys()
    check_apart(boxes)


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("number", [1, 18])
def test_every_system_is_named_beside_its_point_and_no_names_overlap(run, width, number):
    evaluation = crowded(run.evaluations[0], number)
    boxes = boxes_of(evaluation, width)
    for system in evaluation.systems:
        assert f"{system.name}  {100 * system.accuracy:.1f} %" in boxes
    check_apart(boxes)


def boxes_of(evaluation: Any, width: float) -> dict[str, Any]:
    """Return where the texts of the large plot stand, by text."""
    kept: list[Any] = []

    def draw(colours: Any, width: float) -> Any:
        kept.append(draw_accuracy(evaluation, colours, width))
        return kept[0]

    draw_png(draw, width)
    FigureCanvasAgg(kept[0]).draw()
    [axes] = kept[0].axes
    assert axes.get_legend() is None
    return {each.get_text(): each.get_window_extent() for each in axes.texts}


def check_apart(boxes: dict[str, Any]) -> None:
    names = [*boxes]
    for one in names:
        assert boxes[one].x0 >= 0
        assert boxes[one].y0 >= 0
        for other in names[names.index(one) + 1 :]:
            assert not boxes[one].overlaps(boxes[other]), (one, other)


def test_drawn_points_are_the_numbers_and_base_and_routed_have_their_intervals(run):
    (evaluation,) = run.evaluations
    [axes] = draw_accuracy(evaluation, LIGHT, WIDE).axes
    lines = [line for line in axes.get_lines() if line.get_marker() == "o"]
    routed = group_curves(evaluation)["routed"]
    assert lines[0].get_xdata() == pytest.approx([each.executions for each in routed])
    assert lines[0].get_ydata() == pytest.approx([100 * each.accuracy for each in routed])
    ends = [tuple(part[:, 1]) for each in axes.collections for part in each.get_segments()]
    for placed in (*routed, evaluation.base):
        assert tuple(100 * end for end in placed.interval) in [pytest.approx(end) for end in ends]


def test_places_are_moved_as_little_as_needed():
    assert spread_apart([1.0, 5.0], 2.0) == [1.0, 5.0]
    assert spread_apart([5.0, 1.0, 1.0], 2.0) == pytest.approx([5.0, 0.0, 2.0], abs=1e-3)
    moved = spread_apart([3.0, 3.0, 3.1, 9.0], 1.0)
    assert sorted(moved)[-1] == 9.0
    assert all(b - a >= 1 - 1e-3 for a, b in zip(sorted(moved), sorted(moved)[1:], strict=False))


def test_all_depths_stand_in_numbers(new_folder, text_of, whole):
    folder = new_folder()
    folder.evaluation(**whole)
    text = text_of(folder.path)
    rows = table(text.split("## All depths in numbers")[1], "system | depth")
    assert [row[:2] for row in rows[1:3]] == [["base", "–"], ["**routed**", "**10 % saved**"]]
    assert len(rows) == 1 + 1 + 3 * 2


def test_the_test_of_limits_stands_by_itself_with_every_trial(new_folder, text_of, whole):
    folder = new_folder()
    drop_test = whole["drop_test"]
    findings = ["First.", "Something else.", drop_test.sentence()]
    folder.evaluation(drop_test=drop_test, changes={"findings": findings})
    text = text_of(folder.path)
    section = text.split("## Limits on the loss")[1].split("\n## ")[0]
    assert section.startswith(f"\n\n{drop_test.sentence()}\n")
    for trial in drop_test.trials:
        assert trial.name in section
    assert "Not tested after a failure: routed, 30 % saved." in section
    assert text.count(drop_test.sentence()) == 1


@pytest.fixture(scope="module")
def two(new_folder: Any, text_of: Any) -> str:
    folder = new_folder()
    folder.evaluation(accuracies=(0.7, 0.3, 0.3))
    folder.evaluation(task="guessed", questions=20, accuracies=(0.3, 0.4, 0.3))
    text: str = text_of(folder.path)
    return text


def test_each_task_has_its_verdict_in_front_and_its_sections_below(two):
    first, *_ = two.split("\n## ")
    assert re.findall(r"^\*\*(\w+): ", first, re.MULTILINE) == ["arc_easy", "guessed"]
    headings = [line for line in two.splitlines() if line.startswith("#")]
    assert headings[1] == "## Tasks compared"
    parts = [
        f"### {title}"
        for title in (
            "Accuracy over layers run",
            "Systems",
            "Routes by layer",
            "Questions won and lost",
            "What the systems are",
        )
    ]
    assert headings[2:14] == ["## arc_easy", *parts, "## guessed", *parts]


def test_the_tasks_stand_side_by_side_with_their_verdicts(two):
    _, _, first, _, second = table(two, "task | questions")
    assert first[:3] == ["arc_easy", "60", "routed"]
    assert first[6:8] == ["54.5", "worse"]
    assert second[:3] == ["guessed", "20", "routed"]
    assert second[6:8] == ["–", "no verdict"]
