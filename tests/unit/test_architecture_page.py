"""docs/architecture.md shows the tree, the import order, the calls and the files that there are."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "drllm"
FILES = (".json", ".jsonl", ".safetensors", ".md")
MAX_STEPS = 24
ALSO_EARLIER = {
    "models.routing.injection.Injection",  # looks for an earlier routing
    "records.codec.write_json",
    "reporting.run.read_run",  # `evaluate` reads the run to name the next steps
    "work.store.ResultStore.put",
}
"""What is called for something else before the step that names it."""


def tree() -> set[str]:
    """Return the files and folders that the page's tree names, relative to the package."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"^src/drllm/\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert block is not None
    named: set[str] = set()
    folders: list[str] = []
    for line in block[1].splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folders = folders[: len(indent) // 2 - 1]
        named.add("".join(folders) + name)
        folders.append(name)
    return named


def test_every_place_of_the_tree_exists():
    for place in tree():
        assert (PACKAGE / place).exists(), place


def test_every_package_and_every_module_at_the_top_is_in_the_tree():
    packages = {f"{p.parent.relative_to(PACKAGE)}/" for p in PACKAGE.rglob("__init__.py")} - {"./"}
    packages = {package for package in packages if package.count("/") <= 2}
    modules = {p.name for p in PACKAGE.glob("[a-z]*.py")}
    assert packages | modules <= tree() | {"models/architectures/"}


def page_from(heading: str) -> str:
    """Return what stands under a heading of the second level."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    return re.split(r"^## ", page.split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]


def walks() -> dict[str, list[list[str]]]:
    """Return the names of each step of each walk, in order; a step begins with its own name."""
    _, *parts = re.split(r"^### ", page_from("Four walks through the code"), flags=re.MULTILINE)
    found = {}
    for part in parts:
        title, text = part.split("\n", 1)
        steps = re.findall(r"^\d+\. (.*)$", text, flags=re.MULTILINE)
        assert all(step.startswith("`") for step in steps), title
        found[title] = []
        for step in steps:
            names = re.findall(r"`((?:\w+\.)+\w+)`", step)
            found[title].append([name for name in names if not name.endswith(FILES)])
    return found


def resolve(name: str) -> object:
    """Return what stands under `module.name` or `module.Class.method` of the package."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        path = PACKAGE.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            found = importlib.import_module(".".join(("drllm", *parts[:length])))
            return functools.reduce(getattr, parts[length:], found)
    raise AssertionError(f"{name} is in no module of the package")


def test_what_the_walks_name_exists():
    found = walks()
    assert len(found) == 4
    for steps in found.values():
        for names in steps:
            for name in names:
                assert resolve(name) is not None, name


def test_a_walk_is_short_and_comes_to_no_function_twice():
    for title, steps in walks().items():
        assert 20 <= len(steps) <= MAX_STEPS, title
        names = [name for step_names in steps for name in step_names]
        twice = {name for name in names if names.count(name) > 1}
        assert not twice, title


@dataclass
class Trace:
    """The functions of drllm that were called, in order; equal calls in a row count once."""

    calls: list[CodeType] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls inside the block."""
        earlier = sys.getprofile()
        sys.setprofile(self._record)
        try:
            yield
        finally:
            sys.setprofile(earlier)

    def _record(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        is_ours = event == "call" and code.co_filename.startswith(str(PACKAGE))
        if is_ours and self.calls[-1:] != [code]:
            self.calls.append(code)


def codes_of(name: str) -> set[CodeType]:
    """Return the code of a function, or of all methods of a class."""
    found = resolve(name)
    functions = [found]
    if inspect.isclass(found):
        functions = [value for kind in found.__mro__ for value in vars(kind).values()]
    functions = [inspect.unwrap(function) for function in functions if callable(function)]
    return {function.__code__ for function in functions if inspect.isfunction(function)}


@pytest.fixture
def traces(tmp_path: Path, model_folder: Callable[..., Path]) -> list[Trace]:
    """The calls of the four walks, which a tiny model takes."""
    import drllm
    from drllm.cli import main

    model = ["--model", str(model_folder()), "--device", "cpu"]
    routers = str(tmp_path / "routers")
    targets = str(tmp_path / "targets.jsonl")
    questions = ["--limit", "4", "--num-simulations", "8", "--block-size", "2"]

    def run(trace: Trace, *words: str) -> None:
        with trace.recording():
            assert main(list(words)) == 0

    question, prompt, record, outcome = [Trace() for _ in range(4)]
    search = ["search", *model, "--dataset", "builtin_facts", "--output-dir", str(tmp_path)]
    run(question, *search, *questions)
    run(record, "supervise", "--search", str(tmp_path / "search.jsonl"), "--output", targets)
    training = ["--num-epochs", "1", "--warmup-steps", "0", "--output-dir", routers]
    run(record, "train", *model, "--supervision", targets, *training)
    base = drllm.load(str(model_folder()), device="cpu")
    tokens = base.tokenizer("Is it?", return_tensors="pt")
    with prompt.recording():
        routed = drllm.attach(base, routers=routers)
        routed.generate(**tokens, max_new_tokens=2, do_sample=False)
    tasks = ["--tasks", "builtin_facts", "--limit", "4", "--num-random-draws", "2"]
    results = ["--output-dir", str(tmp_path / "eval")]
    run(outcome, "evaluate", *model, "--routers", routers, *tasks, *results)
    run(outcome, "report", str(tmp_path))
    return [question, prompt, record, outcome]


@pytest.mark.thorough
def test_the_steps_of_the_walks_are_in_the_order_of_the_calls(traces):
    for (title, steps), trace in zip(walks().items(), traces, strict=True):
        place = 0
        for name, *_ in steps:
            codes = codes_of(name)
            assert codes, f"{name} is no function of drllm's own"
            start = place if name in ALSO_EARLIER else 0
            places = [index for index, code in enumerate(trace.calls) if code in codes]
            first = next((index for index in places if index >= start), None)
            assert first is not None, f"{title}: {name} isn't called"
            assert first >= place, f"{title}: {name} is called before the step before it"
            place = first + 1


def test_the_files_of_the_table_exist():
    rows = re.findall(
        r"^\| (?!question|---).*\| (.*) \|$", page_from("Where to look"), re.MULTILINE
    )
    assert len(rows) >= 20
    for row in rows:
        places = re.findall(r"`([\w/.]+)`", row)
        assert places, row
        for place in places:
            assert (PACKAGE / place).exists(), place


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_the_import_order_is_that_of_the_contract(page):
    contract = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r"^layers = \[(.*?)^\]", contract, flags=re.DOTALL | re.MULTILINE)
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    block = re.search(r"^```\n(cli\n.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert layers is not None
    assert block is not None
    assert block[1].splitlines() == re.findall(r'"(.*?)"', layers[1])
