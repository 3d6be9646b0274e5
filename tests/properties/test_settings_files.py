"""Any YAML text is read as names and values, or refused in one line that names the file."""

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from meaning import Refusal, read_or_refuse
from mutations import change_document

import drllm.cli
from drllm.config.files import read_sections, read_yaml
from drllm.errors import ConfigError
from drllm.pipeline.recipes import read_recipe

RECIPE = Path(drllm.cli.__file__).parent / "recipes" / "demo_full.yaml"
SEEDS = range(15)  # each seed changes another place of a recipe
MORE_SEEDS = range(15, 600)

FRAGMENTS = (
    *["a: ", "b: ", "- ", "[", "]", "{", "}", ", ", "? ", ": ", "\n", "  ", "\t", "#", "|", "'"],
    *['"', "&x ", "*x", "<<: ", "!!int ", "!!float ", "!!binary ", "!!omap ", "9" * 5000, "~", "="],
    *["!!python/object:os.system ", "2020-99-99", ".nan", "1e400", "0o7", "1:60", "null", "\0"],
    *["--- ", "..."],
)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=10))
@example(["a: ", "[" * 100_000])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_yaml_is_understood_or_refused(tmp_path, fragments):
    file = tmp_path / "a.yaml"
    file.write_text("".join(fragments))
    said = str(file)
    try:
        assert isinstance(read_yaml(file, "settings"), dict)
    except ConfigError as error:
        said = str(error)
    assert said.startswith(str(file))
    assert "\n" not in said


@pytest.mark.parametrize("text", ["a: !!int abc", "a: !!int ''", "a: 1\na: 2", "a: {b: 1, b: 2}"])
def test_tags_and_names_given_twice_are_refused_with_their_line(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml, line [12]: "):
        read_yaml(tmp_path / "a.yaml", "settings")


def test_aliases_are_refused_before_they_stand_for_gigabytes(tmp_path):
    names = [f"a{number}" for number in range(9)]
    lists = ["&a0 [x,x,x,x,x,x,x,x,x]"]
    for name, former in zip(names[1:], names, strict=False):
        lists.append(f"&{name} [{','.join(9 * [f'*{former}'])}]")
    (tmp_path / "a.yaml").write_text(f"search: [{', '.join(lists)}]")
    with pytest.raises(ConfigError, match=r"a\.yaml, line 1: .*alias '\*a0' can't be read"):
        read_yaml(tmp_path / "a.yaml", "settings")


def test_of_a_long_section_a_message_shows_the_beginning(tmp_path):
    with pytest.raises(ConfigError, match=r"section 'search' is \['x', .*…; give") as caught:
        read_sections(tmp_path / "a.yaml", {"search": ["x"] * 100_000}, ["search"])
    assert len(str(caught.value)) < 500


def test_a_date_is_a_text(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 2020-99-99\nb-c: 2020-01-01")
    found = read_yaml(tmp_path / "a.yaml", "settings")
    assert found == {"a": "2020-99-99", "b_c": "2020-01-01"}


def read_changed_recipe(seed: int, folder: Path) -> None:
    """Change a value of a recipe, and read it."""
    recipe = yaml.safe_load(RECIPE.read_text())
    document, _ = change_document(recipe, random.Random(f"recipe {seed}"))
    file = folder / f"recipe-{seed}.yaml"
    file.write_text(yaml.safe_dump(document))
    stages = read_or_refuse(read_recipe, file)
    if isinstance(stages, Refusal):
        return
    for section, written in document.items():
        read = getattr(stages, section).to_dict()
        for name, value in (written or {}).items():
            assert is_same_setting(value, read[name]), f"{section}: {name}: {value!r}"


def is_same_setting(written: Any, read: Any) -> bool:
    """Tell whether a setting was read as it was written; a number may be written as a text."""
    if isinstance(written, bool) or isinstance(read, bool):
        return written is read
    if str(written) == str(read):
        return True
    return float(written) == float(read)


def test_a_changed_recipe_is_read_as_it_is_or_refused(tmp_path):
    for seed in SEEDS:
        read_changed_recipe(seed, tmp_path)


@pytest.mark.thorough
def test_many_more_changed_recipes_are_read_as_they_are_or_refused(tmp_path):
    for seed in MORE_SEEDS:
        read_changed_recipe(seed, tmp_path)
