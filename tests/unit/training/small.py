"""A small set of features, the base model it stands for, and who listens to its training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from drllm.config import TrainConfig
from drllm.training.features import Features
from drllm.work.listener import Listener, OnProgress
from slow_way import window_means

L, W, D = 3, 4, 6
IDENTITY: dict[str, Any] = {
    "id": "org/tiny",
    "revision": "main",
    "class": "LlamaForCausalLM",
    "num_layers": L,
    "hidden_size": D,
    "fingerprint": "0123456789abcdef",
}
QUICK = TrainConfig(
    num_epochs=3, gradient_accumulation=4, num_windows=W, router_width=5, warmup_steps=2
)


def make_features(num_targets: int = 12, windows: int = W) -> Features:
    """Features from which the labels can be learned: the first component gives them away."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(
        torch.tensor([0.3, 0.6, 0.1]), num_targets * L, replacement=True, generator=generator
    ).view(num_targets, L)
    labels[labels.sum(dim=1) == 0, -1] = 1
    means = torch.randn(num_targets, L, windows, D, generator=generator)
    means[..., 0] += 4 * (labels[..., None] - 1)
    filled = torch.randint(1, windows + 1, (num_targets,), generator=generator)
    for row, number in enumerate(filled.tolist()):
        means[row, :, number:] = 0
    return Features(
        means=means,
        filled=filled,
        labels=labels,
        questions=tuple(f"question {row}" for row in range(num_targets)),
        tasks=tuple("odd" if row % 2 else "even" for row in range(num_targets)),
    )


def means_of(features: Features) -> torch.Tensor:
    """Every target's windows, `[N, L, W, D]`, in memory."""
    return features.rows(range(len(features.labels)))


def assert_windows(means: torch.Tensor, inputs: Sequence[torch.Tensor], **close: float) -> None:
    """What one target's routers read, `[L, W, D]`, is the slow means of its layers' inputs."""
    for layer, hidden in enumerate(inputs):
        windows = torch.stack(window_means(list(hidden), W))
        torch.testing.assert_close(means[layer, : len(windows)], windows, **close)
        assert not means[layer, len(windows) :].any()


def files_of(folder: Path, name: str = "*") -> dict[str, bytes]:
    """Every file of a name below a folder, by its place."""
    files = (path for path in folder.rglob(name) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Watching(Listener):
    """Passes progress, and notes, on to functions."""

    def __init__(
        self, on_progress: Callable[..., Any], on_note: Callable[[str], Any] = lambda text: None
    ) -> None:
        self.on_progress, self.on_note = on_progress, on_note

    def note(self, text: str) -> None:
        self.on_note(text)

    @contextmanager
    def progress(self, title: str, unit: str) -> Iterator[OnProgress]:
        yield self.on_progress


class BrokenOffError(Exception):
    """Stands for a kill."""


def stop_at(done_before: int) -> Watching:
    """A listener that breaks off once so much is done."""

    def on_progress(done: int, total: int) -> None:
        if done >= done_before:
            raise BrokenOffError

    return Watching(on_progress)
