"""What a user can get wrong on the command line, and the one line that answers it.

Each case: exit status 2; exactly one line on standard error, in which value, expectation and
remedy are found; nothing made, changed or removed in the working folder.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from drllm.cli import main


@dataclass(frozen=True, kw_only=True)
class Case:
    """One mistake.

    Attributes:
        name: What is wrong.
        words: The command line; `MODEL`, `OTHER` and `DEEPER` stand for folders of tiny models.
        says: Texts that the line must contain: value, expectation, remedy.
        prepare: Makes the mistake in the working folder, which holds a finished run as `run/`.
        without_torch: The answer must come without loading torch.
    """

    name: str
    words: str | list[str]
    says: tuple[str, ...]
    prepare: Callable[[Path], object] | None = None
    without_torch: bool = False


SEARCH = "search --model MODEL --device cpu --output-dir new"
TRAIN = "train --model MODEL --device cpu --num-epochs 1 --run-name new --supervision"
GENERATE = "generate hello --device cpu --max-new-tokens 2 --routers"
LM_EVAL = "lm-eval run --model drllm --device cpu"
HARNESS = f"{LM_EVAL} --model_args pretrained=run/routers"
ASKED = "--tasks builtin_facts --split test --limit 2"
EVALUATE = "evaluate --device cpu --routers run/routers --output-dir new"


def words_of(case: Case, models: dict[str, str]) -> list[str]:
    words = case.words.split() if isinstance(case.words, str) else case.words
    return [re.sub("MODEL|OTHER|DEEPER", lambda name: models[name[0]], word) for word in words]


# --- ways of breaking things -------------------------------------------------------------------


def write(name: str, text: str) -> Callable[[Path], object]:
    """Write a file."""
    return lambda folder: (folder / name).write_text(text)


def edit(name: str, old: str, new: str) -> Callable[[Path], object]:
    """Replace the first occurrence of a text in a file."""

    def change(folder: Path) -> None:
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def own(name: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], object]:
    """Rewrite the lines of a records file and remove its manifest, as a file of one's own."""

    def rewrite(folder: Path) -> None:
        path = folder / name
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
        path.with_name(path.stem + ".manifest.json").unlink()

    return rewrite


def with_weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the tensors of the routers."""

    def rewrite(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = folder / "run" / "routers" / "routers.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return rewrite


def config_value(name: str, value: Any, **more: Any) -> Callable[[Path], object]:
    """Set a value of `router_config.json`, or several."""

    def rewrite(folder: Path) -> None:
        path = folder / "run" / "routers" / "router_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value, **more}))

    return rewrite


def a_broken_line(folder: Path) -> None:
    (folder / "data" / "arc_easy").mkdir(parents=True)
    good = {"question": "1?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}}
    lines = [json.dumps({**good, "id": "1", "answerKey": "A"}), '{"id": "2", "question": ']
    (folder / "data" / "arc_easy" / "validation.jsonl").write_text("\n".join(lines) + "\n")


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def without_answer(lines: list[str]) -> list[str]:
    row = json.loads(lines[1])
    del row["answer"]
    return [lines[0], json.dumps(row) + "\n", *lines[2:]]


def without_improving(lines: list[str]) -> list[str]:
    """Keep the questions that the full path answers right."""
    right = [line for line in lines if json.loads(line)["paths"][0]["reward"] == 1]
    assert right
    return right


def with_decision_three(lines: list[str]) -> list[str]:
    row = json.loads(lines[1])
    row["optimal_layer_config"][2] = 3
    return [lines[0], json.dumps(row) + "\n", *lines[2:]]


def every_line(change: Callable[[dict[str, Any]], object]) -> Callable[[list[str]], list[str]]:
    """Change all targets of a file."""

    def rewrite(lines: list[str]) -> list[str]:
        rows = [json.loads(line) for line in lines]
        for row in rows:
            change(row)
        return [json.dumps(row) + "\n" for row in rows]

    return rewrite


def of_the_second(change: Callable[[dict[str, Any]], object]) -> Callable[[list[str]], list[str]]:
    """Change the target of line 2."""
    return lambda lines: [lines[0], *every_line(change)([lines[1]]), *lines[2:]]


def other_features(folder: Path) -> None:
    """Begin a folder of features of another number of windows, for other targets."""
    (folder / "kept").mkdir()
    manifest = {
        "schema": "drllm.features",
        "schema_version": 1,
        "model": {"num_layers": 4},
        "config": {"num_windows": 4, "feature_dtype": "float32"},
    }
    (folder / "kept" / "features.manifest.json").write_text(json.dumps(manifest))
    (folder / "kept" / "features.safetensors").write_bytes(b"")


def one_layer_more(lines: list[str]) -> list[str]:
    row = json.loads(lines[1])
    row["optimal_layer_config"].append(1)
    row["executions"] += 1
    return [lines[0], json.dumps(row) + "\n", *lines[2:]]


def with_the_first_question(lines: list[str]) -> list[str]:
    first, row = (json.loads(line) for line in lines[:2])
    row["question"], row["task"] = first["question"].upper(), first["task"]
    del row["executions"]
    row["optimal_layer_config"] = [
        2 if value == 1 else 1 for value in first["optimal_layer_config"]
    ]
    return [lines[0], json.dumps(row) + "\n", *lines[2:]]


def a_nan(tensors: dict[str, Any]) -> None:
    tensors["hidden_weight"][0, 0, 0] = float("nan")


def another_models_search(folder: Path) -> None:
    """Copy the search, saying that it was made with other weights."""
    for name in ("search.jsonl", "search.manifest.json"):
        shutil.copy(folder / "run" / name, folder / name)
    path = folder / "search.manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["fingerprint"] = "0123456789abcdef"
    path.write_text(json.dumps(manifest))


def another_dtype(folder: Path) -> None:
    text = (folder / "run" / "run.yaml").read_text()
    assert "dtype: auto" in text
    (folder / "r.yaml").write_text(text.replace("dtype: auto", "dtype: bfloat16"))


def another_recipe(folder: Path) -> None:
    text = (folder / "run" / "run.yaml").read_text()
    assert "num_simulations: 6" in text
    (folder / "r.yaml").write_text(text.replace("num_simulations: 6", "num_simulations: 7"))


# --- the table ---------------------------------------------------------------------------------

CASES = [
    # the line itself
    Case(
        name="no verb",
        words=[],
        says=("no verb is given", "'drllm --help' lists them"),
        without_torch=True,
    ),
    Case(
        name="unknown verb",
        words="serch --limit 3",
        says=(
            "unknown verb 'serch'",
            "did you mean 'search'?",
            "Valid: evaluate, export, generate",
        ),
        without_torch=True,
    ),
    Case(
        name="a verb of the published code that isn't there",
        words="rollout --routers run/routers",
        says=("unknown verb 'rollout'", "Valid: ", "'drllm --help'"),
        without_torch=True,
    ),
    Case(
        name="unknown flag",
        words="search --num-simulation 5",
        says=("unknown flag '--num-simulation'", "'--num-simulations'", "drllm search --help"),
        without_torch=True,
    ),
    Case(
        name="unknown flag with a value",
        words="train --lerning_rate=0.1 --supervision x",
        says=("unknown flag '--lerning-rate'", "did you mean '--learning-rate'", "Valid: "),
        without_torch=True,
    ),
    Case(
        name="flag without a value",
        words="search --limit",
        says=("--limit has no value", "give a whole number", "at most this many questions"),
        without_torch=True,
    ),
    Case(
        name="flag with choices without a value",
        words="search --stop-rule",
        says=("--stop-rule has no value; give one of paper, released, exhaust (when a question",),
        without_torch=True,
    ),
    Case(
        name="flag of a verb's own without a value",
        words="show run --question",
        says=("--question has no value; give one (id of a searched question, to draw the paths",),
        without_torch=True,
    ),
    Case(
        name="switch with a value",
        words="search --kl maybe",
        says=("drllm: --kl takes no value, but 'maybe' follows it; --no-kl turns it off",),
        without_torch=True,
    ),
    Case(
        name="switch with a value after =",
        words="search --no_kl=maybe",
        says=("--no-kl takes no value, but 'maybe' follows it; --kl turns it on",),
        without_torch=True,
    ),
    Case(
        name="prompt without quotes",
        words="generate why is the sky blue",
        says=(
            "drllm: generate has no use for 'is'",
            "put texts with spaces in quotes",
            "generate --help",
        ),
        without_torch=True,
    ),
    Case(
        name="no prompt",
        words="generate --routers run/routers",
        says=("drllm: generate needs PROMPT", "what to answer", "for example: drllm generate"),
        without_torch=True,
    ),
    Case(
        name="no recipe",
        words="run",
        says=("drllm: run needs RECIPE", "YAML file", "for example: drllm run"),
        without_torch=True,
    ),
    Case(
        name="unknown list",
        words="ls task",
        says=("unknown list 'task'", "did you mean 'tasks'?", "drllm ls tasks"),
        without_torch=True,
    ),
    # numbers and names
    Case(
        name="text for a number",
        words="search --limit all",
        says=("--limit is 'all'", "give a whole number"),
        without_torch=True,
    ),
    Case(
        name="fraction for a whole number",
        words="search --num_simulations 2.5",
        says=("--num-simulations is '2.5'", "give a whole number", "paths tried a question"),
        without_torch=True,
    ),
    Case(
        name="budget below 1",
        words="search --budget 0.9",
        says=("--budget is 0.9", "at least 1"),
        without_torch=True,
    ),
    Case(
        name="negative number",
        words="search --seed -1",
        says=("--seed is -1", "at least 0"),
        without_torch=True,
    ),
    Case(
        name="NaN",
        words="train --supervision run/supervision.jsonl --run-name x --learning-rate nan",
        says=("--learning-rate is 'nan'", "give a finite number"),
        without_torch=True,
    ),
    Case(
        name="unknown tracker",
        words="train --supervision run/supervision.jsonl --run-name x --report-to wanb",
        says=("--report-to: unknown tracker 'wanb'", "did you mean 'wandb'", "mlflow"),
    ),
    Case(
        name="gamma without the focal loss",
        words="train --supervision run/supervision.jsonl --run-name x --loss cross_entropy "
        "--gamma 1",
        says=("--gamma 1 has no effect with --loss cross_entropy", "leave one of the two out"),
        without_torch=True,
    ),
    Case(
        name="early stopping with nothing held out",
        words="train --supervision run/supervision.jsonl --run-name x --early-stopping 2 "
        "--validation-fraction 0",
        says=("--early-stopping 2 has no effect with --validation-fraction 0", "leave one"),
        without_torch=True,
    ),
    Case(
        name="soft targets without valid paths",
        words="train --supervision run/supervision.jsonl --run-name x --soft-targets",
        says=("--soft-targets has no effect", "supervise --path-weights equal", "leave it out"),
    ),
    Case(
        name="no simulations",
        words="search --num-simulations 0",
        says=("--num-simulations is 0", "at least 1"),
        without_torch=True,
    ),
    Case(
        name="unknown stop rule",
        words="search --stop-rule exhaus",
        says=("--stop-rule", "'exhaus'", "did you mean 'exhaust'?", "Valid: exhaust, paper"),
        without_torch=True,
    ),
    Case(
        name="unknown device",
        words="search --device tpu",
        says=("unknown device 'tpu'", "did you mean 'cpu'?", "Valid: auto, cpu, cuda, mps"),
        without_torch=True,
    ),
    Case(
        name="a device that isn't there",
        words="search --model MODEL --device cuda:97",
        says=("--device is 'cuda:97'", "this machine has", "use --device auto or cpu"),
    ),
    Case(
        name="unknown task",
        words="search --dataset builtin_fact",
        says=("unknown task 'builtin_fact'", "did you mean 'builtin_facts'", "or a .jsonl file"),
        without_torch=True,
    ),
    Case(
        name="a task twice",
        words="evaluate --routers run/routers --tasks builtin_facts,builtin_facts",
        says=("'builtin_facts' is named twice", "name it once"),
        without_torch=True,
    ),
    Case(
        name="a reward that doesn't fit the task",
        words="search --dataset builtin_arithmetic --reward letter",
        says=("reward 'letter' doesn't fit task 'builtin_arithmetic'", "it takes boxed"),
        without_torch=True,
    ),
    Case(
        name="a reward twice",
        words="search --reward letter,letter",
        says=("--reward names 'letter' twice", "name it once"),
        without_torch=True,
    ),
    Case(
        name="a number of the tree for another strategy",
        words="search --strategy sweep --length-penalty 9",
        says=(
            "--length-penalty 9 has no effect with --strategy sweep",
            "leave it out, or choose --strategy tree",
        ),
        without_torch=True,
    ),
    Case(
        name="random children for another strategy",
        words="search --strategy walk --random-child-probability 0",
        says=("--random-child-probability 0 has no effect with --strategy walk", "leave it out"),
        without_torch=True,
    ),
    Case(
        name="a shard without questions",
        words="search --model nowhere --shard 1/2 --limit 1",
        says=("--shard 1/2 holds no questions", "give fewer shards"),
        without_torch=True,
    ),
    Case(
        name="evaluating against an baseline that there isn't",
        words=f"{EVALUATE} --baselines last-layer",
        says=("--baselines: unknown baseline 'last-layer'", "'last-layers'"),
        without_torch=True,
    ),
    Case(
        name="a certified choice without depths",
        words=f"{EVALUATE} --epsilon 2",
        says=("--epsilon 2 has no effect", "--curve", "0.1,0.2,0.3"),
        without_torch=True,
    ),
    Case(
        name="a limit of a certified choice without one",
        words=f"{EVALUATE} --curve 0.1 --max-loss-increase 0.1",
        says=("--max-loss-increase 0.1 has no effect", "give --epsilon too"),
        without_torch=True,
    ),
    Case(
        name="worked answers for a certified choice that isn't asked for",
        words=f"{EVALUATE} --worked-answers builtin_arithmetic",
        says=("--worked-answers builtin_arithmetic has no effect", "give --epsilon too"),
        without_torch=True,
    ),
    Case(
        name="worked answers that are options",
        words=f"{EVALUATE} --curve 0.1 --epsilon 2 --worked-answers builtin_facts",
        says=("--worked-answers builtin_facts", "are options, not texts", "gsm8k"),
        without_torch=True,
    ),
    Case(
        name="worked answers of a task that there isn't",
        words=f"{EVALUATE} --curve 0.1 --epsilon 2 --worked-answers gsm9k",
        says=("unknown task 'gsm9k'", "'gsm8k'"),
        without_torch=True,
    ),
    Case(
        name="a certified choice on too few texts",
        words=f"{EVALUATE} --curve 0.1 --epsilon 2 --num-texts 20",
        says=("--num-texts 20 are too few for --epsilon", "give at least 30"),
        without_torch=True,
    ),
    Case(
        name="questions that nothing is fitted on",
        words=f"{EVALUATE} --num-calibration 9",
        says=("--num-calibration 9 has no effect", "without --curve", "baselines that are fitted"),
        without_torch=True,
    ),
    Case(
        name="draws of no baseline",
        words=f"{EVALUATE} --baselines none --num-random-draws 3",
        says=("--num-random-draws 3 has no effect", "permuted-routes"),
        without_torch=True,
    ),
    Case(
        name="a depth that saves more than everything",
        words=f"{EVALUATE} --curve 0.1,1.5",
        says=("--curve is '0.1,1.5'", "above 0 and below 1"),
        without_torch=True,
    ),
    Case(
        name="a search log that no baseline is fitted on",
        words=f"{EVALUATE} --search run/search.jsonl",
        says=("--search run/search.jsonl has no effect", "best-program"),
        without_torch=True,
    ),
    Case(
        name="a limit of a task that isn't evaluated",
        words=f"{EVALUATE} --limits gsm8k=3",
        says=("--limits: unknown task 'gsm8k'", "builtin_facts"),
        without_torch=True,
    ),
    Case(
        name="a limit beside limits of every task",
        words=f"{EVALUATE} --limit 5 --limits builtin_facts=3",
        says=("--limit 5 has no effect", "builtin_facts=3 names every task", "leave it out"),
        without_torch=True,
    ),
    Case(
        name="data folder missing",
        words="search --dataset arc_easy --data-dir nowhere",
        says=("--data-dir nowhere is not a folder", "give the folder with the tasks' files"),
        without_torch=True,
    ),
    Case(
        name="data folder without the task",
        words="search --dataset arc_easy --data-dir run",
        says=("run/arc_easy", "train.jsonl"),
        without_torch=True,
    ),
    Case(
        name="a broken line in questions of one's own",
        words="search --dataset own.jsonl",
        says=("own.jsonl, line 2", "JSON"),
        prepare=write(
            "own.jsonl", '{"question": "1+1?", "answer": "2", "grader": "exact"}\n{"question": \n'
        ),
        without_torch=True,
    ),
    # the base model
    Case(
        name="unknown model",
        words="search --model smollm2-135 --output-dir new",
        says=("'smollm2-135'", "did you mean 'smollm2-135m'?"),
    ),
    Case(
        name="a folder without a model",
        words="search --model run --output-dir new",
        says=("the folder run doesn't hold a model", "lacks config.json", "save_pretrained"),
    ),
    Case(
        name="routers for a model",
        words=["generate", "--model", "run/routers", "hello"],
        says=("run/routers doesn't hold a model", "are these routers?", "--routers"),
    ),
    Case(
        name="revision of an alias",
        words="search --revision main --output-dir new",
        says=("--revision has no effect on 'smollm2-135m'", "an alias", "leave it out"),
    ),
    Case(
        name="unknown attention code",
        words=f"{SEARCH} --attn-implementation sdap",
        says=("--attn-implementation", "'sdap'", "did you mean 'sdpa'"),
    ),
    # where to write
    Case(
        name="output folder is a file",
        words="search --output-dir file",
        says=("--output-dir", "file is a file", "give a folder"),
        prepare=write("file", "x"),
        without_torch=True,
    ),
    Case(
        name="output folder below a file",
        words="evaluate --routers run/routers --output-dir file/eval",
        says=("can't write to file/eval", "file is a file", "give a folder"),
        prepare=write("file", "x"),
        without_torch=True,
    ),
    Case(
        name="supervision into a folder",
        words="supervise --search run/search.jsonl --output run",
        says=("--output is run, which is a folder", "give the name of a file"),
        without_torch=True,
    ),
    Case(
        name="both run name and output",
        words="train --supervision run/supervision.jsonl --run-name a --output b",
        says=("both --run-name 'a' and --output 'b'", "give --run-name NAME", "or --output DIR"),
        without_torch=True,
    ),
    Case(
        name="neither run name nor output",
        words="train --supervision run/supervision.jsonl",
        says=("neither is given", "give --run-name NAME", "or --output DIR"),
        without_torch=True,
    ),
    Case(
        name="training without targets",
        words="train --run-name x",
        says=(
            "train needs --supervision FILE",
            "neither data/mcts_paths/supervision.jsonl nor data/supervision.jsonl",
            "search first: drllm search --model smollm2-135m",
        ),
        without_torch=True,
    ),
    Case(
        name="targets of a task to add that aren't there",
        words="train --supervision run/supervision.jsonl --run-name x --with_squad",
        says=("--with-squad needs targets of squad_v2", "make them: drllm search --model"),
        without_torch=True,
    ),
    Case(
        name="run name with a slash",
        words="train --supervision run/supervision.jsonl --run-name ../up",
        says=("--run-name is '../up'", "a plain name", "as --output"),
        without_torch=True,
    ),
    Case(
        name="training over finished routers",
        words="train --model MODEL --supervision run/supervision.jsonl --output run/routers",
        says=("run/routers holds trained routers already", "choose another --output"),
    ),
    Case(
        name="another search in the folder",
        words="search --model MODEL --device cpu --output-dir run --limit 5",
        says=("run/search.jsonl was made with", "this run has", "choose another --output-dir"),
    ),
    Case(
        name="a search of another model in the folder",
        words=(
            "search --model OTHER --device cpu --output-dir run "
            "--limit 6 --num-simulations 6 --block-size 3"
        ),
        says=("run/search.jsonl was made with", "choose another --output-dir"),
    ),
    Case(
        name="a search in another dtype in the folder",
        words=(
            "search --model MODEL --device cpu --dtype bfloat16 --output-dir run "
            "--limit 6 --num-simulations 6 --block-size 3"
        ),
        says=("made with dtype 'float32', this run has 'bfloat16'", "choose another --output-dir"),
    ),
    # records
    Case(
        name="search file missing",
        words="supervise --search nowhere.jsonl --output new.jsonl",
        says=("nowhere.jsonl doesn't exist", "give a .jsonl file that a stage has written"),
        without_torch=True,
    ),
    Case(
        name="search file empty",
        words="supervise --search empty.jsonl --output new.jsonl",
        says=("empty.jsonl is empty", "run the stage that writes it again"),
        prepare=write("empty.jsonl", ""),
        without_torch=True,
    ),
    Case(
        name="search file cut off",
        words="supervise --search run/search.jsonl --output new.jsonl",
        says=("search.jsonl, line 6", "cut off", "make the file again"),
        prepare=own("run/search.jsonl", lambda lines: [*lines[:5], lines[5][:100]]),
        without_torch=True,
    ),
    Case(
        name="a share of improving targets where none improves",
        words="supervise --search run/search.jsonl --output new.jsonl --quota-improving 1.0",
        says=("has a target (", "over the quota", "leave --quota-improving out"),
        prepare=own("run/search.jsonl", without_improving),
        without_torch=True,
    ),
    Case(
        name="search file changed after it was written",
        words="supervise --search run/search.jsonl --output new.jsonl",
        says=("run/search.jsonl was changed or cut off", "another hash", "make it again"),
        prepare=edit("run/search.jsonl", '"reward":0.0', '"reward":1.0'),
        without_torch=True,
    ),
    Case(
        name="supervision for a search file",
        words="supervise --search run/supervision.jsonl --output new.jsonl",
        says=("'drllm.supervision'", "expected 'drllm.search'", "Is it the right file?"),
        without_torch=True,
    ),
    Case(
        name="somebody else's file for a search file",
        words="supervise --search foreign.jsonl --output new.jsonl",
        says=("foreign.jsonl, line 1", "unknown field `text`"),
        prepare=write("foreign.jsonl", '{"text": "hello"}\n'),
        without_torch=True,
    ),
    Case(
        name="a file of a future version",
        words="supervise --search run/search.jsonl --output new.jsonl",
        says=("schema version 99", "reads up to 2", "install a newer drllm"),
        prepare=edit("run/search.manifest.json", '"schema_version": 2', '"schema_version": 99'),
        without_torch=True,
    ),
    Case(
        name="searches of two models",
        words="supervise --search run/search.jsonl search.jsonl --output new.jsonl",
        says=("different base models", "fingerprint", "one supervision file for each"),
        prepare=another_models_search,
        without_torch=True,
    ),
    Case(
        name="output that is an input",
        words="supervise --search run/search.jsonl --output run/search.jsonl",
        says=("run/search.jsonl", "another stage", "choose another file"),
        without_torch=True,
    ),
    Case(
        name="supervision file that isn't text",
        words=f"{TRAIN} run/routers/routers.safetensors",
        says=("routers.safetensors, line 1", "not UTF-8 text"),
        without_torch=True,
    ),
    Case(
        name="target without an answer",
        words=f"{TRAIN} run/supervision.jsonl",
        says=("run/supervision.jsonl, line 2", "`answer` is missing"),
        prepare=own("run/supervision.jsonl", without_answer),
        without_torch=True,
    ),
    Case(
        name="a decision of 3",
        words=f"{TRAIN} run/supervision.jsonl",
        says=("run/supervision.jsonl, line 2", "decision 3 at layer 2", "2 (repeat)"),
        prepare=own("run/supervision.jsonl", with_decision_three),
        without_torch=True,
    ),
    Case(
        name="targets of different depths",
        words=f"{TRAIN} run/supervision.jsonl",
        says=("run/supervision.jsonl, line 2", "has 5 layers", "line 1 has 4", "of one base model"),
        prepare=own("run/supervision.jsonl", one_layer_more),
        without_torch=True,
    ),
    Case(
        name="two targets of one question",
        words=f"{TRAIN} run/supervision.jsonl",
        says=("line 2", "line 1 has the same question with another target", "leave one"),
        prepare=own("run/supervision.jsonl", with_the_first_question),
        without_torch=True,
    ),
    Case(
        name="a target that executes nothing",
        words=f"{TRAIN} run/supervision.jsonl",
        says=("run/supervision.jsonl, line 2", "at least one layer must be executed"),
        prepare=own(
            "run/supervision.jsonl",
            of_the_second(lambda row: row.update(optimal_layer_config=[0] * 4)),
        ),
        without_torch=True,
    ),
    Case(
        name="a target without a question",
        words=f"{TRAIN} run/supervision.jsonl",
        says=("run/supervision.jsonl, line 2", "'question' is empty"),
        prepare=own("run/supervision.jsonl", of_the_second(lambda row: row.update(question=" "))),
        without_torch=True,
    ),
    Case(
        name="targets of one's own for a model of another depth",
        words=f"{TRAIN} run/supervision.jsonl",
        says=("its target has 5 layers, the base model has 4", "searched with this model"),
        prepare=own(
            "run/supervision.jsonl",
            every_line(lambda row: row["optimal_layer_config"].append(1)),
        ),
    ),
    Case(
        name="prompts that are too long",
        words=f"{TRAIN} run/supervision.jsonl",
        says=("longer than the base model's context; its context holds 512 tokens", "the first is"),
        prepare=own("run/supervision.jsonl", every_line(lambda row: row.update(prompt="x" * 600))),
    ),
    Case(
        name="features of something else",
        words=f"{TRAIN} run/supervision.jsonl --features kept",
        says=("kept holds other features: ", "--num-windows was 4, yours is 8", "or delete it"),
        prepare=other_features,
    ),
    Case(
        name="features into a file",
        words=f"{TRAIN} run/supervision.jsonl --features file",
        says=("--features", "file is a file", "give a folder"),
        prepare=write("file", "x"),
        without_torch=True,
    ),
    Case(
        name="unknown dtype of features",
        words=f"{TRAIN} run/supervision.jsonl --feature-dtype bfloat61",
        says=("--feature-dtype", "'bfloat61'", "did you mean 'bfloat16'"),
        without_torch=True,
    ),
    Case(
        name="targets of another model",
        words="train --model OTHER --device cpu --supervision run/supervision.jsonl --run-name x",
        says=("run/supervision.jsonl holds targets of", "fingerprint", "search with this one"),
    ),
    Case(
        name="targets of a model of another depth",
        words="train --model DEEPER --device cpu --supervision run/supervision.jsonl --run-name x",
        says=("num_layers 4", "has num_layers 5", "search with this one"),
    ),
    # routers
    Case(
        name="routers missing",
        words=f"{GENERATE} nowhere",
        says=("nowhere has no router_config.json", "'drllm train'"),
    ),
    Case(
        name="routers without weights",
        words=f"{GENERATE} run/routers",
        says=("run/routers has no routers.safetensors", "is it a folder of routers?"),
        prepare=remove("run/routers/routers.safetensors"),
    ),
    Case(
        name="routers with NaN",
        words=f"{GENERATE} run/routers",
        says=("'hidden_weight' holds NaN", "train again"),
        prepare=with_weights(a_nan),
    ),
    Case(
        name="routers without a tensor",
        words=EVALUATE,
        says=("lacks the tensor 'decision_bias'", "train the routers again"),
        prepare=with_weights(lambda tensors: tensors.pop("decision_bias")),
    ),
    Case(
        name="routers of a future format",
        words=EVALUATE,
        says=("format version 7", "reads up to 1", "install a newer drllm"),
        prepare=config_value("format_version", 7),
    ),
    Case(
        name="wrong L",
        words=EVALUATE,
        says=("routers.safetensors: ", "has shape [4, ", "asks for [5, "),
        prepare=config_value("num_layers", 5, label_counts=[]),
    ),
    Case(
        name="wrong W",
        words=EVALUATE,
        says=("'num_windows' is 0", "a whole number from 1"),
        prepare=config_value("num_windows", 0),
    ),
    Case(
        name="unknown key in the routers' config",
        words=f"{GENERATE} run/routers",
        says=("unknown key 'num_window'", "did you mean 'num_windows'"),
        prepare=config_value("num_window", 8),
    ),
    Case(
        name="routers of another model",
        words=f"{EVALUATE} --model OTHER",
        says=("these routers were trained for", "base_fingerprint", "train routers for this one"),
    ),
    Case(
        name="routers of a model of another depth",
        words=f"{GENERATE} run/routers --model DEEPER",
        says=("num_layers 4, this model has 5", "load the model they belong to"),
    ),
    Case(
        name="routers that name no model",
        words=f"{GENERATE} run/routers",
        says=("don't name their base model", "--model"),
        prepare=config_value("base_model", ""),
    ),
    Case(
        name="prompt longer than the context",
        words=["generate", "--model", "MODEL", "--device", "cpu", "x" * 600],
        says=("tokens and --max-new-tokens is 64", "context holds 512", "shorten the prompt"),
    ),
    # YAML
    Case(
        name="settings file missing",
        words="search --config nowhere.yaml",
        says=("nowhere.yaml doesn't exist", "give a YAML file with settings"),
        without_torch=True,
    ),
    Case(
        name="unknown setting in a file",
        words="search --config s.yaml",
        says=("s.yaml: unknown setting 'buget'", "did you mean 'budget'?", "Valid: "),
        prepare=write("s.yaml", "buget: 1.5\n"),
        without_torch=True,
    ),
    Case(
        name="setting of another type in a file",
        words="train --supervision x --run-name y --config s.yaml",
        says=("s.yaml: --learning-rate is '1e-3'", "give a number", "write 1.0e-3"),
        prepare=write("s.yaml", "learning-rate: 1e-3\n"),
        without_torch=True,
    ),
    Case(
        name="recipe missing",
        words="run nowhere.yaml --output-dir new",
        says=("nowhere.yaml doesn't exist", "give a YAML file with a recipe"),
        without_torch=True,
    ),
    Case(
        name="recipe that isn't YAML",
        words="run r.yaml --output-dir new",
        says=("r.yaml, line 2: not YAML", "give a YAML file with a recipe"),
        prepare=write("r.yaml", "search: [limit\n"),
        without_torch=True,
    ),
    Case(
        name="recipe that is a list",
        words="run r.yaml --output-dir new",
        says=("r.yaml holds list, not names and values", "written 'name: value'"),
        prepare=write("r.yaml", "- search\n- train\n"),
        without_torch=True,
    ),
    Case(
        name="unknown section of a recipe",
        words="run r.yaml --output-dir new",
        says=("r.yaml: unknown section 'trian'", "did you mean 'train'?", "Valid: evaluate"),
        prepare=write("r.yaml", "trian: {num_epochs: 2}\n"),
        without_torch=True,
    ),
    Case(
        name="unknown setting of a recipe",
        words="run r.yaml --output-dir new",
        says=("r.yaml: train: unknown setting 'epochs'", "'num_epochs'", "Valid: "),
        prepare=write("r.yaml", "train: {epochs: 2}\n"),
        without_torch=True,
    ),
    Case(
        name="recipe that names its folder",
        words="run r.yaml --output-dir new",
        says=("'output_dir' is 'here'", "leave it out", "--output-dir"),
        prepare=write("r.yaml", "search: {output_dir: here}\n"),
        without_torch=True,
    ),
    Case(
        name="recipe for a folder with another search",
        words="run r.yaml --output-dir run",
        says=("run/search.jsonl was made with", "this run has", "choose another --output-dir"),
        prepare=another_recipe,
    ),
    Case(
        name="recipe for a folder with a search in another dtype",
        words="run r.yaml --output-dir run",
        says=("made with dtype 'float32', this run has 'bfloat16'", "choose another --output-dir"),
        prepare=another_dtype,
    ),
    Case(
        name="broken ledger of a run",
        words="run run/run.yaml --output-dir run",
        says=("run/run.manifest.json is broken", "delete it"),
        prepare=write("run/run.manifest.json", '{"stages": '),
        without_torch=True,
    ),
    # lm-evaluation-harness
    Case(
        name="harness: unknown task",
        words=f"{HARNESS} --tasks builtin_fact --split test",
        says=("unknown task 'builtin_fact'", "did you mean 'builtin_facts'"),
    ),
    Case(
        name="harness: our task without our options",
        words=f"{HARNESS} --tasks builtin_facts",
        says=("task 'builtin_facts' is drllm's", "give --split test, or --data_dir FOLDER"),
    ),
    Case(
        name="harness: unknown task of the harness",
        words=f"{HARNESS} --tasks some_tex --include_path .",
        says=("unknown task 'some_tex'; did you mean 'some_text'?", "'drllm lm-eval ls tasks'"),
        prepare=write("some_text.yaml", "task: some_text\n"),
    ),
    Case(
        name="harness: options without a task of ours",
        words=f"{HARNESS} --tasks lambada_openai --data_dir run",
        says=("--data_dir and --split have no effect", "'drllm ls tasks'", "leave them out"),
        without_torch=True,
    ),
    Case(
        name="harness: a data folder for a task that needs none",
        words=f"{HARNESS} --tasks builtin_facts --data_dir run",
        says=("--data_dir run has no effect", "brings its own questions", "give --split"),
        without_torch=True,
    ),
    Case(
        name="harness: unknown split",
        words=f"{HARNESS} --tasks builtin_facts --split tests",
        says=("unknown split 'tests'", "did you mean 'test'"),
        without_torch=True,
    ),
    Case(
        name="harness: a share for a limit",
        words=f"{HARNESS} --tasks builtin_facts --split test --limit 0.5",
        says=("--limit is 0.5", "a whole number from 1"),
        without_torch=True,
    ),
    Case(
        name="harness: a broken line in a data folder",
        words=f"{HARNESS} --tasks arc_easy --data_dir data",
        says=("data/arc_easy/validation.jsonl, line 2", "JSON"),
        prepare=a_broken_line,
        without_torch=True,
    ),
    Case(
        name="harness: no data folder and no network",
        words=f"{HARNESS} --tasks arc_easy --split test",
        says=("'arc_easy' can't fetch validation of allenai/ai2_arc from the hub", "--data-dir"),
    ),
    Case(
        name="harness: results into a file",
        words=f"{HARNESS} {ASKED} --output_path file",
        says=("--output_path: can't write to file, since file is a file", "give a folder"),
        prepare=write("file", "x"),
        without_torch=True,
    ),
    Case(
        name="harness: samples without a place",
        words=f"{HARNESS} {ASKED} --log_samples",
        says=("--output_path", "--log_samples"),
        without_torch=True,
    ),
    Case(
        name="harness: batch size",
        words=f"{HARNESS} {ASKED} --batch_size many",
        says=("--batch_size is 'many'", "give auto, or a whole number from 1"),
    ),
    Case(
        name="harness: no model",
        words=f"{LM_EVAL} {ASKED}",
        says=("no model is named", "--model_args pretrained=NAME"),
    ),
    Case(
        name="harness: a model that isn't there",
        words=f"{LM_EVAL} --model_args pretrained=./nowhere {ASKED}",
        says=("there is no folder './nowhere'", "isn't a hub id"),
    ),
    Case(
        name="harness: unknown model argument",
        words=f"{HARNESS},num_window=8 {ASKED}",
        says=("unknown model argument 'num_window'", "did you mean 'num_windows'"),
    ),
    Case(
        name="harness: a flag among the model arguments",
        words=f"{HARNESS},batch_size=8 {ASKED}",
        says=("batch_size=8 is no model argument", "give --batch_size 8"),
    ),
    Case(
        name="harness: other windows",
        words=f"{HARNESS},num_windows=4 {ASKED}",
        says=("num_windows is 4", "were trained with 8", "give num_windows=8"),
    ),
    Case(
        name="harness: routers of another model",
        words=f"{HARNESS},base=OTHER {ASKED}",
        says=("these routers were trained for", "base_fingerprint"),
    ),
    Case(
        name="harness: broken decisions",
        words=f"{LM_EVAL} --model_args pretrained=MODEL,decisions=plan.json {ASKED}",
        says=("plan.json", "decision 3"),
        prepare=write("plan.json", '{"decisions": [1, 3, 1, 1]}'),
    ),
    # report and show
    Case(
        name="report on nothing",
        words="report nowhere",
        says=("nowhere doesn't exist", "give a folder that 'drllm run' has written"),
        without_torch=True,
    ),
    Case(
        name="report on two runs without a place",
        words="report run run",
        says=("2 run folders are given and no --output", "give a folder or an .html file"),
        without_torch=True,
    ),
    Case(
        name="report on results of another depth",
        words="report run",
        says=("mixes models of different depth", "keep the files of one run in a folder"),
        prepare=config_value("num_layers", 5),
        without_torch=True,
    ),
    Case(
        name="showing what isn't ours",
        words="show notes.jsonl",
        says=("notes.jsonl, line 1: has text", "expected 'paths' (search)"),
        prepare=write("notes.jsonl", '{"text": "hello"}\n'),
        without_torch=True,
    ),
    Case(
        name="showing a file that is cut off",
        words="show run/search.jsonl",
        says=("search.jsonl, line 1", "cut off", "make the file again"),
        prepare=own("run/search.jsonl", lambda lines: [lines[0][:100]]),
        without_torch=True,
    ),
    Case(
        name="showing a line of rejects that lacks something",
        words="show new.rejected.jsonl",
        says=("new.rejected.jsonl, line 1: ", "`id`"),
        prepare=write("new.rejected.jsonl", '{"reason": "no valid path"}\n'),
        without_torch=True,
    ),
    Case(
        name="showing what isn't there",
        words="show nowhere",
        says=("nowhere doesn't exist", "give a .jsonl file"),
        without_torch=True,
    ),
]


# --- the tests ---------------------------------------------------------------------------------


def listing(folder: Path) -> dict[str, bytes | None]:
    """Return all files below a folder with their contents; folders have None."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def models(model_folder: Callable[..., Path]) -> dict[str, str]:
    folders = {
        "MODEL": model_folder(),
        "OTHER": model_folder(seed=1),
        "DEEPER": model_folder(num_layers=5),
    }
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture
def working(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Case], Path]:
    """A function that makes a working folder with a finished run and one mistake."""

    def make(case: Case) -> Path:
        folder = tmp_path / "working"
        folder.mkdir()
        shutil.copytree(finished_run, folder / "run")
        if case.prepare is not None:
            case.prepare(folder)
        monkeypatch.chdir(folder)
        return folder

    return make


@pytest.fixture
def quiet_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the harness' log from standard error, and spare it reading its 14,000 task files."""
    import lm_eval.tasks

    small = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)
    monkeypatch.setenv("LMEVAL_LOG_LEVEL", "ERROR")


def check_answer(case: Case, status: int, err: str) -> None:
    assert status == 2, err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert err.startswith("drllm: ")
    for text in case.says:
        assert text in err


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_is_answered_by_one_line_and_nothing_is_written(
    case: Case,
    models: dict[str, str],
    working: Callable[[Case], Path],
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
):
    if "lm-eval" in case.words:
        request.getfixturevalue("quiet_harness")
    folder = working(case)
    before = listing(folder)

    status = main(words_of(case, models))

    out, err = capsys.readouterr()
    check_answer(case, status, err)
    assert out == ""
    assert listing(folder) == before


def test_no_two_cases_have_the_same_name():
    assert len({case.name for case in CASES}) == len(CASES) >= 25


WITHOUT_TORCH = """
import json, os, sys
from drllm.cli import main
for name, folder, words in json.load(sys.stdin):
    os.chdir(folder)
    status = main(words)
    print(json.dumps([name, status, "torch" in sys.modules or "transformers" in sys.modules]))
"""


def test_these_mistakes_are_answered_without_loading_torch(
    tmp_path: Path, finished_run: Path, models: dict[str, str]
):
    cases = [case for case in CASES if case.without_torch]
    todo = []
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(finished_run, folder / "run")
        if case.prepare is not None:
            case.prepare(folder)
        todo.append([case.name, str(folder), words_of(case, models)])

    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input=json.dumps(todo),
        capture_output=True,
        text=True,
        check=True,
    )

    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == [[case.name, 2, False] for case in cases]
    for case, line in zip(cases, done.stderr.splitlines(keepends=True), strict=True):
        check_answer(case, 2, line)


@pytest.mark.parametrize(
    "name", ["unknown task", "target without an answer", "routers of another model"]
)
def test_a_process_ends_with_the_same_status_and_line(
    name: str, models: dict[str, str], working: Callable[[Case], Path], start: Any
):
    case = next(case for case in CASES if case.name == name)
    folder = working(case)
    before = listing(folder)

    process = start(words_of(case, models), folder)
    _, err = process.communicate(timeout=60)

    check_answer(case, process.returncode, err)
    assert listing(folder) == before


def test_a_defect_of_ours_keeps_its_traceback(tmp_path: Path, finished_run: Path):
    script = "import drllm.supervision as s\ns.write = lambda *a: 1 / 0\nimport sys\n"
    script += "from drllm.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    words = ["supervise", "--search", str(finished_run / "search.jsonl"), "--output", "x.jsonl"]

    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=tmp_path, capture_output=True, text=True
    )

    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr
