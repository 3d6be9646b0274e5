"""An exported path loads as an ordinary checkpoint and is the base model along that path."""

import copy
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from drllm.errors import ArchitectureError, ConfigError, ModelError, PathError, RoutingError
from drllm.models import export
from drllm.models.base.layers import find_layers
from drllm.models.base.load import BaseModel
from drllm.models.check import IN_SUITE
from drllm.models.export import export_path
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import check_path, to_decisions

PLAN = (0, 2, 2, 4, 5, 5)
"""Skips and repeats, which decisions can express."""
BLOCK = (0, 1, 2, 3, 1, 2, 3, 4, 5)
BACKWARDS = (5, 0, 3)
PROMPT = list(range(5, 25))
"""Longer than the tokens that a sliding layer of these models sees."""

LOGIT_TOLERANCE = 2e-5
"""As in the parity tests; a weight's place in memory alone moves the last bits."""


class Exported:
    """Models of the families and their exports, each made once."""

    def __init__(self, make, tokenizer, place):
        self.make = make
        self.tokenizer = tokenizer
        self.place = place
        self.models: dict[str, Any] = {}

    def base(self, family):
        if family not in self.models:
            self.models[family] = self.make(family)
        return BaseModel(self.models[family], self.tokenizer, family)

    def __call__(self, family, path):
        folder = self.place / family / "-".join(map(str, path))
        if not folder.exists():
            export_path(self.base(family), path, folder)
        return loaded(folder)


@pytest.fixture(scope="module")
def exported(tiny_model, tiny_tokenizer, tmp_path_factory):
    return Exported(tiny_model, tiny_tokenizer, tmp_path_factory.mktemp("exports"))


@pytest.fixture
def base(tiny_llama, tiny_tokenizer):
    return BaseModel(tiny_llama(), tiny_tokenizer, "tiny")


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model):
    with torch.no_grad():
        result: Tensor = model(torch.tensor([PROMPT]), use_cache=False).logits
    return result


def listed(model, path):
    """Return a copy whose layers are listed in path order, what is said of each of them too."""
    slow = copy.deepcopy(model)
    stack, layers = find_layers(slow)
    name = next(name for name, child in stack.named_children() if child is layers)
    setattr(stack, name, nn.ModuleList([layers[index] for index in path]))
    for key in ("layer_types", "no_rope_layers"):
        if getattr(slow.config, key, None) is not None:
            setattr(slow.config, key, [getattr(slow.config, key)[index] for index in path])
    slow.config.num_hidden_layers = len(path)
    return slow


def refused(kind, base, path, output):
    before = sorted(output.parent.iterdir())
    with pytest.raises(kind) as caught:
        export_path(base, path, output)
    assert before == sorted(output.parent.iterdir()), "a refused export leaves nothing behind"
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- it is the path ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", [PLAN, BLOCK, BACKWARDS], ids=["plan", "block", "backwards"])
@pytest.mark.parametrize("family", IN_SUITE)
def test_logits_equal_those_of_the_layers_listed_by_hand(exported, family, path):
    expected = logits(listed(exported.base(family).model, path))
    found = logits(exported(family, path))
    torch.testing.assert_close(found, expected, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", IN_SUITE)
def test_logits_and_greedy_answers_equal_the_routed_models(exported, family):
    plain = exported(family, PLAN)
    model = copy.deepcopy(exported.base(family).model)
    ids = torch.tensor([PROMPT])
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
    }
    routed = RoutedModel(model)
    with routed.fixed(to_decisions(PLAN, 6)):
        expected = logits(routed.model)
        answer = routed.generate(ids, **options)
    torch.testing.assert_close(logits(plain), expected, atol=LOGIT_TOLERANCE, rtol=0)
    assert plain.generate(ids, **options).tolist() == answer.tolist()


def test_the_full_path_gives_the_base_model_again(exported):
    again = exported("llama", range(6))
    base = exported.base("llama").model
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
    assert made.dtype == "bfloat16"
    again = loaded(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, half.lm_head.weight)


def test_a_model_that_would_not_load_as_it_is_is_refused(base, tmp_path):
    base.model.to(torch.bfloat16)  # its table of rotations too, which loading keeps in float32
    message = refused(ArchitectureError, base, PLAN, tmp_path / "out")
    assert "changed after it was loaded" in message


# --- the folder --------------------------------------------------------------------------------


def test_what_is_written_is_reported(base, tmp_path):
    made = export_path(base, BLOCK, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    layer = sum(w.nbytes for name, w in stored.items() if name.startswith("model.layers.1."))
    assert (made.folder, made.path, made.dtype) == (tmp_path / "out", BLOCK, "float32")
    assert made.num_bytes == sum(weight.nbytes for weight in stored.values())
    assert made.num_repeated_bytes == 3 * layer
    assert made.num_bytes > made.num_repeated_bytes


def test_the_folder_holds_all_that_a_stock_checkpoint_has(base, tmp_path):
    base.model.generation_config.max_new_tokens = 7
    export_path(base, PLAN, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    wanted = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"}
    assert names >= {*wanted, "tokenizer_config.json", "README.md"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        tokenizer("ab", padding="max_length", max_length=4).input_ids
        == copy.deepcopy(base.tokenizer)("ab", padding="max_length", max_length=4).input_ids
    )
    assert tokenizer.chat_template == base.tokenizer.chat_template
    again = loaded(tmp_path / "out")
    assert type(again) is LlamaForCausalLM
    assert again.generation_config.max_new_tokens == 7
    modes = {(tmp_path / "out" / name).stat().st_mode for name in names}
    assert len(modes) == 1, "the weights can be read by whoever can read the rest"


def test_the_card_names_base_model_and_path(base, tmp_path):
    export_path(base, BACKWARDS, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert base.identity["fingerprint"] in card
    assert "\n    5 0 3\n" in card


def test_the_config_has_no_words_of_ours(base, tmp_path):
    export_path(base, PLAN, tmp_path / "out")
    base.model.save_pretrained(tmp_path / "base")
    ours, stock = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "base")
    )
    assert ours.keys() - stock.keys() <= {"rope_theta", "rope_scaling"}
    changed = {key for key in stock if ours[key] != stock[key]}
    assert changed <= {"_name_or_path"}, "six layers here, six there"


def test_a_generation_config_that_contradicts_itself_is_handed_on(base, tmp_path):
    base.model.generation_config.temperature = 0.5  # with do_sample off; saving refuses it
    export_path(base, PLAN, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["temperature"] == 0.5


def test_an_empty_folder_is_filled(base, tmp_path):
    (tmp_path / "out").mkdir()
    export_path(base, PLAN, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_missing_folders_above_it_are_made(base, tmp_path):
    export_path(base, PLAN, tmp_path / "deep" / "out")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"]


# --- the base model ----------------------------------------------------------------------------


def test_the_base_model_stays_as_it_is(exported, tmp_path):
    base = exported.base("gemma3_text")
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


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ([], "the path is empty"),
        ([0, 6], "6 at position 1 of the path (counted from 0)"),
        ([0, -1], "-1 at position 1"),
        ([0, 1.5], "1.5 at position 1"),
        ([True, 1], "True at position 0"),
        (["0"], "'0' at position 0"),
    ],
)
def test_a_path_that_the_model_does_not_have_is_refused(path, says):
    with pytest.raises(PathError) as caught:
        check_path(path, 6)
    assert says in str(caught.value)


def test_a_wrong_path_leaves_nothing(base, tmp_path):
    assert "indices from 0 to 5" in refused(PathError, base, [0, 9], tmp_path / "out")


def test_a_folder_with_something_in_it_is_refused(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert "isn't empty" in refused(ConfigError, base, PLAN, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_a_layer_whose_kind_follows_from_its_place_is_refused_elsewhere(
    tiny_model, tiny_tokenizer, tmp_path
):
    dense_first = BaseModel(tiny_model("deepseek_v3"), tiny_tokenizer, "tiny")
    message = refused(ArchitectureError, dense_first, [1, 2], tmp_path / "out")
    assert "layer 1, executed as number 0" in message
    assert "the class of mlp" in message
    export_path(dense_first, [0, 2, 2, 5], tmp_path / "out")


def test_every_other_layer_by_rule_is_refused_where_the_rule_breaks(
    tiny_model, tiny_tokenizer, tmp_path
):
    base = BaseModel(tiny_model("qwen2_moe", decoder_sparse_step=2), tiny_tokenizer, "tiny")
    assert "as the class of mlp" in refused(ArchitectureError, base, [0, 2, 3], tmp_path / "out")
    export_path(base, [0, 1, 4, 5], tmp_path / "out")


def test_a_scale_that_follows_from_the_place_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    """Newer transformers keep the scale as an attribute, older compute it as they go."""
    model = tiny_model("gpt2", attention="eager", scale_attn_by_inverse_layer_idx=True)
    base = BaseModel(model, tiny_tokenizer, "tiny")
    message = refused(ArchitectureError, base, [0, 2], tmp_path / "out")
    assert "scaling" in message or "logits differ" in message
    export_path(base, [0, 1, 2], tmp_path / "out")


def test_a_model_that_cannot_be_routed_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    base = BaseModel(tiny_model("lfm2"), tiny_tokenizer, "tiny")
    assert "not K/V" in refused(ArchitectureError, base, [0, 1], tmp_path / "out")


def test_a_class_of_somebody_elses_is_refused(base, tmp_path):
    class Own(LlamaForCausalLM):
        pass

    base.model.__class__ = Own
    message = refused(ArchitectureError, base, PLAN, tmp_path / "out")
    assert "Own isn't a class of transformers" in message


def test_a_model_with_something_put_on_it_is_refused(base, tmp_path):
    base.model.lm_head.extra = nn.Parameter(torch.zeros(1))
    message = refused(ArchitectureError, base, PLAN, tmp_path / "out")
    assert "lm_head.extra" in message


def test_a_routed_model_is_refused_and_stays_routed(base, tmp_path):
    routed = RoutedModel(base.model)
    assert "routed already" in refused(RoutingError, base, PLAN, tmp_path / "out")
    with routed.fixed([1, 0, 1, 1, 1, 1]):
        logits(routed.model)
    assert routed.last_route.tolist() == [[1, 0, 1, 1, 1, 1]]


# --- nothing appears that isn't right ----------------------------------------------------------


def spoiling(monkeypatch, spoil):
    """Let something happen to the files after they are written, before they are checked."""
    write = export._write

    def written(folder, *rest):
        write(folder, *rest)
        spoil(folder)

    monkeypatch.setattr(export, "_write", written)


def test_a_checkpoint_that_reads_otherwise_is_removed(base, tmp_path, monkeypatch):
    def other_base(folder):
        config = json.loads((folder / "config.json").read_text())
        config["rope_theta"] = 77.0
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 77.0}
        (folder / "config.json").write_text(json.dumps(config))

    spoiling(monkeypatch, other_base)
    assert "logits differ" in refused(ArchitectureError, base, PLAN, tmp_path / "out")


def test_a_checkpoint_with_another_weight_is_removed(base, tmp_path, monkeypatch):
    name = "model.layers.3.mlp.up_proj.weight"

    def other_weight(folder):
        weights = load_file(folder / "model.safetensors")
        weights[name][0, 0] += 1e-3
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    spoiling(monkeypatch, other_weight)
    assert name in refused(ArchitectureError, base, PLAN, tmp_path / "out")


def test_a_full_disk_is_said_in_one_line(base, tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    spoiling(monkeypatch, full)
    message = refused(ModelError, base, PLAN, tmp_path / "out")
    assert "No space left on device" in message
    assert str(tmp_path / "out") in message


def test_an_interruption_leaves_nothing(base, tmp_path, monkeypatch):
    def interrupted(folder):
        raise KeyboardInterrupt

    spoiling(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_path(base, PLAN, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
