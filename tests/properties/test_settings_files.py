"""Any YAML text is read as names and values, or refused in one line that names the file."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from drllm.config.files import read_sections, read_yaml
from drllm.errors import ConfigError

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
