"""What may be published of a run's settings and model: all but places on the user's machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLACES = ("data_dir", "output_dir", "ray_address")
"""Settings that name a place, and nothing else."""
FILE_LISTS = ("dataset", "tasks", "text", "path", "paths", "reward")
"""Settings that may name files, separated by commas. Of a file, its name is published."""
FILE_ENDINGS = (
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".parquet",
    ".txt",
    ".gz",
    ".yaml",
    ".yml",
    ".py",
)


def hide_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without the places of files and folders on the user's machine.

    Example:
        >>> hide_places({"tasks": "/home/me/mine.jsonl?answer=a,arc_easy", "data_dir": "/data"})
        {'tasks': 'mine.jsonl?answer=a,arc_easy'}
    """
    public = {name: value for name, value in config.items() if name not in PLACES}
    for name in FILE_LISTS:
        if isinstance(public.get(name), str):
            words = [hide_folder(word) for word in public[name].split(",")]
            public[name] = ",".join(words)
    return public


def hide_model_place(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of a model, whose id has no folder if it is a place.

    Example:
        >>> hide_model_place({"id": "/home/me/llama", "num_layers": 16})
        {'id': 'llama', 'num_layers': 16}
    """
    public = dict(identity)
    if public.get("id"):
        public["id"] = hide_folder(public["id"])
    return public


def hide_folder(word: str) -> str:
    """Return a word in which a file has no folder; columns or a function may follow the file.

    Example:
        >>> hide_folder("/home/me/grade.py:right@0123456789abcdef")
        'grade.py:right@0123456789abcdef'
    """
    for mark in ("?", ":"):
        file, separator, rest = word.partition(mark)
        if separator and file.endswith(FILE_ENDINGS):
            return f"{Path(file).name}{separator}{rest}"
    if word.endswith(FILE_ENDINGS) or word.startswith(("/", "~", ".")):
        return Path(word).name
    return word
