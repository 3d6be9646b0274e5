"""Settings of `drllm train`, the training of routers."""

from dataclasses import dataclass, replace
from pathlib import Path

from drllm.config.executor import ExecutorConfig
from drllm.config.fields import basic, incidental, setting
from drllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ExecutorConfig):
    """The routers and their training; defaults are the paper's except warm-up and class weights.

    The executor computes the routers' inputs. The training itself runs in this process.
    """

    num_epochs: int = basic(25, minimum=1, help="passes over the targets (paper: 25)")
    learning_rate: float = basic(
        1e-3, above=0.0, help="peak learning rate of the cosine schedule (paper: 1e-3)"
    )
    weight_decay: float = setting(0.01, minimum=0.0, help="AdamW weight decay (paper: 0.01)")
    warmup_steps: float = setting(
        0.1,
        minimum=0.0,
        help="linear warm-up of the learning rate: a share of all steps if below 1, else a number "
        "of steps (paper: 500)",
    )
    gradient_accumulation: int = setting(
        16,
        minimum=1,
        help="targets per optimiser step (paper: 16, in batches of 1)",
    )
    loss_reduction: str = setting(
        "mean",
        choices=("mean", "sum"),
        help="how the losses of a step's targets are combined (released: sum)",
    )
    max_grad_norm: float | None = setting(
        None,
        above=0.0,
        help="clip the gradients of a step to this norm; default: no clipping (released: 1)",
    )
    num_windows: int = basic(
        8,
        minimum=1,
        help="number of windows W over which the prompt is averaged (paper: 8)",
    )
    feature_dtype: str = basic(
        "float32",
        choices=("float32", "bfloat16"),
        help="precision in which the routers' inputs are stored; bfloat16 halves their size on "
        "disk",
    )
    router_width: int = setting(128, minimum=1, help="hidden width of a router (paper: 128)")
    loss: str = setting(
        "focal",
        choices=("focal", "cross_entropy"),
        help="loss function (paper: focal)",
    )
    gamma: float = setting(
        2.0,
        minimum=0.0,
        no_effect_if=("loss", "cross_entropy"),
        help="exponent of the focal loss (paper: 2)",
    )
    class_weights: str = setting(
        "none",
        choices=("effective_number", "none"),
        help="effective_number: rare decisions get a larger weight (paper: effective_number)",
    )
    beta: float = setting(
        0.999,
        minimum=0.0,
        maximum=0.9999999,
        no_effect_if=("class_weights", "none"),
        help="beta of the effective-number class weights (paper: 0.999)",
    )
    validation_fraction: float = setting(
        0.1,
        minimum=0.0,
        maximum=0.5,
        help="share of the targets that are held out of the training to measure on (ours)",
    )
    seed: int = setting(
        0,
        minimum=0,
        help="seed of the initial weights, the order of the targets and the held-out part",
    )
    num_seeds: int = basic(
        1,
        minimum=1,
        help="number of trainings, each with a seed of its own, from --seed upwards; the routers "
        "of every seed S but the first are written to seed_S/",
    )
    report_to: str | None = incidental(
        None,
        basic=True,
        placeholder="NAMES",
        help="trackers of accelerate, separated by commas, e.g. tensorboard,wandb; default: none",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            raise ConfigError(
                f"--warmup-steps is {self.warmup_steps:g}; give a whole number of steps, or a "
                f"share of all steps below 1"
            )

    @property
    def trackers(self) -> list[str]:
        """The names in `report_to`, without duplicates."""
        if self.report_to is None:
            return []
        names = [name.strip() for name in self.report_to.split(",")]
        return list(dict.fromkeys(names))

    def by_seed(self, output: Path) -> "dict[Path, TrainConfig]":
        """Return the settings of the training with each seed, by the folder of its routers.

        The routers of the first seed are written to `output`, and the routers of every other seed S
        to `output/seed_S`.
        """
        configs = {}
        for seed in range(self.seed, self.seed + self.num_seeds):
            folder = output if seed == self.seed else output / f"seed_{seed}"
            configs[folder] = replace(self, seed=seed, num_seeds=1)
        return configs
