"""Render and encode prompts: apply the chat template, add special tokens, pad batches.

All stages use these functions, so routers are trained on exactly the tokens that they will read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

from jinja2 import TemplateError
from torch import Tensor

from drllm.errors import ConfigError
from drllm.model.devices import on_device

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation so far, each with `role` and `content`."""

CLOCK = datetime(2024, 7, 26)
"""The date that all chat templates print, the default of Llama 3.1's template. With today's date a
prompt would change from day to day. A resumed search and trained routers would read new prompts."""
DIRECTIVES = ("%-d", "%-m", "%-H", "%-I", *(f"%{char}" for char in "aAbBcdfGHIjmMpSuUVwWxXyYzZ"))
"""The directives of `strftime` that `with_fixed_clock` replaces."""

PLACE = "{prompt}"  # where a template has the prompt; other braces are ordinary text


@dataclass(frozen=True, slots=True)
class PromptForm:
    """The form in which the model reads prompts."""

    chat: bool  # whether to apply the tokenizer's chat template
    template: str = PLACE  # the text around a prompt, which takes the place of `PLACE`

    def fill(self, text: str) -> str:
        """Put a prompt into the template, unless the text begins and ends like the template."""
        before, _, after = self.template.partition(PLACE)
        if text.startswith(before) and text.endswith(after):
            return text
        return f"{before}{text}{after}"

    @property
    def next_prompt(self) -> str | None:
        """The text with which the model would begin a further prompt after its answer.

        It is None with a chat template, whose end token ends the answer, and if the template has no
        text before the prompt.
        """
        before = self.template.partition(PLACE)[0].strip()
        if self.chat or not before:
            return None
        return f"\n{before}"

    def generation_options(self, tokenizer: Any) -> dict[str, Any]:
        """Return options of `generate` for a single answer after a plain text.

        Without these options a chat model may end a plain text at once, or continue with further
        questions and answers.
        """
        if self.next_prompt is None:
            return {}
        return {"min_new_tokens": 1, "stop_strings": [self.next_prompt], "tokenizer": tokenizer}

    def cut_answer(self, text: str) -> str:
        """Return an answer up to the place where a further prompt begins."""
        if self.next_prompt is None:
            return text
        return text.partition(self.next_prompt)[0]

    def __str__(self) -> str:
        """Describe the form in words."""
        template = "as it is"
        if self.template != PLACE:
            template = repr(self.template)
        preposition = "without"
        if self.chat:
            preposition = "through"
        return f"{template}, {preposition} the chat template"


def infer_form(tokenizer: Any, questions: Iterable[tuple[str, str]]) -> PromptForm | None:
    """Infer the form of prompts from pairs: a question, and the text that the model read for it.

    If the questions have different templates, the form's template is `PLACE` alone. Returns None
    if there are no questions, or if only some of them went through the chat template.
    """
    try:
        before, _, after = render(tokenizer, PLACE, chat=True).partition(PLACE)
    except ConfigError:  # the template refuses a plain question
        before = ""
        after = ""
    forms = {_infer_form(question, text, before, after) for question, text in questions}
    if len(forms) == 1:
        return forms.pop()
    chats = {form.chat for form in forms}
    if len(chats) == 1:
        return PromptForm(chats.pop())
    return None


def _infer_form(question: str, text: str, before: str, after: str) -> PromptForm:
    """Infer the form of one question's text.

    `before` and `after` are the chat template's text around a plain question. Both are empty if
    there is no chat template.
    """
    # A conversation may begin with any message, and its text isn't in the prompt verbatim.
    is_conversation = bool(after) and question not in text
    has_begin = text.startswith(before) or is_conversation
    is_chat = bool(before) and has_begin and text.endswith(after)
    if is_chat:
        text = text[len(before) : len(text) - len(after)]
    template = PLACE
    if question in text:
        template = text.replace(question, PLACE, 1)
    return PromptForm(is_chat, template)


def render(tokenizer: Any, prompt: Prompt, *, chat: bool) -> str:
    """Render a text or a conversation as the model reads it, with the date of `CLOCK`.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The text or conversation.
        chat: Whether to use the chat template. A text becomes the user's turn. If the tokenizer
            has no chat template, a text is returned as it is.

    Raises:
        ConfigError: The prompt is a conversation and there is no template, or the template refuses
            the prompt.
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
    """Return a chat template that always prints the date of `CLOCK`.

    The only clock that a template can see is the function `strftime_now` of transformers. A macro
    at the template's start replaces it, since newer versions of transformers accept no function as
    an argument. A template without the function is returned unchanged.

    Source: ours (docs/differences.md, D-26).
    """
    if "strftime_now" not in template:
        return template
    filled = ""
    for directive in DIRECTIVES:
        text = CLOCK.strftime(directive.replace("-", ""))
        if "-" in directive:  # without leading zeros, which not every C library supports
            text = text.lstrip("0") or "0"
        filled += f".replace({directive!r}, {text!r})"
    # `trim_blocks` removes the line break after the tag, so it adds nothing to the text.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filled} }}}}{{% endmacro %}}\n{template}"


def context_length(model: Any) -> int | None:
    """Return how many tokens a model can read at most; None if its config has no limit."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a rendered prompt.

    The tokenizer adds its special tokens, unless the text has them already: a rendered chat
    template starts with the begin-of-sequence token.
    """
    bos = getattr(tokenizer, "bos_token", None)
    has_bos = bos is not None and text.startswith(bos)
    tokens: list[int] = tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
    return tokens


def encode_continuation(tokenizer: Any, text: str, continuation: str) -> list[int]:
    """Return the tokens that a continuation adds to a rendered prompt's tokens.

    Source: the rule of lm-evaluation-harness (`TemplateLM._encode_pair`), without its special case
        for prompts that end in white space, which ours never do.
    """
    return encode(tokenizer, text + continuation)[len(encode(tokenizer, text)) :]


def pad_left(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Pad rows of tokens on the left with 0. Return the batch and its mask, both `[B, T]`."""
    width = max(len(row) for row in rows)
    ids = [[0] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return on_device(ids, device), on_device(mask, device)
