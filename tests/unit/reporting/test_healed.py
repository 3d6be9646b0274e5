"""What is said and drawn of a healed path, in a report and on the terminal."""

import shlex
from typing import Any

import pytest

from drllm.cli.parser import parse
from drllm.errors import RecordError
from drllm.paths import StaticPath
from drllm.records.codec import sha256, write_json
from drllm.records.healed import ADAPTER_FILE, HealedPath, HealPoint, Losses
from drllm.records.manifest import new_manifest
from drllm.records.static_paths import steps_to_write
from drllm.reporting.drawing import LIGHT, NARROW
from drllm.reporting.figures import draw_kl
from drllm.reporting.next_steps import suggest_steps
from drllm.reporting.run import read_run
from drllm.reporting.stage import report
from paths_json import written_paths

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


def test_a_healed_folder_alone_makes_a_report_that_says_first_what_healing_did(healed, text_of):
    text = text_of(healed.path).replace("\u00a0", " ")
    assert text.startswith("# Healed path of smollm2-135m on arc_easy, books\n")
    assert "runs 3 of 4 executions; its KL from the full path on held-out texts" in text
    assert "was 0.600 nats a token before and is 0.310 after" in text.split("## ")[0]
    assert "100 steps (80 000 tokens" in text
    assert "Routers" not in text
    [(_, line)] = suggest_steps(read_run(healed.path))
    assert parse(shlex.split(line)[1:]).values["path"] == str(healed.path / "path.json")


def test_a_row_has_a_sources_losses_and_which_share_of_what_was_lost_is_won_back(healed, text_of):
    text = text_of(healed.path).replace("\u00a0", " ")
    assert "| arc_easy | 16 | 2.000 | 3.000 | 2.200 | 80 % |" in text


def test_where_the_path_loses_nothing_no_share_of_it_is_said(healed, text_of, drllm):
    assert "| books | – | 2.500 | 2.500 | 2.400 | – |" in text_of(healed.path)
    shown = drllm("show", healed.path).out
    assert "80" in next(line for line in shown.splitlines() if "arc_easy" in line)


def test_the_curves_are_drawn_over_thousands_of_tokens(healed):
    [axes] = draw_kl(read_run(healed.path).healed.curve, LIGHT, NARROW).axes
    training, held_out = axes.get_lines()
    assert list(held_out.get_xdata()) == [0, 40, 80]
    assert list(held_out.get_ydata()) == [0.6, 0.31, 0.35]
    assert list(training.get_ydata())[1:] == [0.4, 0.3]  # the first is not a number


def test_a_run_folder_shows_the_healed_path_in_it_beside_its_other_parts(healed, text_of):
    run = healed.path.parent / "whole"
    run.mkdir()
    healed.path.rename(run / "healed")
    written_paths(run / "paths.json", healed.model, paths={"full": [0, 1, 2, 3], "a": [0, 1, 3]})
    text = text_of(run)
    assert text.startswith("# Static paths of smollm2-135m")
    assert "use path a where a loss of 2.0 points is acceptable" in text.split("## ")[0]
    assert "runs 3 of 4 executions" in text.split("## ")[0]
    assert "## Static paths" in text
    assert "## Healed path" in text


def test_a_path_json_of_somebody_elses_is_no_healed_path(folder):
    folder.text("path.json", '{"path": [0, 1, 3]}')
    with pytest.raises(RecordError, match="holds no"):
        read_run(folder.path)


def test_the_page_of_a_healed_path_is_written_with_its_curve(healed):
    page, _ = report(healed.path)
    assert "Healed path" in page.read_text(encoding="utf-8")
    assert [each.name for each in (page.parent / "report_figures").iterdir()] == ["01-healing.png"]
