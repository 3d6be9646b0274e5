"""`drllm generate`: one prompt with its route drawn, a file of prompts, or a chat (`cli.chat`)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from drllm.cli.chat import Along, Reply, chat
from drllm.cli.parser import CommandLine
from drllm.cli.stages import model_of, read_routers
from drllm.cli.terminal import Terminal, draw_route
from drllm.cli.verbs import VERBS, Flag, verb
from drllm.config import DepthConfig, GenerateConfig, ModelConfig
from drllm.config.fields import flag_of
from drllm.cost import mean_executions
from drllm.errors import ConfigError, TaskError
from drllm.listener import duration
from drllm.paths import num_executions
from drllm.pipeline.folder import loaded
from drllm.records.codec import write_atomically
from drllm.records.places import check_file
from drllm.records.static_paths import read_path
from drllm.tasks.rows import messages_of, read_rows, text_of

if TYPE_CHECKING:
    from drllm.models.base.prompts import PromptForm
    from drllm.models.routers.stack import RouterStack
    from drllm.models.routing.batch_generation import Answer
    from drllm.models.routing.routed_model import RoutedModel

KINDS = ("prompt", "question", "messages")
"""The key under which a row of a file asks; `question` is another name for `prompt`."""


class Asked(NamedTuple):
    """One row of a file of prompts."""

    line: int
    id: str | int
    prompt: str | list[dict[str, Any]]  # a text or messages


@verb(
    "generate",
    example='drllm generate --routers checkpoints/first "Why is the sky blue?"',
    settings=(ModelConfig, GenerateConfig, DepthConfig),
    flags=(
        Flag(
            "prompt",
            "what to answer; without it a chat on a terminal, else read from standard input",
            positional=True,
        ),
        Flag(
            "routers",
            "routers: a folder or a hub id; without, every layer is executed",
            value="DIR",
        ),
        Flag("path", "instead of routers: a path for all prompts (paths.json:NAME)"),
        Flag("file", "prompts to answer instead of PROMPT (.jsonl)"),
        Flag("output", "with --file: answers to write (.jsonl); default: print them"),
    ),
    model_from="the routers or a paths.json name",
)
def generate(command: CommandLine, terminal: Terminal) -> None:
    """Answer a prompt or a file of them, with the route taken; or chat."""
    config, depth = command.of(GenerateConfig), command.of(DepthConfig)
    config.sampling()
    _check(command, config, depth)
    file, place = command.optional_path("file"), command.optional_path("routers")
    is_typed = sys.stdin is not None and sys.stdin.isatty()
    is_chat = not (command.values["prompt"] or file) and is_typed and terminal.out.is_terminal
    prompt = command.values["prompt"] or ("" if file or is_chat else _from_standard_input())
    asked = None if file is None else read_prompts(file)
    texts: list[tuple[str, bool]] = []
    if depth.calibration is not None:
        from drllm.models.routers.depth_control import read_calibration

        texts = read_calibration(Path(depth.calibration).expanduser())
    routers = None if place is None else read_routers(place)[1]
    path = None if (given := command.optional_path("path")) is None else read_path(str(given))
    from drllm.models.base.prompts import PromptForm

    form = PromptForm(chat=config.chat is not False)
    if config.chat is None and routers is not None:
        form = routers.config.prompt_form or form
    talks = [row.line for row in asked or () if not isinstance(row.prompt, str)]
    if talks and not form.chat:
        why = "the routers were trained without" if config.chat is None else "--no-chat is given"
        raise TaskError(
            f"{file}, line {talks[0]}: 'messages' need the chat template, and {why}; give --chat, "
            f"or 'prompt' instead"
        )
    with loaded(model_of(command, routers, path), terminal) as base:
        from drllm.models.healed import load_path
        from drllm.models.routers.depth_control import encode_calibration, make_policy
        from drllm.models.routing.routed_model import RoutedModel
        from drllm.models.routing.shares import executions_along

        routed = RoutedModel(base.model, routers, tokenizer=base.tokenizer)
        texts = [(text if as_it_is else form.put(text), as_it_is) for text, as_it_is in texts]
        prompts = encode_calibration(texts, routed.tokenizer, chat=form.chat)
        with terminal.busy("looking for a depth bias") if prompts else nullcontext():
            policy, found = make_policy(routed, depth, prompts)
        if found is not None:
            terminal.note(
                f"depth bias  {found.depth_bias}: {found.executions:.2f} of {routed.num_layers} "
                f"executions a forward pass on {found.num_prompts} calibration prompts; next time "
                f"give --depth-bias {found.depth_bias}"
            )
        along = None
        if path is not None:
            static = load_path(routed, path)
            policy, cost = routed.policy_of(static), executions_along(routed, static)
            along = Along(static.edits(routed.num_layers), cost)
        with routed.using(policy):
            if is_chat:
                _say_form(form, routers, terminal)
                chat(routed, form, config, terminal, along)
                return
            if asked is not None:
                _answer_file(routed, asked, form, command, along, terminal)
            else:
                _answer(routed, form.put(prompt), form, config, along, terminal)
            _say_form(form, routers, terminal)


def _from_standard_input() -> str:
    """Return the prompt that is piped to the command; refuse none."""
    is_piped = sys.stdin is not None and not sys.stdin.isatty()
    text = sys.stdin.read().strip() if is_piped else ""
    if not text:
        raise ConfigError(
            f"generate needs PROMPT (what to answer), here or on standard input, or --file "
            f"(prompts to answer, .jsonl), for example: {VERBS['generate'].example}"
        )
    return text


def _say_form(form: PromptForm, routers: RouterStack | None, terminal: Terminal) -> None:
    if routers is None:
        return
    trained = routers.config.prompt_form
    if trained is None:
        said = f"{form}; how the routers' own prompts were put isn't recorded"
    elif form == trained:
        said = f"{form}, as the routers were trained"
    else:
        flag = "--chat" if form.chat else "--no-chat"
        said = f"{form}; the routers were trained on {trained}: leave {flag} out to ask so"
    terminal.note(f"asked       {said}")


def _check(command: CommandLine, config: GenerateConfig, depth: DepthConfig) -> None:
    """Refuse both of PROMPT and `--file`, both of routers and a path, and what has no effect."""
    prompt, file, output, routers, path = (
        command.values[name] for name in ("prompt", "file", "output", "routers", "path")
    )
    if routers and path:
        raise ConfigError(f"--routers {routers} and --path {path} would both decide; leave one out")
    if prompt and file:
        raise ConfigError(f"PROMPT {prompt!r} and --file {file} are both given; give one of them")
    if file and output:
        target = command.path("output")
        check_file(target, "--output")
        if target.exists() and target.samefile(command.path("file")):
            raise ConfigError(f"--output {output} is the file of prompts itself; give another name")
    knob, size = depth.knob(), config.batch_size
    idle = {
        f"--output {output} has no effect on one PROMPT": output and not file,
        f"--batch-size {size} has no effect on one PROMPT": size and not file,
        f"{flag_of(knob or '')} has no effect without routers": knob and not routers,
    }
    for said, holds in idle.items():
        if holds:
            raise ConfigError(f"{said}; leave it out")


def read_prompts(path: Path) -> list[Asked]:
    """Read a file of prompts: JSON lines with `prompt`, `question` or `messages`, maybe gzipped."""
    asked: list[Asked] = []
    lines: dict[str, int] = {}
    for line, row in read_rows(path):
        try:
            found = _asked(row, line)
            first = lines.setdefault(str(found.id), line)
            if first != line:
                raise TaskError(f"the id {found.id!r} is line {first}'s already; give each its own")
        except TaskError as error:
            raise TaskError(f"{path}, line {line}: {error}") from error
        asked.append(found)
    return asked


def _asked(row: dict[str, Any], line: int) -> Asked:
    kinds = [kind for kind in KINDS if kind in row]
    if len(kinds) != 1:
        what = f"both {kinds[0]!r} and {kinds[1]!r}" if kinds else f"none of {', '.join(KINDS)}"
        raise TaskError(f"the row holds {what}; give one of them")
    own_id = row.get("id", f"line-{line}")
    if not isinstance(own_id, (str, int)) or isinstance(own_id, bool):
        raise TaskError(f"'id' is {own_id!r}; expected text or a whole number")
    if kinds != ["messages"]:
        return Asked(line, own_id, text_of(row, kinds[0]))
    messages_of(row)
    return Asked(line, own_id, row["messages"])


def _answer(
    routed: RoutedModel,
    prompt: str,
    form: PromptForm,
    config: GenerateConfig,
    along: Along | None,
    terminal: Terminal,
) -> None:
    """Answer a prompt, word by word on a terminal, and say what it took."""
    import torch

    torch.manual_seed(config.seed or 0)
    reply = Reply(routed, form, terminal)
    reply.generate(prompt, config)
    if not terminal.out.is_terminal:
        terminal.say(reply.text)
    route = routed.last_route[0].tolist()
    num_new = len(reply.tokens)
    terminal.say()
    if along is None:
        terminal.out.print(draw_route(route))
        cost = _share(num_executions(route), routed, 0)
    else:
        terminal.say(f"path        {along.edits}")
        cost = _share(along.executions, routed, 2)
    terminal.say(f"executions  {cost}, {num_new} forward pass{'es' * (num_new > 1)}")
    terminal.say(f"tokens      {reply.num_read} read, {num_new} generated")
    start, first, last = reply.times[0], reply.times[1], reply.times[-1]
    decode = ""
    if reply.speed:
        decode = f", decode {duration(last - first)} ({reply.speed:.1f} tokens a second)"
    terminal.say(f"time        prefill {duration(first - start)}{decode}")


def _answer_file(
    routed: RoutedModel,
    asked: Sequence[Asked],
    form: PromptForm,
    command: CommandLine,
    along: Along | None,
    terminal: Terminal,
) -> None:
    """Answer all prompts, write or print the answers, and say what it took."""
    import torch

    from drllm.models.routing.batch_generation import BATCH_SIZE, generate_many, prompt_tokens

    config = command.of(GenerateConfig)
    shared: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "chat": form.chat}
    prompts = [form.put(row.prompt) if isinstance(row.prompt, str) else row.prompt for row in asked]
    num_read = 0
    for row, prompt in zip(asked, prompts, strict=True):
        try:
            num_read += len(prompt_tokens(routed, prompt, **shared))
        except ConfigError as error:  # noqa: PERF203  # it names the line
            raise ConfigError(f"{command.path('file')}, line {row.line}: {error}") from error
    torch.manual_seed(config.seed or 0)
    started = time.perf_counter()
    with terminal.progress("answering", "prompts") as progress:
        answers = generate_many(
            routed,
            prompts,
            batch_size=config.batch_size or BATCH_SIZE,
            on_progress=progress,
            **shared,
            **config.sampling(),
            **form.options(routed.tokenizer),
        )
    seconds = time.perf_counter() - started
    cost = along and along.executions
    text = "".join(
        to_line(row, form.answer(given.text), given, cost)
        for row, given in zip(asked, answers, strict=True)
    )
    tell: Callable[[str], None] = terminal.note
    if output := command.optional_path("output"):
        write_atomically(output, text)
        tell = terminal.say
        tell(f"answers     {output}")
    else:
        terminal.out.out(text, end="")
    routes = [given.route for given in answers]
    plans, new = len(set(routes)), sum(len(given.tokens) for given in answers)
    if along is None:
        tell(f"prompts     {len(answers)} under {plans} plan{'s' * (plans > 1)}")
    else:
        tell(f"prompts     {len(answers)} along one path")
        tell(f"path        {along.edits}")
    tell(f"executions  {_share(cost or mean_executions(routes), routed, 2)}")
    tell(f"tokens      {num_read} read, {new} generated")
    tell(f"time        {duration(seconds)} ({new / seconds:.1f} tokens generated a second)")


def to_line(row: Asked, text: str, given: Answer, cost: float | None = None) -> str:
    """Write an answer as one line of JSON; `cost` is that of a path that decisions don't tell."""
    values = {
        "id": row.id,
        "prompt" if isinstance(row.prompt, str) else "messages": row.prompt,
        "answer": text.strip(),
        "route": given.route,
        "executions": cost or float(num_executions(given.route)),
        "tokens": len(given.tokens),
    }
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n"


def _share(executed: float, routed: RoutedModel, digits: int) -> str:
    of = routed.num_layers
    return f"{executed:.{digits}f} of {of} a forward pass ({100 * executed / of:.0f} %)"
