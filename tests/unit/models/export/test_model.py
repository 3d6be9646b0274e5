"""An exported path loads as an ordinary checkpoint and is the base model along that path."""

import copy
import functools
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from drllm.errors import ArchitectureError, ConfigError, PathError, RecordError, RoutingError
from drllm.model.load import BaseModel
from drllm.models import export
from drllm.models.export import export_path
from drllm.models.families import IN_SUITE
from drllm.models.routed_model import RoutedModel
from drllm.paths import to_decisions
from slow_way import LOGIT_TOLERANCE, ListedModel

PLAN = (0, 2, 2, 4, 5, 5)
"""Skips and repeats, which decisions can express."""
BLOCK = (0, 1, 2, 3, 1, 2, 3, 4, 5)
BACKWARDS = (5, 0, 3)
IDS = torch.tensor([list(range(5, 25))])
"""Longer than the tokens that a sliding layer of these models sees."""


@pytest.fixture(scope="module")
def base_of(tiny_model, tiny_tokenizer):
    """The base model of a family, made once."""
    return functools.cache(lambda family: BaseModel(tiny_model(family), tiny_tokenizer, family))


@pytest.fixture(scope="module")
def exported(base_of, tmp_path_factory):
    """The export of a family along a path, made once and loaded."""
    root = tmp_path_factory.mktemp("exports")

    @functools.cache
    def make(family, path):
        folder = root / family / "-".join(map(str, path))
        export_path(base_of(family), path, folder)
        return loaded(folder)

    return make


@pytest.fixture
def base(tiny_llama, tiny_tokenizer):
    return BaseModel(tiny_llama(), tiny_tokenizer, "tiny")


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def refused(kind, base, path, output):
    before = sorted(output.parent.iterdir())
    with pytest.raises(kind) as caught:
        export_path(base, path, output)
    assert before == sorted(output.parent.iterdir()), "a refused export leaves nothing behind"
    message = str(caught.value)
    assert "\n" not in message
    return message


def families_and_paths():
    """Every family along a plan, and three that differ along the other paths, too."""
    for name, path in {"plan": PLAN, "block": BLOCK, "backwards": BACKWARDS}.items():
        for family in IN_SUITE:
            is_tried = name == "plan" or family in ("llama", "gemma3_text", "gpt2")
            marks = () if is_tried else pytest.mark.thorough
            yield pytest.param(family, path, id=f"{family}-{name}", marks=marks)


@pytest.mark.parametrize(("family", "path"), list(families_and_paths()))
def test_logits_equal_those_of_the_layers_listed_by_hand(exported, base_of, family, path):
    expected = logits(ListedModel(base_of(family).model, path=path).model)
    found = logits(exported(family, path))
    torch.testing.assert_close(found, expected, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", IN_SUITE)
def test_logits_and_greedy_answers_equal_the_routed_models(exported, base_of, family):
    plain = exported(family, PLAN)
    generate = {"attention_mask": torch.ones_like(IDS), "do_sample": False}
    generate |= {"max_new_tokens": 8, "min_new_tokens": 8}
    routed = RoutedModel(copy.deepcopy(base_of(family).model))
    with routed.fixed(to_decisions(PLAN, 6)):
        expected = logits(routed.model)
        answer = routed.generate(IDS, **generate)
    torch.testing.assert_close(logits(plain), expected, atol=LOGIT_TOLERANCE, rtol=0)
    assert plain.generate(IDS, **generate).tolist() == answer.tolist()


def test_the_full_path_gives_the_base_model_again(exported, base_of):
    again, base = exported("llama", tuple(range(6))), base_of("llama").model
    assert again.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(w, base.state_dict()[name]) for name, w in again.state_dict().items())


def test_tied_embeddings_stay_tied(tiny_llama, tiny_tokenizer, tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    made = export_path(BaseModel(model, tiny_tokenizer, "tied"), BLOCK, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert made.num_bytes == sum(weight.nbytes for weight in stored.values())
    again = loaded(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_weights_keep_the_dtype_that_they_were_loaded_in(base, tmp_path):
    base.model.save_pretrained(tmp_path / "base")
    half = loaded(tmp_path / "base", dtype=torch.bfloat16)
    made = export_path(BaseModel(half, base.tokenizer, "half"), PLAN, tmp_path / "out")
    again = loaded(tmp_path / "out", dtype="auto")
    assert (made.dtype, again.dtype) == ("bfloat16", torch.bfloat16)
    assert torch.equal(again.lm_head.weight, half.lm_head.weight)


def test_what_is_written_is_reported_and_named_in_the_card(base, tmp_path):
    made = export_path(base, BLOCK, tmp_path / "deep" / "out")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"]
    stored = load_file(made.folder / "model.safetensors")
    layer = sum(w.nbytes for name, w in stored.items() if name.startswith("model.layers.1."))
    assert (made.path, made.dtype) == (BLOCK, "float32")
    assert made.num_bytes == sum(weight.nbytes for weight in stored.values())
    assert made.num_bytes > made.num_repeated_bytes == 3 * layer
    card = (made.folder / "README.md").read_text()
    assert base.identity["fingerprint"] in card
    assert "\n    0 1 2 3 1 2 3 4 5\n" in card


def test_the_folder_holds_all_that_a_stock_checkpoint_has(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is filled
    base.model.generation_config.max_new_tokens = 7
    base.model.generation_config.temperature = 0.5  # with do_sample off; saving refuses it
    export_path(base, PLAN, out)
    names = {file.name for file in out.iterdir()}
    wanted = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"}
    assert names >= {*wanted, "tokenizer_config.json", "README.md"}
    tokenizer, theirs = AutoTokenizer.from_pretrained(out), copy.deepcopy(base.tokenizer)
    padded = {"padding": "max_length", "max_length": 4}
    assert tokenizer("ab", **padded).input_ids == theirs("ab", **padded).input_ids
    assert tokenizer.chat_template == base.tokenizer.chat_template
    again = loaded(out)
    assert type(again) is LlamaForCausalLM
    assert again.generation_config.max_new_tokens == 7
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.5
    modes = {(out / name).stat().st_mode for name in names}
    assert len(modes) == 1, "the weights can be read by whoever can read the rest"


def test_the_config_has_no_words_of_ours(base, tmp_path):
    export_path(base, PLAN, tmp_path / "out")
    base.model.save_pretrained(tmp_path / "base")
    ours, stock = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "base")
    )
    assert ours.keys() - stock.keys() <= {"rope_theta", "rope_scaling"}
    changed = {key for key in stock if ours[key] != stock[key]}
    assert changed <= {"_name_or_path"}, "six layers here, six there"


def test_the_base_model_stays_as_it_is(base_of, tmp_path):
    base = base_of("gemma3_text")
    weights = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    config = copy.deepcopy(base.model.config.to_dict())
    before = logits(base.model)
    export_path(base, BLOCK, tmp_path / "out")
    after = base.model.state_dict()
    assert list(weights) == list(after)
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    assert config == base.model.config.to_dict()
    assert torch.equal(before, logits(base.model))
    assert not any("forward" in vars(module) for module in base.model.modules())


# Newer transformers keep the scale as an attribute, older compute it as they go.
SCALED = {"attention": "eager", "scale_attn_by_inverse_layer_idx": True}
DENSE_FIRST = "layer 1 at place 0.*the class of mlp"
PLACES = {
    "dense first": ("deepseek_v3", {}, [1, 2], DENSE_FIRST, [0, 2, 2, 5]),
    "every other": ("qwen2_moe", {"decoder_sparse_step": 2}, [0, 2, 3], "of mlp", [0, 1, 4, 5]),
    "scaled": ("gpt2", SCALED, [0, 2], "scaling|logits differ", [0, 1, 2]),
    "not routable": ("lfm2", {}, [0, 1], "not K/V", None),
}


@pytest.mark.parametrize(
    ("family", "options", "path", "said", "other"), PLACES.values(), ids=PLACES.keys()
)
def test_a_layer_that_another_place_would_change_is_refused_there(
    tiny_model, tiny_tokenizer, tmp_path, family, options, path, said, other
):
    base = BaseModel(tiny_model(family, **options), tiny_tokenizer, "tiny")
    message = refused(ArchitectureError, base, path, tmp_path / "out")
    assert re.search(said, message)
    if other:
        export_path(base, other, tmp_path / "out")


class Own(LlamaForCausalLM):
    """Somebody's own class."""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: setattr(model, "__class__", Own), "Own isn't a class of transformers"),
        (
            lambda model: setattr(model.lm_head, "extra", nn.Parameter(torch.zeros(1))),
            "lm_head.extra",
        ),
        # Its table of rotations too, which loading keeps in float32.
        (lambda model: model.to(torch.bfloat16), "changed after it was loaded"),
    ],
)
def test_a_model_that_would_not_load_as_it_is_is_refused(base, tmp_path, change, said):
    change(base.model)
    assert said in refused(ArchitectureError, base, PLAN, tmp_path / "out")


def test_a_wrong_path_leaves_nothing(base, tmp_path):
    assert "indices from 0 to 5" in refused(PathError, base, [0, 9], tmp_path / "out")


@pytest.mark.parametrize(("out", "said"), [(".", "isn't empty"), ("mine", "is a file")])
def test_a_place_that_holds_something_is_refused(base, tmp_path, out, said):
    (tmp_path / "mine").write_text("x")
    assert said in refused(ConfigError, base, PLAN, tmp_path / out)
    assert (tmp_path / "mine").read_text() == "x"


def test_a_routed_model_is_refused_and_stays_routed(base, tmp_path):
    routed = RoutedModel(base.model)
    assert "routed already" in refused(RoutingError, base, PLAN, tmp_path / "out")
    with routed.fixed([1, 0, 1, 1, 1, 1]):
        logits(routed.model)
    assert routed.last_route.tolist() == [[1, 0, 1, 1, 1, 1]]


def other_rotation(folder):
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = 77.0
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 77.0}
    (folder / "config.json").write_text(json.dumps(config))


WEIGHT = "model.layers.3.mlp.up_proj.weight"


def other_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights[WEIGHT][0, 0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def full_disk(folder):
    raise OSError(28, "No space left on device")


def interruption(folder):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (other_rotation, ArchitectureError, "logits differ"),
        (other_weight, ArchitectureError, WEIGHT),
        (full_disk, RecordError, "/out: No space left on device"),
        (interruption, KeyboardInterrupt, ""),
    ],
)
def test_what_is_not_whole_and_right_never_appears(base, tmp_path, monkeypatch, spoil, kind, said):
    write = export._write

    def written(folder, *rest):
        """Let something happen to the files after they are written, before they are checked."""
        write(folder, *rest)
        spoil(folder)

    monkeypatch.setattr(export, "_write", written)
    assert said in refused(kind, base, PLAN, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
