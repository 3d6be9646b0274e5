"""The fit of a bypass against a regression on all tokens at once, and what the stage writes."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

import drllm as package
from drllm.config import BypassConfig
from drllm.errors import ConfigError, ModelError, TaskError
from drllm.models.routed_model import RoutedModel, attach
from drllm.models.routing.bypass import normalise
from drllm.models.routing.bypass_file import BYPASS_FILE, load_bypass_with_record
from drllm.prune import bypass as module
from drllm.prune.bypass import RIDGES, fit_bypass, join_maps, solve_bypass
from drllm.prune.repairs.refit import split_for_ridge

TEXTS = [f"text number {number} of a hundred, with some more words" for number in range(100)]
SMALL = {"tokens": 1500, "rank": 4}


def make_texts(num_texts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (num_texts,), generator=generator).tolist()
    return [
        tuple(torch.randint(3, 90, (length,), generator=generator).tolist()) for length in lengths
    ]


def read_states(model, texts, layer):
    """Return n(h) and what the layer adds of all tokens, and which are first ones, text by text."""
    inputs, changes, is_first = [], [], []
    calls = []
    hook = model.model.layers[layer].register_forward_hook(
        lambda _layer, args, output: calls.append((args[0][0], output[0])), with_kwargs=False
    )
    for text in texts:
        model(torch.tensor([text]))
        states, output = (values.double() for values in calls.pop())
        inputs.append(normalise(states))
        changes.append(output - states)
        is_first.append(torch.arange(len(text)) == 0)
    hook.remove()
    return torch.cat(inputs), torch.cat(changes), torch.cat(is_first)


def regress(inputs, changes, ridge, rank):
    """Return W and b of a rank: λ as rows of their own, the rank by the SVD of the values."""
    mean, deviation = inputs.mean(dim=0), inputs.std(dim=0, correction=0)
    rows = (inputs - mean) / deviation
    penalty = (ridge * len(rows)) ** 0.5 * torch.eye(rows.shape[1], dtype=rows.dtype)
    values = torch.cat([changes - changes.mean(dim=0), torch.zeros_like(penalty)])
    solution = torch.linalg.lstsq(torch.cat([rows, penalty]), values).solution
    axes = torch.linalg.svd(rows @ solution).Vh[:rank]
    weight = axes.T @ axes @ (solution / deviation[:, None]).T
    return weight, changes.mean(dim=0) - weight @ mean


@pytest.mark.parametrize("rank", [4, 32])
def test_a_map_is_the_regression_on_all_tokens_cut_to_its_rank(tiny_llama, rank):
    model = tiny_llama()
    texts = make_texts(80)
    routed = RoutedModel(model)
    maps, unexplained = solve_bypass(routed, texts, rank)
    routed.detach()
    assert len(maps) == 6
    for layer in (0, 3):
        parts = []
        for part in (*split_for_ridge(texts), texts):
            inputs, changes, is_first = read_states(model, part, layer)
            parts.append((inputs[~is_first], changes[~is_first]))
        fit, (held_out, targets), whole = parts

        def error(weight, bias, held_out=held_out, targets=targets):
            return float((targets - held_out @ weight.T - bias).square().sum())

        errors = {ridge: error(*regress(*fit, ridge, 32)) for ridge in RIDGES}
        best = min(errors, key=errors.get)
        share = error(*regress(*fit, best, rank)) / float(targets.square().sum())
        assert unexplained[layer] == pytest.approx(share, rel=1e-4)
        weight, bias = regress(*whole, best, rank)
        found = maps[layer]
        assert torch.allclose(found.up @ found.down, weight, atol=1e-5)
        assert torch.allclose(found.bias, bias, atol=1e-5)
        assert torch.allclose(found.first, changes[is_first].mean(dim=0), atol=1e-5)


def test_layers_in_groups_that_fit_into_memory_get_the_same_maps(tiny_llama, monkeypatch):
    routed = RoutedModel(tiny_llama())
    texts = make_texts(60)
    expected, _ = solve_bypass(routed, texts, 4)
    layer_bytes = module.MATRICES_PER_LAYER * 32**2 * 8
    room = 4 * layer_bytes / module.SHARE_OF_MEMORY
    monkeypatch.setattr(module, "free_bytes", lambda _device: room)
    steps = []
    found, _ = solve_bypass(routed, texts, 4, lambda done, total: steps.append((done, total)))
    assert steps == [(done + 1, len(steps)) for done in range(len(steps))]
    assert join_maps(found, {}).sha256 == join_maps(expected, {}).sha256


def test_a_layer_that_does_nothing_gets_a_map_that_does_nothing(tiny_llama):
    model = tiny_llama()
    model.model.layers[2].self_attn.o_proj.weight.data.zero_()
    model.model.layers[2].mlp.down_proj.weight.data.zero_()
    maps, unexplained = solve_bypass(RoutedModel(model), make_texts(60), 4)
    states = torch.randn(5, 32)
    assert torch.equal(join_maps(maps, {}).skip(2, states), states)
    assert unexplained[2] == 0


def test_inputs_that_are_the_same_in_all_tokens_are_left_to_the_bias(tiny_llama):
    texts = [(7,) * length for length in range(10, 20)]  # one token, so one state at layer 0
    model = tiny_llama()
    maps, unexplained = solve_bypass(RoutedModel(model), texts, 4)
    package.detach(model)
    _, changes, _ = read_states(model, texts[:1], 0)
    state = model.model.embed_tokens(torch.tensor([7]))
    assert torch.allclose(
        join_maps(maps, {}).skip(0, state), state + changes[-1:].float(), atol=1e-4
    )
    assert unexplained[0] < 1e-3


def test_states_that_are_not_finite_and_a_single_text_are_refused(tiny_llama):
    model = tiny_llama()
    model.model.layers[3].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="layer 3 can't have a bypass, since the states"):
        solve_bypass(RoutedModel(model), make_texts(60), 4)
    with pytest.raises(TaskError, match="a bypass needs at least 2 texts"):
        solve_bypass(RoutedModel(tiny_llama()), make_texts(1), 4)


@pytest.fixture
def base(tiny_base):
    return tiny_base()


def test_the_bypass_is_written_and_returned_again_and_another_one_is_refused(
    base, tmp_path, monkeypatch
):
    bypass = fit_bypass(base, TEXTS, output_dir=tmp_path, **SMALL)
    _, record = load_bypass_with_record(tmp_path)
    assert (record.texts, record.num_tokens) == (("texts",), 1500)
    assert len(record.unexplained) == base.num_layers
    assert [file.name for file in tmp_path.iterdir() if file.name[0] != "."] == [BYPASS_FILE]
    assert fit_bypass(base, TEXTS, **SMALL).sha256 == bypass.sha256
    monkeypatch.setattr(module, "solve_bypass", None)
    assert fit_bypass(base, TEXTS, output_dir=tmp_path, **SMALL).sha256 == bypass.sha256
    with pytest.raises(ConfigError, match="was made with rank 4, now 5; choose another"):
        fit_bypass(base, TEXTS, output_dir=tmp_path, tokens=1500, rank=5)
    with pytest.raises(ConfigError, match="was made with texts"):
        fit_bypass(base, "builtin_texts", output_dir=tmp_path, **SMALL)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_bypass_of_another_adapter_is_refused(base, tmp_path):
    adapter = LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    model = get_peft_model(base.model, adapter)
    options = {"output_dir": tmp_path, "tokenizer": base.tokenizer, **SMALL}
    bypass = fit_bypass(model, TEXTS, **options)
    assert fit_bypass(model, TEXTS, **options).sha256 == bypass.sha256
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(2)
    with pytest.raises(ConfigError, match="was made with runtime adapters"):
        fit_bypass(model, TEXTS, **options)


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


@pytest.mark.parametrize(
    "row",
    [
        {"question": "What is {n} and {n}?", "answer": "{n}!", "grader": "exact"},
        {"question": "Is {n} even?", "choices": ["yes", "no"], "answer": 1},
        {"question": "Say {n} again."},
    ],
    ids=["answers", "options", "prompts alone"],
)
def test_questions_of_search_and_fit_with_their_right_answers_are_texts(
    base, tmp_path, monkeypatch, row
):
    file = tmp_path / "mine.jsonl"
    rows = [json.dumps(row).replace("{n}", str(number)) for number in range(60)]
    file.write_text("\n".join(rows))
    task = package.get_task(str(file))
    read = []
    monkeypatch.setattr(module, "solve_bypass", lambda _routed, texts, *_: read.extend(texts))
    with pytest.raises(TypeError):  # no maps
        fit_bypass(base, tasks=str(file), texts=["a text"], tokens=10**6)
    texts = [base.tokenizer.decode(text) for text in read]
    examples = task.examples("search") + task.examples("fit")
    assert len(texts) == len(examples) + 1
    for example in examples:
        end = example.answer or "assistant: "
        assert [text for text in texts if example.question in text and text.endswith(end)]


def test_a_worked_solution_follows_the_plain_question(base):
    task = package.get_task("builtin_arithmetic")
    example = replace(task.examples("search")[0], question="How many?", solution="One, so 1.")
    [text] = module._tokenize_questions(base, task, [example])
    assert base.tokenizer.decode(text) == "Question: How many?\nAnswer: One, so 1."


def test_what_can_not_be_fitted_is_refused_in_one_line(tiny_base, tmp_path):
    short = tiny_base(max_position_embeddings=16)
    with pytest.raises(ConfigError, match="--max-tokens is 20, and this model reads 16 tokens"):
        fit_bypass(short, TEXTS, max_tokens=20, **SMALL)
    base = tiny_base()
    with pytest.raises(ConfigError, match="there is nothing to fit on"):
        fit_bypass(base)
    file = tmp_path / "builtin_facts.txt"
    file.write_text("a text")
    with pytest.raises(ConfigError, match=r"two tasks or files .* are called 'builtin_facts'"):
        fit_bypass(base, str(file), "builtin_facts")


def test_a_model_with_a_bypass_is_not_shortened_and_gets_no_other(base, tmp_path):
    bypass = fit_bypass(base, TEXTS, tokens=1500, rank=10_000)
    assert bypass.rank == base.model.config.hidden_size
    routed = attach(base.model, tokenizer=base.tokenizer, bypass=bypass)
    with pytest.raises(ConfigError, match="without a bypass"):
        package.shrink(routed, "builtin_facts", tmp_path / "smaller")
    with pytest.raises(ConfigError, match="without a bypass"):
        package.learn(base.model, "builtin_facts", teacher=routed, minutes=0)
    with pytest.raises(ConfigError, match="has a bypass already"):
        fit_bypass(routed, TEXTS, config=BypassConfig(tokens=1500))


def test_the_verb_writes_a_bypass_that_searches_use(drllm, model_folder, tmp_path):
    folder = model_folder()
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(TEXTS))
    output = tmp_path / "bypass"
    fit = f"bypass --model {folder} --device cpu --text {texts} --tokens 1500 --rank 4"
    out = drllm(f"{fit} --output-dir", output).out
    assert str(output / BYPASS_FILE) in out
    assert "rank 4" in out
    search = f"search --model {folder} --device cpu --bypass {output} --tasks builtin_facts"
    drllm(f"{search} --limit 2 --num-simulations 4 --output-dir", tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "search.manifest.json").read_text())
    assert manifest["model"]["bypass"] == load_bypass_with_record(output)[0].sha256
