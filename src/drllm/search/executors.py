"""Who searches the batches: this process; another that offers the same is on Ray, in `ray`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from drllm.config import SearchConfig
from drllm.errors import ConfigError, TaskError
from drllm.models.base.prompts import render
from drllm.models.routing.routed_model import RoutedModel
from drllm.records import Chunks
from drllm.search.batch import Searched, search_batch
from drllm.search.questions import Batch
from drllm.tasks.base import Prompt

OnShare = Callable[[Batch, float, int], None]
"""Called within a batch with the share of it that is done, and its paths tried now."""


def key_of(batch: Batch) -> str:
    """Return the key under which a batch is kept."""
    return f"batch {batch.number}"


class LocalExecutor:
    """Searches in this process, one batch after the other.

    Args:
        routed: The model, made with its tokenizer.
        identity: Which base model it is, for the manifest.
        runtime: How it runs; another dtype, say, is another search.

    Raises:
        TaskError: A model without its tokenizer.
    """

    def __init__(
        self, routed: RoutedModel, identity: Mapping[str, Any], runtime: Mapping[str, Any]
    ) -> None:
        if routed.tokenizer is None:
            raise TaskError("the search asks questions as text; give the model's tokenizer")
        self.routed = routed
        self.identity = identity
        self.runtime = runtime

    def texts(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """Return what the model reads of each prompt; None where its template refuses it."""
        texts: list[str | None] = []
        for prompt in prompts:
            try:
                texts.append(render(self.routed.tokenizer, prompt.text, chat=prompt.chat))
            except ConfigError:  # noqa: PERF203  # said when the question is searched
                texts.append(None)
        return texts

    def search(
        self,
        batches: Iterable[Batch],
        config: SearchConfig,
        chunks: Chunks | None = None,
        on_share: OnShare | None = None,
    ) -> Iterator[tuple[Batch, Searched]]:
        """Search batches, and hand each over as soon as it is done.

        Args:
            batches: Taken when there is somebody to search them, not before.
            config: Settings of the search.
            chunks: Where what is done of a batch is kept, under `key_of`.
            on_share: See `OnShare`.
        """
        for batch in batches:
            parts = None if chunks is None else chunks.within(key_of(batch))
            on_round = None if on_share is None else partial(on_share, batch)
            yield batch, search_batch(self.routed, batch, config, parts=parts, on_round=on_round)
