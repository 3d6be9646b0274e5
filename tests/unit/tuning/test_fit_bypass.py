"""The stage that fits a bypass: what it writes, how it resumes, and what it is refused for."""

import base64
import json

import msgspec
import pytest
import torch
from peft import LoraConfig, get_peft_model

import drllm
from drllm.config import BypassConfig
from drllm.errors import ConfigError
from drllm.models.routed_model import attach
from drllm.models.routing.bypass_file import BYPASS_FILE, load_bypass_with_record, save_bypass
from drllm.tuning import bypass_solver
from drllm.tuning import fit_bypass as stage
from drllm.tuning.bypass_solver import MATRICES_PER_LAYER, SHARE_OF_MEMORY
from drllm.tuning.fit_bypass import fit_bypass

TEXTS = [f"text number {number} of a hundred, with some more words" for number in range(100)]
SMALL = {"tokens": 1500, "rank": 4}


@pytest.fixture
def base(tiny_base):
    return tiny_base()


def test_the_bypass_is_written_and_runs_on_its_model(base, tmp_path):
    bypass = fit_bypass(base, TEXTS, output_dir=tmp_path, **SMALL)
    found, record = load_bypass_with_record(tmp_path)
    assert found.sha256 == bypass.sha256
    assert (record.texts, record.num_tokens) == (("texts",), 1500)
    assert len(record.unexplained) == base.num_layers
    assert [file.name for file in tmp_path.iterdir() if file.name[0] != "."] == [BYPASS_FILE]
    routed = attach(base.model, tokenizer=base.tokenizer, bypass=tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        full = routed(ids).logits
        with routed.fixed([1, 0, 1, 1, 1, 1]):
            assert not torch.allclose(routed(ids).logits, full)
        routed.detach()


def test_a_map_is_nearer_to_its_layer_than_nothing_is(base):
    bypass = fit_bypass(base, TEXTS, **SMALL)
    ids = torch.tensor([base.tokenizer(TEXTS[0])["input_ids"]])
    distances = []
    for own in (bypass, None):
        routed = attach(base.model, tokenizer=base.tokenizer, bypass=own)
        with torch.no_grad():
            full = routed(ids).logits.log_softmax(dim=-1)
            with routed.fixed([1, 1, 0, 1, 1, 1]):
                found = routed(ids).logits.log_softmax(dim=-1)
        distances.append(float((full.exp() * (full - found)).sum(dim=-1).mean()))
    assert distances[0] < distances[1]


def test_the_same_call_returns_what_is_there_and_others_are_refused(base, tmp_path, monkeypatch):
    bypass = fit_bypass(base, TEXTS, output_dir=tmp_path, **SMALL)
    monkeypatch.setattr(stage, "BypassSolver", None)
    assert fit_bypass(base, TEXTS, output_dir=tmp_path, **SMALL).sha256 == bypass.sha256
    with pytest.raises(ConfigError, match="rank"):
        fit_bypass(base, TEXTS, output_dir=tmp_path, tokens=1500, rank=5)


class KilledError(Exception):
    """Stands for a kill."""


def test_a_damaged_map_of_a_killed_fit_is_solved_again(base, tmp_path, monkeypatch):
    expected = fit_bypass(base, TEXTS, **SMALL)

    def stop(*arguments):
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(stage, "join_solutions", stop)
        with pytest.raises(KilledError):
            fit_bypass(base, TEXTS, output_dir=tmp_path, **SMALL)
    folder = tmp_path / stage.PARTIAL_FOLDER
    kept = min(file for file in folder.glob("*.json") if "weights" in file.read_text())
    values = json.loads(kept.read_text())
    content = bytearray(base64.b64decode(values["weights"]["content"]))
    content[-1] ^= 1
    values["weights"]["content"] = base64.b64encode(content).decode()
    kept.write_text(json.dumps(values))
    assert fit_bypass(base, TEXTS, output_dir=tmp_path, **SMALL).sha256 == expected.sha256


def test_a_killed_fit_resumes_with_the_layers_that_are_solved_also_with_more_memory(
    base, tmp_path, monkeypatch
):
    expected = fit_bypass(base, TEXTS, **SMALL)
    layer_bytes = MATRICES_PER_LAYER * base.model.config.hidden_size**2 * 8
    room = [2 * layer_bytes / SHARE_OF_MEMORY]  # of two layers
    monkeypatch.setattr(bypass_solver, "free_bytes", lambda _device: room[0])
    solve = bypass_solver.BypassSolver.solve
    solved = []

    def solve_some(self, group):
        if len(solved) == 1:
            raise KilledError
        solved.append(list(group))
        return solve(self, group)

    with monkeypatch.context() as patched:
        patched.setattr(bypass_solver.BypassSolver, "solve", solve_some)
        with pytest.raises(KilledError):
            fit_bypass(base, TEXTS, output_dir=tmp_path, **SMALL)
    room[0] *= 1.5

    def solve_all(self, group):
        solved.append(list(group))
        return solve(self, group)

    monkeypatch.setattr(bypass_solver.BypassSolver, "solve", solve_all)
    found = fit_bypass(base, TEXTS, output_dir=tmp_path, **SMALL)
    assert solved == [[0, 1], [2, 3, 4], [5]]
    assert found.sha256 == expected.sha256
    assert not (tmp_path / stage.PARTIAL_FOLDER).exists()


def test_a_bypass_of_prompts_through_another_chat_template_is_refused(base, tmp_path, monkeypatch):
    rows = "".join(
        f'{{"question": "What is {n} and {n}?", "answer": "{2 * n}", "grader": "exact"}}\n'
        for n in range(60)
    )
    (tmp_path / "mine.jsonl").write_text(rows)

    def fit():
        return fit_bypass(
            base, [], str(tmp_path / "mine.jsonl"), output_dir=tmp_path / "out", **SMALL
        )

    bypass = fit()
    assert fit().sha256 == bypass.sha256
    monkeypatch.setattr(base.tokenizer, "chat_template", "{{ messages[0]['content'] }}!")
    with pytest.raises(ConfigError, match="was made with other prompts"):
        fit()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_bypass_of_another_adapter_is_refused(base, tmp_path):
    adapter = LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    model = get_peft_model(base.model, adapter)

    def fit():
        return fit_bypass(model, TEXTS, output_dir=tmp_path, tokenizer=base.tokenizer, **SMALL)

    bypass = fit()
    assert fit().sha256 == bypass.sha256
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(2)
    with pytest.raises(ConfigError, match="was made with runtime adapters"):
        fit()


def test_sequences_longer_than_what_the_model_reads_are_refused(tiny_base):
    base = tiny_base(max_position_embeddings=16)
    with pytest.raises(ConfigError, match="--max-tokens is 20, and this model reads 16 tokens"):
        fit_bypass(base, TEXTS, max_tokens=20, **SMALL)


def test_a_bypass_of_an_older_version_is_not_compared_by_its_prompts(base, tmp_path):
    bypass = fit_bypass(base, TEXTS, output_dir=tmp_path, **SMALL)
    _, record = load_bypass_with_record(tmp_path)
    made_from = {key: value for key, value in record.made_from.items() if key != stage.PROMPTS}
    assert len(made_from) == len(record.made_from) - 1
    save_bypass(
        tmp_path / BYPASS_FILE, bypass, msgspec.structs.replace(record, made_from=made_from)
    )
    assert fit_bypass(base, TEXTS, output_dir=tmp_path, **SMALL).sha256 == bypass.sha256


def test_a_rank_above_the_hidden_size_is_the_full_rank(base):
    bypass = fit_bypass(base, TEXTS, tokens=1500, rank=10_000)
    assert bypass.rank == base.model.config.hidden_size


@pytest.mark.parametrize("verb", ["tune", "heal", "shrink"])
def test_a_model_with_a_bypass_is_not_tuned_healed_or_shrunk(base, verb):
    bypass = fit_bypass(base, TEXTS, **SMALL)
    routed = attach(base.model, tokenizer=base.tokenizer, bypass=bypass)
    calls = {
        "tune": lambda: drllm.tune(routed, "builtin_facts", repair="none"),
        "heal": lambda: drllm.heal(routed, drllm.StaticPath([0, 1, 3, 4, 5]), texts=TEXTS, steps=1),
        "shrink": lambda: drllm.shrink(routed, "builtin_facts", max_drop=90),
    }
    with pytest.raises(ConfigError, match="without a bypass"):
        calls[verb]()


def test_a_model_with_a_bypass_is_not_exported_and_gets_no_other(base, tmp_path):
    bypass = fit_bypass(base, TEXTS, **SMALL)
    routed = attach(base.model, tokenizer=base.tokenizer, bypass=bypass)
    with pytest.raises(ConfigError, match="export writes an ordinary checkpoint without a bypass"):
        routed.export([0, 1, 2], tmp_path / "out")
    with pytest.raises(ConfigError, match="has a bypass already"):
        fit_bypass(routed, TEXTS, config=BypassConfig(tokens=1500))


def test_the_verb_writes_a_bypass_that_searches_use(drllm, model_folder, tmp_path):
    folder = model_folder()
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(TEXTS))
    output = tmp_path / "bypass"
    out = drllm(
        f"bypass --model {folder} --device cpu --text {texts} --tokens 1500 --rank 4 --output-dir",
        output,
    ).out
    assert str(output / BYPASS_FILE) in out
    assert "rank 4" in out
    search = f"search --model {folder} --device cpu --bypass {output} --tasks builtin_facts"
    drllm(f"{search} --limit 2 --num-simulations 4 --output-dir", tmp_path / "run")
    manifest = drllm_manifest(tmp_path / "run")
    assert manifest["model"]["bypass"] == load_bypass_with_record(output)[0].sha256


def drllm_manifest(folder):
    import json

    return json.loads((folder / "search.manifest.json").read_text())
