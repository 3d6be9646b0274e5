"""The entry point by which lm-evaluation-harness finds our model."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

from lm_eval.api.model import LM
from lm_eval.api.registry import Registry

from drllm.evaluation.lm_eval.model import RoutedLM

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parents[4] / "pyproject.toml"


def test_the_registry_of_the_harness_loads_our_model_from_the_entry_point():
    group = "lm_eval.models"
    models = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]["entry-points"][group]
    assert list(models) == ["drllm"]
    registry = Registry("model", base_cls=LM)
    registry.register("drllm", target=EntryPoint("drllm", models["drllm"], group))
    assert registry.get("drllm") is RoutedLM
