from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from drllm.cli.parser import FOREIGN, VERBS, Request, overview, parse
from drllm.config import EvaluateConfig, GenerateConfig, ModelConfig, SearchConfig, TrainConfig
from drllm.config.fields import flag_of


def parsed(line: str) -> Request:
    return parse(shlex.split(line))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "s.yaml"


def test_every_verb_has_a_line_in_the_overview():
    for name, help_line in {**{n: verb.help for n, verb in VERBS.items()}, **FOREIGN}.items():
        assert re.search(rf"^  {name} +{re.escape(help_line)}$", overview(), re.MULTILINE)


@pytest.mark.parametrize("name", VERBS)
def test_every_verbs_example_is_understood(name: str):
    program, *words = shlex.split(VERBS[name].example)
    assert program == "drllm"
    assert parse(words).verb == name


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.settings])
def test_every_setting_is_a_flag_with_its_default_in_the_help(verb: str, drllm):
    entries = re.split(r"\n(?=  -|\n)", drllm(f"{verb} --help").out)
    for declared in [each for group in VERBS[verb].settings for each in dataclasses.fields(group)]:
        flag = flag_of(declared.name)
        entry = next(text for text in entries if re.match(rf"  {flag}[ ,]", text))
        text = " ".join(entry.split())
        assert " ".join(declared.metadata["help"].split()) in text
        if declared.default is not None and declared.name != "model":
            shown = str(declared.default).replace("True", "true").replace("False", "false")
            assert text.endswith(f"(default: {shown})")


def test_underscores_and_dashes_are_the_same():
    dashes = parsed("search --num-simulations 7 --stop-rule=paper")
    assert dashes == parsed("search --num_simulations=7 --stop_rule paper")
    assert dashes.of(SearchConfig).num_simulations == 7


def test_values_keep_their_underscores():
    dataset = parsed("search --dataset builtin_facts").of(SearchConfig).dataset
    assert dataset == "builtin_facts"
    assert parsed("generate -- --a_b").values["prompt"] == "--a_b"


def test_a_training_reads_several_files_or_none_that_is_named():
    several = parsed("train --run-name n --supervision a b --with_squad")
    none = parsed("train --run-name n")
    assert several.paths("supervision") == [Path("a"), Path("b")]
    assert none.paths("supervision") == []
    assert several.values["with_squad"] is True
    assert none.values["with_commonsense"] is False


def test_a_published_name_is_accepted():
    assert parsed("search --model_id owner/name").of(ModelConfig).model == "owner/name"


@pytest.mark.parametrize("order", ["--config {} --num-epochs 9", "--num-epochs 9 --config {}"])
def test_a_flag_wins_over_the_file_and_the_file_over_the_default(file: Path, order: str):
    file.write_text("num-epochs: 7\nlearning_rate: 0.5\nmodel_id: owner/name\n")
    request = parsed("train --supervision s --run-name n " + order.format(file))
    settings = request.of(TrainConfig)
    assert (settings.num_epochs, settings.learning_rate) == (9, 0.5)
    assert settings.gamma == TrainConfig().gamma
    assert request.of(ModelConfig).model == "owner/name"
    assert request.model_given


def test_a_file_may_name_what_a_verb_reads(file: Path):
    file.write_text("search: a.jsonl\noutput: b.jsonl\ntarget: paper\n")
    request = parsed(f"supervise --config {file}")
    assert request.paths("search") == [Path("a.jsonl")]
    assert request.path("output") == Path("b.jsonl")


def test_a_number_in_a_file_is_a_text_where_the_setting_is_one(file: Path):
    file.write_text("curve: 0.10\nlimit: 3\nepsilon: 2\nrevision: 0123456\noutput-dir: 2024\n")
    request = parsed(f"evaluate --routers r --config {file}")
    settings = request.of(EvaluateConfig)
    assert (settings.curve, settings.limit, settings.epsilon) == ("0.10", 3, 2)
    assert request.of(ModelConfig).revision == "0123456"  # to YAML an octal number
    assert request.values["output_dir"] == "2024"
    line = "evaluate --routers r --curve 0.10 --limit 3 --epsilon 2"
    assert settings == parsed(line).of(EvaluateConfig)


def test_a_switch_can_be_turned_on_and_off():
    assert parsed("generate hello").of(GenerateConfig).chat is True
    assert parsed("generate --no-chat hello").of(GenerateConfig).chat is False
    assert parsed("search --trust-remote-code").of(ModelConfig).trust_remote_code is True


def test_without_a_model_it_is_known_that_none_was_given():
    given = parsed("evaluate --routers r --model smollm2-135m")
    not_given = parsed("evaluate --routers r")
    assert given.model_given
    assert not not_given.model_given
    assert given.of(ModelConfig) == not_given.of(ModelConfig)


def test_numbers_with_an_exponent_are_numbers_on_the_line():
    line = "train --supervision s --output o --learning-rate 1e-3"
    assert parsed(line).of(TrainConfig).learning_rate == 1e-3


QUIET_WORDS = [["--help"], ["--version"], ["ls", "tasks"], *([verb, "--help"] for verb in VERBS)]


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


def test_every_public_name_is_there_and_none_is_a_packages():
    import drllm

    packages = {path.parent.name for path in Path(drllm.__file__).parent.glob("*/__init__.py")}
    assert {"search_paths", "supervise", "train", "evaluate", "report"} <= set(drllm.__all__)
    assert not packages & set(drllm.__all__)
    for name in drllm.__all__:
        assert callable(getattr(drllm, name))
