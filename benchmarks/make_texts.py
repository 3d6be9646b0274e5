"""Write the files of texts that the studies of static paths fit and measure on, one kind a file.

The kinds that are fitted on have texts in `FOLDER/fit` and other ones in `FOLDER/held-out`:
GSM8K's questions with the worked solution, SQuAD's passages, HellaSwag's contexts with the right
ending, and ARC-Easy's questions with the right answer. `FOLDER/unseen` has the kinds that nothing
is fitted on: MMLU's questions with the right answer, and WinoGrande's sentences. A set of which
the data folder has one file is divided at random with a seed.

    python benchmarks/make_texts.py --data-dir DIR --output-dir FOLDER [--held-out N]
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.compare import SEED

from drllm.records.codec import write_atomically
from drllm.records.manifest import to_lines

Row = dict[str, Any]


def write_solution(row: Row) -> str:
    """Write a question of GSM8K with its worked solution."""
    return f"{row['question']}\n{row['answer']}"


def write_passage(row: Row) -> str:
    """Write a passage of SQuAD; several questions share one."""
    return str(row["context"])


def write_ending(row: Row) -> str:
    """Write a context of HellaSwag with the right ending."""
    return f"{row['query']} {row['choices'][row['label']]}"


def write_arc_answer(row: Row) -> str:
    """Write a question of ARC with the right answer."""
    right = row["choices"]["label"].index(row["answerKey"])
    return f"{row['question']} {row['choices']['text'][right]}"


def write_mmlu_answer(row: Row) -> str:
    """Write a question of MMLU with the right answer."""
    return f"{row['question']} {row['choices'][row['answer']]}"


def write_sentence(row: Row) -> str:
    """Write a sentence of WinoGrande with the right word in its gap."""
    return str(row["sentence"]).replace("_", row[f"option{row['answer']}"])


class Kind(NamedTuple):
    """Where the texts of a kind come from, and how a row becomes a text."""

    folder: str  # in the data folder
    file_to_measure: str  # without its ending
    write: Callable[[Row], str]
    file_to_fit: str = ""  # empty if nothing is fitted on the kind


SEEN = {
    "gsm8k": Kind("gsm8k", "train", write_solution, "train"),
    "squad": Kind("squad_v2", "validation_subset1000", write_passage, "validation_subset1000"),
    "hellaswag": Kind("hellaswag", "validation_subset1000", write_ending, "validation_subset1000"),
    "arc_easy": Kind("arc_easy", "validation", write_arc_answer, "train"),
}
UNSEEN = {
    "mmlu": Kind("mmlu", "validation", write_mmlu_answer),
    "winogrande": Kind("winogrande", "validation", write_sentence),
}


def read_texts(data_dir: Path, kind: Kind, name: str) -> list[str]:
    """Return the texts of a file of a kind, each once, in an order drawn with a seed."""
    with gzip.open(data_dir / kind.folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [kind.write(json.loads(line)) for line in lines]
    unique_texts = list(dict.fromkeys(texts))
    random.Random(SEED).shuffle(unique_texts)
    return unique_texts


def divide_kinds(data_dir: Path, num_held_out: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each file to write, without its ending, and its texts."""
    for name, kind in SEEN.items():
        to_measure = read_texts(data_dir, kind, kind.file_to_measure)[:num_held_out]
        held_out = set(to_measure)
        texts = read_texts(data_dir, kind, kind.file_to_fit)
        yield f"fit/{name}", [text for text in texts if text not in held_out]
        yield f"held-out/{name}", to_measure
    for name, kind in UNSEEN.items():
        yield f"unseen/{name}", read_texts(data_dir, kind, kind.file_to_measure)[:num_held_out]


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of published sets")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write to")
    parser.add_argument("--held-out", type=int, default=100, help="texts of a kind to measure on")
    options = parser.parse_args()
    for name, texts in divide_kinds(options.data_dir, options.held_out):
        file = options.output_dir / f"{name}.jsonl"
        write_atomically(file, to_lines({"text": text} for text in texts))
        print(f"{file}: {len(texts)} texts")


if __name__ == "__main__":
    main()
