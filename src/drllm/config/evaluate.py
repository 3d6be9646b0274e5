"""Settings of an evaluation."""

from dataclasses import dataclass

from drllm.config.constants import SPLITS
from drllm.config.fields import Settings, basic, incidental, setting

TIMING = ("latency", "latency_rounds", "latency_read", "latency_written")
"""Settings that no other result depends on."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """What is evaluated, on which questions, against which baselines."""

    tasks: str | None = basic(
        None,
        value="TASKS",
        alias="dataset",
        help="tasks (comma list): ours, the harness', FILE.jsonl, or OWNER/NAME of the hub",
    )
    data_dir: str | None = incidental(None, help="folder with SPLIT.jsonl[.gz] files by task")
    split: str = setting("test", choices=SPLITS, help="which questions")
    limit: int | None = basic(
        None,
        minimum=1,
        help="maximum questions of a task, drawn with the seed",
    )
    limits: dict[str, int | str] | None = setting(
        None,
        minimum=1,
        choices=("all",),
        value="{gsm8k: 30, arc_easy: all}",
        help="other limits for some tasks: a number, or all",
    )
    splits: dict[str, str] | None = setting(
        None,
        choices=SPLITS,
        value="{gsm8k: select}",
        help="other splits for some tasks",
    )
    fitted_on: dict[str, str] | None = setting(
        None,
        value="{hellaswag: arc_easy}",
        help="other tasks on whose questions depths are chosen and baselines fitted",
    )
    num_fewshot: int | None = setting(
        None,
        minimum=0,
        help="worked examples before each question; default: the task's own number",
    )
    reward: str | None = setting(
        None,
        value="FILE.py:FUNCTION",
        help="FILE.py:FUNCTION, a function of yours that grades generated answers",
    )
    max_new_tokens: int | None = setting(
        None,
        minimum=1,
        idle=("reward", None),
        help="with --reward: maximum tokens of an answer; default: 256",
    )
    chat: bool = setting(False, help="ask through the tokenizer's chat template")
    paths: str | None = basic(
        None,
        value="FILE[:NAME],...",
        help="static paths: files; of a paths.json all but the full path, or the named one",
    )
    baselines: str = basic(
        "quick",
        value="NAMES",
        help="comma list, or quick, all or none; 'drllm ls baselines' explains them",
    )
    supervision: str | None = setting(
        None,
        value="FILE",
        help="supervision.jsonl for baselines that are fitted on the routers' targets",
    )
    curve: str | None = basic(
        None,
        value="X,X,...",
        help="also compare where these shares of the executions are saved, e.g. 0.1,0.2,0.3",
    )
    max_drop: float | None = basic(
        None,
        above=0.0,
        maximum=100.0,
        alias="epsilon",
        help="points of accuracy; exit status 1 unless the test excludes a larger loss",
    )
    max_loss_increase: float | None = setting(
        None,
        above=0.0,
        idle=("max_drop", None),
        help="with --max-drop: nats a token; the test must exclude a larger rise of texts' "
        "loss too",
    )
    num_calibration: int | None = setting(
        None,
        minimum=1,
        help="questions of select that depths are found and baselines fitted on; default: 64",
    )
    num_texts: int = setting(
        100,
        minimum=1,
        help="maximum questions whose text's next-token loss is measured too",
    )
    num_random_draws: int | None = setting(
        None,
        minimum=1,
        help="draws of the random baselines for a question; default: 10",
    )
    batch_size: int = setting(16, minimum=1, help="questions a forward pass")
    latency: bool = incidental(
        False,
        basic=True,
        help="measure the time of base and routed model too",
    )
    latency_rounds: int = incidental(
        8,
        minimum=1,
        idle=("latency", False),
        help="with --latency: rounds in which both are timed",
    )
    latency_read: int = incidental(
        128,
        minimum=1,
        idle=("latency", False),
        help="with --latency: maximum tokens of a timed prompt",
    )
    latency_written: int = incidental(
        64,
        minimum=1,
        idle=("latency", False),
        help="with --latency: tokens decoded in a timing",
    )
    seed: int = setting(
        0,
        minimum=0,
        help="seed of permutations, random draws, --limit and --num-texts",
    )

    def limit_of(self, task: str) -> int | None:
        """Return how many questions of a task are asked at most; None for all."""
        limit = (self.limits or {}).get(task, self.limit)
        return None if limit is None or limit == "all" else int(limit)

    def split_of(self, task: str) -> str:
        """Return which questions of a task are asked."""
        return (self.splits or {}).get(task, self.split)
