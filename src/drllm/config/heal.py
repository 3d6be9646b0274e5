"""Settings of `drllm heal`, which repairs a static path in closed form and trains an adapter."""

from dataclasses import dataclass

from drllm.config.constants import DATA_DIR_HELP, TRUST_HELP
from drllm.config.fields import Settings, basic, incidental, setting
from drllm.errors import ConfigError

REFIT = "refit"
NO_REPAIR = "none"
REPAIRS = (REFIT, NO_REPAIR)
"""The values of `repair`."""

REFIT_TOKENS = 50_000  # maximum tokens that a refit is solved on, unless a number is given

NO_TRAINING = ("minutes", 0)  # the setting with which nothing is trained


@dataclass(frozen=True, kw_only=True)
class HealConfig(Settings):
    """The repair of a path that skips layers: solved in closed form, then trained."""

    path: str | None = incidental(
        None,
        basic=True,
        placeholder="FILE[:NAME]",
        help="path to heal: a file that names its layers, paths.json:NAME, or the layers that it "
        "leaves out, as in without:13,14",
    )
    tasks: str | None = incidental(
        None,
        basic=True,
        placeholder="TASKS",
        alias="dataset",
        help="tasks, separated by commas, whose search questions are trained on, with the right "
        "answers; a task without right answers gets the full model's answers",
    )
    text: str | None = incidental(
        None,
        basic=True,
        placeholder="FILE,...",
        help="more texts to train on: files of rows with a field 'text' (.jsonl, .json, .csv, "
        ".tsv, .parquet), .txt files with a text per paragraph, or hub data sets "
        "OWNER/NAME[:CONFIG[:SPLIT]] (their first --limit texts; default: 10,000); "
        "'builtin_texts' comes with drllm",
    )
    data_dir: str | None = incidental(
        None,
        help=DATA_DIR_HELP,
    )
    trust_task_code: bool = incidental(False, help=TRUST_HELP)
    limit: int | None = basic(
        None,
        minimum=2,
        help="maximum questions or texts of each source, drawn at random with --seed",
    )
    repair: str | None = basic(
        None,
        choices=REPAIRS,
        help="what is done before the training: 'refit' solves the down-projection before each gap "
        "of the path in closed form, 'none' does nothing; default: refit where the path and the "
        "model allow it",
    )
    refit_tokens: int = setting(
        REFIT_TOKENS,
        minimum=2,
        placeholder="TOKENS",
        no_effect_if=("repair", NO_REPAIR),
        help="maximum tokens that the refit is solved on, drawn evenly from the sources",
    )
    rank: int = basic(16, minimum=1, no_effect_if=NO_TRAINING, help="rank of the adapter")
    first_layer: int = setting(
        0,
        minimum=0,
        no_effect_if=NO_TRAINING,
        help="first layer of the path that the adapter changes",
    )
    steps: int | None = basic(
        None,
        minimum=1,
        no_effect_if=NO_TRAINING,
        help="maximum training steps; default: 250, unless --minutes is given",
    )
    minutes: float | None = basic(
        None,
        minimum=0.0,
        placeholder="MINUTES",
        help="maximum minutes for training and measuring, 0 for the refit alone; training ends "
        "earlier if it gains nothing any more; the time to read the texts and to solve the refit "
        "isn't counted",
    )
    learning_rate: float = setting(
        5e-4,
        above=0.0,
        no_effect_if=NO_TRAINING,
        help="peak learning rate of the cosine schedule",
    )
    batch_size: int = basic(
        2,
        minimum=1,
        no_effect_if=NO_TRAINING,
        help="sequences of --max-tokens tokens per step; a step takes more sequences if they are "
        "shorter",
    )
    max_tokens: int = basic(
        512,
        minimum=2,
        placeholder="TOKENS",
        help="maximum tokens of a sequence; longer texts are split",
    )
    num_held_out: int = setting(
        64,
        minimum=1,
        help="number of sequences that are held out of the training to measure the loss on",
    )
    autocast: bool = setting(
        True,
        no_effect_if=NO_TRAINING,
        help="compute float32 weights in bfloat16 if the processor or GPU supports it",
    )
    seed: int = setting(
        0,
        minimum=0,
        help="seed of the adapter's initial weights, the order of the texts, the tokens of the "
        "refit and --limit",
    )

    @property
    def is_trained(self) -> bool:
        """Whether an adapter is trained after the repair."""
        return self.minutes != 0

    def check(self) -> None:
        """Refuse settings that have no effect, and settings that leave nothing to do."""
        if self.repair == NO_REPAIR and not self.is_trained:
            raise ConfigError(
                "--minutes 0 and --repair none leave nothing to do; give more minutes, or "
                "--repair refit"
            )
        self.check_effects()

    def require_path(self) -> str:
        """Return `path`; raise ConfigError if it is None."""
        if self.path is None:
            raise ConfigError("no path is given; give --path FILE, or --path paths.json:NAME")
        return self.path
