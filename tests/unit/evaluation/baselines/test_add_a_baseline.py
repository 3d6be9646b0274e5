"""The page on adding a baseline, followed literally."""

import re
from pathlib import Path

from drllm.evaluation.baselines.base import BASELINES, list_baselines, select_baselines

PAGE = Path(__file__).resolve().parents[4] / "docs" / "add-a-baseline.md"


def test_the_page_adds_a_baseline_that_is_listed_and_passes_its_test(routed, monkeypatch):
    assert list(BASELINES)  # loaded before they are copied
    monkeypatch.setattr(BASELINES, "_entries", dict(BASELINES._entries))
    text = PAGE.read_text(encoding="utf-8")
    the_class, its_test = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    namespace: dict[str, object] = {"__name__": "page"}
    exec(compile(the_class, PAGE, "exec"), namespace)
    assert list_baselines()[-1].name == "first layers"
    assert select_baselines("first-layers") == ["first layers"]
    exec(compile(its_test, PAGE, "exec"), namespace)
    [test] = [value for name, value in namespace.items() if name.startswith("test_")]
    test(routed)
