"""Turns the texts that `heal` trains on into tokens, and answers the prompts without answers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from drllm.errors import ConfigError
from drllm.model.load import BaseModel
from drllm.model.prompts import Prompt as Conversation
from drllm.model.prompts import context_length, encode, render
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.batch_generation import generate_many
from drllm.records.codec import hash_values
from drllm.tuning.heal_texts import TextSource, Tokens
from drllm.tuning.path_scorer import make_text_items
from drllm.work.listener import Listener
from drllm.work.store import ResultStore

ANSWERS_AT_ONCE = 32  # prompts that are answered, and kept, together
PROMPTS = "prompts_sha256"  # the key of the result of `digest_prompts` in the identity of a run
MAX_DIGESTED = 1000  # texts of a source that are in this digest; each shows the chat template


def check_max_tokens(model: Any, max_tokens: int) -> None:
    """Raise ConfigError if a model can't read sequences of `max_tokens` tokens."""
    context = context_length(model)
    if context is not None and max_tokens > context:
        raise ConfigError(
            f"--max-tokens is {max_tokens}, and this model reads {context} tokens; give at most "
            f"{context}"
        )


def digest_prompts(base: BaseModel, sources: Sequence[TextSource]) -> str:
    """Return the digest by which a run recognises the tokenizer and the chat template.

    It is a hash of the tokens that the model reads of the first texts or prompts of each source.
    """
    tokenizer = base.tokenizer
    tokens: list[Tokens] = []
    for source in sources:
        first = replace(
            source, prompts=source.prompts[:MAX_DIGESTED], texts=source.texts[:MAX_DIGESTED]
        )
        if not first.is_open:
            tokens += tokenize_source(base, first)
            continue
        for prompt in first.prompts:
            text = render(tokenizer, prompt.content, chat=True)
            tokens.append(tuple(encode(tokenizer, text)))
    return hash_values(tokens)


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """Tokenizes the texts of sources.

    Args:
        routed: The model; prompts without answers are answered along its full path.
        max_tokens: Maximum tokens of a generated answer, and of a sequence to train on.
        store: Keeps the generated answers.
        listener: Gets a note if texts are longer than `max_tokens`, and how long answers took.
    """

    routed: RoutedModel
    max_tokens: int
    store: ResultStore
    listener: Listener

    def tokenize_sources(self, sources: Sequence[TextSource]) -> dict[str, list[Tokens]]:
        """Return name of a source → its texts, or its questions with their answers, as tokens."""
        texts = {source.name: self._tokenize(source) for source in sources}
        for name, source_texts in texts.items():
            self._note_cuts(name, source_texts)
        return texts

    def _tokenize(self, source: TextSource) -> list[Tokens]:
        if source.is_open:
            return self._answer_source(source)
        with self.listener.busy("reading the texts"):
            return tokenize_source(self.routed, source)

    def _answer_source(self, source: TextSource) -> list[Tokens]:
        """Answer the prompts of a source, or read the kept answers.

        A note says how long the new answers took.
        """
        texts: list[Tokens] = []
        num_answered = 0
        seconds = 0.0
        prompts = [prompt.content for prompt in source.prompts]
        with self.listener.progress(f"answering prompts of {source.name}", "prompts") as report:
            for start in range(0, len(prompts), ANSWERS_AT_ONCE):
                block = prompts[start : start + ANSWERS_AT_ONCE]
                # By the prompts, since sources of one name may have different prompts.
                key = f"answers to {hash_values(block)}"
                answers = self.store.get(key, list[Tokens])
                if answers is None:
                    started = time.perf_counter()
                    made = answer_prompts(self.routed, block, self.max_tokens)
                    seconds += time.perf_counter() - started
                    num_answered += len(block)
                    answers = self.store.of(list[Tokens]).put(key, made)
                texts += answers
                report(len(texts), len(prompts))
        note_answers(self.listener, source.name, num_answered, seconds)
        return texts

    def _note_cuts(self, name: str, texts: Sequence[Tokens]) -> None:
        """Note how many texts of a source are cut, and what a user can do.

        `heal` and `bypass` have --max-tokens, and `shrink` hasn't.
        """
        num_cut = len([text for text in texts if len(text) > self.max_tokens])
        if num_cut == 0:
            return
        longest = max(map(len, texts))
        context = context_length(self.routed.model)
        note = (
            f"{num_cut} of {len(texts)} texts of {name} have over {self.max_tokens} tokens and are "
            f"cut; each part is trained on without the text before it, so split long texts "
            f"yourself, at the end of a section"
        )
        if context is None or longest <= context:
            note += f"; heal and bypass read them whole with --max-tokens {longest}"
        self.listener.note(note)


def note_answers(listener: Listener, name: str, num_prompts: int, seconds: float) -> None:
    """Note how long it took to answer prompts of a source; nothing if there were none."""
    if num_prompts > 0:
        prompts = "1 prompt" if num_prompts == 1 else f"{num_prompts} prompts"
        listener.note(f"answered {prompts} of {name} in {seconds:.1f} s")


def tokenize_source(model: RoutedModel | BaseModel, source: TextSource) -> list[Tokens]:
    """Return the texts of a source, or its questions with their right answers, as tokens.

    Args:
        model: The model; its weights aren't needed.
        source: The source; its prompts have right answers.
    """
    if source.texts:
        return [tuple(encode(model.tokenizer, text)) for text in source.texts]
    texts: list[Tokens] = []
    for item in make_text_items(model, source.prompts):
        request = item.request
        texts.append((*request.context, *request.continuations[0]))
    return texts


def answer_prompts(
    routed: RoutedModel, prompts: Sequence[Conversation], max_tokens: int
) -> list[Tokens]:
    """Answer prompts along the full path, and return the prompts with their answers, as tokens.

    Answers are shorter than `max_tokens` where the model's context has no room for more after the
    longest prompt.

    Args:
        routed: The model.
        prompts: The prompts.
        max_tokens: Maximum tokens of an answer.

    Raises:
        ConfigError: A prompt leaves no room for an answer.
    """
    tokenizer = routed.tokenizer
    rows = [encode(tokenizer, render(tokenizer, prompt, chat=True)) for prompt in prompts]
    context = context_length(routed.model)
    if context is not None:
        room = context - max(map(len, rows))
        max_tokens = max(1, min(max_tokens, room))
    answers = generate_many(routed, prompts, max_new_tokens=max_tokens)
    texts: list[Tokens] = []
    for prompt_tokens, answer in zip(rows, answers, strict=True):
        texts.append((*prompt_tokens, *answer.tokens))
    return texts
