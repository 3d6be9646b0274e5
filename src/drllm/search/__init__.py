"""Search: which paths answer each question right, and what each path costs.

`run.search_paths` is the stage, `strategies` choose paths, `evaluator` scores them, and `retest`
checks the right ones in other ways of asking. Doesn't import torch.
"""

from pathlib import Path

SEARCH_FILE = "search.jsonl"
FAILED_FILE = "search.failed.jsonl"
CHUNKS_FOLDER = "search.partial"
"""Folder beside `search.jsonl` in which an interrupted search keeps its results."""


def count_kept_batches(folder: Path) -> int:
    """Count the finished batches that an interrupted search keeps in its `CHUNKS_FOLDER`."""
    # The files of a batch that isn't finished have a second suffix.
    return sum(file.name.count(".") == 1 for file in folder.glob("batch-*.json"))
