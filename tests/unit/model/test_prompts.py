"""Prompts as the model reads them: the date that a chat template prints is always the same."""

import copy

import pytest

from drllm.model.prompts import PLACE, PromptForm, infer_form, render

TURNS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LLAMA = """{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n" }}"""
"""How the template of Llama 3.2 comes by its date."""


@pytest.fixture
def reader(tiny_tokenizer):
    """A function that renders a question under a template, as we do and as transformers does."""
    tokenizer = copy.deepcopy(tiny_tokenizer)

    def read(template):
        tokenizer.chat_template = template
        turns = [{"role": "user", "content": "Why?"}]
        plain = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return render(tokenizer, "Why?", chat=True), plain

    return read


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (LLAMA + TURNS, "Today Date: 26 Jul 2024\nWhy?"),
        ("{{ strftime_now('%Y-%m-%d') }} " + TURNS, "2024-07-26 Why?"),
        ("{{ strftime_now('%B %-d, %Y') }} " + TURNS, "July 26, 2024 Why?"),
        ("{{ strftime_now('%A, %-m/%y, %H:%M:%S%Z') }} " + TURNS, "Friday, 7/24, 00:00:00 Why?"),
        ("{{ strftime_now('%d') | int - 1 }} " + TURNS, "25 Why?"),
        ("{% set f = '%d.' + '%m.' %}{{ strftime_now(f) }} " + TURNS, "26.07. Why?"),
        (
            "{% macro head() %}On {{ strftime_now('%d %b') }}: {% endmacro %}{{ head() }}" + TURNS,
            "On 26 Jul: Why?",
        ),
    ],
    ids=["Llama 3.2", "ISO", "no zero", "all", "number", "made up", "in a macro"],
)
def test_a_template_that_prints_the_date_reads_the_same_tomorrow(reader, set_date, template, text):
    set_date(2031, 11, 12)
    today, plain_today = reader(template)
    set_date(2031, 12, 13)
    tomorrow, plain_tomorrow = reader(template)
    assert text == today == tomorrow
    assert plain_today != plain_tomorrow, "the template must print the date"


def test_a_date_that_the_template_names_itself_stays(reader):
    template = "{% if not date_string is defined %}{% set date_string = '01 Jan 2025' %}{% endif %}"
    text, plain = reader(template + "{{ date_string }} " + TURNS)
    assert text == plain == "01 Jan 2025 Why?"


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n  {% if true %}\n", "  {%- if true -%}\n "])
def test_but_for_the_date_a_template_is_rendered_as_transformers_renders_it(
    reader, set_date, start
):
    set_date(2024, 7, 26)
    end = "{% endif %}" if "if" in start else ""
    text, plain = reader(start + "{{ strftime_now('%d %b %Y') }}" + end + "\n" + TURNS + "\n")
    assert text == plain
    assert text.strip().startswith("26 Jul 2024")


ASKED = ["What is ice?", "Who wrote {it}?"]


@pytest.mark.parametrize(
    ("chat", "template", "expected"),
    [
        (False, "Question: {prompt}\nAnswer:", "Question: {prompt}\nAnswer:"),
        (True, PLACE, PLACE),
        (True, "{prompt} Answer in \\boxed{}.", "{prompt} Answer in \\boxed{}."),
    ],
)
def test_the_form_of_prompts_is_found_in_what_the_model_read(
    tiny_tokenizer, chat, template, expected
):
    texts = [template.replace(PLACE, question) for question in ASKED]
    read = [render(tiny_tokenizer, text, chat=chat) for text in texts]
    found = infer_form(tiny_tokenizer, zip(ASKED, read, strict=True))
    assert found == PromptForm(chat=chat, template=expected)
    again = [render(tiny_tokenizer, found.fill(q), chat=found.chat) for q in ASKED]
    assert again == read


def test_prompts_of_several_forms_agree_on_the_chat_template_at_most(tiny_tokenizer):
    plain = [("a", "Q: a"), ("b", "Say b.")]
    assert infer_form(tiny_tokenizer, plain) == PromptForm(chat=False)
    chat = ("c", render(tiny_tokenizer, "c", chat=True))
    assert infer_form(tiny_tokenizer, [*plain, chat]) is None
    assert infer_form(tiny_tokenizer, []) is None


def test_conversations_that_begin_with_a_system_message_are_known_for_what_they_are(tiny_tokenizer):
    tokenizer = copy.copy(tiny_tokenizer)
    turn = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    tokenizer.chat_template = f"{turn}<assistant>"
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is ice?"}]
    asked = "system: Be brief.\nuser: What is ice?"
    read = render(tokenizer, said, chat=True)
    assert infer_form(tokenizer, [(asked, read)]) == PromptForm(chat=True)
    assert infer_form(tokenizer, [("What is ice?", "What is ice?")]) == PromptForm(chat=False)


def test_a_prompt_that_has_its_form_already_stays_as_it_is():
    form = PromptForm(chat=False, template="Question: {prompt}\nAnswer:")
    assert form.fill("What is ice?") == "Question: What is ice?\nAnswer:"
    assert form.fill(form.fill("What is ice?")) == form.fill("What is ice?")


def test_an_answer_to_a_plain_prompt_ends_where_the_next_one_would_begin():
    form = PromptForm(chat=False, template="Question: {prompt}\nAnswer:")
    assert form.cut_answer(" Ice.\n\nQuestion: Why?\nAnswer: So.") == " Ice.\n"
    assert PromptForm(chat=True).cut_answer("a\nQuestion: b") == "a\nQuestion: b"
