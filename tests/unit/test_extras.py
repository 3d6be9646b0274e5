"""What is installed with drllm, and what only with an extra: as declared, and as used."""

import ast
import shlex
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from drllm.errors import ConfigError
from drllm.extras import EXTRAS, need

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = {path: ast.parse(path.read_text("utf-8")) for path in (REPOSITORY / "src").rglob("*.py")}
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
DECLARED = {
    extra: {canonicalize_name(each.name): each for each in map(Requirement, lines)}
    for extra, lines in {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}.items()
}
"""Extra, "" for the core → its requirements by their names."""


def distributions(modules: set[str]) -> set[str]:
    names = {"yaml": "pyyaml", "markdown_it": "markdown-it-py"}
    return {canonicalize_name(names.get(module, module)) for module in modules}


def imported() -> set[str]:
    """Return every package of others that any module imports, wherever it does."""
    found = set()
    for node in (node for tree in SOURCE.values() for node in ast.walk(tree)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found |= {name.partition(".")[0] for name in names}
    return found - sys.stdlib_module_names - {"drllm"}


def test_what_is_imported_is_declared_and_what_is_declared_is_used():
    extras = {extra: set(each) for extra, each in DECLARED.items() if extra not in ("", "all")}
    named = {extra: distributions(set(modules)) for extra, modules in EXTRAS.items()}
    core = set(DECLARED[""])
    used = distributions(imported()) | set().union(*named.values())
    assert used == core | set().union(*extras.values())
    assert core.isdisjoint(set().union(*extras.values()))
    assert all(named[extra] <= extras[extra] for extra in extras), "the code names other extras"


def test_all_brings_every_extra():
    assert DECLARED["all"]["drllm"].extras == set(DECLARED) - {"", "all"} == set(EXTRAS)


def test_the_oldest_versions_that_are_declared_are_those_tested():
    lines = (REPOSITORY / "tests/versions/oldest.txt").read_text("utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    lowest = {
        name: spec.version
        for requirements in DECLARED.values()
        for name, requirement in requirements.items()
        for spec in requirement.specifier
        if spec.operator == ">="
    }
    assert lowest == tested
    assert set(lowest) == set().union(*DECLARED.values()) - {"drllm"}


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_extra_is_answered_with_a_command_that_names_its_packages(extra, monkeypatch):
    for package in EXTRAS[extra]:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as refused:
        need(extra, "a thing")
    said, command = str(refused.value).split("run: ")
    assert said == f"a thing needs {', '.join(EXTRAS[extra])}, not installed here; "
    assert command.startswith("pip install ")
    packages = [Requirement(word) for word in shlex.split(command)[2:]]
    declared = DECLARED[extra].values()
    assert {(each.name, each.specifier) for each in packages} == {
        (each.name, each.specifier) for each in declared
    }


def test_a_folder_that_is_called_like_a_package_is_none(tmp_path, monkeypatch):
    (tmp_path / "gguf").mkdir()
    monkeypatch.setattr("drllm.extras.requires", lambda name: ["gguf>=0.1; extra == 'demo'"])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    with pytest.raises(ConfigError, match=r'needs gguf, .* run: pip install "gguf>=0.1"$'):
        need("demo", "a thing")
