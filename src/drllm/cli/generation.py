"""The verb `drllm generate`: answers one prompt or a file of prompts, or chats with the user."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from drllm.cli.answers import answer_file, answer_prompt
from drllm.cli.base_model import check_model, choose_model
from drllm.cli.chat import chat
from drllm.cli.command_line import CommandLine
from drllm.cli.generation_inputs import (
    Inputs,
    check_flags,
    check_output,
    find_output,
    read_inputs,
)
from drllm.cli.reply import PathSummary, Session
from drllm.cli.terminal import Terminal
from drllm.cli.verbs import Flag, verb
from drllm.config import DepthConfig, GenerateConfig, ModelConfig
from drllm.cost import path_executions
from drllm.pipeline.model import open_model
from drllm.records.static_paths import NamedPath

if TYPE_CHECKING:
    from drllm.models.routed_model import RoutedModel
    from drllm.models.routers.stack import RouterStack
    from drllm.models.routing.policies import Policy


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
        Flag(
            "path",
            "static path for all prompts, instead of routers (a file or without:13,14)",
        ),
        Flag("file", "file of prompts to answer, instead of PROMPT (.jsonl)"),
        Flag(
            "output_dir",
            "with --file: folder for answers.jsonl, or a file of another name; default: print the "
            "answers",
            placeholder="PLACE",
            alias="output",
        ),
    ),
    model_from="the model that the routers name",
)
def generate(command: CommandLine, terminal: Terminal) -> None:
    """Answer a prompt or a file of prompts, or chat, and show the route."""
    config = command.get_settings(GenerateConfig)
    depth = command.get_settings(DepthConfig)
    output = find_output(command)

    config.check_effects()
    check_model(command)
    check_flags(command, config, depth)
    check_output(output, command)
    inputs = read_inputs(command, config, depth, terminal)

    with open_model(choose_model(command, inputs.routers), terminal) as base:
        from drllm.models.routed_model import RoutedModel

        routed = RoutedModel(
            base.model, inputs.routers, tokenizer=base.tokenizer, bypass=base.bypass
        )
        path_summary = None
        if inputs.path is not None:
            policy, path_summary = _follow_path(routed, inputs.path)
        else:
            policy = _set_depth(routed, depth, inputs, terminal)
        session = Session(routed, inputs.form, config, terminal, path_summary)
        with routed.using(policy):
            _answer(session, inputs, output)


def _follow_path(routed: RoutedModel, path: NamedPath) -> tuple[Policy, PathSummary]:
    """Return the policy that runs a static path for every prompt, and its summary."""
    static_path = path.path(routed.num_layers)
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


def _answer(session: Session, inputs: Inputs, output: Path | None) -> None:
    """Answer the prompt or the file of prompts, or chat; print how prompts were rendered.

    `output` is the file for the answers to a file of prompts; None to print them.
    """
    if inputs.file is not None:
        answer_file(session, inputs.file, inputs.rows, output)
        _print_form(session, inputs.routers)
    elif inputs.prompt is not None:
        answer_prompt(session, inputs.form.fill(inputs.prompt))
        _print_form(session, inputs.routers)
    else:
        _print_form(session, inputs.routers)
        chat(session)


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
