"""Writes the report of one or more run folders: an HTML page, and Markdown with pictures.

The page contains its styles and drawings. Sections that are folded on the page are open in the
Markdown. Both are made of the same Markdown, in which every text is escaped.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from drllm.errors import ConfigError, RecordError
from drllm.extras import need
from drllm.records.codec import delete_file, write_atomically
from drllm.records.results import Results
from drllm.reporting.document import Document, to_markdown
from drllm.reporting.drawing import NARROW, WIDE, draw_png
from drllm.reporting.run import Run, read_run
from drllm.reporting.sections import build_document
from drllm.work.listener import Listener

PICTURE = r"\d{2,}-[a-z0-9-]+\.png"
"""The file names of a report's pictures; other files in their folder belong to the user."""


def report(
    *runs: Path | str | Results,
    output_dir: Path | str | None = None,
    listener: Listener = Listener(),
) -> tuple[Path, Path]:
    """Write `report.html`, and `report.md` with its figures, about one or more run folders.

    Parts that a folder doesn't have are left out, and the report names them. Nothing is written
    if a file in any folder can't be trusted.

    Args:
        runs: Folders that `drllm run` or `drllm evaluate` has written, or results of
            `drllm.evaluate`, which stand for the folder that they were written to. A folder `eval`
            is a part of the run folder around it. Several runs are compared.
        output_dir: The folder for `report.html`, `report.md` and `report_figures/`. It may also be
            an `.html` file, which gives all three its name. None writes into the run folder;
            several runs need a folder.
        listener: Receives progress.

    Returns:
        The HTML file and the Markdown file.

    Raises:
        RecordError: A folder has nothing to report, a file can't be trusted, or the output can't
            be written.
        ConfigError: There is no run folder, there are several run folders and no `output_dir`,
            `output_dir` is another kind of file, or a package of the extra `report` is missing.
    """
    need("report", "a report")
    folders = [_find_folder(run) for run in runs]
    page = choose_page(folders, output_dir)
    with listener.busy("drawing the report"):
        return write_report([read_run(folder) for folder in folders], page)


def write_report(runs: Sequence[Run], page: Path) -> tuple[Path, Path]:
    """Write the report of runs that are read already.

    Args:
        runs: The runs; several are compared.
        page: The HTML file, from `choose_page`.

    Returns:
        The HTML file and the Markdown file.
    """
    files = _render_files(build_document(runs), page)
    for path, content in files.items():
        write_atomically(path, content)
    for picture in list_pictures(page):
        # Pictures of an earlier report go. A link may lead to somebody's own pictures.
        if picture not in files and not picture.parent.is_symlink():
            delete_file(picture)
    return page, page.with_suffix(".md")


def _render_files(document: Document, page: Path) -> dict[Path, str | bytes]:
    """Render the files of a report, in order: the pictures, the page and the Markdown."""
    from drllm.reporting.page import to_html  # it needs the extra

    folder = page.with_name(f"{page.stem}_figures")
    files: dict[Path, str | bytes] = {}
    for figure, name in document.name_figures().items():
        width = WIDE if figure.is_large else NARROW
        files[folder / f"{name}.png"] = draw_png(figure.draw, width)
    files[page] = to_html(document)
    files[page.with_suffix(".md")] = to_markdown(document, folder.name)
    return files


def list_pictures(page: Path) -> list[Path]:
    """List the pictures of a report in order; `page` is the HTML file of the report."""
    paths = page.with_name(f"{page.stem}_figures").glob("*.png")
    return sorted(path for path in paths if re.fullmatch(PICTURE, path.name))


def _find_folder(run: Path | str | Results) -> Path:
    """Return the folder of a run; results in a folder `eval` belong to the folder around it."""
    if not isinstance(run, Results):
        return Path(run)
    if run.folder is None:
        raise ConfigError(
            "these results weren't written to a folder; call evaluate(..., output_dir=FOLDER)"
        )
    return run.folder.parent if run.folder.name == "eval" else run.folder


def choose_page(folders: Sequence[Path], output_dir: Path | str | None) -> Path:
    """Return the page to write; see `report`."""
    if not folders:
        raise ConfigError("no run folder is given; give one that 'drllm run' has written")
    if output_dir is None:
        if len(folders) > 1:
            raise ConfigError(
                f"{len(folders)} run folders are given and no --output-dir; "
                f"give a folder or an .html file for their common report"
            )
        return folders[0] / "report.html"
    place = Path(output_dir)
    if place.is_dir() or not place.suffix:
        if place.is_file():
            raise RecordError(f"{place} is a file; give a folder or a file that ends in .html")
        return place / "report.html"
    if place.suffix != ".html":
        raise ConfigError(f"--output-dir is {place}; give a folder or a file that ends in .html")
    return place
