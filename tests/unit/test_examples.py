"""Every script in examples/ runs, on a tiny model, without network."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.fixture
def run(
    model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    def run(script: Path, *arguments: str) -> str:
        """Run a script as from the command line, and return what it printed."""
        monkeypatch.setattr(
            sys, "argv", [str(script), "--model", str(model_folder(num_layers=6)), *arguments]
        )
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_there_are_examples():
    assert SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_runs_on_any_model_and_prints_what_it_did(script: Path, run):
    assert run(script).strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_says_how_to_run_it(script: Path):
    assert f"python examples/{script.name}" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("threshold", "said"),
    [
        ("-2", "SettledPolicy: 3 layers, skipped [1, 3, 5]"),  # as often as it may
        ("2", "SettledPolicy: 6 layers, skipped []"),
    ],
)
def test_the_own_policy_skips_above_its_threshold_and_never_two_in_a_row(run, threshold, said):
    printed = run(EXAMPLES / "own_policy.py", "--threshold", threshold, "one prompt", "another")
    assert printed.count(said) == 2
    assert printed.count("FullPolicy: 6 layers, skipped []") == 2
