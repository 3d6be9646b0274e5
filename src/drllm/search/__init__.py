"""Search: which paths of each question answer it right, and what each path costs.

`run.search_paths` is the stage, `strategies` choose paths, `evaluator` scores them, `retest` asks
again. Loads no torch.
"""

from pathlib import Path

SEARCH_FILE = "search.jsonl"
FAILED_FILE = "search.failed.jsonl"
CHUNKS_FOLDER = "search.partial"
"""What an interrupted search keeps, in the folder that gets `search.jsonl`."""


def count_kept_batches(folder: Path) -> int:
    """Count the finished batches that an interrupted search keeps in its `CHUNKS_FOLDER`."""
    # What is kept of a batch under way has a second suffix.
    return sum(file.name.count(".") == 1 for file in folder.glob("batch-*.json"))
