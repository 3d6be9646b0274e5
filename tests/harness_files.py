"""Task files of lm-evaluation-harness with rows of their own, as a user writes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROWS = [
    {"q": f"Is {one} larger than {other}?", "yes": int(one > other)}
    for one in range(4)
    for other in range(3)
]
METRIC = {"aggregation": "mean", "higher_is_better": True}
OPTIONS = {
    "task": "larger",
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}\nAnswer:",
    "doc_to_target": "{{yes}}",
    "doc_to_choice": ["no", "yes"],
    "num_fewshot": 2,
    "metric_list": [{"metric": name, **METRIC} for name in ("acc_norm", "acc")],
}
GENERATED = {
    "task": "says",
    "output_type": "generate_until",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{yes}}",
    "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", **METRIC}],
}


def written_task(
    folder: Path,
    settings: Mapping[str, Any],
    rows: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    **changes: Any,
) -> str:
    """Write a task file with the rows of each of its splits, `test` alone unless given."""
    files = {}
    for split, own in ({"test": ROWS} if rows is None else rows).items():
        files[split] = str(folder / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in own))
    kwargs = {"data_files": files, "cache_dir": str(folder / "cache")}
    source = {"dataset_path": "json", "dataset_kwargs": kwargs}
    splits = {{"train": "training"}.get(split, split) + "_split": split for split in files}
    file = folder / f"{settings['task']}.yaml"
    file.write_text(yaml.safe_dump({**settings, **source, **splits, **changes}))
    return str(file)
