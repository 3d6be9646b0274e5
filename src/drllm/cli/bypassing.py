"""The verb `drllm bypass`: fit linear maps that run in place of skipped layers."""

from __future__ import annotations

import shlex
from statistics import fmean

from drllm.cli.base_model import check_model
from drllm.cli.command_line import CommandLine
from drllm.cli.questions import COLUMNS
from drllm.cli.terminal import LOADING, Terminal
from drllm.cli.verbs import Flag, verb
from drllm.config import BypassConfig, ModelConfig
from drllm.records.places import check_folder


@verb(
    "bypass",
    example="drllm bypass --tasks builtin_facts --text texts.jsonl --output-dir bypass/",
    settings=(ModelConfig, BypassConfig),
    flags=(
        COLUMNS,
        Flag(
            "output_dir",
            "folder for bypass.safetensors",
            default="bypass/",
            placeholder="DIR",
            alias="output",
        ),
    ),
)
def bypass_verb(command: CommandLine, terminal: Terminal) -> None:
    """Fit linear maps that run in place of skipped layers."""
    config = command.get_settings(BypassConfig)
    output = command.path("output_dir")

    check_model(command)
    check_folder(output, "--output-dir")
    with terminal.busy(LOADING):
        from drllm.models.routing.bypass_file import BYPASS_FILE, load_bypass_with_record
        from drllm.prune.bypass import fit_bypass

    model = command.get_settings(ModelConfig)
    fit_bypass(model, config=config, output_dir=output, listener=terminal)

    bypass, record = load_bypass_with_record(output / BYPASS_FILE)
    explained = 1 - fmean(record.unexplained)
    terminal.fact("bypass", output / BYPASS_FILE)
    terminal.fact("maps", f"{bypass.num_layers} layers, rank {bypass.rank}")
    terminal.fact(
        "texts", f"{record.num_tokens:,} tokens of {', '.join(record.texts)}, a tenth held out"
    )
    terminal.fact(
        "explained",
        f"{explained:.0%} of what a layer adds to the state, on held-out texts, on the mean of "
        f"layers; drllm evaluate measures what that does to text and answers",
    )
    terminal.say()
    terminal.say("Give it to the stages of routing as --bypass:")
    place = shlex.quote(str(output))
    terminal.command(f"drllm search --bypass {place} --tasks TASKS --output-dir runs/mine")
