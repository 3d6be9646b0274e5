"""The verb `drllm bundle`: what can be published, each artefact with a card."""

from __future__ import annotations

import shlex

from drllm.cli.command_line import CommandLine
from drllm.cli.terminal import LOADING, Terminal
from drllm.cli.verbs import Flag, verb
from drllm.records.places import check_folder, check_new_folder


@verb(
    "bundle",
    example="drllm bundle runs/demo_full smaller/ --output-dir publish/",
    flags=(
        Flag(
            "sources",
            "folders that drllm run, shrink, learn, export, train, bypass or search have written",
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
)
def bundle_verb(command: CommandLine, terminal: Terminal) -> None:
    """Collect what can be published, each artefact in a folder with a card."""
    output = command.path("output_dir")
    sources = command.paths("sources")
    llama_cpp = command.optional_path("llama_cpp")

    check_folder(output, "--output-dir")
    check_new_folder(output)
    with terminal.busy(LOADING):
        from drllm.pipeline.bundle import bundle

    artefacts = bundle(sources, output, llama_cpp=llama_cpp, listener=terminal)

    for artefact in artefacts:
        terminal.fact(artefact.kind, f"{artefact.folder}, from {artefact.source}")
    terminal.say("\nread each README.md before you publish; then, for example:")
    terminal.command(shlex.join(["hf", "upload", "OWNER/NAME", str(artefacts[0].folder)]))
