import dataclasses
import itertools
import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from drllm.errors import CheckpointError, ConfigError
from drllm.models.routers.checkpoint import load_routers, read_config, save_routers
from drllm.models.routers.pooling import Spans, Windows
from drllm.models.routers.stack import RouterConfig, RouterStack

L, D, W, H = 3, 5, 4, 7
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums in another order
CONFIG = RouterConfig(
    num_layers=L,
    hidden_size=D,
    num_windows=W,
    router_width=H,
    base_model="org/tiny",
    base_revision="main",
    base_class="LlamaForCausalLM",
    base_fingerprint="0123",
    label_counts=((1, 2, 3), (0, 6, 0), (4, 1, 1)),
    training={"settings": {"seed": 0}},
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_stack(seed: int = 0) -> RouterStack:
    """Routers whose biases aren't zero, so that leaving one out is noticed."""
    stack = RouterStack(CONFIG, generator(seed))
    for bias in (stack.hidden_bias, stack.decision_bias):
        bias.data.normal_(generator=generator(seed + 1))
    return stack


# --- pooling ---------------------------------------------------------------------------------


def pool(hidden, readable, num_windows):
    return Spans(readable, num_windows).means(hidden)


def slow_pool(tokens: list[torch.Tensor], windows: int) -> list[torch.Tensor]:
    filled = min(len(tokens), windows)
    edges = [window * len(tokens) // filled for window in range(filled + 1)]
    means = []
    for start, end in itertools.pairwise(edges):
        total = torch.zeros_like(tokens[0], dtype=torch.float64)
        for token in tokens[start:end]:
            total = total + token.double()
        means.append((total / (end - start)).float())
    return means


def assert_pooled_like_the_slow_loop(hidden, readable, windows):
    pooled = pool(hidden, readable, windows)
    assert pooled.means.shape == (len(hidden), windows, hidden.shape[2])
    assert pooled.means.dtype == torch.float32
    for row in range(len(hidden)):
        tokens = [hidden[row, t] for t in range(hidden.shape[1]) if readable[row, t]]
        expected = slow_pool(tokens, windows)
        assert int(pooled.filled[row]) == len(expected)
        for window, mean in enumerate(expected):
            torch.testing.assert_close(pooled.means[row, window], mean, **CLOSE)
        assert not pooled.means[row, len(expected) :].any()


@pytest.mark.parametrize("windows", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 40])
def test_windows_equal_the_slow_loop_at_every_length(length, windows):
    hidden = torch.randn(2, length, 3, generator=generator(length))
    assert_pooled_like_the_slow_loop(hidden, torch.ones(2, length, dtype=torch.bool), windows)


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("junk", [0.0, 1e30, math.nan, math.inf])
def test_padding_never_counts_whatever_it_holds(side, junk):
    T = 20
    place = torch.arange(T)
    readable = {
        "left": torch.stack([place >= 20 - n for n in (20, 13, 5, 1)]),
        "right": torch.stack([place < n for n in (20, 13, 5, 1)]),
        "both": torch.stack([(place >= 3) & (place < 3 + n) for n in (17, 11, 4, 1)]),
        "holes": torch.stack([place % n == 0 for n in (1, 2, 5, 19)]),
    }[side]
    hidden = torch.randn(4, T, 3, generator=generator())
    hidden[~readable] = junk
    assert_pooled_like_the_slow_loop(hidden, readable, windows=8)


def test_every_token_lies_in_exactly_one_window_of_nearly_equal_size():
    T, windows = 53, 8
    hidden = torch.eye(T)[None]  # token t is the t-th unit vector
    means = pool(hidden, torch.ones(1, T, dtype=torch.bool), windows).means[0]
    sizes = (means > 0).sum(dim=1)
    assert sizes.sum() == T
    assert set(sizes.tolist()) == {6, 7}
    assert [int(row.nonzero()[0]) for row in means] == [w * T // windows for w in range(windows)]


@pytest.mark.parametrize("length", [4097, 12289, 131072])
def test_the_window_edges_of_long_prompts_are_exact(length):
    edges = [window * length // 8 for window in range(9)]
    hidden = torch.zeros(1, length, 2)
    hidden[0, edges[:-1], 0] = 1.0  # marks the first token of each window
    hidden[0, [edge - 1 for edge in edges[1:]], 1] = 1.0  # and the last
    means = pool(hidden, torch.ones(1, length, dtype=torch.bool), 8).means
    expected = [[1 / (end - start)] * 2 for start, end in itertools.pairwise(edges)]
    torch.testing.assert_close(means[0], torch.tensor(expected), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_is_averaged_in_float32(dtype):
    hidden = torch.randn(2, 300, 3, generator=generator()).to(dtype)
    assert_pooled_like_the_slow_loop(hidden, torch.ones(2, 300, dtype=torch.bool), windows=2)


def test_a_row_is_pooled_alike_alone_and_in_a_padded_batch():
    hidden = torch.randn(1, 11, 3, generator=generator())
    alone = pool(hidden, torch.ones(1, 11, dtype=torch.bool), 4)
    padded = torch.cat([torch.full((1, 6, 3), 9.0), hidden], dim=1)
    readable = torch.arange(17)[None] >= 6
    batch = pool(
        torch.cat([padded, torch.randn(1, 17, 3, generator=generator(1))]),
        torch.cat([readable, torch.ones(1, 17, dtype=torch.bool)]),
        4,
    )
    torch.testing.assert_close(batch.means[:1], alone.means, **CLOSE)


# --- the routers -----------------------------------------------------------------------------


def slow_logits(stack: RouterStack, layer: int, windows: list[torch.Tensor]) -> torch.Tensor:
    """One router as the paper draws it: logits for each window, then their mean."""
    inner = nn.Linear(D, H)
    outer = nn.Linear(H, 3)
    inner.weight.data = stack.hidden_weight.data[layer]
    inner.bias.data = stack.hidden_bias.data[layer]
    outer.weight.data = stack.decision_weight.data[layer]
    outer.bias.data = stack.decision_bias.data[layer]
    with torch.no_grad():
        logits = [outer(nn.functional.gelu(inner(mean), approximate="tanh")) for mean in windows]
    return sum(logits) / len(logits)


def batch_of_windows() -> tuple[torch.Tensor, torch.Tensor]:
    means = torch.randn(6, L, W, D, generator=generator(3))
    filled = torch.tensor([4, 1, 2, 3, 4, 1])
    for row, number in enumerate(filled.tolist()):
        means[row, :, number:] = 0
    return means, filled


def test_logits_are_the_mean_over_the_filled_windows_of_each_routers_own():
    stack = new_stack()
    means, filled = batch_of_windows()
    logits = stack(means, filled)
    assert logits.shape == (6, L, 3)
    for row, layer in itertools.product(range(6), range(L)):
        expected = slow_logits(stack, layer, list(means[row, layer, : filled[row]]))
        torch.testing.assert_close(logits[row, layer].detach(), expected, **CLOSE)


def test_one_layer_alone_gives_the_logits_of_all_layers_together():
    stack = new_stack()
    means, filled = batch_of_windows()
    together = stack(means, filled)
    for layer in range(L):
        alone = stack.layer_logits(layer, Windows(means=means[:, layer], filled=filled))
        torch.testing.assert_close(alone, together[:, layer], **CLOSE)


@pytest.mark.parametrize("junk", [7.0, math.nan, math.inf])
def test_what_unfilled_windows_hold_never_counts(junk):
    stack = new_stack()
    means, filled = batch_of_windows()
    dirty = means.clone()
    for row, number in enumerate(filled.tolist()):
        dirty[row, :, number:] = junk
    torch.testing.assert_close(stack(dirty, filled), stack(means, filled), **CLOSE)


@pytest.mark.parametrize(
    ("layers", "hidden", "parameters"),
    [(28, 3072, 11_024_468), (32, 4096, 16_793_696), (30, 576, 2_227_290)],
    ids=["Llama-3.2-3B", "Llama-3.1-8B", "SmolLM2-135M"],
)
def test_parameter_counts_are_those_of_the_paper(layers, hidden, parameters):
    stack = RouterStack(RouterConfig(num_layers=layers, hidden_size=hidden))
    assert parameters == sum(weight.numel() for weight in stack.parameters())


def test_initial_weights_are_xavier_uniform_per_layer_and_biases_zero():
    stack = RouterStack(RouterConfig(num_layers=2, hidden_size=300), generator())
    for weight, fan_in, fan_out in (
        (stack.hidden_weight, 300, 128),
        (stack.decision_weight, 128, 3),
    ):
        limit = math.sqrt(6 / (fan_in + fan_out))
        for layer in weight.detach():
            assert 0.97 * limit < float(layer.abs().max()) <= limit
            assert float(layer.std()) == pytest.approx(limit / math.sqrt(3), rel=0.1)
    assert not stack.hidden_bias.any()
    assert not stack.decision_bias.any()


def test_initial_weights_are_a_function_of_the_generator():
    one, same, other = (RouterStack(CONFIG, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.hidden_weight, same.hidden_weight)
    assert not torch.equal(one.hidden_weight, other.hidden_weight)


# --- saving and loading ----------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "routers"
    save_routers(new_stack(), folder)
    return folder


def test_saved_routers_load_as_they_were(saved):
    loaded = load_routers(saved)
    assert loaded.config == CONFIG
    for name, weight in new_stack().state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])


def test_routers_without_label_counts_load_as_they_were(tmp_path):
    config = RouterConfig(num_layers=2, hidden_size=3)
    save_routers(RouterStack(config), tmp_path)
    assert read_config(tmp_path) == config


def test_a_saved_folder_holds_three_files_and_saving_again_replaces_them(saved):
    save_routers(new_stack(seed=5), saved)
    assert sorted(path.name for path in saved.iterdir()) == [
        "README.md",
        "router_config.json",
        "routers.safetensors",
    ]
    assert torch.equal(load_routers(saved).hidden_weight, new_stack(seed=5).hidden_weight)


sizes = st.integers(1, 6)
texts = st.text(max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def configs(draw) -> RouterConfig:
    num_layers = draw(sizes)
    row = st.tuples(*[st.integers(0, 2**40)] * 3)
    counts = st.lists(row, min_size=num_layers, max_size=num_layers).map(tuple)
    return RouterConfig(
        num_layers=num_layers,
        hidden_size=draw(sizes),
        num_windows=draw(st.integers(1, 1000)),
        router_width=draw(sizes),
        base_model=draw(texts),
        base_revision=draw(st.none() | texts),
        base_class=draw(texts),
        base_fingerprint=draw(texts),
        label_counts=draw(st.just(()) | counts),
        training=draw(st.dictionaries(texts, json_values, max_size=3)),
    )


def any_finite_weights(config: RouterConfig, seed: int) -> RouterStack:
    """Routers whose weights may be any finite float32: denormal, huge, negative zero."""
    stack = RouterStack(config, generator(seed))
    for weight in stack.parameters():
        bits = torch.randint(-(2**31), 2**31, weight.shape, generator=generator(seed))
        values = bits.to(torch.int32).view(torch.float32)
        weight.data = torch.where(torch.isfinite(values), values, -0.0)
    return stack


@settings(max_examples=25, deadline=None)
@given(config=configs(), seed=st.integers(0, 2**32))
def test_whatever_is_saved_is_loaded_bit_for_bit_and_saved_again_byte_for_byte(config, seed):
    stack = any_finite_weights(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        save_routers(stack, one)
        loaded = load_routers(one)
        save_routers(loaded, two)
        for name in ("README.md", "router_config.json", "routers.safetensors"):
            assert (one / name).read_bytes() == (two / name).read_bytes()
    assert config == loaded.config
    assert stack.state_dict().keys() == loaded.state_dict().keys()
    for name, weight in stack.state_dict().items():
        found = loaded.state_dict()[name]
        assert torch.equal(weight.view(torch.int32), found.view(torch.int32))


def test_loaded_routers_can_be_trained_and_outlive_their_files(saved):
    loaded = load_routers(saved)
    (saved / "routers.safetensors").write_bytes(b"")
    means, filled = batch_of_windows()
    loaded(means, filled).sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in loaded.parameters())


def test_loading_draws_no_random_numbers(saved):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_routers(saved)
    assert torch.equal(expected, torch.rand(1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda stack: stack.half(), "has dtype float16, expected float32; save routers.float()"),
        (lambda stack: stack.double(), "has dtype float64, expected float32"),
        (lambda stack: stack.hidden_bias.data[1].fill_(math.nan), "'hidden_bias' holds NaN"),
        (
            lambda stack: setattr(stack, "config", RouterConfig(num_layers=4, hidden_size=D)),
            "shape",
        ),
        (lambda stack: stack.config.training.update(path=Path()), "'training' isn't JSON .*Path"),
        (lambda stack: stack.config.training.update(loss=math.inf), "'training' isn't JSON"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved_over_what_can(saved, spoil, message):
    stack = load_routers(saved)
    spoil(stack)
    with pytest.raises(CheckpointError, match=f"these routers can't be saved: .*{message}"):
        save_routers(stack, saved)
    assert torch.equal(load_routers(saved).hidden_weight, new_stack().hidden_weight)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_windows": 0}, "'num_windows' is 0; expected a whole number from 1"),
        ({"num_windows": "8"}, "'num_windows' is '8'; expected a whole number from 1"),
        ({"label_counts": ((1, 2, 3),)}, "'label_counts' isn't num_layers rows of 3 counts"),
        ({"base_class": None}, "'base_class' is None; expected a text"),
    ],
)
def test_a_config_that_no_routers_can_have_is_not_made(values, message):
    with pytest.raises(ConfigError, match=message):
        RouterConfig(**{"num_layers": 2, "hidden_size": 3, **values})


def refused(folder, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_routers(folder)
    assert "\n" not in str(caught.value)


def edit(folder, **changes) -> None:
    path = folder / "router_config.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        if value is ...:
            del values[name]
        else:
            values[name] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "has format version 2, this drllm reads up to 1; install a newer"),
        ({"format_version": "1"}, "'format_version' is '1'; expected a whole number from 1 to 1"),
        ({"format_version": True}, "'format_version' is True; expected a whole number"),
        ({"format_version": ...}, "'format_version' is None; .*is it the config of routers"),
        ({"num_window": 8}, "unknown key 'num_window'; did you mean 'num_windows'"),
        ({"num_layers": ...}, "lacks the key 'num_layers'; train the routers again"),
        ({"hidden_size": 0}, "'hidden_size' is 0; expected a whole number from 1"),
        ({"num_windows": "8"}, "'num_windows' is '8'; expected a whole number from 1"),
        ({"num_windows": 8}, "was saved for num_windows 4, router_config.json says 8; put the co"),
        ({"num_layers": 10**12, "label_counts": []}, r"has shape \[3, 7, 5\], .* asks for"),
        ({"num_windows": True}, "'num_windows' is True; expected a whole number from 1"),
        ({"label_counts": [[1, 2, 3]]}, "'label_counts' isn't num_layers rows of 3 counts"),
        ({"label_counts": [[1, 2]] * 3}, "'label_counts' isn't num_layers rows of 3 counts"),
        ({"label_counts": [1, 2, 3]}, "'label_counts' isn't num_layers rows of 3 counts"),
        ({"label_counts": [[-1, 1, 2]] * 3}, "'label_counts' isn't num_layers rows of 3 counts"),
        ({"label_counts": [[1, 2, True]] * 3}, "'label_counts' isn't num_layers rows of 3 counts"),
        ({"base_model": 5}, "'base_model' is 5; expected a text"),
        ({"base_revision": 5}, "'base_revision' is 5; expected a text"),
        ({"training": []}, "'training' is not a JSON object"),
        ({"num_layers": 4, "label_counts": []}, "'.*' has shape .*, router_config.json asks for"),
        ({"hidden_size": 6}, r"'hidden_weight' has shape \[3, 7, 5\], .* asks for \[3, 7, 6\]"),
    ],
)
def test_a_config_that_cannot_be_trusted_is_refused(saved, changes, message):
    edit(saved, **changes)
    refused(saved, message)


@pytest.mark.parametrize("content", [b"{", b"", b"[1, 2]", b"\xff\xfe\x00"])
def test_a_broken_config_is_refused(saved, content):
    (saved / "router_config.json").write_bytes(content)
    refused(saved, "train the routers again")


def test_a_folder_without_weights_is_refused(saved):
    (saved / "routers.safetensors").unlink()
    refused(saved, r"has no routers\.safetensors; is it a folder of routers\?")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_weights_that_are_cut_off_are_refused(saved, kept):
    path = saved / "routers.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(saved, "is broken or cut off .*train the routers again")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("decision_bias", None, "lacks the tensor 'decision_bias'; train the routers again"),
        ("decision_bais", torch.zeros(3, 3), "unknown tensor 'decision_bais'; did you mean"),
        ("decision_bias", torch.zeros(3, 2), r"has shape \[3, 2\], .* asks for \[3, 3\]"),
        ("decision_bias", torch.full((3, 3), math.nan), "'decision_bias' holds NaN or infinity"),
        ("hidden_bias", torch.full((3, 7), math.inf), "'hidden_bias' holds NaN or infinity"),
        ("hidden_bias", torch.full((3, 7), -math.inf), "'hidden_bias' holds NaN or infinity"),
        ("hidden_bias", torch.zeros(3, 7).half(), "'hidden_bias' has dtype float16, expected fl"),
        ("decision_bias", torch.zeros(3, 3).long(), "'decision_bias' has dtype int64, expected"),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved, name, value, message):
    path = saved / "routers.safetensors"
    tensors = load_file(path)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, path)
    refused(saved, message)


def test_weights_say_how_many_windows_they_are_for_and_need_not(saved):
    path = saved / "routers.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"num_windows": str(W)}
    save_file(load_file(path), path)  # as saved by others: without a note
    assert load_routers(saved).config == CONFIG


def test_every_field_of_the_config_is_saved(saved):
    names = {field.name for field in dataclasses.fields(RouterConfig)}
    assert names | {"format_version"} == set(json.loads((saved / "router_config.json").read_text()))
