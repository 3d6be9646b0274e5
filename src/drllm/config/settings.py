"""Every setting of every stage, once: type, default, bounds, unit and help text.

A field here is all it takes to add a flag, a key of YAML files and their checks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from drllm.config.fields import NamesIn, Settings, basic, flag_of, incidental, setting
from drllm.errors import ConfigError, unknown_name

STOP_RULES = ("paper", "released", "exhaust")
EXECUTORS = ("local", "ray")
SPLITS = ("search", "fit", "select", "test")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps")
PATH_WEIGHTS = ("none", "equal", "shorter", "closer")
LOSSES = ("focal", "cross_entropy")
REDUCTIONS = ("mean", "sum")
CLASS_WEIGHTS = ("effective_number", "none")
FEATURE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """Which base model, and how it is loaded."""

    model: str = basic(
        "smollm2-135m", "base model: an alias, a hub id or a local folder", alias="model_id"
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub model")
    dtype: str = setting(
        "auto", "weights: auto is bfloat16 on a GPU that has it, else float32", choices=DTYPES
    )
    device: str = setting("auto", "where to run: auto is cuda, else mps, else cpu")
    attn_implementation: str | None = setting(None, "attention code of transformers, e.g. sdpa")
    trust_remote_code: bool = setting(False, "run modelling code that comes with a hub model")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"auto|(cpu|cuda|mps)(:\d+)?", self.device):
            raise ConfigError(
                "--device: " + unknown_name("device", self.device, DEVICES) + ", or e.g. cuda:1"
            )


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Settings):
    """The tree search over layer paths; its numbers are the paper's unless said otherwise."""

    dataset: str = basic(
        "builtin_facts", "tasks (comma list), or a .jsonl file of your own", value="TASKS"
    )
    output_dir: str = incidental(
        "data/", "folder that receives search.jsonl and supervision.jsonl", basic=True
    )
    data_dir: str | None = incidental(None, "folder with SPLIT.jsonl[.gz] files by task")
    split: str = setting("search", "which questions", choices=SPLITS)
    limit: int | None = basic(
        None, "at most this many questions a task, drawn with the seed", minimum=1
    )
    reward: str | None = basic(
        None, "graded by: of a comma list the first that fits the task; default: the task's own"
    )
    num_simulations: int = basic(50, "paths tried a question (paper: 50)", minimum=1)
    budget: float = basic(
        2.0, "maximum executions of a path, as a factor of L (paper: 2)", minimum=1.0, maximum=2.0
    )
    strategy: str = setting(
        "tree",
        "tree, sweep (single edits, then pairs) or walk (one chain)",
        choices=NamesIn("drllm.search.strategies:STRATEGIES"),
    )
    stop_rule: str = setting(
        "exhaust", "when a question is done before its simulations are", choices=STOP_RULES
    )
    exploration_constant: float = setting(1.8, "c of the UCB rule (paper: 1.8)", minimum=0.0)
    length_penalty: float = setting(3.0, "lambda of the UCB rule (paper: 3.0)", minimum=0.0)
    random_child_probability: float = setting(
        0.1, "share of selections made at random (paper)", minimum=0.0, maximum=1.0
    )
    leaves_per_round: int = setting(
        1, "paths of a question evaluated together; above 1 with virtual losses", minimum=1
    )
    kl: bool = setting(
        True, "keep each path's mean KL from the full path over the prompt, in nats a token"
    )
    margin_tolerance: float = setting(
        0.5, "re-test: nats a path's margin may lie below the full path's", minimum=0.0
    )
    block_size: int = setting(32, "questions searched together", minimum=1)
    state_cache_gb: float = incidental(
        4.0, "memory for shared path prefixes, in GB; shared by Ray's workers on one CPU", above=0.0
    )
    paths_per_pass: int | None = incidental(
        None, "maximum paths in a forward pass; as many as memory allows unless given", minimum=1
    )
    shard: str | None = setting(
        None, "search part i of n (i/n, from 1), to be joined by supervise", value="I/N"
    )
    executor: str = incidental(
        "local", "where to search: in this process, or on Ray", choices=EXECUTORS, basic=True
    )
    num_workers: int | None = incidental(
        None,
        "with --executor ray: processes, one a device; as many as there are unless given",
        minimum=1,
        idle=("executor", "local"),
    )
    ray_address: str | None = incidental(
        None,
        "with --executor ray: HOST:PORT of a cluster, or auto; else one starts here",
        value="HOST:PORT",
        idle=("executor", "local"),
    )
    seed: int = setting(0, "seed of the search and of --limit", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        rewards = NamesIn("drllm.tasks.rewards:REWARDS")
        for name in () if self.reward is None else self.reward.split(","):
            if name not in rewards:
                raise ConfigError("--reward: " + unknown_name("value", name, rewards))


@dataclass(frozen=True, kw_only=True)
class SuperviseConfig(Settings):
    """How one target path is chosen for each searched question."""

    target: str = basic(
        "least_kl",
        "rule that picks among the tried paths",
        choices=NamesIn("drllm.supervision.rules:TARGETS"),
    )
    min_saving: float | None = basic(
        None,
        "with --target least_kl: least share of the executions that a target saves (0.05)",
        above=0.0,
        maximum=1.0,
    )
    path_weights: str = setting(
        "none", "also write all valid paths for --soft-targets, weighted so", choices=PATH_WEIGHTS
    )
    quotas: str | None = setting(
        None,
        "maximum targets a task, first come: arc_easy=400,dart-1=200; else no limit",
        value="TASK=N,...",
    )
    quota_improving: float | None = setting(
        None,
        "keep this share of improving targets by dropping others (published: 0.30)",
        above=0.0,
        maximum=1.0,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """The routers and their training: the paper's numbers, but for warm-up and class weights."""

    num_epochs: int = basic(25, "passes over the targets (paper: 25)", minimum=1)
    learning_rate: float = basic(1e-3, "peak of the cosine schedule (paper: 1e-3)", above=0.0)
    weight_decay: float = setting(0.01, "AdamW weight decay (paper: 0.01)", minimum=0.0)
    warmup_steps: float = setting(
        0.1, "linear warm-up: a share of the steps below 1, else steps (paper: 500)", minimum=0.0
    )
    gradient_accumulation: int = setting(
        16, "examples an optimiser step (paper: 1 x 16)", minimum=1
    )
    loss_reduction: str = setting(
        "mean", "what a step makes of its examples' losses (released: sum)", choices=REDUCTIONS
    )
    max_grad_norm: float | None = setting(
        None, "clip a step's gradients to this norm; none unless given (released: 1)", above=0.0
    )
    num_windows: int = basic(8, "windows W a router averages the prompt into (paper: 8)", minimum=1)
    feature_dtype: str = setting(
        "float32", "how routers' inputs are stored; bfloat16 halves them", choices=FEATURE_DTYPES
    )
    router_width: int = setting(128, "hidden width of a router (paper: 128)", minimum=1)
    loss: str = setting("focal", "what is minimised (paper: focal)", choices=LOSSES)
    gamma: float = setting(
        2.0, "focal loss exponent (paper: 2)", minimum=0.0, idle=("loss", "cross_entropy")
    )
    class_weights: str = setting(
        "none", "whether rare decisions weigh more (paper: effective_number)", choices=CLASS_WEIGHTS
    )
    beta: float = setting(
        0.999,
        "effective-number class weights (paper: 0.999)",
        minimum=0.0,
        maximum=0.9999999,
        idle=("class_weights", "none"),
    )
    logit_adjustment: float = setting(
        0.0, "tau: adds tau times each layer's log label frequency in the loss", minimum=0.0
    )
    soft_targets: bool = setting(
        False, "learn the weighted mix of all valid paths (supervise --path-weights)"
    )
    dropout: float = setting(
        0.0, "share of a router's hidden units left out of a step", minimum=0.0, maximum=0.9
    )
    normalise_features: bool = setting(
        False, "scale each component of the routers' inputs to mean 0, deviation 1"
    )
    validation_fraction: float = setting(
        0.1, "share of the targets held out for metrics (ours)", minimum=0.0, maximum=0.5
    )
    early_stopping: int | None = setting(
        None,
        "epochs without a lower held-out loss before it ends; keeps the best",
        minimum=1,
        idle=("validation_fraction", 0.0),
    )
    calibrate: bool = setting(
        False,
        "divide the logits by a temperature fitted on targets held out",
        idle=("validation_fraction", 0.0),
    )
    on_policy_rounds: int = setting(
        0, "rounds that also train on what the routers read along their own routes", minimum=0
    )
    seed: int = setting(0, "seed of initial weights, order and held-out part", minimum=0)
    num_seeds: int = setting(
        1,
        "routers from so many seeds, counting up from --seed; see seed_S in the output",
        minimum=1,
    )
    report_to: str | None = incidental(
        None,
        "trackers of accelerate (comma list), such as tensorboard,wandb; off by default",
        basic=True,
        value="NAMES",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            raise ConfigError(
                f"--warmup-steps is {self.warmup_steps:g}; give a whole number of steps, or below "
                f"1 a share of all steps"
            )

    @property
    def trackers(self) -> list[str]:
        """The names in `report_to`, each once."""
        named = [] if self.report_to is None else self.report_to.split(",")
        return list(dict.fromkeys(name.strip() for name in named))

    def by_seed(self, output: Path) -> dict[Path, TrainConfig]:
        """Return the folder of every seed's routers, with the settings of that training alone.

        The first seed's routers lie in `output`, those of a further seed S in `seed_S` below it.
        """
        first, *more = range(self.seed, self.seed + self.num_seeds)
        folders = {first: output} | {seed: output / f"seed_{seed}" for seed in more}
        return {folder: replace(self, seed=s, num_seeds=1) for s, folder in folders.items()}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Settings):
    """How text is generated."""

    max_new_tokens: int = basic(64, "maximum tokens generated", minimum=1)
    chat: bool | None = basic(
        None, "ask through the chat template or not; without it as the routers were trained"
    )
    batch_size: int | None = setting(
        None, "with --file: maximum prompts decoded together; 16 unless given", minimum=1
    )
    route_first: bool = setting(
        True, "with --file: route all prompts first, to decode equal plans together"
    )
    temperature: float = basic(0.0, "sampling temperature; 0 is greedy", minimum=0.0)
    top_p: float | None = setting(
        None,
        "sample from the likeliest tokens of this share; 1 unless given",
        above=0.0,
        maximum=1.0,
        idle=("temperature", 0.0),
    )
    seed: int | None = setting(
        None, "sampling seed; 0 unless given", minimum=0, idle=("temperature", 0.0)
    )

    def sampling(self) -> dict[str, Any]:
        """Return the options of transformers' `generate` that say how tokens are chosen.

        The flags say all of it: a model's own settings for sampling are not mixed in. A sampling
        setting at temperature 0 is refused.
        """
        self.check_effects()
        if self.temperature == 0:
            return {"do_sample": False, "num_beams": 1}
        drawn = {"temperature": self.temperature, "top_p": self.top_p or 1.0, "top_k": 0}
        return {"do_sample": True, "num_beams": 1, **drawn}


@dataclass(frozen=True, kw_only=True)
class DepthConfig(Settings):
    """How deep the routers go: one knob, or none for the routers as they were trained."""

    depth_bias: float = setting(
        0.0, "price of an execution in logits; below 0 runs more", minimum=-1e6, maximum=1e6
    )
    target_executions: float | None = basic(
        None, "mean executions wanted; a bias that gives them is looked for", minimum=1.0
    )
    calibration: str | None = basic(
        None, "prompts (.jsonl) that --target-executions looks on", value="FILE"
    )
    router_penalty: float | None = setting(
        None, "published knob: -1 skips all, 0.5 executes all", minimum=-1.0, maximum=1.0
    )
    static_routing: bool = setting(
        False, "execute every layer, whatever the routers say", alias="is_static_routing"
    )

    def knob(self) -> str | None:
        """Return the name of the setting that is turned, None where the routers decide alone.

        More than one knob, and a calibration set or a target without the other, are refused only
        here, since a file and the command line may each give a part of the settings.
        """
        given = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        names = [name for name in given if name != "calibration"]
        if len(names) > 1:
            flags = [flag_of(name) for name in names]
            raise ConfigError(
                f"{', '.join(flags[:-1])} and {flags[-1]} are given, but only one of them can set "
                f"the depth; leave the others out"
            )
        if self.target_executions is not None and self.calibration is None:
            raise ConfigError(
                f"--target-executions {self.target_executions:g} needs prompts to look on; give "
                f"a file of them as --calibration, for example supervision.jsonl"
            )
        if self.calibration is not None and self.target_executions is None:
            raise ConfigError(
                f"--calibration {self.calibration} has no effect without --target-executions; "
                f"give both or neither"
            )
        return names[0] if names else None


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """What is evaluated, on which questions, against which baselines."""

    tasks: str = basic(
        "builtin_facts",
        "tasks (comma list), ours or the harness' own, or a .jsonl file of your own",
        value="TASKS",
    )
    data_dir: str | None = incidental(None, "folder with SPLIT.jsonl[.gz] files by task")
    split: str = basic("test", "which questions", choices=SPLITS)
    limit: int | None = basic(
        None, "at most this many questions a task, drawn with the seed", minimum=1
    )
    limits: dict[str, int | str] | None = setting(
        None,
        "other limits for some tasks: a number, or all",
        minimum=1,
        choices=("all",),
        value="{gsm8k: 30, arc_easy: all}",
    )
    splits: dict[str, str] | None = setting(
        None, "other splits for some tasks", choices=SPLITS, value="{gsm8k: select}"
    )
    fitted_on: dict[str, str] | None = setting(
        None,
        "other tasks on whose questions depths are chosen and baselines fitted",
        value="{hellaswag: arc_easy}",
    )
    num_fewshot: int | None = setting(
        None, "worked examples before each question; each task's own unless given", minimum=0
    )
    chat: bool = setting(False, "ask through the tokenizer's chat template")
    baselines: str = basic(
        "quick", "comma list, quick, all or none; 'drllm ls baselines' explains them", value="NAMES"
    )
    search: str | None = setting(
        None, "search.jsonl, for baselines that are fitted on it", value="FILE"
    )
    supervision: str | None = setting(
        None,
        "supervision.jsonl, for baselines that are fitted on the routers' targets",
        value="FILE",
    )
    curve: str | None = basic(
        None,
        "shares of the executions to save, e.g. 0.1,0.2,0.3: routed and baselines at each",
        value="X,X,...",
    )
    epsilon: float | None = setting(
        None,
        "with --curve: points of accuracy; finds the cheapest depth shown to lose less",
        above=0.0,
        maximum=100.0,
    )
    max_loss_increase: float | None = setting(
        None,
        "with --epsilon: nats a token that the loss of texts may rise; 0.05 unless given",
        above=0.0,
    )
    worked_answers: str | None = setting(
        None,
        "with --epsilon: a task (gsm8k) on whose right answers the loss may rise no more",
        value="TASK",
    )
    num_calibration: int | None = setting(
        None,
        "select questions that depths are found and baselines fitted on; 64 unless given",
        minimum=1,
    )
    num_texts: int = setting(
        100, "questions whose text's next-token loss is read too, at most", minimum=1
    )
    num_random_draws: int | None = setting(
        None, "draws of the random baselines a question; 10 unless given", minimum=1
    )
    batch_size: int = setting(16, "questions a forward pass", minimum=1)
    latency_rounds: int = incidental(
        3, "turns in which base and routed are timed; 0 measures no time", minimum=0
    )
    seed: int = setting(0, "seed of permutations, random draws and --limit", minimum=0)

    def limit_of(self, task: str) -> int | None:
        """Return how many questions of a task are asked at most; None for all."""
        limit = (self.limits or {}).get(task, self.limit)
        return None if limit is None or limit == "all" else int(limit)

    def split_of(self, task: str) -> str:
        """Return which questions of a task are asked."""
        return (self.splits or {}).get(task, self.split)
