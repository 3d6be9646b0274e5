"""What stands under `drllm.`: everything a user needs, the same for Python and type checkers."""

import ast
import importlib.metadata
import inspect
import operator
import re
import subprocess
import sys
from pathlib import Path

import pytest

import drllm

SOURCE = Path(drllm.__file__)


def test_every_public_name_is_there_and_none_is_a_packages():
    packages = {path.parent.name for path in SOURCE.parent.glob("*/__init__.py")}
    stages = {"search_paths", "supervise", "train", "evaluate", "report"}
    assert stages | {"attach", "detach", "RouterConfig", "DrllmError"} <= set(dir(drllm))
    assert not packages & set(drllm.__all__)
    for name in drllm.__all__:
        assert getattr(drllm, name).__module__.startswith("drllm.")


def test_the_package_and_its_help_load_nothing_that_takes_long_to_load():
    heavy = {"importlib.metadata": "drllm", "numpy": "drllm.cli", "torch": "drllm.cli"}
    for name, module in heavy.items():
        asked = f"import sys, {module}; print({name!r} in sys.modules)"
        said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
        assert said.stdout == "False\n", said.stderr


def test_type_checkers_see_the_names_that_python_resolves():
    stub = ast.parse(SOURCE.with_suffix(".pyi").read_text())
    imports = [each for each in stub.body if isinstance(each, ast.ImportFrom)]
    names = [name for each in imports for name in each.names]
    assert all(name.name == name.asname for name in names)
    assert sorted(name.name for name in names) == sorted(drllm.__all__)


def test_the_python_page_names_the_type_that_each_function_returns():
    page = (SOURCE.parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+`) \| `(\w+)`(, in a list)? \|", page, re.MULTILINE)
    assert len(rows) > 10
    for calls, kind, in_list in rows:
        for call in re.findall(r"`([\w.]+)`", calls):
            function = operator.attrgetter(call)(drllm)
            returned = inspect.signature(function).return_annotation
            name = returned if isinstance(returned, str) else returned.__name__
            assert name == (f"list[{kind}]" if in_list else kind)
            assert isinstance(getattr(drllm, kind), type)


def test_the_package_says_its_version_and_no_name_that_it_lacks():
    assert drllm.__version__ == importlib.metadata.version("drllm")
    with pytest.raises(AttributeError, match="'drllm' has no attribute 'serach'"):
        _ = drllm.serach
