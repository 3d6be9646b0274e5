"""Settings of the search."""

from dataclasses import dataclass

from drllm.config.constants import SPLITS
from drllm.config.fields import NamesIn, Settings, basic, incidental, setting
from drllm.errors import ConfigError, unknown_name

STOP_RULES = ("paper", "released", "exhaust")


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Settings):
    """The tree search over layer paths; its numbers are the paper's unless said otherwise."""

    dataset: str | None = basic(
        None,
        value="TASKS",
        alias="tasks",
        help="tasks (comma list): ours, the harness', FILE.jsonl, or OWNER/NAME of the hub",
    )
    output_dir: str = incidental(
        "data/",
        basic=True,
        help="folder for search.jsonl and supervision.jsonl",
    )
    data_dir: str | None = incidental(None, help="folder with SPLIT.jsonl[.gz] files by task")
    split: str = setting("search", choices=SPLITS, help="which questions")
    limit: int | None = basic(
        None,
        minimum=1,
        help="maximum questions of a task, drawn with the seed",
    )
    reward: str | None = basic(
        None,
        help="how answers are scored; comma list: the first applicable is used; or "
        "FILE.py:FUNCTION; default: the task's",
    )
    max_new_tokens: int | None = setting(
        None,
        minimum=1,
        help="maximum tokens of an answer; with boxed, leaves room to work it out",
    )
    num_fewshot: int | None = setting(
        None,
        minimum=1,
        help="worked examples shown before each question, of another split",
    )
    num_simulations: int = basic(50, minimum=1, help="paths tried a question (paper: 50)")
    budget: float = setting(
        2.0,
        minimum=1.0,
        maximum=2.0,
        help="maximum executions of a path, as a factor of L (paper: 2)",
    )
    strategy: str = setting(
        "tree",
        choices=NamesIn("drllm.search.strategies:STRATEGIES"),
        help="tree, or walk (one chain)",
    )
    stop_rule: str = setting(
        "exhaust",
        choices=STOP_RULES,
        help="when a question is done before its simulations are",
    )
    exploration_constant: float = setting(1.8, minimum=0.0, help="c of the UCB rule (paper: 1.8)")
    length_penalty: float = setting(3.0, minimum=0.0, help="lambda of the UCB rule (paper: 3.0)")
    random_child_probability: float = setting(
        0.1,
        minimum=0.0,
        maximum=1.0,
        help="share of selections made at random (paper: 0.1)",
    )
    leaves_per_round: int = setting(
        4,
        minimum=1,
        help="paths of a question evaluated together, by virtual losses (paper: 1)",
    )
    kl: bool = setting(
        True,
        help="record each path's mean KL from the full path over the prompt, in nats a token",
    )
    block_size: int = setting(32, minimum=1, help="questions searched together")
    state_cache_gb: float | None = incidental(
        None,
        above=0.0,
        help="GB for shared path prefixes; default: a quarter of free memory, at most 16",
    )
    shard: str | None = setting(
        None,
        value="I/N",
        help="search part i of n (i/n, from 1), to be joined by supervise",
    )
    executor: str = incidental(
        "local",
        choices=("local", "ray"),
        basic=True,
        help="where to search: in this process, or on Ray",
    )
    num_workers: int | None = incidental(
        None,
        minimum=1,
        idle=("executor", "local"),
        help="with --executor ray: processes, one a device; default: as many as there are",
    )
    ray_address: str | None = incidental(
        None,
        value="HOST:PORT",
        idle=("executor", "local"),
        help="with --executor ray: HOST:PORT of a cluster, or auto; default: one starts here",
    )
    seed: int = setting(0, minimum=0, help="seed of the search and of --limit")

    def __post_init__(self) -> None:
        super().__post_init__()
        rewards = NamesIn("drllm.tasks.rewards:REWARDS")
        for name in () if self.reward is None else self.reward.split(","):
            if name not in rewards and ".py:" not in name:
                raise ConfigError("--reward: " + unknown_name("value", name, rewards))
