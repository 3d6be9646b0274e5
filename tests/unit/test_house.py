"""The script that counts how large and how dense a package is."""

import json
import sys

import pytest

CODE = '''\
"""A module.

Of three lines.
"""

import os  # a comment behind code

# A comment alone.
TEXT = """Two lines
of code."""


class Large:
    """A class."""

    def method(self, a, b, c, d, e, f, g, *, h):
        """Eight parameters."""
        x, y = a, b
        (x, y) = f
        return [x for x in y if x], {z: z for z in (w for w in g)}

    def other(self, a, b, c, d, e, f, g, *args, h):
        return a if b else c
'''
CODE_LINES = 3 + 1 + 4 + 2  # import and text, class, method, other


@pytest.fixture(scope="module")
def house(benchmark):
    return benchmark("house")


@pytest.fixture
def package(tmp_path):
    """A function that writes a package `made` in a repository, from texts by file name."""

    def write(**files):
        folder = tmp_path / "src" / "made"
        folder.mkdir(parents=True)
        (tmp_path / "pyproject.toml").touch()
        (folder / "__init__.py").touch()
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        return folder

    return write


def test_lines_functions_and_expressions_are_counted(house, package):
    counts = house.count_package(package(code=CODE))
    assert counts.source_lines == len(CODE.splitlines())
    assert counts.code_lines == CODE_LINES
    assert (counts.modules, counts.functions, counts.classes) == (2, 2, 1)
    assert counts.functions_with_many_parameters == 1
    assert counts.comprehensions == 3
    assert counts.conditional_expressions == 1
    assert counts.tuple_assignments == 1
    assert counts.per_thousand(counts.comprehensions) == 1000 * 3 / CODE_LINES


def test_long_functions_and_large_classes_are_counted_from_the_limit_on(house, package):
    def function(lines):
        return "def f():\n" + "    pass\n" * (lines - 1)

    def class_of(methods):
        return "class C:\n" + "    def m(self): ...\n" * methods

    text = function(60) + function(61) + class_of(12) + class_of(13)
    counts = house.count_package(package(code=text))
    assert (counts.long_functions, counts.large_classes) == (1, 1)


def test_the_longest_functions_are_listed_without_their_docstrings(house, package):
    documented = 'def documented():\n    """One.\n\n    Two.\n    """\n    return 1\n'
    text = f"def short(): ...\n{documented}def plain():\n    return 2\n"
    folder = package(code=text)
    assert house.longest_functions(folder, 2) == [
        (2, "made.code.documented:2"),
        (2, "made.code.plain:8"),
    ]


def test_circles_are_found_through_local_and_type_checking_imports(house, package):
    folder = package(
        a="from made import b",
        b="def f():\n    from .c import name",
        c="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import made.a",
        d="from made.a import name",  # reaches the circle, isn't reached by it
        e="import os",
    )
    graph = house.imports_of(house.read_modules(folder))
    assert graph["made.b"] == {"made.c"}
    assert house.find_circles(graph) == [{"made.a", "made.b", "made.c"}]
    counts = house.count_package(folder)
    assert (counts.import_circles, counts.modules_in_circles) == (1, 3)


def test_tests_and_docs_are_counted_where_the_package_is_in_a_repository(house, package, tmp_path):
    folder = package(code="x = 1\n")
    for name in ("tests", "docs"):
        (tmp_path / name).mkdir()
    (tmp_path / "tests" / "test_x.py").write_text("def test_x():\n    pass\n")
    (tmp_path / "docs" / "page.md").write_text("# Page\n")
    (tmp_path / "README.md").write_text("# Made\n\nText.\n")
    counts = house.count_package(folder)
    assert (counts.test_lines, counts.doc_lines) == (2, 4)
    assert counts.settings is None
    (tmp_path / "pyproject.toml").unlink()
    assert house.count_package(folder).test_lines is None


def test_the_table_has_a_column_for_each_package(house, package, tmp_path, monkeypatch, capsys):
    folder = package(code=CODE)
    figures = tmp_path / "house.json"
    words = ["house.py", f"first={folder}", str(folder), "--json", str(figures)]
    monkeypatch.setattr(sys, "argv", words)
    house.main()
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == "| | first | made |"
    assert f"| of them code | {CODE_LINES} | {CODE_LINES} |" in rows
    assert json.loads(figures.read_text())["made"]["code_lines"] == CODE_LINES


def test_a_folder_that_is_no_package_is_refused(house, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["house.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        house.main()
    assert "is no folder of a package" in capsys.readouterr().err
