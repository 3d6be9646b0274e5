"""`drllm export`: a file with decisions or a path, written as an ordinary checkpoint.

Owns the order of checks and what is said about the result. Leaves the file to
`records.path_files` and the checkpoint to `models.export`. Loads no torch before the file is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drllm.cli.stages import loaded
from drllm.cli.terminal import Terminal
from drllm.cli.verbs import Flag, Request, verb
from drllm.config import ModelConfig
from drllm.records.path_files import read_path_file
from drllm.records.places import check_folder

if TYPE_CHECKING:
    from drllm.models.export import Export

MB = 1e6


@verb(
    "export",
    help="write a fixed path as an ordinary checkpoint, its layers listed in path order",
    example="drllm export --model smollm2-135m --decisions plan.json --output exported/",
    settings=(ModelConfig,),
    flags=(
        Flag("decisions", "file with decisions or a path", required=True),
        Flag("output", "folder to make", required=True),
    ),
)
def export(request: Request, terminal: Terminal) -> None:
    """Write a fixed path of a model as a checkpoint, and say what it is."""
    from drllm.models.export import check_output, export_path

    output = request.path("output")
    plan = read_path_file(request.path("decisions"))
    check_folder(output, "--output")
    check_output(output)
    with loaded(request.of(ModelConfig), terminal) as base:
        path = plan.path(base.num_layers)
        with terminal.busy("writing and checking"):
            made = export_path(base, path, output)
        _say(made, base.num_layers, terminal)


def _say(made: Export, num_layers: int, terminal: Terminal) -> None:
    terminal.say(f"export      {made.folder}")
    terminal.say(f"path        {' '.join(map(str, made.path))}")
    terminal.say(f"layers      {len(made.path)}, the base model has {num_layers}")
    size = f"{made.num_bytes / MB:.1f} MB in {made.dtype}"
    if made.num_repeated_bytes:
        size += (
            f"; {made.num_repeated_bytes / MB:.1f} MB of it are layers that are executed again, "
            f"since a checkpoint can't say that two layers are the same"
        )
    terminal.say(f"size        {size}")
    terminal.say("checked     loaded again, its logits equal the path's bit by bit")
