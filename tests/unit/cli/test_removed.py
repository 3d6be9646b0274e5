"""What was removed is answered in one line that says what took its place."""

from pathlib import Path

import pytest
import yaml

from drllm.cli.removed import REMOVED_VERBS
from drllm.cli.settings_file import read_settings
from drllm.cli.verbs import VERBS, find_verb, list_flags
from drllm.config.removed import REMOVED_FLAGS
from drllm.errors import ConfigError
from drllm.pipeline.recipes import Recipe, read_recipe


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", REMOVED_VERBS)
@pytest.mark.parametrize("words", [(), ("--help",), ("--model", "x", "y")], ids=str)
def test_a_removed_verb_says_what_took_its_place(drllm, name, words):
    assert name not in VERBS
    assert REMOVED_VERBS[name] in one_line(drllm(name, *words, status=2).err)


@pytest.mark.parametrize("name", REMOVED_FLAGS)
def test_a_removed_flag_says_what_took_its_place(drllm, name):
    verb = next(
        verb.name
        for verb in map(VERBS.__getitem__, VERBS)
        if verb.settings and all(name not in flag.names for flag in list_flags(verb))
    )
    published = name.replace("-", "_").replace("__", "--", 1)
    for written in {name, published}:
        assert REMOVED_FLAGS[name] in one_line(drllm(verb, written, "x", status=2).err)


@pytest.mark.parametrize("name", REMOVED_FLAGS)
def test_a_removed_setting_of_a_file_says_so_too(drllm, name, tmp_path: Path):
    verb = next(
        verb.name
        for verb in map(VERBS.__getitem__, VERBS)
        if verb.settings and all(name not in flag.names for flag in list_flags(verb))
    )
    file = tmp_path / "settings.yaml"
    file.write_text(f"{name.removeprefix('--').replace('-', '_')}: x\n", encoding="utf-8")
    answer = one_line(drllm(f"{verb} --config", file, status=2).err)
    assert REMOVED_FLAGS[name] in answer
    assert "settings.yaml" in answer


REMOVED_SETTINGS = [
    ("search", "margin_tolerance", 0.5),
    ("search", "paths_per_pass", 8),
    ("train", "dropout", 0.0),
    ("train", "normalise_features", False),
    ("train", "early_stopping", 3),
    ("tune", "edits", "layers"),
    ("tune", "epsilon", 2.0),
    ("tune", "max_loss_increase", 0.05),
    ("evaluate", "menu", "menu.json"),
    ("evaluate", "worked_answers", 100),
]
"""Sections of recipes, settings that commit 3820ce17 knew there, and a value of each."""

EMPTY_SETTINGS = [
    ("search", "paths_per_pass"),
    ("train", "early_stopping"),
    ("tune", "epsilon"),
    ("tune", "max_loss_increase"),
    ("tune", "weights"),
    ("evaluate", "menu"),
    ("evaluate", "worked_answers"),
]
"""Sections of recipes, and removed settings that commit 3820ce17 wrote there as null."""


def write_recipe(folder: Path, section: str, name: str, value: object) -> Path:
    """Write a recipe with a removed setting."""
    sections = yaml.safe_load(Recipe().to_yaml())
    sections.setdefault(section, {})[name] = value
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return file


@pytest.mark.parametrize(("section", "name", "value"), REMOVED_SETTINGS)
def test_a_removed_setting_of_a_recipe_says_so_too(section, name, value, tmp_path: Path):
    file = write_recipe(tmp_path, section, name, value)
    with pytest.raises(ConfigError) as error:
        read_recipe(file)
    message = REMOVED_FLAGS["--" + name.replace("_", "-")]
    assert str(error.value) == f"{file}: {section}: {message}"


@pytest.mark.parametrize(("section", "name"), EMPTY_SETTINGS)
def test_a_removed_setting_that_is_null_is_ignored(section, name, tmp_path: Path):
    recipe = read_recipe(write_recipe(tmp_path, section, name, None))
    assert not hasattr(getattr(recipe, section), name)


def test_a_verb_ignores_removed_settings_that_are_null(tmp_path: Path):
    file = tmp_path / "settings.yaml"
    file.write_text("beam: 2\nepsilon: null\n", encoding="utf-8")
    assert read_settings(str(file), find_verb("tune")) == {"beam": 2}


def test_a_misspelt_setting_that_is_null_is_refused(tmp_path: Path):
    file = write_recipe(tmp_path, "tune", "epsilom", None)
    with pytest.raises(ConfigError, match="unknown setting 'epsilom'"):
        read_recipe(file)
