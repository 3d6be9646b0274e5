"""The file of a bypass: what is read is what was written, and anything else is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from drllm.errors import CheckpointError
from drllm.model.identity import describe
from drllm.models.routed_model import attach
from drllm.models.routing.bypass import Bypass
from drllm.models.routing.bypass_file import (
    KEY,
    BypassRecord,
    load_bypass,
    save_bypass,
)

RANK = 2


def draw_bypass(model):
    D = model.config.hidden_size
    L = model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(0)
    shapes = [(L, RANK, D), (L, D, RANK), (L, D), (L, D)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return Bypass(*tensors, model=describe(model))


@pytest.fixture
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture
def bypass(model):
    return draw_bypass(model)


@pytest.fixture
def file(bypass, tmp_path):
    path = tmp_path / "bypass.safetensors"
    save_bypass(path, bypass, BypassRecord(model=dict(bypass.model), num_tokens=50_000))
    return path


def test_a_bypass_is_read_as_it_was_written(bypass, file, model):
    found = load_bypass(file)
    assert found.sha256 == bypass.sha256
    assert found.model == bypass.model
    routed = attach(model, bypass=file)
    assert routed.bypass.sha256 == bypass.sha256
    assert repr(routed).endswith("bypass of rank 2)")


def test_a_bypass_is_shown_by_its_size_and_not_by_its_numbers(bypass):
    assert repr(bypass).startswith(f"Bypass({bypass.num_layers} layers, rank {bypass.rank}")
    assert "tensor" not in repr(bypass)


def test_another_bypass_has_another_hash(bypass):
    other = Bypass(bypass.down, bypass.up, bypass.bias + 1e-3, bypass.first)
    assert other.sha256 != bypass.sha256


def test_a_bypass_of_another_model_is_refused_and_the_model_stays_as_it_was(file, tiny_llama):
    other = tiny_llama(seed=1)
    with pytest.raises(CheckpointError, match="fitted for another model with fingerprint"):
        attach(other, bypass=file)
    attach(other)


@pytest.mark.parametrize(
    "metadata",
    ["[" * 100_000, '{"format": "drllm.bypass", "version": 1, "model": {}, "unexplained": [NaN]}'],
)
def test_metadata_that_json_cannot_hold_is_refused(file, bypass, metadata):
    save_file(bypass.tensors(), file, {KEY: metadata})
    with pytest.raises(CheckpointError, match=r"bypass\.safetensors: .*fit the bypass anew"):
        load_bypass(file)


def write_tensors(path, tensors, record):
    metadata = {} if record is None else {KEY: json.dumps(record)}
    save_file(tensors, path, metadata)


def drop_tensor(tensors, record):
    del tensors["up"]


def put_nan(tensors, record):
    tensors["bias"][0, 0] = torch.nan


def narrow(tensors, record):
    tensors["down"] = tensors["down"].half()


def cut_layers(tensors, record):
    tensors["up"] = tensors["up"][:3]


def write_later_version(tensors, record):
    record["version"] = 2


def write_other_format(tensors, record):
    record["format"] = "drllm.routers"


def write_unknown_field(tensors, record):
    record["colour"] = "red"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_tensor, "has no tensor 'up'"),
        (put_nan, "'bias' isn't made of finite float32 numbers"),
        (narrow, "'down' isn't made of finite float32 numbers"),
        (cut_layers, "'up' of this bypass has the shape"),
        (write_later_version, "in version 2 of the format"),
        (write_other_format, "isn't a bypass"),
        (write_unknown_field, "unknown field"),
    ],
)
def test_a_changed_file_is_refused_in_one_line(bypass, tmp_path, change, message):
    record = {"format": "drllm.bypass", "version": 1, "model": dict(bypass.model)}
    tensors = {name: tensor.clone() for name, tensor in bypass.tensors().items()}
    change(tensors, record)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_tensors(tmp_path / "changed.safetensors", tensors, record)
    with pytest.raises(CheckpointError, match=message) as error:
        load_bypass(tmp_path / "changed.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", None])
def test_what_is_no_bypass_is_refused(tmp_path, content):
    path = tmp_path / "wrong.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"isn't a file|isn't a safetensors file"):
        load_bypass(path)


def test_half_a_file_is_refused(file):
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_bypass(file)


def test_a_file_of_other_tensors_is_refused(tmp_path):
    write_tensors(tmp_path / "other.safetensors", {"weight": torch.ones(2)}, None)
    with pytest.raises(CheckpointError, match="isn't a bypass"):
        load_bypass(tmp_path / "other.safetensors")
