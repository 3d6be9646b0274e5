"""The files of routers: replaced all at once or not at all, and never trusted."""

import dataclasses
import json
import math
import os
import pickle
import tempfile
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from drllm.errors import CheckpointError
from drllm.models.routers.checkpoint import load_routers, save_routers
from drllm.models.routers.config import Count, RouterConfig, Size, read_config
from drllm.models.routers.stack import RouterStack
from process_server import run_in_process

WEIGHTS, CONFIG_FILE, CARD = "routers.safetensors", "router_config.json", "README.md"
FILES = (WEIGHTS, CONFIG_FILE, CARD, "config.json")
SIZES = {"num_layers": 3, "hidden_size": 5, "num_windows": 4, "router_width": 7}
BASE = {"base_model": "org/tiny", "base_revision": "main", "base_class": "LlamaForCausalLM"}
COUNTS = ((1, 2, 3), (0, 6, 0), (4, 1, 1))
CONFIG = RouterConfig(**SIZES, **BASE, base_fingerprint="0123", label_counts=COUNTS)


def new_stack(config=CONFIG, seed=0):
    return RouterStack(config, torch.Generator().manual_seed(seed))


OLD, NEW = new_stack(), new_stack(dataclasses.replace(CONFIG, base_model="org/new"), seed=1)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    """A folder of routers with a file of somebody else's."""
    place = tmp_path / "routers"
    save_routers(OLD, place)
    (place / "metrics.jsonl").write_bytes(b"{}")
    return place


def test_files_replace_those_that_are_there_leave_others_and_are_as_readable(folder, tmp_path):
    save_routers(NEW, tmp_path / "a" / "b")
    new = contents(tmp_path / "a" / "b")
    assert set(new) == set(FILES)
    save_routers(NEW, folder)
    assert contents(folder) == {**new, "metrics.jsonl": b"{}"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


class Step:
    """Counts calls of an operation, and lets it fail at one of them."""

    def __init__(self, original, fails_at, error):
        self.original, self.fails_at, self.error = original, fails_at, error
        self.calls = 0

    def __get__(self, instance, owner):
        return lambda *arguments: self(instance, *arguments)

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == self.fails_at:
            raise self.error
        return self.original(*arguments)


FAILURES = [
    *(("routers", "fsync", step) for step in range(1, 5)),  # the disk fills up in between
    *(("routers", "replace", step) for step in range(1, 9)),  # four out of the way, four into place
    *(("empty", *failing) for failing in (("fsync", 2), ("replace", 2), ("replace", 3))),
]


@pytest.mark.parametrize(("place", "operation", "step"), FAILURES)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_what_was_there(
    folder, monkeypatch, place, operation, step, error
):
    folder = folder.with_name(place)
    folder.mkdir(exist_ok=True)
    before = contents(folder)
    owner = os if operation == "fsync" else Path
    failing = Step(getattr(owner, operation), step, error)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with monkeypatch.context() as patched:
        patched.setattr(owner, operation, failing)
        with pytest.raises(expected) as caught:
            save_routers(NEW, folder)
    assert failing.calls >= step
    assert contents(folder) == before
    if expected is CheckpointError:
        assert f"can't write routers to {folder}: No space left on device;" in str(caught.value)


KILLED = """
import os
from pathlib import Path
from drllm.models.routers.checkpoint import load_routers, save_routers

old, new = (load_routers(root / name) for name in ("old", "new"))
original = Path.replace
for step in range(1, 9):
    folder = root / str(step)
    save_routers(old, folder)
    child = os.fork()
    if child == 0:
        calls = 0
        def replace(source, target):
            global calls
            calls += 1
            if calls == step:
                os._exit(0)
            return original(source, target)
        Path.replace = replace
        save_routers(new, folder)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, "the process was not killed at this step"
"""


def test_a_process_killed_while_files_change_places_leaves_no_mixture(tmp_path):
    """Only a folder with a config is ever read, so old and new must never stand beside one."""
    save_routers(OLD, tmp_path / "old")
    save_routers(NEW, tmp_path / "new")
    run_in_process(exec, KILLED, {"root": tmp_path})
    whole = [contents(tmp_path / name) for name in ("old", "new")]
    for step in range(1, 9):
        files = contents(tmp_path / str(step))
        files = {name: data for name, data in files.items() if not name.startswith(".")}
        assert CONFIG_FILE not in files or files in whole


def test_what_a_killed_save_left_behind_goes_with_the_next_one(folder):
    for name in FILES:
        (folder / f".{name}.0123.new").write_bytes(b"half")
        (folder / f".{name}.0123.old").write_bytes(b"before")
    (folder / ".README.md.mine").write_bytes(b"not ours")
    save_routers(NEW, folder)
    assert set(contents(folder)) == {*FILES, "metrics.jsonl", ".README.md.mine"}


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_the_way_of_a_file_is_refused(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(CheckpointError, match=f"can't write routers to .*: {name} in it is a fold"):
        save_routers(NEW, folder)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("place", ["file", "file/routers"])
def test_a_file_in_the_way_of_the_folder_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"can't write routers to .*; .*choose a folder"):
        save_routers(NEW, tmp_path / place)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda stack: stack.half(), "has dtype float16, expected float32; save routers.float()"),
        (lambda stack: stack.double(), "has dtype float64, expected float32"),
        (lambda stack: stack.hidden_bias.data[1].fill_(math.nan), "'hidden_bias' holds NaN"),
        (
            lambda stack: setattr(stack, "config", RouterConfig(num_layers=4, hidden_size=5)),
            "shape",
        ),
        (lambda stack: stack.config.training.update(path=Path()), "'training' isn't JSON .*Path"),
        (lambda stack: stack.config.training.update(loss=math.inf), "'training' isn't JSON"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved_over_what_can(folder, spoil, message):
    stack, before = load_routers(folder), contents(folder)
    spoil(stack)
    with pytest.raises(CheckpointError, match=f"these routers can't be saved: .*{message}"):
        save_routers(stack, folder)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (CARD, b"# My thesis\n", r"README\.md isn't a card of routers .* move it"),
        ("config.json", b'{"model_type": "llama"}', r"holds a model .* with a config\.json"),
    ],
)
def test_a_file_of_something_else_is_never_replaced(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        save_routers(NEW, tmp_path)
    assert contents(tmp_path) == {name: content}


@pytest.mark.parametrize("content", [None, b'{"library_name": "drllm"}\n'])
def test_routers_saved_by_an_older_version_are_read_and_replaced(folder, content):
    new_content = (folder / "config.json").read_bytes()
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    assert load_routers(folder).config == CONFIG
    save_routers(NEW, folder)
    assert contents(folder)["config.json"] == new_content


@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModelForCausalLM])
def test_the_error_of_transformers_for_routers_names_the_method_that_loads_them(folder, auto_class):
    with pytest.raises(ValueError, match=r"drllm\.RoutedModel\.from_pretrained"):
        auto_class.from_pretrained(folder)


sizes = st.integers(1, 6)
texts = st.text(max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def configs(draw):
    num_layers = draw(sizes)
    row = st.tuples(*[st.integers(0, 2**40)] * 3)
    counts = st.lists(row, min_size=num_layers, max_size=num_layers).map(tuple)
    return RouterConfig(
        num_layers=num_layers,
        hidden_size=draw(sizes),
        num_windows=draw(st.integers(1, 1000)),
        router_width=draw(sizes),
        base_model=draw(texts),
        base_revision=draw(st.none() | texts),
        base_class=draw(texts),
        base_fingerprint=draw(texts),
        label_counts=draw(st.just(()) | counts),
        training=draw(st.dictionaries(texts, json_values, max_size=3)),
    )


@settings(max_examples=25, deadline=None)
@given(config=configs(), seed=st.integers(0, 2**32))
def test_whatever_is_saved_is_loaded_bit_for_bit_and_saved_again_byte_for_byte(config, seed):
    stack = new_stack(config)
    generator = torch.Generator().manual_seed(seed)
    for weight in stack.parameters():  # any finite float32: denormal, huge, negative zero
        bits = torch.randint(-(2**31), 2**31, weight.shape, generator=generator)
        values = bits.to(torch.int32).view(torch.float32)
        weight.data = torch.where(torch.isfinite(values), values, -0.0)
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        save_routers(stack, one)
        loaded = load_routers(one)
        save_routers(loaded, two)
        assert contents(one) == contents(two)
    assert config == loaded.config
    assert stack.state_dict().keys() == loaded.state_dict().keys()
    for name, weight in stack.state_dict().items():
        assert torch.equal(weight.view(torch.int32), loaded.state_dict()[name].view(torch.int32))


def test_loaded_routers_can_be_trained_and_outlive_their_files(folder):
    names = {field.name for field in dataclasses.fields(RouterConfig)}
    names -= {"bypass"}  # routers without one don't name it, so that older versions read them
    assert names | {"format_version"} == set(json.loads((folder / CONFIG_FILE).read_text()))
    before = torch.get_rng_state()
    loaded = load_routers(folder)
    assert torch.equal(before, torch.get_rng_state()), "loading draws no random numbers"
    (folder / WEIGHTS).write_bytes(b"")
    loaded(torch.ones(2, 3, 4, 5), torch.tensor([4, 2])).sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in loaded.parameters())


def refused(folder, message, read=load_routers):
    with pytest.raises(CheckpointError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "nowhere has no router_config.json, since it doesn't exist; give a folder"),
        ("empty", "has no router_config.json, since it is empty; give"),
        ("photos", "has no router_config.json; give a folder that 'drllm train' has written"),
        ("base", "is it a base model. Then give it as --model"),
        ("routers/router_config.json", "is a file; give the folder of routers that holds"),
        (".", "did you mean "),  # a run's folder, which has the routers in it
    ],
)
def test_what_is_no_folder_of_routers_is_refused_with_what_may_be_meant(folder, place, message):
    for name in ("empty", "photos", "base"):
        (folder.parent / name).mkdir()
    (folder.parent / "photos" / "photo.jpg").touch()
    (folder.parent / "base" / "config.json").write_text("{}")
    refused(folder.parent / place, message, read_config)


TYPES = typing.get_type_hints(RouterConfig, include_extras=True)
ROW = (1, 2, 3)
WRONG_VALUES = {
    Size: [0, -1, 1.5, True, "8", None, [], {}],
    str: [5, True, None, [], {}],
    str | None: [5, True, [], {}],
    dict[str, Any]: [5, True, "x", None, []],
    tuple[tuple[Count, Count, Count], ...]: [
        5,
        "x",
        None,
        {"0": ROW},
        [1, 2, 3],
        [(1, 2)] * 3,
        [(1, 2, 3, 4)] * 3,
        [(-1, 1, 2)] * 3,
        [(1, 2, True)] * 3,
        [(1, 2, 0.5)] * 3,
        [(1, 2, "3")] * 3,
    ],
}
"""By type, values of other types, as JSON may hold them."""


def rewrite_config(folder: Path, changes: dict[str, Any]) -> None:
    """Replace values of a folder's config; `...` drops one."""
    path = folder / CONFIG_FILE
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.mark.parametrize(
    ("name", "value"), [("tasks", 3), ("tasks", {"facts": "many"}), ("rewards", "exact")]
)
def test_what_later_stages_use_of_a_training_is_checked(folder, name, value):
    rewrite_config(folder, {"training": {name: value}})
    refused(folder, rf"router_config\.json: 'training': expected .*{name}")


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in TYPES for value in WRONG_VALUES[TYPES[name]]]
)
def test_a_value_of_another_type_than_its_fields_is_refused_by_name(folder, name, value):
    rewrite_config(folder, {name: value})
    refused(folder, rf"router_config\.json: '{name}': expected ")


@pytest.mark.parametrize("name", sorted(TYPES.keys() - {"bypass"}))
def test_a_config_without_one_of_its_fields_is_refused(folder, name):
    rewrite_config(folder, {name: ...})
    refused(folder, f"lacks the key '{name}'; train the routers again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "has format version 2, this drllm reads up to 1; install a newer"),
        ({"format_version": "1"}, "'format_version' is '1'; expected a whole number from 1 to 1"),
        ({"format_version": True}, "'format_version' is True; expected a whole number"),
        ({"format_version": ...}, "'format_version' is None; .*is it the config of routers"),
        ({"num_window": 8}, "unknown key 'num_window'; did you mean 'num_windows'"),
        ({"num_windows": 8}, "was saved for num_windows 4, router_config.json says 8; put the co"),
        ({"num_layers": 10**12, "label_counts": []}, r"has shape \[3, 7, 5\], .* asks for"),
        ({"label_counts": [[1, 2, 3]]}, "'label_counts' has 1 of 3 rows; give a row for"),
        ({"num_layers": 4, "label_counts": []}, "'.*' has shape .*, router_config.json asks for"),
        ({"hidden_size": 6}, r"'hidden_weight' has shape \[3, 7, 5\], .* asks for \[3, 7, 6\]"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_or_this_version_is_refused(
    folder, changes, message
):
    rewrite_config(folder, changes)
    refused(folder, message)


@pytest.mark.parametrize("in_place", [lambda path: None, Path.mkdir])
def test_a_folder_without_weights_is_refused(folder, in_place):
    (folder / WEIGHTS).unlink()
    in_place(folder / WEIGHTS)
    refused(folder, r"has no routers\.safetensors; is it a folder of routers\?")


WHOLE = save(OLD.state_dict())


BROKEN = [
    *((CONFIG_FILE, "", content) for content in (b"{", b"", b"[1, 2]", b"\xff\xfe\x00")),
    *((WEIGHTS, "is broken or cut off .*", content) for content in (b"", b"{}", b"GGUF" * 10)),
    *((WEIGHTS, "is broken or cut off .*", WHOLE[:num]) for num in (5, 100, -1)),
    (WEIGHTS, "is broken or cut off .*", bytes(100)),
]


@pytest.mark.parametrize(("name", "message", "content"), BROKEN)
def test_a_file_that_is_broken_or_cut_off_is_refused(folder, name, message, content):
    (folder / name).write_bytes(content)
    refused(folder, message + "train the routers again")


def test_weights_that_may_not_be_read_are_refused_by_the_systems_own_reason(folder, monkeypatch):
    """Tests may run as root, who may read every file."""
    open_file = Path.open

    def refuse(path, *arguments, **options):
        if path.name == WEIGHTS:
            raise PermissionError(13, "Permission denied")
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    refused(folder, r"can't read .*routers\.safetensors: Permission denied; make the file readable")


@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))]
)
def test_a_pickle_under_the_name_of_safetensors_is_not_opened(folder, write):
    write({"hidden_bias": torch.zeros(2)}, folder / WEIGHTS)
    refused(folder, r"routers\.safetensors is a pickle under another name; drllm opens no pickles")


def test_weights_whose_header_has_the_first_byte_of_a_pickle_are_read(folder):
    files = (save(OLD.state_dict(), {"note": "y" * length}) for length in range(256))
    (folder / WEIGHTS).write_bytes(next(data for data in files if data[0] == 0x80))
    assert load_routers(folder).config == CONFIG  # the number of windows need not be noted either


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("decision_bias", None, "lacks the tensor 'decision_bias'; train the routers again"),
        ("decision_bais", torch.zeros(3, 3), "unknown tensor 'decision_bais'; did you mean"),
        ("decision_bias", torch.zeros(3, 2), r"has shape \[3, 2\], .* asks for \[3, 3\]"),
        ("decision_bias", torch.full((3, 3), math.nan), "'decision_bias' holds NaN or infinity"),
        ("hidden_bias", torch.full((3, 7), math.inf), "'hidden_bias' holds NaN or infinity"),
        ("hidden_bias", torch.full((3, 7), -math.inf), "'hidden_bias' holds NaN or infinity"),
        ("hidden_bias", torch.zeros(3, 7).half(), "'hidden_bias' has dtype float16, expected fl"),
        ("decision_bias", torch.zeros(3, 3).long(), "'decision_bias' has dtype int64, expected"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, name, value, message):
    tensors = load_file(folder / WEIGHTS) | {name: value}
    save_file({key: t for key, t in tensors.items() if t is not None}, folder / WEIGHTS)
    refused(folder, message)
