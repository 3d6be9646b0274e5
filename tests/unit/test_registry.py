"""Registries: names, nearest names, aliases, and modules that are imported on the first look-up."""

import sys

import pytest

from drllm.errors import TaskError
from drllm.registry import Registry


def test_what_is_registered_is_found_under_its_names_in_order():
    rules: Registry[object] = Registry("rule")

    @rules.register("b", "alias")
    class B:
        """The b."""

    rules.register("a")(len)
    assert (rules.get("b"), rules.get("alias"), rules.get("a")) == (B, B, len)
    assert tuple(rules) == ("b", "alias", "a")
    assert rules.summaries()["b"] == "The b."
    assert "a" in rules
    assert "c" not in rules


def test_an_unknown_name_is_answered_with_the_nearest():
    tasks: Registry[object] = Registry("task", error=TaskError)
    tasks.register("arc_easy")(len)
    with pytest.raises(TaskError, match=r"unknown task 'arc_esay'.* 'arc_easy'"):
        tasks.get("arc_esay")


def test_a_name_is_given_once():
    tasks: Registry[object] = Registry("task")
    tasks.register("a")(len)
    with pytest.raises(ValueError, match="'a'"):
        tasks.register("a")(max)


def test_modules_are_imported_on_the_first_look_up(tmp_path, monkeypatch):
    (tmp_path / "registered_late.py").write_text("import late\nlate.things.register('x')(len)\n")
    (tmp_path / "late.py").write_text(
        "from drllm.registry import Registry\nthings = Registry('thing', ['registered_late'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import late  # type: ignore[import-not-found]

    assert "registered_late" not in sys.modules
    assert late.things.get("x") is len


def test_every_module_of_a_package_is_found_without_being_named(tmp_path, monkeypatch):
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "__init__.py").write_text("")
    for name in ("square", "circle"):
        text = f"import shape_table\nshape_table.shapes.register({name!r})(len)\n"
        (tmp_path / "shapes" / f"{name}.py").write_text(text)
    (tmp_path / "shape_table.py").write_text(
        "from drllm.registry import Registry\nshapes = Registry('shape', ['shapes.*'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import shape_table  # type: ignore[import-not-found]

    assert sorted(shape_table.shapes) == ["circle", "square"]
