"""The verbs of the command line: what each reads and writes, and which settings are its flags.

Owns the table that the parser, the help texts and the messages are made from. Leaves carrying a
verb out to `stages` and `recipe`. Loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from drllm.config import (
    DepthConfig,
    EvaluateConfig,
    GenerateConfig,
    ModelConfig,
    SearchConfig,
    SuperviseConfig,
    TrainConfig,
)
from drllm.config.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """What a verb reads or writes, beside its settings.

    Attributes:
        name: Of the flag, with underscores; of the place on the line for a positional one.
        help: One line.
        default: None where the user must give one, or may leave it out.
        required: The verb can't run without.
        many: Takes one value or more.
        positional: Given without a name.
        switch: Takes no value; False where it isn't given.
    """

    name: str
    help: str
    default: str | None = None
    required: bool = False
    many: bool = False
    positional: bool = False
    switch: bool = False

    @property
    def shown(self) -> str:
        """The name as a user writes it."""
        return self.name.upper() if self.positional else "--" + self.name.replace("_", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One command.

    Attributes:
        help: One line for `drllm --help`.
        example: A command line that works.
        groups: The settings that become flags.
        flags: What it reads and writes.
        model_from_routers: Without `--model`, the routers name the base model.
    """

    help: str
    example: str
    groups: tuple[type[Settings], ...] = ()
    flags: tuple[Flag, ...] = ()
    model_from_routers: bool = False


IN_A_FOLDER = (
    Flag(name="output_dir", help="folder of the run; default: runs/ and the file's name"),
    Flag(name="data_dir", help="folder with SPLIT.jsonl[.gz] files by task"),
)
"""What verbs have that carry out what stands in a file."""

VERBS: dict[str, Verb] = {
    "search": Verb(
        help="try layer paths for each question: search.jsonl, then supervision.jsonl",
        example="drllm search --dataset builtin_facts --limit 64 --output-dir data/",
        groups=(ModelConfig, SearchConfig),
        flags=(
            Flag(
                name="dry_run",
                help="measure a few paths and say what the search will take; writes nothing",
                switch=True,
            ),
        ),
    ),
    "supervise": Verb(
        help="choose one target path a question from what the search tried",
        example="drllm supervise --search data/search.jsonl --output data/supervision.jsonl",
        groups=(SuperviseConfig,),
        flags=(
            Flag(name="search", help="search.jsonl files to read", many=True, required=True),
            Flag(name="output", help="supervision.jsonl to write", required=True),
        ),
    ),
    "train": Verb(
        help="train the routers on target paths",
        example="drllm train --supervision data/supervision.jsonl --run-name first",
        groups=(ModelConfig, TrainConfig),
        flags=(
            Flag(
                name="supervision",
                help="supervision.jsonl files to learn from; default: what the published search "
                "command leaves in data/mcts_paths/, or in data/",
                many=True,
            ),
            Flag(
                name="with_squad",
                help="learn from the squad_v2 targets in data/squad_v2/ too",
                switch=True,
            ),
            Flag(
                name="with_commonsense",
                help="learn from the commonsense_qa targets in data/commonsense_qa/ too",
                switch=True,
            ),
            Flag(name="run_name", help="write the routers to checkpoints/NAME"),
            Flag(name="output", help="write the routers to this folder instead"),
            Flag(
                name="features",
                help="keep the routers' inputs in this folder and use them again; default: in "
                "features/ beside the routers, deleted after training",
            ),
        ),
    ),
    "generate": Verb(
        help="answer a prompt and show the route that it took, or answer a file of prompts",
        example='drllm generate --routers checkpoints/first "Why is the sky blue?"',
        groups=(ModelConfig, GenerateConfig, DepthConfig),
        flags=(
            Flag(name="prompt", help="what to answer", positional=True),
            Flag(
                name="routers",
                help="routers: a folder or a hub id; without, every layer is executed",
            ),
            Flag(name="file", help="prompts to answer instead of PROMPT (.jsonl)"),
            Flag(name="output", help="with --file: answers to write (.jsonl); default: print them"),
        ),
        model_from_routers=True,
    ),
    "evaluate": Verb(
        help="compare base, routed model and baselines on tasks",
        example="drllm evaluate --routers checkpoints/first --tasks builtin_facts",
        groups=(ModelConfig, EvaluateConfig),
        flags=(
            Flag(
                name="routers",
                help="routers: a folder or a hub id; further ones are of other seeds, to see the "
                "spread",
                many=True,
                required=True,
            ),
            Flag(name="output_dir", help="folder for the results", default="eval/"),
        ),
        model_from_routers=True,
    ),
    "export": Verb(
        help="write a fixed path as an ordinary checkpoint, its layers listed in path order",
        example="drllm export --model smollm2-135m --decisions plan.json --output exported/",
        groups=(ModelConfig,),
        flags=(
            Flag(name="decisions", help="file with decisions or a path", required=True),
            Flag(name="output", help="folder to make", required=True),
        ),
    ),
    "report": Verb(
        help="write report.html and report.md from the records of a run",
        example="drllm report runs/demo",
        flags=(
            Flag(
                name="run_dir",
                help="folders that 'drllm run' has written; several are compared",
                many=True,
                required=True,
                positional=True,
            ),
            Flag(name="output", help="folder or .html file; default: the one run folder"),
        ),
    ),
    "run": Verb(
        help="carry out a recipe: all stages in a row, skipping what is done",
        example="drllm run recipes/demo.yaml --output-dir runs/demo",
        flags=(
            Flag(name="recipe", help="YAML file", required=True, positional=True),
            *IN_A_FOLDER,
        ),
    ),
    "sweep": Verb(
        help="train with many settings, choose one on the select split, test it once",
        example="drllm sweep recipes/sweeps/demo.yaml --output-dir runs/sweep",
        flags=(
            Flag(
                name="sweep",
                help="YAML file: a recipe, and under 'settings' what differs from it",
                required=True,
                positional=True,
            ),
            *IN_A_FOLDER,
        ),
    ),
    "ls": Verb(
        help="list tasks, models, architectures or baselines",
        example="drllm ls tasks",
        flags=(
            Flag(
                name="what",
                help="tasks, models, architectures or baselines",
                required=True,
                positional=True,
            ),
            Flag(name="model", help="a model whose architecture to check, in place of all known"),
        ),
    ),
    "show": Verb(
        help="print any file or folder of ours in readable form",
        example="drllm show runs/demo",
        flags=(
            Flag(
                name="place",
                help="a records file, a result, a folder of routers or a run folder",
                required=True,
                positional=True,
            ),
            Flag(name="question", help="id of a searched question, to draw the paths tried on it"),
        ),
    ),
}


FOREIGN: dict[str, str] = {
    "lm-eval": "lm-evaluation-harness' own command line, with our model as --model drllm",
}
"""Verbs whose words somebody else reads, and what they do."""


def overview() -> str:
    """Return the text of `drllm --help`."""
    lines = {name: verb.help for name, verb in VERBS.items()} | FOREIGN
    width = max(map(len, lines))
    verbs = "\n".join(f"  {name:{width}}  {text}" for name, text in lines.items())
    return (
        "usage: drllm VERB [flags]\n\n"
        "Layer routing for frozen Hugging Face language models: skip, execute or repeat each\n"
        "layer, once per prompt.\n\n"
        f"verbs:\n{verbs}\n\n"
        "flags:\n"
        "  --help       this text; after a verb, its flags\n"
        "  --version    the version\n\n"
        f"first try: {VERBS['run'].example}\n"
    )
