"""Settings of `drllm evaluate`, the evaluation of all systems on tasks."""

from dataclasses import dataclass

from drllm.config.constants import DATA_DIR_HELP, SPLITS, TASKS_HELP, TRUST_HELP
from drllm.config.executor import ExecutorConfig
from drllm.config.fields import basic, incidental, setting

TIMING = ("latency_rounds", "latency", "latency_seconds", "latency_read", "latency_written")
"""The settings of the time measurement. No other result depends on them."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ExecutorConfig):
    """The evaluation: its questions, paths and baselines."""

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
    trust_task_code: bool = incidental(False, basic=True, help=TRUST_HELP)
    split: str = setting("test", choices=SPLITS, help="part of the questions to evaluate on")
    limit: int | None = basic(
        None,
        minimum=1,
        help="maximum questions per task, drawn at random with --seed",
    )
    num_fewshot: int | None = setting(
        None,
        minimum=0,
        help="worked examples before each question; default: the task's own number",
    )
    reward: str | None = basic(
        None,
        placeholder="FILE.py:FUNCTION",
        help="your own function that grades generated answers of at most --max-new-tokens tokens",
    )
    max_new_tokens: int | None = setting(
        None,
        minimum=1,
        placeholder="TOKENS",
        no_effect_if=("reward", None),
        help="with --reward: maximum tokens of a generated answer; default: 256",
    )
    chat: bool | None = setting(
        None,
        help="use the tokenizer's chat template; default: only to generate answers to questions "
        "of a file, or with --reward, as a search does",
    )
    paths: str | None = basic(
        None,
        placeholder="FILE,...",
        help="static paths to compare, separated by commas: without:13,14 leaves out these layers, "
        "and a file has one path",
    )
    baselines: str = basic(
        "quick",
        placeholder="NAMES",
        help="names separated by commas, or quick, all or none; 'drllm ls baselines' explains them",
    )
    supervision: str | None = setting(
        None,
        placeholder="FILE",
        help="supervision.jsonl with the routers' targets, for the baselines that are fitted on "
        "targets",
    )
    curve: str | None = basic(
        None,
        placeholder="X,X,...",
        help="compare at these shares of saved executions too, e.g. 0.1,0.2,0.3",
    )
    max_drop: float | None = basic(
        None,
        above=0.0,
        maximum=100.0,
        placeholder="POINTS",
        alias="epsilon",
        help="largest allowed loss of accuracy in points; exit status 1 unless a statistical "
        "test excludes a larger loss",
    )
    max_loss_increase: float | None = basic(
        None,
        above=0.0,
        placeholder="NATS",
        no_effect_if=("max_drop", None),
        help="with --max-drop: largest allowed increase of the next-token loss (see --num-texts), "
        "in nats per token",
    )
    num_calibration: int | None = setting(
        None,
        minimum=1,
        help="number of questions from the split 'select' that are used to choose depths and fit "
        "baselines; default: 64",
    )
    num_texts: int = setting(
        100,
        minimum=1,
        help="maximum questions per task whose text's next-token loss is measured too",
    )
    num_random_draws: int | None = setting(
        None,
        minimum=1,
        help="draws per question of the random baselines; default: 10",
    )
    batch_size: int = setting(16, minimum=1, help="questions per forward pass")
    latency: bool = incidental(
        False,
        basic=True,
        help="measure the time of the base model and the routed model too, for 20 s at most",
    )
    latency_seconds: float = incidental(
        20.0,
        above=0.0,
        no_effect_if=("latency", False),
        help="with --latency: maximum seconds of the measurement; small batches come first",
    )
    latency_rounds: int | None = incidental(
        None,
        minimum=0,
        help="number of times that both models are timed; turns --latency on, and 0 turns it off; "
        "default: 8",
    )
    latency_read: int = incidental(
        128,
        minimum=1,
        no_effect_if=("latency", False),
        help="with --latency: maximum tokens of a timed prompt",
    )
    latency_written: int = incidental(
        8,
        minimum=1,
        no_effect_if=("latency", False),
        help="with --latency: tokens decoded each time",
    )
    seed: int = setting(
        0,
        minimum=0,
        help="seed of the permuted routes, the random draws, --limit and --num-texts",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latency_rounds is not None:
            object.__setattr__(self, "latency", self.latency_rounds > 0)
