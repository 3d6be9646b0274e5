"""The stand-in for a refit: linear maps in gaps, fitted on the full path's states."""

import math

import pytest
import torch

from drllm.errors import ConfigError
from drllm.models.routed_model import RoutedModel
from drllm.models.scoring.score import Request, score
from drllm.paths import Gap, StaticPath
from drllm.tuning import stand_in
from drllm.tuning.refit import split_for_ridge
from drllm.tuning.stand_in import StandIn, fit_stand_in

GAPS = [Gap(0, 2), Gap(1, 4), Gap(3, 6)]


@pytest.fixture(scope="module")
def routed(tiny_llama, tiny_tokenizer):
    return RoutedModel(tiny_llama(), tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def texts():
    """Texts of random tokens, more tokens than the states have entries."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(120):
        tokens = torch.randint(4, 40, (6 + number % 9,), generator=generator)
        made.append(tuple(tokens.tolist()))
    return made


class OutputRecorder:
    """A hook that records what layers return."""

    def __init__(self):
        self.outputs = []

    def __call__(self, _layer, _args, output):
        self.outputs.append(output[0] if isinstance(output, tuple) else output)


@torch.no_grad()
def states_alone(model, texts):
    """Return what each layer returns on each text, run alone: `[texts][L][T, D]`."""
    by_text = []
    for text in texts:
        recorder = OutputRecorder()
        hooks = [layer.register_forward_hook(recorder) for layer in model.model.layers]
        model(torch.tensor([text]), use_cache=False)
        for hook in hooks:
            hook.remove()
        by_text.append([state.reshape(len(text), -1) for state in recorder.outputs])
    return by_text


def solve_alone(states, gap, ridge):
    """Solve the map of a gap by least squares on a table with a row for each token."""
    inputs = torch.cat([layers[gap.layer][1:] for layers in states]).double()
    differences = torch.cat(
        [layers[gap.next_layer - 1][1:] - layers[gap.layer][1:] for layers in states]
    ).double()
    inputs = inputs / inputs.square().mean(dim=1, keepdim=True).sqrt()
    mean = inputs.mean(dim=0)
    deviation = inputs.std(dim=0, correction=0)
    table = (inputs - mean) / deviation
    width = table.shape[1]
    extended = torch.cat([table, (ridge * len(table)) ** 0.5 * torch.eye(width).double()])
    targets = torch.cat([differences - differences.mean(dim=0), torch.zeros(width, width)])
    solution = torch.linalg.lstsq(extended, targets).solution
    weight = (solution / deviation[:, None]).T
    return weight, differences.mean(dim=0) - weight @ mean


@pytest.mark.parametrize("gap", GAPS)
def test_a_map_is_the_ridge_regression_on_the_full_path_s_states(routed, texts, gap, monkeypatch):
    monkeypatch.setattr(stand_in, "RIDGES", (0.01,))
    found = fit_stand_in(routed, texts).find_map(gap)
    fit, held_out = split_for_ridge(texts)
    states = states_alone(routed.model, fit)
    weight, bias = solve_alone(states, gap, 0.01)
    assert torch.allclose(found.weight.double(), weight, atol=1e-4)
    assert torch.allclose(found.bias.double(), bias, atol=1e-4)
    states += states_alone(routed.model, held_out)
    first = [layers[gap.next_layer - 1][0] - layers[gap.layer][0] for layers in states]
    assert torch.allclose(found.first, torch.stack(first).mean(dim=0), atol=1e-5)


def test_the_ridge_is_chosen_on_held_out_texts(routed, texts, monkeypatch):
    gap = GAPS[0]
    chosen = fit_stand_in(routed, texts).find_map(gap)
    shares = []
    for ridge in stand_in.RIDGES:
        with monkeypatch.context() as patch:
            patch.setattr(stand_in, "RIDGES", (ridge,))
            shares.append(fit_stand_in(routed, texts).find_map(gap).unexplained)
    assert chosen.unexplained == pytest.approx(min(shares))
    assert chosen.unexplained < 1


def test_a_state_is_left_alone_where_nothing_is_explained():
    generator = torch.Generator().manual_seed(0)

    def make_states(num_tokens, change):
        states = torch.randn(num_tokens, 8, generator=generator)
        layers = [states, states + change]
        return stand_in.FullPathStates(layers, [layer[:2] for layer in layers])

    # What is fitted is the opposite of what the held-out texts need.
    found = StandIn(make_states(20, 5.0), make_states(200, -5.0)).find_map(Gap(0, 2))
    assert found.unexplained == 1
    states = torch.randn(4, 8, generator=generator)
    is_first = torch.tensor([True, False, False, False])
    mapped = found.apply(states, is_first)
    assert torch.equal(mapped[1:], states[1:])
    assert torch.allclose(mapped[0], states[0] + found.first)


@pytest.mark.parametrize(
    ("growth", "settings", "is_made"),
    [(10.0, {}, True), (100.0, {}, False), (100.0, {"largest_growth": math.inf}, True)],
)
def test_a_first_token_that_grows_more_than_a_refit_can_make_it_is_left_alone(
    growth, settings, is_made
):
    generator = torch.Generator().manual_seed(0)

    def make_states(num_tokens):
        states = torch.randn(num_tokens, 8, generator=generator)
        first = torch.randn(3, 8, generator=generator)
        return stand_in.FullPathStates([states, 2 * states], [first, growth * first])

    found = StandIn(make_states(20), make_states(20), **settings).find_map(Gap(0, 2))
    assert bool(found.first.any()) == is_made


def test_states_keep_their_dtype(routed, texts):
    maps = fit_stand_in(routed, texts)
    states = torch.randn(2, 3, routed.config.hidden_size, dtype=torch.bfloat16)
    is_first = torch.zeros(2, 3, dtype=torch.bool)
    assert maps.cross(1, 3, states, is_first).dtype == torch.bfloat16


def test_repaired_paths_are_nearer_to_the_full_path(routed, texts):
    """On texts that the maps weren't fitted on."""
    maps = fit_stand_in(routed, texts[:90])
    requests = [Request(text) for text in texts[90:]]
    paths = [StaticPath([0, 1, 3, 4, 5]), StaticPath([0, 1, 4, 5]), StaticPath([0, 1, 2, 3])]
    plain = score(routed, requests, paths, kl=True)
    repaired = score(routed, requests, paths, kl=True, crossings=maps)
    for plain_row, repaired_row in zip(plain, repaired, strict=True):
        assert sum(item.kl for item in repaired_row) < sum(item.kl for item in plain_row)


def test_states_that_do_not_fit_into_memory_are_refused(routed, texts, monkeypatch):
    monkeypatch.setattr(stand_in, "free_bytes", lambda _device: 1000)
    with pytest.raises(ConfigError, match="--refit-tokens"):
        fit_stand_in(routed, texts)


def test_a_layer_that_does_nothing_needs_no_map(tiny_llama, texts):
    model = tiny_llama()
    model.model.layers[2].self_attn.o_proj.weight.data.zero_()
    model.model.layers[2].mlp.down_proj.weight.data.zero_()
    gap_map = fit_stand_in(RoutedModel(model), texts).find_map(Gap(1, 3))
    assert not gap_map.weight.any()
    assert not gap_map.bias.any()
    assert gap_map.unexplained == 0
