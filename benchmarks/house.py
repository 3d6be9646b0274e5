"""How large a package is and how dense its code: for reading beside other packages, not as limits.

    python benchmarks/house.py [FOLDER | NAME=FOLDER ...] [--longest N] [--json FILE]

A FOLDER is that of a package (`src/drllm`, `.venv/lib/python3.11/site-packages/peft`); without one,
drllm's own. Tests and docs are counted where the package lies in a repository, which a
`pyproject.toml` marks. Settings, verbs and flags are counted of drllm alone.

What is counted:

- A line of code is neither blank nor a comment, and no part of a docstring. Densities are per 1,000
  lines of code.
- A function's length goes from `def` to its last line, with its docstring. `self` and `cls` are no
  parameters.
- A circle is a set of modules of which each imports, directly or through others, every other one.
  Imports inside functions and under TYPE_CHECKING count.
- A tuple assignment has a tuple on both sides: `a, b = x, y`.
- A flag is counted once, however many verbs take it.
- `--longest` lists functions by their lines without the docstring, which says how a function is
  used. Of equally long ones, the one with the longer docstring comes first.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

OWN = Path(__file__).resolve().parents[1] / "src" / "drllm"
LONG_FUNCTION = 60
MANY_PARAMETERS = 8
MANY_METHODS = 12
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
WITH_DOCSTRING = (ast.Module, ast.ClassDef, *FUNCTIONS)
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}

SETTINGS = """
import dataclasses
import drllm.config as config
from drllm.config.fields import Settings
groups = [group for group in vars(config).values() if isinstance(group, type)]
groups = {group for group in groups if issubclass(group, Settings) and group is not Settings}
print(sum(len(dataclasses.fields(group)) for group in groups))
"""


@dataclass
class House:
    """What is counted of one package; None where it can't be."""

    source_lines: int = 0
    code_lines: int = 0
    test_lines: int | None = None
    doc_lines: int | None = None
    modules: int = 0
    functions: int = 0
    classes: int = 0
    long_functions: int = 0
    functions_with_many_parameters: int = 0
    large_classes: int = 0
    import_circles: int = 0
    modules_in_circles: int = 0
    comprehensions: int = 0
    conditional_expressions: int = 0
    tuple_assignments: int = 0
    settings: int | None = None
    verbs: int | None = None
    flags: int | None = None

    def per_thousand(self, number: int) -> float:
        """Return how many there are in 1,000 lines of code."""
        return 1000 * number / self.code_lines


def count_package(folder: Path) -> House:
    """Count everything about the package in a folder."""
    house = House()
    trees = read_modules(folder)
    for file, tree in trees.values():
        text = file.read_text(encoding="utf-8")
        house.modules += 1
        house.source_lines += len(text.splitlines())
        house.code_lines += count_code_lines(text, tree)
        count_nodes(tree, house)
    circles = find_circles(imports_of(trees))
    house.import_circles = len(circles)
    house.modules_in_circles = sum(len(circle) for circle in circles)
    repository = repository_of(folder)
    if repository is not None:
        house.test_lines = count_lines((repository / "tests").rglob("*.py"))
        pages = [*repository.glob("*.md"), *(repository / "docs").rglob("*.md")]
        house.doc_lines = count_lines(pages)
    if folder.name == "drllm":
        count_commands(folder, house)
    return house


def read_modules(folder: Path) -> dict[str, tuple[Path, ast.Module]]:
    """Return the file and the syntax tree of each module of a package, by its dotted name."""
    modules = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        modules[name] = (file, ast.parse(file.read_text(encoding="utf-8")))
    return modules


def count_lines(files: Iterable[Path]) -> int:
    """Return the number of lines of all files together."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def repository_of(folder: Path) -> Path | None:
    """Return the repository of a package: its folder's parent, or the one above `src`."""
    for parent in list(folder.resolve().parents)[:2]:
        if (parent / "pyproject.toml").is_file():
            return parent
    return None


def count_code_lines(text: str, tree: ast.Module) -> int:
    """Return the number of lines with code: no blank lines, comments or docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        docstring = docstring_of(node)
        if docstring is not None:
            lines.difference_update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(lines)


def docstring_of(node: ast.AST) -> ast.Expr | None:
    """Return the docstring of a module, class or function."""
    if not isinstance(node, WITH_DOCSTRING) or ast.get_docstring(node) is None:
        return None
    first = node.body[0]
    return first if isinstance(first, ast.Expr) else None


def count_nodes(tree: ast.Module, house: House) -> None:
    """Add what one module holds to the counts."""
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            house.functions += 1
            house.long_functions += num_lines(node) > LONG_FUNCTION
            house.functions_with_many_parameters += num_parameters(node) > MANY_PARAMETERS
        elif isinstance(node, ast.ClassDef):
            house.classes += 1
            methods = [child for child in node.body if isinstance(child, FUNCTIONS)]
            house.large_classes += len(methods) > MANY_METHODS
        elif isinstance(node, COMPREHENSIONS):
            house.comprehensions += 1
        elif isinstance(node, ast.IfExp):
            house.conditional_expressions += 1
        elif isinstance(node, ast.Assign):
            house.tuple_assignments += is_tuple_assignment(node)


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines of a function, from `def` to its end."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def longest_functions(folder: Path, number: int) -> list[tuple[int, str]]:
    """Return the longest functions of a package: lines without the docstring, and the name."""
    found = []
    for module, (_, tree) in read_modules(folder).items():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                length = num_lines(node)
                docstring = docstring_of(node)
                code_length = length
                if docstring is not None:
                    code_length -= (docstring.end_lineno or 0) - docstring.lineno + 1
                found.append((code_length, length, f"{module}.{node.name}:{node.lineno}"))
    found.sort(key=lambda item: (-item[0], -item[1], item[2]))
    return [(code_length, name) for code_length, _, name in found[:number]]


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of parameters of a function, without `self` and `cls`."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [arguments.vararg, arguments.kwarg]
    names = [argument.arg for argument in [*named, *starred] if argument is not None]
    return len([name for name in names if name not in ("self", "cls")])


def is_tuple_assignment(node: ast.Assign) -> bool:
    """Return whether a statement is like `a, b = x, y`."""
    targets_are_tuples = any(isinstance(target, ast.Tuple) for target in node.targets)
    return targets_are_tuples and isinstance(node.value, ast.Tuple)


def imports_of(modules: Mapping[str, tuple[Path, ast.Module]]) -> dict[str, set[str]]:
    """Return which modules of the package each one imports."""
    graph = {}
    for name, (file, tree) in modules.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        imported = {target for node in ast.walk(tree) for target in targets_of(node, package)}
        resolved = {module_of(target, modules) for target in imported}
        graph[name] = {target for target in resolved if target and target != name}
    return graph


def targets_of(node: ast.AST, package: str) -> Iterator[str]:
    """Yield the dotted names that an import statement in a package names."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")
            above = parents[: len(parents) - node.level + 1]
            base = ".".join([*above, base]).rstrip(".")
        for alias in node.names:
            yield f"{base}.{alias.name}"


def module_of(name: str, modules: Iterable[str]) -> str | None:
    """Return the module that a dotted name belongs to; None where it isn't of the package."""
    parent = name.rpartition(".")[0]
    for candidate in (name, parent):
        if candidate in modules:
            return candidate
    return None


def find_circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the sets of at least two modules that all reach one another."""
    reached = {name: reachable(name, graph) for name in graph}
    circles: list[set[str]] = []
    for name in graph:
        circle = {other for other in reached[name] if name in reached[other]} | {name}
        if len(circle) > 1 and circle not in circles:
            circles.append(circle)
    return circles


def reachable(name: str, graph: Mapping[str, set[str]]) -> set[str]:
    """Return all modules that a module imports, directly or through others."""
    reached: set[str] = set()
    waiting = list(graph[name])
    while waiting:
        current = waiting.pop()
        if current not in reached:
            reached.add(current)
            waiting.extend(graph[current])
    return reached


def count_commands(folder: Path, house: House) -> None:
    """Count the settings, verbs and flags of drllm, by its own help."""
    house.settings = int(run_python(folder, "-c", SETTINGS))
    verbs = re.findall(r"^  ([a-z][a-z-]+)  ", run_python(folder, "-m", "drllm", "--help"), re.M)
    house.verbs = len(verbs)
    flags: set[str] = set()
    for verb in verbs:
        if verb != "lm-eval":  # its flags are the harness'
            text = run_python(folder, "-m", "drllm", verb, "--help-all")
            flags.update(re.findall(r"^  (--[a-z][a-z-]*)", text, re.M))
    house.flags = len(flags)


def run_python(folder: Path, *words: str) -> str:
    """Return what Python prints, with the package of this folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder.parent.resolve()), "COLUMNS": "200"}
    child = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, check=True
    )
    return child.stdout


def to_table(houses: Mapping[str, House]) -> str:
    """Write the counts as a Markdown table, a column a package."""
    rows: dict[str, list[str]] = {}
    for house in houses.values():
        for title, value in shown(house).items():
            rows.setdefault(title, []).append(value)
    lines = [f"| | {' | '.join(houses)} |", f"|---|{'---:|' * len(houses)}"]
    lines += [f"| {title} | {' | '.join(values)} |" for title, values in rows.items()]
    return "\n".join(lines)


def shown(house: House) -> dict[str, str]:
    """Return the counts as they are shown, by what they are."""
    per_thousand = house.per_thousand
    in_circles = f" ({house.modules_in_circles} modules)" if house.import_circles else ""
    return {
        "lines of source": whole(house.source_lines),
        "of them code": whole(house.code_lines),
        "lines of tests": whole(house.test_lines),
        "lines of docs": whole(house.doc_lines),
        "modules": whole(house.modules),
        "functions": whole(house.functions),
        "classes": whole(house.classes),
        f"functions over {LONG_FUNCTION} lines": whole(house.long_functions),
        f"functions over {MANY_PARAMETERS} parameters": whole(house.functions_with_many_parameters),
        f"classes over {MANY_METHODS} methods": whole(house.large_classes),
        "import circles": f"{house.import_circles}{in_circles}",
        "comprehensions per 1,000 lines of code": f"{per_thousand(house.comprehensions):.1f}",
        "conditional expressions": f"{per_thousand(house.conditional_expressions):.1f}",
        "tuple assignments": f"{per_thousand(house.tuple_assignments):.1f}",
        "settings": whole(house.settings),
        "verbs": whole(house.verbs),
        "flags": whole(house.flags),
    }


def whole(number: int | None) -> str:
    """Write a count; a dash where nothing was counted."""
    return "–" if number is None else f"{number:,}"


def main() -> None:
    """Count the packages that the command line names, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", nargs="*", default=[str(OWN)], metavar="NAME=FOLDER")
    parser.add_argument("--longest", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    houses = {}
    for word in options.packages:
        name, _, folder = word.rpartition("=")
        path = Path(folder)
        if not (path / "__init__.py").is_file():
            parser.error(f"{folder} is no folder of a package; give one with an __init__.py")
        houses[name or path.name] = count_package(path)
    print(to_table(houses))
    if options.longest:
        for word in options.packages:
            for length, function in longest_functions(
                Path(word.rpartition("=")[2]), options.longest
            ):
                print(f"{length} {function}")
    if options.json:
        values = {name: asdict(house) for name, house in houses.items()}
        options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
