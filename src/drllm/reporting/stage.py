"""Write the report of one or more run folders: an HTML page, and Markdown with pictures."""

import re
from pathlib import Path

from drllm.errors import ConfigError, RecordError
from drllm.extras import need
from drllm.listener import Listener
from drllm.records.codec import write_atomically
from drllm.records.results import Results
from drllm.reporting.drawing import NARROW, WIDE, png
from drllm.reporting.rendering import to_html, to_markdown
from drllm.reporting.run import read_run
from drllm.reporting.sections import document

FIGURE = r"\d{2,}-[a-z0-9-]+\.png"
"""What the names of our pictures look like; other files in their folder are the user's."""


def report(
    *runs: Path | str | Results, output: Path | str | None = None, listener: Listener = Listener()
) -> tuple[Path, Path]:
    """Write `report.html`, and `report.md` with its figures, about one or more run folders.

    Parts that a folder lacks are left out and named at the end of the report. Nothing is written
    if any folder can't be trusted.

    Args:
        runs: Folders that `drllm run` or `drllm evaluate` has written, or what `drllm.evaluate`
            has returned (of its folder; of the one around it where it is called `eval`); several
            are compared.
        output: A folder, or the `.html` file to write; the Markdown gets the same name, and its
            figures a folder: `report.html`, `report.md`, `report_figures/`. None writes into the
            run folder, if it is one.
        listener: Hears what is being done.

    Returns:
        The HTML file and the Markdown file.

    Raises:
        RecordError: A folder with nothing in it, a file that can't be trusted, or an output that
            can't be written.
        ConfigError: No run folder, several without an output, an output of another kind, or no
            matplotlib.
    """
    need("report", "a report")
    run_folders = [_folder_of(run) if isinstance(run, Results) else Path(run) for run in runs]
    if not run_folders:
        raise ConfigError("no run folder is given; give one that 'drllm run' has written")
    if output is None and len(run_folders) > 1:
        raise ConfigError(
            f"{len(run_folders)} run folders are given and no --output; "
            f"give a folder or an .html file for their common report"
        )
    own = run_folders[0] / "report.html"
    target = own if output is None else _target(Path(output))
    with listener.busy("drawing the report"):
        found = document([read_run(folder) for folder in run_folders])
        figures, text = target.with_name(f"{target.stem}_figures"), target.with_suffix(".md")
        contents: dict[Path, str | bytes] = {
            figures / f"{name}.png": png(figure.draw, WIDE if figure.is_large else NARROW)
            for figure, name in found.figures().items()
        }
        contents |= {target: to_html(found), text: to_markdown(found, figures.name)}
    for path, content in contents.items():
        write_atomically(path, content)
    for earlier in figures_of(target):
        if earlier not in contents:
            earlier.unlink()
    return target, text


def figures_of(page: Path) -> list[Path]:
    """Return the pictures that belong to a report, given its HTML file, in their order."""
    places = page.with_name(f"{page.stem}_figures").glob("*.png")
    return sorted(place for place in places if re.fullmatch(FIGURE, place.name))


def _folder_of(results: Results) -> Path:
    if results.folder is None:
        raise ConfigError(
            "these results were not written; give evaluate(..., output_dir='runs/NAME/eval')"
        )
    return results.folder.parent if results.folder.name == "eval" else results.folder


def _target(output: Path) -> Path:
    """Return the page to write for a folder, which may not be there yet, or an HTML file."""
    if output.is_dir() or not output.suffix:
        if output.is_file():
            raise RecordError(f"{output} is a file; give a folder or a file that ends in .html")
        return output / "report.html"
    if output.suffix != ".html":
        raise ConfigError(f"--output is {output}; give a folder or a file that ends in .html")
    return output
