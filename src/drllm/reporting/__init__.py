"""The report of a run: one HTML page, one Markdown file with pictures, made from records alone.

`run`, `agreement`, `reliability`, `results`, `samples`, `depths` and `measured` read a run folder;
`summary` does the arithmetic and `verdicts` the rules for claims; `evaluated`, `depth`, `changes`,
`cost`, `learned`, `trained`, `provenance` and `sections` say what it means in blocks of plain text
and numbers; `figures` and `curves` draw by way of `drawing`; `page` and `markdown` render. Owns no
measurement: whatever is shown was written by a stage. Loads no model and no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from drllm.errors import ConfigError, RecordError
from drllm.records import write_atomically
from drllm.reporting import markdown, page
from drllm.reporting.drawing import png
from drllm.reporting.run import read_run
from drllm.reporting.sections import document

__all__ = ["figures_of", "write_report"]

FIGURE = r"\d{2,}-[a-z0-9-]+\.png"
"""What the names of our pictures look like; other files in their folder are the user's."""


def write_report(run_dirs: Sequence[Path], output: Path | None = None) -> tuple[Path, Path]:
    """Write `report.html`, and `report.md` with its figures, about one or more run folders.

    Parts that a folder lacks are left out and named at the end of the report. Nothing is written
    if any folder can't be trusted.

    Args:
        run_dirs: Folders that `drllm run` or `drllm evaluate` has written; several are compared.
        output: A folder, or the `.html` file to write; the Markdown lies beside it under the same
            name, and its figures in a folder: `report.html`, `report.md`, `report_figures/`.
            None writes into the run folder, if it is one.

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
    figures = _figures_folder(target)
    contents: dict[Path, str | bytes] = {
        figures / f"{name}.png": png(figure.draw) for figure, name in report.figures().items()
    }
    contents |= {target: page.render(report), beside: markdown.render(report, figures.name)}
    for path, content in contents.items():
        write_atomically(path, content)
    for earlier in figures_of(target):
        if earlier not in contents:
            earlier.unlink()
    return target, beside


def figures_of(page: Path) -> list[Path]:
    """Return the pictures that belong to a report, in their order.

    Args:
        page: Its HTML file.
    """
    places = _figures_folder(page).glob("*.png")
    return sorted(place for place in places if re.fullmatch(FIGURE, place.name))


def _figures_folder(page: Path) -> Path:
    return page.with_name(f"{page.stem}_figures")


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
