"""Constants that settings of several stages share."""

SPLITS = ("search", "fit", "select", "test")
"""The parts that a task's questions are divided into."""

TASKS_HELP = (
    "tasks, separated by commas: names of drllm or of lm-evaluation-harness, FILE.jsonl, "
    "or OWNER/NAME of the hub"
)
DATA_DIR_HELP = (
    "folder with TASK/SPLIT.jsonl[.gz] files; default: questions are fetched from the hub"
)
"""Help texts of settings that several stages have."""
