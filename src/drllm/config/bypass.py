"""Settings of `drllm bypass`, which fits linear maps that run in place of skipped layers."""

from dataclasses import dataclass

from drllm.config.constants import DATA_DIR_HELP, TRUST_HELP
from drllm.config.fields import Settings, basic, incidental, setting


@dataclass(frozen=True, kw_only=True)
class BypassConfig(Settings):
    """The fit of a bypass: which texts, how many tokens, and which rank."""

    tasks: str | None = incidental(
        None,
        basic=True,
        placeholder="TASKS",
        alias="dataset",
        help="tasks, separated by commas, whose questions (splits search and fit) with the right "
        "answers are texts to fit on",
    )
    text: str | None = incidental(
        None,
        basic=True,
        placeholder="FILE,...",
        help="more texts to fit on: files of rows with a field 'text', .txt files with a text per "
        "paragraph, hub data sets OWNER/NAME[:CONFIG[:SPLIT]], or 'builtin_texts'; mix the kinds "
        "of text that the model is used for",
    )
    data_dir: str | None = incidental(None, help=DATA_DIR_HELP)
    trust_task_code: bool = incidental(False, help=TRUST_HELP)
    limit: int | None = basic(
        None,
        minimum=2,
        help="maximum questions or texts of each source, drawn at random with --seed",
    )
    tokens: int = basic(
        50_000,
        minimum=2,
        placeholder="TOKENS",
        help="maximum tokens to fit on, drawn evenly from the sources",
    )
    rank: int = basic(64, minimum=1, help="rank of the maps, at most the hidden size")
    max_tokens: int = setting(
        512,
        minimum=2,
        placeholder="TOKENS",
        help="maximum tokens of a sequence; longer texts are split",
    )
    seed: int = setting(0, minimum=0, help="seed of the tokens that are drawn and of --limit")
