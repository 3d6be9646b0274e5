"""Who searches the blocks: what every executor offers, and the one in this process.

Owns the interface between the runner, which decides what is searched and keeps the results, and
whoever does the work. Leaves the work itself to `attempts` and other processes to `ray_executor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from drllm.config import SearchConfig
from drllm.errors import ConfigError
from drllm.models.base.prompts import render
from drllm.models.routing.routed_model import RoutedModel
from drllm.search.block import check_tokenizer
from drllm.search.questions import Block
from drllm.search.retry import Searched, searched
from drllm.tasks.base import Prompt

OnShare = Callable[[Block, float, int], None]
"""Called within a block with the share of it that is done, and its paths tried so far."""


class Executor(Protocol):
    """One or more copies of the base model that search blocks."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Which base model, for the manifest."""

    @property
    def runtime(self) -> Mapping[str, Any]:
        """How it runs; another dtype, say, is another search."""

    def texts(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """Return what the model reads of each prompt; None where its template refuses it."""

    def search(
        self, blocks: Iterable[Block], config: SearchConfig, on_share: OnShare | None = None
    ) -> Iterator[tuple[Block, Searched]]:
        """Search blocks, and hand each over as soon as it is done, in any order.

        Blocks are taken when there is somebody to search them, not before.

        Args:
            blocks: What to search.
            config: Settings of the search.
            on_share: See `OnShare`; only executors that search one block at a time call it.
        """


class LocalExecutor:
    """Searches in this process, one block after the other.

    Args:
        routed: The model, made with its tokenizer.
        identity: Which base model it is.
        runtime: How it runs.

    Raises:
        TaskError: A model without its tokenizer.
    """

    def __init__(
        self, routed: RoutedModel, identity: Mapping[str, Any], runtime: Mapping[str, Any]
    ) -> None:
        check_tokenizer(routed)
        self.routed = routed
        self.identity = identity
        self.runtime = runtime

    def texts(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """Return what the model reads of each prompt; None where its template refuses it."""
        return read_texts(self.routed, prompts)

    def search(
        self, blocks: Iterable[Block], config: SearchConfig, on_share: OnShare | None = None
    ) -> Iterator[tuple[Block, Searched]]:
        """Search blocks in order; see `Executor.search`."""
        for block in blocks:
            on_round = None if on_share is None else partial(on_share, block)
            yield block, searched(self.routed, block, config, on_round)


def read_texts(routed: RoutedModel, prompts: Sequence[Prompt]) -> list[str | None]:
    """Return what a model reads of each prompt; None where its template refuses it."""
    return [_read_text(routed, prompt) for prompt in prompts]


def _read_text(routed: RoutedModel, prompt: Prompt) -> str | None:
    try:
        return render(routed.tokenizer, prompt.text, chat=prompt.chat)
    except ConfigError:  # said when the question is searched, and set aside there
        return None
