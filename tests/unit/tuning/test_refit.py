"""The refit of a path against the slow way: states one by one, and one least-squares problem."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from drllm.config import HealConfig
from drllm.errors import ArchitectureError, ModelError, PathError, RoutingError, TaskError
from drllm.model.layers import find_layers
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.injection import LayerCall
from drllm.paths import StaticPath
from drllm.records.codec import hash_values
from drllm.tasks.texts import choose_calibration_texts
from drllm.tuning.calibration import choose_texts
from drllm.tuning.heal_texts import cut_texts, split_texts
from drllm.tuning.layer_states import make_batches
from drllm.tuning.refit import find_projections, refit, split_for_ridge
from drllm.tuning.refit_memory import HELD_OUT, count_gap_bytes, estimate_bytes, read_size
from drllm.tuning.refit_work import NUM_SOLUTIONS, count_layers

NUM_LAYERS = 6
PATHS = {
    "one layer": [0, 1, 3, 4, 5],
    "two layers in a row": [0, 1, 4, 5],
    "two gaps": [0, 2, 4, 5],
    "the last layers": [0, 1, 2, 3],
    "all but the first": [0],
}


def make_texts(num_texts=24, vocabulary=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for number in range(num_texts):
        tokens = torch.randint(4, vocabulary, (4 + number % 9,), generator=generator)
        texts.append(tuple(tokens.tolist()))
    return texts


class SlowWay:
    """Runs one unpadded text at a time through a plain copy of the model.

    A first token has the weight that is given; None is the mean squared norm of the other targets
    over that of its own.
    """

    def __init__(self, model, path, first_token_weight=None):
        self.full = copy.deepcopy(model)
        self.repaired = copy.deepcopy(model)
        self.path = path
        self.first_token_weight = first_token_weight

    @torch.no_grad()
    def states_after(self, model, layers, text):
        """Return the state after the last of some layers, `[T, D]`; the others do nothing."""
        states = []
        hooks = []
        for index, layer in enumerate(find_layers(model)[1]):
            keeps_input = index not in layers
            hooks.append(layer.register_forward_hook(self.make_hook(states, keeps_input)))
        try:
            model(torch.tensor([text]), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return states[-1][0]

    def make_hook(self, states, keeps_input):
        def hook(_layer, args, output):
            state = output[0] if isinstance(output, tuple) else output
            if keeps_input:
                state = args[0]
            states.append(state)
            return (state, *output[1:]) if isinstance(output, tuple) else state

        return hook

    def run_and_record(self, module, layers, text):
        """Return the state after some layers, and the input of a map, `[T, F]`."""
        record = []
        hook = module.register_forward_pre_hook(lambda _, args: record.append(args[0]))
        output = self.states_after(self.repaired, layers, text)
        hook.remove()
        return output, record[-1].reshape(len(text), -1)

    def find_gates(self, layer, layers, text):
        """Return the sigmoid of the gate of a shared expert at each token, `[T, 1]`."""
        gates = []
        module = find_layers(self.repaired)[1][layer].mlp.shared_expert_gate
        hook = module.register_forward_hook(lambda _, args, output: gates.append(output.sigmoid()))
        self.states_after(self.repaired, layers, text)
        hook.remove()
        return gates[-1].reshape(len(text), 1)

    def solve(self, gap, name, texts, ridge, factor=1.0):
        """Return W + ΔW from all tokens of all texts at once, and change the copy's weight."""
        module = find_layers(self.repaired)[1][gap.layer].get_submodule(name)
        inputs, residuals, targets, is_first = [], [], [], []
        for text in texts:
            layers = [layer for layer in self.path if layer <= gap.layer]
            output, z = self.run_and_record(module, layers, text)
            target = self.states_after(self.full, range(gap.next_layer), text)
            inputs.append(
                z * self.find_gates(gap.layer, layers, text) if factor == "gate" else z * factor
            )
            residuals.append(target - output)
            targets.append(target)
            is_first += [True] + [False] * (len(text) - 1)
        z = torch.cat(inputs).double()
        r = torch.cat(residuals).double()
        first = torch.tensor(is_first)
        squares = torch.cat(targets).double().square().sum(dim=1)
        weights = torch.ones(len(z), dtype=torch.float64)
        if self.first_token_weight is None:
            weights[first] = squares[~first].mean() / squares[first]
        else:
            weights[first] = self.first_token_weight
        scales = z[~first].square().mean(dim=0).sqrt()
        penalty = torch.diag(scales) * (ridge * len(z)) ** 0.5
        rows = torch.cat([z * weights.sqrt()[:, None], penalty])
        values = torch.cat([r * weights.sqrt()[:, None], torch.zeros(len(scales), r.shape[1])])
        change = torch.linalg.lstsq(rows, values).solution  # ΔWᵀ
        if not isinstance(module, Conv1D):
            change = change.T
        module.weight.data = (module.weight.double() + change).to(module.weight.dtype)
        return module.weight.data


def assert_refit_is_the_slow_way(model, layers, texts, factor=1.0, first_token_weight=None):
    slow = SlowWay(model, layers, first_token_weight)
    routed = RoutedModel(model)
    gaps = refit(routed, StaticPath(layers), texts, first_token_weight=first_token_weight)
    assert [gap.gap for gap in gaps] == StaticPath(layers).gaps(NUM_LAYERS)
    for gap in gaps:
        place = gap.name.partition(".")[2]
        expected = slow.solve(gap.gap, place, texts, gap.ridge, factor)
        change = gap.weight - find_layers(slow.full)[1][gap.gap.layer].get_submodule(place).weight
        torch.testing.assert_close(gap.weight, expected, rtol=0, atol=1e-4 * float(change.norm()))
    return gaps


@pytest.mark.parametrize("layers", PATHS.values(), ids=PATHS)
def test_each_gap_is_solved_on_the_path_as_repaired_so_far(layers, tiny_llama):
    assert_refit_is_the_slow_way(tiny_llama(), layers, make_texts())


@pytest.mark.parametrize("weight", [0.0, 1.0, None])
def test_without_the_last_layers_first_tokens_count_as_much_as_is_said(weight, tiny_llama):
    layers = PATHS["the last layers"]
    assert_refit_is_the_slow_way(tiny_llama(), layers, make_texts(), first_token_weight=weight)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "mlp.c_proj"),  # Conv1D, with a bias
        ("gpt_neox", "mlp.dense_4h_to_h"),  # attention and MLP in parallel
        ("phi", "mlp.fc2"),  # in parallel, with a bias
        ("starcoder2", "mlp.c_proj"),  # a bias
        ("qwen3", "mlp.down_proj"),
    ],
)
def test_families_of_other_forms_are_solved_alike(family, name, tiny_model):
    gaps = assert_refit_is_the_slow_way(tiny_model(family), [0, 1, 3, 5], make_texts())
    assert [gap.name for gap in gaps] == [f"1.{name}", f"3.{name}"]


def test_a_factor_on_the_output_counts(tiny_model):
    model = tiny_model("granite", residual_multiplier=0.22)
    assert_refit_is_the_slow_way(model, [0, 1, 4, 5], make_texts(), factor=0.22)


def test_a_factor_of_each_token_counts(tiny_model):
    """The shared expert of Qwen2-MoE has a gate that differs from token to token."""
    model = tiny_model("qwen2_moe")
    slow = SlowWay(model, [0, 1, 4, 5])
    [gap] = refit(RoutedModel(model), StaticPath([0, 1, 4, 5]), make_texts())
    assert gap.name == "1.mlp.shared_expert.down_proj"
    expected = slow.solve(gap.gap, "mlp.shared_expert.down_proj", make_texts(), gap.ridge, "gate")
    torch.testing.assert_close(gap.weight, expected, rtol=0, atol=1e-3)


def test_weights_of_16_bits_are_solved_in_float32_and_come_back_as_they_were(tiny_llama):
    model = tiny_llama().bfloat16()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    wide = RoutedModel(copy.deepcopy(model).float())
    path = StaticPath([0, 1, 3, 4, 5])
    [gap] = refit(RoutedModel(model), path, make_texts())
    [expected] = refit(wide, path, make_texts())
    assert gap.weight.dtype == torch.bfloat16
    torch.testing.assert_close(gap.weight, expected.weight.bfloat16(), rtol=2**-7, atol=0)
    for name, weight in model.state_dict().items():
        assert weight.dtype == before[name].dtype
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_room_for_the_states_of_all_texts_the_result_is_the_same(
    family, tiny_model, monkeypatch
):
    path = StaticPath([0, 2, 4])
    expected = refit(RoutedModel(tiny_model(family)), path, make_texts())
    monkeypatch.setattr("drllm.tuning.refit_memory.SHARE_FOR_STATES", 0)
    gaps = refit(RoutedModel(tiny_model(family)), path, make_texts())
    for gap, other in zip(expected, gaps, strict=True):
        torch.testing.assert_close(dict(other.weights), dict(gap.weights))


@pytest.mark.parametrize("num_earlier", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gaps_that_are_solved_already_give_the_same_result(family, tiny_model, num_earlier, dtype):
    path = StaticPath([0, 2, 4])  # three gaps
    expected = refit(RoutedModel(tiny_model(family).to(dtype)), path, make_texts())
    solved = []
    results = refit(
        RoutedModel(tiny_model(family).to(dtype)),
        path,
        make_texts(),
        earlier=expected[:num_earlier],
        on_gap=solved.append,
    )
    assert solved == results[num_earlier:]
    for result, other in zip(results, expected, strict=True):
        assert result.gap == other.gap
        assert result.ridge == other.ridge
        assert result.weights.keys() == other.weights.keys()
        for name, weight in result.weights.items():
            assert torch.equal(weight, other.weights[name])


@pytest.mark.parametrize("share_for_states", [0, 0.25])
@pytest.mark.parametrize("num_earlier", [0, 1])
def test_the_progress_grows_with_every_batch_and_ends_at_the_total(
    tiny_llama, monkeypatch, share_for_states, num_earlier
):
    monkeypatch.setattr("drllm.tuning.refit_memory.SHARE_FOR_STATES", share_for_states)
    monkeypatch.setattr("drllm.tuning.layer_states.TOKENS_AT_ONCE", 40)
    path = StaticPath([0, 2, 4])
    earlier = refit(RoutedModel(tiny_llama()), path, make_texts())[:num_earlier]
    reports = []
    refit(
        RoutedModel(tiny_llama()),
        path,
        make_texts(),
        earlier=earlier,
        on_progress=lambda *report: reports.append(report),
    )
    num_gaps = 3 - num_earlier
    num_batches = sum(len(make_batches(part, "cpu")) for part in split_for_ridge(make_texts()))
    assert num_batches > 5
    assert len(reports) == num_gaps * (num_batches + NUM_SOLUTIONS)
    amounts = [done for done, _, _ in reports]
    assert amounts == sorted(amounts)
    assert len({total for _, total, _ in reports}) == 1
    assert amounts[-1] == pytest.approx(reports[-1][1])
    assert reports[0][2] == f"gap 1 of {num_gaps} after layer {2 * num_earlier}, summing up"
    assert reports[-1][2] == f"gap {num_gaps} of {num_gaps} after layer 4, solving"


@pytest.mark.parametrize("share_for_states", [0, 0.25])
def test_the_progress_grows_where_a_norm_follows_the_mlp(tiny_model, monkeypatch, share_for_states):
    monkeypatch.setattr("drllm.tuning.refit_memory.SHARE_FOR_STATES", share_for_states)
    reports = []
    refit(
        RoutedModel(tiny_model("gemma3_text")),
        StaticPath([0, 2, 4]),
        make_texts(),
        on_progress=lambda *report: reports.append(report),
    )
    amounts = [done for done, _, _ in reports]
    assert 0 < amounts[0] < amounts[-1] <= reports[-1][1]
    assert amounts == sorted(amounts)
    assert len({total for _, total, _ in reports}) == 1
    gaps = {note.split(" after")[0] for _, _, note in reports}
    assert gaps == {"gap 1 of 3", "gap 2 of 3", "gap 3 of 3"}


@pytest.mark.parametrize("keeps_states", [True, False])
def test_the_layers_that_run_for_each_gap_are_counted_right(tiny_llama, monkeypatch, keeps_states):
    path = StaticPath([0, 2, 4])
    monkeypatch.setattr("drllm.tuning.refit_memory.SHARE_FOR_STATES", 0.25 if keeps_states else 0)
    routed = RoutedModel(tiny_llama())
    num_runs = [0]  # for each gap
    original_run = LayerCall.run
    original_find = find_projections

    def run(call, *args, **named):
        num_runs[-1] += 1
        return original_run(call, *args, **named)

    def find(*args):
        projections = original_find(*args)
        num_runs[-1] = 0  # finding them runs layers too
        return projections

    monkeypatch.setattr(LayerCall, "run", run)
    monkeypatch.setattr("drllm.tuning.refit.find_projections", find)
    refit(routed, path, make_texts(), on_gap=lambda _: num_runs.append(0))
    counts = count_layers(path.gaps(NUM_LAYERS), path.layers, 0, keeps_states=keeps_states)
    # There are two batches: the texts to fit, and those that choose λ.
    assert num_runs == [*[2 * count for count in counts], 0]


def test_sums_that_do_not_fit_into_memory_are_refused_before_they_are_made(tiny_llama, monkeypatch):
    routed = RoutedModel(tiny_llama())
    monkeypatch.setattr("drllm.tuning.refit_memory.free_bytes", lambda device: 10**6)
    monkeypatch.setattr("drllm.tuning.refit.TokenSums", None)
    with pytest.raises(ModelError, match=r"1\.mlp\.down_proj, which has .* inputs"):
        refit(routed, StaticPath([0, 1, 3, 4, 5]), make_texts())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("free", [1.01, 1.2, 2.0, 10.0])  # times the memory of the gap
def test_states_and_wide_weights_only_take_the_memory_that_the_gap_leaves(
    family, tiny_model, monkeypatch, free
):
    routed = RoutedModel(tiny_model(family).to(torch.bfloat16))
    projections = find_projections(routed, StaticPath([0, 2, 3, 4, 5]).gaps(NUM_LAYERS)).values()
    [projection] = projections
    for num_tokens in (10, 10_000, 20_000, 40_000):
        least = count_gap_bytes(projection, num_tokens)
        with monkeypatch.context() as patch:
            patch.setattr(
                "drllm.tuning.refit_memory.free_bytes", lambda _, least=least: free * least
            )
            assert least <= estimate_bytes(routed, projections, num_tokens) <= free * least


@pytest.mark.parametrize(("family", "has_norm"), [("llama", False), ("gemma2", True)])
def test_held_out_tokens_need_memory_where_a_norm_follows_the_mlp(
    family, has_norm, tiny_model, monkeypatch
):
    routed = RoutedModel(tiny_model(family))
    path = StaticPath([0, 1, 3, 4, 5])
    texts = make_texts(200)
    num_held_out = sum(map(len, texts)) // HELD_OUT
    [projection] = find_projections(routed, path.gaps(NUM_LAYERS)).values()
    size = read_size(projection.module)
    held_out = 2 * 8 * num_held_out * (size.num_inputs + 2 * size.num_outputs)
    expected = size.num_bytes + (held_out if has_norm else 0)
    assert count_gap_bytes(projection, HELD_OUT * num_held_out) == expected
    monkeypatch.setattr(
        "drllm.tuning.refit_memory.free_bytes", lambda device: size.num_bytes + held_out // 2
    )
    monkeypatch.setattr("drllm.tuning.refit.solve_normed_change", None)
    with pytest.raises(ModelError, match="of memory beside") if has_norm else nullcontext():
        refit(routed, path, texts)


def test_one_text_is_refused(tiny_llama):
    with pytest.raises(TaskError, match="at least 2 texts"):
        refit(RoutedModel(tiny_llama()), StaticPath([0, 1, 3, 4, 5]), make_texts(1))


def test_the_base_model_is_not_changed(tiny_llama):
    model = tiny_llama()
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    routed = RoutedModel(model)
    refit(routed, StaticPath([0, 2, 4]), make_texts())
    assert torch.equal(model(ids).logits, before)
    routed.detach()
    assert torch.equal(model(ids).logits, before)


def test_a_refit_brings_the_state_after_the_gap_nearer_on_other_texts(tiny_llama):
    model = tiny_llama()
    routed = RoutedModel(model)
    layers = [0, 1, 2, 4, 5]
    gaps = refit(routed, StaticPath(layers), make_texts(400))
    assert gaps[0].unexplained < 1
    slow = SlowWay(copy.deepcopy(routed.detach()), layers)
    errors = []
    for weight in (slow.repaired.model.layers[2].mlp.down_proj.weight.data, gaps[0].weight):
        slow.repaired.model.layers[2].mlp.down_proj.weight.data = weight
        error = 0.0
        for text in make_texts(40, seed=1):
            target = slow.states_after(slow.full, range(4), text)
            state = slow.states_after(slow.repaired, range(3), text)
            error += float((target - state)[1:].square().sum())
        errors.append(error)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("weight", [0.0, 1.0, None])
def test_first_tokens_have_the_weight_that_is_given(weight, tiny_llama):
    """Without attention, a first token changes no other one, so with weight 0 it doesn't matter."""
    texts = make_texts()
    others = [(99, *text[1:]) for text in texts]
    path = StaticPath([0, 1, 2, 3])

    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    results = []
    for some in (texts, others):
        fit, held_out = split_for_ridge(texts)
        order = [texts.index(text) for text in [*fit, *held_out]]
        with pytest.MonkeyPatch.context() as patch:
            chosen = [some[place] for place in order]
            split = (chosen[: len(fit)], chosen[len(fit) :])
            patch.setattr("drllm.tuning.refit.split_for_ridge", lambda _, split=split: split)
            [gap] = refit(RoutedModel(copy.deepcopy(model)), path, some, first_token_weight=weight)
        results.append(gap.weight)
    assert torch.equal(*results) == (weight == 0)


def test_every_tenth_text_chooses_the_ridge_whatever_the_order():
    texts = make_texts(40)
    fit, held_out = split_for_ridge(texts)
    assert len(held_out) == 4
    assert sorted(fit + held_out) == sorted(texts)
    assert set(split_for_ridge(texts[::-1])[1]) == set(held_out)
    assert len(split_for_ridge(texts[:3])[1]) == 1


def test_every_source_has_texts_to_choose_the_ridge_on_after_its_lowest_hashes_are_held_out():
    many = make_texts(1000, vocabulary=10_000)
    few = make_texts(100, vocabulary=10_000, seed=1)
    texts = split_texts({"many": many, "few": few}, HealConfig(num_held_out=40)).to_train
    _, to_choose = split_for_ridge(texts["many"] + texts["few"])
    assert 0.04 < len(set(to_choose) & set(texts["few"])) / len(texts["few"]) < 0.2


def make_long_texts(num_texts, lengths):
    """Return texts that have no token in common."""
    texts = []
    for number in range(num_texts):
        length = lengths[number % len(lengths)]
        texts.append(tuple(range(1000 * number, 1000 * number + length)))
    return texts


def choose_for_heal(by_source):
    """Return the texts that `heal` refits on, cut to 10 tokens."""
    to_train = split_texts(by_source, HealConfig(num_held_out=4, max_tokens=10)).to_train
    chosen = choose_calibration_texts(to_train, 1503, seed=0)
    return [text for texts in chosen.values() for text in texts]


def choose_for_tune(by_source):
    """Return the texts that `tune` refits on, cut to 10 tokens."""
    return choose_texts(by_source, 1503, seed=0, max_tokens=10)


def split_in_worker(texts):
    """Split texts that were sent to a worker."""
    return split_for_ridge(pickle.loads(pickle.dumps(texts)))


@pytest.mark.parametrize("choose", [choose_for_heal, choose_for_tune])
@pytest.mark.parametrize("split", [split_for_ridge, split_in_worker])
def test_no_text_that_was_cut_both_fits_and_chooses_the_ridge(choose, split):
    texts = make_long_texts(80, [8, 25, 40, 93])
    chosen = choose({"some": texts[:40], "others": texts[40:]})
    assert sum(map(len, chosen)) == 1503  # so the last one was cut once more
    fit, held_out = split(chosen)
    assert sorted(fit + held_out) == sorted(chosen)
    assert len(held_out) == len(chosen) // HELD_OUT
    assert not {text[0] // 1000 for text in fit} & {text[0] // 1000 for text in held_out}


def test_texts_that_were_not_cut_choose_the_ridge_by_their_own_hash():
    texts = cut_texts(make_texts(55, vocabulary=10_000), 100)
    texts += texts[:2]  # a bypass may be fitted on texts that are there twice
    ordered = sorted(texts, key=lambda text: hash_values(["ridge", text]))
    assert split_for_ridge(texts) == (ordered[5:], ordered[:5])


@pytest.mark.parametrize(
    ("lengths", "num_held_out"),
    [
        ([700, 20, 20, 20], 6),  # the long text has more than a tenth
        ([400, 300, 200], 20),  # each text has
        ([400], 4),  # the only text
    ],
)
def test_enough_parts_of_long_texts_are_left_to_fit(lengths, num_held_out):
    texts = cut_texts(make_long_texts(len(lengths), lengths), 10)
    fit, held_out = split_for_ridge(texts)
    assert len(held_out) == num_held_out
    assert sorted(fit + held_out) == sorted(texts)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([0, 1, 1, 3], "layer 1 comes after layer 1"),
        ([0, 2, 1, 5], "layer 1 comes after layer 2"),
        ([1, 2, 4, 5], "begins with layer 1"),
        (range(6), "no gap to refit"),
    ],
)
def test_a_path_that_has_no_refit_is_refused(layers, says, tiny_llama):
    with pytest.raises(PathError, match=says):
        refit(RoutedModel(tiny_llama()), StaticPath(layers), make_texts())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "glm4", "olmo2", "olmo3", "exaone4"])
def test_where_a_norm_follows_the_mlp_its_gain_is_solved_too(family, tiny_model):
    model = tiny_model(family)
    path = [0, 1, 2, 4, 5]
    slow = SlowWay(model, path)
    routed = RoutedModel(model)
    [gap] = refit(routed, StaticPath(path), make_texts(200))
    assert gap.unexplained < 1
    assert set(gap.weights) == {gap.name, gap.norm}
    held_out = split_for_ridge(make_texts(200))[1]
    errors = []
    for weights in ({}, gap.weights):
        for name, weight in weights.items():
            layer, _, place = name.partition(".")
            module = find_layers(slow.repaired)[1][int(layer)].get_submodule(place)
            module.weight.data = weight
        error = 0.0
        for text in held_out:
            target = slow.states_after(slow.full, range(4), text)
            state = slow.states_after(slow.repaired, range(3), text)
            error += float((target - state)[1:].square().sum())
        errors.append(error)
    assert errors[1] / errors[0] == pytest.approx(gap.unexplained, rel=1e-3)


def test_packed_experts_are_refused(tiny_model):
    routed = RoutedModel(tiny_model("mixtral"))
    with pytest.raises(ArchitectureError, match="experts"):
        refit(routed, StaticPath([0, 1, 3, 4, 5]), make_texts())


def test_offloaded_weights_are_refused(tiny_llama):
    accelerate = pytest.importorskip("accelerate")
    routed = RoutedModel(accelerate.cpu_offload(tiny_llama(), torch.device("cpu")))
    with pytest.raises(RoutingError, match="is offloaded"):
        refit(routed, StaticPath([0, 1, 3, 4, 5]), make_texts())


def test_quantised_weights_are_refused(tiny_llama):
    class OwnLinear(nn.Linear):
        def forward(self, states):
            return super().forward(states)

    model = tiny_llama()
    projection = model.model.layers[1].mlp.down_proj
    projection.__class__ = OwnLinear
    with pytest.raises(RoutingError, match="quantised, or its OwnLinear"):
        refit(RoutedModel(model), StaticPath([0, 1, 3, 4, 5]), make_texts())
