"""What files of earlier versions hold that this version no longer reads, and how it is refused."""

from pathlib import Path
from typing import NoReturn

from drllm.errors import RecordError

OLD_VERSION = "0.1.0.dev0, commit 3820ce17"
"""The last version that has what was removed since."""

MENU_FILE = "menu.json"
MENU_SCHEMA = "drllm.menu"


def refuse_removed(file: Path, content: str, remedy: str) -> NoReturn:
    """Raise the RecordError for a file whose content was removed after `OLD_VERSION`.

    Args:
        file: The file.
        content: What it holds, with its article ("a menu of paths").
        remedy: What to give instead, as an imperative.
    """
    raise RecordError(
        f"{file} is {content}, which only drllm up to {OLD_VERSION} reads; {remedy}, or use that "
        f"version"
    )


def refuse_menu(place: Path) -> None:
    """Refuse a `menu.json`, or a folder that holds one; let everything else pass."""
    file = place / MENU_FILE if place.is_dir() else place
    if file.name == MENU_FILE and file.is_file():
        refuse_removed(file, "a menu of paths", "give the file of one of its paths")


def certificate_ignored(version: str) -> str:
    """Say that a certificate, which earlier versions looked for, is ignored."""
    return (
        f"The certificate in this file, of drllm {version}, is ignored; ask 'drllm evaluate "
        f"--max-drop' what loss the test questions exclude."
    )
