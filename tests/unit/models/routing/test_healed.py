"""The folder of a healed path: written, loaded, refused, merged."""

import json

import msgspec
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import drllm
from drllm import extras
from drllm.errors import (
    CheckpointError,
    ConfigError,
    DrllmError,
    PathError,
    RecordError,
    RoutingError,
)
from drllm.evaluation.flops import ModelShape, prompt_flops
from drllm.models.base.load import BaseModel, load
from drllm.models.export import MERGED_TOLERANCE, export_path
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.healed import install_path, save_healed
from drllm.paths import StaticPath
from drllm.records.codec import read_json, sha256, write_json
from drllm.records.healed import ADAPTER_FILE, HEALED_FILE
from drllm.records.static_paths import load_path, read_path_list
from healed_folder import PATH, written_healed
from paths_json import written_paths
from slow_way import LOGIT_TOLERANCE, ListedModel, tiny_adapter

IDS = torch.tensor([list(range(5, 25))])


@pytest.fixture
def base(model_folder):
    return load(str(model_folder(num_layers=6)), device="cpu")


@pytest.fixture
def record(base, tmp_path):
    return written_healed(tmp_path / "healed", base.model, base.identity)


def slowly(model, record, adapter):
    """Return the logits of the plain model with an adapter merged."""
    return ListedModel(model, path=record.path.layers, adapter=adapter).logits(IDS[0])


def along(routed, path):
    with routed.fixed(path), torch.no_grad():
        return routed(IDS, use_cache=False).logits[0]


@pytest.mark.parametrize("place", ["healed", f"healed/{HEALED_FILE}"])
def test_a_path_is_loaded_with_the_adapter_that_it_was_saved_with(base, record, tmp_path, place):
    routed = RoutedModel(base.model)
    path = install_path(routed.injection, load_path(str(tmp_path / place)))
    assert list(routed.injection.lora.names) == [record.adapter]
    assert path == StaticPath(PATH, record.adapter)
    assert path.edits(6) == "skips layer 2, repeats layer 4, with an adapter"
    routed_logits = along(routed, path)
    assert install_path(routed.injection, load_path(str(tmp_path / place))) == path
    adapter = tiny_adapter(routed, [1, 3, 4, 5])
    routed.detach()
    expected = slowly(base.model, record, adapter)
    torch.testing.assert_close(routed_logits, expected, atol=LOGIT_TOLERANCE, rtol=0)


def test_a_healed_path_is_loaded_without_a_model_and_run_by_one(base, record, tmp_path):
    path = drllm.load_path(tmp_path / "healed")
    routed = drllm.attach(base)
    logits = along(routed, path)
    assert torch.equal(logits, along(routed, record.path))
    assert not torch.equal(logits, along(routed, record.path.with_adapter("")))


def test_a_healed_path_is_not_loaded_as_routers(base, record, tmp_path):
    with pytest.raises(CheckpointError, match=r"healed path, not routers.*drllm.load_path\('"):
        RoutedModel.from_pretrained(tmp_path / "healed", base)


def test_an_adapter_has_the_dtype_of_the_model(base, record, tmp_path):
    routed = RoutedModel(base.model.bfloat16())
    install_path(routed.injection, load_path(str(tmp_path / "healed")))
    parameters = routed.injection.lora.parameters(record.adapter)
    assert {each.dtype for each in parameters} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT's
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_peft_loads_the_folder_and_runs_all_layers_with_the_adapter(family, tiny_model, tmp_path):
    model = tiny_model(family)
    written_healed(tmp_path, model, BaseModel(model, None, "tiny").identity)
    routed = RoutedModel(model)
    path = install_path(routed.injection, load_path(str(tmp_path)))
    expected = along(routed, StaticPath(range(6), path.adapter))
    routed.detach()
    with torch.no_grad():
        found = PeftModel.from_pretrained(model, tmp_path)(IDS, use_cache=False).logits[0]
    torch.testing.assert_close(found, expected, atol=LOGIT_TOLERANCE, rtol=0)


def test_without_peft_a_healed_path_is_refused_in_one_line(base, record, tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    routed = RoutedModel(base.model)
    with pytest.raises(ConfigError, match=r'pip install "drllm\[heal\]"') as caught:
        install_path(routed.injection, load_path(str(tmp_path / "healed")))
    assert "\n" not in str(caught.value)


def test_healed_paths_are_listed_by_name_and_one_name_by_folders(base, record, tmp_path):
    other = written_healed(tmp_path / "other", base.model, base.identity, path=[0, 5])
    more = written_healed(tmp_path / "more", base.model, base.identity, name="more")
    found = read_path_list(",".join(str(tmp_path / each) for each in ("healed", "other", "more")))
    assert list(found) == ["healed:less", "other:less", "more"]
    paths = [path.path_for(base.identity) for path in found.values()]
    assert paths == [each.path for each in (record, other, more)]


def test_beside_the_paths_json_that_it_comes_from_only_the_healed_path_is_renamed(
    base, record, tmp_path
):
    run = tmp_path / "run" / "healed"  # of the same name as the healed path's own folder
    file = written_paths(run / "paths.json", base.identity, paths={record.name: [0, 5]})
    assert list(read_path_list(f"{file},{tmp_path / 'healed'}")) == ["less", "healed:less"]


def with_weights(folder, change):
    """Change the adapter's tensors, and say so in path.json: what a hand could do."""
    tensors = load_file(folder / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, folder / ADAPTER_FILE)
    with_record(folder, adapter_sha256=sha256(folder / ADAPTER_FILE))


def with_complex_weights(folder):
    try:
        with_weights(
            folder, lambda t: t.update({Q + "A.weight": t[Q + "A.weight"].to(torch.complex64)})
        )
    except KeyError as dtype:  # the oldest safetensors that drllm supports
        pytest.skip(f"the installed safetensors can't write {dtype}")


def with_record(folder, **changes):
    values = read_json(folder / HEALED_FILE, dict)
    write_json(folder / HEALED_FILE, values | changes)


Q = "base_model.model.model.layers.4.self_attn.q_proj.lora_"


def without_a_map(tensors):
    del tensors[Q + "A.weight"], tensors[Q + "B.weight"]


OLD = {
    r"path\.json is a healed path with an adapter for 3 routes": {
        "others": [[{"layer": 0}], [{"layer": 1}, {"layer": 4}]]
    },
    r"path\.json is a path that runs the attention of layer 3 alone": {
        "steps": [{"layer": 1}, {"layer": 3, "run": "attention"}, {"layer": 4}, {"layer": 5}]
    },
    r"path\.json is a path that runs layer 3 at weight 0.5": {
        "steps": [{"layer": 1}, {"layer": 3, "scale": 0.5}, {"layer": 4}, {"layer": 5}]
    },
}


@pytest.mark.parametrize("message", OLD)
def test_what_older_versions_could_heal_is_refused_with_the_version(
    base, record, tmp_path, message
):
    with_record(tmp_path / "healed", **OLD[message])
    with pytest.raises(RecordError, match=f"{message}, which only drllm up to 0.1.0.dev0") as error:
        load_path(str(tmp_path / "healed"))
    assert "commit 3820ce17" in str(error.value)
    assert "\n" not in str(error.value)


BAD = {
    "isn't the adapter that path.json": lambda f: (f / ADAPTER_FILE).write_bytes(b"other"),
    "adapter_model.safetensors is missing": lambda f: (f / ADAPTER_FILE).unlink(),
    "holds NaN or infinity": lambda f: with_weights(
        f, lambda t: t[Q + "A.weight"].fill_(torch.nan)
    ),
    "has no A and B of rank 4": lambda f: with_weights(f, lambda t: t.pop(Q + "B.weight")),
    "has no A and B of rank 5": lambda f: with_record(f, rank=5),
    "holds 'lm_head.weight'": lambda f: with_weights(
        f, lambda t: t.update({"lm_head.weight": torch.zeros(2)})
    ),
    r"for the layers \[1, 3, 4, 5\], the path runs \[1, 4\]": lambda f: with_record(
        f, steps=[{"layer": layer} for layer in (0, 1, 4)]
    ),
    r"the path runs \[\] with it": lambda f: with_record(f, first_layer=6),
    "rank": lambda f: with_record(f, rank=0),
    "alpha": lambda f: with_record(f, alpha=1e308),
    "has no weights for 4.self_attn.q_proj": lambda f: with_weights(f, without_a_map),
    "holds 'base_model.model.model.layers.one": lambda f: with_weights(
        f, lambda t: t.update({Q.replace(".4.", ".one.") + "A.weight": torch.zeros(4, 32)})
    ),
    "has 0 axes of float32, expected a matrix": lambda f: with_weights(
        f, lambda t: t.update({Q + "A.weight": torch.tensor(1.0)})
    ),
    "has 2 axes of float8_e4m3fn, expected": lambda f: with_weights(
        f, lambda t: t.update({Q + "A.weight": t[Q + "A.weight"].to(torch.float8_e4m3fn)})
    ),
    "has 2 axes of int8, expected": lambda f: with_weights(
        f, lambda t: t.update({Q + "A.weight": t[Q + "A.weight"].to(torch.int8)})
    ),
    "has 2 axes of bool, expected": lambda f: with_weights(
        f, lambda t: t.update({Q + "A.weight": t[Q + "A.weight"].bool()})
    ),
    "has 2 axes of complex64, expected": with_complex_weights,
    "is for another model": lambda f: with_weights(
        f, lambda t: t.update({Q + "A.weight": torch.zeros(4, 31)})
    ),
}


@pytest.mark.parametrize("said", BAD)
def test_a_folder_that_was_changed_is_refused_in_one_line(base, record, tmp_path, said):
    BAD[said](tmp_path / "healed")
    routed = RoutedModel(base.model)
    with pytest.raises((RecordError, RoutingError), match=said) as caught:
        install_path(routed.injection, load_path(str(tmp_path / "healed")))
    assert "\n" not in str(caught.value)
    assert routed.injection.lora.names == ()


def test_a_healed_path_of_another_model_is_refused(base, record, tmp_path, tiny_llama):
    routed = RoutedModel(tiny_llama(seed=1))
    with pytest.raises(PathError, match="fingerprint"):
        install_path(routed.injection, load_path(str(tmp_path / "healed")))
    with pytest.raises(RecordError, match="no path called 'x'"):
        load_path(f"{tmp_path / 'healed'}:x")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_an_export_has_the_adapter_merged_and_nothing_else(
    family, tiny_model, tiny_tokenizer, tmp_path
):
    base = BaseModel(tiny_model(family), tiny_tokenizer, "tiny")
    written_healed(tmp_path / "healed", base.model, base.identity)
    made = export_path(base, load_path(str(tmp_path / "healed")), tmp_path / "out")
    assert made.path == tuple(PATH)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = plain(IDS, use_cache=False).logits[0]
    routed = RoutedModel(base.model)
    expected = along(routed, install_path(routed.injection, load_path(str(tmp_path / "healed"))))
    assert (found - expected).abs().max() <= MERGED_TOLERANCE * expected.std()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "adapter of rank 4" in card
    assert "Nothing was trained" not in card


def test_an_export_in_sixteen_bits_is_checked_coarsely(base, record, tmp_path):
    coarse = load(base.name, device="cpu", dtype="bfloat16")
    made = export_path(coarse, load_path(str(tmp_path / "healed")), tmp_path / "out")
    assert made.dtype == "bfloat16"


def test_an_adapter_that_is_not_held_can_not_be_exported(base, record, tmp_path):
    with pytest.raises(DrllmError, match="no adapter"):
        export_path(base, record.path, tmp_path / "out")


def test_the_command_line_answers_along_a_healed_path_and_exports_it(base, record, tmp_path, drllm):
    place, out = tmp_path / "healed", tmp_path / "out"
    command = "generate --device cpu --no-chat --max-new-tokens 6"
    said = drllm(command, "--path", place, "a metal").out
    assert "skips layer 2, repeats layer 4, with an adapter" in said
    assert "to rounding" in drllm("export --device cpu", "--path", place, "--output", out).out
    plain = drllm(command, "--model", out, "a metal").out
    assert plain.splitlines()[0] == said.splitlines()[0]


def test_the_files_are_peft_s_and_the_card_says_what_was_trained(base, record, tmp_path):
    config = json.loads((tmp_path / "healed" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    assert config["layers_to_transform"] == [1, 3, 4, 5]
    assert "mlp.up_proj" in config["target_modules"]
    card = (tmp_path / "healed" / "README.md").read_text()
    assert "| arc_easy | 2 | 3 | 2.2 |" in card
    assert ModelCard(card).data.to_dict() == {
        "library_name": "peft",
        "tags": ["lora", "layer-path"],
    }


def test_the_hub_links_a_healed_path_to_a_base_model_from_the_hub(base, record, tmp_path):
    identity = {**record.model, "id": "owner/name: one", "revision": "abc123"}
    routed = RoutedModel(base.model)
    install_path(routed.injection, load_path(str(tmp_path / "healed")))
    from_hub = msgspec.structs.replace(record, model=identity)
    save_healed(tmp_path / "from_hub", from_hub, routed.injection, record.adapter)
    card = ModelCard((tmp_path / "from_hub" / "README.md").read_text())
    assert card.data.base_model == "owner/name: one"


def test_what_an_adapter_adds_counts_as_arithmetic(base, record, tmp_path):
    routed = RoutedModel(base.model)
    install_path(routed.injection, load_path(str(tmp_path / "healed")))
    adapter = routed.injection.lora.weights(record.adapter)
    shape = ModelShape.from_model(base.model, {record.adapter: adapter})
    plain = prompt_flops(shape, record.path.with_adapter(""), 10)
    healed = prompt_flops(shape, record.path, 10)
    routed.detach()
    assert plain == prompt_flops(
        ModelShape.from_model(base.model), record.path.with_adapter(""), 10
    )
    # Of the layers 1, 3, 4, 4 and 5, twice for each entry and token.
    entries = sum(adapter.num_entries(layer) for layer in (1, 3, 4, 4, 5))
    assert healed.weights - plain.weights == 2 * 10 * entries
    total = sum(a.numel() + b.numel() for a, b in adapter.maps.values())
    assert total == entries - adapter.num_entries(4)
