"""Search: find the paths that answer each question right, and what each path costs.

`run.search_paths` is the whole stage. `strategies` choose paths, `evaluator` scores the paths, and
`retest` asks each question again with other prompts to check the right paths. This file doesn't
import torch.
"""

from pathlib import Path

SEARCH_FILE = "search.jsonl"
FAILED_FILE = "search.failed.jsonl"
CHUNKS_FOLDER = "search.partial"
"""Folder beside `search.jsonl` in which an interrupted search keeps its results."""


def count_kept_batches(folder: Path) -> int:
    """Count the finished batches in the `CHUNKS_FOLDER` of an interrupted search."""
    # The files of an unfinished batch have a second suffix.
    return sum(file.name.count(".") == 1 for file in folder.glob("batch-*.json"))
