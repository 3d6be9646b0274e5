"""Answers one prompt, and draws its route; or a file of prompts, and writes the answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from drllm.cli.generation_inputs import PromptRow
from drllm.cli.reply import Reply, Session
from drllm.cli.terminal import draw_route
from drllm.cost import mean_executions
from drllm.errors import ConfigError
from drllm.paths import num_executions
from drllm.records.codec import write_atomically
from drllm.work.listener import format_duration

if TYPE_CHECKING:
    from drllm.model.prompts import Prompt, PromptForm
    from drllm.models.routed_model import RoutedModel
    from drllm.models.routing.batch_generation import GeneratedAnswer


def answer_prompt(session: Session, prompt: str) -> None:
    """Answer one rendered prompt, and print its route, tokens and time."""
    import torch

    terminal = session.terminal
    routed = session.routed
    torch.manual_seed(session.config.seed or 0)
    reply = Reply(routed, session.form, terminal)
    reply.generate(prompt, session.config)
    if not terminal.out.is_terminal:
        terminal.say(reply.text)
    route = routed.last_route[0].tolist()
    terminal.say()
    if session.path is None:
        terminal.out.print(draw_route(route))
        executions = _describe_executions(num_executions(route), routed, digits=0)
    else:
        terminal.say(f"path        {session.path.edits}")
        executions = _describe_executions(session.path.executions, routed)
    num_new = len(reply.tokens)
    passes = "forward pass" if num_new <= 1 else "forward passes"
    terminal.say(f"executions  {executions}, {num_new} {passes}")
    terminal.say(f"tokens      {reply.num_read} read, {num_new} generated")
    terminal.say(f"time        {reply.describe_time()}")


def answer_file(
    session: Session, file: Path, rows: Sequence[PromptRow], output: Path | None
) -> None:
    """Answer all prompts of a file, write or print the answers, and print the totals."""
    terminal = session.terminal
    prompts = _render_prompts(rows, session.form)
    num_read = _count_tokens(session, file, rows, prompts)
    started = time.perf_counter()
    answers = _generate_answers(session, prompts)
    seconds = time.perf_counter() - started
    text = _write_lines(session, rows, answers)
    if output is None:
        terminal.out.out(text, end="")
        _print_totals(session, answers, num_read, seconds, terminal.note)
        return
    write_atomically(output, text)
    terminal.say(f"answers     {output}")
    _print_totals(session, answers, num_read, seconds, terminal.say)


def _render_prompts(rows: Sequence[PromptRow], form: PromptForm) -> list[Prompt]:
    """Render the texts of a file; conversations stay as they are."""
    prompts: list[Prompt] = []
    for row in rows:
        if isinstance(row.prompt, str):
            prompts.append(form.fill(row.prompt))
        else:
            prompts.append(row.prompt)
    return prompts


def _count_tokens(
    session: Session, file: Path, rows: Sequence[PromptRow], prompts: Sequence[Prompt]
) -> int:
    """Count the tokens of all prompts.

    Raises ConfigError, with the line in the message, for a prompt that can't be answered.
    """
    from drllm.models.routing.batch_generation import prompt_tokens

    num_tokens = 0
    for row, prompt in zip(rows, prompts, strict=True):
        try:
            tokens = prompt_tokens(
                session.routed,
                prompt,
                chat=session.form.chat,
                max_new_tokens=session.config.max_new_tokens,
            )
        except ConfigError as error:
            raise ConfigError(f"{file}, line {row.line}: {error}") from error
        num_tokens += len(tokens)
    return num_tokens


def _generate_answers(session: Session, prompts: Sequence[Prompt]) -> list[GeneratedAnswer]:
    """Answer the rendered prompts, and show the progress."""
    import torch

    from drllm.models.routing.batch_generation import BATCH_SIZE, generate_many

    config = session.config
    form = session.form
    torch.manual_seed(config.seed or 0)
    with session.terminal.progress("answering", "prompts") as progress:
        return generate_many(
            session.routed,
            prompts,
            batch_size=config.batch_size or BATCH_SIZE,
            max_new_tokens=config.max_new_tokens,
            chat=form.chat,
            on_progress=progress,
            **config.sampling_options(),
            **form.generation_options(session.routed.tokenizer),
        )


def _write_lines(
    session: Session, rows: Sequence[PromptRow], answers: Sequence[GeneratedAnswer]
) -> str:
    """Return the lines of a file of answers as one text."""
    executions = None if session.path is None else session.path.executions
    lines = []
    for row, answer in zip(rows, answers, strict=True):
        lines.append(to_line(row, session.form.cut_answer(answer.text), answer, executions))
    return "".join(lines)


def _print_totals(
    session: Session,
    answers: Sequence[GeneratedAnswer],
    num_read: int,
    seconds: float,
    print_line: Callable[[str], None],
) -> None:
    """Print the numbers of prompts, plans and tokens, the executions, and the time.

    Args:
        session: The model and the settings.
        answers: The answers to all prompts.
        num_read: The number of tokens in all prompts.
        seconds: The time that the answers took.
        print_line: Prints a line, to standard output or to standard error.
    """
    routes = [answer.route for answer in answers]
    if session.path is None:
        num_plans = len(set(routes))
        plans = "plan" if num_plans == 1 else "plans"
        print_line(f"prompts     {len(answers)} under {num_plans} {plans}")
        executions = mean_executions(routes)
    else:
        print_line(f"prompts     {len(answers)} along one path")
        print_line(f"path        {session.path.edits}")
        executions = session.path.executions
    num_new = sum(len(answer.tokens) for answer in answers)
    print_line(f"executions  {_describe_executions(executions, session.routed)}")
    print_line(f"tokens      {num_read} read, {num_new} generated")
    speed = f"{num_new / seconds:.1f} tokens generated a second"
    print_line(f"time        {format_duration(seconds)} ({speed})")


def to_line(
    row: PromptRow, text: str, answer: GeneratedAnswer, executions: float | None = None
) -> str:
    """Write an answer as one line of JSON.

    Args:
        row: The row of the prompt.
        text: The text of the answer.
        answer: The tokens and the route of the answer.
        executions: The executions of the static path; None to count those of the answer's route.
    """
    key = "prompt" if isinstance(row.prompt, str) else "messages"
    if executions is None:
        executions = float(num_executions(answer.route))
    values = {
        "id": row.id,
        key: row.prompt,
        "answer": text.strip(),
        "route": answer.route,
        "executions": executions,
        "tokens": len(answer.tokens),
    }
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n"


def _describe_executions(executions: float, routed: RoutedModel, digits: int = 2) -> str:
    """Describe the executions of a forward pass, and their share of the model's layers."""
    num_layers = routed.num_layers
    share = 100 * executions / num_layers
    return f"{executions:.{digits}f} of {num_layers} a forward pass ({share:.0f} %)"
