"""Every setting of every stage, once: type, default, bounds, unit and help text.

A field here and its line under `Attributes` are all it takes to add a flag, a key of YAML files and
their checks. Loads no torch.
"""

import re
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from drllm.config.fields import NamesIn, Settings, basic, flag_of, incidental, setting
from drllm.errors import ConfigError, unknown_name

STOP_RULES = ("paper", "released", "exhaust")
SPLITS = ("search", "fit", "select", "test")
DEVICES = ("auto", "cpu", "cuda", "mps")
# No other result depends on these.
TIMING = ("latency", "latency_rounds", "latency_read", "latency_written")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """Which base model, and how it is loaded.

    Attributes:
        model: base model: an alias, a hub id or a local folder
        revision: branch, tag or commit of a hub model
        dtype: weights: auto is bfloat16 on a GPU that has it, else float32
        device: where to run: auto is cuda, else mps, else cpu
        attn_implementation: attention code of transformers, e.g. sdpa
        trust_remote_code: run modelling code that comes with a hub model
    """

    model: str = basic("smollm2-135m", alias="model_id")
    revision: str | None = setting(None)
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16", "float16"))
    device: str = setting("auto")
    attn_implementation: str | None = setting(None)
    trust_remote_code: bool = setting(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"auto|(cpu|cuda|mps)(:\d+)?", self.device):
            raise ConfigError(
                "--device: " + unknown_name("device", self.device, DEVICES) + ", or e.g. cuda:1"
            )


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Settings):
    """The tree search over layer paths; its numbers are the paper's unless said otherwise.

    Attributes:
        dataset: tasks (comma list), ours or the harness', FILE.jsonl, or OWNER/NAME of the hub
        output_dir: folder that receives search.jsonl and supervision.jsonl
        data_dir: folder with SPLIT.jsonl[.gz] files by task
        split: which questions
        limit: at most this many questions a task, drawn with the seed
        reward: of a comma list the first that fits; default: the task's; or FILE.py:FUNCTION
        max_new_tokens: maximum tokens of an answer; with boxed, leaves room to work it out
        num_fewshot: worked examples shown before each question, of another split
        num_simulations: paths tried a question (paper: 50)
        budget: maximum executions of a path, as a factor of L (paper: 2)
        strategy: tree, or walk (one chain)
        stop_rule: when a question is done before its simulations are
        exploration_constant: c of the UCB rule (paper: 1.8)
        length_penalty: lambda of the UCB rule (paper: 3.0)
        random_child_probability: share of selections made at random (paper)
        leaves_per_round: paths of a question evaluated together (paper: 1), by virtual losses
        kl: keep each path's mean KL from the full path over the prompt, in nats a token
        block_size: questions searched together
        state_cache_gb: GB for shared path prefixes; default: a quarter of free memory, at most 16
        shard: search part i of n (i/n, from 1), to be joined by supervise
        executor: where to search: in this process, or on Ray
        num_workers: with --executor ray: processes, one a device; as many as there are unless given
        ray_address: with --executor ray: HOST:PORT of a cluster, or auto; else one starts here
        seed: seed of the search and of --limit
    """

    dataset: str | None = basic(None, value="TASKS", alias="tasks")
    output_dir: str = incidental("data/", basic=True)
    data_dir: str | None = incidental(None)
    split: str = setting("search", choices=SPLITS)
    limit: int | None = basic(None, minimum=1)
    reward: str | None = basic(None)
    max_new_tokens: int | None = setting(None, minimum=1)
    num_fewshot: int | None = setting(None, minimum=1)
    num_simulations: int = basic(50, minimum=1)
    budget: float = setting(2.0, minimum=1.0, maximum=2.0)
    strategy: str = setting("tree", choices=NamesIn("drllm.search.strategies:STRATEGIES"))
    stop_rule: str = setting("exhaust", choices=STOP_RULES)
    exploration_constant: float = setting(1.8, minimum=0.0)
    length_penalty: float = setting(3.0, minimum=0.0)
    random_child_probability: float = setting(0.1, minimum=0.0, maximum=1.0)
    leaves_per_round: int = setting(4, minimum=1)
    kl: bool = setting(True)
    block_size: int = setting(32, minimum=1)
    state_cache_gb: float | None = incidental(None, above=0.0)
    shard: str | None = setting(None, value="I/N")
    executor: str = incidental("local", choices=("local", "ray"), basic=True)
    num_workers: int | None = incidental(None, minimum=1, idle=("executor", "local"))
    ray_address: str | None = incidental(None, value="HOST:PORT", idle=("executor", "local"))
    seed: int = setting(0, minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        rewards = NamesIn("drllm.tasks.rewards:REWARDS")
        for name in () if self.reward is None else self.reward.split(","):
            if name not in rewards and ".py:" not in name:
                raise ConfigError("--reward: " + unknown_name("value", name, rewards))


@dataclass(frozen=True, kw_only=True)
class SuperviseConfig(Settings):
    """How one target path is chosen for each searched question.

    Attributes:
        target: rule that picks among the tried paths
        min_saving: with --target least_kl: least share of the executions that a target saves (0.05)
        quotas: maximum targets a task, first come: arc_easy=400,dart-1=200; else no limit
        quota_improving: keep this share of improving targets by dropping others (published: 0.30)
    """

    target: str = basic("least_kl", choices=NamesIn("drllm.supervision.rules:TARGETS"))
    min_saving: float | None = basic(None, above=0.0, maximum=1.0)
    quotas: str | None = setting(None, value="TASK=N,...")
    quota_improving: float | None = setting(None, above=0.0, maximum=1.0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """The routers and their training: the paper's numbers, but for warm-up and class weights.

    Attributes:
        num_epochs: passes over the targets (paper: 25)
        learning_rate: peak of the cosine schedule (paper: 1e-3)
        weight_decay: AdamW weight decay (paper: 0.01)
        warmup_steps: linear warm-up: a share of the steps below 1, else steps (paper: 500)
        gradient_accumulation: examples an optimiser step (paper: 1 x 16)
        loss_reduction: what a step makes of its examples' losses (released: sum)
        max_grad_norm: clip a step's gradients to this norm; none unless given (released: 1)
        num_windows: windows W a router averages the prompt into (paper: 8)
        feature_dtype: how routers' inputs are stored; bfloat16 halves them
        router_width: hidden width of a router (paper: 128)
        loss: what is minimised (paper: focal)
        gamma: focal loss exponent (paper: 2)
        class_weights: whether rare decisions weigh more (paper: effective_number)
        beta: effective-number class weights (paper: 0.999)
        validation_fraction: share of the targets held out for metrics (ours)
        seed: seed of initial weights, order and held-out part
        num_seeds: routers from so many seeds, counting up from --seed; see seed_S in the output
        report_to: trackers of accelerate (comma list), such as tensorboard,wandb; off by default
    """

    num_epochs: int = basic(25, minimum=1)
    learning_rate: float = basic(1e-3, above=0.0)
    weight_decay: float = setting(0.01, minimum=0.0)
    warmup_steps: float = setting(0.1, minimum=0.0)
    gradient_accumulation: int = setting(16, minimum=1)
    loss_reduction: str = setting("mean", choices=("mean", "sum"))
    max_grad_norm: float | None = setting(None, above=0.0)
    num_windows: int = basic(8, minimum=1)
    feature_dtype: str = setting("float32", choices=("float32", "bfloat16"))
    router_width: int = setting(128, minimum=1)
    loss: str = setting("focal", choices=("focal", "cross_entropy"))
    gamma: float = setting(2.0, minimum=0.0, idle=("loss", "cross_entropy"))
    class_weights: str = setting("none", choices=("effective_number", "none"))
    beta: float = setting(0.999, minimum=0.0, maximum=0.9999999, idle=("class_weights", "none"))
    validation_fraction: float = setting(0.1, minimum=0.0, maximum=0.5)
    seed: int = setting(0, minimum=0)
    num_seeds: int = setting(1, minimum=1)
    report_to: str | None = incidental(None, basic=True, value="NAMES")

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

    def by_seed(self, output: Path) -> "dict[Path, TrainConfig]":
        """Return the folder of every seed's routers, with the settings of that training alone.

        The first seed's routers lie in `output`, those of a further seed S in `seed_S` below it.
        """
        first, *more = range(self.seed, self.seed + self.num_seeds)
        folders = {first: output} | {seed: output / f"seed_{seed}" for seed in more}
        return {folder: replace(self, seed=s, num_seeds=1) for s, folder in folders.items()}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Settings):
    """How text is generated.

    Attributes:
        max_new_tokens: maximum tokens generated
        chat: ask through the chat template or not; without it as the routers were trained
        batch_size: with --file: maximum prompts decoded together; 16 unless given
        temperature: sampling temperature; 0 is greedy
        top_p: sample from the likeliest tokens of this share; 1 unless given
        seed: sampling seed; 0 unless given
    """

    max_new_tokens: int = basic(64, minimum=1)
    chat: bool | None = basic(None)
    batch_size: int | None = setting(None, minimum=1)
    temperature: float = basic(0.0, minimum=0.0)
    top_p: float | None = setting(None, above=0.0, maximum=1.0, idle=("temperature", 0.0))
    seed: int | None = setting(None, minimum=0, idle=("temperature", 0.0))

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
    """How deep the routers go: one knob, or none for the routers as they were trained.

    Attributes:
        depth_bias: price of an execution in logits; below 0 runs more
        target_executions: mean executions wanted; a bias that gives them is looked for
        calibration: prompts (.jsonl) that --target-executions looks on
        router_penalty: published knob: -1 skips all, 0.5 executes all
        static_routing: execute every layer, whatever the routers say
    """

    depth_bias: float = setting(0.0, minimum=-1e6, maximum=1e6)
    target_executions: float | None = basic(None, minimum=1.0)
    calibration: str | None = basic(None, value="FILE", idle=("target_executions", None))
    router_penalty: float | None = setting(None, minimum=-1.0, maximum=1.0)
    static_routing: bool = setting(False, alias="is_static_routing")

    def knob(self) -> str | None:
        """Return the name of the setting that is turned, None where the routers decide alone.

        More than one knob, and a calibration set or a target without the other, are refused only
        here, since a file and the command line may each give a part of the settings.
        """
        given = [each.name for each in fields_of(self) if getattr(self, each.name) != each.default]
        names = [name for name in given if name != "calibration"]
        if len(names) > 1:
            flags = " and ".join(flag_of(name) for name in names)
            raise ConfigError(f"{flags} would each set the depth; leave all but one out")
        if self.target_executions is not None and self.calibration is None:
            raise ConfigError(
                f"--target-executions {self.target_executions:g} needs prompts to look on; give "
                f"a file of them as --calibration, for example supervision.jsonl"
            )
        self.check_effects()
        return names[0] if names else None


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """What is evaluated, on which questions, against which baselines.

    Attributes:
        tasks: tasks (comma list), ours or the harness', FILE.jsonl, or OWNER/NAME of the hub
        data_dir: folder with SPLIT.jsonl[.gz] files by task
        split: which questions
        limit: at most this many questions a task, drawn with the seed
        limits: other limits for some tasks: a number, or all
        splits: other splits for some tasks
        fitted_on: other tasks on whose questions depths are chosen and baselines fitted
        num_fewshot: worked examples before each question; each task's own unless given
        reward: FILE.py:FUNCTION, a function of your own that grades what is generated
        max_new_tokens: with --reward: maximum tokens of an answer (256)
        chat: ask through the tokenizer's chat template
        paths: static paths: files; of a paths.json all but the full one, or the named one
        baselines: comma list, quick, all or none; 'drllm ls baselines' explains them
        supervision: supervision.jsonl, for baselines that are fitted on the routers' targets
        curve: shares of the executions to save, e.g. 0.1,0.2,0.3: routed and baselines at each
        max_drop: points of accuracy; exit status 1 unless test excludes such a loss
        max_loss_increase: with --max-drop: nats a token that texts' loss may not rise either
        num_calibration: select questions that depths are found and baselines fitted on; 64 unless
            given
        num_texts: questions whose text's next-token loss is read too, at most
        num_random_draws: draws of the random baselines a question; 10 unless given
        batch_size: questions a forward pass
        latency: measure the time of base and routed model too
        latency_rounds: with --latency: rounds in which both are timed
        latency_read: with --latency: maximum tokens of a timed prompt
        latency_written: with --latency: tokens decoded in a timing
        seed: seed of permutations, random draws, --limit and --num-texts
    """

    tasks: str | None = basic(None, value="TASKS", alias="dataset")
    data_dir: str | None = incidental(None)
    split: str = basic("test", choices=SPLITS)
    limit: int | None = basic(None, minimum=1)
    limits: dict[str, int | str] | None = setting(
        None, minimum=1, choices=("all",), value="{gsm8k: 30, arc_easy: all}"
    )
    splits: dict[str, str] | None = setting(None, choices=SPLITS, value="{gsm8k: select}")
    fitted_on: dict[str, str] | None = setting(None, value="{hellaswag: arc_easy}")
    num_fewshot: int | None = setting(None, minimum=0)
    reward: str | None = setting(None, value="FILE.py:FUNCTION")
    max_new_tokens: int | None = setting(None, minimum=1, idle=("reward", None))
    chat: bool = setting(False)
    paths: str | None = basic(None, value="FILE[:NAME],...")
    baselines: str = basic("quick", value="NAMES")
    supervision: str | None = setting(None, value="FILE")
    curve: str | None = basic(None, value="X,X,...")
    max_drop: float | None = setting(None, above=0.0, maximum=100.0, alias="epsilon")
    max_loss_increase: float | None = setting(None, above=0.0, idle=("max_drop", None))
    num_calibration: int | None = setting(None, minimum=1)
    num_texts: int = setting(100, minimum=1)
    num_random_draws: int | None = setting(None, minimum=1)
    batch_size: int = setting(16, minimum=1)
    latency: bool = incidental(False, basic=True)
    latency_rounds: int = incidental(8, minimum=1, idle=("latency", False))
    latency_read: int = incidental(128, minimum=1, idle=("latency", False))
    latency_written: int = incidental(64, minimum=1, idle=("latency", False))
    seed: int = setting(0, minimum=0)

    def limit_of(self, task: str) -> int | None:
        """Return how many questions of a task are asked at most; None for all."""
        limit = (self.limits or {}).get(task, self.limit)
        return None if limit is None or limit == "all" else int(limit)

    def split_of(self, task: str) -> str:
        """Return which questions of a task are asked."""
        return (self.splits or {}).get(task, self.split)


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Settings):
    """The search for one path that serves a whole task.

    Attributes:
        tasks: tasks (comma list), ours or the harness', FILE.jsonl, or OWNER/NAME of the hub
        data_dir: folder with SPLIT.jsonl[.gz] files by task
        max_skipped: layers left out, at most; a sixth of the layers unless given
        objective: what is kept high; gold_logprob with options, next_token_loss with other answers,
            kl for prompts without any
        beam: paths of a level that are edited further
        num_fit: questions of a task that paths are fitted on, at most
        num_judged: questions of a task that choose a path, and that test it, at most, each
        max_loss: nats of the objective that a path may lie below the full one to be edited further
        weights: with several tasks: what each counts; 1 unless given
        minutes: time after which no further level is begun; a later run with more time goes on
        state_cache_gb: GB for shared path prefixes; default: a quarter of free memory, at most 16
        seed: seed of --num-fit and --num-judged
    """

    tasks: str | None = basic(None, value="TASKS", alias="dataset")
    data_dir: str | None = incidental(None)
    max_skipped: float | None = basic(None, above=0.0)
    objective: str | None = basic(None, choices=("gold_logprob", "next_token_loss", "kl"))
    beam: int = setting(3, minimum=1)
    num_fit: int = setting(300, minimum=1)
    num_judged: int | None = setting(None, minimum=2)
    max_loss: float = setting(0.1, minimum=0.0)
    weights: dict[str, float] | None = setting(None, above=0.0, value="{arc_easy: 2}")
    minutes: float | None = basic(None, above=0.0, decisive=False)
    state_cache_gb: float | None = incidental(None, above=0.0)
    seed: int = setting(0, minimum=0)


@dataclass(frozen=True, kw_only=True)
class HealConfig(Settings):
    """The training of an adapter that makes up for what a path leaves out.

    Attributes:
        path: file that says which layers run; of a paths.json the named path
        tasks: tasks (comma list) whose search questions are read with their right answers, prompts
            alone with the full path's own
        text: further texts: .jsonl files with a field text, .txt files, a text a paragraph, or data
            sets of the hub, OWNER/NAME[:CONFIG[:SPLIT]]: the first --limit texts, else 10,000
        data_dir: folder with SPLIT.jsonl[.gz] files by task
        limit: at most this many questions or texts a source, drawn with the seed
        rank: rank of the adapter
        first_layer: the layers of the path from this one on get the adapter
        steps: steps of training; 250 unless they or --minutes are given
        minutes: time for the training and all its measurements; reading the texts comes before
        learning_rate: peak of the cosine schedule
        batch_size: sequences of --max-tokens tokens a step; of shorter ones as many more
        max_tokens: tokens of a sequence; longer texts are cut into several
        num_held_out: sequences that are never trained on, to measure on
        patience: measurements in a row without a lower KL after which it ends; the best is kept
        autocast: compute float32 weights in bfloat16 where the processor or GPU has it
        seed: seed of the adapter, of the order of the texts and of --limit
    """

    path: str | None = incidental(None, basic=True, value="FILE[:NAME]")
    tasks: str | None = incidental(None, basic=True, value="TASKS", alias="dataset")
    text: str | None = incidental(None, basic=True, value="FILE,...")
    data_dir: str | None = incidental(None)
    limit: int | None = basic(None, minimum=2)
    rank: int = basic(16, minimum=1)
    first_layer: int = basic(0, minimum=0)
    steps: int | None = basic(None, minimum=1)
    minutes: float | None = basic(None, above=0.0)
    learning_rate: float = setting(2e-3, above=0.0)
    batch_size: int = setting(2, minimum=1)
    max_tokens: int = setting(512, minimum=2)
    num_held_out: int = setting(64, minimum=1)
    patience: int = setting(3, minimum=1)
    autocast: bool = setting(True)
    seed: int = setting(0, minimum=0)

    def named_path(self) -> str:
        """Return the file of the path; a ConfigError where none is named."""
        if self.path is None:
            raise ConfigError("no path is given; name a file that says which layers run as --path")
        return self.path
