"""Constants and help texts of settings that several stages have."""

SPLITS = ("search", "fit", "select", "test")
"""The parts that a task's questions are divided into (docs/questions.md, "Splits").

Targets are searched on `search`, other things are fitted on `fit`, settings are chosen on `select`,
and results are reported on `test`.
"""

TASKS_HELP = (
    "questions: files (.jsonl, .json, .csv, .tsv, .parquet), names of 'drllm ls tasks' or of "
    "lm-evaluation-harness, or OWNER/NAME of the hub, separated by commas"
)
DATA_DIR_HELP = (
    "folder with TASK/SPLIT.jsonl[.gz] files; default: questions are fetched from the hub"
)
TRUST_HELP = (
    "take task files of lm-evaluation-harness (.yaml), which can run code: read their folder first"
)

PYTHON_FUNCTION = ".py:"
"""What the name of a reward has in it if it is a function in a Python file, as FILE.py:FUNCTION."""

MAX_DROP = 3.0
"""A loss of accuracy, in points, that matters: `shrink` allows no larger one unless told otherwise,
and the verdicts on paths go by it."""

TEXT_HELP = (
    "texts that the model must still be able to write, beside the questions: files of rows with a "
    "field 'text', .txt files with a text per paragraph, or hub data sets "
    "OWNER/NAME[:CONFIG[:SPLIT]]; 'builtin_texts' comes with drllm"
)
