"""Settings of `drllm learn`, which repairs a shortened model and teaches it right answers."""

from dataclasses import dataclass

from drllm.config.fields import basic, setting
from drllm.config.questions import QuestionsConfig


@dataclass(frozen=True, kw_only=True)
class LearnConfig(QuestionsConfig):
    """The repair of a shortened model: a refit, then training on right answers."""

    repairs: str = setting(
        "refit,lora",
        placeholder="NAME,...",
        help="repairs in their order; one that doesn't help on the check part is undone",
    )
    minutes: float = basic(
        20.0,
        minimum=0.0,
        placeholder="MINUTES",
        help="minutes to learn right answers; 0 for the refit alone, whose time isn't counted",
    )
    steps: int | None = setting(None, minimum=1, help="steps of learning, in place of --minutes")
    rank: int = setting(16, minimum=1, help="rank of LoRA")
    refit_tokens: int = setting(
        50_000, minimum=2, placeholder="TOKENS", help="maximum tokens that the refit is solved on"
    )
    learning_rate: float = setting(5e-4, above=0.0, help="peak learning rate of LoRA")
    batch_size: int = setting(4, minimum=1, help="questions a step")
