"""How a tuning repairs paths: whether it does, and with which texts.

Candidates are repaired by a cheap stand-in (see `stand_in`). The best path of each level is
refitted (see `refit`). Both are solved where the blocks run, from the texts of a `Repair`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from drllm.config import TuneConfig
from drllm.config.heal import NO_REPAIR, REFIT, REFIT_TOKENS
from drllm.errors import ArchitectureError
from drllm.model.batching import FLOAT_BYTES
from drllm.model.prompts import Prompt as Conversation
from drllm.model.prompts import context_length
from drllm.models.workers import Workers
from drllm.tasks.examples import choose
from drllm.tuning.calibration import (
    MAX_TOKENS,
    STAND_IN_TOKENS,
    choose_texts,
    describe_calibration,
)
from drllm.tuning.heal_texts import TextSource, Tokens
from drllm.tuning.heal_tokens import ANSWERS_AT_ONCE, note_answers, tokenize_source
from drllm.tuning.score_blocks import PromptAnswerer, RefitCheck
from drllm.work.listener import Listener
from drllm.work.run import Block, Executor, run
from drllm.work.store import ResultStore

MAX_OPEN_PROMPTS = 256  # maximum prompts of a source that the full path answers, drawn at random
MAX_ANSWER_TOKENS = 128  # maximum tokens of such an answer


@dataclass(frozen=True, slots=True)
class Repair:
    """What paths are repaired with.

    Attributes:
        texts: The texts that paths are refitted on, as tokens.
        stand_in_texts: The texts that the stand-in is fitted on, as tokens.
    """

    texts: Sequence[Tokens]
    stand_in_texts: Sequence[Tokens]


def choose_tuning_repair(config: TuneConfig, executor: Executor, listener: Listener) -> str:
    """Return how paths are repaired: `REFIT` or `NO_REPAIR`.

    Without a setting, paths are repaired if the model's layers can be refitted. If not, a note
    gives the reason.

    Raises:
        ArchitectureError: `--repair refit` is given, and a layer can't be refitted.
    """
    if config.repair == NO_REPAIR:
        return NO_REPAIR
    with listener.busy("checking whether paths can be refitted"):
        function = RefitCheck(config.refit_tokens or REFIT_TOKENS)
        [obstacle] = run([Block("refit", None)], function, executor)
    if not obstacle:
        return REFIT
    if config.repair == REFIT:
        raise ArchitectureError(f"--repair {REFIT}: {obstacle}; give --repair {NO_REPAIR}")
    listener.note(f"paths are chosen without repair: {obstacle}")
    return NO_REPAIR


def make_repair(
    workers: Workers,
    sources: Sequence[TextSource],
    config: TuneConfig,
    store: ResultStore,
    listener: Listener,
) -> Repair:
    """Tokenize the texts that paths are repaired with, and choose among them.

    Prompts without right answers are answered along the full path.
    """
    by_source: dict[str, list[Tokens]] = {}
    for source in sources:
        with listener.busy(f"reading the texts of {source.name}"):
            if source.is_open:
                by_source[source.name] = _answer_source(
                    source, workers.executor, store, listener, config.seed
                )
            else:
                by_source[source.name] = tokenize_source(workers.base, source)
    num_tokens = config.refit_tokens or REFIT_TOKENS
    num_stand_in = min(num_tokens, STAND_IN_TOKENS)
    max_tokens = min(MAX_TOKENS, context_length(workers.base.model) or MAX_TOKENS)
    texts = choose_texts(by_source, num_tokens, config.seed, max_tokens)
    stand_in_texts = choose_texts(by_source, num_stand_in, config.seed, max_tokens)
    width = workers.base.model.config.get_text_config().hidden_size
    num_stand_in_tokens = sum(map(len, stand_in_texts))
    num_bytes = FLOAT_BYTES * workers.base.num_layers * width * num_stand_in_tokens
    for line in describe_calibration(list(by_source), texts, num_bytes):
        listener.note(line)
    return Repair(texts, stand_in_texts)


def _answer_source(
    source: TextSource, executor: Executor, store: ResultStore, listener: Listener, seed: int
) -> list[Tokens]:
    """Answer some prompts of a source along the full path, or read the kept answers.

    A note says how long the new answers took.
    """
    prompts_to_answer = choose(source.prompts, MAX_OPEN_PROMPTS, seed)
    prompts = [prompt.content for prompt in prompts_to_answer]
    blocks: list[Block[Sequence[Conversation]]] = []
    for start in range(0, len(prompts), ANSWERS_AT_ONCE):
        block = prompts[start : start + ANSWERS_AT_ONCE]
        blocks.append(Block(f"{source.name} texts from {start}", block, len(block)))
    function = PromptAnswerer(MAX_ANSWER_TOKENS)
    counter = _NewPrompts()
    started = time.perf_counter()
    results = run(blocks, function, executor, keep=store.of(list[Tokens]), on_result=counter.add)
    note_answers(listener, source.name, counter.number, time.perf_counter() - started)
    texts: list[Tokens] = []
    for result in results:
        texts += result
    return texts


@dataclass
class _NewPrompts:
    """Counts the prompts that are answered now, not those whose answers were kept."""

    number: int = 0

    def add(self, block: Block[Any], _result: object, /, *, is_new: bool) -> None:
        """Receive the answers of a block; see `OnResult`."""
        if is_new:
            self.number += len(block.data)
