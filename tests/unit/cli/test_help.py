"""What `--help` shows: every flag that README.md or a guide names, with its unit."""

import re
from pathlib import Path

import pytest

from drllm.cli.verbs import VERBS, list_flags

REPOSITORY = Path(__file__).parents[3]
REFERENCES = ("architecture", "architectures", "differences", "formats", "lm-eval", "results")
"""Pages of docs/ that are no guides; the flags of docs/lm-eval.md are the harness' own."""
GUIDES = [
    REPOSITORY / "README.md",
    *(file for file in sorted(REPOSITORY.glob("docs/*.md")) if file.stem not in REFERENCES),
]
MAX_OTHERS = 14  # maximum flags in the help of a verb that no guide names
UNITS = {
    "--max-loss": "nats",
    "--max-loss-increase": "nats",
    "--max-drop": "points",
    "--minutes": "minutes",
    "--max-skipped": "layers",
    "--max-new-tokens": "tokens",
    "--max-tokens": "tokens",
    "--state-cache-gb": "GB",
    "--limit": "questions",
    "--depth-bias": "logits",
    "--target-executions": "executions",
    "--num-simulations": "paths",
    "--num-epochs": "passes over the targets",
}
"""Flag → the unit of its number."""

_COMMAND = re.compile(rf"(?:drllm |`)({'|'.join(VERBS)}) ([^\n`]*)")
_FLAG = re.compile(r"(?<!\S)--[a-z][\w-]*")


def read(guide: Path) -> str:
    """Return a guide's text, with each command on a line of its own."""
    return guide.read_text(encoding="utf-8").replace("\\\n", " ")


def list_names(verb: str) -> dict[str, list[str]]:
    """Return each name of a flag of a verb, as a guide may write it → all names of the flag."""
    names: dict[str, list[str]] = {}
    for flag in list_flags(VERBS[verb]):
        for name in flag.names:
            names[name] = flag.names
            if flag.kind is bool:
                names[name.replace("--", "--no-", 1)] = flag.names
    return names


def named_in_commands() -> set[tuple[str, str]]:
    """Return the pairs of verb and flag in the commands of all guides."""
    pairs = set()
    for guide in GUIDES:
        for verb, words in _COMMAND.findall(read(guide)):
            words = re.split(r"\||&&|;", words)[0]
            pairs |= {(verb, flag.replace("_", "-")) for flag in _FLAG.findall(words)}
    return pairs


def named_alone() -> dict[str, str]:
    """Return each flag that a guide names without its verb → the guide."""
    return {
        flag.replace("_", "-"): guide.name
        for guide in GUIDES
        for flag in re.findall(r"`(--[a-z][\w-]*)", read(guide))
    }


NAMED = named_in_commands()
NAMED_ALONE = named_alone()


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """Return the short help of each verb."""
    import contextlib
    import io

    from drllm.cli import main

    texts = {}
    for verb in VERBS:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main([verb, "--help"]) == 0
        texts[verb] = out.getvalue()
    return texts


def shown(text: str) -> set[str]:
    """Return the flags that a help names, those in the explanation of another flag too."""
    return {
        name.replace("--[no-]", "--") for name in re.findall(r"--(?:\[no-\])?[a-z][\w-]*", text)
    }


def test_the_guides_have_commands():
    assert {"search", "train", "shrink", "export", "evaluate"} <= {verb for verb, _ in NAMED}
    assert ("shrink", "--max-drop") in NAMED


@pytest.mark.parametrize(("verb", "flag"), sorted(NAMED))
def test_a_flag_of_a_command_in_a_guide_is_in_the_help_of_its_verb(helps, verb, flag):
    names = {"--config": ["--config"], "--help-all": ["--help-all"], **list_names(verb)}
    assert flag in names, f"{verb} has no {flag}"
    assert shown(helps[verb]) & set(names[flag])


def test_a_flag_that_a_guide_names_alone_is_in_the_help_of_a_verb(helps):
    known = {}
    for verb in VERBS:
        known.update(list_names(verb))
    in_any_help = set().union(*map(shown, helps.values()))
    missing = {}
    for flag, guide in NAMED_ALONE.items():
        names = known.get(flag, ())  # it may be a flag of another program
        if names and not in_any_help & set(names):
            missing[flag] = guide
    assert missing == {}


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_has_few_flags_that_no_guide_names(helps, verb):
    flags = set(re.findall(r"^  (--\S+)", helps[verb], re.MULTILINE))
    named = {flag for command, flag in NAMED if command == verb} | set(NAMED_ALONE)
    assert len(flags - named) <= MAX_OTHERS


@pytest.mark.parametrize(
    ("verb", "flag"), [(verb, flag) for verb in VERBS for flag in UNITS if flag in list_names(verb)]
)
def test_the_help_of_a_number_has_its_unit(drllm, verb, flag):
    text = drllm(f"{verb} --help-all").out
    [entry] = [part for part in re.split(r"\n(?=  -|\n)", text) if part.startswith(f"  {flag}")]
    assert UNITS[flag] in " ".join(entry.split())


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.settings])
def test_the_help_begins_with_what_most_commands_need(helps, verb):
    flags = re.findall(r"^  (--\S+)", helps[verb], re.MULTILINE)
    needed = ["--model", "--tasks", "--columns", "--output-dir"]
    places = [flags.index(flag) for flag in needed if flag in flags]
    assert places == sorted(places)
    assert places[-1] <= 5
