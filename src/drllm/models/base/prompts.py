"""From a prompt's text to the tokens that a model reads: chat template and special tokens.

Every stage encodes through here, so that routers are trained on exactly what they will read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

from jinja2 import TemplateError
from torch import Tensor

from drllm.errors import ConfigError
from drllm.models.base.devices import on_device

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation so far: messages with `role` and `content`."""

CLOCK = datetime(2024, 7, 26)
"""The date that chat templates print: the one that Llama 3.1's own template names. With today's
date a prompt would change tomorrow, for a resumed search and for routers trained on it."""
DIRECTIVES = ("%-d", "%-m", "%-H", "%-I", *(f"%{char}" for char in "aAbBcdfGHIjmMpSuUVwWxXyYzZ"))
"""What a template's format of a date may hold."""

PLACE = "{prompt}"  # stands in a template for the prompt; other braces are text


@dataclass(frozen=True, slots=True)
class PromptForm:
    """The form in which prompts are given to the model."""

    chat: bool  # whether they go through the tokenizer's chat template
    template: str = PLACE  # the text around `PLACE`

    def put(self, text: str) -> str:
        """Put a prompt into the template; one that is in it already stays as it is."""
        before, _, after = self.template.partition(PLACE)
        is_put = text.startswith(before) and text.endswith(after)
        return text if is_put else f"{before}{text}{after}"

    @property
    def next_prompt(self) -> str | None:
        """How the next prompt would begin after an answer; None where that isn't known."""
        before = self.template.partition(PLACE)[0].strip()
        return None if self.chat or not before else f"\n{before}"

    def options(self, tokenizer: Any) -> dict[str, Any]:
        """Return the options of `generate` that make it continue a plain text by one answer.

        A model that was trained to chat may end a plain text at once, or go on with further
        questions and answers.
        """
        if self.next_prompt is None:
            return {}
        return {"min_new_tokens": 1, "stop_strings": [self.next_prompt], "tokenizer": tokenizer}

    def answer(self, text: str) -> str:
        """Cut an answer off where the next prompt begins."""
        return text.partition(self.next_prompt)[0] if self.next_prompt else text

    def __str__(self) -> str:
        """Describe the form in words."""
        shown = "as it is" if self.template == PLACE else repr(self.template)
        return f"{shown}, {'through' if self.chat else 'without'} the chat template"


def form_of(tokenizer: Any, questions: Iterable[tuple[str, str]]) -> PromptForm | None:
    """Return the form in which questions were put, from pairs of a question and what was read.

    Its template is `PLACE` alone where they were put in several. It is None where some went through
    the chat template and others didn't, or where there are no questions.
    """
    try:
        before, _, after = render(tokenizer, PLACE, chat=True).partition(PLACE)
    except ConfigError:  # a template that takes no plain question
        before = after = ""
    forms: set[PromptForm] = set()
    for question, text in questions:
        # A conversation may begin in any way, and its text isn't there as it stands.
        begins = text.startswith(before) or (bool(after) and question not in text)
        is_chat = bool(before) and begins and text.endswith(after)
        inner = text[len(before) : len(text) - len(after)] if is_chat else text
        first, match, rest = inner.partition(question)
        forms.add(PromptForm(is_chat, f"{first}{PLACE}{rest}" if match else PLACE))
    chats = {form.chat for form in forms}
    if len(chats) != 1:
        return None
    return forms.pop() if len(forms) == 1 else PromptForm(chats.pop())


def render(tokenizer: Any, prompt: Prompt, *, chat: bool) -> str:
    """Return the text that the model reads of a text or a conversation, the same on every day.

    `chat` puts a text into the user's turn of the tokenizer's chat template, where it has one.

    A conversation without a template to put it into, and a prompt that the template refuses, are
    a ConfigError.
    """
    template = chat and getattr(tokenizer, "chat_template", None)
    if isinstance(prompt, str):
        if not template:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    elif not template:
        why = "the tokenizer has none" if chat else "chat is turned off"
        raise ConfigError(f"a conversation needs a chat template, and {why}; give a text instead")
    try:
        rendered: str = tokenizer.apply_chat_template(
            list(prompt),
            chat_template=with_fixed_clock(tokenizer.get_chat_template()),
            tokenize=False,
            add_generation_prompt=True,
        )
    except TemplateError as error:
        raise ConfigError(
            f"the model's chat template refuses the prompt: {error}; see its model card"
        ) from error
    return rendered


def with_fixed_clock(template: str) -> str:
    """Return a chat template to which it is always `CLOCK`.

    The only clock that a template can see is the function `strftime_now`, which transformers
    hands it. It is replaced by a macro in front: transformers' newer versions let no function in
    among the arguments. A template without it comes back as it is.

    Source: ours (docs/differences.md, D-26).
    """
    if "strftime_now" not in template:
        return template
    filled = ""
    for directive in DIRECTIVES:
        text = CLOCK.strftime(directive.replace("-", ""))
        if "-" in directive:  # without leading zeros, which not every C library can do
            text = text.lstrip("0") or "0"
        filled += f".replace({directive!r}, {text!r})"
    # The line's end goes with the tag (`trim_blocks`), and the template begins as it would alone.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filled} }}}}{{% endmacro %}}\n{template}"


def context_length(model: Any) -> int | None:
    """Return how many tokens a model can read, or None where its config names no limit."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a rendered prompt.

    Special tokens are added as the tokenizer is configured to, except where the text brings its
    own (a rendered chat template starts with the begin-of-sequence token).
    """
    bos = getattr(tokenizer, "bos_token", None)
    has_bos = bos is not None and text.startswith(bos)
    tokens: list[int] = tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
    return tokens


def encode_continuation(tokenizer: Any, text: str, continuation: str) -> list[int]:
    """Return the tokens that a continuation adds to those of a rendered prompt before it.

    Source: the rule of lm-evaluation-harness (`TemplateLM._encode_pair`); its special case for
        prompts that end in white space never arises with plain prompts of ours.
    """
    return encode(tokenizer, text + continuation)[len(encode(tokenizer, text)) :]


def left_padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Return token rows as one batch `[B, T]`, padded on the left with 0, and its mask."""
    width = max(len(row) for row in rows)
    ids = [[0] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return on_device(ids, device), on_device(mask, device)
