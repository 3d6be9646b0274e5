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
    from drllm.models.routers.stack import RouterConfig, RouterStack

    identity = smollm2.identity
    RouterStack(
        RouterConfig(
            num_layers=identity["num_layers"],
            hidden_size=identity["hidden_size"],
            base_model=identity["id"],
            base_class=identity["class"],
            base_fingerprint=identity["fingerprint"],
        )
    ).save(tmp_path / "routers")
    [code] = blocks("python")
    where = "runs/demo/routers"
    assert where in code
    exec(code.replace(where, str(tmp_path / "routers")), {})
    assert "Which gas do plants take in?" in capsys.readouterr().out


def test_every_file_of_the_annotated_tree_exists():
    [tree] = [block for block in blocks("") if block.startswith("src/drllm/")]
    folders = [REPOSITORY]
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        depth = len(indent) // 2
        folders = folders[: depth + 1]
        place = folders[-1] / name.rstrip(",")
        assert place.exists(), f"the README's tree names {name}, which isn't there"
        folders.append(place)


def test_every_module_for_a_first_reading_exists():
    [line] = [line for line in README.splitlines() if line.startswith("For a first reading")]
    names = re.findall(r"`([a-z_/]+)`", line)
    assert len(names) > 5
    for name in names:
        place = REPOSITORY / "src" / "drllm" / name
        assert place.is_dir() or place.with_suffix(".py").is_file(), name


def test_every_module_of_the_package_stands_in_the_tree():
    [tree] = [block for block in blocks("") if block.startswith("src/drllm/")]
    for module in (REPOSITORY / "src" / "drllm").rglob("*.py"):
        stem = module.stem if module.stem not in ("__init__", "__main__") else module.parent.name
        folder = module.parent.name
        named = stem in tree or f"{folder}/ " in tree or module.parent.name == "drllm"
        assert named or stem.startswith("fact_tables"), f"{module.name} is not in the README"


def test_the_readme_shows_real_output():
    assert "@@" not in README
