"""What a report says of a test: tiles, plot, and tables. The rest is in `golden/report.md`."""

import itertools
import re
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from msgspec.structs import replace

from drllm.records.markdown import escape
from drllm.reporting.accuracy_figure import draw_accuracy, group_curves
from drllm.reporting.drawing import LIGHT, NARROW, WIDE, draw_png, spread_apart
from drllm.reporting.key_figures import build_tiles, describe_times, find_most_accurate
from drllm.reporting.run import read_run
from drllm.reporting.tables import comparisons_table
from drllm.statistics.differences import Differences
from drllm.statistics.paired import paired_interval
from drllm.statistics.power import round_up
from drllm.statistics.verdicts import judge_counts, judge_means
from run_folder import WHOLE, add_paths, report_text, table_rows


def replace_systems(folder: Any, **fields: dict[str, Any]) -> None:
    """Give systems other values, by name."""

    def apply(values: dict[str, Any]) -> None:
        for row in values["systems"]:
            row.update(fields.get(row["name"].replace(" ", "_"), {}))

    folder.change("eval/arc_easy.json", apply)


@pytest.fixture
def folder(folder: Any) -> Any:
    folder.evaluation(accuracies=(0.7, 0.5, 0.8))
    return folder


@pytest.fixture(scope="session")
def evaluation(run: Any) -> Any:
    [evaluation] = run.evaluations
    return evaluation


def test_the_headline_stands_first_and_findings_only_in_their_section(folder, drllm):
    folder.static_paths()
    [evaluation] = read_run(folder.path).evaluations
    first, rest = report_text(folder.path).split("\n## ", 1)
    assert f"\n> {escape(evaluation.write_headline())}\n" in first
    assert "A static path runs the same layers for every question." in first
    assert "Findings follow." not in first
    assert rest.count("Findings follow.") == 1
    shown = drllm("show", folder.path / "eval").out
    assert shown.index(evaluation.write_headline()[:40]) < shown.index("skip1")
    assert shown.index("skip1") < shown.index("Findings follow.")
    for older_headline in evaluation.findings[:2]:  # the folder is as an earlier version wrote it
        assert older_headline not in first + rest + shown


def test_a_headline_in_the_file_is_shown_as_it_is(folder, drllm):
    folder.change("eval/arc_easy.json", lambda values: values.update(headline="Do this."))
    assert "\n> Do this.\n" in report_text(folder.path)
    assert "Accuracy is as high; layers are saved." in drllm("show", folder.path / "eval").out


def test_tiles_hold_the_verdicts_of_the_path_and_of_routing_and_what_was_measured(evaluation, run):
    _, accuracy, loss, time = build_tiles(evaluation, run.latency)
    assert accuracy.label.startswith(evaluation.routed.against_base.accuracy.label)
    assert loss.label == evaluation.routed.against_base.text_loss.label == "worse"
    assert time.value == "too noisy to tell"
    assert len(build_tiles(evaluation, None)) == 3
    best = add_paths(evaluation, 3).best_path.name
    titles = [tile.title for tile in build_tiles(add_paths(evaluation, 3), None)]
    assert [title.split(":")[0] for title in titles[:6]] == [f"Path {best}"] * 3 + ["Routed"] * 3
    places = [f"{phase} {size} (0.90)" for phase in ("reading", "decoding") for size in (1, 4, 16)]
    assert describe_times(run.latency) == (
        "Measured time, routed / base by rows of a batch, 3 rounds of 16 tokens: too noisy "
        f"to tell: {', '.join(places)}."
    )


def test_the_table_below_the_headline_has_the_path_and_routing_and_their_difference(evaluation):
    *systems, path = add_paths(evaluation, 1).systems
    against_base = Differences(accuracy=judge_counts(9, 3, 60))
    routed_against = Differences(accuracy=judge_counts(2, 30, 60))
    path = replace(path, against_base=against_base, routed_against=routed_against)
    changed = replace(add_paths(evaluation, 1), systems=(*systems, path))
    _, *rows = table_rows(f"\n{comparisons_table(changed)}", "difference | ")
    assert [row[0] for row in rows] == [
        "path skip1 minus base",
        "routed minus base",
        "routed minus path skip1",
    ]
    pairs = (against_base, evaluation.routed.against_base, routed_against)
    for row, differences in zip(rows, pairs, strict=True):
        accuracy = differences.accuracy
        assert row[1].startswith(accuracy.write(accuracy.mean))
        assert row[2] == accuracy.write_excluded()
        assert row[3].startswith(accuracy.label)
    assert f"about {round_up(against_base.accuracy.needed)} would do" in rows[0][3]


def test_the_most_accurate_system_that_saves_layers_has_a_tile_of_its_own(evaluation, run):
    assert find_most_accurate(evaluation).name == "routed"
    with_paths = add_paths(evaluation, 3)
    best = find_most_accurate(with_paths)
    assert best.name == "skip1"
    assert best.accuracy == max(s.accuracy for s in with_paths.systems[1:] if s.draws == 1)
    assert best is with_paths.best_path  # has tiles of its own
    *others, last = with_paths.systems
    baseline = replace(last, name="a baseline", accuracy=0.99, interval=(0.9, 1.0))
    changed = replace(with_paths, systems=(*others, last, baseline))
    titles = [tile.title for tile in build_tiles(changed, run.latency)]
    assert "Most accurate that saves layers: a baseline" in titles


SAME = judge_counts(9, 9, 60)
ANSWERS_WORSE = judge_counts(0, 30, 60)
TEXT_SAME = judge_means("text_loss", [1.0, 2.0] * 30, [2.0, 1.0] * 30, 0)
TEXT_WORSE = judge_means("text_loss", [3.0, 2.0] * 30, [2.0, 1.0] * 30, 0)


@pytest.mark.parametrize(
    ("cheap", "accurate", "best"),
    [
        ((SAME, TEXT_SAME), (SAME, TEXT_SAME), "skip1"),
        ((SAME, TEXT_SAME), (SAME, TEXT_WORSE), "skip2"),
        ((SAME, TEXT_SAME), (ANSWERS_WORSE, TEXT_SAME), "skip2"),
        ((ANSWERS_WORSE, TEXT_SAME), (SAME, TEXT_WORSE), "skip1"),
        ((SAME, TEXT_WORSE), (SAME, TEXT_WORSE), "skip1"),
        ((SAME, None), (SAME, None), "skip1"),
    ],
)
def test_the_best_path_is_not_shown_to_answer_or_write_worse(evaluation, cheap, accurate, best):
    result = add_paths(evaluation, 2, routed=False)
    systems = [result.base]
    for path, (accuracy, text_loss) in zip(result.systems[1:], (cheap, accurate), strict=True):
        differences = Differences(accuracy=accuracy, text_loss=text_loss)
        systems.append(replace(path, against_base=differences))
    assert replace(result, systems=tuple(systems)).best_path.name == best


def test_the_headline_of_a_path_that_was_picked_among_several_excludes_a_larger_loss(evaluation):
    verdict = judge_counts(20, 22, 1200)

    def write(number):
        result = replace(add_paths(evaluation, number, routed=False), drop_test=None)
        differences = Differences(accuracy=verdict)
        paths = [replace(path, against_base=differences) for path in result.systems[1:]]
        return replace(result, systems=(result.base, *paths)).write_headline()

    low, _ = paired_interval(20, 22, 1200, 1 - 0.05 / 3)
    assert f"a loss of up to {verdict.write_excluded()}" in write(1)
    assert f"a loss of up to {-100 * low:.1f} points" in write(3)


@pytest.mark.parametrize(("factor", "note"), [(1.1, "10.0 % more"), (0.9, "10.0 % fewer")])
def test_routes_that_run_more_layers_save_none(evaluation, factor, note):
    routed = replace(evaluation.routed, executions=evaluation.num_layers * factor)
    systems = (evaluation.base, routed, *evaluation.systems[2:])
    tile = build_tiles(replace(evaluation, systems=systems), None)[0]
    assert (tile.title, tile.note.replace("\u00a0", " ")) == ("Routed: layers run", note)


def test_systems_are_sorted_and_each_is_compared_with_the_routed_model(folder):
    header, *rows = table_rows(report_text(folder.path), "system | layers run | accuracy")
    assert header[4:7] == ["routed minus system, points", "loss excluded above", "verdict"]
    names = [row[0] for row in rows]
    assert names == ["permuted routes ×10", "base", "**routed**", "last layers"]
    assert rows[1][4].startswith("−20.0 (")
    assert rows[2][4:] == ["**–**"] * 5
    assert rows[3][5:7] == ["0.0", "better"]


def test_a_run_without_baselines_compares_routed_and_base(folder):
    folder.change("eval/arc_easy.json", lambda v: v.update(systems=v["systems"][:2]))
    rows = table_rows(report_text(folder.path), "system | layers run")[1:]
    assert [row[0] for row in rows] == ["base", "**routed**"]


def test_what_is_not_known_of_costs_is_a_dash_and_what_is_not_measured_is_said(folder):
    replace_systems(folder, base={"prompt_flops": None, "kv_bytes_per_token": None})
    text = report_text(folder.path)
    assert table_rows(text, "system | layers run, reading | saved")[1][3:6] == ["–", "–", "–"]
    assert "No time was measured; drllm evaluate --latency times a routed model." in text


def test_generated_answers_have_decoding_and_no_log_probability(folder):
    kind = {"kind": "generated", "metric": "exact_match", "chance": 0.0}
    folder.change("eval/arc_easy.json", lambda values: values.update(kind))
    names = ("base", "routed", "permuted_routes", "last_layers")
    decoded = {name: {"gold_logprob": None, "decode_executions": n} for n, name in enumerate(names)}
    replace_systems(folder, **decoded)
    text = report_text(folder.path)
    assert "answers generated" in text
    assert "gold log-probability" not in text
    rows = table_rows(text, "system | layers run, reading | layers run, decoding")
    assert rows[2][2] == "**1.00**"


def test_grades_are_named_by_their_metric(folder):
    def grade(values):
        values["metric"] = "f1"
        values["systems"][1]["against_base"]["accuracy"].update(won=None, lost=None, p=None)

    folder.change("eval/arc_easy.json", grade)
    assert table_rows(report_text(folder.path), "system | layers run")[0][2] == "f1, %"


def test_a_handful_of_questions_makes_a_report(new_folder):
    folder = new_folder()
    folder.evaluation(questions=2, accuracies=(0.5, 0.5, 0.5), depths=(0.1,))
    assert "2 questions" in report_text(folder.path)


def test_the_sentence_on_limits_stands_in_its_section_alone(new_folder):
    folder = new_folder()
    drop_test = WHOLE["drop_test"]
    findings = ["First.", "Something else.", drop_test.sentence()]
    folder.evaluation(drop_test=drop_test)
    folder.change("eval/arc_easy.json", lambda values: values.update(findings=findings))
    before, section = report_text(folder.path).split("## Limits on the loss")
    assert "- Something else.\n" in section
    sentence = drop_test.sentence().replace("\u00a0", " ")
    assert section.startswith(f"\n\n{sentence}\n")
    assert sentence not in before + section.replace(sentence, "", 1)


def test_each_task_has_its_verdict_in_front_and_its_sections_below_a_comparison(new_folder):
    folder = new_folder()
    folder.evaluation(accuracies=(0.7, 0.3, 0.3))
    folder.evaluation(task="guessed", questions=20, accuracies=(0.3, 0.4, 0.3))
    text = report_text(folder.path)
    assert re.findall(r"^> \*\*(\w+):\*\* ", text.split("\n## ")[0], re.MULTILINE) == [
        "arc_easy",
        "guessed",
    ]
    _, _, first, _, second = table_rows(text, "task | questions")
    assert (first[:3], first[6:8]) == (["arc_easy", "60", "routed"], ["54.5", "worse"])
    assert (second[:3], second[6:8]) == (["guessed", "20", "routed"], ["–", "no verdict"])
    titles = (
        "Accuracy over layers run|Systems|Routes by layer|Questions won and lost|"
        "Findings in sentences|What the systems are"
    )
    parts = [f"### {title}" for title in titles.split("|")]
    headings = re.findall(r"^##+ .*", text, re.MULTILINE)
    next_steps = "## What to do next"
    expected = [next_steps, "## Tasks compared", "## arc_easy", *parts, "## guessed", *parts]
    assert headings[: len(expected)] == expected


def drawn_intervals(axes: Any) -> list[Any]:
    """Return the ends of the vertical strokes of a drawing, for a comparison by `in`."""
    segments = [part for lines in axes.collections for part in lines.get_segments()]
    return [pytest.approx(tuple(part[:, 1])) for part in segments]


def in_percent(system: Any) -> tuple[float, ...]:
    return tuple(100 * end for end in system.interval)


def test_drawn_points_are_the_numbers_and_base_and_routed_have_their_intervals(evaluation):
    [axes] = draw_accuracy(evaluation, LIGHT, WIDE).axes
    curves = group_curves(evaluation)
    assert list(curves) == ["base", "routed", "permuted routes", "last layers"]
    executions = [point.executions for point in curves["routed"]]
    assert executions == pytest.approx(sorted([9.6, 10.8, evaluation.routed.executions]))
    line = next(line for line in axes.get_lines() if line.get_marker() == "o")
    assert line.get_xdata() == pytest.approx(executions)
    assert line.get_ydata() == pytest.approx([100 * point.accuracy for point in curves["routed"]])
    for system in (*curves["routed"], evaluation.base):
        assert in_percent(system) in drawn_intervals(axes)


def test_static_paths_are_one_curve_from_the_full_path(evaluation):
    with_paths = add_paths(evaluation, 3)
    curves = group_curves(with_paths)
    assert [path.name for path in curves["static paths"]] == ["skip3", "skip2", "skip1", "base"]
    assert "skip1" not in curves
    [axes] = draw_accuracy(with_paths, LIGHT, WIDE).axes
    assert [9.0, 10.0, 11.0, 12.0] in [list(line.get_xdata()) for line in axes.get_lines()]
    assert "static paths" in [text.get_text() for text in axes.texts]


def test_without_routers_every_static_path_has_its_interval(evaluation):
    with_paths = add_paths(evaluation, 3, routed=False)
    [axes] = draw_accuracy(with_paths, LIGHT, WIDE).axes
    for system in with_paths.systems:
        assert in_percent(system) in drawn_intervals(axes)


def text_boxes(evaluation: Any, width: float) -> dict[str, Any]:
    """Draw the large plot, and return where its texts stand, by text, after a look for overlaps."""
    figures: list[Any] = []

    def draw(colours: Any, width: float) -> Any:
        figures.append(draw_accuracy(evaluation, colours, width))
        return figures[0]

    draw_png(draw, width)
    FigureCanvasAgg(figures[0]).draw()
    [axes] = figures[0].axes
    assert axes.get_legend() is None
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert min(min(box.x0, box.y0) for box in boxes.values()) >= 0
    for pair in itertools.combinations(boxes, 2):
        assert not boxes[pair[0]].overlaps(boxes[pair[1]]), pair
    return boxes


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("number", [1, 18])
def test_every_system_is_named_beside_its_point_and_no_names_overlap(evaluation, width, number):
    last = replace(evaluation.systems[-1], accuracy=0.25)
    crowd = [replace(last, name=f"a baseline called {n}") for n in range(number)]
    systems = (*evaluation.systems[:3], *crowd)
    boxes = text_boxes(replace(evaluation, systems=systems, curve=()), width)
    for system in systems:
        assert f"{system.name}  {100 * system.accuracy:.1f} %" in boxes


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("number", [1, 3, 8])
@pytest.mark.parametrize("routed", [True, False])
def test_names_of_static_paths_overlap_no_other(evaluation, width, number, routed):
    boxes = text_boxes(add_paths(evaluation, number, routed=routed), width)
    assert "static paths" in boxes
    if width == WIDE and number == 3:
        assert {"skip2", "skip3"} <= boxes.keys()


def test_places_are_moved_as_little_as_needed():
    assert spread_apart([1.0, 5.0], 2.0) == [1.0, 5.0]
    assert spread_apart([5.0, 1.0, 1.0], 2.0) == pytest.approx([5.0, 0.0, 2.0], abs=1e-3)
    moved = sorted(spread_apart([3.0, 3.0, 3.1, 9.0], 1.0))
    assert moved[-1] == 9.0
    assert all(b - a >= 1 - 1e-3 for a, b in itertools.pairwise(moved))
