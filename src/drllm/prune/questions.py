"""The questions and texts that a model is shortened for, in three parts, and as tokens.

*Fit* chooses gaps, and is refitted and learned on. *Check* chooses sets of gaps and says when to
stop and what to keep. Nothing is chosen on what is *held out*, which a verdict alone reads.
"""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drllm.errors import TaskError
from drllm.model.load import BaseModel
from drllm.model.prompts import context_length, encode, encode_continuation, render
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.batch_generation import generate_many
from drllm.prune.loss import Item, make_text_item
from drllm.records.splits import BOUNDS, part_by_hash, question_key
from drllm.search.evaluator import gold_text
from drllm.tasks.base import NoSplitError, Task
from drllm.tasks.examples import KL_REWARD, OPTIONS_REWARD, Example, Prompt, choose
from drllm.tasks.registry import get_tasks
from drllm.tasks.texts import cut_texts, read_texts
from drllm.work.listener import Listener

PARTS = {"fit": ("search", "fit"), "check": ("select",), "held out": ("test",)}
"""Part → the splits of a task that it has."""
MAX_PROMPTS = 200  # prompts without answers of each part that the full model answers
MAX_TEXTS = 400  # held-out texts of a source
ANSWERS_AT_ONCE = 32


@dataclass(frozen=True)
class Questions:
    """Questions and texts by part.

    Attributes:
        tasks: The tasks.
        examples: Part → for each task, its questions.
        texts: Part → name of a source → its texts.
    """

    tasks: Sequence[Task]
    examples: Mapping[str, Sequence[Sequence[Example]]]
    texts: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)

    def count(self, part: str) -> dict[str, int]:
        """Return how many questions and texts a part has, by task and source."""
        counts = {}
        for task, examples in zip(self.tasks, self.examples[part], strict=True):
            counts[task.name] = len(examples)
        for name, texts in self.texts[part].items():
            counts[name] = len(texts)
        return counts


def read_questions(
    tasks: Task | str | Sequence[Task | str],
    texts: str | Sequence[str] | None = None,
    *,
    data_dir: str | None = None,
    trust_task_code: bool = False,
    seed: int = 0,
) -> Questions:
    """Read questions and texts, and divide them.

    A question that several tasks have stays in the last of its parts.

    Args:
        tasks: Tasks, names of tasks, or files of questions.
        texts: Texts, or the names of files and data sets in one string.
        data_dir: The folder of published data sets; None reads them from the hub.
        trust_task_code: Whether task files of the harness may run code.
        seed: Seed of the choice of prompts.

    Raises:
        TaskError: A task is unknown, or a part of it is empty; or two sources have the same name.
    """
    all_tasks: list[Task] = []
    for task in [tasks] if isinstance(tasks, (str, Task)) else tasks:
        if isinstance(task, str):
            all_tasks += get_tasks(task, trust_code=trust_task_code)
        else:
            all_tasks.append(task)
    examples: dict[str, list[list[Example]]] = {part: [] for part in PARTS}
    taken: set[str] = set()
    for part, splits in reversed(PARTS.items()):
        in_part: set[str] = set()
        for task in all_tasks:
            found = []
            for split in splits:
                with contextlib.suppress(NoSplitError):
                    found += task.examples(split, None if data_dir is None else Path(data_dir))
            new = [each for each in found if question_key(each.question) not in taken]
            if not task.has_answers:
                new = choose(new, MAX_PROMPTS, seed)
            if not new:
                raise TaskError(
                    f"task {task.name!r} has no questions of its own for the part {part!r}; give a "
                    f"few hundred questions, as a file (FILE.jsonl) or a task with training "
                    f"questions"
                )
            in_part.update(question_key(each.question) for each in new)
            examples[part].append(new)
        taken |= in_part
    sources: Mapping[str, Sequence[str]] = {}
    if isinstance(texts, str):
        sources = read_texts(texts, None, seed)
    elif texts:
        sources = {"texts": texts}
    divided: dict[str, dict[str, list[str]]] = {part: {} for part in PARTS}
    for name, of_source in sources.items():
        if name in [task.name for task in all_tasks]:
            raise TaskError(
                f"the questions and a file of texts are both called {name!r}; rename one of them"
            )
        for part in PARTS:
            divided[part][name] = []
        for text in dict.fromkeys(of_source):
            composed = unicodedata.normalize("NFC", text)  # copies in another form fall together
            split = part_by_hash(f"shrink:{composed}", BOUNDS["own"])
            part = next(part for part, splits in PARTS.items() if split in splits)
            divided[part][name].append(text)
        for part in PARTS:
            if not divided[part][name]:
                raise TaskError(
                    f"{name} has {len(of_source)} texts, too few to fit on some, check on some and "
                    f"hold some out; give more"
                )
        divided["held out"][name] = choose(divided["held out"][name], MAX_TEXTS, seed)
    return Questions(all_tasks, examples, divided)


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
    room = min(context_length(base.model) or max_tokens, max_tokens) - longest
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
