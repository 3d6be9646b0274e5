"""What a user can get wrong on the command line, and the one line that answers it.

Each case: exit status 2; exactly one line on standard error that names the value or the file;
nothing made, changed or removed in the working folder.

A line of the tables is a command, what the answer must hold, and how the mistake is prepared in the
working folder, which holds a finished run as `run/`: a file with a text (`NAME: TEXT`), an edit of
one (`NAME: OLD -> NEW`) or one of the functions below (`NAME: @FUNCTION`).
"""

import errno
import io
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

WORDS = {
    "FACTS": "--tasks builtin_facts",
    "SEARCH": "search FACTS --model MODEL --device cpu --output-dir new",
    "SAME": "--dataset builtin_facts --limit 6 --num-simulations 6 --block-size 3",
    "SUPERVISE": "supervise --output-dir new.jsonl --search",
    "TRAIN": "train --model MODEL --device cpu --num-epochs 1 --run-name new --supervision",
    "TRAINED": "TRAIN run/supervision.jsonl",
    "TARGETS": "train --supervision run/supervision.jsonl",
    "GENERATE": "generate hello --device cpu --max-new-tokens 2 --routers",
    "ROUTED": "GENERATE run/routers",
    "EVALUATE": "evaluate FACTS --device cpu --routers run/routers --output-dir new",
    "HARNESS": "LM_EVAL --model_args pretrained=run/routers",
    "LM_EVAL": "lm-eval run --model drllm --device cpu",
    "ASKED": "--tasks builtin_facts --split test --limit 2",
    "RECIPE": "run r.yaml --output-dir new",
    "AGAIN": "run run/run.yaml --output-dir run",
    "LONG": "x" * 600,
    "FILE": "generate --file p.jsonl",
    "EXPORT": "export --model MODEL --device cpu --skip 1 --output",
}
"""What words in capitals stand for, apart from the folders of tiny models."""


# --- ways of breaking things, by the file that they change ---------------------------------------


def a_broken_line(path: Path) -> None:
    path.parent.mkdir(parents=True)
    good = {"question": "1?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}}
    row = json.dumps({**good, "id": "1", "answerKey": "A"})
    path.write_text(row + '\n{"id": "2", "question": \n')


def own(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path], None]:
    """Rewrite the rows of a records file and remove its manifest, as a file of one's own."""

    def rewrite(path: Path) -> None:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = change(rows) or rows
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        path.with_name(path.stem + ".manifest.json").unlink()

    return rewrite


@own
def without_answer(rows: list[dict[str, Any]]) -> None:
    del rows[1]["answer"]


@own
def all_skipped(rows: list[dict[str, Any]]) -> None:
    rows[1]["optimal_layer_config"] = [0] * 4


def one_layer_more(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["optimal_layer_config"].append(1)
        row["executions"] += 1


@own
def with_the_first_question(rows: list[dict[str, Any]]) -> None:
    first, row = rows[:2]
    row["question"], row["task"] = first["question"].upper(), first["task"]
    del row["executions"]
    row["optimal_layer_config"] = [2 if n == 1 else 1 for n in first["optimal_layer_config"]]


@own
def too_long(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["prompt"] = WORDS["LONG"]


@own
def without_improving(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the questions that the full path answers right."""
    right = [row for row in rows if row["paths"][0]["reward"] == 1]
    assert right
    return right


def cut_off(path: Path) -> None:
    path.write_text(path.read_text()[:-100])
    path.with_name("search.manifest.json").unlink()


def in_a_circle(path: Path) -> None:
    """Link a file to itself."""
    path.symlink_to(path.name)


def other_features(path: Path) -> None:
    """Begin a folder of features of another number of windows, for other targets."""
    path.parent.mkdir()
    config = {"num_windows": 4, "feature_dtype": "float32"}
    manifest = {"schema": "drllm.features", "schema_version": 1, "config": config}
    path.write_text(json.dumps({**manifest, "model": {"num_layers": 4}}))
    path.with_name("features-000000.safetensors").write_bytes(b"")


def with_weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the tensors of the routers."""

    def rewrite(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return rewrite


@with_weights
def a_nan(tensors: dict[str, Any]) -> None:
    tensors["hidden_weight"][0, 0, 0] = float("nan")


def another_models_search(path: Path) -> None:
    """Copy the search, saying that it was made with other weights."""
    for name in ("search.jsonl", "search.manifest.json"):
        shutil.copy(path.parent / "run" / name, path.with_name(name))
    manifest = json.loads(path.read_text())
    manifest["model"]["fingerprint"] = "0123456789abcdef"
    path.write_text(json.dumps(manifest))


def config(**values: Any) -> Callable[[Path], None]:
    """Set values of `router_config.json`."""
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


PREPARE: dict[str, Callable[[Path], object]] = {
    "one_layer_more_in_all": own(one_layer_more),
    "one_layer_more_in_one": own(lambda rows: one_layer_more(rows[1:2])),
    "no_decision_bias": with_weights(lambda tensors: tensors.pop("decision_bias")),
    "removed": Path.unlink,
    "no_utf8": lambda path: path.write_bytes(b"model: \xff\xfe"),
    "five_layers_without_counts": config(num_layers=5, label_counts=[]),
    "no_base_model": config(base_model=""),
}

# --- the tables --------------------------------------------------------------------------------

LIGHT = """\
serch --limit 3 => unknown verb 'serch'
search --num-simulation 5 => unknown flag '--num-simulation'
search --stop-rule => --stop-rule has no value; give one of paper, released,
show run --question => --question has no value; give a value (id of a searched
search --kl maybe => --kl takes no value, but 'maybe' follows it; --no-kl
search --no_kl=maybe => --no-kl takes no value, but 'maybe' follows it; --kl
generate why is the sky blue => generate has no use for 'is'
generate --routers run/routers => generate needs PROMPT
generate x --file p.jsonl => PROMPT 'x' and --file p.jsonl are both given
generate x --output o.jsonl => --output-dir o.jsonl has no effect without --file
generate x --batch-size 4 => --batch-size 4 has no effect without --file
generate x --seed 5 => --seed 5 has no effect with --temperature 0
generate x --depth-bias 0.5 => --depth-bias has no effect without routers
generate x --routers r --path plan => --routers r and --path plan would both choose the layers
generate x --path plan --depth-bias 0.5 => --depth-bias has no effect without routers
generate x --path plan => plan doesn't exist
generate x --static-routing => --static-routing has no effect without routers
generate x --calibration p.jsonl => no effect without --target-executions
generate x --target-executions 3 => needs prompts; give a file
FILE => p.jsonl doesn't exist
FILE => p.jsonl is empty => p.jsonl: \\n
FILE => p.jsonl, line 2 => p.jsonl: {"prompt": "a"}\\n{"text": "a"}\\n
FILE --output p.jsonl => is the file of prompts itself => p.jsonl: {"prompt": "a"}\\n
FILE --output p.jsonl/o => p.jsonl is a file => p.jsonl: {"prompt": "a"}\\n
ls task => unknown list 'task'; did you mean 'tasks'
ls tasks --model smollm2-135m => --model smollm2-135m has no effect on the list of tasks
ls architectures --try --model x => --model x and --try are both given
search q.jsonl => did you mean --tasks q.jsonl?
search --task q.jsonl => did you mean '--tasks'
--model x => no verb stands before --model
evaluate --routers nowhere --tasks builtin_facts => nowhere has no router_config.json
search --lim 3 => unknown flag '--lim'; did you mean '--limit'
search --shard 1/1 => --shard 1/1 is the whole search and has no effect
search --num-workers 2 => --num-workers 2 has no effect with --executor local
search --ray-address auto => --ray-address auto has no effect with --executor local
search --device tpu => unknown device 'tpu'
search --dataset builtin_fact => unknown task 'builtin_fact'
evaluate --routers run/routers --tasks builtin_facts,builtin_facts => 'builtin_facts' is named twice
search --dataset builtin_facts,owner/name/more => unknown task 'owner/name/more'
search FACTS --columns question=q => --columns question=q has no effect on builtin_facts
search --dataset q.jsonl --columns question=a,question=b => names 'question' twice
search --dataset q.jsonl --columns query=q => unknown field 'query'
search --dataset builtin_arithmetic --reward letter => reward 'letter' doesn't fit task
search FACTS --reward letter,letter => --reward names 'letter' twice
search FACTS --strategy walk --length-penalty 9 => --length-penalty 9 has no effect
search FACTS --model smollm2-135m --shard 1/2 --limit 1 => --shard 1/2 holds no questions
search --output-dir new => no task is given; give --tasks FILE.jsonl
evaluate --routers run/routers --output-dir new => or --tasks builtin_facts for a first try
gaps --output-dir new => or --tasks builtin_facts for a first try
evaluate --tasks builtin_facts => neither routers nor paths are given
evaluate FACTS --paths nowhere.json => nowhere.json doesn't exist
evaluate --paths p.json --curve 0.1 => --curve 0.1 has no effect without routers \
=> p.json: {"path": [0]}\\n
EVALUATE --paths p.json,p.json => two paths are called 'p' => p.json: {"path": [0]}\\n
EVALUATE --baselines last-layer => --baselines: unknown baseline 'last-layer'
EVALUATE --epsilon 2 --split select => --max-drop 2 needs the questions of test
EVALUATE --curve 0.1 --max-loss-increase 0.1 => --max-loss-increase 0.1 has no effect
EVALUATE --max-drop 2 --max-loss-increase 1 --num-texts 20 => --num-texts 20 is too small
EVALUATE --num-calibration 9 => --num-calibration 9 has no effect
EVALUATE --baselines none --num-random-draws 3 => --num-random-draws 3 has no effect
EVALUATE --curve 0.1,1.5 => --curve is '0.1,1.5'
EVALUATE --supervision run/supervision.jsonl => --supervision run/supervision.jsonl has no effect
search --dataset arc_easy --data-dir nowhere => --data-dir nowhere is not a folder
search --dataset arc_easy --data-dir run => run/arc_easy
TARGETS --run-name a --output b => both --run-name 'a' and --output-dir 'b'
TARGETS => no folder for the routers is given
train --run-name x => train needs --supervision FILE
TARGETS --run-name x --with_squad => --with-squad needs targets of squad_v2
TARGETS --run-name ../up => --run-name is '../up'
SUPERVISE nowhere.jsonl => nowhere.jsonl doesn't exist
SUPERVISE run/supervision.jsonl => 'drllm.supervision'
supervise --search run/search.jsonl --output run/search.jsonl => run/search.jsonl
TRAIN run/routers/routers.safetensors => routers.safetensors, line 1
SUPERVISE loop => loop: its symbolic links lead in a circle => loop: @in_a_circle
supervise --search run/search.jsonl --output loop => loop => loop: @in_a_circle
TRAIN loop => loop: its symbolic links lead in a circle => loop: @in_a_circle
shrink MODEL builtin_facts loop => loop: its symbolic links lead in a circle => loop: @in_a_circle
search --config nowhere.yaml => nowhere.yaml doesn't exist
HARNESS --tasks lambada_openai --data_dir run => --data_dir and --split have no effect
HARNESS --tasks builtin_facts --data_dir run => --data_dir run has no effect
HARNESS --tasks builtin_facts --split tests => unknown split 'tests'
HARNESS --tasks builtin_facts --split test --limit 0.5 => --limit is 0.5
HARNESS ASKED --log_samples => --log_samples
report nowhere => nowhere doesn't exist; give a folder
report file => file is a file; give a folder => file: x
report run run => 2 run folders are given and no --output-dir
show nowhere => nowhere doesn't exist
show nowhere --question q1 => nowhere doesn't exist
show LONG => xxxxxxxx
report LONG => xxxxxxxx
run LONG => xxxxxxxx
search --config LONG => xxxxxxxx
search --dataset LONG.jsonl => xxxxxxxx
search FACTS --model LONG => xxxxxxxx
search FACTS --output-dir LONG => xxxxxxxx
search --dataset arc_easy --data-dir LONG => xxxxxxxx
shrink LONG builtin_facts new => xxxxxxxx
shrink MODEL builtin_facts LONG => xxxxxxxx
show run/supervision.jsonl --question q1 => run/supervision.jsonl is no search.jsonl
search --dataset owner/name --model misspelt => there is no model 'misspelt'; give a hub id
search FACTS --model run --output-dir new => the folder run doesn't hold a model
search FACTS --model q.jsonl => q.jsonl is a file; give the folder => q.jsonl: {}
search FACTS --model owner/nowhere => model 'owner/nowhere' isn't in the local cache
RECIPE => there is no model 'smollm2-135n'; did you mean => r.yaml: model: {model: smollm2-135n}
search FACTS --revision main --output-dir new => --revision has no effect on 'smollm2-135m'
evaluate --model ./nowhere --tasks builtin_facts --routers owner/routers => no model './nowhere'
generate --model smolm2-135m hello => did you mean 'smollm2-135m'?
search --dataset owner/name --model smollm2-135 => did you mean 'smollm2-135m'?
run choices.jsonl => drllm search --tasks choices.jsonl --output-dir DIR
run choices.csv => choices.csv is a file of questions, not a recipe; for a smaller checkpoint: \
drllm shrink MODEL choices.csv OUT
run q.json => q.json is a file of questions, not a recipe => q.json: [{"question": "1?"}]
search --dataset choices.csv => choices.csv doesn't exist
search --dataset choices.xlsx => choices.xlsx is an Excel file
search --tasks choices => did you mean 'choices.csv'? => choices.csv: question\\n
search --tasks q.csv => q.csv, line 2: 'choices' or 'grader' is missing \
=> q.csv: question,answer\\n1?,2\\n
search --tasks q.json => q.json, row 1: 'choices' or 'grader' is missing => q.json: [{"a": 1}]
search --tasks q.jsonl => q.jsonl is empty => q.jsonl:
search --tasks q.jsonl => name its column, as in --columns question=q => q.jsonl: \
{"q": "1?", "choices": ["a", "b"], "answer": 0}\\n
search --tasks q.jsonl => q.jsonl, line 1: 'answer' is 2; expected an index from 0 to 1 \
=> q.jsonl: {"question": "1?", "choices": ["a", "b"], "answer": 2}\\n
search --tasks arc_eazy => unknown task 'arc_eazy'; did you mean 'arc_easy'
evaluate --tasks arc_eazy --routers run/routers => did you mean 'arc_easy'
run dem => unknown recipe 'dem'; did you mean 'demo'?
run recipes/demo.yaml => packaged recipes are run by name: drllm run demo
supervise --search run/search.jsonl --output run/search.manifest.json => run/search.manifest.json
supervise --search run/search.jsonl --output /dev/null => it is a device
supervise --search run/search.jsonl --output run/eval/builtin_facts.json => another stage
search --dataset own.jsonl => own.jsonl, line 2 => own.jsonl: \
{"question": "1+1?", "answer": "2", "grader": "exact"}\\n{"question": \\n
search FACTS --output-dir file => file is a file => file: x
evaluate FACTS --routers run/routers --output-dir file/eval => can't write to file/eval => file: x
gaps --tasks builtin_fact --output-dir new => did you mean 'builtin_facts'
shrink MODEL builtin_facts run => the folder run isn't empty; give the name of a new folder
shrink MODEL builtin_facts file => file is a file; give the name of a folder => file: x
shrink MODEL builtin_facts new => OUT.work: can't write to => new.work: x
shrink MODEL builtin_facts new --layers 40 => --layers 40 keeps 40 layers of a model of 4; \
keep 2 to 3
shrink MODEL builtin_facts new --save 1% => --save 1% keeps 4 layers of a model of 4; keep 2 to 3
shrink MODEL builtin_facts new --save 99% => --save 99% keeps 0 layers of a model of 4; keep 2 to 3
export --model MODEL --skip 99 --output-dir new => --skip names layer 99
learn FACTS --model MODEL --skip 0-3 --output-dir new => --skip leaves out 4 of 4 layers
gaps FACTS --model MODEL --layers 9 --output-dir new => give numbers of layers to keep
export --model MODEL --skip 1,9 --output-dir new => --skip names layer 9
generate x --model MODEL --path without:1,99 => the model has no layer 99; give layers from 0 to 3
generate x --model MODEL --path without:0-3 => all layers are left out
generate x --model MODEL --path plan => not a layer of a model of 4 layers => plan: {"path": [0, 4]}
evaluate FACTS --model MODEL --paths without:99 --output-dir new => the model has no layer 99
evaluate FACTS --model MODEL --paths witout:3-5 --output-dir new => did you mean 'without:3-5'?
SUPERVISE empty.jsonl => empty.jsonl is empty => empty.jsonl:
SUPERVISE run/search.jsonl => search.jsonl, line 6 => run/search.jsonl: @cut_off
SUPERVISE run/search.jsonl --quota-improving 1.0 => has a target ( \
=> run/search.jsonl: @without_improving
SUPERVISE run/search.jsonl => run/search.jsonl was changed or cut off \
=> run/search.jsonl: "reward":0.0 -> "reward":1.0
SUPERVISE foreign.jsonl => foreign.jsonl, line 1 => foreign.jsonl: {"text": "hello"}\\n
SUPERVISE run/search.jsonl => schema version 99 \
=> run/search.manifest.json: "schema_version": 2 -> "schema_version": 99
SUPERVISE run/search.jsonl search.jsonl => different base models \
=> search.manifest.json: @another_models_search
TRAINED => run/supervision.jsonl, line 2 => run/supervision.jsonl: @without_answer
TRAINED => run/supervision.jsonl, line 2 => run/supervision.jsonl: @one_layer_more_in_one
TRAINED => line 2 => run/supervision.jsonl: @with_the_first_question
TRAINED => run/supervision.jsonl, line 2 => run/supervision.jsonl: @all_skipped
TRAINED --features file => file is a file => file: x
search --config s.yaml => s.yaml: unknown setting 'buget' => s.yaml: buget: 1.5\\n
search --config s.yaml => s.yaml holds NoneType, not names and values => s.yaml:
search --config s.yaml => s.yaml is not a UTF-8 text => s.yaml: @no_utf8
RECIPE => r.yaml, line 2: not YAML => r.yaml: search: [limit\\n
RECIPE => r.yaml holds list, not names and values => r.yaml: - search\\n- train\\n
RECIPE => r.yaml: section 'train' is 3; give settings => r.yaml: train: 3\\n
RECIPE => r.yaml: --num-epochs is 0; give a value of at least 1 \
=> r.yaml: train: {num_epochs: 0}\\n
RECIPE => r.yaml: unknown section 'trian'; did you mean 'train' => r.yaml: trian: {num_epochs: 2}\\n
RECIPE => r.yaml: train: unknown setting 'epochs' => r.yaml: train: {epochs: 2}\\n
RECIPE => 'output_dir' is 'here' => r.yaml: search: {output_dir: here}\\n
AGAIN => run/run.manifest.json: => run/run.manifest.json: {"stages":
HARNESS --tasks arc_easy --data_dir data => data/arc_easy/validation.jsonl, line 2 \
=> data/arc_easy/validation.jsonl: @a_broken_line
HARNESS ASKED --output_path file => --output_path: can't write to file, since file is a file \
=> file: x
report run => mixes models of different depth \
=> run/routers/router_config.json: "num_layers": 4 -> "num_layers": 5
show notes.jsonl => notes.jsonl, line 1: has text => notes.jsonl: {"text": "hello"}\\n
show run/search.jsonl => search.jsonl, line 6 => run/search.jsonl: @cut_off
show search.failed.jsonl => search.failed.jsonl, line 1: \
=> search.failed.jsonl: {"error": "x"}\\n
show new.rejected.jsonl => new.rejected.jsonl, line 1: \
=> new.rejected.jsonl: {"reason": "no valid path"}\\n
"""
"""Answered without loading torch."""

HEAVY = """\
search --dataset owner/name => task owner/name can't fetch train of owner/name from the hub
EVALUATE --tasks builtin_facts,owner/name:small:test => can't fetch test of owner/name from the hub
TARGETS --run-name x --report-to wanb => --report-to: unknown tracker 'wanb'
search FACTS --model MODEL --device cuda:97 => --device is 'cuda:97'
SEARCH --attn-implementation sdap => --attn-implementation
train --model MODEL --supervision run/supervision.jsonl --output run/routers => holds trained
search FACTS --model MODEL --device cpu --output-dir run --limit 5 => run/search.jsonl was made with
search --model OTHER --device cpu --output-dir run SAME => run/search.jsonl was made with
search --model MODEL --device cpu --dtype bfloat16 --output-dir run SAME => dtype
train --model OTHER --device cpu --supervision run/supervision.jsonl --run-name x => fingerprint
train --model DEEPER --device cpu --supervision run/supervision.jsonl --run-name x => num_layers
GENERATE nowhere => nowhere has no router_config.json
EVALUATE --model OTHER => these routers were trained for
ROUTED --model DEEPER => num_layers 4, this model has 5
HARNESS --tasks builtin_fact --split test => did you mean 'builtin_facts'
HARNESS --tasks builtin_facts => task 'builtin_facts' is a task of drllm
HARNESS --tasks arc_easy --split test => 'arc_easy' can't fetch validation of allenai/ai2_arc
HARNESS ASKED --batch_size many => --batch_size is 'many'
HARNESS --tasks= => no task is named; give --tasks NAME,NAME
HARNESS --tasks far_away --include_path . => can't be fetched from the hub ( \
=> far_away.yaml: task: far_away\\ndataset_path: nobody/nothing\\noutput_type: multiple_choice\\n
LM_EVAL ASKED --model_args pretrained=checkpoints/none,num_windows=8 => \
pretrained=checkpoints/none isn't a folder of routers (there is no such folder)
LM_EVAL ASKED --model_args pretrained=tiny,num_windows=8 => leave num_windows out
LM_EVAL ASKED --model_args pretrained=checkpoints/none,base=tiny => base=tiny has no effect
LM_EVAL ASKED => no model is named
lm-eval run --model hf --model_args pretrained=run/routers ASKED => which --model hf can't load
LM_EVAL --model_args pretrained=./nowhere ASKED => there is no folder './nowhere'
HARNESS,num_window=8 ASKED => unknown model argument 'num_window'
HARNESS,batch_size=8 ASKED => batch_size=8 isn't a model argument
HARNESS,num_windows=4 ASKED => num_windows is 4
HARNESS,base=OTHER ASKED => these routers were trained for
generate --model run/routers hello => run/routers doesn't hold a model
generate --model MODEL --device cpu LONG => tokens and --max-new-tokens is 64
TRAINED => its target has 5 layers, the base model has 4 \
=> run/supervision.jsonl: @one_layer_more_in_all
TRAINED => longer than the base model's context: 4; its context holds \
=> run/supervision.jsonl: @too_long
TRAINED --features kept => the folder of features kept was made with \
=> kept/features.manifest.json: @other_features
ROUTED => run/routers has no routers.safetensors => run/routers/routers.safetensors: @removed
ROUTED => 'hidden_weight' holds NaN => run/routers/routers.safetensors: @a_nan
EVALUATE => lacks the tensor 'decision_bias' => run/routers/routers.safetensors: @no_decision_bias
EVALUATE => format version 7 \
=> run/routers/router_config.json: "format_version": 1 -> "format_version": 7
EVALUATE => routers.safetensors: => run/routers/router_config.json: @five_layers_without_counts
EVALUATE => >= 1; it is 0 => run/routers/router_config.json: "num_windows": 8 -> "num_windows": 0
ROUTED => unknown key 'num_window' \
=> run/routers/router_config.json: "num_windows" -> "num_window": 8, "num_windows"
ROUTED => don't name their base model => run/routers/router_config.json: @no_base_model
bundle LONG --output-dir new => xxxxxxxx
bundle run --output-dir LONG => xxxxxxxx
GENERATE LONG => xxxxxxxx
ls architectures --model LONG => xxxxxxxx
EXPORT run => isn't empty
EXPORT plan => is a file => plan: text
AGAIN => run/search.jsonl was made with => run/run.yaml: num_simulations: 6 -> num_simulations: 7
AGAIN => dtype => run/run.yaml: dtype: auto -> dtype: bfloat16
HARNESS --tasks some_tex --include_path . => unknown task 'some_tex'; did you mean 'some_text'? \
=> some_text.yaml: task: some_text\\n
LM_EVAL --model_args pretrained=MODEL,path=plan.json ASKED => plan.json \
=> plan.json: {"decisions": [1, 3, 1, 1]}
"""


class Case(NamedTuple):
    """One mistake: the command line, what the answer must hold, and its preparation."""

    words: str
    says: str
    preparation: str = ""

    def prepare(self, folder: Path) -> None:
        if not self.preparation:
            return
        name, _, change = self.preparation.partition(":")
        path, change = folder / name, change.strip()
        if change.startswith("@"):
            (PREPARE.get(change[1:]) or globals()[change[1:]])(path)
        elif " -> " in change:
            old, new = change.split(" -> ")
            assert old in path.read_text()
            path.write_text(path.read_text().replace(old, new, 1))
        else:
            path.write_text(change.replace("\\n", "\n"))

    def line(self, models: dict[str, str]) -> list[str]:
        known, text = {**WORDS, **models}, self.words
        while (longer := re.sub(r"\b[A-Z_]{4,}\b", lambda m: known.get(m[0], m[0]), text)) != text:
            text = longer
        return text.split()


WITHOUT_TORCH, WITH_TORCH = (
    [Case(*line.split(" => ")) for line in table.splitlines()] for table in (LIGHT, HEAVY)
)


# --- the tests ---------------------------------------------------------------------------------


class Answer(NamedTuple):
    """How a command line ended."""

    status: int
    out: str
    err: str


def listing(folder: Path) -> dict[str, bytes | None]:
    """Return all files below a folder with their contents; folders have None."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def models(model_folder: Callable[..., Path]) -> dict[str, str]:
    folders = {"MODEL": {}, "OTHER": {"seed": 1}, "DEEPER": {"num_layers": 5}}
    return {name: str(model_folder(**settings)) for name, settings in folders.items()}


@pytest.fixture(scope="module")
def make_working_folder(
    tmp_path_factory: pytest.TempPathFactory, finished_run: Path
) -> Callable[[Case], Path]:
    """A function that makes a working folder with a finished run and one mistake."""

    def make(case: Case) -> Path:
        folder = tmp_path_factory.mktemp("working")
        shutil.copytree(finished_run, folder / "run")
        case.prepare(folder)
        return folder

    return make


def check_answer(case: Case, answer: Answer) -> None:
    assert answer.status == 2, answer.err
    assert answer.out == ""
    assert answer.err.endswith("\n")
    # On a slow machine lines such as "reading the questions …" may come before.
    [message] = [line for line in answer.err.splitlines() if not line.endswith(" …")]
    assert message.startswith("drllm: ")
    assert case.says in message


def name_of(case: Case) -> str:
    return f"{case.words[:60]}: {case.says}"


SCRIPT = """
import contextlib, functools, io, json, os, sys
import lm_eval.tasks
from drllm.cli import main
from drllm.tasks import harness_names
# Spare the commands reading 14,000 task files.
harness_names._find_task_folders = lambda: ()
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
for folder, words in json.load(sys.stdin):
    os.chdir(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    has_torch = "torch" in sys.modules or "transformers" in sys.modules
    print(json.dumps([[status, out.getvalue(), err.getvalue()], has_torch]))
"""


class LightAnswer(NamedTuple):
    """How a command line ended in a process without torch, and what its folder held."""

    answer: Answer
    has_torch: bool
    before: dict[str, bytes | None]
    folder: Path


@pytest.fixture(scope="module")
def light_answers(make_working_folder, models) -> dict[Case, LightAnswer]:
    """The answers to all mistakes that need no torch, of one process."""
    folders = {case: make_working_folder(case) for case in WITHOUT_TORCH}
    before = {case: listing(folder) for case, folder in folders.items()}
    commands = [(str(folder), case.line(models)) for case, folder in folders.items()]
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stderr == ""
    answers = {}
    for case, line in zip(folders, child.stdout.splitlines(), strict=True):
        answer, has_torch = json.loads(line)
        answers[case] = LightAnswer(Answer(*answer), has_torch, before[case], folders[case])
    return answers


@pytest.mark.parametrize("case", WITHOUT_TORCH, ids=name_of)
def test_a_mistake_is_answered_by_one_line_without_torch_and_nothing_is_written(
    case, light_answers
):
    light = light_answers[case]
    check_answer(case, light.answer)
    assert not light.has_torch
    assert listing(light.folder) == light.before


@pytest.mark.parametrize("case", WITH_TORCH, ids=name_of)
def test_a_mistake_is_answered_by_one_line_and_nothing_is_written(
    case, models, make_working_folder, monkeypatch, capsys, request
):
    words = case.line(models)
    if "lm-eval" in words:
        request.getfixturevalue("small_harness")
    folder = make_working_folder(case)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    before = listing(folder)

    status = main(words)

    check_answer(case, Answer(status, *capsys.readouterr()))
    assert listing(folder) == before


@pytest.mark.parametrize(
    "words",
    ["supervise nowhere", pytest.param("EVALUATE --model OTHER", marks=pytest.mark.thorough)],
)
def test_a_process_ends_with_the_same_status_and_line(words, models, make_working_folder):
    says = {"supervise nowhere": "has no use for 'nowhere'"}
    case = Case(words, says.get(words, "these routers were trained for"))
    folder = make_working_folder(case)
    before = listing(folder)
    command = [sys.executable, "-m", "drllm", *case.line(models)]
    child = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    check_answer(case, Answer(child.returncode, child.stdout, child.stderr))
    assert listing(folder) == before


SUPERVISE_WORDS = ["supervise", "--search", "search.jsonl", "--output", "targets.jsonl"]


def fail_in_supervise(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """Let `drllm supervise` fail with an error of the system."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("drllm.cli.searching.supervise_to_file", fail)


def test_a_file_that_the_system_refuses_is_named_in_one_line(monkeypatch, capsys):
    refusal = PermissionError(errno.EACCES, "Permission denied", "closed/search.jsonl")
    fail_in_supervise(monkeypatch, refusal)

    status = main(SUPERVISE_WORDS)

    case = Case("supervise", "can't use closed/search.jsonl: Permission denied; check the name")
    check_answer(case, Answer(status, *capsys.readouterr()))


def test_a_failure_of_the_system_that_names_no_file_keeps_its_traceback(monkeypatch):
    fail_in_supervise(monkeypatch, OSError(errno.ENOMEM, "Cannot allocate memory"))
    with pytest.raises(OSError, match="Cannot allocate memory"):
        main(SUPERVISE_WORDS)


def test_a_defect_of_ours_keeps_its_traceback(tmp_path: Path, finished_run: Path, monkeypatch):
    monkeypatch.setattr("drllm.cli.searching.supervise_to_file", lambda *_: 1 / 0)
    output = str(tmp_path / "x.jsonl")
    with pytest.raises(ZeroDivisionError):
        main(["supervise", "--search", str(finished_run / "search.jsonl"), "--output", output])
