"""A changed file of tensors is read as the numbers that it holds now, or refused in one line.

Changed is a tensor (its values, shape, type or name), the note in the header, or single bytes.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from meaning import Refusal, read_or_refuse
from mutations import change_bytes, change_document
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from drllm.config import TrainConfig
from drllm.errors import DrllmError
from drllm.models.routers.checkpoint import load_routers
from drllm.models.routing.bypass_file import load_bypass
from drllm.models.routing.healed import read_adapter
from drllm.records.codec import sha256
from drllm.records.healed import ADAPTER_FILE, read_healed
from drllm.training import CHECKPOINT_FILE
from drllm.training.checkpoint import resume_training, save_checkpoint
from drllm.training.feature_store import FeatureStore, Shape
from drllm.training.features import Features
from drllm.training.trainer import Trainer
from old_model import load_old_model

FILES = Path(__file__).parents[1] / "fixtures" / "0.1"
SEEDS = range(8)  # of each file; each seed changes another place
MORE_SEEDS = range(8, 250)
IDENTITY = {
    "id": "tiny",
    "revision": None,
    "class": "C",
    "num_layers": 3,
    "hidden_size": 6,
    "fingerprint": "f",
}
TRAINING = {"settings": {"seed": 0}, "base_model": "f"}

Tensors = dict[str, Tensor]


class Reader(NamedTuple):
    """A file of tensors, and what reads it for a model and returns its tensors, all or some."""

    file: str
    read: Callable[[Path, Any], Tensors]


def read_healed_adapter(file: Path, model: Any) -> Tensors:
    """Read an adapter as if its healed path had been written with it."""
    record_file = file.with_name("path.json")
    values = json.loads(record_file.read_text())
    record_file.write_text(json.dumps({**values, "adapter_sha256": sha256(file)}))
    weights = read_adapter(model, record_file, read_healed(record_file)).weights
    tensors = {f"{name}.weight": tensor for name, tensor in weights.refit.items()}
    for name, (down, up) in ({} if weights.lora is None else weights.lora.maps).items():
        tensors[f"{name}.lora_A.weight"] = down
        tensors[f"{name}.lora_B.weight"] = up
    return {f"base_model.model.model.layers.{name}": tensors[name] for name in tensors}


def read_features(file: Path, model: Any) -> Tensors:
    """Open a folder of features; return the means of the targets in the file, and their windows."""
    manifest = json.loads(file.with_name("features.manifest.json").read_text())
    num_windows = manifest["config"]["num_windows"]
    store = FeatureStore(file.parent, manifest["config"].pop("feature_dtype"))
    shape = Shape(manifest["targets"]["number"], 4, num_windows, 16)
    store.open(manifest, shape)
    with safe_open(file, framework="pt") as tensors:
        targets = tensors.get_tensor("targets")
    if len(targets) == 0:
        return {}
    features = {"filled": store.filled[targets], "targets": targets}
    # The means are mapped and may be larger than memory, so only training sees a NaN among them.
    if bool(store.means[targets].isfinite().all()):
        features["means"] = store.means[targets]
    return features


def make_trainer() -> Trainer:
    """Return a trainer that hasn't made a step."""
    features = Features(
        means=torch.linspace(-1, 1, 4 * 3 * 2 * 6).view(4, 3, 2, 6),
        filled=torch.full((4,), 2),
        labels=torch.tensor([[0, 1, 1], [1, 2, 1], [1, 1, 0], [1, 1, 1]]),
        questions=("a", "b", "c", "d"),
        tasks=("t",) * 4,
    )
    config = TrainConfig(num_epochs=3, num_windows=2, router_width=4, validation_fraction=0.0)
    return Trainer(features, IDENTITY, config)


def read_checkpoint(file: Path, model: Any) -> Tensors:
    """Resume a training; return the weights that it resumes with."""
    trainer = make_trainer()
    resume_training(file.parent, TRAINING, trainer)
    assert 0 <= trainer.epochs_done <= trainer.config.num_epochs
    weights = {}
    for name, weight in trainer.stack.named_parameters():
        weights[f"weights.{name}"] = weight.detach()
        weights[f"exp_avg.{name}"] = trainer.optimizer.state[weight]["exp_avg"]
        weights[f"exp_avg_sq.{name}"] = trainer.optimizer.state[weight]["exp_avg_sq"]
    return weights


READERS = {
    "routers": Reader(
        "run/routers/routers.safetensors", lambda f, model: load_routers(f.parent).state_dict()
    ),
    "bypass": Reader("bypass/bypass.safetensors", lambda f, model: load_bypass(f).tensors()),
    "healed": Reader(f"healed/{ADAPTER_FILE}", read_healed_adapter),
    "refitted": Reader(f"refitted/{ADAPTER_FILE}", read_healed_adapter),
    "features": Reader("features/features-000001.safetensors", read_features),
    "checkpoint": Reader(f"unfinished/{CHECKPOINT_FILE}", read_checkpoint),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Any:
    """The model that the files are for."""
    return load_old_model(tmp_path_factory.mktemp("model") / "model").model


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory) -> Path:
    """A folder with a valid file of each kind."""
    folder = tmp_path_factory.mktemp("valid") / "files"
    for name in ("run/routers", "bypass", "healed", "refitted", "features"):
        shutil.copytree(FILES / name, folder / name)
    trainer = make_trainer()
    trainer.train_epoch()
    save_checkpoint(folder / "unfinished", TRAINING, trainer)
    return folder


def load_tensors(file: Path) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors of a file, and the notes in its header."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return tensors, dict(opened.metadata() or {})


def change_tensors(tensors: Tensors, draw: random.Random) -> Tensors:
    """Change one tensor: its values, its type, its shape or its name."""
    changed = dict(tensors)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = draw.choice(("nan", "number", "type", "shorter", "flat", "delete", "rename", "more"))
    if kind == "nan" and tensor.is_floating_point():
        tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice((float("nan"), float("inf")))
    elif kind == "type":
        tensor = tensor.to(draw.choice((torch.float16, torch.float64, torch.int32)))
    elif kind == "shorter":
        tensor = tensor[: len(tensor) - 1].contiguous()
    elif kind == "flat":
        tensor = tensor.flatten()
    else:
        tensor.view(-1)[draw.randrange(tensor.numel())] += draw.choice((-2, 3, 1000))
    changed[name] = tensor
    if kind in ("delete", "rename"):
        del changed[name]
    if kind in ("rename", "more"):
        changed[draw.choice((f"{name}s", "x"))] = tensor.clone()
    return changed


def change_notes(notes: dict[str, str], draw: random.Random) -> dict[str, str]:
    """Change a note of a header: its JSON at one place, or all of it."""
    name = draw.choice(sorted(notes))
    if draw.random() < 0.1:
        return {other: note for other, note in notes.items() if other != name}
    try:
        document, _ = change_document(json.loads(notes[name]), draw)
        return {**notes, name: json.dumps(document)}
    except ValueError:
        return {**notes, name: notes[name] + "x"}


def change_file(file: Path, draw: random.Random) -> None:
    """Change a file of tensors at one place."""
    kind = draw.choice(("tensors", "tensors", "notes", "bytes"))
    tensors, notes = load_tensors(file)
    if kind == "tensors":
        save_file(change_tensors(tensors, draw), file, notes or None)
    elif kind == "notes" and notes:
        save_file(tensors, file, change_notes(notes, draw))
    else:
        file.write_bytes(change_bytes(file.read_bytes(), draw))


def read_changed(name: str, seed: int, valid_files: Path, model: Any, folder: Path) -> None:
    """Change a copy of a valid file, and read it."""
    reader = READERS[name]
    copied = folder / f"{name}-{seed}"
    shutil.copytree((valid_files / reader.file).parent, copied)
    file = copied / Path(reader.file).name
    change_file(file, random.Random(f"{name} {seed}"))
    tensors = read_or_refuse(lambda file: reader.read(file, model), file)
    if not isinstance(tensors, Refusal):
        assert_same_numbers(file, tensors)


def assert_same_numbers(file: Path, tensors: Tensors) -> None:
    """Assert that tensors are those of a file, and finite."""
    written, _ = load_tensors(file)
    assert set(tensors) <= set(written)
    for name, tensor in tensors.items():
        assert tensor.shape == written[name].shape, name
        assert torch.equal(tensor.double(), written[name].double()), name
        assert bool(tensor.isfinite().all()), name


@pytest.mark.parametrize("name", READERS)
def test_a_valid_file_is_read_whole(name, valid_files, model, tmp_path):
    reader = READERS[name]
    copied = tmp_path / name
    shutil.copytree((valid_files / reader.file).parent, copied)
    file = copied / Path(reader.file).name
    tensors = reader.read(file, model)
    assert_same_numbers(file, tensors)
    assert set(tensors) == set(load_tensors(file)[0])


@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_read_as_it_is_or_refused(name, valid_files, model, tmp_path):
    for seed in SEEDS:
        read_changed(name, seed, valid_files, model, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("name", READERS)
def test_many_more_changed_files_are_read_as_they_are_or_refused(
    name, valid_files, model, tmp_path
):
    for seed in MORE_SEEDS:
        read_changed(name, seed, valid_files, model, tmp_path)


@pytest.mark.parametrize("name", ["healed", "refitted"])
def test_an_adapter_that_was_changed_after_its_path_was_written_is_refused(
    name, valid_files, tmp_path
):
    for seed in SEEDS:
        copied = tmp_path / f"{name}-{seed}"
        shutil.copytree(valid_files / name, copied)
        adapter = copied / ADAPTER_FILE
        content = adapter.read_bytes()
        change_file(adapter, random.Random(seed))
        if adapter.read_bytes() != content:
            with pytest.raises(DrllmError, match=ADAPTER_FILE):
                read_healed(copied / "path.json")
