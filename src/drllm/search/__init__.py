"""Search: find the paths that answer each question right, and what each path costs.

    run.py        `search_paths`: the whole stage; start here
    questions.py  the questions with their prompts, in batches
    batch.py      `BatchSearcher`: searches a batch; the function of the stage's blocks
    rounds.py     the rounds over the questions of a batch
    strategies/   which paths of a question are tried next: the tree search, the walk
    evaluator.py  scores paths on questions
    retest.py     checks right paths on other prompts of their questions
    steps.py      keeps and counts the steps of a batch
    targets.py    the targets that a search leaves
    forecast.py   what a search will take

This file doesn't import torch.
"""

from pathlib import Path

FAILED_FILE = "search.failed.jsonl"
"""File beside `search.jsonl` for the questions that couldn't be searched."""
CHUNKS_FOLDER = "search.partial"
"""Folder beside `search.jsonl` that holds the results of an unfinished search."""


def count_kept_batches(folder: Path) -> int:
    """Count the finished batches in the `CHUNKS_FOLDER` of an unfinished search."""
    # A finished batch is one file, BATCH.json. An unfinished batch has files BATCH.STEP.json.
    return sum(file.name.count(".") == 1 for file in folder.glob("batch-*.json"))
