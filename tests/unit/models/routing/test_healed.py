"""The folder of a healed path: written, loaded, refused, merged."""

import copy
import json
import sys

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
from drllm.model.layers import parse_layer
from drllm.model.load import BaseModel, load
from drllm.models.export import MERGED_TOLERANCE, export_path
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.adapters import AdapterWeights
from drllm.models.routing.healed import install_path, save_healed
from drllm.models.routing.injection import Driver, Injection
from drllm.paths import StaticPath
from drllm.records.codec import read_json, sha256, write_json
from drllm.records.healed import ADAPTER_FILE, HEALED_FILE
from drllm.records.static_paths import load_path, read_path_list
from healed_folder import PATH, written_healed, written_refit
from paths_json import written_paths
from slow_way import (
    LOGIT_TOLERANCE,
    ListedModel,
    biased_model,
    largest_list,
    tiny_adapter,
    tiny_refit,
)

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
    assert path.edits(6) == "skips layer 2, repeats layer 4, with healed weights"
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
    with pytest.raises(ConfigError, match=r'pip install "peft') as caught:
        install_path(routed.injection, load_path(str(tmp_path / "healed")))
    assert "\n" not in str(caught.value)


def without_layers(model, path):
    """Replace the layers that a path leaves out by the identity, in place."""

    class Identity(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            # What the model's loop reads of a layer, such as its kind of attention.
            self.attention_type = getattr(layer, "attention_type", None)

        def forward(self, hidden_states, *_args, **_kwargs):
            return hidden_states if returns_tensor else (hidden_states,)

    returns_tensor = not Injection(model, Driver()).returns_tuple
    drllm.detach(model)
    stack, name = largest_list(model)
    layers = getattr(stack, name)
    for index in set(range(len(layers))) - set(path):
        layers[index] = Identity(layers[index])
    return model


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT's
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi", "gemma2"])
def test_peft_alone_loads_lora_and_refit_right(family, tmp_path):
    """In 12 layers, of which 1 and 10 and 11 end in the same digit.

    With biases, Conv1D, and a norm behind the MLP, which is refitted too.
    """
    model = biased_model(family, {}, num_hidden_layers=12)
    path = [0, 1, 3, 4, 5, 8, 9, 10, 11]  # gaps after 1 and 5; 11 has LoRA on every map
    identity = BaseModel(model, None, "tiny").identity
    record = written_refit(tmp_path, model, identity, path=path, has_lora=True)
    routed = RoutedModel(model)
    healed = install_path(routed.injection, load_path(str(tmp_path)))
    logits = along(routed, healed)
    exact = along(routed.double(), healed)  # twelve layers round too much to compare otherwise
    weights = routed.injection.adapters.weights(record.adapter)
    assert {parse_layer(name) for name in weights.refit} == {1, 5}
    routed.detach()
    slow = ListedModel(model, path=path, adapter=weights.lora, refit=weights.refit)
    torch.testing.assert_close(exact, slow.logits(IDS[0]), atol=1e-9, rtol=0)
    model.float()
    by_peft = PeftModel.from_pretrained(without_layers(model, path), tmp_path)
    wrapped = [
        name for name, module in by_peft.named_modules() if hasattr(module, "original_module")
    ]
    assert len(wrapped) == len(weights.refit) == (4 if family == "gemma2" else 2)
    with torch.no_grad():
        peft_logits = by_peft(IDS, use_cache=False).logits[0]
    torch.testing.assert_close(peft_logits, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_refit_alone_is_loaded_and_exported_without_peft(
    family, tiny_tokenizer, tmp_path, monkeypatch
):
    base = BaseModel(biased_model(family, {}), tiny_tokenizer, "tiny")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    record = written_refit(tmp_path / "healed", base.model, base.identity)
    assert not (tmp_path / "healed" / "adapter_config.json").exists()
    assert (record.rank, record.adapted_layers) == (0, [])
    routed = RoutedModel(base.model)
    path = install_path(routed.injection, load_path(str(tmp_path / "healed")))
    logits = along(routed, path)
    refit = tiny_refit(routed, [1, 4])
    routed.detach()
    slow = ListedModel(base.model, path=path.layers, refit=refit)
    torch.testing.assert_close(logits, slow.logits(IDS[0]), atol=LOGIT_TOLERANCE, rtol=0)
    result = export_path(base, load_path(str(tmp_path / "healed")), tmp_path / "out")
    assert not result.is_merged
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(plain(IDS, use_cache=False).logits[0], logits)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "solved the weights of these modules anew on 50,000 tokens" in card
    assert "found its logits equal, bit for bit" in card


def test_peft_refuses_the_folder_of_a_refit_alone(base, tmp_path):
    written_refit(tmp_path, base.model, base.identity, has_lora=True)
    assert (tmp_path / "adapter_config.json").exists()
    written_refit(tmp_path, base.model, base.identity)  # the earlier config is removed
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(base.model, str(tmp_path))
    card = ModelCard((tmp_path / "README.md").read_text())
    assert card.data.to_dict() == {"library_name": "drllm", "tags": ["layer-path"]}
    assert "| arc_easy | 2 | 3 | 2.3 | 2.2 |" in card.text


def test_where_peft_would_take_other_modules_too_it_gets_no_config(base, tmp_path):
    written_refit(tmp_path / "healed", base.model, base.identity, has_lora=True)
    routed = RoutedModel(base.model)
    path_file = load_path(str(tmp_path / "healed"))
    path = install_path(routed.injection, path_file)
    # A second tower, in which the name of a module ends like that of a refitted map.
    base.model.other_model = torch.nn.Module()
    base.model.other_model.layers = copy.deepcopy(base.model.model.layers)
    save_healed(tmp_path / "again", path_file.record, routed.injection, path.adapter)
    assert (tmp_path / "again" / ADAPTER_FILE).exists()
    assert not (tmp_path / "again" / "adapter_config.json").exists()


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
        f, steps=[{"layer": layer} for layer in (0, 1, 4)], executions=3
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


M = "base_model.model.model.layers.1.mlp.down_proj."


def refit_of(folder):
    return read_json(folder / HEALED_FILE, dict)["refit"]


def with_gap(folder, **changes):
    refit = refit_of(folder)
    refit["gaps"][0] |= changes
    with_record(folder, refit=refit)


BAD_REFITS = {
    "1.mlp.down_proj has no new weight": lambda f: with_weights(f, lambda t: t.pop(M + "weight")),
    r"shape \[32, 64\], the refit one of \[64, 32\]": lambda f: with_weights(
        f, lambda t: t.update({M + "weight": t[M + "weight"].T.contiguous()})
    ),
    "down_proj.weight holds NaN or infinity": lambda f: with_weights(
        f, lambda t: t[M + "weight"].fill_(torch.inf)
    ),
    "down_proj.weight has 1 axes of float32": lambda f: with_weights(
        f, lambda t: t.update({M + "weight": torch.zeros(3)})
    ),
    "holds 'base_model.model.model.layers.3.mlp.down_proj.weight'": lambda f: with_weights(
        f, lambda t: t.update({M.replace(".1.", ".3.") + "weight": torch.zeros(32, 64)})
    ),
    "isn't a gap of its path": lambda f: with_gap(f, next_layer=4),
    "from layer 0 to 3, which": lambda f: with_gap(f, layer=0, map="0.mlp.down_proj"),
    "from layer 4 to 6, which isn't a gap of its path, or comes twice": lambda f: with_gap(
        f, layer=4, next_layer=6, map="4.mlp.up_proj"
    ),
    "expected a module of layer 1": lambda f: with_gap(f, map="3.mlp.down_proj"),
    "down_proj.weight', expected names such as": lambda f: with_gap(f, map="1.mlp.up_proj"),
    "1.mlp.down_proj has no new weight, or LoRA beside": lambda f: with_weights(
        f, lambda t: t.update({M + "lora_A.weight": torch.zeros(4, 64)})
    ),
    "from layer 1 to 3, which": lambda f: with_record(
        f, steps=[{"layer": layer} for layer in (1, 0, 3, 4)]
    ),
    "ridge": lambda f: with_gap(f, ridge=-1.0),
    "num_tokens": lambda f: with_record(f, refit={**refit_of(f), "num_tokens": 0}),
    "refit.gaps": lambda f: with_record(f, refit={**refit_of(f), "gaps": []}),
    "unknown": lambda f: with_gap(f, kind="gate"),
    "neither LoRA weights": lambda f: with_record(f, rank=0, refit=None),
    "alpha 0": lambda f: with_record(f, rank=4, alpha=0.0),
}


@pytest.mark.parametrize("message", BAD_REFITS)
@pytest.mark.parametrize("has_lora", [True, False])
def test_a_refit_that_was_changed_is_refused_in_one_line(base, tmp_path, message, has_lora):
    written_refit(tmp_path, base.model, base.identity, has_lora=has_lora)
    BAD_REFITS[message](tmp_path)
    routed = RoutedModel(base.model)
    with pytest.raises((RecordError, RoutingError), match=message) as caught:
        install_path(routed.injection, load_path(str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert routed.injection.adapters.names == ()


def test_weights_that_the_record_does_not_describe_are_not_saved(base, record, tmp_path):
    routed = RoutedModel(base.model)
    routed.injection.add_adapter("written", refit=tiny_refit(routed, [1]))
    with pytest.raises(ValueError, match="the adapter rank 0"):
        save_healed(tmp_path / "other", record, routed.injection, "written")
    assert not (tmp_path / "other").exists()


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
    assert "skips layer 2, repeats layer 4, with healed weights" in said
    assert "to rounding" in drllm("export --device cpu", "--path", place, "--output", out).out
    plain = drllm(command, "--model", out, "a metal").out
    assert plain.splitlines()[0] == said.splitlines()[0]


@pytest.mark.parametrize("has_lora", [True, False])
def test_the_command_line_answers_along_a_refitted_path_and_exports_it(
    base, tmp_path, drllm, has_lora
):
    place = tmp_path / "healed"
    written_refit(place, base.model, base.identity, has_lora=has_lora)
    command = "generate --device cpu --no-chat --max-new-tokens 6"
    answer = drllm(command, "--path", place, "a metal").out
    assert "skips layers 2 and 5, with healed weights" in answer
    exported = drllm("export --device cpu", "--path", place, "--output", tmp_path / "out").out
    assert ("up to rounding" if has_lora else "bit for bit") in exported
    plain = drllm(command, "--model", tmp_path / "out", "a metal").out
    assert plain.splitlines()[0] == answer.splitlines()[0]
    assert "4.mlp.down_proj" in drllm("show", place).out


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
    refit = AdapterWeights(refit=tiny_refit(routed, [1, 4]))
    adapters = routed.injection.adapters.all_weights() | {"refit": refit}
    shape = ModelShape.from_model(base.model, adapters)
    plain = prompt_flops(shape, record.path.with_adapter(""), 10)
    healed = prompt_flops(shape, record.path, 10)
    routed.detach()
    assert plain == prompt_flops(shape, record.path.with_adapter("refit"), 10)  # replaces weights
    assert plain == prompt_flops(
        ModelShape.from_model(base.model), record.path.with_adapter(""), 10
    )
    # Of the layers 1, 3, 4, 4 and 5, twice for each entry and token.
    entries = sum(adapter.num_entries(layer) for layer in (1, 3, 4, 4, 5))
    assert healed.weights - plain.weights == 2 * 10 * entries
    total = sum(a.numel() + b.numel() for a, b in adapter.maps.values())
    assert total == entries - adapter.num_entries(4)
