from __future__ import annotations

import dataclasses

import pytest

from drllm.cli.show import draw_route, show_evaluation
from drllm.cli.terminal import Terminal
from drllm.reporting.results import Evaluation, System


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


EVALUATION = Evaluation(
    task="facts",
    split="test",
    num_questions=40,
    num_layers=30,
    chance=0.25,
    systems=(
        System(
            name="base",
            description="",
            accuracy=0.5,
            interval=(0.3521, 0.6479),
            executions=30.0,
            gold_logprob=-1.25,
            seconds=12.34,
            draws=1,
            mcnemar_p=None,
            won=None,
            lost=None,
        ),
        System(
            name="random decisions",
            description="",
            accuracy=0.25,
            interval=(0.1, 0.4),
            executions=27.55,
            gold_logprob=None,
            seconds=None,
            draws=5,
            mcnemar_p=0.0001,
            won=1,
            lost=9,
        ),
    ),
    findings=("It is worse.",),
    samples=(),
)


def test_the_table_has_every_number_and_the_findings_follow(capsys: pytest.CaptureFixture[str]):
    show_evaluation(EVALUATION, Terminal())

    out = " ".join(capsys.readouterr().out.replace("\u00a0", " ").split())
    assert "facts, test: 40 questions, 30 layers" in out
    assert "base 50.0 % 35.2 to 64.8 30.00 −1.250 – 12.3" in out
    assert "random decisions (5 draws) 25.0 % 10.0 to 40.0 27.55 – < 0.001 –" in out
    assert out.endswith("It is worse.")


def test_a_narrow_terminal_loses_no_digit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    terminal = Terminal()
    terminal.out.width = 60
    show_evaluation(dataclasses.replace(EVALUATION, findings=()), terminal)

    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60
    assert "…" not in out
    for number in ("50.0", "35.2", "64.8", "30.00", "−1.250", "12.3", "27.55", "0.001"):
        assert number in out
