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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from drllm.records.codec import write_atomically

SEED = 0

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


SEEN: dict[str, tuple[str, str, str, Callable[[Row], str]]] = {
    "gsm8k": ("gsm8k", "train", "train", write_solution),
    "squad": ("squad_v2", "validation_subset1000", "validation_subset1000", write_passage),
    "hellaswag": ("hellaswag", "validation_subset1000", "validation_subset1000", write_ending),
    "arc_easy": ("arc_easy", "train", "validation", write_arc_answer),
}
"""Kind → its folder of data, the file to fit on, the file to measure on, how a text is written."""
UNSEEN: dict[str, tuple[str, str, Callable[[Row], str]]] = {
    "mmlu": ("mmlu", "validation", write_mmlu_answer),
    "winogrande": ("winogrande", "validation", write_sentence),
}


def read_texts(file: Path, write: Callable[[Row], str]) -> list[str]:
    """Return the texts of a file, each once, in an order drawn with a seed."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        texts = [write(json.loads(line)) for line in lines]
    unique = list(dict.fromkeys(texts))
    random.Random(SEED).shuffle(unique)
    return unique


def divide_kinds(data_dir: Path, num_held_out: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each file to write, without its ending, and its texts."""
    for kind, (folder, to_fit, to_measure, write) in SEEN.items():
        held_out = read_texts(data_dir / folder / f"{to_measure}.jsonl.gz", write)[:num_held_out]
        texts = read_texts(data_dir / folder / f"{to_fit}.jsonl.gz", write)
        others = [text for text in texts if text not in set(held_out)]
        yield f"fit/{kind}", others
        yield f"held-out/{kind}", held_out
    for kind, (folder, to_measure, write) in UNSEEN.items():
        texts = read_texts(data_dir / folder / f"{to_measure}.jsonl.gz", write)
        yield f"unseen/{kind}", texts[:num_held_out]


def write_texts(file: Path, texts: Sequence[str]) -> None:
    """Write texts as JSON lines, as `--text` of every command reads them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    write_atomically(file, "".join(lines).encode())


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of published sets")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write to")
    parser.add_argument("--held-out", type=int, default=100, help="texts of a kind to measure on")
    options = parser.parse_args()
    for name, texts in divide_kinds(options.data_dir, options.held_out):
        file = options.output_dir / f"{name}.jsonl"
        write_texts(file, texts)
        print(f"{file}: {len(texts)} texts")


if __name__ == "__main__":
    main()
