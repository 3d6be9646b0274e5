"""The fit of a bypass against a regression on all tokens at once."""

import pytest
import torch

from drllm.errors import ModelError, TaskError
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.bypass import normalise
from drllm.tuning import bypass_solver
from drllm.tuning.bypass_solver import BypassSolver, LayerSums, join_solutions, solve_layer

WIDTH = 8


def draw_tokens(num_tokens, seed=0):
    """Return states, what a layer adds (a map of rank 2, and noise), and which are first tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    low_rank = torch.Generator().manual_seed(7)
    up = torch.randn(WIDTH, 2, generator=low_rank, dtype=torch.float64)
    down = torch.randn(2, WIDTH, generator=low_rank, dtype=torch.float64)
    states = 3 * draw(num_tokens, WIDTH)
    changes = normalise(states) @ (up @ down).T + 0.5 + 0.01 * draw(num_tokens, WIDTH)
    is_first = torch.zeros(num_tokens, dtype=torch.bool)
    is_first[:5] = True
    changes[:5] = 100.0
    return states, changes, is_first


def sum_tokens(num_tokens, seed):
    sums = LayerSums(WIDTH)
    states, changes, is_first = draw_tokens(num_tokens, seed)
    for part in range(0, num_tokens, 50):  # batch by batch
        batch = slice(part, part + 50)
        sums.add(states[batch], changes[batch], is_first[batch])
    return sums


def test_a_map_of_low_rank_is_found_and_first_tokens_are_apart():
    solution = solve_layer(sum_tokens(400, 0), sum_tokens(100, 1), rank=2)
    states, changes, is_first = draw_tokens(200, 2)
    layer_map = solution.layer_map
    found = normalise(states) @ (layer_map.up @ layer_map.down).T + layer_map.bias
    assert torch.allclose(found[~is_first], changes[~is_first], atol=0.1)
    assert torch.allclose(layer_map.first, torch.full((WIDTH,), 100.0, dtype=torch.float64))
    assert solution.unexplained < 1e-3


def test_full_rank_is_the_least_squares_solution_of_all_tokens(monkeypatch):
    monkeypatch.setattr(bypass_solver, "RIDGES", (1e-12,))
    solution = solve_layer(sum_tokens(400, 0), sum_tokens(100, 1), rank=WIDTH)
    rows = []
    values = []
    for num_tokens, seed in ((400, 0), (100, 1)):
        states, changes, is_first = draw_tokens(num_tokens, seed)
        inputs = normalise(states)[~is_first]
        rows.append(torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1))
        values.append(changes[~is_first])
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(values)).solution.T
    layer_map = solution.layer_map
    assert torch.allclose(layer_map.up @ layer_map.down, expected[:, :-1], atol=1e-6)
    assert torch.allclose(layer_map.bias, expected[:, -1], atol=1e-6)


def test_the_error_from_sums_is_that_of_the_tokens():
    sums = sum_tokens(100, 0)
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    bias = torch.randn(WIDTH, dtype=torch.float64)
    states, changes, is_first = draw_tokens(100, 0)
    errors = changes - normalise(states) @ weight.T - bias
    assert sums.error(weight, bias) == pytest.approx(float(errors[~is_first].square().sum()))


def make_texts(num_texts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (num_texts,), generator=generator).tolist()
    return [
        tuple(torch.randint(3, 90, (length,), generator=generator).tolist()) for length in lengths
    ]


def solve_all(routed, texts, rank):
    solver = BypassSolver(routed, texts, rank)
    solutions = [solution for group in solver.groups for solution in solver.solve(group)]
    return join_solutions(solutions, {}), solutions


def test_a_bypass_explains_a_part_of_what_layers_add(tiny_llama):
    routed = RoutedModel(tiny_llama())
    bypass, solutions = solve_all(routed, make_texts(200), rank=16)
    assert (bypass.num_layers, bypass.rank) == (routed.num_layers, 16)
    assert all(0 < solution.unexplained < 1 for solution in solutions)


def test_groups_of_layers_that_fit_into_memory_give_the_same_bypass(tiny_llama, monkeypatch):
    routed = RoutedModel(tiny_llama())
    texts = make_texts(60)
    expected, _ = solve_all(routed, texts, rank=4)
    groups = [range(2), range(2, 3), range(3, 6)]
    monkeypatch.setattr(bypass_solver, "group_layers", lambda *_: groups)
    found, _ = solve_all(routed, texts, rank=4)
    for name, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[name], tensor)


def test_one_text_is_too_few(tiny_llama):
    with pytest.raises(TaskError, match="a bypass needs at least 2 texts"):
        BypassSolver(RoutedModel(tiny_llama()), make_texts(1), rank=4)


def test_a_layer_that_does_nothing_gets_a_map_that_does_nothing(tiny_llama):
    model = tiny_llama()
    model.model.layers[2].self_attn.o_proj.weight.data.zero_()
    model.model.layers[2].mlp.down_proj.weight.data.zero_()
    bypass, solutions = solve_all(RoutedModel(model), make_texts(60), rank=4)
    states = torch.randn(5, bypass.hidden_size)
    assert torch.equal(bypass.skip(2, states), states)
    assert solutions[2].unexplained == 0


def test_inputs_that_are_the_same_in_all_tokens_are_left_to_the_bias(tiny_llama):
    texts = [(7,) * length for length in range(10, 20)]  # one token, so one state at layer 0
    routed = RoutedModel(tiny_llama())
    bypass, solutions = solve_all(routed, texts, rank=4)
    state = routed.model.model.embed_tokens(torch.tensor([7]))
    recorded = []
    hook = routed.model.model.layers[0].register_forward_hook(
        lambda _layer, _args, output: recorded.append(output)
    )
    routed(torch.tensor([texts[0]]))
    hook.remove()
    assert torch.allclose(bypass.skip(0, state)[0], recorded[0][0, -1], atol=1e-4)
    assert solutions[0].unexplained < 1e-3


def test_states_that_are_not_finite_are_refused(tiny_llama):
    model = tiny_llama()
    model.model.layers[3].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="layer 3 can't have a bypass, since the states"):
        solve_all(RoutedModel(model), make_texts(60), rank=4)
