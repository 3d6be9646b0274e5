"""A shortened model is an ordinary model, made of the base model's own tensors."""

import functools
from contextlib import contextmanager

import accelerate
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    LlamaForCausalLM,
)

from drllm.errors import ArchitectureError, PathError
from drllm.model.layers import find_layers
from drllm.model.submodel import list_kept_layers, shorten
from drllm.models.families import FAMILIES, IN_SUITE, REFUSED
from drllm.prune.repairs.refit import solve_gaps
from slow_way import ListedModel

pytestmark = pytest.mark.filterwarnings(  # transformers renames it; PEFT still asks by the old name
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)

SKIP = [1, 5]
KEPT = [0, 2, 3, 4]
LORA = peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
IDS = torch.tensor([list(range(5, 25))])
"""Longer than the tokens that a sliding layer of these models sees."""
TEXTS = [tuple(range(5 + number, 15 + number)) for number in range(8)]
PLACES_COUNT = {"diffllama": "lambda_init", "minicpm3": "residual_scale"}
"""Families whose layers depend on their places or on how many there are, and what in them does."""
OTHERS = set(FAMILIES) - set(IN_SUITE) - set(PLACES_COUNT)
OTHERS -= {*REFUSED["some layers keep a state other than keys and values"]}
OTHERS -= {*REFUSED["some layers read the keys and values of others"]}


@pytest.fixture(scope="module")
def base_of(tiny_model):
    """A family's model, made once. No test may change it."""
    return functools.cache(tiny_model)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def loaded(model, folder):
    """Return a model as it comes back from a folder."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def places_in_memory(model):
    return {name: weight.data_ptr() for name, weight in model.named_parameters()}


@contextmanager
def staying_as_it_is(model):
    """Fail if a tensor of a model has another place, another type or other bits after the block."""
    places = places_in_memory(model)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    yield
    assert places_in_memory(model) == places
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor is tensors[name]
        assert tensor.dtype == copies[name].dtype
        assert torch.equal(tensor, copies[name]), name


def refused(kind, model, skip):
    with pytest.raises(kind) as caught:
        shorten(model, skip)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "family",
    [*IN_SUITE, *(pytest.param(name, marks=pytest.mark.thorough) for name in sorted(OTHERS))],
)
def test_logits_are_bit_for_bit_those_of_the_layers_listed_by_hand(family, base_of):
    short = shorten(base_of(family), SKIP)
    assert torch.equal(logits(short), logits(ListedModel(base_of(family), path=KEPT).model))


@pytest.mark.parametrize("family", IN_SUITE)
def test_each_weight_is_the_base_models_own_and_frozen(family, base_of):
    listed = ListedModel(base_of(family), path=KEPT).model  # it shares its weights
    short = shorten(base_of(family), SKIP)
    assert places_in_memory(short) == places_in_memory(listed)
    assert not any(weight.requires_grad for weight in short.parameters())


@pytest.mark.parametrize("family", IN_SUITE)
def test_it_loads_again_from_its_folder_as_it_was(family, base_of, tmp_path):
    short = shorten(base_of(family), SKIP)
    again = loaded(short, tmp_path)
    assert type(again) is type(base_of(family))
    assert torch.equal(logits(again), logits(short))
    assert again.config.kept_layers == list_kept_layers(again) == KEPT


@pytest.mark.parametrize("family", IN_SUITE)
def test_it_generates_what_the_layers_listed_by_hand_say(family, base_of):
    listed = ListedModel(base_of(family), path=KEPT)
    prompt = IDS[0].tolist()
    answer = shorten(base_of(family), SKIP).generate(
        IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=8, eos_token_id=-1
    )
    assert answer[0].tolist() == prompt + listed.greedy(prompt, 8)


@settings(deadline=None, max_examples=15)
@given(first=st.sets(st.integers(0, 5), max_size=3), second=st.sets(st.integers(0, 2), max_size=2))
def test_a_shortened_model_that_is_shortened_again_counts_in_the_first_one(base_of, first, second):
    base = base_of("gemma3_text")
    kept = [layer for layer in range(6) if layer not in first]
    kept = [layer for place, layer in enumerate(kept) if place not in second]
    twice = shorten(shorten(base, first), second)
    listed = ListedModel(base, path=kept).model
    assert list_kept_layers(twice) == kept
    assert places_in_memory(twice) == places_in_memory(listed)
    assert torch.equal(logits(twice), logits(listed))


SLIDING, FULL = "sliding_attention", "full_attention"
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}


@pytest.mark.parametrize(
    ("family", "options", "name", "expected"),
    [
        ("gemma3_text", {}, "layer_types", [SLIDING, FULL, SLIDING, SLIDING]),
        ("qwen2", WINDOWS, "layer_types", [FULL, FULL, SLIDING, SLIDING]),
        ("smollm3", {}, "no_rope_layers", [1, 1, 0, 1]),
        ("qwen2_moe", {"mlp_only_layers": [0, 3]}, "mlp_only_layers", [0, 2]),
    ],
)
def test_what_the_config_says_of_each_layer_goes_with_the_layer(
    family, options, name, expected, tiny_model
):
    model = tiny_model(family, **options)
    before = model.config.to_dict()
    short = shorten(model, SKIP)
    assert getattr(short.config, name) == expected
    assert short.config.num_hidden_layers == 4
    assert torch.equal(logits(short), logits(ListedModel(model, path=KEPT).model))
    assert model.config.to_dict() == before


@contextmanager
def doing_nothing(layers):
    """Let some layers return what they get."""
    hooks = [layer.register_forward_hook(lambda _, args, __: args[0]) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


def test_a_model_of_text_and_images_is_shortened_in_its_text_part(base_of, tmp_path):
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    vision = {**shape, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    text = base_of("gemma3_text").config.to_dict()
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision))
    model.eval()
    short = loaded(shorten(model, SKIP), tmp_path)
    assert short.config.text_config.layer_types == [SLIDING, FULL, SLIDING, SLIDING]
    layers = find_layers(model)[1]
    with doing_nothing([layers[1], layers[5]]):
        assert torch.equal(logits(short), logits(model))
    assert list_kept_layers(short) == KEPT


def test_tied_embeddings_stay_tied(tiny_llama, tmp_path):
    short = shorten(tiny_llama(tie_word_embeddings=True), SKIP)
    for model in (short, loaded(short, tmp_path)):
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_settings_of_generation_are_a_copy_of_the_base_models(tiny_llama):
    base = tiny_llama()
    base.generation_config.max_new_tokens = 7
    short = shorten(base, SKIP)
    assert short.generation_config == base.generation_config
    assert short.generation_config is not base.generation_config


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_refit_of_it_leaves_the_base_model_as_it_is(family, dtype, tiny_model):
    base = tiny_model(family).to(dtype)
    short = shorten(base, SKIP)
    before = logits(short)
    with staying_as_it_is(base):
        solve_gaps(short, base, TEXTS)
    assert not torch.equal(logits(short), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 3])  # in the first gap, and in the second
def test_an_interrupted_refit_leaves_the_base_model_as_it_is(dtype, stop, tiny_llama):
    base = tiny_llama().to(dtype)
    short = shorten(base, SKIP)
    reports = []

    def interrupt(*report):
        reports.append(report)
        if len(reports) == stop:
            raise KeyboardInterrupt

    expected = logits(base)
    with staying_as_it_is(base), pytest.raises(KeyboardInterrupt):
        solve_gaps(short, base, TEXTS, interrupt)
    assert torch.equal(logits(base), expected)
    assert {weight.dtype for weight in short.parameters()} == {dtype}
    changed = [
        name
        for name, place in places_in_memory(ListedModel(base, path=KEPT).model).items()
        if place != places_in_memory(short)[name]
    ]
    assert changed == ["model.layers.0.mlp.down_proj.weight"] * (stop == 3)
    assert logits(short).isfinite().all()


def test_training_by_lora_and_merging_leave_the_base_model_as_it_is(tiny_llama):
    base = tiny_llama()
    short = shorten(base, SKIP)
    before = logits(short)
    with staying_as_it_is(base):
        wrapped = peft.get_peft_model(short, LORA)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            wrapped(IDS, labels=IDS).loss.backward()
            optimizer.step()
        trained = logits(wrapped)
        merged = wrapped.merge_and_unload(safe_merge=True)
    assert type(merged) is LlamaForCausalLM
    assert not torch.allclose(trained, before, atol=0.01)
    torch.testing.assert_close(logits(merged), trained, atol=1e-4, rtol=1e-4)


class Own(LlamaForCausalLM):
    """Somebody's own class."""


def give(name, value):
    """Return a function that gives a model an attribute."""

    def change(model):
        setattr(model, name, value)
        return model

    return change


def inject(model):
    """Put LoRA into a model, which keeps its class."""
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head"]), model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (give("__class__", Own), "Own"),
        (give("hf_quantizer", object()), "quantised"),
        (lambda model: peft.PeftModel(model, LORA), "PEFT"),
        (inject, "adapter"),
        (lambda model: accelerate.cpu_offload(model, torch.device("cpu")), "offloaded"),
    ],
)
def test_a_model_that_cannot_share_its_weights_is_refused(change, said, tiny_llama):
    assert said in refused(ArchitectureError, change(tiny_llama()), SKIP)


@pytest.mark.parametrize(
    ("skip", "said"),
    [([6], "layer 6"), ([-1], "layer -1"), ([2, 2], "twice"), (range(6), "keep at least one")],
)
def test_layers_that_cannot_be_left_out_are_refused(skip, said, base_of):
    assert said in refused(PathError, base_of("llama"), skip)


# Newer transformers keep the scale as an attribute, older compute it as they go.
SCALED = {"attention": "eager", "scale_attn_by_inverse_layer_idx": True}


@pytest.mark.parametrize(
    ("family", "options", "skip", "said"),
    [
        *((family, {}, SKIP, said) for family, said in PLACES_COUNT.items()),
        ("deepseek_v3", {}, [0], "class of mlp"),  # the first layer is dense
        ("qwen2_moe", {"decoder_sparse_step": 2}, [1], "class of mlp"),
        ("gpt2", SCALED, SKIP, "scaling"),
        ("lfm2", {}, SKIP, "K/V"),
    ],
)
def test_layers_that_would_be_others_at_their_new_places_are_refused(
    family, options, skip, said, tiny_model
):
    assert said in refused(ArchitectureError, tiny_model(family, **options), skip)
