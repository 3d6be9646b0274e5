"""The costs of gaps against plain models, the best sets against all sets, and `paths.json`."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drllm.config.gaps import count_fewest_layers
from drllm.errors import ConfigError, PathError, RecordError, TaskError
from drllm.model.layers import find_layers
from drllm.model.submodel import shorten
from drllm.models.routed_model import RoutedModel
from drllm.prune import choose, gaps
from drllm.prune.choose import choose_paths, gap_costs
from drllm.prune.gaps import LONGEST, RIDGES, GapCosts, GapTable, find_best_sets, list_layers
from drllm.prune.states import measure_text_losses
from drllm.records.gaps import parse_layers, read_gaps

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def make_texts(num_texts=40, num_characters=30):
    """Return texts of random letters."""
    generator = torch.Generator().manual_seed(1)
    texts = []
    for _ in range(num_texts):
        places = torch.randint(len(LETTERS), (num_characters,), generator=generator)
        texts.append("".join(LETTERS[place] for place in places))
    return texts


def make_tokens(num_texts=60):
    generator = torch.Generator().manual_seed(2)
    texts = []
    for number in range(num_texts):
        tokens = torch.randint(4, 100, (6 + number % 9,), generator=generator)
        texts.append(tuple(tokens.tolist()))
    return texts


def make_idle(model, layer):
    """Let a layer do nothing."""
    module = find_layers(model)[1][layer]
    module.self_attn.o_proj.weight.data.zero_()
    module.mlp.down_proj.weight.data.zero_()
    return model


@pytest.fixture
def table(tiny_llama):
    """A table of a tiny model, and the model."""
    model = tiny_llama()
    routed = RoutedModel(model)
    made = GapTable(routed, make_tokens())
    yield made, model
    routed.detach()


# The best sets of gaps.


def list_all_sets(costs, num_layers, num_out):
    """Return (cost, gaps) of each set of layers to leave out whose gaps all have a cost."""
    found = []
    for skip in itertools.combinations(range(1, num_layers - 1), num_out):
        runs = []
        for layer in skip:
            if runs and runs[-1][1] == layer:
                runs[-1] = (runs[-1][0], layer + 1)
            else:
                runs.append((layer, layer + 1))
        if all(gap in costs for gap in runs):
            found.append((sum(costs[gap] for gap in runs), tuple(runs)))
    return sorted(found)


@settings(deadline=None)
@given(data=st.data(), num_layers=st.integers(3, 7), number=st.integers(1, 5))
def test_the_best_sets_are_those_of_all_sets(data, num_layers, number):
    every = [(i, k) for i in range(1, num_layers) for k in range(i + 1, num_layers + 1)]
    amounts = st.floats(0.1, 9)
    costs = data.draw(st.dictionaries(st.sampled_from(every), amounts, max_size=len(every)))
    num_out = data.draw(st.integers(1, num_layers - 1))
    expected = list_all_sets(costs, num_layers, num_out)
    found = find_best_sets(costs, num_layers, num_out, number)
    sums = [sum(costs[gap] for gap in of_set) for of_set in found]
    assert sums == pytest.approx([cost for cost, _ in expected[:number]])
    assert {tuple(of_set) for of_set in found} <= {tuple(of_set) for _, of_set in expected}
    assert len(set(found)) == len(found)


def test_sets_of_short_gaps_come_before_longer_ones():
    cheap = {(1, 4): 0.1, (1, 2): 1.0, (3, 4): 1.0, (5, 6): 1.0}
    sets = GapCosts(8, cheap).list_sets(3, 2)
    assert sets == [((1, 2), (3, 4), (5, 6)), ((1, 4),)]


def test_too_many_layers_are_refused():
    with pytest.raises(ConfigError, match="kept layer stands between"):
        GapCosts(4, {(1, 2): 1.0, (2, 3): 1.0}).best(2)


# The costs.


@torch.no_grad()
def list_states(model, texts):
    """Return what enters each layer at each token but the first, `[L][n, D]`, and at the first."""
    others = []
    first = []
    for text in texts:
        states = model(torch.tensor([text]), output_hidden_states=True).hidden_states[:-1]
        others.append(torch.stack([state[0, 1:] for state in states]))
        first.append(torch.stack([state[0, 0] for state in states]))
    return torch.cat(others, dim=1).double(), torch.stack(first, dim=1).double()


def divide(states):
    return states / states.square().mean(dim=-1, keepdim=True).sqrt()


def solve_bridge(model, texts, i, k):
    """Return W, the bias and the cheap cost by one least-squares problem for each ridge."""
    states, _ = list_states(model, [text for place, text in enumerate(texts) if place % 5])
    held_out, _ = list_states(model, texts[::5])
    inputs = divide(states[i])
    mean = inputs.mean(dim=0)
    changes = states[k] - states[i]
    bias = changes.mean(dim=0)
    centred = inputs - mean
    size = centred.square().mean().sqrt()
    found = []
    for ridge in RIDGES:
        penalty = torch.eye(len(mean)).double() * size * (ridge * len(centred)) ** 0.5
        zeros = torch.zeros(len(mean), len(mean)).double()
        rows = torch.cat([centred, penalty])
        weight = torch.linalg.lstsq(rows, torch.cat([changes - bias, zeros])).solution
        bridged = held_out[i] + (divide(held_out[i]) - mean) @ weight + bias
        errors = (held_out[k] - bridged).square().sum(dim=1) / held_out[k].square().sum(dim=1)
        found.append((float(errors.mean().sqrt()), weight, bias - mean @ weight))
    return min(found, key=lambda each: each[0])


def test_the_cheap_cost_is_that_of_one_least_squares_problem(table):
    made, model = table
    costs = made.measure_cheap(lambda *_: None)
    assert sorted(costs.cheap) == [
        (1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (2, 5), (3, 4), (3, 5), (4, 5),
    ]  # fmt: skip
    for gap, cost in costs.cheap.items():
        assert cost == pytest.approx(solve_bridge(model, make_tokens(), *gap)[0], rel=1e-3)


@torch.no_grad()
def test_the_exact_cost_is_that_of_a_model_whose_layer_gets_the_bridged_state(table):
    made, model = table
    texts = make_tokens()
    i, k = 2, 4
    _, weight, bias = solve_bridge(model, texts, i, k)
    _, first = list_states(model, [text for place, text in enumerate(texts) if place % 5])
    change = (first[k] - first[i]).mean(dim=0)
    entering = {}

    def keep(_module, args):
        entering["state"] = args[0].double()

    def put(_module, args):
        state = entering["state"]
        bridged = state + divide(state) @ weight + bias
        bridged[:, 0] = state[:, 0] + change
        return (bridged.float(), *args[1:])

    divergences = []
    for text in texts[::5]:
        ids = torch.tensor([text])
        full = model(ids).logits[0].log_softmax(dim=-1)
        layers = find_layers(model)[1]
        hooks = [layers[i].register_forward_pre_hook(keep)]
        hooks.append(layers[k].register_forward_pre_hook(put))
        found = model(ids).logits[0].log_softmax(dim=-1)
        for hook in hooks:
            hook.remove()
        divergences.append((full.exp() * (full - found)).sum(dim=1))
    expected = float(torch.cat(divergences).mean())
    assert expected > 0
    assert made.measure_exact([(i, k)], lambda *_: None) == {
        (i, k): pytest.approx(expected, rel=1e-3)
    }


def test_a_layer_that_does_nothing_costs_nothing_and_goes_first(tiny_llama, tiny_tokenizer):
    model = make_idle(tiny_llama(), 3)
    costs = gap_costs(model, make_texts(), tokenizer=tiny_tokenizer)
    assert costs.cheap[3, 4] == pytest.approx(0, abs=1e-6)
    assert costs.best(1) == [3]


def test_too_few_texts_are_refused(tiny_llama, tiny_tokenizer):
    with pytest.raises(TaskError, match="at least 10 texts"):
        gap_costs(tiny_llama(), make_texts(9), tokenizer=tiny_tokenizer)


def test_the_model_is_as_before_after_costs_were_measured(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    forward = type(model).forward
    gap_costs(model, make_texts(), tokenizer=tiny_tokenizer)
    assert all(torch.equal(weights[name], each) for name, each in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert type(model).forward is forward


def test_fewer_tokens_are_read_where_little_memory_is_free(tiny_llama, monkeypatch):
    routed = RoutedModel(tiny_llama())
    texts = make_tokens()
    room = 200  # tokens
    monkeypatch.setattr(gaps, "free_bytes", lambda device: 2 * room * 7 * 32 * 4)
    few = GapTable(routed, texts)
    routed.detach()
    longest = max(map(len, texts))
    assert room <= few.num_tokens < room + longest
    assert few.num_tokens < sum(len(text) - 1 for text in texts)


# The choice.


@pytest.fixture
def chosen(tiny_base, tmp_path, monkeypatch):
    """Paths of a tiny model, the folder of `paths.json`, and what each refit was made of.

    From set to set the loss seems to fall before a refit, and to rise after it.
    """
    calls = []

    def measure(_model, _texts):
        calls.append(1)
        number = len(calls)  # the full model's, then two of each set
        return -number if number % 2 == 0 else number

    monkeypatch.setattr(choose, "measure_text_loss", measure)
    solved = []
    solve_gaps = choose.solve_gaps

    def solve(short, *args):
        solved.append(list(short.config.kept_layers))
        return solve_gaps(short, *args)

    monkeypatch.setattr(choose, "solve_gaps", solve)
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(150)))
    rows = tmp_path / "sums.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"question": f"{n} + 1 =", "choices": [str(n + 1), str(n)], "answer": 0})
            + "\n"
            for n in range(60)
        )
    )
    base = tiny_base()
    folder = tmp_path / "gaps"
    record = choose_paths(base, str(rows), None, folder, texts=str(file), layers="5,4")
    return record, folder, solved, base


def test_the_set_that_loses_least_after_its_refit_stays(chosen):
    record, _, solved, base = chosen
    assert [len(path.skip) for path in record.paths] == [1, 2]
    for path in record.paths:
        tried = [each for each in record.tried if len(each.skip) == len(path.skip)]
        assert path == tried[0]
    assert len(tried) > 1
    kept = [[layer for layer in range(6) if layer not in each.skip] for each in record.tried]
    assert solved == kept
    assert set(record.texts) == {"sums", "texts"}
    assert base.num_layers == 6


def test_paths_are_written_and_read_again(chosen):
    record, folder, _, _ = chosen
    assert read_gaps(folder / "paths.json") == record
    assert parse_layers(f"{folder}:4") == list(record.paths[1].skip)
    assert parse_layers(f"{folder / 'paths.json'}:5") == list(record.paths[0].skip)
    with pytest.raises(PathError, match="no path of 3 layers"):
        parse_layers(f"{folder}:3")


def test_the_plain_loss_is_that_of_the_model_without_the_layers(chosen, tiny_llama):
    record, _, _, base = chosen
    texts = make_tokens()[:5]
    expected = []
    for skip in ([], record.paths[0].skip):
        model = shorten(base.model, skip) if skip else base.model
        with torch.no_grad():
            losses = [
                float(model(torch.tensor([text]), labels=torch.tensor([text])).loss)
                for text in texts
            ]
        assert measure_text_losses(model, texts) == pytest.approx(losses, rel=1e-4)
        expected.append(losses)
    assert expected[0] != expected[1]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("2-4,14", [2, 3, 4, 14]), ("7", [7]), (" 1 , 3-3", [1, 3])],
)
def test_layers_and_ranges_are_read(text, layers):
    assert parse_layers(text) == layers
    assert list_layers([(layer, layer + 1) for layer in layers]) == layers


@pytest.mark.parametrize("text", ["", "two", "-3", "3-", "1,,2", "4-2", "2-4-6", "1.5"])
def test_what_names_no_layers_is_refused(text):
    with pytest.raises(PathError):
        parse_layers(text)


def test_a_damaged_file_of_paths_is_refused(tmp_path):
    (tmp_path / "paths.json").write_text("{")
    with pytest.raises(RecordError):
        parse_layers(f"{tmp_path}:3")
    with pytest.raises(RecordError):
        parse_layers(f"{tmp_path / 'none.json'}:3")


@pytest.mark.parametrize("num_layers", range(3, 12))
def test_the_fewest_layers_that_are_accepted_are_those_that_gaps_can_leave(num_layers):
    longest = math.ceil(max(LONGEST) * num_layers)
    costs = {
        (first, end): 1.0
        for first in range(1, num_layers)
        for end in range(first + 1, num_layers)
        if end - first <= longest
    }
    fewest = count_fewest_layers(num_layers)
    assert find_best_sets(costs, num_layers, num_layers - fewest, 1)
    assert not find_best_sets(costs, num_layers, num_layers - fewest + 1, 1)
