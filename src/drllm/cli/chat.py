"""`drllm generate` without a prompt, on a terminal: answer what is typed, turn by turn."""

from __future__ import annotations

import contextlib
import importlib
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from drllm.cli.terminal import Terminal
from drllm.config import GenerateConfig
from drllm.errors import ConfigError
from drllm.paths import num_executions, sketch

if TYPE_CHECKING:
    from drllm.models.base.prompts import Prompt, PromptForm
    from drllm.models.routing.routed_model import RoutedModel

LEAVE = "/exit"
HALF = "\ufffd"  # stands in a text for a character of which only the first token is there


class Along(NamedTuple):
    """A static path that every prompt runs: what it changes, and its cost in layer equivalents."""

    edits: str
    executions: float


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

        routed, new = self.routed, config.max_new_tokens
        tokens = prompt_tokens(routed, prompt, chat=self.form.chat, max_new_tokens=new)
        ids = torch.tensor([tokens], device=routed.model.device)
        self.num_read = len(tokens)
        try:
            routed.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
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
        """Tokens a second after the first; None where no other came."""
        after = len(self.times) - 2
        return after / (self.times[-1] - self.times[1]) if after > 0 else None

    def put(self, value: Any) -> None:
        """Take the prompt's tokens, then each new one."""
        # The tokens are on the CPU already, so the device has finished.
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            return
        self.tokens += value.flatten().tolist()
        if self._terminal.out.is_terminal and not (text := self.text).endswith(HALF):
            # What may turn out to begin the next prompt isn't shown yet.
            self._show(text[: max(0, len(text) - len(self.form.next_prompt or ""))])

    def end(self) -> None:
        """Do nothing: an answer that is stopped doesn't come here."""

    def _show(self, text: str) -> None:
        self._terminal.out.print(text[self._num_shown :], end="", soft_wrap=True)
        self._num_shown = max(self._num_shown, len(text))


def chat(
    routed: RoutedModel,
    form: PromptForm,
    config: GenerateConfig,
    terminal: Terminal,
    along: Along | None = None,
) -> None:
    """Answer what is typed until the user leaves; each turn takes a route, or runs the path."""
    import torch

    with contextlib.suppress(ImportError):  # not on Windows
        importlib.import_module("readline")  # `input` gets a history and can be edited
    torch.manual_seed(config.seed or 0)
    remembers = form.chat and getattr(routed.tokenizer, "chat_template", None) is not None
    if along is not None:
        terminal.note(f"path        {along.edits}")
    turn = (
        f"reads the conversation again{', since it takes a route of its own' * (along is None)}"
        if remembers
        else "stands alone, as in training; --chat remembers the conversation"
    )
    terminal.note(f"Each turn {turn}. Ctrl-C stops an answer; Ctrl-D or {LEAVE} leaves.")
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
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        reply = Reply(routed, form, terminal)
        try:
            reply.generate(messages if remembers else form.put(text), config)
        except ConfigError as error:
            terminal.fail(f"{error}; the conversation begins anew")
            messages.clear()
            continue
        except KeyboardInterrupt:
            pass  # what was said so far counts
        if reply.tokens:
            messages.append({"role": "assistant", "content": reply.text})
            if along is None:
                route = routed.last_route[0].tolist()
                cost = f"{sketch(route)}  {num_executions(route)}"
            else:
                cost = f"{along.executions:.4g}"
            speed = f", {reply.speed:.1f} a second" if reply.speed else ""
            terminal.say(
                f"{cost} of {routed.num_layers} executions, {len(reply.tokens)} tokens{speed}\n"
            )
        else:
            messages.pop()
