"""Settings of `drllm tune`, the search for static paths."""

from dataclasses import dataclass

from drllm.config.constants import DATA_DIR_HELP, TASKS_HELP, TRUST_HELP
from drllm.config.executor import ExecutorConfig
from drllm.config.fields import basic, incidental, setting
from drllm.config.heal import NO_REPAIR, REFIT_TOKENS, REPAIRS


@dataclass(frozen=True, kw_only=True)
class TuneConfig(ExecutorConfig):
    """The search for one static path for a whole task."""

    tasks: str | None = basic(
        None,
        placeholder="TASKS",
        alias="dataset",
        help=TASKS_HELP,
    )
    data_dir: str | None = incidental(
        None,
        help=DATA_DIR_HELP,
    )
    trust_task_code: bool = incidental(False, help=TRUST_HELP)
    max_skipped: float | None = basic(
        None,
        above=0.0,
        placeholder="LAYERS",
        help="maximum number of layers that a path skips; default: a sixth of the layers",
    )
    objective: str | None = basic(
        None,
        choices=("gold_logprob", "next_token_loss", "kl"),
        help="what a path should preserve; default: gold_logprob for questions with options, "
        "next_token_loss for other answers, kl for prompts without answers",
    )
    repair: str | None = basic(
        None,
        choices=REPAIRS,
        # A tuning is recognised by whether its paths were really repaired.
        decisive=False,
        help="what is done in the gaps of a path before it is judged: 'refit' solves the "
        "down-projection before each gap, as heal does, 'none' does nothing; default: refit where "
        "the model allows it",
    )
    text: str | None = incidental(
        None,
        basic=True,
        placeholder="FILE,...",
        no_effect_if=("repair", NO_REPAIR),
        help="texts to repair paths with, beside the questions that paths are fitted on; as for "
        "heal --text",
    )
    refit_tokens: int | None = setting(
        None,
        minimum=2,
        placeholder="TOKENS",
        no_effect_if=("repair", NO_REPAIR),
        help="maximum tokens that paths are refitted on, drawn evenly from the sources; default: "
        f"{REFIT_TOKENS:,}",
    )
    beam: int = setting(3, minimum=1, help="the best paths kept for each number of skipped layers")
    num_fit: int = setting(
        300,
        minimum=1,
        help="maximum questions per task that paths are fitted on",
    )
    num_judged: int | None = setting(
        None,
        minimum=2,
        help="maximum questions per task to choose a path on, and maximum questions to test it "
        "on; default: all",
    )
    grade_answers: bool = setting(
        True,
        help="where the objective is next_token_loss and answers are graded, also generate the "
        "answers of the best paths and grade them, which may take most of the time",
    )
    max_loss: float = basic(
        0.1,
        minimum=0.0,
        placeholder="NATS",
        help="don't extend paths that lose more than this many nats of the objective",
    )
    minutes: float | None = basic(
        None,
        above=0.0,
        decisive=False,
        placeholder="MINUTES",
        help="time to find and test paths, about: the search ends where one more layer would "
        "probably take longer than what is left; a later run with more time continues",
    )
    state_cache_gb: float | None = incidental(
        None,
        above=0.0,
        placeholder="GB",
        help="GB of memory for cached states of shared prefixes; default: a quarter of free "
        "memory, at most 16",
    )
    seed: int = setting(0, minimum=0, help="seed of --num-fit and --num-judged")
