"""Settings of `drllm train`, the training of routers."""

from dataclasses import dataclass, replace
from pathlib import Path

from drllm.config.fields import Settings, basic, incidental, setting
from drllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """The routers and their training; defaults are the paper's except warm-up and class weights."""

    num_epochs: int = basic(25, minimum=1, help="passes over the targets (paper: 25)")
    learning_rate: float = basic(
        1e-3, above=0.0, help="peak learning rate of the cosine schedule (paper: 1e-3)"
    )
    weight_decay: float = setting(0.01, minimum=0.0, help="AdamW weight decay (paper: 0.01)")
    warmup_steps: float = setting(
        0.1,
        minimum=0.0,
        help="linear warm-up: below 1 a share of all steps, else steps (paper: 500)",
    )
    gradient_accumulation: int = setting(
        16,
        minimum=1,
        help="examples per optimiser step (paper: 1 x 16)",
    )
    loss_reduction: str = setting(
        "mean",
        choices=("mean", "sum"),
        help="how the losses of a step's examples are combined (released: sum)",
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
    feature_dtype: str = setting(
        "float32",
        choices=("float32", "bfloat16"),
        help="precision of the stored routers' inputs; bfloat16 halves their size on disk",
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
        help="effective_number: rare decisions weigh more (paper: effective_number)",
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
        help="share of the targets held out to measure on (ours)",
    )
    seed: int = setting(
        0,
        minimum=0,
        help="seed of the initial weights, the order of the targets and the held-out part",
    )
    num_seeds: int = setting(
        1,
        minimum=1,
        help="train with this many seeds, from --seed upwards; routers of each further seed S "
        "are in seed_S/",
    )
    report_to: str | None = incidental(
        None,
        basic=True,
        value="NAMES",
        help="trackers of accelerate, separated by commas, e.g. tensorboard,wandb; default: none",
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
        """The names in `report_to`, without duplicates."""
        named = [] if self.report_to is None else self.report_to.split(",")
        return list(dict.fromkeys(name.strip() for name in named))

    def by_seed(self, output: Path) -> "dict[Path, TrainConfig]":
        """Return the folder of every seed, with the settings of the training with this seed alone.

        The first seed's routers lie in `output`. The routers of a further seed S lie in
        `output/seed_S`.
        """
        first, *more = range(self.seed, self.seed + self.num_seeds)
        folders = {first: output} | {seed: output / f"seed_{seed}" for seed in more}
        return {folder: replace(self, seed=s, num_seeds=1) for s, folder in folders.items()}
