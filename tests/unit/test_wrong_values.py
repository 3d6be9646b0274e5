"""Every flag and setting of every verb refuses what its type, bounds and choices don't allow.

The wrong values are generated from the settings themselves, so a new setting is tested as soon as
it is declared. Mistakes with a remedy of their own are in tests/e2e/test_bad_input.py.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from drllm.cli import main
from drllm.cli.verbs import VERBS, Flag, Verb, list_flags
from drllm.config.fields import list_kinds

WITH_SETTINGS = [name for name, verb in VERBS.items() if verb.settings]
NO_TEXT = ["", " "]
NO_NUMBER = ["", "x", "0x1F", "nan"]
NO_WHOLE_NUMBER = ["", "x", "2.5"]
TOO_LARGE = str(2**63)


class WrongValue(NamedTuple):
    """One value that a setting must refuse.

    Attributes:
        flag: The flag of the setting.
        value: The value, as a text of the command line or as a YAML file would give it.
        expected: What the answer must say beside the flag.
    """

    flag: str
    value: Any
    expected: str


def rules_of(flag: Flag) -> Any:
    """Return the bounds and choices that a flag's setting declares."""
    fields = {field.name: field for field in dataclasses.fields(flag.group)}
    return fields[flag.name].metadata


def out_of_bounds(flag: Flag) -> Iterator[tuple[float, str]]:
    """Yield the numbers just outside of a setting's bounds, and the bound that each passes."""
    rules = rules_of(flag)
    if rules["minimum"] is not None:
        yield rules["minimum"] - 1, f"at least {rules['minimum']}"
    if rules["maximum"] is not None:
        yield rules["maximum"] + 1, f"at most {rules['maximum']}"
    if rules["above"] is not None:
        yield rules["above"], f"above {rules['above']}"


def wrong_texts(flag: Flag) -> Iterator[WrongValue]:
    """Yield texts that a flag must refuse on the command line."""
    name = flag.names[0]
    if flag.switch:
        yield WrongValue(name, "maybe", "takes no value")
        return
    if flag.kind is bool:
        yield WrongValue(name, "maybe", "takes no value")
        return
    if flag.kind in (int, float):
        texts = NO_WHOLE_NUMBER if flag.kind is int else NO_NUMBER
        for text in texts:
            yield WrongValue(name, text, "number")
        yield WrongValue(name, TOO_LARGE, "finite number")
        for number, bound in out_of_bounds(flag):
            yield WrongValue(name, str(number), bound)
        return
    for text in NO_TEXT:
        yield WrongValue(name, text, "give a text")
    if flag.choices:
        yield WrongValue(name, "no-such-choice", "Valid: ")


def wrong_yaml(flag: Flag) -> Iterator[WrongValue]:
    """Yield values that a setting must refuse in a YAML file."""
    name = flag.names[0]
    kinds = list_kinds(flag.group)[flag.name]
    yield WrongValue(name, [1], "give")
    if type(None) not in kinds:
        yield WrongValue(name, None, "give")
    if flag.kind is bool:
        yield WrongValue(name, 1, "true or false")
        yield WrongValue(name, "yes", "true or false")
        return
    yield WrongValue(name, True, "give")
    if flag.kind in (int, float):
        yield WrongValue(name, "0x1F", "number")
        for number, bound in out_of_bounds(flag):
            yield WrongValue(name, number, bound)


def settings_of(verb: Verb) -> list[Flag]:
    """Return the settings of a verb, those that only files have too."""
    return [flag for flag in list_flags(verb) if flag.group is not None]


def check_refused(words: list[str], wrong: WrongValue, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command line and check that its one line of answer names the flag and the mistake."""
    status = main(words)
    out, err = capsys.readouterr()
    assert status == 2, (words, err)
    assert out == ""
    assert err.startswith("drllm: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert wrong.flag in err, (words, err)
    assert wrong.expected in err, (words, err)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder. Nothing is imported that a mistake has no need of."""
    folder = tmp_path / "working"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for package in ("torch", "transformers"):
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, None)
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_value_on_the_command_line_is_named_and_nothing_is_written(verb, folder, capsys):
    _, *example = shlex.split(VERBS[verb].example)
    for flag in list_flags(VERBS[verb]):
        if flag.positional:
            continue
        if not flag.is_on_or_off:
            missing = WrongValue(flag.names[0], None, "has no value")
            check_refused([*example, flag.names[0]], missing, capsys)
        for wrong in wrong_texts(flag):
            check_refused([*example, f"{wrong.flag}={wrong.value}"], wrong, capsys)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("verb", WITH_SETTINGS)
def test_a_wrong_value_in_a_file_is_named_with_the_file_and_nothing_is_written(
    verb, folder, tmp_path, capsys
):
    _, *example = shlex.split(VERBS[verb].example)
    file = tmp_path / "settings.yaml"
    for flag in settings_of(VERBS[verb]):
        for wrong in wrong_yaml(flag):
            file.write_text(json.dumps({flag.name: wrong.value}))
            check_refused([*example, "--config", str(file)], wrong, capsys)
    assert not list(folder.iterdir())
