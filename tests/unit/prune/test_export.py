"""Exported checkpoints load with transformers alone, and nothing is left of one that doesn't."""

import json

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from drllm.errors import ArchitectureError, ConfigError, DrllmError
from drllm.model.submodel import shorten
from drllm.prune import export as module
from drllm.prune.export import count_bytes, export
from drllm.prune.repairs.refit import solve_gaps

IDS = torch.tensor([list(range(5, 25))])
SKIP = [1, 3]
FAMILIES = {
    "llama": {"rope_theta": 50000.0},
    "gemma3_text": {"rope_theta": 50000.0, "rope_local_base_freq": 3000.0},
    "gpt2": {},
    "qwen3_moe": {},
}
REPORT = {
    "repairs": [
        {"name": "refit", "kept": True, "tokens": 1234, "gaps": [{"map": "0.mlp.down_proj"}]},
        {"name": "lora", "kept": False, "draws": 987, "minutes": 1.0},
    ]
}


class Verdict:
    """Stands in for the record of a shrink."""

    verdict = "OK: all of it."

    def to_markdown(self):
        return "| layers |"


@pytest.fixture
def exported(tiny_base, tmp_path):
    """A refitted model, the full one, and the folder of its checkpoint."""
    base = tiny_base(name="owner/base")
    base.model.generation_config = GenerationConfig(max_new_tokens=7, temperature=0.3)
    short = shorten(base.model, SKIP)
    solve_gaps(short, base.model, [tuple(range(5 + n, 15 + n)) for n in range(8)])
    folder = tmp_path / "smaller"
    num_bytes = export(short, base, folder, report=REPORT)
    assert num_bytes == count_bytes(short) < count_bytes(base.model)
    return short, base, folder


@torch.no_grad()
def compute_logits(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_each_family_has_the_logits_of_the_model(
    family, tiny_model, tiny_base, tmp_path
):
    base = tiny_base(tiny_model(family, **FAMILIES[family]))
    short = shorten(base.model, SKIP)
    export(short, base, tmp_path / "smaller")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert type(loaded) is type(short)
    torch.testing.assert_close(compute_logits(loaded), compute_logits(short))


def test_the_checkpoint_has_the_repaired_weights(exported):
    short, base, folder = exported
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, short.state_dict()[name]), name
    assert loaded.config.num_hidden_layers == 4
    assert loaded.config.kept_layers == [0, 2, 4, 5]
    plain = shorten(base.model, SKIP)
    assert not torch.equal(compute_logits(loaded), compute_logits(plain))


def test_the_tokenizer_and_the_settings_of_generation_are_there(exported, tiny_tokenizer):
    short, _, folder = exported
    words = AutoTokenizer.from_pretrained(folder)
    assert words("some text").input_ids == tiny_tokenizer("some text").input_ids
    assert words.chat_template == tiny_tokenizer.chat_template
    assert GenerationConfig.from_pretrained(folder).max_new_tokens == 7
    assert GenerationConfig.from_pretrained(folder).temperature == 0.3
    assert short.generation_config.max_new_tokens == 7  # put back


def test_the_config_has_the_words_of_transformers_4_too(tiny_model, tiny_base, tmp_path):
    base = tiny_base(tiny_model("llama", rope_theta=50000.0))
    export(shorten(base.model, SKIP), base, tmp_path / "smaller")
    config = json.loads((tmp_path / "smaller" / "config.json").read_text())
    assert config["rope_theta"] == 50000.0


def test_the_card_names_base_layers_and_the_kept_repairs(exported):
    _, _, folder = exported
    card = (folder / "README.md").read_text()
    assert "`owner/base`" in card
    assert "4 of 6 layers" in card
    assert "without the layers 1, 3" in card
    assert "1,234 tokens" in card
    assert "`0.mlp.down_proj`" in card
    assert "987" not in card  # an undone repair


def test_a_model_without_repairs_is_said_to_be_a_copy(tiny_base, tmp_path):
    base = tiny_base()
    export(shorten(base.model, SKIP), base, tmp_path / "smaller")
    assert "copy" in (tmp_path / "smaller" / "README.md").read_text()


def test_records_are_written_and_the_card_has_the_verdict(tiny_base, tmp_path, monkeypatch):
    base = tiny_base()
    written = []
    monkeypatch.setattr(module, "write_json", lambda file, record: written.append(file.name))
    records = {"shrink.json": Verdict()}
    export(shorten(base.model, SKIP), base, tmp_path / "smaller", records=records)
    assert written == ["shrink.json"]
    card = (tmp_path / "smaller" / "README.md").read_text()
    assert "OK: all of it." in card
    assert "| layers |" in card


def test_weights_that_differ_after_loading_are_refused_and_nothing_is_left(
    tiny_base, tmp_path, monkeypatch
):
    base = tiny_base()
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def load_other(*args, **options):
        loaded = from_pretrained(*args, **options)
        loaded.lm_head.weight.data[3, 4] += 1e-3
        return loaded

    monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", load_other)
    with pytest.raises(ArchitectureError, match="lm_head"):
        export(shorten(base.model, SKIP), base, tmp_path / "smaller")
    assert not list(tmp_path.iterdir())


def test_other_logits_after_loading_are_refused_and_nothing_is_left(tiny_base, tmp_path):
    base = tiny_base()
    short = shorten(base.model, SKIP)
    short.model.layers[1].register_forward_hook(lambda _module, _args, output: output * 1.1)
    with pytest.raises(ArchitectureError, match="logits"):
        export(short, base, tmp_path / "smaller")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_nothing_is_left(tiny_base, tmp_path, monkeypatch):
    base = tiny_base()
    short = shorten(base.model, SKIP)

    def fail(*_args, **_options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(type(short), "save_pretrained", fail)
    with pytest.raises(DrllmError, match="No space left") as caught:
        export(short, base, tmp_path / "smaller")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_refused_and_an_empty_one_is_filled(tiny_base, tmp_path):
    base = tiny_base()
    short = shorten(base.model, SKIP)
    folder = tmp_path / "smaller"
    folder.mkdir()
    export(short, base, folder)
    files = sorted(file.name for file in folder.iterdir())
    assert "config.json" in files
    with pytest.raises(ConfigError, match="empty"):
        export(short, base, folder)
    assert sorted(file.name for file in folder.iterdir()) == files
