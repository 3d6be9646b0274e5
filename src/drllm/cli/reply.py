"""Generates one answer, and holds what all answers of a command need."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drllm.cli.terminal import Terminal
from drllm.config import GenerateConfig
from drllm.work.listener import format_duration

if TYPE_CHECKING:
    from drllm.model.prompts import Prompt, PromptForm
    from drllm.models.routed_model import RoutedModel

INCOMPLETE = "\ufffd"  # how a tokenizer decodes a part of a character


@dataclass(frozen=True, slots=True)
class PathSummary:
    """The static path that all prompts run.

    Attributes:
        edits: How the path differs from the full path, in words.
        executions: What the path costs, in layer equivalents.
    """

    edits: str
    executions: float


@dataclass(frozen=True, slots=True)
class Session:
    """The model and the settings of one command; all of its answers use them.

    Attributes:
        routed: The model; its policy decides which layers run.
        form: How prompts are rendered.
        config: How text is generated.
        terminal: Where answers are shown.
        path: The static path that all prompts run; None if each prompt gets its own route.
    """

    routed: RoutedModel
    form: PromptForm
    config: GenerateConfig
    terminal: Terminal
    path: PathSummary | None = None


class Reply:
    """Generates one answer. On a terminal the text is printed while it is generated.

    A reply is a streamer of transformers, which calls `put` with each new token.

    Attributes:
        num_read: The number of tokens in the prompt.
        tokens: The tokens of the answer so far.
        times: When the prompt and each new token arrived, in seconds of `time.perf_counter`.
    """

    def __init__(self, routed: RoutedModel, form: PromptForm, terminal: Terminal) -> None:
        self.routed = routed
        self.form = form
        self.num_read = 0
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._terminal = terminal
        self._num_shown = 0

    def generate(self, prompt: Prompt, config: GenerateConfig) -> None:
        """Answer a prompt: a rendered text, or the messages of a conversation.

        Raises ConfigError if the prompt is too long for the model, or if it has no tokens.
        """
        import torch

        from drllm.models.routing.batch_generation import prompt_tokens

        routed = self.routed
        num_new = config.max_new_tokens
        tokens = prompt_tokens(routed, prompt, chat=self.form.chat, max_new_tokens=num_new)
        ids = torch.tensor([tokens], device=routed.model.device)
        self.num_read = len(tokens)
        try:
            routed.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_new,
                pad_token_id=routed.tokenizer.pad_token_id,
                streamer=self,
                **config.sampling_options(),
                **self.form.generation_options(routed.tokenizer),
            )
        finally:
            if self._terminal.out.is_terminal:
                self._show(self.text)
                self._terminal.say()

    @property
    def text(self) -> str:
        """The answer so far."""
        text = self.routed.tokenizer.decode(self.tokens, skip_special_tokens=True)
        return self.form.cut_answer(text).strip()

    @property
    def speed(self) -> float | None:
        """Tokens a second after the first new token; None with fewer than two new tokens."""
        num_after_first = len(self.times) - 2  # without the prompt and the first new token
        if num_after_first <= 0:
            return None
        return num_after_first / (self.times[-1] - self.times[1])

    def describe_time(self) -> str:
        """Describe the time of prefill and decoding."""
        start = self.times[0]
        first = self.times[1]
        last = self.times[-1]
        text = f"prefill {format_duration(first - start)}"
        if self.speed is not None:
            text += f", decode {format_duration(last - first)} ({self.speed:.1f} tokens a second)"
        return text

    def put(self, value: Any) -> None:
        """Receive the prompt's tokens, then each new token."""
        # The tokens are on the CPU already, so the device has finished.
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            return
        self.tokens += value.flatten().tolist()
        if not self._terminal.out.is_terminal:
            return
        text = self.text
        if text.endswith(INCOMPLETE):
            return
        # A model may go on and write the beginning of the next prompt, which is cut off the answer.
        # So the last characters aren't shown until it is clear that they belong to the answer.
        num_unsure = len(self.form.next_prompt or "")
        self._show(text[: max(0, len(text) - num_unsure)])

    def end(self) -> None:
        """Do nothing: `generate` prints the end of the answer, also after an interruption.

        transformers calls this method only at the end of a complete answer.
        """

    def _show(self, text: str) -> None:
        """Print the part of the text that wasn't printed yet."""
        self._terminal.out.print(text[self._num_shown :], end="", soft_wrap=True)
        self._num_shown = max(self._num_shown, len(text))
