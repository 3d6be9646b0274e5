"""Write the report of one or more run folders: one HTML page, and Markdown with pictures.

Styles and drawings are inside the page. Every text is escaped; markup, colours and layout are in
`templates/`. What is folded in the page is open in the Markdown.
"""

import html
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from drllm.errors import ConfigError, RecordError, printable
from drllm.extras import need
from drllm.listener import Listener
from drllm.records.codec import write_atomically
from drllm.records.results import Results
from drllm.reporting.blocks import Document
from drllm.reporting.drawing import NARROW, WIDE, png, svg
from drllm.reporting.numbers import NONE
from drllm.reporting.run import read_run
from drllm.reporting.sections import document as document_of

TEMPLATES = Path(__file__).parent / "templates"
FIGURE = r"\d{2,}-[a-z0-9-]+\.png"
"""The names of a report's pictures; other files in their folder are the user's."""


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
    folders = [_folder_of(run) for run in runs]
    page = _page(folders, output)
    with listener.busy("drawing the report"):
        files = _files(document_of([read_run(folder) for folder in folders]), page)
    for path, content in files.items():
        write_atomically(path, content)
    for picture in figures_of(page):
        if picture not in files:  # of an earlier report
            picture.unlink()
    return page, page.with_suffix(".md")


def _files(document: Document, page: Path) -> dict[Path, str | bytes]:
    """Return what a report's files hold: the pictures, the page and the Markdown, in this order."""
    folder = page.with_name(f"{page.stem}_figures")
    files: dict[Path, str | bytes] = {}
    for figure, name in document.figures().items():
        files[folder / f"{name}.png"] = png(figure.draw, WIDE if figure.is_large else NARROW)
    files[page] = to_html(document)
    files[page.with_suffix(".md")] = to_markdown(document, folder.name)
    return files


def figures_of(page: Path) -> list[Path]:
    """Return the pictures that belong to a report, given its HTML file, in their order."""
    places = page.with_name(f"{page.stem}_figures").glob("*.png")
    return sorted(place for place in places if re.fullmatch(FIGURE, place.name))


def _folder_of(run: Path | str | Results) -> Path:
    """Return the run folder; of results in a folder `eval`, the one around it."""
    if not isinstance(run, Results):
        return Path(run)
    if run.folder is None:
        raise ConfigError("these results weren't written; give evaluate(..., output_dir=FOLDER)")
    return run.folder.parent if run.folder.name == "eval" else run.folder


def _page(folders: Sequence[Path], output: Path | str | None) -> Path:
    """Return the page to write: for an output folder, which may not be there yet, or a file."""
    if not folders:
        raise ConfigError("no run folder is given; give one that 'drllm run' has written")
    if output is None:
        if len(folders) > 1:
            raise ConfigError(
                f"{len(folders)} run folders are given and no --output; "
                f"give a folder or an .html file for their common report"
            )
        return folders[0] / "report.html"
    place = Path(output)
    if place.is_dir() or not place.suffix:
        if place.is_file():
            raise RecordError(f"{place} is a file; give a folder or a file that ends in .html")
        return place / "report.html"
    if place.suffix != ".html":
        raise ConfigError(f"--output is {place}; give a folder or a file that ends in .html")
    return place


def to_html(document: Document) -> str:
    """Return the whole page."""
    names = document.figures()

    def drawn(figure: Any, width: float) -> str:
        name = names[figure] if width == NARROW else f"{names[figure]}-wide"
        return svg(figure.draw, name, width).removeprefix("<svg")

    return _render("report.html.j2", document, autoescape=True, drawn=drawn)


def to_markdown(document: Document, folder: str) -> str:
    """Return the whole report, whose figures lie in a folder: `FOLDER/NAME.png`, by their names."""
    names = document.figures()
    text = _render(
        "report.md.j2",
        document,
        autoescape=False,
        place=lambda figure: quote(f"{folder}/{names[figure]}.png"),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@cache  # it keeps its compiled templates
def _environment(autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"md": escape, "line": line, "fenced": fenced}
    return environment


def _render(template: str, document: Document, *, autoescape: bool, **values: Any) -> str:
    page = (
        _environment(autoescape)
        .get_template(template)
        .render(
            document=document,
            kind_of=lambda block: type(block).__name__,
            narrow=NARROW,
            wide=WIDE,
            NONE=NONE,
            **values,
        )
    )
    return printable(page)


def escape(text: str) -> str:
    """Write a text so that Markdown shows it as it is, on one line."""
    written = html.escape(" ".join(text.split()), quote=False)
    written = re.sub(r"([\\`*\[\]|~])", r"\\\1", written)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\_", written)


def line(text: str) -> str:
    """Escape a text that starts a line, where some characters begin a heading or a list."""
    return re.sub(r"^(\d*)([#+\-=.)])(?=\s|[#=]|$)", r"\1\\\2", escape(text))


def fenced(text: str) -> str:
    """Write a text as a block of code, whose fence is longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"
