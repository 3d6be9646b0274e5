"""Search: find the paths that answer each question right, and what each path costs.

`run.search_paths` is the whole stage. `strategies` choose paths, `evaluator` scores the paths, and
`retest` asks each question again with other prompts to check the right paths. This file doesn't
import torch.
"""

from pathlib import Path

SEARCH_FILE = "search.jsonl"
FAILED_FILE = "search.failed.jsonl"
"""File beside `search.jsonl` for the questions that couldn't be searched."""
CHUNKS_FOLDER = "search.partial"
"""Folder beside `search.jsonl` that holds the results of an unfinished search."""


def count_kept_batches(folder: Path) -> int:
    """Count the finished batches in the `CHUNKS_FOLDER` of an unfinished search."""
    # A finished batch is one file, BATCH.json. An unfinished batch has files BATCH.STEP.json.
    return sum(file.name.count(".") == 1 for file in folder.glob("batch-*.json"))
