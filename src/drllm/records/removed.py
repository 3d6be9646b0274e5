"""Refuses files of earlier versions whose content this version no longer reads."""

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
        content: What the file holds, with an article ("a menu of paths").
        remedy: What to do instead ("give …").
    """
    raise RecordError(
        f"{file} is {content}, which only drllm up to {OLD_VERSION} reads; {remedy}, or use that "
        f"version"
    )


def refuse_menu(place: Path) -> None:
    """Refuse a `menu.json`, or a folder that holds a menu; let everything else pass."""
    file = place / MENU_FILE if place.is_dir() else place
    if file.name == MENU_FILE and file.is_file():
        refuse_removed(file, "a menu of paths", "give the file of one of its paths")


def certificate_ignored(version: str) -> str:
    """Return a note that the certificate of an earlier version is ignored."""
    return (
        f"The certificate in this file, of drllm {version}, is ignored; ask 'drllm evaluate "
        f"--max-drop' what loss the test questions exclude."
    )
