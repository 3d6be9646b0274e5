"""Answers for what earlier versions wrote and this version no longer reads.

Menus of paths and other removed files are refused. Certificates are ignored, and a note says so.
"""

from pathlib import Path
from typing import NoReturn

from drllm.errors import RecordError

OLD_VERSION = "0.1.0.dev0, commit 3820ce17"
"""The last version that reads the refused files."""

MENU_FILE = "menu.json"
MENU_SCHEMA = "drllm.menu"


def refuse_removed(file: Path, content: str, remedy: str) -> NoReturn:
    """Raise a RecordError for a file whose content was removed after `OLD_VERSION`.

    Args:
        file: The file.
        content: What the file is, with an article ("a menu of paths").
        remedy: What to do instead, as an imperative ("heal one path again").
    """
    raise RecordError(
        f"{file} is {content}, which only drllm up to {OLD_VERSION} reads; {remedy}, or use that "
        f"version"
    )


def refuse_menu(place: Path) -> None:
    """Refuse a file `menu.json`, or a folder with this file; every other place is accepted."""
    file = place / MENU_FILE if place.is_dir() else place
    if file.name == MENU_FILE and file.is_file():
        refuse_removed(file, "a menu of paths", "give the file of one of its paths")


def note_ignored_certificate(version: str) -> str:
    """Return a note that the certificate in a file of an earlier version is ignored."""
    return (
        f"This file has a certificate of drllm {version}, which is ignored; 'drllm evaluate "
        f"--max-drop' tests whether a loss is excluded."
    )
