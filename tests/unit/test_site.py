"""The documentation site: what it covers, and where links lead. `make docs` builds it."""

import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import drllm
from drllm.cli.help import format_flag
from drllm.cli.verbs import FOREIGN, VERBS, list_flags

REPOSITORY = Path(__file__).resolve().parents[2]
WEBSITE = REPOSITORY / "website"


def test_the_python_reference_has_every_public_name_once():
    page = (REPOSITORY / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: drllm\.(\w+)$", page, re.MULTILINE)
    assert sorted(names) == sorted(drllm.__all__)


@pytest.mark.parametrize("name", sorted(drllm.__all__))
def test_every_public_name_says_what_it_is(name):
    value = getattr(drllm, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        value = type(value)
    assert value.__doc__.strip()
    for method_name, method in vars(value).items():
        if inspect.isfunction(method) and not method_name.startswith("_"):
            assert inspect.getdoc(method), f"{name}.{method_name}"


@pytest.fixture
def hooks(monkeypatch):
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(WEBSITE))
    monkeypatch.delitem(sys.modules, "hooks", raising=False)
    import hooks

    yield hooks
    sys.modules.pop("hooks", None)


def rewrite(hooks, text, page="shrink.md", repo_url=""):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    return hooks.on_page_markdown(text, page, SimpleNamespace(repo_url=repo_url))


def test_a_link_between_pages_stays(hooks):
    assert rewrite(hooks, "see [gaps](gaps.md#how)") == "see [gaps](gaps.md#how)"
    study = "results/2026-12-03-half-the-layers.md"
    assert rewrite(hooks, "[results](../results.md)", page=study) == "[results](../results.md)"


def test_links_of_the_readme_lead_to_pages(hooks):
    assert rewrite(hooks, "[x](docs/gaps.md)", page="index.md") == "[x](gaps.md)"
    assert rewrite(hooks, "![](docs/results/a.png)", page="index.md") == "![](results/a.png)"
    assert rewrite(hooks, "[x](CONTRIBUTING.md)", page="index.md") == "[x](contributing.md)"


def test_a_link_out_of_the_site_is_text_unless_the_repository_has_an_address(hooks):
    link = "[example](../examples/first_hour.py)"
    assert rewrite(hooks, link) == "example"
    there = rewrite(hooks, link, repo_url="https://example.org/drllm/")
    assert there == "[example](https://example.org/drllm/blob/main/examples/first_hour.py)"


def test_a_group_of_settings_is_a_table_with_types_defaults_and_bounds(hooks):
    page = rewrite(hooks, "::: drllm.BypassConfig\n\n::: drllm.Bypass", page="reference/python.md")
    [row] = [line for line in page.splitlines() if line.startswith("| <code>rank<")]
    assert "<code>int</code>" in row
    assert "<code>64</code>" in row
    assert "at least 1" in row
    assert "::: drllm.BypassConfig" not in page
    assert "::: drllm.Bypass" in page


def test_links_in_code_are_left_alone(hooks):
    code = "```\n[a](docs/b.md)\n```\nand `[a](docs/b.md)`"
    assert rewrite(hooks, code, page="index.md") == code


@pytest.mark.parametrize("name", VERBS)
def test_the_page_of_commands_has_every_flag_of_a_verb(hooks, name):
    lines = hooks.describe_verb(VERBS[name])
    cells = [line.split("</code>")[0].removeprefix("| <code>") for line in lines]
    for flag in list_flags(VERBS[name]):
        expected = hooks.escape(format_flag(flag, everything=True))
        assert expected in cells, expected


def test_the_page_of_commands_has_every_verb(hooks):
    page = hooks.make_commands_page()
    for name in [*VERBS, *FOREIGN]:
        assert f"### drllm {name}" in page
