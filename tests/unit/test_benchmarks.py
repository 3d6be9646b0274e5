"""The benchmarks run, and what they write says what was compared; no times are checked."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))
NUM_LAYERS = 12


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_benchmark", BENCHMARKS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny_folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder(num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def written(
    generate: ModuleType, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the quick benchmark of generation writes for a tiny model."""
    file = tmp_path_factory.mktemp("benchmark") / "figures.json"
    arguments = ["generate.py", "--quick", "--json", str(file), "--model", str(tiny_folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        generate.main()
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return figures


def test_every_comparison_has_its_figure_and_bound(written: dict[str, Any]) -> None:
    ways = ("prefill_batch_1", "prefill_batch_8", "decode_batch_1")
    expected = dict.fromkeys(ways, 1.03) | {"routers_prefill_batch_1": 1.01}
    for way in ("prefill", "decode"):
        for k in (3, 6, 10):
            expected[f"{way}_batch_1_skip_{k}_of_12"] = pytest.approx(1.05 * (1 - k / 12))
    assert written["bounds"] == expected
    assert written["is_met"].keys() == expected.keys()
    assert {*ways, "routers_prefill_batch_1"} <= written["overhead"].keys()
    assert len(written["speedup"]) == 4
    figures = written["overhead"] | written["share_of_the_time"] | written["speedup"]
    assert figures == {name: middle for name, (_, middle, _) in written["quartiles"].items()}


def test_what_is_stored_is_the_plan_row_by_row_and_byte_by_byte(written: dict[str, Any]) -> None:
    assert len(written["stored"]) == 5
    for count in written["stored"]:
        assert count["is_exact"], count
    skipped = next(c for c in written["stored"] if c["case"] == "1 prompt, 10 layers skipped")
    assert skipped["bytes"] * NUM_LAYERS == skipped["bytes_untouched"] * (NUM_LAYERS - 10)


def test_grouped_and_mixed_batches_answer_the_same(written: dict[str, Any]) -> None:
    assert set(written["answers_that_differ"].values()) == {0}


def test_a_missed_bound_is_said_plainly(generate: ModuleType) -> None:
    assert str(generate.Figure("a", "decode", [1.01, 1.05, 1.06], 1.03)).endswith("MISSED")
    assert str(generate.Figure("a", "decode", [1.01, 1.03, 1.06], 1.03)).endswith("met")


def test_models_take_turns_and_every_other_round_goes_backwards(generate: ModuleType) -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = iter(range(100))
    rounds = generate.take_turns(calls, 3, lambda: float(next(seconds)))
    assert "".join(called) == "abc" + "cba" + "abc"
    assert rounds == [dict.fromkeys("abc", 1.0)] * 3


@pytest.mark.thorough
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_quick_run_on_the_real_model_writes_what_every_benchmark_must(
    smollm2: Any, script: Path, tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    child = subprocess.run(
        [sys.executable, script, "--quick", "--json", file], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert {"repeats", "ours", "theirs", "machine"} <= figures.keys()
    assert figures.keys() & {"speedup", "overhead"}
