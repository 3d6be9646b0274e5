"""Paths that leave out an attention or an MLP, as ordinary checkpoints."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from drllm.errors import ArchitectureError, PathError
from drllm.models.base.load import BaseModel
from drllm.models.export import export_path
from drllm.models.families import FAMILIES, REFUSED
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.routing.sublayers import Sublayers
from drllm.paths import StaticPath, Step
from drllm.records.static_paths import read_path
from paths_json import written_paths
from slow_way import LOGIT_TOLERANCE, NO_PARTS, ListedModel, biased_model

PATH = StaticPath([0, Step(1, "mlp"), Step(3, "attention"), 4, Step(4, "mlp"), 5])
"""A layer left out, an attention, an MLP, and a repeat of a part."""
IDS = torch.tensor([list(range(5, 25))])
TOLD_APART = ("llama", "gpt2", "gpt_neox", "falcon", "gemma2", "mixtral", "qwen2_moe")
"""Linear maps of other kinds, biases, a norm behind, layers side by side, experts."""
REFUSED_HERE = {
    **NO_PARTS,
    "diffllama": "derives that from a layer's place",
}
"""Families that can't leave a part out, or not at another place → why."""
TOO_OLD = {"apertus": ("4.", "5.0."), "biogpt": ("4.",), "gpt_bigcode": ("4.",)}
"""Family → versions of transformers in which it isn't routed, or can't be built for an export."""
OTHERS = sorted(
    FAMILIES.keys() - {f for group in list(REFUSED.values())[:2] for f in group} - {*TOLD_APART}
)


pytestmark = pytest.mark.filterwarnings("ignore:.*sliding_window_pattern:FutureWarning")  # cohere2


@pytest.fixture
def base(tiny_llama, tiny_tokenizer):
    return BaseModel(tiny_llama(), tiny_tokenizer, "tiny")


@pytest.mark.parametrize(
    "family", [*TOLD_APART, *(pytest.param(each, marks=pytest.mark.thorough) for each in OTHERS)]
)
def test_logits_and_answers_are_those_of_the_plain_model_changed_by_hand(
    family, tiny_tokenizer, tmp_path
):
    model = biased_model(family, TOO_OLD)
    base = BaseModel(model, tiny_tokenizer, "tiny")
    if said := REFUSED_HERE.get(family):
        with pytest.raises(ArchitectureError, match=said):
            export_path(base, PATH, tmp_path / "out")
        return
    export_path(base, PATH, tmp_path / "out")
    slow = ListedModel(model, path=PATH.steps)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = plain(IDS, use_cache=False).logits[0]
    torch.testing.assert_close(slow.logits(IDS[0].tolist()), found, atol=LOGIT_TOLERANCE, rtol=0)
    said = plain.generate(IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    end = plain.generation_config.eos_token_id
    assert said[0, IDS.shape[1] :].tolist() == slow.greedy(IDS[0].tolist(), 8, never=end)


def test_the_checkpoint_says_what_the_routed_model_says(base, tmp_path):
    export_path(base, PATH, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    routed = RoutedModel(base.model)
    with torch.no_grad(), routed.fixed(PATH):
        expected = routed(IDS).logits
        found = plain(IDS).logits
    torch.testing.assert_close(expected, found, atol=LOGIT_TOLERANCE, rtol=0)


def test_what_is_left_out_is_zeros_and_all_else_is_the_base_models(base, tmp_path):
    weights = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    made = export_path(base, PATH, tmp_path / "out")
    assert made.path == PATH.steps
    stored = load_file(tmp_path / "out" / "model.safetensors")
    zeros = {name for name, weight in stored.items() if not weight.any()}
    left_out = ("layers.1.self_attn.", "layers.2.mlp.", "layers.4.self_attn.")
    assert zeros == {
        name for name in stored if name.startswith(tuple(f"model.{x}" for x in left_out))
    }
    origin = dict(enumerate([0, 1, 3, 4, 4, 5]))
    for name, weight in stored.items():
        words = name.split(".")
        if words[1] == "layers":
            words[2] = str(origin[int(words[2])])
        assert name in zeros or torch.equal(weight, weights[".".join(words)])
    after = base.model.state_dict()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    assert not any("forward" in vars(module) for module in base.model.modules())


def test_a_bias_of_what_is_left_out_is_zero_too(tiny_tokenizer, tmp_path):
    base = BaseModel(biased_model("gpt2", TOO_OLD), tiny_tokenizer, "tiny")
    export_path(base, PATH, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    parts = ("h.1.attn.c_proj", "h.2.mlp.c_proj", "h.4.attn.c_proj")
    for part in parts:
        [bias] = [weight for name, weight in stored.items() if name.endswith(f"{part}.bias")]
        assert not bias.any()


def test_a_sublayer_that_no_zeros_silence_is_refused_with_the_reason(base, tmp_path, monkeypatch):
    layer = base.model.model.layers[1]
    own = type(layer.self_attn).forward

    def never_silent(self, *args, **kwargs):
        attended, *rest = own(self, *args, **kwargs)
        return (attended + 1, *rest)

    monkeypatch.setattr(type(layer.self_attn), "forward", never_silent)
    with pytest.raises(ArchitectureError, match="LlamaAttention doesn't give zeros"):
        export_path(base, PATH, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert not any("forward" in vars(module) for module in base.model.modules())


def test_a_model_without_such_parts_is_refused_and_left_as_it_was(tiny_tokenizer, tmp_path):
    base = BaseModel(biased_model("opt", TOO_OLD), tiny_tokenizer, "tiny")
    with pytest.raises(ArchitectureError, match="give a path of whole layers"):
        export_path(base, PATH, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert not any("forward" in vars(module) for module in base.model.modules())


def test_a_damped_step_is_refused_with_what_to_do(base, tmp_path):
    with pytest.raises(PathError, match=r"position 3 .* layer 2 at weight 0.5, .*--path"):
        export_path(base, StaticPath([0, 1, 2, Step(2, scale=0.5), 3]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_whole_layers_need_no_parts(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Sublayers, "__init__", None)
    made = export_path(base, StaticPath([0, 1, 3, 4, 5]), tmp_path / "out")
    assert made.path == (0, 1, 3, 4, 5)


def test_a_path_of_a_file_is_checked_against_the_model_and_told_in_the_card(base, tmp_path):
    file = written_paths(tmp_path / "paths.json", base.identity)
    export_path(base, read_path(f"{file}:4.60"), tmp_path / "out")
    assert "The path `4.60`" in (tmp_path / "out" / "README.md").read_text()
    other = written_paths(tmp_path / "other.json", {**base.identity, "fingerprint": "f" * 16})
    with pytest.raises(PathError, match="fingerprint ffffffffffffffff"):
        export_path(base, read_path(f"{other}:4.60"), tmp_path / "no")
