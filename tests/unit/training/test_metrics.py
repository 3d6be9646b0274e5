import pytest
import torch

from drllm.metrics import Counts, ratios
from drllm.training.trainer import count


def batch(rows: int = 20, layers: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, layers, 3, generator=generator)
    labels = torch.randint(3, (rows, layers), generator=generator)
    return logits, labels


def pairs(logits, labels) -> list[tuple[int, int]]:
    """(label, decision) of every layer, one by one."""
    decided = [three.index(max(three)) for three in logits.flatten(end_dim=-2).tolist()]
    return list(zip(labels.flatten().tolist(), decided, strict=True))


def f1_of(found: list[tuple[int, int]], wanted: int) -> float:
    hits = sum(label == decision == wanted for label, decision in found)
    precision = hits / sum(decision == wanted for _, decision in found)
    recall = hits / sum(label == wanted for label, _ in found)
    return 2 * precision * recall / (precision + recall)


def test_each_layer_is_counted_by_itself_and_counts_of_parts_add_up():
    logits, labels = batch()
    counts = count(logits, labels, loss=2.0)
    for layer, confusion in enumerate(counts.confusion):
        found = pairs(logits[:, layer], labels[:, layer])
        expected = [[found.count((label, decided)) for decided in range(3)] for label in range(3)]
        assert [list(row) for row in confusion] == expected
    parts = [(slice(15), 1.0), (slice(15, 20), 5.0)]
    assert counts == sum((count(logits[p], labels[p], loss) for p, loss in parts), Counts())


def test_ratios_equal_their_definitions():
    logits, labels = batch(seed=1)
    found = pairs(logits, labels)
    measured = ratios(count(logits, labels, loss=0.25))
    f1 = [f1_of(found, wanted) for wanted in range(3)]
    skips = [decision for label, decision in found if label == 0]
    repeats = [decision for label, decision in found if label == 2]
    assert measured == pytest.approx(
        {
            "routers_loss": 0.25,
            "accuracy": sum(label == decision for label, decision in found) / len(found),
            "macro_f1": sum(f1) / 3,
            "f1_skip": f1[0],
            "f1_execute": f1[1],
            "f1_repeat": f1[2],
            "acc_skip": skips.count(0) / len(skips),
            "acc_repeat": repeats.count(2) / len(repeats),
            "avg_layers": sum(decision for _, decision in found) / len(labels),
        }
    )


def test_a_class_decided_but_never_labelled_has_f1_zero():
    logits = torch.tensor([[[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    measured = ratios(count(logits, torch.tensor([[1, 1]]), loss=0.0))
    assert measured["f1_repeat"] == 0.0
    assert measured["acc_repeat"] is None


def test_skipping_everything_still_costs_one_execution():
    logits = torch.tensor([[[1.0, 0.0, 0.0]] * 4, [[0.0, 0.0, 1.0]] * 4])
    assert ratios(count(logits, torch.ones(2, 4, dtype=torch.long), loss=0.0))["avg_layers"] == 4.5
