import dataclasses
import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from drllm.cli.command_line import CommandLine
from drllm.cli.listing import _LISTS, _REGISTRIES
from drllm.cli.parser import parse
from drllm.cli.verbs import FOREIGN, VERBS, list_flags
from drllm.config import (
    DepthConfig,
    EvaluateConfig,
    GapsConfig,
    LearnConfig,
    ModelConfig,
    SearchConfig,
    SuperviseConfig,
    TrainConfig,
)
from drllm.errors import ConfigError


def parsed(line: str) -> CommandLine:
    return parse(shlex.split(line))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "s.yaml"


def test_the_overview_has_each_verb_once_with_what_it_does_and_a_command_that_works(drllm):
    out = drllm("--help").out
    texts = {**{name: verb.help for name, verb in VERBS.items()}, **FOREIGN}
    assert sorted(re.findall(r"^  (\S+) +(.+)$", out, re.MULTILINE)) == sorted(texts.items())
    order = [out.index(f"\n  {verb} ") for verb in ("search", "supervise", "train", "evaluate")]
    assert order == sorted(order)
    program, *words = shlex.split(out.splitlines()[-1].partition(": ")[2])
    assert program == "drllm"
    assert parse(words).verb == "run"


@pytest.mark.parametrize("name", VERBS)
def test_every_verbs_example_is_understood(name: str):
    program, *words = shlex.split(VERBS[name].example)
    assert program == "drllm"
    assert parse(words).verb == name


WITH_SETTINGS = [name for name, verb in VERBS.items() if verb.settings]


@pytest.mark.parametrize("verb", WITH_SETTINGS)
def test_help_has_the_few_flags_that_one_needs_and_says_how_to_see_the_others(verb: str, drllm):
    out = drllm(f"{verb} --help").out
    shown = re.findall(r"^  (--\S+)", out, re.MULTILINE)
    assert 3 <= len(shown) <= 20  # test_help.py says which
    lines = re.findall(r"^  \S+", out, re.MULTILINE)
    flags = [line for line in lines if line.strip() not in ("--config", "--help-all")]
    more = len(list(list_flags(VERBS[verb]))) - len(flags)
    assert bool(more) == bool(re.search(rf"^  --help-all +{more} more", out, re.MULTILINE))


@pytest.mark.parametrize("verb", WITH_SETTINGS)
def test_help_all_has_every_setting_with_choices_and_default_and_without_types(verb: str, drllm):
    out = drllm(f"{verb} --help_all").out
    assert not re.search(r"TEXT|\btype\b|\bnull\b|None|True|False", out)
    lines = {re.sub(r"[-_]|no", "", line): line for line in re.split(r"\n(?=  \S|\n)", out)}
    positional = {flag.name for flag in VERBS[verb].flags if flag.positional}
    for group in VERBS[verb].settings:
        for declared in dataclasses.fields(group):
            if declared.name in positional:  # the argument has a text of its own
                continue
            name = declared.name
            if declared.metadata["shows_alias"]:
                name = declared.metadata["alias"]
            name = name.replace("_", "").replace("no", "")
            entry = next(lines[key] for key in lines if re.match(rf"\s+(\[\])?{name}[ ,:]", key))
            text = " ".join(entry.split())
            assert declared.metadata["help"].rstrip(")") in text
            if "dict" not in str(declared.type):
                for choice in declared.metadata["choices"] or ():
                    assert re.search(rf"[ |]{choice}[ |]", text)
            if declared.default not in (None, False) and declared.name != "model":
                shown = re.search(r"default: (\S+)\)$", text)[1]
                assert shown == "on" or type(declared.default)(shown) == declared.default


def test_an_unknown_flag_is_answered_with_the_nearest_and_not_with_all():
    for verb in VERBS:
        with pytest.raises(ConfigError) as refused:
            parse([verb, "--confg"])
        assert len(str(refused.value)) < 160
    with pytest.raises(ConfigError, match=r"'--num-epoch'; did you mean '--num-epochs'"):
        parsed("train --num_epoch 3")


def test_underscores_and_dashes_are_the_same():
    dashes = parsed("search --num-simulations 7 --stop-rule=paper")
    assert dashes == parsed("search --num_simulations=7 --stop_rule paper")
    assert dashes.get_settings(SearchConfig).num_simulations == 7


@pytest.mark.parametrize(
    ("line", "group", "setting", "value"),
    [
        ("search --dataset builtin_facts", SearchConfig, "dataset", "builtin_facts"),
        ("search", SearchConfig, "kl", True),
        ("search --no-kl", SearchConfig, "kl", False),
        ("search --trust-remote-code", ModelConfig, "trust_remote_code", True),
        ("train --output o --learning-rate 1e-3", TrainConfig, "learning_rate", 1e-3),
        ("search --model_id owner/name", ModelConfig, "model", "owner/name"),
    ],
    ids=["keeps underscores", "on", "off", "on by a flag", "with an exponent", "published name"],
)
def test_a_value_is_read_as_its_setting_wants_it(line, group, setting, value):
    assert getattr(parsed(line).get_settings(group), setting) == value


def test_behind_two_dashes_everything_is_text():
    assert parsed("generate -- --a_b").values["prompt"] == "--a_b"


@pytest.mark.parametrize("prompt", ["-5 + 3?", "-5+3?", "- one", "-", "$-x"])
def test_a_prompt_may_begin_with_a_dash(prompt: str):
    assert parse(["generate", prompt]).values["prompt"] == prompt


@pytest.mark.parametrize("number", ["-1", "-0.5", "-.5", "-1e-3"])
def test_a_number_may_be_negative(number: str):
    for words in (["--depth-bias", number], [f"--depth-bias={number}"]):
        assert parse(["generate", "x", *words]).get_settings(DepthConfig).depth_bias == float(
            number
        )


def test_positional_words_and_flags_may_be_mixed():
    command = parsed("report a --output page.html b c")
    assert command.paths("run_dir") == [Path("a"), Path("b"), Path("c")]
    assert command.path("output_dir") == Path("page.html")


def test_of_a_flag_given_twice_the_last_counts_and_files_add_up():
    command = parsed(
        "train --run-name n --num-epochs 3 --supervision a --num-epochs 4 --supervision b"
    )
    assert command.get_settings(TrainConfig).num_epochs == 4
    assert command.paths("supervision") == [Path("a"), Path("b")]


VERBS_WITH_OUTPUT = ("search", "supervise", "train", "gaps", "learn", "generate", "evaluate")
VERBS_WITH_OUTPUT += ("report", "export", "run")
REQUIRED = {
    "supervise": "--search s",
    "report": "r",
    "export": "--skip 1",
    "learn": "--skip 1",
    "run": "demo",
}


@pytest.mark.parametrize("verb", VERBS_WITH_OUTPUT)
def test_results_have_the_same_flag_with_every_verb(verb: str):
    dashes, alias = [
        parsed(f"{verb} {REQUIRED.get(verb, '')} {flag} new")
        for flag in ("--output-dir", "--output")
    ]
    assert dashes == alias
    if verb == "search":
        assert dashes.get_settings(SearchConfig).output_dir == "new"
    else:
        assert dashes.path("output_dir") == Path("new")


@pytest.mark.parametrize("verb", WITH_SETTINGS)
def test_help_shows_the_same_name_with_every_verb(verb: str, drllm):
    shown = re.findall(r"^  (--\S+)", drllm(f"{verb} --help").out, re.MULTILINE)
    assert not {"--dataset", "--output"} & set(shown)


MEANT = """\
search --task q => '--task'; did you mean '--tasks'?
search --datasets q => '--datasets'; did you mean '--tasks'?
gaps --datase q => '--datase'; did you mean '--tasks'?
gaps --data q => '--data'; did you mean '--tasks'?
learn --skip 1 --questions q => '--questions'; did you mean '--tasks'?
evaluate --outdir o => '--outdir'; did you mean '--output-dir'?
gaps --run-name o => '--run-name'; did you mean '--output-dir'?
run demo --out o => '--out'; did you mean '--output-dir'?
generate --paths p => '--paths'; did you mean '--path'?
evaluate --path p => '--path'; did you mean '--paths'?
train --lr 1 => '--lr'; did you mean '--learning-rate'?
train --tasks q => '--tasks' of train; it is a flag of search, bypass, gaps, learn, evaluate
"""


@pytest.mark.parametrize("line", MEANT.splitlines())
def test_a_wrong_flag_is_answered_with_the_one_flag_that_is_meant(line: str):
    words, _, message = line.partition(" => ")
    with pytest.raises(ConfigError) as refused:
        parsed(words)
    assert str(refused.value).startswith(f"unknown flag {message} (")


def test_without_a_verb_the_overview_is_printed(drllm):
    assert drllm("", status=2) == drllm("--help")


@pytest.mark.parametrize("flag", ["--tasks", "--dataset"])
def test_tasks_have_either_name_with_every_verb(flag: str):
    assert parsed(f"search {flag} a").get_settings(SearchConfig).dataset == "a"
    assert parsed(f"gaps {flag} a").get_settings(GapsConfig).tasks == "a"
    assert parsed(f"learn --skip 1 --output-dir b {flag} a").get_settings(LearnConfig).tasks == "a"
    assert parsed(f"evaluate {flag} a").get_settings(EvaluateConfig).tasks == "a"


def test_a_training_reads_several_files_or_none_that_is_named():
    several = parsed("train --run-name n --supervision a b --with_squad")
    none = parsed("train --run-name n")
    assert several.paths("supervision") == [Path("a"), Path("b")]
    assert none.paths("supervision") == []
    assert several.values["with_squad"] is True
    assert none.values["with_commonsense"] is False


@pytest.mark.parametrize("order", ["--config {} --num-epochs 9", "--num-epochs 9 --config {}"])
def test_a_flag_wins_over_the_file_and_the_file_over_the_default(file: Path, order: str):
    file.write_text("num-epochs: 7\nlearning_rate: 0.5\nmodel_id: owner/name\n")
    request = parsed("train --supervision s --run-name n " + order.format(file))
    settings = request.get_settings(TrainConfig)
    assert (settings.num_epochs, settings.learning_rate) == (9, 0.5)
    assert settings.gamma == TrainConfig().gamma
    assert request.get_settings(ModelConfig).model == "owner/name"
    assert request.names_model


def test_a_file_may_name_what_a_verb_reads(file: Path):
    file.write_text("search: a.jsonl\noutput: b.jsonl\ntarget: paper\n")
    request = parsed(f"supervise --config {file}")
    assert request.paths("search") == [Path("a.jsonl")]
    assert request.path("output_dir") == Path("b.jsonl")


def test_a_preset_is_named_like_a_file_and_has_a_section_a_stage():
    request = parsed("train --run-name n --config paper --num-epochs 3")
    settings = request.get_settings(TrainConfig)
    assert (settings.num_epochs, settings.warmup_steps) == (3, 500)
    assert settings.class_weights == "effective_number"
    assert not request.names_model
    search = parsed("search --config released")
    assert search.get_settings(SearchConfig).strategy == "walk"
    assert search.get_settings(SuperviseConfig).target == "released"


def test_a_verb_reads_its_sections_of_a_recipe(file: Path):
    model, train = "model: {model_id: a/b}", "train: {num-epochs: 7}"
    file.write_text(f"config: released\n{model}\n{train}\nevaluate: {{}}")
    request = parsed(f"train --run-name n --config {file}")
    settings = request.get_settings(TrainConfig)
    assert request.get_settings(ModelConfig).model == "a/b"
    assert (settings.num_epochs, settings.max_grad_norm) == (7, 1.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("generate: {seed: 1}", "has no effect on train: it only has settings of generate"),
        ("train: {}\ntrian: {}", "unknown section 'trian'"),
        ("train: {}\nconfig: papers", "config: unknown preset 'papers'"),
        ("model: {}\ntrain: 3", "section 'train' is 3; give settings"),
    ],
)
def test_sections_that_do_not_fit_are_refused(file: Path, text: str, said: str):
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        parsed(f"train --run-name n --config {file}")


def test_a_number_in_a_file_is_a_text_where_the_setting_is_one(file: Path):
    file.write_text("curve: 0.10\nlimit: 3\nepsilon: 2\nrevision: 0123456\noutput-dir: 2024\n")
    request = parsed(f"evaluate --routers r --config {file}")
    settings = request.get_settings(EvaluateConfig)
    assert (settings.curve, settings.limit, settings.max_drop) == ("0.10", 3, 2)
    assert request.get_settings(ModelConfig).revision == "0123456"  # to YAML an octal number
    assert request.values["output_dir"] == "2024"
    line = "evaluate --routers r --curve 0.10 --limit 3 --epsilon 2"
    assert settings == parsed(line).get_settings(EvaluateConfig)


def test_without_a_model_it_is_known_that_none_was_given():
    given = parsed("evaluate --routers r --model smollm2-135m")
    not_given = parsed("evaluate --routers r")
    assert given.names_model
    assert not not_given.names_model
    assert given.get_settings(ModelConfig) == not_given.get_settings(ModelConfig)


QUIET_WORDS = [
    *(["ls", name] for name in (*_LISTS, *_REGISTRIES)),
    *([verb, "--help-all"] for verb in VERBS),
    ["--version"],
    ["--help"],
]


def test_a_verb_loads_its_own_module_alone():
    script = (
        "import sys\nfrom drllm.cli import main\nmain(['ls', 'models'])\n"
        "print(sorted(name for name in sys.modules if name.startswith('drllm.cli.')))\n"
        "from drllm.cli.verbs import VERBS, Verb\nassert all(VERBS[name].run for name in VERBS)\n"
        "assert {type(verb) for verb in VERBS.data.values()} == {Verb}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    known = ["arguments", "command_line", "help", "listing", "parser", "progress"]
    known += ["settings_file", "terminal", "verbs"]
    assert done.stdout.splitlines()[-1] == str([f"drllm.cli.{name}" for name in known])


def test_help_version_and_lists_load_no_torch():
    script = (
        "import sys\nfrom drllm.cli import main\n"
        f"assert [main(words) for words in {QUIET_WORDS!r}] == [0] * {len(QUIET_WORDS)}\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
    assert done.stderr == ""


def test_the_version_is_the_packages(drllm):
    assert drllm("--version").out == f"drllm {importlib.metadata.version('drllm')}\n"
