"""The settings of the training; their numbers are the paper's unless said otherwise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from drllm.config.settings import Settings, setting

LOSSES = ("focal", "cross_entropy")
CLASS_WEIGHTS = ("effective_number", "none")
FEATURE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """The routers and their training; numbers are the paper's unless said otherwise."""

    num_epochs: int = setting(25, "passes over the targets (paper: 25)", minimum=1)
    learning_rate: float = setting(1e-3, "peak of the cosine schedule (paper: 1e-3)", above=0.0)
    weight_decay: float = setting(0.01, "AdamW weight decay (paper: 0.01)", minimum=0.0)
    warmup_steps: int = setting(500, "steps of linear warm-up (paper: 500)", minimum=0)
    gradient_accumulation: int = setting(
        16, "examples an optimiser step (paper: 1 x 16)", minimum=1
    )
    num_windows: int = setting(
        8, "windows W a router averages the prompt into (paper: 8)", minimum=1
    )
    feature_dtype: str = setting(
        "float32", "how routers' inputs are stored; bfloat16 halves them", choices=FEATURE_DTYPES
    )
    router_width: int = setting(128, "hidden width of a router (paper: 128)", minimum=1)
    loss: str = setting("focal", "what is minimised (paper: focal)", choices=LOSSES)
    gamma: float = setting(
        2.0, "focal loss exponent (paper: 2)", minimum=0.0, idle=("loss", "cross_entropy")
    )
    class_weights: str = setting(
        "effective_number",
        "whether rare decisions weigh more (as in the paper)",
        choices=CLASS_WEIGHTS,
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
    report_to: str | None = setting(
        None,
        "trackers of accelerate (comma list), such as tensorboard,wandb; off by default",
        decisive=False,
    )

    @property
    def trackers(self) -> list[str]:
        """The names in `report_to`, each once."""
        named = [] if self.report_to is None else self.report_to.split(",")
        return list(dict.fromkeys(name.strip() for name in named))

    def by_seed(self, output: Path) -> dict[Path, TrainConfig]:
        """Return the folder of every seed's routers, with the settings of that training alone.

        Args:
            output: Of the whole training; the first seed's routers lie in it, those of a further
                seed S in `seed_S` below it.
        """
        seeds = range(self.seed, self.seed + self.num_seeds)
        return {
            output if seed == self.seed else output / f"seed_{seed}": replace(
                self, seed=seed, num_seeds=1
            )
            for seed in seeds
        }
