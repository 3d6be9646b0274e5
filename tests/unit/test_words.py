"""One word per thing: words that were retired don't come back.

The glossary (docs/concepts.md) has the words that are used. The changelog, the decisions and the
results of earlier commits keep the words of their time.
"""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md")
FOLDERS = ("docs", "src", "tests", "benchmarks", "examples")
OLDER = ("docs/results", "docs/decisions", "tests/unit/test_words.py")

RETIRED = {
    "opponent": "baseline",
    "damage": "KL",
    "dial": "depth control",
    "roster": "registry",
    "lineup": "baselines",
    "readout": "logit lens",
    "tally": "counts",
    "goes on behind": "resumes after",
    "goes on from": "resumes from",
    "learnt": "learned",
    "Owns": "what the module does",
    "Leaves": "what the module does",
}
"""Words that were used once, and what to write instead."""


def texts() -> dict[str, str]:
    """Return every page, module and recipe of the project by its name."""
    files = [REPOSITORY / page for page in PAGES]
    for folder in FOLDERS:
        files += [
            file
            for file in sorted((REPOSITORY / folder).rglob("*"))
            if file.suffix in (".py", ".md", ".yaml", ".j2")
        ]
    named = {file.relative_to(REPOSITORY).as_posix(): file for file in files}
    return {
        name: file.read_text(encoding="utf-8")
        for name, file in named.items()
        if not name.startswith(OLDER)
    }


@pytest.mark.parametrize("word", RETIRED)
def test_a_retired_word_is_not_used(word):
    pattern = re.compile(rf"(?<![A-Za-z]){re.escape(word)}s?(?![a-z])")
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts().items()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, f"write {RETIRED[word]!r} instead of {word!r}:\n" + "\n".join(found)
