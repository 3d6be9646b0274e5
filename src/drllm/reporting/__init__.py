"""The report of a run: one HTML page and one Markdown file, made from records alone.

`run` and `results` read a run folder, `summary` does the arithmetic, `evaluated`, `learned` and
`sections` say what it means in blocks of plain text and numbers, `page` and `markdown` render
them; `figures` draws. Owns no measurement: whatever is shown was written by a stage. Loads no
model and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drllm.errors import ConfigError, RecordError
from drllm.records import write_atomically
from drllm.reporting import markdown, page
from drllm.reporting.run import read_run
from drllm.reporting.sections import document

__all__ = ["write_report"]


def write_report(run_dirs: Sequence[Path], output: Path | None = None) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` about one or more run folders.

    Parts that a folder lacks are left out and named at the end of the report. Nothing is written
    if any folder can't be trusted.

    Args:
        run_dirs: Folders that `drllm run` has written; several are compared.
        output: A folder, or the `.html` file to write; the Markdown lies beside it under the same
            name. None writes into the run folder, if it is one.

    Returns:
        The HTML file and the Markdown file.

    Raises:
        RecordError: A folder with nothing in it, a file that can't be trusted, or an output that
            can't be written.
        ConfigError: No run folder, several without an output, or an output of another kind.
    """
    if not run_dirs:
        raise ConfigError("no run folder is given; give one that 'drllm run' has written")
    target = _target(run_dirs, output)
    report = document([read_run(Path(folder)) for folder in run_dirs])
    beside = target.with_suffix(".md")
    texts = {target: page.render(report), beside: markdown.render(report)}
    for path, text in texts.items():
        write_atomically(path, text)
    return target, beside


def _target(run_dirs: Sequence[Path], output: Path | None) -> Path:
    if output is None:
        if len(run_dirs) > 1:
            raise ConfigError(
                f"{len(run_dirs)} run folders are given and no --output; "
                f"give a folder or an .html file for their common report"
            )
        return Path(run_dirs[0]) / "report.html"
    output = Path(output)
    if output.suffix == ".html" and not output.is_dir():
        return output
    if output.suffix and not output.is_dir():
        raise ConfigError(f"--output is {output}; give a folder or a file that ends in .html")
    if output.is_file():
        raise RecordError(f"{output} is a file; give a folder or a file that ends in .html")
    return output / "report.html"
