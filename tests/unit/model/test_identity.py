"""A base model is recognised whatever is put around it, and told from every other."""

import accelerate
import peft
import pytest
import torch

from drllm.errors import ModelError
from drllm.model.identity import describe, describe_adapters, fingerprint

pytestmark = [
    # PEFT asks transformers by a name that the newest versions call old.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # PEFT 0.18 advises against an adapter on a part of tied weights.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning"),
]

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tiny_llama):
    """The same three-layer model again at each call."""
    return lambda **overrides: tiny_llama(num_layers=3, **overrides)


def test_the_fingerprint_is_the_one_that_earlier_checkpoints_carry(tiny):
    model = tiny()
    for index, (_, weight) in enumerate(sorted(model.named_parameters())):
        values = (torch.arange(weight.numel()) * 7919 + 31 * index) % 101 - 50
        weight.copy_(values.view(weight.shape) / 100)
    assert fingerprint(model) == "f8ac63ac6268aed0-5716bb81"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "float8_e4m3fn"])
def test_the_fingerprint_survives_every_dtype(tiny, dtype):
    model = tiny()
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, dtype))
    assert fingerprint(tiny()) == fingerprint(model)


@pytest.mark.parametrize(
    "place", ["embed_tokens", "layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj"]
)
def test_the_fingerprint_notices_a_light_fine_tune(tiny, place):
    model = tiny()
    before = fingerprint(model)
    weight = model.get_parameter(f"model.{place}.weight")
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    weight.add_(noise * 0.02 * weight.std())
    assert fingerprint(model) != before


ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(target_modules=["q_proj", "v_proj"]),
    "LoRA of the embedding": lambda: peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]),
    "whole modules": lambda: peft.LoraConfig(
        target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "new tokens": lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]),
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "soft prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def inside(model):
    adapted = peft.inject_adapter_in_model(ADAPTERS["LoRA"](), model)
    assert type(adapted).__name__ == "LlamaForCausalLM"
    assert "model.layers.1.self_attn.q_proj.base_layer.weight" in adapted.state_dict()
    return adapted


def offloaded(model):
    adapted = peft.get_peft_model(model, ADAPTERS["LoRA"]())
    return accelerate.cpu_offload(adapted, execution_device=CPU)


@pytest.mark.parametrize("kind", [*ADAPTERS, inside, offloaded])
def test_an_adapter_changes_nothing_that_a_model_is_recognised_by(tiny, kind):
    adapt = kind if callable(kind) else lambda model: peft.get_peft_model(model, ADAPTERS[kind]())
    assert describe(tiny()) == describe(adapt(tiny()))


def draw_adapters(model, seed=1):
    """Give the adapters random values, since some do nothing to begin with."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if ".default" in name:
            weight.data.normal_(generator=generator)
    return model


MODULES = [kind for kind in ADAPTERS if kind != "soft prompt"]  # which isn't in any module


@pytest.mark.parametrize("kind", MODULES)
def test_active_adapters_are_told_from_others_and_from_none(tiny, kind):
    adapted = draw_adapters(peft.get_peft_model(tiny(), ADAPTERS[kind]()))
    found = describe_adapters(adapted)
    assert list(found) == ["adapters"]
    assert describe_adapters(adapted) == found
    with adapted.disable_adapter():
        assert describe_adapters(adapted) == {}
    assert describe_adapters(draw_adapters(adapted, seed=2)) != found
    assert describe_adapters(tiny()) == {}


def test_an_adapter_with_another_scale_is_another_one(tiny):
    found = []
    for alpha in (8, 16):
        config = peft.LoraConfig(target_modules=["q_proj"], lora_alpha=alpha)
        found.append(describe_adapters(draw_adapters(peft.get_peft_model(tiny(), config))))
    assert found[0] != found[1]


def test_an_adapter_is_the_same_around_the_model_and_inside_of_it_and_offloaded(tiny):
    around = draw_adapters(peft.get_peft_model(tiny(), ADAPTERS["LoRA"]()))
    found = describe_adapters(around)
    assert describe_adapters(draw_adapters(inside(tiny()))) == found
    assert describe_adapters(accelerate.cpu_offload(around, execution_device=CPU)) == found


def test_an_adapter_merged_into_the_weights_makes_another_model(tiny):
    adapted = peft.get_peft_model(tiny(), ADAPTERS["LoRA"]())
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:  # zero to begin with: without this the adapter does nothing
            weight.data.normal_(generator=torch.Generator().manual_seed(1))
    before = fingerprint(adapted)
    assert fingerprint(adapted.merge_and_unload()) != before


ON_DISK = ["model.layers.1", "model.layers.2"]
KEPT = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
DEVICES = dict.fromkeys(ON_DISK, "disk") | dict.fromkeys(KEPT, "cpu")


def dispatched(model, folder, **options):
    return accelerate.dispatch_model(
        model, DEVICES, main_device="cpu", offload_dir=folder, **options
    )


OFFLOADS = {
    "to memory": lambda model, _: accelerate.cpu_offload(model, execution_device=CPU),
    "to disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=CPU),
    "dispatched": dispatched,
    # The hook then sits on the layer, not on the module that owns the weight.
    "whole layers dispatched": lambda model, folder: dispatched(
        model, folder, preload_module_classes=["LlamaDecoderLayer"]
    ),
}


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_weights_are_read_where_they_are_and_stay_there(tiny, offload, tied, tmp_path):
    model = OFFLOADS[offload](tiny(tie_word_embeddings=tied), tmp_path / "weights")
    away = [name for name, weight in model.named_parameters() if weight.is_meta]
    assert "model.layers.2.self_attn.q_proj.weight" in away
    assert describe(tiny(tie_word_embeddings=tied)) == describe(model)
    assert away == [name for name, weight in model.named_parameters() if weight.is_meta]


def test_a_model_without_values_is_refused(tiny):
    model = tiny().to("meta")
    with pytest.raises(ModelError, match=r"'embedding' is on the meta device.*load its weights"):
        fingerprint(model)
