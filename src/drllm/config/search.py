"""Settings of `drllm search` and `drllm.search_paths`."""

from dataclasses import dataclass

from drllm.config.constants import DATA_DIR_HELP, SPLITS, TASKS_HELP, TRUST_HELP
from drllm.config.executor import ExecutorConfig
from drllm.config.fields import NamesIn, basic, incidental, setting
from drllm.errors import ConfigError, unknown_name

STOP_RULES = ("paper", "released", "exhaust")
"""Rules for when the search of a question ends.

`exhaust` ends it when all simulations are done. The other rules may end it earlier, as the paper or
its published code do (docs/differences.md, D-12).
"""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(ExecutorConfig):
    """The tree search over layer paths; defaults are the paper's unless noted."""

    dataset: str | None = basic(
        None,
        placeholder="TASKS",
        alias="tasks",
        shows_alias=True,
        help=TASKS_HELP,
    )
    output_dir: str = incidental(
        "data/",
        basic=True,
        alias="output",
        help="folder for search.jsonl and supervision.jsonl",
    )
    data_dir: str | None = incidental(
        None,
        help=DATA_DIR_HELP,
    )
    trust_task_code: bool = incidental(False, help=TRUST_HELP)
    split: str = setting("search", choices=SPLITS, help="part of the questions to search")
    limit: int | None = basic(
        None,
        minimum=1,
        help="maximum questions per task, drawn at random with --seed",
    )
    reward: str | None = basic(
        None,
        help="reward that scores answers, or FILE.py:FUNCTION; if several are given, separated by "
        "commas, each task uses the first that fits it; default: the reward of the task",
    )
    max_new_tokens: int | None = basic(
        None,
        minimum=1,
        placeholder="TOKENS",
        help="maximum tokens of a generated answer; with the reward 'boxed', a whole solution has "
        "to fit",
    )
    num_fewshot: int | None = basic(
        None,
        minimum=1,
        help="worked examples before each question, taken from another split",
    )
    num_simulations: int = basic(50, minimum=1, help="paths tried per question (paper: 50)")
    budget: float = setting(
        2.0,
        minimum=1.0,
        maximum=2.0,
        help="maximum executions of a path, as a multiple of the number of layers (paper: 2)",
    )
    strategy: str = basic(
        "tree",
        choices=NamesIn("drllm.search.strategies:STRATEGIES"),
        help="tree: search a tree of edits; walk: follow a single chain of edits",
    )
    stop_rule: str = setting(
        "exhaust",
        choices=STOP_RULES,
        help="when to end the search of a question; exhaust: when all simulations are done",
    )
    exploration_constant: float = setting(
        1.8, minimum=0.0, help="constant c of the UCB rule (paper: 1.8)"
    )
    length_penalty: float = setting(
        3.0, minimum=0.0, help="length penalty lambda of the UCB rule (paper: 3.0)"
    )
    random_child_probability: float = setting(
        0.1,
        minimum=0.0,
        maximum=1.0,
        help="probability that a child is selected at random (paper: 0.1)",
    )
    leaves_per_round: int = setting(
        4,
        minimum=1,
        help="paths of a question that are evaluated together; virtual losses keep them apart "
        "(paper: 1)",
    )
    kl: bool = setting(
        True,
        help="record each path's mean KL from the full path over the prompt, in nats per token",
    )
    block_size: int = basic(32, minimum=1, help="number of questions searched together")
    state_cache_gb: float | None = incidental(
        None,
        basic=True,
        above=0.0,
        placeholder="GB",
        help="GB of memory for cached states of shared prefixes; default: a quarter of free "
        "memory, at most 16",
    )
    shard: str | None = basic(
        None,
        placeholder="I/N",
        help="search only part I of N, where the first part is 1; 'drllm supervise' joins the "
        "parts",
    )
    seed: int = setting(0, minimum=0, help="seed of the search and of --limit")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward is None:
            return
        rewards = NamesIn("drllm.tasks.rewards:REWARDS")
        for name in self.reward.split(","):
            if name not in rewards and ".py:" not in name:
                raise ConfigError("--reward: " + unknown_name("value", name, rewards))
