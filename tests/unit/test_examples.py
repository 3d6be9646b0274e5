"""Every script in examples/ runs, on a tiny model, without network."""

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.fixture
def run(
    model_folder,
    monkeypatch,
    capsys,
    tmp_path,
):
    monkeypatch.chdir(tmp_path)

    def run(script: Path, *arguments: str) -> str:
        """Run a script as from the command line, and return what it printed."""
        monkeypatch.setattr(
            sys, "argv", [str(script), "--model", str(model_folder(num_layers=6)), *arguments]
        )
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_says_how_to_run_it(script):
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


def test_the_first_hour_goes_from_attach_to_report_with_drllm_alone(run):
    script = EXAMPLES / "first_hour.py"
    imported = re.findall(r"^(?:import|from) (\w+)", script.read_text(encoding="utf-8"), re.M)
    assert set(imported) == {"__future__", "argparse", "pathlib", "drllm"}
    said = [line.split(":")[0] for line in run(script).splitlines() if ": " in line]
    order = ["base", "skips a layer", "its route", "search", "targets", "routers", "base", "routed"]
    assert [name for name in said if name in {*order, "report"}] == [*order, "report"]
    assert Path("runs/first_hour/report.html").is_file()


def read_cells() -> list[tuple[str, str]]:
    """Return the code of each cell of the notebook, and the text that it shows."""
    notebook = json.loads((EXAMPLES / "first_hour.ipynb").read_text(encoding="utf-8"))
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            texts = [
                "".join(output["text"])
                for output in cell["outputs"]
                if output["output_type"] == "stream"
            ]
            cells.append(("".join(cell["source"]), "".join(texts)))
    return cells


def list_beginnings(text: str) -> list[str]:
    """Return the first two words of each line."""
    return [" ".join(line.split()[:2]) for line in text.splitlines()]


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*Agg, which is non-GUI.*:UserWarning")
def test_the_notebook_runs_and_prints_what_it_shows(smollm2, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "notebook"}
    for code, shown in read_cells():
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, "first_hour.ipynb", "exec"), namespace)
        # Last digits differ between machines, and so may verdicts and the ends of answers.
        assert list_beginnings(output.getvalue()) == list_beginnings(shown)
