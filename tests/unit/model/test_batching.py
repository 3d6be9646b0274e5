"""How paths are split over forward passes, and what happens when memory runs out."""

import logging
from types import SimpleNamespace

import pytest
import torch

from drllm.errors import ModelError
from drllm.model import batching as passes
from drllm.model.batching import MAX_PATHS, MemoryBatcher, PathSize, is_out_of_memory
from drllm.models.scoring.prefix_cache import PrefixCache

PRICE = PathSize(num_tokens=10, num_logits=10)


def cpu_is_full():
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("an exbibyte was to be had")


@pytest.fixture
def model(tiny_llama):
    return tiny_llama()


class Work:
    """Doubles numbers; raises what it was given where a pass has more of them than fit."""

    def __init__(self, fits, error=None):
        self.fits, self.error, self.sizes = fits, error, []

    def __call__(self, part):
        self.sizes.append(len(part))
        if len(part) > self.fits:
            raise self.error
        return [2 * item for item in part]


def test_a_given_number_of_paths_is_used(model):
    work = Work(100)
    split = MemoryBatcher(model, PrefixCache(0), 4)
    assert [2 * n for n in range(10)] == split.run(range(10), PRICE, work)
    assert work.sizes == [4, 4, 2]


def test_half_of_the_free_memory_is_filled_by_the_price_of_a_path(model, monkeypatch):
    price = PRICE.num_bytes(model)
    monkeypatch.setattr(passes, "free_bytes", lambda _device: 20 * price)
    assert MemoryBatcher(model, PrefixCache(0)).num_paths(PRICE) == 10
    # What states may still take of the free memory isn't spent twice, but for half of it.
    assert MemoryBatcher(model, PrefixCache(8 * price)).num_paths(PRICE) == 6
    assert MemoryBatcher(model, PrefixCache(90 * price)).num_paths(PRICE) == 5


def test_processes_that_share_a_machine_count_on_a_part_of_its_memory_each(monkeypatch):
    monkeypatch.setattr(passes, "_num_sharing", 1)  # set back afterwards
    machine = SimpleNamespace(available=12_000)
    monkeypatch.setattr(passes.psutil, "virtual_memory", lambda: machine)
    assert passes.free_bytes(torch.device("cpu")) == 12_000
    passes.share_memory(4)
    assert passes.free_bytes(torch.device("cpu")) == 3_000


def test_a_pass_has_a_path_at_least_and_no_more_than_keep_a_device_busy(model, monkeypatch):
    monkeypatch.setattr(passes, "free_bytes", lambda _device: 0)
    assert MemoryBatcher(model, PrefixCache(0)).num_paths(PRICE) == 1
    monkeypatch.setattr(passes, "free_bytes", lambda _device: 1 << 60)
    assert MemoryBatcher(model, PrefixCache(0)).num_paths(PRICE) == MAX_PATHS


def test_the_price_counts_states_key_values_and_logits(model):
    # 6 layers, 32 hidden, 2 key-value heads of 8, 101 words, 4 bytes; logits are held thrice.
    assert PRICE.num_bytes(model) == 10 * 6 * 32 * 4 + 10 * 101 * 12
    with_kv = PathSize(num_tokens=10, num_logits=1, keeps_kv=True)
    assert with_kv.num_bytes(model) == 10 * 6 * (32 + 2 * 2 * 2 * 8) * 4 + 101 * 12


@pytest.mark.parametrize(
    "error", [cpu_is_full(), torch.cuda.OutOfMemoryError("CUDA out of memory")], ids=["cpu", "cuda"]
)
def test_out_of_memory_halves_the_pass_and_says_so(model, caplog, error):
    work = Work(3, error)
    split = MemoryBatcher(model, PrefixCache(0), 8)
    with caplog.at_level(logging.WARNING):
        assert [2 * n for n in range(10)] == split.run(range(10), PRICE, work)
    assert work.sizes == [8, 4, 2, 2, 2, 2, 2]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "out of memory on cpu with 8 paths in a pass; continuing with 4",
        "out of memory on cpu with 4 paths in a pass; continuing with 2",
    ]
    assert split.num_paths(PRICE) == 2, "what was found holds for later calls"


def test_a_single_path_that_does_not_fit_is_an_error_that_says_what_to_do(model):
    split = MemoryBatcher(model, PrefixCache(1), 2)
    with pytest.raises(ModelError, match=r"10 tokens doesn't fit .* cpu; lower --state-cache-gb"):
        split.run(range(3), PRICE, Work(0, cpu_is_full()))
    without_states = MemoryBatcher(model, PrefixCache(0), 2)
    with pytest.raises(ModelError, match=r"doesn't fit .* cpu; load the model with --dtype"):
        without_states.run(range(3), PRICE, Work(0, cpu_is_full()))


def test_other_errors_pass_through(model):
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    split = MemoryBatcher(model, PrefixCache(0), 2)
    with pytest.raises(RuntimeError, match="shapes differ"):
        split.run(range(3), PRICE, Work(0, RuntimeError("shapes differ")))
