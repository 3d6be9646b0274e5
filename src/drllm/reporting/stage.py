"""Writes the report of one or more run folders: one HTML page, and Markdown with pictures.

The page contains its styles and drawings. Every text is escaped. Markup, colours and layout are in
`templates/`. Sections that are folded on the page are open in the Markdown.
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
from drllm.reporting.drawing import NARROW, WIDE, draw_png, draw_svg
from drllm.reporting.numbers import NONE
from drllm.reporting.run import read_run
from drllm.reporting.sections import build_document

TEMPLATES = Path(__file__).parent / "templates"
FIGURE = r"\d{2,}-[a-z0-9-]+\.png"
"""The names of a report's pictures; other files in the folder belong to the user."""


def report(
    *runs: Path | str | Results, output: Path | str | None = None, listener: Listener = Listener()
) -> tuple[Path, Path]:
    """Write `report.html`, and `report.md` with its figures, about one or more run folders.

    Parts that a folder doesn't have are left out, and the report names them. Nothing is written
    if a file in any folder can't be trusted.

    Args:
        runs: Folders that `drllm run` or `drllm evaluate` has written, or results of
            `drllm.evaluate`. Results stand for their folder; if it is called `eval`, they stand for
            the folder around it. Several runs are compared.
        output: A folder, or the `.html` file to write. The Markdown and the folder of its figures
            get the same name: `report.html`, `report.md`, `report_figures/`. None writes into the
            run folder, if there is only one.
        listener: Receives progress.

    Returns:
        The HTML file and the Markdown file.

    Raises:
        RecordError: A folder has nothing to report, a file can't be trusted, or the output can't
            be written.
        ConfigError: There is no run folder, there are several and no output, the output is another
            kind of file, or matplotlib is missing.
    """
    need("report", "a report")
    folders = [_find_folder(run) for run in runs]
    page = _choose_page(folders, output)
    with listener.busy("drawing the report"):
        files = _render_files(build_document([read_run(folder) for folder in folders]), page)
    for path, content in files.items():
        write_atomically(path, content)
    for picture in figures_of(page):
        if picture not in files:  # the picture is of an earlier report
            picture.unlink()
    return page, page.with_suffix(".md")


def _render_files(document: Document, page: Path) -> dict[Path, str | bytes]:
    """Render the files of a report, in order: the pictures, the page and the Markdown."""
    folder = page.with_name(f"{page.stem}_figures")
    files: dict[Path, str | bytes] = {}
    for figure, name in document.figures().items():
        width = WIDE if figure.is_large else NARROW
        files[folder / f"{name}.png"] = draw_png(figure.draw, width)
    files[page] = to_html(document)
    files[page.with_suffix(".md")] = to_markdown(document, folder.name)
    return files


def figures_of(page: Path) -> list[Path]:
    """List the pictures of a report in order; `page` is the HTML file of the report."""
    places = page.with_name(f"{page.stem}_figures").glob("*.png")
    return sorted(place for place in places if re.fullmatch(FIGURE, place.name))


def _find_folder(run: Path | str | Results) -> Path:
    """Return the run folder; results in a folder `eval` belong to the folder around it."""
    if not isinstance(run, Results):
        return Path(run)
    if run.folder is None:
        raise ConfigError("these results weren't written; give evaluate(..., output_dir=FOLDER)")
    return run.folder.parent if run.folder.name == "eval" else run.folder


def _choose_page(folders: Sequence[Path], output: Path | str | None) -> Path:
    """Choose the page to write.

    The output is a file or a folder. The folder may not exist yet.
    """
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
    """Render the whole page."""
    names = document.figures()

    def draw(figure: Any, width: float) -> str:
        name = names[figure] if width == NARROW else f"{names[figure]}-wide"
        return draw_svg(figure.draw, name, width).removeprefix("<svg")

    return _render("report.html.j2", document, autoescape=True, drawn=draw)


def to_markdown(document: Document, folder: str) -> str:
    """Render the whole report as Markdown; its figures are the files `FOLDER/NAME.png`."""
    names = document.figures()
    text = _render(
        "report.md.j2",
        document,
        autoescape=False,
        place=lambda figure: quote(f"{folder}/{names[figure]}.png"),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@cache  # the environment keeps compiled templates for the next report
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
    """Escape a text so that Markdown shows it unchanged, on one line."""
    written = html.escape(" ".join(text.split()), quote=False)
    written = re.sub(r"([\\`*\[\]|~])", r"\\\1", written)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\_", written)


def line(text: str) -> str:
    """Escape a text at the start of a line, where some characters begin a heading or a list."""
    return re.sub(r"^(\d*)([#+\-=.)])(?=\s|[#=]|$)", r"\1\\\2", escape(text))


def fenced(text: str) -> str:
    """Write a text as a block of code, with a fence longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"
