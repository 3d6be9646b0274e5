"""The questions and texts that a model is shortened for, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drllm.errors import TaskError
from drllm.model.load import BaseModel
from drllm.model.prompts import context_length, encode, encode_continuation, render
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.batch_generation import generate_many
from drllm.prune.loss import Item, make_text_item
from drllm.search.evaluator import gold_text
from drllm.tasks.base import Task
from drllm.tasks.examples import KL_REWARD, OPTIONS_REWARD, Example, Prompt
from drllm.tasks.parts import Questions
from drllm.tasks.texts import cut_texts
from drllm.work.listener import Listener

ANSWERS_AT_ONCE = 32


def make_prompt(task: Task, example: Example) -> Prompt:
    """Return the prompt that a question is learned with: its options, or its right answer.

    A worked solution follows the plain question.
    """
    if example.solution and OPTIONS_REWARD not in task.rewards:
        return Prompt(
            text=f"Question: {example.question}\nAnswer:",
            reward=OPTIONS_REWARD,
            answer=example.answer,
            continuations=(f" {example.solution}",),
            gold=0,
        )
    reward = OPTIONS_REWARD if OPTIONS_REWARD in task.rewards else task.check_reward(None)
    return task.prompt(example, reward)


def make_items(
    base: BaseModel,
    questions: Questions,
    part: str,
    *,
    max_tokens: int,
    listener: Listener | None = None,
) -> dict[str, list[Item]]:
    """Return the questions and texts of a part as tokens, by task and source.

    Prompts without answers are answered by the full model first, and count as texts.

    Args:
        base: The full model.
        questions: The questions and texts.
        part: `fit`, `check` or `held out`.
        max_tokens: Maximum tokens of a text; longer ones are cut. Longer questions are left out.
        listener: Receives progress and notes.
    """
    listener = listener or Listener()
    max_tokens = min(max_tokens, context_length(base.model) or max_tokens)
    items: dict[str, list[Item]] = {}
    num_long = 0
    for task, examples in zip(questions.tasks, questions.examples[part], strict=True):
        if not task.has_answers:
            items[task.name] = _answer_prompts(base, task, examples, max_tokens, listener)
            continue
        items[task.name] = []
        for example in examples:
            item = _make_item(base, make_prompt(task, example))
            if len(item.context) + max(map(len, item.answers)) > max_tokens:
                num_long += 1
            else:
                items[task.name].append(item)
        if not items[task.name]:
            raise TaskError(
                f"all questions of {task.name} have over {max_tokens} tokens; give --max-tokens"
            )
    if num_long:
        listener.note(
            f"{num_long} questions have over {max_tokens} tokens and are left out (--max-tokens)"
        )
    for name, texts in questions.texts.get(part, {}).items():
        tokens = [tuple(encode(base.tokenizer, text)) for text in texts]
        items[name] = [make_text_item(part) for part in cut_texts(tokens, max_tokens)]
    return items


def _make_item(base: BaseModel, prompt: Prompt) -> Item:
    """Return a question with its options or its right answer as tokens."""
    tokenizer = base.tokenizer
    text = render(tokenizer, prompt.content, chat=prompt.chat)
    context = tuple(encode(tokenizer, text))
    if not prompt.continuations:
        answer = encode_continuation(tokenizer, text, gold_text(prompt, tokenizer))
        end = tokenizer.eos_token_id
        if end is not None:
            answer = [*answer, end]  # so that the answer ends where the right one does
        return Item(context, (tuple(answer),))
    answers = [encode_continuation(tokenizer, text, each) for each in prompt.continuations]
    unscored = [len(encode_continuation(tokenizer, text, each)) for each in prompt.unscored]
    lengths: tuple[int, ...] = ()
    if len(answers) > 1:
        lengths = tuple(len(each.strip()) for each in prompt.continuations)
    return Item(context, tuple(map(tuple, answers)), prompt.gold or 0, lengths, tuple(unscored))


def _answer_prompts(
    base: BaseModel, task: Task, examples: Sequence[Example], max_tokens: int, listener: Listener
) -> list[Item]:
    """Let the full model answer prompts without answers."""
    prompts: list[Any] = [task.prompt(example, KL_REWARD).content for example in examples]
    rows = [encode(base.tokenizer, render(base.tokenizer, each, chat=True)) for each in prompts]
    longest = max(map(len, rows))
    room = max_tokens - longest
    if room < 1:
        raise TaskError(
            f"a prompt of {task.name} has {longest} tokens, which leaves no room for an answer "
            f"within {max_tokens}; give --max-tokens"
        )
    items: list[Item] = []
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    try:
        with listener.progress(f"answering prompts of {task.name}", "prompts") as on_progress:
            for start in range(0, len(prompts), ANSWERS_AT_ONCE):
                block = prompts[start : start + ANSWERS_AT_ONCE]
                answers = generate_many(routed, block, max_new_tokens=room)
                for tokens, answer in zip(rows[start:], answers, strict=False):
                    if answer.tokens:
                        items.append(make_text_item((*tokens, *answer.tokens), len(tokens)))
                on_progress(start + len(block), len(prompts))
    finally:
        routed.detach()
    return items
