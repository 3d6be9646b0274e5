"""The chat of `drllm generate`: answers what the user types on a terminal, turn by turn."""

from __future__ import annotations

import contextlib
import importlib

from drllm.cli.reply import Reply, Session
from drllm.cli.terminal import Terminal
from drllm.errors import ConfigError
from drllm.paths import num_executions, sketch

LEAVE = "/exit"  # what the user types to leave


def chat(session: Session) -> None:
    """Answer each line that the user types, until the user leaves.

    With the chat template, the model reads the whole conversation at each turn. Without it, the
    model reads only the last line.
    """
    import torch

    terminal = session.terminal
    with contextlib.suppress(ImportError):  # Windows has no readline
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
        text = _read_turn(terminal)
        if text is None:
            return
        if text:
            _answer_turn(session, text, messages, remembers)


def _read_turn(terminal: Terminal) -> str | None:
    """Read a line that the user types.

    Returns an empty text if there is nothing to answer, and None if the user leaves.
    """
    try:
        text = input("> ").strip()
    except EOFError:
        terminal.say()
        return None
    except KeyboardInterrupt:
        terminal.note(f"\nCtrl-D or {LEAVE} leaves.")
        return ""
    return None if text == LEAVE else text


def _describe_turn(session: Session, remembers: bool) -> str:
    """Describe what the model reads at each turn; the words follow "Each turn"."""
    if not remembers:
        return (
            "is answered without the earlier turns, as in training; --chat keeps the conversation"
        )
    if session.path is None:
        return "reads the whole conversation, since each turn gets its own route"
    return "reads the whole conversation"


def _answer_turn(
    session: Session, text: str, messages: list[dict[str, str]], remembers: bool
) -> None:
    """Answer one turn, print its cost, and add the question and the answer to the conversation.

    Args:
        session: The model and the settings.
        text: What the user typed.
        messages: The conversation so far.
        remembers: Whether the model reads the whole conversation.
    """
    terminal = session.terminal
    messages.append({"role": "user", "content": text})
    reply = Reply(session.routed, session.form, terminal)
    prompt = messages if remembers else session.form.fill(text)
    try:
        reply.generate(prompt, session.config)
    except ConfigError as error:
        terminal.fail(f"{error}; the conversation starts again")
        messages.clear()
        return
    except KeyboardInterrupt:
        pass  # the text so far is the answer
    if not reply.tokens:
        messages.pop()
        return
    messages.append({"role": "assistant", "content": reply.text})
    terminal.say(_describe_cost(session, reply) + "\n")


def _describe_cost(session: Session, reply: Reply) -> str:
    """Describe the route of an answer, its executions and its speed."""
    if session.path is None:
        route = session.routed.last_route[0].tolist()
        cost = f"{sketch(route)}  {num_executions(route)}"
    else:
        cost = f"{session.path.executions:.4g}"
    text = f"{cost} of {session.routed.num_layers} executions, {len(reply.tokens)} tokens"
    if reply.speed is not None:
        text += f", {reply.speed:.1f} a second"
    return text
