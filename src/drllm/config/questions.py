"""Settings of the questions that a model is shortened for."""

from dataclasses import dataclass

from drllm.config.constants import DATA_DIR_HELP, TASKS_HELP, TEXT_HELP, TRUST_HELP
from drllm.config.fields import Settings, basic, incidental, setting


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig(Settings):
    """Which questions and texts are read, and how they are drawn."""

    tasks: str | None = basic(None, placeholder="TASKS", alias="dataset", help=TASKS_HELP)
    text: str | None = incidental(None, basic=True, placeholder="FILE,...", help=TEXT_HELP)
    data_dir: str | None = incidental(None, help=DATA_DIR_HELP)
    trust_task_code: bool = incidental(False, help=TRUST_HELP)
    max_tokens: int = setting(
        512, minimum=2, placeholder="TOKENS", help="maximum tokens of a question or text"
    )
    seed: int = setting(0, minimum=0, help="seed of all draws")
