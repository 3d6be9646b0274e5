"""The verb `drllm generate`: answers one prompt or a file of prompts, or chats with the user.

With the answer to one prompt, the prompt's route is drawn. The chat itself is in `cli.chat`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drllm.cli.base_model import check_model_name, choose_model, read_routers
from drllm.cli.chat import PathSummary, Reply, Session, chat
from drllm.cli.command_line import CommandLine
from drllm.cli.terminal import Terminal, draw_route
from drllm.cli.verbs import VERBS, Flag, verb
from drllm.config import DepthConfig, GenerateConfig, ModelConfig
from drllm.config.fields import to_flag
from drllm.cost import mean_executions, path_executions
from drllm.errors import ConfigError, TaskError
from drllm.models.routers.places import check_place
from drllm.paths import num_executions
from drllm.pipeline.folder import open_model
from drllm.records.codec import write_atomically
from drllm.records.places import check_file
from drllm.records.static_paths import PathFile, load_path
from drllm.tasks.rows import read_messages, read_rows, read_text
from drllm.work.listener import duration

if TYPE_CHECKING:
    from drllm.models.base.prompts import Prompt, PromptForm
    from drllm.models.routers.stack import RouterStack
    from drllm.models.routing.batch_generation import GeneratedAnswer
    from drllm.models.routing.policies import Policy
    from drllm.models.routing.routed_model import RoutedModel

PROMPT_KEYS = ("prompt", "question", "messages")
"""The keys under which a row of a file may have its prompt; a row has exactly one of them."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One row of a file of prompts.

    Attributes:
        line: The number of the line, from 1.
        id: The row's own id, or `line-N`.
        prompt: A text, or the messages of a conversation.
    """

    line: int
    id: str | int
    prompt: str | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a command reads before the model is loaded.

    Attributes:
        prompt: The prompt to answer; None for a file of prompts or a chat.
        file: The file of prompts; None without `--file`.
        rows: The rows of the file.
        routers: The routers of `--routers`; None without the flag.
        path: The static path of `--path`; None without the flag.
        calibration: The prompts of `--calibration`, each with whether it is already rendered.
        form: How prompts are rendered.
    """

    prompt: str | None
    file: Path | None
    rows: Sequence[PromptRow]
    routers: RouterStack | None
    path: PathFile | None
    calibration: Sequence[tuple[str, bool]]
    form: PromptForm


@verb(
    "generate",
    example='drllm generate --routers checkpoints/first "Why is the sky blue?"',
    settings=(ModelConfig, GenerateConfig, DepthConfig),
    flags=(
        Flag(
            "prompt",
            "text to answer; default: a chat on a terminal, else standard input is read",
            positional=True,
        ),
        Flag(
            "routers",
            "routers: a folder or a hub id; default: every layer is executed once",
            placeholder="DIR",
        ),
        Flag("path", "static path for all prompts, instead of routers (paths.json:NAME)"),
        Flag("file", "file of prompts to answer, instead of PROMPT (.jsonl)"),
        Flag("output", "with --file: file for the answers (.jsonl); default: print them"),
    ),
    model_from="the model that the routers or the paths.json name",
)
def generate(command: CommandLine, terminal: Terminal) -> None:
    """Answer a prompt or a file of prompts, or chat, and show the route."""
    config = command.get_settings(GenerateConfig)
    depth = command.get_settings(DepthConfig)
    config.check_effects()
    check_model_name(command)
    _check_flags(command, config, depth)
    _check_output(command)
    inputs = _read_inputs(command, config, depth, terminal)
    with open_model(choose_model(command, inputs.routers, inputs.path), terminal) as base:
        from drllm.models.routing.routed_model import RoutedModel

        routed = RoutedModel(base.model, inputs.routers, tokenizer=base.tokenizer)
        path_summary = None
        if inputs.path is not None:
            policy, path_summary = _follow_path(routed, inputs.path)
        else:
            policy = _set_depth(routed, depth, inputs, terminal)
        session = Session(routed, inputs.form, config, terminal, path_summary)
        with routed.using(policy):
            _answer(session, inputs, command.optional_path("output"))


def _answer(session: Session, inputs: Inputs, output: Path | None) -> None:
    """Answer the prompt or the file of prompts, or chat; print how prompts were rendered.

    `output` is the file for the answers to a file of prompts; None to print them.
    """
    if inputs.file is not None:
        _answer_file(session, inputs.file, inputs.rows, output)
        _print_form(session, inputs.routers)
    elif inputs.prompt is not None:
        _answer_prompt(session, inputs.form.fill(inputs.prompt))
        _print_form(session, inputs.routers)
    else:
        _print_form(session, inputs.routers)
        chat(session)


# --- flags and inputs -----------------------------------------------------------------------------


def _check_flags(command: CommandLine, config: GenerateConfig, depth: DepthConfig) -> None:
    """Refuse flags that exclude each other, and flags without effect."""
    prompt = command.values["prompt"]
    file = command.values["file"]
    output = command.values["output"]
    routers = command.values["routers"]
    path = command.values["path"]
    if routers and path:
        raise ConfigError(
            f"--routers {routers} and --path {path} would both choose the layers; leave one out"
        )
    if prompt and not _is_unicode(prompt):
        raise ConfigError(f"PROMPT {prompt!r} is not a UTF-8 text")
    if prompt and file:
        raise ConfigError(f"PROMPT {prompt!r} and --file {file} are both given; give one of them")
    if output and not file:
        raise ConfigError(f"--output {output} has no effect without --file; leave it out")
    if config.batch_size and not file:
        raise ConfigError(
            f"--batch-size {config.batch_size} has no effect without --file; leave it out"
        )
    setting = depth.find_setting()
    if setting is not None and not routers:
        raise ConfigError(f"{to_flag(setting)} has no effect without routers; leave it out")


def _check_output(command: CommandLine) -> None:
    """Refuse an `--output` that can't be written, or that is the file of prompts."""
    output = command.optional_path("output")
    if output is None:
        return
    check_file(output, "--output")
    if output.exists() and output.samefile(command.path("file")):
        raise ConfigError(
            f"--output {command.values['output']} is the file of prompts itself; give another name"
        )


def _read_inputs(
    command: CommandLine, config: GenerateConfig, depth: DepthConfig, terminal: Terminal
) -> Inputs:
    """Read and check the prompts, the routers and the path of a command."""
    file = command.optional_path("file")
    prompt = None
    rows: list[PromptRow] = []
    if file is not None:
        rows = read_prompts(file)
    elif not _is_chat(command, terminal):
        prompt = command.values["prompt"] or _read_standard_input()
    with terminal.busy("reading the routers"):
        calibration = _read_calibration(depth)
        routers = _read_routers(command)
    path = _read_path(command)
    form = _choose_form(config, routers)
    _check_conversations(file, rows, form, config)
    return Inputs(prompt, file, rows, routers, path, calibration, form)


def _is_unicode(text: str) -> bool:
    """Tell whether a word of the command line was written in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_chat(command: CommandLine, terminal: Terminal) -> bool:
    """Tell whether to chat: there is no prompt, and both input and output are a terminal."""
    if command.values["prompt"] or command.values["file"]:
        return False
    return sys.stdin is not None and sys.stdin.isatty() and terminal.out.is_terminal


def _read_standard_input() -> str:
    """Read the prompt from standard input; raise ConfigError if there is none."""
    is_piped = sys.stdin is not None and not sys.stdin.isatty()
    text = ""
    if is_piped:
        try:
            text = sys.stdin.read().strip()
        except UnicodeDecodeError as error:
            raise ConfigError("the prompt on standard input is not a UTF-8 text") from error
    if not text:
        raise ConfigError(
            f"generate needs PROMPT (what to answer), here or on standard input, or --file "
            f"(prompts to answer, .jsonl), for example: {VERBS['generate'].example}"
        )
    return text


def _read_calibration(depth: DepthConfig) -> list[tuple[str, bool]]:
    """Read the prompts of `--calibration`, each with whether it is already rendered."""
    if depth.calibration is None:
        return []
    from drllm.models.routing.depth_control import read_calibration

    return read_calibration(Path(depth.calibration).expanduser())


def _read_routers(command: CommandLine) -> RouterStack | None:
    """Read the routers of `--routers`; return None without the flag."""
    place = command.optional_path("routers")
    if place is None:
        return None
    check_place(place)
    _, routers = read_routers(place)
    return routers


def _read_path(command: CommandLine) -> PathFile | None:
    """Read the static path of `--path`; return None without the flag."""
    place = command.optional_path("path")
    if place is None:
        return None
    return load_path(str(place))


def _choose_form(config: GenerateConfig, routers: RouterStack | None) -> PromptForm:
    """Choose how to render prompts.

    It is what `--chat` or `--no-chat` says; without these flags, the form that the routers were
    trained on. If the routers don't record it, or without routers, prompts get the chat template.
    """
    from drllm.models.base.prompts import PromptForm

    if config.chat is not None:
        return PromptForm(chat=config.chat)
    if routers is None or routers.config.prompt_form is None:
        return PromptForm(chat=True)
    return routers.config.prompt_form


def _check_conversations(
    file: Path | None, rows: Sequence[PromptRow], form: PromptForm, config: GenerateConfig
) -> None:
    """Refuse conversations if the chat template isn't used."""
    if form.chat:
        return
    for row in rows:
        if isinstance(row.prompt, str):
            continue
        reason = "--no-chat is given"
        if config.chat is None:
            reason = "the routers were trained without it"
        raise TaskError(
            f"{file}, line {row.line}: 'messages' need the chat template, and {reason}; give "
            f"--chat, or 'prompt' instead"
        )


def read_prompts(path: Path) -> list[PromptRow]:
    """Read a file of prompts.

    The file holds JSON lines with `prompt`, `question` or `messages`, and may be gzipped. Raises
    TaskError for a row that can't be answered, and for an id that occurs twice.
    """
    rows: list[PromptRow] = []
    line_numbers: dict[str, int] = {}  # by id
    for line, values in read_rows(path):
        try:
            row = _read_prompt_row(values, line)
        except TaskError as error:
            raise TaskError(f"{path}, line {line}: {error}") from error
        row_id = str(row.id)
        if row_id in line_numbers:
            raise TaskError(
                f"{path}, line {line}: line {line_numbers[row_id]} has the id {row.id!r} too; ids "
                f"must differ"
            )
        line_numbers[row_id] = line
        rows.append(row)
    return rows


def _read_prompt_row(values: dict[str, Any], line: int) -> PromptRow:
    """Read one row of a file of prompts; raise TaskError for a row that can't be answered."""
    keys = [key for key in PROMPT_KEYS if key in values]
    if not keys:
        raise TaskError(f"the row holds none of {', '.join(PROMPT_KEYS)}; give one of them")
    if len(keys) > 1:
        raise TaskError(f"the row holds both {keys[0]!r} and {keys[1]!r}; give one of them")
    key = keys[0]
    row_id = values.get("id", f"line-{line}")
    if not isinstance(row_id, (str, int)) or isinstance(row_id, bool):
        raise TaskError(f"'id' is {row_id!r}; expected text or a whole number")
    if key == "messages":
        read_messages(values)
        return PromptRow(line, row_id, values["messages"])
    return PromptRow(line, row_id, read_text(values, key))


# --- which layers run ----------------------------------------------------------------------------


def _follow_path(routed: RoutedModel, path: PathFile) -> tuple[Policy, PathSummary]:
    """Return the policy that runs a static path for every prompt, and its summary."""
    from drllm.models.routing.healed import install_path

    static_path = install_path(routed.injection, path)
    executions = path_executions(static_path)
    summary = PathSummary(static_path.edits(routed.num_layers), executions)
    return routed.build_policy(static_path), summary


def _set_depth(
    routed: RoutedModel, depth: DepthConfig, inputs: Inputs, terminal: Terminal
) -> Policy:
    """Return the policy that runs the routers with the depth settings.

    With `--target-executions`, the depth bias is searched on the calibration prompts, and printed.
    """
    from drllm.models.routing.depth_control import encode_calibration, make_policy

    form = inputs.form
    texts = []
    for text, is_rendered in inputs.calibration:
        if not is_rendered:
            text = form.fill(text)
        texts.append((text, is_rendered))
    prompts = encode_calibration(texts, routed.tokenizer, chat=form.chat)
    with terminal.busy("searching for a depth bias"):
        policy, bias = make_policy(routed, depth, prompts)
    if bias is not None:
        terminal.note(
            f"depth bias  {bias.depth_bias}: {bias.executions:.2f} of {routed.num_layers} "
            f"executions a forward pass on {bias.num_prompts} calibration prompts; next time "
            f"give --depth-bias {bias.depth_bias}"
        )
    return policy


def _print_form(session: Session, routers: RouterStack | None) -> None:
    """Print how prompts are rendered, and whether the routers were trained that way."""
    if routers is None:
        return
    form = session.form
    training_form = routers.config.prompt_form
    if training_form is None:
        text = f"{form}; the routers don't record the form of their own prompts"
    elif form == training_form:
        text = f"{form}, as the routers were trained"
    else:
        flag = "--chat" if form.chat else "--no-chat"
        text = f"{form}; the routers were trained on {training_form}: leave {flag} out to use that"
    session.terminal.note(f"form        {text}")


# --- answers -------------------------------------------------------------------------------------


def _answer_prompt(session: Session, prompt: str) -> None:
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


def _answer_file(
    session: Session, file: Path, rows: Sequence[PromptRow], output: Path | None
) -> None:
    """Answer all prompts of a file, write or print the answers, and print the totals."""
    import torch

    from drllm.models.routing.batch_generation import BATCH_SIZE, generate_many

    config = session.config
    form = session.form
    terminal = session.terminal
    prompts = _render_prompts(rows, form)
    num_read = _count_tokens(session, file, rows, prompts)
    torch.manual_seed(config.seed or 0)
    started = time.perf_counter()
    with terminal.progress("answering", "prompts") as progress:
        answers = generate_many(
            session.routed,
            prompts,
            batch_size=config.batch_size or BATCH_SIZE,
            max_new_tokens=config.max_new_tokens,
            chat=form.chat,
            on_progress=progress,
            **config.sampling_options(),
            **form.generation_options(session.routed.tokenizer),
        )
    seconds = time.perf_counter() - started
    executions = None if session.path is None else session.path.executions
    lines = []
    for row, answer in zip(rows, answers, strict=True):
        lines.append(to_line(row, form.cut_answer(answer.text), answer, executions))
    text = "".join(lines)
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
    print_line(
        f"time        {duration(seconds)} ({num_new / seconds:.1f} tokens generated a second)"
    )


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
