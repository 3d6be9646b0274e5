import inspect

import pytest

from drllm import errors
from drllm.errors import DrllmError, printable, unknown_name

CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, Exception) and kind is not DrllmError
]


def test_every_error_is_ours_and_a_builtin_that_callers_catch():
    assert len(CLASSES) == 10
    for kind in CLASSES:
        ours, builtin = kind.__bases__
        assert ours is DrllmError
        assert builtin.__module__ == "builtins"
        assert builtin is not Exception
        # Not as KeyError and OSError may print it.
        assert str(kind("budget 0.5 is below 1")) == "budget 0.5 is below 1"


@pytest.mark.parametrize(
    ("name", "choices", "message"),
    [
        ("arc_esay", ["dart", "arc_easy"], "; did you mean 'arc_easy'? Valid: arc_easy, dart"),
        ("arc_eas", ["arc_east", "arc_easy"], "; did you mean 'arc_easy' or 'arc_east'? Valid: "),
        ("xyz", ["run", "search"], ". Valid: run, search"),
    ],
)
def test_an_unknown_name_comes_with_the_closest_and_all_valid_ones(name, choices, message):
    assert unknown_name("task", name, choices).startswith(f"unknown task {name!r}{message}")


def test_control_characters_are_shown_as_escapes_and_lines_stay_lines():
    assert printable("a\x1b[0m\x7f\x9b\u202e\r\ud800 é·█\n\tb") == (
        "a\\x1b[0m\\x7f\\x9b\\u202e\\r\\ud800 é·█\n\tb"
    )
