"""The pretended devices themselves: what is planted is found, and what is right passes."""

import pytest
import torch
from torch import nn

from devices.events import COPY, RUN, WAIT
from devices.pretended import Devices

CUDA0, CUDA1 = "cuda:0", "cuda:1"


@pytest.fixture
def devices():
    with Devices() as found:
        yield found


def kinds(devices, kind):
    return [each.what for each in devices.events if each.kind == kind]


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.zeros(2, 3, device=CUDA0),
        lambda: torch.arange(6, device="cuda"),
        lambda: torch.randn(2, 3).to(CUDA0),
        lambda: torch.tensor([[1, 2]], device=CUDA0),
        lambda: torch.ones(2, device=CUDA0)[None, :1],
        lambda: torch.ones(2, device=CUDA0).new_zeros(3),
    ],
)
def test_a_tensor_says_where_it_was_put(devices, made):
    tensor = made()
    assert (str(tensor.device), tensor.is_cuda) == (CUDA0, True)


def test_a_result_lies_where_its_inputs_lie_and_has_their_values(devices):
    left, right = torch.randn(3, 4), torch.randn(4, 2)
    product = left.to(CUDA1) @ right.to(CUDA1)
    assert str(product.device) == CUDA1
    assert torch.equal(product.cpu(), left @ right)


def test_a_change_in_place_reaches_every_view(devices):
    tensor = torch.zeros(3, device=CUDA0)
    part = tensor[1:]
    part += 1
    tensor[0] = 5
    assert tensor.tolist() == [5, 1, 1]


def test_gradients_cross_devices_and_equal_those_of_the_cpu(devices):
    weight, here = torch.randn(3, 3), torch.randn(2, 3)
    plain = weight.clone().requires_grad_()
    (here @ plain).square().sum().backward()
    there = weight.to(CUDA1).requires_grad_()
    (here.to(CUDA0).to(CUDA1) @ there).square().to(CUDA0).sum().backward()
    assert str(there.grad.device) == CUDA1
    assert torch.equal(there.grad.cpu(), plain.grad)


def test_a_module_moves_with_its_parameters_and_buffers(devices):
    module = nn.BatchNorm1d(4).to(CUDA1).eval()
    assert {str(each.device) for each in module.state_dict().values()} == {CUDA1}
    assert str(module(torch.randn(2, 4, device=CUDA1)).device) == CUDA1


@pytest.mark.parametrize(
    "mixed",
    [
        lambda one, other: one + other,
        lambda one, other: torch.cat([one, other]),
        lambda one, other: one @ other.T,
        lambda one, other: one + torch.ones(2, 2),
        lambda one, other: one[torch.tensor([0], device=CUDA1)],
        lambda one, other: one.index_select(0, torch.tensor([0])),
        lambda one, other: torch.where(one > 0, one, other),
    ],
)
def test_an_operation_on_tensors_of_two_devices_fails(devices, mixed):
    one, other = torch.ones(2, 2, device=CUDA0), torch.ones(2, 2, device=CUDA1)
    with pytest.raises(RuntimeError, match="a GPU computes with"):
        mixed(one, other)


@pytest.mark.parametrize(
    "fine",
    [
        lambda one: one + torch.tensor(2.0),  # a number of the CPU is passed along
        lambda one: one * 2,
        lambda one: torch.where(one > 0, one, torch.tensor(0.0)),
        lambda one: one.masked_fill(one > 0, 0.0),
    ],
)
def test_a_single_number_of_the_cpu_is_no_mix_and_no_wait(devices, fine):
    fine(torch.ones(2, 2, device=CUDA0))
    assert {each.kind for each in devices.events} == {RUN}


@pytest.mark.parametrize(
    "wait",
    [
        lambda one: one.sum().item(),
        lambda one: bool((one > 0).all()),
        lambda one: int(one.argmax()),
        lambda one: one.tolist(),
        lambda one: one.cpu(),
        lambda one: one.to("cpu").numpy(),
        lambda one: one.nonzero(),
        lambda one: one[one > 0],
        lambda one: torch.equal(one, one + 1),
        lambda one: one.unique(),
        lambda one: torch.tensor([1], device=CUDA0),
        lambda one: torch.tensor([1]).to(CUDA0, non_blocking=True),  # not pinned
        lambda one: one.copy_(torch.ones(2, 2)),
        lambda one: one[torch.tensor([0])],  # the index is copied
    ],
)
def test_what_waits_for_the_device_is_counted(devices, wait):
    one = torch.ones(2, 2, device=CUDA0)
    assert not kinds(devices, WAIT)
    wait(one)
    assert kinds(devices, WAIT)


def test_a_copy_between_devices_or_out_of_pinned_memory_is_no_wait(devices):
    torch.ones(2, device=CUDA0).to(CUDA1)
    torch.ones(2).pin_memory().to(CUDA0, non_blocking=True)
    assert kinds(devices, COPY) == ["cuda:0 to cuda:1", "cpu to cuda:0"]
    assert not kinds(devices, WAIT)


def test_what_the_device_is_told_to_compute_is_counted_and_a_view_is_not(devices):
    one = torch.ones(2, 2, device=CUDA0)
    torch.cat([one[0], one.view(4)[1:]]).mul_(2)
    assert kinds(devices, RUN) == ["cat", "mul_"]


def test_nothing_is_counted_or_pretended_outside_of_the_block():
    with Devices() as devices:
        tensor = torch.ones(2, device=CUDA0)
    tensor.sum().item()
    assert devices.events == []
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.ones(2, device=CUDA0)


def test_an_event_names_the_line_that_asked(devices):
    torch.ones(2, device=CUDA0).tolist()
    assert devices.events[0].where == "test_pretended.py"
