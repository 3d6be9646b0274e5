"""The refit against the slow way: texts one by one, and one least-squares problem for a gap."""

import copy

import accelerate
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from drllm.errors import ArchitectureError, ModelError, PathError, RoutingError, TaskError
from drllm.model.layers import find_layers
from drllm.model.submodel import shorten
from drllm.prune.repairs import refit
from drllm.prune.repairs.refit import Gap, solve_gaps, split_for_ridge

SKIPS = {
    "one layer": ([2], [Gap(1, 1, 3)]),
    "two layers in a row": ([2, 3], [Gap(1, 1, 4)]),
    "two gaps": ([1, 3], [Gap(0, 0, 2), Gap(1, 2, 4)]),
    "the last layers": ([4, 5], [Gap(3, 3, 6)]),
    "all but the first": ([1, 2, 3, 4, 5], [Gap(0, 0, 6)]),
}
"""Which layers are left out, and the gaps: place, layer, next layer."""


def make_texts(num_texts=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for number in range(num_texts):
        tokens = torch.randint(4, 100, (4 + number % 9,), generator=generator)
        texts.append(tuple(tokens.tolist()))
    return texts


def find_module(model, name):
    """Return a module by its name in the list of layers, such as `1.mlp.down_proj`."""
    return find_layers(model)[1].get_submodule(name)


@torch.no_grad()
def watch(model, text, name):
    """Run a plain model on one text, and return what a module of its layers gets and gives."""
    calls = []
    module = find_module(model, name)
    hook = module.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    model(torch.tensor([text]), use_cache=False)
    hook.remove()
    [(inputs, output)] = calls
    output = output[0] if isinstance(output, tuple) else output
    return inputs.reshape(len(text), -1), output.reshape(len(text), -1)


class SlowWay:
    """Copies of a teacher and of a shortened model, which run one unpadded text at a time."""

    def __init__(self, teacher, short):
        self.full = copy.deepcopy(teacher)
        self.short = copy.deepcopy(short)

    def states(self, gap, text):
        """Return the full model's state behind a gap, and the short one's, `[T, D]`."""
        _, target = watch(self.full, text, f"{gap.next_layer - 1}")
        _, state = watch(self.short, text, f"{gap.place}")
        return target, state

    def error(self, gap, texts):
        """Return the squared error behind a gap, without first tokens."""
        error = 0.0
        for text in texts:
            target, state = self.states(gap, text)
            error += float((target - state)[1:].square().sum())
        return error

    def solve(self, solved, texts, factor=1.0):
        """Give the copy its weight before a gap, from all tokens at once, and return it.

        The factor on the projection's output is a number, or the name of a shared expert's gate.
        """
        module = find_module(self.short, solved.name)
        z, r, squares, is_first = [], [], [], []
        for text in texts:
            target, state = self.states(solved.gap, text)
            inputs, _ = watch(self.short, text, solved.name)
            if isinstance(factor, str):
                inputs = inputs * watch(self.short, text, factor)[1].sigmoid()
            else:
                inputs = inputs * factor
            z.append(inputs.double())
            r.append((target - state).double())
            squares.append(target.double().square().sum(dim=1))
            is_first += [True] + [False] * (len(text) - 1)
        z, r, squares, first = (
            torch.cat(z),
            torch.cat(r),
            torch.cat(squares),
            torch.tensor(is_first),
        )
        weights = torch.where(first, squares[~first].mean() / squares, 1.0)[:, None]
        scales = z[~first].square().mean(dim=0).sqrt()
        penalty = torch.diag(scales) * (solved.ridge * len(z)) ** 0.5
        rows = torch.cat([z * weights.sqrt(), penalty])
        values = torch.cat([r * weights.sqrt(), torch.zeros(len(scales), r.shape[1])])
        change = torch.linalg.lstsq(rows, values).solution  # ΔWᵀ
        if not isinstance(module, Conv1D):
            change = change.T
        module.weight.data = (module.weight.double() + change).to(module.weight.dtype)
        return module.weight, float(change.norm())


def assert_is_the_slow_way(teacher, skip, texts=None, factor=1.0):
    """Refit a model, compare each gap with the slow way, and return the gaps."""
    texts = texts or make_texts()
    short = shorten(teacher, skip)
    slow = SlowWay(teacher, short)
    solved = solve_gaps(short, teacher, texts)
    for gap in solved:
        expected, size = slow.solve(gap, texts, factor)
        found = find_module(short, gap.name).weight
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * size)
    return solved


@pytest.mark.parametrize(("skip", "gaps"), SKIPS.values(), ids=SKIPS)
def test_each_gap_is_solved_on_the_model_as_repaired_so_far(skip, gaps, tiny_llama):
    solved = assert_is_the_slow_way(tiny_llama(), skip)
    assert [each.gap for each in solved] == gaps


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
    solved = assert_is_the_slow_way(tiny_model(family), [2, 4])
    assert [gap.name for gap in solved] == [f"1.{name}", f"2.{name}"]


def test_a_factor_on_the_output_counts(tiny_model):
    assert_is_the_slow_way(tiny_model("granite", residual_multiplier=0.22), [2, 3], factor=0.22)


def test_a_factor_of_each_token_counts(tiny_model):
    """The shared expert of Qwen2-MoE has a gate that differs from token to token."""
    gate = "1.mlp.shared_expert_gate"
    [solved] = assert_is_the_slow_way(tiny_model("qwen2_moe"), [2, 3], factor=gate)
    assert solved.name == "1.mlp.shared_expert.down_proj"


def test_first_tokens_that_outweigh_their_texts_count_as_much_as_other_tokens(tiny_llama):
    teacher = tiny_llama()
    teacher.model.embed_tokens.weight[99] *= 50
    assert_is_the_slow_way(teacher, [3, 4], [(99, *text) for text in make_texts()])


def test_a_shortened_model_may_be_the_teacher(tiny_llama):
    teacher = shorten(tiny_llama(), [1])  # its layers are 0 2 3 4 5
    [solved] = assert_is_the_slow_way(teacher, [2])
    assert solved.gap == Gap(place=1, layer=1, next_layer=3)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "glm4", "olmo2", "olmo3", "exaone4"])
def test_where_a_norm_follows_the_mlp_its_gain_is_solved_too(family, tiny_model):
    teacher = tiny_model(family)
    short = shorten(teacher, [3])
    before = dict(short.named_parameters())
    slow = [SlowWay(teacher, short)]
    [solved] = solve_gaps(short, teacher, make_texts(200))
    changed = [name for name, weight in short.named_parameters() if weight is not before[name]]
    assert [name.partition("layers.")[2].split(".")[:2] for name in changed] == [
        ["2", "mlp"],
        ["2", "post_mlp_layernorm" if family == "glm4" else "post_feedforward_layernorm"],
    ]
    slow.append(SlowWay(teacher, short))
    held_out = split_for_ridge(make_texts(200))[1]
    errors = [models.error(solved.gap, held_out) for models in slow]
    assert solved.unexplained < 1
    assert errors[1] / errors[0] == pytest.approx(solved.unexplained, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_weights_of_16_bits_are_solved_in_float32_and_all_others_stay(family, tiny_model):
    teacher = tiny_model(family).bfloat16()
    if family == "gemma2":
        find_module(teacher, "1.post_feedforward_layernorm").float()
    short = shorten(teacher, [2])
    wide = copy.deepcopy(teacher).float()
    wide_short = shorten(wide, [2])
    before = dict(short.named_parameters())
    kept = {name: (weight.data_ptr(), weight.dtype) for name, weight in before.items()}
    [solved] = solve_gaps(short, teacher, make_texts())
    [expected] = solve_gaps(wide_short, wide, make_texts())
    assert (solved.ridge, solved.name) == (expected.ridge, expected.name)
    changed = []
    for name, weight in short.named_parameters():
        place, dtype = kept[name]
        assert weight.dtype == dtype
        torch.testing.assert_close(weight, wide_short.get_parameter(name).to(dtype))
        if weight is before[name]:
            assert weight.data_ptr() == place
        else:
            changed.append(name)
    assert len(changed) == (2 if family == "gemma2" else 1)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_room_for_the_states_of_all_texts_the_weights_are_the_same(
    family, tiny_model, monkeypatch
):
    teacher = tiny_model(family)
    models = [shorten(teacher, [1, 3, 5]) for _ in range(2)]
    monkeypatch.setattr("drllm.prune.states.TOKENS_AT_ONCE", 40)
    solve_gaps(models[0], teacher, make_texts())
    monkeypatch.setattr(refit, "SHARE_FOR_STATES", 0)
    solve_gaps(models[1], teacher, make_texts())
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_progress_grows_to_the_tokens_of_all_gaps(family, tiny_model, monkeypatch):
    monkeypatch.setattr("drllm.prune.states.TOKENS_AT_ONCE", 40)
    teacher = tiny_model(family)
    reports = []
    short = shorten(teacher, [1, 3])
    solve_gaps(short, teacher, make_texts(), lambda *report: reports.append(report))
    total = 2 * sum(map(len, make_texts()))
    amounts = [done for done, _ in reports]
    assert len(reports) > 10
    assert amounts == sorted(amounts)
    assert reports[-1] == (total, total)


def test_a_tenth_of_the_texts_chooses_the_ridge_whatever_their_order():
    texts = make_texts(40)
    fit, held_out = split_for_ridge(texts)
    assert len(held_out) == 4
    assert sorted(fit + held_out) == sorted(texts)
    assert split_for_ridge(texts[::-1]) == (fit, held_out)
    assert len(split_for_ridge(texts[:2])[1]) == 1


class OwnWeight(nn.Parameter):
    """A weight as libraries of quantised weights have it."""


def quantise(name):
    """Return a function that gives a module another kind of weight."""

    def change(short):
        module = find_module(short, name)
        module.weight = OwnWeight(module.weight, requires_grad=False)

    return change


def offload(short):
    accelerate.cpu_offload(short, torch.device("cpu"))


def spoil(short):
    """Let a layer before the gap give what isn't finite; the teacher has the same weight."""
    find_module(short, "0.mlp.up_proj").weight[0, 0] = torch.inf


def leave(_short):
    """Leave a model as it is."""


NORM = "1.post_feedforward_layernorm"


@pytest.mark.parametrize(
    ("kind", "said", "family", "skip", "change"),
    [
        (PathError, "begins", "llama", [0, 3], leave),
        (ArchitectureError, "experts", "mixtral", [2], leave),
        (RoutingError, "offloaded", "llama", [2], offload),
        (RoutingError, "quantised", "llama", [2], quantise("1.mlp.down_proj")),
        (RoutingError, NORM, "gemma2", [2], quantise(NORM)),
        (ModelError, "finite", "llama", [2], spoil),
        (ModelError, "finite", "gemma2", [2], spoil),
    ],
)
def test_what_cannot_be_refitted_is_refused_and_stays(kind, said, family, skip, change, tiny_model):
    teacher = tiny_model(family)
    short = shorten(teacher, skip)
    change(short)
    before = [weight.data_ptr() for weight in short.parameters()]
    with pytest.raises(kind, match=said) as caught:
        solve_gaps(short, teacher, make_texts())
    assert "\n" not in str(caught.value)
    assert [weight.data_ptr() for weight in short.parameters()] == before


def test_too_few_texts_are_refused(tiny_llama):
    teacher = tiny_llama()
    with pytest.raises(TaskError, match="at least 2"):
        solve_gaps(shorten(teacher, [2]), teacher, make_texts(1))


def test_a_layer_that_the_teacher_lacks_is_refused(tiny_llama):
    base = tiny_llama()
    with pytest.raises(PathError, match="layer 1"):
        solve_gaps(shorten(base, [3]), shorten(base, [1]), make_texts())


def test_sums_that_do_not_fit_into_memory_are_refused(tiny_llama, monkeypatch):
    teacher = tiny_llama()
    monkeypatch.setattr(refit, "free_bytes", lambda _: 10**5)
    with pytest.raises(ModelError, match="memory"):
        solve_gaps(shorten(teacher, [2]), teacher, make_texts())
