"""What the README says is so: its Python runs, its tree exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of one language, in order."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for marked, text in fenced if marked == language]


def test_the_python_of_the_readme_runs(smollm2, tmp_path: Path, capsys: pytest.CaptureFixture):
    from drllm.models.routers.checkpoint import described, save_routers
    from drllm.models.routers.stack import RouterConfig, RouterStack

    config = RouterConfig(num_layers=smollm2.num_layers, hidden_size=smollm2.hidden_size)
    save_routers(RouterStack(described(config, smollm2.model)), tmp_path / "routers")
    [code] = blocks("python")
    where = "runs/demo/routers"
    assert where in code
    exec(code.replace(where, str(tmp_path / "routers")), {})
    assert "Which gas do plants take in?" in capsys.readouterr().out


def test_every_module_for_a_first_reading_exists():
    [line] = [line for line in README.splitlines() if line.startswith("For a first reading")]
    names = re.findall(r"`([a-z_/]+)`", line)
    assert len(names) > 5
    for name in names:
        place = REPOSITORY / "src" / "drllm" / name
        assert place.is_dir() or place.with_suffix(".py").is_file(), name
