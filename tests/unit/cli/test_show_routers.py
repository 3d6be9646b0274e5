"""`show` puts routers beside decisions that ignore the question, and says who is better."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from drllm.cli.show import show
from drllm.cli.terminal import Terminal
from drllm.errors import RecordError
from drllm.metrics import by_layer, ratios, verdict
from drllm.records.layers import read_layers
from drllm.reporting.numbers import plain

PARTS = {
    "train": [[[4, 6, 0], [1, 28, 0], [0, 1, 0]], [[0, 0, 0], [0, 40, 0], [0, 0, 0]]],
    "validation": [[[2, 1, 0], [0, 7, 0], [0, 0, 0]], [[0, 1, 0], [1, 8, 0], [0, 0, 0]]],
}


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    told = {
        part: {
            "examples": sum(map(sum, confusion[0])),
            "executions": sum(row[1] for layer in confusion for row in layer),
            "loss": 0.25,
            "confusion": confusion,
        }
        for part, confusion in PARTS.items()
    }
    file = tmp_path / "layers.json"
    file.write_text(json.dumps({"schema": "drllm.layers", "schema_version": 1, "epoch": 3} | told))
    return file


def test_every_metric_of_routers_and_baselines_is_printed_on_both_parts(
    layers: Path, capsys: pytest.CaptureFixture[str]
):
    show(layers, Terminal())
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    for systems in read_layers(layers).parts.values():
        scores = [ratios(counts) for counts in systems.values()]
        for name in scores[0]:
            assert [name, *(plain(each[name], 3) for each in scores)] in rows
    assert "after epoch 3, on 40 targets trained on" in out
    assert "after epoch 3, on 10 held-out targets" in out
    assert max(map(len, out.split("The routers hit")[0].splitlines())) <= 80


def test_the_verdict_stands_below_the_tables(layers: Path, capsys: pytest.CaptureFixture[str]):
    terminal = Terminal()
    terminal.out.width = 400
    show(layers, terminal)
    agreement = read_layers(layers)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [by_layer(agreement.parts["validation"]), verdict(agreement.parts)]


def test_a_folder_of_routers_shows_its_layers_too(layers: Path, capsys: pytest.CaptureFixture[str]):
    config = {"num_layers": 2, "hidden_size": 8, "num_windows": 4, "router_width": 5}
    (layers.parent / "router_config.json").write_text(json.dumps(config))
    show(layers.parent, Terminal())
    assert "on 10 held-out targets" in capsys.readouterr().out
    layers.unlink()
    show(layers.parent, Terminal())
    assert "held-out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\x00\x00\x00\x00\x00\x00\x00{}",
        b"PK\x03\x04",
        save({"a": np.array([1.0, np.nan], dtype=np.float32)}),
        save({"a": np.ones(4, dtype=np.float32)})[:-1],
    ],
)
def test_routers_with_broken_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "router_config.json").write_text("{}")
    (tmp_path / "routers.safetensors").write_bytes(content)
    with pytest.raises(RecordError, match=r"routers\.safetensors"):
        show(tmp_path, Terminal())
