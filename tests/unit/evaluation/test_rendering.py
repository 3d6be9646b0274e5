"""How an evaluation asks: a file's generated answers as a search asks for them, options alone."""

import copy
import json
from dataclasses import replace

import pytest

from drllm.config import EvaluateConfig
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.rendering import TaskRenderer
from drllm.model.prompts import encode, render
from drllm.tasks.registry import get_task
from drllm.work.store import ResultStore

GRADED = {"question": "What is %d and one?", "answer": "%d", "grader": "exact"}
OPTIONS = {"question": "What is %d and one?", "choices": ["%d", "no"], "answer": 0}


@pytest.fixture
def render_file(tiny_base, tmp_path):
    """A function that renders a file with forty such rows; returns it, its prompts and the base."""

    def make(row, *, has_template=True, **settings):
        base = tiny_base()
        if not has_template:
            tokenizer = copy.deepcopy(base.tokenizer)
            tokenizer.chat_template = None
            base = replace(base, tokenizer=tokenizer)
        file = tmp_path / "sums.jsonl"
        lines = [json.dumps(row).replace("%d", str(number)) + "\n" for number in range(40)]
        file.write_text("".join(lines))
        task = get_task(str(file))
        store = ResultStore(tmp_path / "store", {}, stage="evaluate")
        store.open()
        renderer = TaskRenderer(
            lm=RoutedLM(base),
            config=EvaluateConfig(**settings),
            store=store,
            may_know_questions=False,
        )
        rendered = renderer.render(task, "test", None)
        prompts = [task.prompt(example, task.rewards[0]) for example in rendered.task.examples]
        return rendered, prompts, base.tokenizer

    return make


@pytest.mark.parametrize("has_template", [True, False])
def test_generated_answers_to_a_file_are_asked_for_as_in_a_search(render_file, has_template):
    rendered, prompts, tokenizer = render_file(GRADED, has_template=has_template)
    as_searched = [encode(tokenizer, render(tokenizer, each.text, chat=True)) for each in prompts]
    assert rendered.prompt_tokens == as_searched
    is_chat = all("assistant: " in tokenizer.decode(tokens) for tokens in as_searched)
    assert is_chat == has_template


def test_the_right_answer_stands_where_the_model_answers_in_a_chat(render_file):
    rendered, prompts, tokenizer = render_file(GRADED)
    text = rendered.text(0)
    assert list(text.context) == rendered.prompt_tokens[0]
    assert tokenizer.decode(text.continuation) == prompts[0].answer


def test_options_are_scored_without_the_chat_template(render_file):
    rendered, prompts, tokenizer = render_file(OPTIONS)
    assert rendered.prompt_tokens == [encode(tokenizer, each.text) for each in prompts]


@pytest.mark.parametrize("row", [GRADED, OPTIONS], ids=["generated", "options"])
@pytest.mark.parametrize("chat", [True, False])
def test_the_setting_decides_where_it_is_given(render_file, row, chat):
    rendered, prompts, tokenizer = render_file(row, chat=chat)
    as_set = [encode(tokenizer, render(tokenizer, each.text, chat=chat)) for each in prompts]
    assert rendered.prompt_tokens == as_set
