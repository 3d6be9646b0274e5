"""The verb `drllm bundle`: what can be published, each artefact with a card."""

from __future__ import annotations

import dataclasses
import shlex

from drllm.cli.base_model import check_model, choose_model
from drllm.cli.command_line import CommandLine
from drllm.cli.terminal import LOADING, Terminal
from drllm.cli.verbs import Flag, verb
from drllm.config import ModelConfig
from drllm.config.fields import to_flag
from drllm.errors import ConfigError
from drllm.records.places import check_folder, check_new_folder


@verb(
    "bundle",
    example="drllm bundle runs/demo_full smaller/ --output-dir publish/",
    settings=(ModelConfig,),
    flags=(
        Flag(
            "sources",
            "folders that drllm run, shrink, heal, train, bypass or search have written",
            required=True,
            many=True,
            positional=True,
            title="FOLDER",
        ),
        Flag("output_dir", "folder to make", required=True, placeholder="DIR", alias="output"),
        Flag(
            "llama_cpp",
            "checkout of llama.cpp, whose converter writes the checkpoint as GGUF too",
            placeholder="DIR",
        ),
    ),
    model_from="the model that a healed path names",
)
def bundle_verb(command: CommandLine, terminal: Terminal) -> None:
    """Collect what can be published, each artefact in a folder with a card."""
    output = command.path("output_dir")
    sources = command.paths("sources")
    llama_cpp = command.optional_path("llama_cpp")

    check_model(command)
    check_folder(output, "--output-dir")
    check_new_folder(output)
    with terminal.busy(LOADING):
        from drllm.pipeline.bundle import bundle, find_healed

    model = None
    path = find_healed(sources)
    if path is not None:
        model = choose_model(command, path=path)
    else:
        _refuse_model_settings(command)
    artefacts = bundle(sources, output, model=model, llama_cpp=llama_cpp, listener=terminal)

    for artefact in artefacts:
        terminal.fact(artefact.kind, f"{artefact.folder}, from {artefact.source}")
    terminal.say("\nread each README.md before you publish; then, for example:")
    terminal.command(shlex.join(["hf", "upload", "OWNER/NAME", str(artefacts[0].folder)]))


def _refuse_model_settings(command: CommandLine) -> None:
    """Refuse a model, and settings of how it is loaded, where no model is loaded."""
    config = command.get_settings(ModelConfig)
    for field in dataclasses.fields(config):
        is_given = getattr(config, field.name) != field.default
        if is_given or (field.name == "model" and command.names_model):
            raise ConfigError(
                f"{to_flag(field.name)} has no effect, since no folder has a healed path to "
                f"export; leave it out"
            )
