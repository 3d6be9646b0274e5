"""What a user can get wrong on the command line, and the one line that answers it.

Each case: exit status 2; exactly one line on standard error that names the value or the file;
nothing made, changed or removed in the working folder.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from drllm.cli import main


class Case(NamedTuple):
    """One mistake.

    Attributes:
        words: The command line; words in capitals stand for what `WORDS` says, or for the folder
            of a tiny model.
        says: What the line must hold: the value or the file.
        prepare: Makes the mistake in the working folder, which holds a finished run as `run/`.
    """

    words: str | list[str]
    says: str
    prepare: Callable[[Path], object] | None = None


WORDS = {
    "SEARCH": "search --model MODEL --device cpu --output-dir new",
    "SAME": "--limit 6 --num-simulations 6 --block-size 3",
    "TRAIN": "train --model MODEL --device cpu --num-epochs 1 --run-name new --supervision",
    "TARGETS": "train --supervision run/supervision.jsonl",
    "GENERATE": "generate hello --device cpu --max-new-tokens 2 --routers",
    "EVALUATE": "evaluate --device cpu --routers run/routers --output-dir new",
    "HARNESS": "LM_EVAL --model_args pretrained=run/routers",
    "LM_EVAL": "lm-eval run --model drllm --device cpu",
    "ASKED": "--tasks builtin_facts --split test --limit 2",
}


def words_of(case: Case, models: dict[str, str]) -> list[str]:
    known = {**WORDS, **models}
    found = []
    for word in [case.words] if isinstance(case.words, str) else case.words:
        while (longer := re.sub(r"\b[A-Z_]{4,}\b", lambda m: known.get(m[0], m[0]), word)) != word:
            word = longer
        found += word.split() if isinstance(case.words, str) else [word]
    return found


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


# --- the tables --------------------------------------------------------------------------------

LIGHT = """\
serch --limit 3 => unknown verb 'serch'
search --num-simulation 5 => unknown flag '--num-simulation'
search --limit => --limit has no value
search --stop-rule => --stop-rule has no value; give one of paper, released,
show run --question => --question has no value; give one (id of a searched
search --kl maybe => --kl takes no value, but 'maybe' follows it; --no-kl
search --no_kl=maybe => --no-kl takes no value, but 'maybe' follows it; --kl
generate why is the sky blue => generate has no use for 'is'
generate --routers run/routers => generate needs PROMPT
ls task => unknown list 'task'
search --limit all => --limit is 'all'
search --num_simulations 2.5 => --num-simulations is '2.5'
search --budget 0.9 => --budget is 0.9
TARGETS --run-name x --learning-rate nan => --learning-rate is 'nan'
TARGETS --run-name x --early-stopping 2 --validation-fraction 0 => --early-stopping 2 has no effect
search --device tpu => unknown device 'tpu'
search --dataset builtin_fact => unknown task 'builtin_fact'
evaluate --routers run/routers --tasks builtin_facts,builtin_facts => 'builtin_facts' is named twice
search --dataset builtin_arithmetic --reward letter => reward 'letter' doesn't fit task
search --reward letter,letter => --reward names 'letter' twice
search --strategy sweep --length-penalty 9 => --length-penalty 9 has no effect with --strategy sweep
search --model nowhere --shard 1/2 --limit 1 => --shard 1/2 holds no questions
EVALUATE --baselines last-layer => --baselines: unknown baseline 'last-layer'
EVALUATE --epsilon 2 => --epsilon 2 has no effect
EVALUATE --curve 0.1 --max-loss-increase 0.1 => --max-loss-increase 0.1 has no effect
EVALUATE --worked-answers builtin_arithmetic => --worked-answers builtin_arithmetic has no effect
EVALUATE --curve 0.1 --epsilon 2 --worked-answers builtin_facts => --worked-answers builtin_facts
EVALUATE --curve 0.1 --epsilon 2 --worked-answers gsm9k => unknown task 'gsm9k'
EVALUATE --curve 0.1 --epsilon 2 --num-texts 20 => --num-texts 20 are too few for --epsilon
EVALUATE --num-calibration 9 => --num-calibration 9 has no effect
EVALUATE --baselines none --num-random-draws 3 => --num-random-draws 3 has no effect
EVALUATE --curve 0.1,1.5 => --curve is '0.1,1.5'
EVALUATE --search run/search.jsonl => --search run/search.jsonl has no effect
EVALUATE --limits gsm8k=3 => --limits: unknown task 'gsm8k'
EVALUATE --limit 5 --limits builtin_facts=3 => --limit 5 has no effect
search --dataset arc_easy --data-dir nowhere => --data-dir nowhere is not a folder
search --dataset arc_easy --data-dir run => run/arc_easy
supervise --search run/search.jsonl --output run => --output: can't write run
TARGETS --run-name a --output b => both --run-name 'a' and --output 'b'
TARGETS => neither is given
train --run-name x => train needs --supervision FILE
TARGETS --run-name x --with_squad => --with-squad needs targets of squad_v2
TARGETS --run-name ../up => --run-name is '../up'
supervise --search nowhere.jsonl --output new.jsonl => nowhere.jsonl doesn't exist
supervise --search run/supervision.jsonl --output new.jsonl => 'drllm.supervision'
supervise --search run/search.jsonl --output run/search.jsonl => run/search.jsonl
TRAIN run/routers/routers.safetensors => routers.safetensors, line 1
TRAIN run/supervision.jsonl --feature-dtype bfloat61 => --feature-dtype
search --config nowhere.yaml => nowhere.yaml doesn't exist
HARNESS --tasks lambada_openai --data_dir run => --data_dir and --split have no effect
HARNESS --tasks builtin_facts --data_dir run => --data_dir run has no effect
HARNESS --tasks builtin_facts --split tests => unknown split 'tests'
HARNESS --tasks builtin_facts --split test --limit 0.5 => --limit is 0.5
HARNESS ASKED --log_samples => --log_samples
report nowhere => nowhere doesn't exist
report run run => 2 run folders are given and no --output
show nowhere => nowhere doesn't exist
 => no verb is given
search --seed 99999999999999999999 => --seed is 99999999999999999999
search --output-dir= => --output-dir is ''
supervise --search= --output x => --search is ''
train --run-name= => --run-name is ''
train --run-name x --supervision= => --supervision is ''
run dem => unknown recipe 'dem'; did you mean 'demo'?
run recipes/demo.yaml => packaged recipes are run by name: demo or sweeps/demo
supervise --search run/search.jsonl --output run/search.manifest.json => run/search.manifest.json
supervise --search run/search.jsonl --output /dev/null => it is a device
supervise --search run/search.jsonl --output run/eval/builtin_facts.json => another stage
"""

LIGHT_PREPARED = [
    Case([], "no verb is given", None),
    Case(
        "search --dataset own.jsonl",
        "own.jsonl, line 2",
        write(
            "own.jsonl", '{"question": "1+1?", "answer": "2", "grader": "exact"}\n{"question": \n'
        ),
    ),
    Case("search --output-dir file", "file is a file", write("file", "x")),
    Case(
        "evaluate --routers run/routers --output-dir file/eval",
        "can't write to file/eval",
        write("file", "x"),
    ),
    Case(
        "supervise --search empty.jsonl --output new.jsonl",
        "empty.jsonl is empty",
        write("empty.jsonl", ""),
    ),
    Case(
        "supervise --search run/search.jsonl --output new.jsonl",
        "search.jsonl, line 6",
        own("run/search.jsonl", lambda lines: [*lines[:5], lines[5][:100]]),
    ),
    Case(
        "supervise --search run/search.jsonl --output new.jsonl --quota-improving 1.0",
        "has a target (",
        own("run/search.jsonl", without_improving),
    ),
    Case(
        "supervise --search run/search.jsonl --output new.jsonl",
        "run/search.jsonl was changed or cut off",
        edit("run/search.jsonl", '"reward":0.0', '"reward":1.0'),
    ),
    Case(
        "supervise --search foreign.jsonl --output new.jsonl",
        "foreign.jsonl, line 1",
        write("foreign.jsonl", '{"text": "hello"}\n'),
    ),
    Case(
        "supervise --search run/search.jsonl --output new.jsonl",
        "schema version 99",
        edit("run/search.manifest.json", '"schema_version": 2', '"schema_version": 99'),
    ),
    Case(
        "supervise --search run/search.jsonl search.jsonl --output new.jsonl",
        "different base models",
        another_models_search,
    ),
    Case(
        "TRAIN run/supervision.jsonl",
        "run/supervision.jsonl, line 2",
        own("run/supervision.jsonl", without_answer),
    ),
    Case(
        "TRAIN run/supervision.jsonl",
        "run/supervision.jsonl, line 2",
        own("run/supervision.jsonl", one_layer_more),
    ),
    Case(
        "TRAIN run/supervision.jsonl",
        "line 2",
        own("run/supervision.jsonl", with_the_first_question),
    ),
    Case(
        "TRAIN run/supervision.jsonl",
        "run/supervision.jsonl, line 2",
        own(
            "run/supervision.jsonl",
            of_the_second(lambda row: row.update(optimal_layer_config=[0] * 4)),
        ),
    ),
    Case("TRAIN run/supervision.jsonl --features file", "file is a file", write("file", "x")),
    Case(
        "search --config s.yaml", "s.yaml: unknown setting 'buget'", write("s.yaml", "buget: 1.5\n")
    ),
    Case(
        "train --supervision x --run-name y --config s.yaml",
        "s.yaml: --learning-rate is '1e-3'",
        write("s.yaml", "learning-rate: 1e-3\n"),
    ),
    Case(
        "run r.yaml --output-dir new",
        "r.yaml, line 2: not YAML",
        write("r.yaml", "search: [limit\n"),
    ),
    Case(
        "run r.yaml --output-dir new",
        "r.yaml holds list, not names and values",
        write("r.yaml", "- search\n- train\n"),
    ),
    Case(
        "run r.yaml --output-dir new",
        "r.yaml: unknown section 'trian'",
        write("r.yaml", "trian: {num_epochs: 2}\n"),
    ),
    Case(
        "run r.yaml --output-dir new",
        "r.yaml: train: unknown setting 'epochs'",
        write("r.yaml", "train: {epochs: 2}\n"),
    ),
    Case(
        "run r.yaml --output-dir new",
        "'output_dir' is 'here'",
        write("r.yaml", "search: {output_dir: here}\n"),
    ),
    Case(
        "run run/run.yaml --output-dir run",
        "run/run.manifest.json: ",
        write("run/run.manifest.json", '{"stages": '),
    ),
    Case(
        "HARNESS --tasks arc_easy --data_dir data",
        "data/arc_easy/validation.jsonl, line 2",
        a_broken_line,
    ),
    Case(
        "HARNESS ASKED --output_path file",
        "--output_path: can't write to file, since file is a file",
        write("file", "x"),
    ),
    Case("report run", "mixes models of different depth", config_value("num_layers", 5)),
    Case(
        "show notes.jsonl",
        "notes.jsonl, line 1: has text",
        write("notes.jsonl", '{"text": "hello"}\n'),
    ),
    Case(
        "show run/search.jsonl",
        "search.jsonl, line 1",
        own("run/search.jsonl", lambda lines: [lines[0][:100]]),
    ),
    Case(
        "show new.rejected.jsonl",
        "new.rejected.jsonl, line 1: ",
        write("new.rejected.jsonl", '{"reason": "no valid path"}\n'),
    ),
]

HEAVY = """\
TARGETS --run-name x --report-to wanb => --report-to: unknown tracker 'wanb'
TARGETS --run-name x --soft-targets => --soft-targets has no effect
search --model MODEL --device cuda:97 => --device is 'cuda:97'
search --model smollm2-135 --output-dir new => 'smollm2-135'
search --model run --output-dir new => the folder run doesn't hold a model
search --revision main --output-dir new => --revision has no effect on 'smollm2-135m'
SEARCH --attn-implementation sdap => --attn-implementation
train --model MODEL --supervision run/supervision.jsonl --output run/routers => holds trained
search --model MODEL --device cpu --output-dir run --limit 5 => run/search.jsonl was made with
search --model OTHER --device cpu --output-dir run SAME => run/search.jsonl was made with
search --model MODEL --device cpu --dtype bfloat16 --output-dir run SAME => dtype
train --model OTHER --device cpu --supervision run/supervision.jsonl --run-name x => fingerprint
train --model DEEPER --device cpu --supervision run/supervision.jsonl --run-name x => num_layers
GENERATE nowhere => nowhere has no router_config.json
EVALUATE --model OTHER => these routers were trained for
GENERATE run/routers --model DEEPER => num_layers 4, this model has 5
HARNESS --tasks builtin_fact --split test => unknown task 'builtin_fact'
HARNESS --tasks builtin_facts => task 'builtin_facts' is drllm's
HARNESS --tasks arc_easy --split test => 'arc_easy' can't fetch validation of allenai/ai2_arc
HARNESS ASKED --batch_size many => --batch_size is 'many'
LM_EVAL ASKED => no model is named
LM_EVAL --model_args pretrained=./nowhere ASKED => there is no folder './nowhere'
HARNESS,num_window=8 ASKED => unknown model argument 'num_window'
HARNESS,batch_size=8 ASKED => batch_size=8 is no model argument
HARNESS,num_windows=4 ASKED => num_windows is 4
HARNESS,base=OTHER ASKED => these routers were trained for
"""

HEAVY_PREPARED = [
    Case(["generate", "--model", "run/routers", "hello"], "run/routers doesn't hold a model", None),
    Case(
        "TRAIN run/supervision.jsonl",
        "its target has 5 layers, the base model has 4",
        own(
            "run/supervision.jsonl",
            every_line(
                lambda row: row.update(
                    optimal_layer_config=[*row["optimal_layer_config"], 1],
                    executions=row["executions"] + 1,
                )
            ),
        ),
    ),
    Case(
        "TRAIN run/supervision.jsonl",
        "longer than the base model's context; its context holds",
        own("run/supervision.jsonl", every_line(lambda row: row.update(prompt="x" * 600))),
    ),
    Case(
        "TRAIN run/supervision.jsonl --features kept", "kept holds other features:", other_features
    ),
    Case(
        "GENERATE run/routers",
        "run/routers has no routers.safetensors",
        remove("run/routers/routers.safetensors"),
    ),
    Case("GENERATE run/routers", "'hidden_weight' holds NaN", with_weights(a_nan)),
    Case(
        "EVALUATE",
        "lacks the tensor 'decision_bias'",
        with_weights(lambda tensors: tensors.pop("decision_bias")),
    ),
    Case("EVALUATE", "format version 7", config_value("format_version", 7)),
    Case("EVALUATE", "routers.safetensors:", config_value("num_layers", 5, label_counts=[])),
    Case("EVALUATE", "'num_windows' is 0", config_value("num_windows", 0)),
    Case("GENERATE run/routers", "unknown key 'num_window'", config_value("num_window", 8)),
    Case("GENERATE run/routers", "don't name their base model", config_value("base_model", "")),
    Case(
        ["generate", "--model", "MODEL", "--device", "cpu", "x" * 600],
        "tokens and --max-new-tokens is 64",
        None,
    ),
    Case("run r.yaml --output-dir run", "run/search.jsonl was made with", another_recipe),
    Case(
        "run r.yaml --output-dir run",
        "dtype",
        another_dtype,
    ),
    Case(
        "HARNESS --tasks some_tex --include_path .",
        "unknown task 'some_tex'; did you mean 'some_text'?",
        write("some_text.yaml", "task: some_text\n"),
    ),
    Case(
        "LM_EVAL --model_args pretrained=MODEL,decisions=plan.json ASKED",
        "plan.json",
        write("plan.json", '{"decisions": [1, 3, 1, 1]}'),
    ),
]


def read_table(text: str) -> list[Case]:
    return [Case(*line.split(" => ")) for line in text.splitlines()]


WITHOUT_TORCH = [*read_table(LIGHT), *LIGHT_PREPARED]
"""Answered without loading torch."""
CASES = [*WITHOUT_TORCH, *read_table(HEAVY), *HEAVY_PREPARED]


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
    assert case.says in err


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{str(case.words)[:60]}: {case.says}")
def test_a_mistake_is_answered_by_one_line_and_nothing_is_written(
    case: Case,
    models: dict[str, str],
    working: Callable[[Case], Path],
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
):
    if "lm-eval" in words_of(case, models):
        request.getfixturevalue("quiet_harness")
    folder = working(case)
    before = listing(folder)

    status = main(words_of(case, models))

    out, err = capsys.readouterr()
    check_answer(case, status, err)
    assert out == ""
    assert listing(folder) == before


SCRIPT = """
import json, os, sys
from drllm.cli import main
for folder, words in json.load(sys.stdin):
    os.chdir(folder)
    status = main(words)
    print(json.dumps([status, "torch" in sys.modules or "transformers" in sys.modules]))
"""


def test_these_mistakes_are_answered_without_loading_torch(
    tmp_path: Path, finished_run: Path, models: dict[str, str]
):
    todo = []
    for number, case in enumerate(WITHOUT_TORCH):
        folder = tmp_path / str(number)
        shutil.copytree(finished_run, folder / "run")
        if case.prepare is not None:
            case.prepare(folder)
        todo.append([str(folder), words_of(case, models)])

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(todo),
        capture_output=True,
        text=True,
        check=True,
    )

    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == [[2, False]] * len(todo), [
        case for case, answer in zip(WITHOUT_TORCH, answers, strict=True) if answer != [2, False]
    ]
    for case, line in zip(WITHOUT_TORCH, done.stderr.splitlines(keepends=True), strict=True):
        check_answer(case, 2, line)


@pytest.mark.parametrize("words", ["search --dataset builtin_fact", "EVALUATE --model OTHER"])
def test_a_process_ends_with_the_same_status_and_line(
    words: str, models: dict[str, str], working: Callable[[Case], Path], start: Any
):
    case = next(case for case in CASES if case.words == words)
    folder = working(case)
    before = listing(folder)

    process = start(words_of(case, models), folder)
    _, err = process.communicate()

    check_answer(case, process.returncode, err)
    assert listing(folder) == before


def test_a_defect_of_ours_keeps_its_traceback(tmp_path: Path, finished_run: Path):
    script = "import drllm.cli.stages as s\ns.supervise = lambda *a: 1 / 0\nimport sys\n"
    script += "from drllm.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    words = ["supervise", "--search", str(finished_run / "search.jsonl"), "--output", "x.jsonl"]

    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=tmp_path, capture_output=True, text=True
    )

    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr
