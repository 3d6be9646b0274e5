"""The Python of README and docs: every block runs, in order, and prints what the page says."""

import contextlib
import io
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from drllm.search.strategies import STRATEGIES
from drllm.statistics.verdicts import judge_counts
from drllm.supervision.rules import TARGETS
from drllm.tasks.registry import get_task
from drllm.tasks.rewards import REWARDS
from run_folder import RunFolderWriter

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
README = "../README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[str]:
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def shown(block: str) -> str:
    """Return the output that a block shows, its lines behind `#>`."""
    lines = [line[3:] for line in block.splitlines() if line.startswith("#> ")]
    return "".join(line + "\n" for line in lines)


def run(page: str, **given: Any) -> list[str]:
    """Run the blocks of a page in order, in one namespace, and return what each printed."""
    namespace = {"__name__": "page", **given}
    printed = []
    for block in blocks(page):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(block, f"docs/{page}", "exec"), namespace)
        printed.append(output.getvalue())
    return printed


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Work in a folder that goes at once: pages write checkpoints."""
    monkeypatch.chdir(tmp_path)
    yield
    shutil.rmtree(tmp_path)


@pytest.mark.thorough
@pytest.mark.filterwarnings(  # transformers renames it; PEFT still asks by the old name
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)
def test_the_python_page_runs_and_prints_what_it_says(smollm2, empty_folder):
    found = blocks("python.md")
    assert len(found) >= 10
    imported = re.findall(r"^(?:from|import) (\S+)", "".join(found), re.MULTILINE)
    assert {name for name in imported if "drllm" in name} == {"drllm"}
    for block, printed in zip(found, run("python.md"), strict=True):
        assert printed == shown(block), block


def test_the_page_on_architectures_runs_on_a_model(tiny_llama):
    [printed] = run("add-an-architecture.md", model=tiny_llama())
    assert printed == "exact True\n"


def test_the_page_on_rewards_runs_and_its_reward_grades_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))
    monkeypatch.chdir(tmp_path)
    assert run("add-a-reward.md") == list(map(shown, blocks("add-a-reward.md")))
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "3 + 4?", "answer": 7, "grader": "last-number"}')
    assert get_task(str(path)).rewards == ("last-number",)


def test_the_page_on_reports_reads_the_numbers_of_the_example(tmp_path, monkeypatch):
    folder = RunFolderWriter(tmp_path / "runs" / "demo_full", num_layers=30, seed=0)
    folder.evaluation("builtin_facts", questions=120)

    def use_the_example(values: Any) -> None:
        base, routed, *_ = values["systems"]
        accuracy = judge_counts(4, 6, 120, p_corrected=1.0, num_tests=1)
        differences = {**routed["against_base"], "accuracy": msgspec.to_builtins(accuracy)}
        values["systems"] = [base, {**routed, "against_base": differences}]

    folder.change("eval/builtin_facts.json", use_the_example)
    monkeypatch.chdir(tmp_path)
    assert run("reports.md") == [shown(*blocks("reports.md"))]


@pytest.mark.parametrize(
    ("page", "registry", "name"),
    [
        ("add-a-strategy.md", STRATEGIES, "windows"),
        ("add-a-target-rule.md", TARGETS, "no_repeats"),
    ],
)
def test_the_pages_on_strategies_and_rules_run_and_register_what_they_say(
    page, registry, name, monkeypatch
):
    assert name not in registry  # loaded before its entries are copied
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    assert run(page) == [shown(*blocks(page))]
    assert registry.summaries()[name].endswith(".")


def test_every_page_with_python_is_run_or_said_not_to_be():
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if blocks(page)}
    elsewhere = {"add-a-task.md", "add-a-baseline.md"}  # by tests of their packages
    here = {"python.md", "add-an-architecture.md", "add-a-reward.md", "reports.md"}
    here |= {"add-a-strategy.md", "add-a-target-rule.md"}
    assert pages == here | elsewhere


def test_the_python_of_the_readme_runs_and_prints_what_it_says(smollm2):
    assert run(README) == [shown(*blocks(README))]


def test_every_module_for_a_first_reading_exists():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `([a-z_/]+)` \|", page, re.MULTILINE)
    assert len(names) == 6
    for name in names:
        assert (REPOSITORY / "src" / "drllm" / name).with_suffix(".py").is_file(), name


def test_the_import_order_of_the_page_on_architecture_is_that_of_the_contract():
    contract = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r"^layers = \[(.*?)^\]", contract, flags=re.DOTALL | re.MULTILINE)
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"^```\n(cli\n.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert layers is not None
    assert block is not None
    assert block[1].splitlines() == re.findall(r'"(.*?)"', layers[1])
