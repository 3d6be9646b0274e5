"""`drllm generate` without a prompt, on a terminal: answer what is typed, turn by turn."""

from __future__ import annotations

import contextlib
import importlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drllm.cli.terminal import Terminal
from drllm.config import GenerateConfig
from drllm.errors import ConfigError
from drllm.listener import duration
from drllm.paths import num_executions, sketch

if TYPE_CHECKING:
    from drllm.models.base.prompts import Prompt, PromptForm
    from drllm.models.routing.routed_model import RoutedModel

LEAVE = "/exit"
HALF = "\ufffd"  # what a tokenizer decodes an incomplete character to


@dataclass(frozen=True, slots=True)
class PathSummary:
    """A static path that every prompt runs: what it changes, and its cost in executions."""

    edits: str
    executions: float


@dataclass(frozen=True, slots=True)
class Session:
    """What every answer of one command has in common.

    Attributes:
        routed: The model; its policy decides which layers run.
        form: How prompts are put.
        config: How text is generated.
        terminal: Where answers are shown.
        path: The static path that all prompts run; None where routes are decided.
    """

    routed: RoutedModel
    form: PromptForm
    config: GenerateConfig
    terminal: Terminal
    path: PathSummary | None = None


class Reply:
    """An answer while it is generated, and a streamer of transformers that gets its tokens.

    On a terminal it is shown as it comes. `num_read` counts the prompt's tokens, `tokens` are those
    generated so far, and `times` are when the prompt and each new token came.
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
        """Answer a prompt that is in its form already, or a conversation."""
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
                **config.sampling(),
                **self.form.options(routed.tokenizer),
            )
        finally:
            if self._terminal.out.is_terminal:
                self._show(self.text)
                self._terminal.say()

    @property
    def text(self) -> str:
        """What was generated so far."""
        text = self.routed.tokenizer.decode(self.tokens, skip_special_tokens=True)
        return self.form.answer(text).strip()

    @property
    def speed(self) -> float | None:
        """Tokens a second after the first; None for an answer of one token."""
        num_after_first = len(self.times) - 2
        if num_after_first <= 0:
            return None
        return num_after_first / (self.times[-1] - self.times[1])

    def describe_time(self) -> str:
        """Return how long reading the prompt and decoding took, in words."""
        start, first, last = self.times[0], self.times[1], self.times[-1]
        text = f"prefill {duration(first - start)}"
        if self.speed is not None:
            text += f", decode {duration(last - first)} ({self.speed:.1f} tokens a second)"
        return text

    def put(self, value: Any) -> None:
        """Take the prompt's tokens, then each new one."""
        # The tokens are on the CPU already, so the device has finished.
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            return
        self.tokens += value.flatten().tolist()
        if not self._terminal.out.is_terminal:
            return
        text = self.text
        if not text.endswith(HALF):
            # The end may turn out to be the beginning of the next prompt; it isn't shown yet.
            num_safe = len(text) - len(self.form.next_prompt or "")
            self._show(text[: max(0, num_safe)])

    def end(self) -> None:
        """Do nothing: an answer that is stopped doesn't come here."""

    def _show(self, text: str) -> None:
        self._terminal.out.print(text[self._num_shown :], end="", soft_wrap=True)
        self._num_shown = max(self._num_shown, len(text))


def chat(session: Session) -> None:
    """Answer what the user types until they leave; each turn takes a route, or runs the path."""
    import torch

    terminal = session.terminal
    with contextlib.suppress(ImportError):  # not on Windows
        importlib.import_module("readline")  # gives `input` a history and editing
    torch.manual_seed(session.config.seed or 0)
    has_template = getattr(session.routed.tokenizer, "chat_template", None) is not None
    remembers = session.form.chat and has_template
    if session.path is not None:
        terminal.note(f"path        {session.path.edits}")
    terminal.note(
        f"Each turn {_describe_turn(session, remembers)}. Ctrl-C stops an answer; Ctrl-D or "
        f"{LEAVE} leaves."
    )
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            terminal.say()
            return
        except KeyboardInterrupt:
            terminal.note(f"\nCtrl-D or {LEAVE} leaves.")
            continue
        if text == LEAVE:
            return
        if text:
            _answer_turn(session, text, messages, remembers)


def _describe_turn(session: Session, remembers: bool) -> str:
    """Return what each turn of the chat reads, in words."""
    if not remembers:
        return "stands alone, as in training; --chat remembers the conversation"
    if session.path is None:
        return "reads the conversation again, since it takes a route of its own"
    return "reads the conversation again"


def _answer_turn(
    session: Session, text: str, messages: list[dict[str, str]], remembers: bool
) -> None:
    """Answer one turn, print its cost, and add both texts to the conversation."""
    terminal = session.terminal
    messages.append({"role": "user", "content": text})
    reply = Reply(session.routed, session.form, terminal)
    prompt = messages if remembers else session.form.put(text)
    try:
        reply.generate(prompt, session.config)
    except ConfigError as error:
        terminal.fail(f"{error}; the conversation begins anew")
        messages.clear()
        return
    except KeyboardInterrupt:
        pass  # the part that was generated counts
    if not reply.tokens:
        messages.pop()
        return
    messages.append({"role": "assistant", "content": reply.text})
    terminal.say(_describe_cost(session, reply) + "\n")


def _describe_cost(session: Session, reply: Reply) -> str:
    """Return the route of an answer, its executions, and how fast it came."""
    if session.path is None:
        route = session.routed.last_route[0].tolist()
        cost = f"{sketch(route)}  {num_executions(route)}"
    else:
        cost = f"{session.path.executions:.4g}"
    text = f"{cost} of {session.routed.num_layers} executions, {len(reply.tokens)} tokens"
    if reply.speed is not None:
        text += f", {reply.speed:.1f} a second"
    return text
