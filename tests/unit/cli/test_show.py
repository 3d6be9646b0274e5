import json
import re
from pathlib import Path

import msgspec
import pytest
import yaml
from msgspec.structs import replace

from drllm.agreement import compare_by_layer, compute_metrics, judge_routers
from drllm.cli.show import show
from drllm.cli.show_results import (
    show_evaluation,
    show_findings,
)
from drllm.cli.terminal import Terminal, draw_route
from drllm.errors import RecordError
from drllm.records.codec import read_json
from drllm.records.layers import Layers
from drllm.records.results import Evaluation
from drllm.reporting.numbers import write_number
from drllm.statistics.verdicts import judge_means


def test_a_route_stands_under_its_layers_numbers():
    decisions = [1] * 25
    decisions[10], decisions[21] = 0, 2
    scale, route, legend = draw_route(decisions).plain.splitlines()
    assert scale.index("10") == route.index("·")
    assert scale.index("20") + 1 == route.index("2")
    assert route.strip() == "█" * 10 + "·" + "█" * 10 + "2" + "█" * 3
    assert legend.split("  ") == ["", "", "", " █ execute", "· skip", "2 repeat"]


def test_a_deep_models_route_is_broken_into_rows():
    lines = draw_route([1] * 60 + [0, 2]).plain.splitlines()
    assert lines[2] == "layer  60"
    assert lines[3] == "       ·2"


HEADER = """
schema: drllm.evaluation
schema_version: 2
drllm_version: "0"
created: ""
model: {}
config: {}
inputs: {}
libraries: {}
routers: routers
routers_sha256: ""
"""
HIGHER = "accuracy: {quantity: accuracy, mean: 0.25, interval: [0.05, 0.45], n: 40, shown: higher"
OPEN = "gold_logprob: {quantity: gold_logprob, mean: -0.125, interval: [-0.3, 0.1], n: 40"
POINT = "accuracy: 0.75, interval: [0.6, 0.9], gold_logprob: -1.375, text_loss: null"
EVALUATION = msgspec.convert(
    yaml.safe_load(
        f"""
{HEADER}
runtime: {{}}
kind: choices
metric: acc
num_fewshot: 0
task: facts
split: test
num_questions: 40
num_layers: 30
chance: 0.25
systems:
  - {{name: base, description: "", accuracy: 0.5, interval: [0.3521, 0.6479], executions: 30.0,
      gold_logprob: -1.25, text_loss: 3.75, seconds: 12.34}}
  - {{name: random decisions, description: "", accuracy: 0.25, interval: [0.1, 0.4],
      executions: 27.55, gold_logprob: null, seconds: 3.0, draws: 5,
      against_base: {{{HIGHER}, won: 1, lost: 9, p: 0.0001}}}},
      routed_against: &worse {{{HIGHER}}}, {OPEN}, shown: none shown}}}}}}
findings: [Accuracy +2.5 points., It is worse.]
curve:
  - {{system: base, setting: "", executions: 30.0, against_base: null,
      routed_against: null, {POINT}}}
  - {{system: routed, setting: 10 % saved, executions: 27.0, against_base: *worse,
      routed_against: null, {POINT}}}
  - {{system: sequence router, setting: 10 % saved, executions: 26.5, against_base: null,
      routed_against: null, {POINT}}}
  - {{system: routed, setting: 20 % saved, executions: 24.0, against_base: *worse,
      routed_against: null, {POINT}}}
"""
    ),
    Evaluation,
)


def shown(capsys: pytest.CaptureFixture[str], evaluation: Evaluation, width: int) -> str:
    terminal = Terminal()
    terminal.out.width = width
    show_evaluation(evaluation, terminal)
    show_findings(evaluation, terminal)
    return capsys.readouterr().out.replace("\u00a0", " ")


def test_the_table_has_every_number_and_the_findings_follow(capsys: pytest.CaptureFixture[str]):
    out = " ".join(shown(capsys, EVALUATION, 80).split())
    caption = "losses beyond the interval are excluded"
    assert out.startswith(f"facts, test: 40 questions {caption}")
    assert "base 30.00 50.0 – 3.750 –" in out
    assert "random decisions ×5 27.55 25.0 " in out
    assert out.endswith("It is worse.")


def test_a_table_of_grades_does_not_say_that_losses_beyond_an_interval_are_excluded(capsys):
    """If no grade differs, the interval has no width, and yet a loss isn't excluded."""
    even = judge_means("accuracy", [0.5] * 38, [0.5] * 38, seed=0)
    assert even.interval == (0, 0)
    assert even.excluded_loss > 0.05
    base, drawn = EVALUATION.systems
    against_base = replace(drawn.against_base, accuracy=even)
    path = replace(drawn, name="skip1", draws=1, against_base=against_base)
    steps = {"skip1": (0,)}
    out = shown(capsys, replace(EVALUATION, systems=(base, path), paths=steps), 100)
    assert "losses beyond the interval are excluded" not in out
    assert "the loss that is excluded may be larger" in out


def test_other_depths_stand_below_each_with_its_differences(capsys: pytest.CaptureFixture[str]):
    out = shown(capsys, EVALUATION, 80)
    rows = [" ".join(line.split()) for line in out.split("at other depths")[1].splitlines()]
    assert "10 % saved routed 27.00 75.0 +25.0 (+5.0 to +45.0) –" in rows
    assert "sequence router 26.50 75.0 – –" in rows
    assert "20 % saved routed 24.00 75.0 +25.0 (+5.0 to +45.0) –" in rows
    alone = replace(EVALUATION, curve=())
    assert "at other depths" not in shown(capsys, alone, 80)


def test_80_columns_hold_a_system_a_line(capsys: pytest.CaptureFixture[str]):
    out = shown(capsys, replace(EVALUATION, findings=()), 80)
    assert max(map(len, out.splitlines())) <= 80
    assert sum("random decisions" in line for line in out.splitlines()) == 1
    assert sum("sequence router" in line for line in out.splitlines()) == 1


def test_a_narrow_terminal_loses_no_digit(capsys: pytest.CaptureFixture[str]):
    told = replace(EVALUATION, findings=())
    narrow, wide = shown(capsys, told, 60), shown(capsys, told, 200)
    assert max(map(len, narrow.splitlines())) <= 60
    assert "…" not in narrow
    numbers = [set(re.findall(r"[\d.]+", out)) for out in (narrow, wide)]
    assert numbers[0] == numbers[1]


PARTS = {
    "train": [[[4, 6, 0], [1, 28, 0], [0, 1, 0]], [[0, 0, 0], [0, 40, 0], [0, 0, 0]]],
    "validation": [[[2, 1, 0], [0, 7, 0], [0, 0, 0]], [[0, 1, 0], [1, 8, 0], [0, 0, 0]]],
}


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    told = {
        part: {
            "examples": sum(map(sum, confusion[0])),
            "executions": sum(row[1] for layer in confusion for row in layer),
            "loss": 0.25,
            "confusion": confusion,
        }
        for part, confusion in PARTS.items()
    }
    file = tmp_path / "layers.json"
    file.write_text(json.dumps({"schema": "drllm.layers", "schema_version": 1, "epoch": 3} | told))
    return file


def test_every_metric_of_routers_and_baselines_is_printed_on_both_parts(layers, capsys):
    show(layers, Terminal())
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    for systems in read_json(layers, Layers).parts.values():
        scores = [compute_metrics(counts) for counts in systems.values()]
        for name in scores[0]:
            assert [name, *(write_number(each[name], 3) for each in scores)] in rows
    assert "after epoch 3, on 40 targets trained on" in out
    assert "after epoch 3, on 10 held-out targets" in out
    assert max(map(len, out.split("The routers hit")[0].splitlines())) <= 80


def test_the_verdict_stands_below_the_tables(layers: Path, capsys: pytest.CaptureFixture[str]):
    terminal = Terminal()
    terminal.out.width = 400
    show(layers, terminal)
    agreement = read_json(layers, Layers)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        compare_by_layer(agreement.parts["validation"]),
        judge_routers(agreement.parts),
    ]


def test_a_folder_of_routers_shows_its_layers_too(layers: Path, capsys: pytest.CaptureFixture[str]):
    config = {"num_layers": 2, "hidden_size": 8, "num_windows": 4, "router_width": 5}
    (layers.parent / "router_config.json").write_text(json.dumps(config))
    show(layers.parent, Terminal())
    assert "on 10 held-out targets" in capsys.readouterr().out
    layers.unlink()
    show(layers.parent, Terminal())
    assert "held-out" not in capsys.readouterr().out


def test_of_metrics_the_last_epoch_is_printed_for_both_parts(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    lines = []
    for epoch in (1, 2):
        for split in ("train", "validation"):
            row = {"epoch": epoch, "split": split, "learning_rate": 1e-3, "macro_f1": epoch / 4}
            lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines))
    show(file, Terminal())
    out = capsys.readouterr().out
    assert "epoch 2" in out
    assert ["macro_f1", "0.500", "0.500"] in [line.split() for line in out.splitlines()]
    assert "learning_rate" not in out


@pytest.mark.parametrize(
    "line",
    [
        '{"epoch": 1}',
        '{"epoch": "first", "split": "train"}',
        '{"epoch": 1, "split": "a|b"}',
        '{"epoch": 1, "split": "train", "macro_f1": [1]}',
        '{"systems": null}',
        '{"systems": [1]}',
    ],
)
def test_a_line_that_only_looks_like_a_record_is_refused_in_one_line(tmp_path, line):
    file = tmp_path / "mine.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(RecordError, match=r"mine\.jsonl, line 1"):
        show(file, Terminal())
