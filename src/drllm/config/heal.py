"""Settings of healing a static path."""

from dataclasses import dataclass

from drllm.config.fields import Settings, basic, incidental, setting
from drllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HealConfig(Settings):
    """The training of an adapter that recovers what a shorter path loses."""

    path: str | None = incidental(
        None,
        basic=True,
        value="FILE[:NAME]",
        help="file that says which layers run; of a paths.json the named path",
    )
    tasks: str | None = incidental(
        None,
        basic=True,
        value="TASKS",
        alias="dataset",
        help="tasks (comma list) whose search questions are trained on, with their right "
        "answers; unanswered prompts use the full model's answers",
    )
    text: str | None = incidental(
        None,
        basic=True,
        value="FILE,...",
        help="further texts: .jsonl files with a field text, .txt files with a text a "
        "paragraph, or data sets of the hub, OWNER/NAME[:CONFIG[:SPLIT]]: the first "
        "--limit texts, else 10,000",
    )
    data_dir: str | None = incidental(None, help="folder with SPLIT.jsonl[.gz] files by task")
    limit: int | None = basic(
        None,
        minimum=2,
        help="maximum questions or texts of a source, drawn with the seed",
    )
    rank: int = basic(16, minimum=1, help="rank of the adapter")
    first_layer: int = basic(0, minimum=0, help="first layer of the path that gets the adapter")
    steps: int | None = basic(
        None,
        minimum=1,
        help="training steps; default: 250, unless --minutes is given",
    )
    minutes: float | None = basic(
        None,
        above=0.0,
        help="time for the training and all its measurements; reading the texts comes before",
    )
    learning_rate: float = setting(2e-3, above=0.0, help="peak of the cosine schedule")
    batch_size: int = setting(
        2,
        minimum=1,
        help="sequences of --max-tokens tokens in a step; more of them where they are shorter",
    )
    max_tokens: int = setting(
        512,
        minimum=2,
        help="tokens of a sequence; longer texts are cut into several",
    )
    num_held_out: int = setting(
        64,
        minimum=1,
        help="sequences that are not trained on, to measure on",
    )
    autocast: bool = setting(
        True,
        help="compute float32 weights in bfloat16 where the processor or GPU has it",
    )
    seed: int = setting(
        0,
        minimum=0,
        help="seed of the adapter, of the order of the texts and of --limit",
    )

    def named_path(self) -> str:
        """Return the file of the path; a ConfigError where none is named."""
        if self.path is None:
            raise ConfigError("no path is given; name a file that says which layers run as --path")
        return self.path
