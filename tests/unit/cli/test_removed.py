"""What was removed is answered in one line that says what took its place."""

from pathlib import Path

import pytest

from drllm.cli.removed import REMOVED_FLAGS, REMOVED_VERBS
from drllm.cli.verbs import VERBS, flags_of


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
        if verb.settings and all(name not in flag.names for flag in flags_of(verb))
    )
    published = name.replace("-", "_").replace("__", "--", 1)
    for written in {name, published}:
        assert REMOVED_FLAGS[name] in one_line(drllm(verb, written, "x", status=2).err)


@pytest.mark.parametrize("name", REMOVED_FLAGS)
def test_a_removed_setting_of_a_file_says_so_too(drllm, name, tmp_path: Path):
    verb = next(
        verb.name
        for verb in map(VERBS.__getitem__, VERBS)
        if verb.settings and all(name not in flag.names for flag in flags_of(verb))
    )
    file = tmp_path / "settings.yaml"
    file.write_text(f"{name.removeprefix('--').replace('-', '_')}: x\n", encoding="utf-8")
    answer = one_line(drllm(f"{verb} --config", file, status=2).err)
    assert REMOVED_FLAGS[name] in answer
    assert "settings.yaml" in answer
