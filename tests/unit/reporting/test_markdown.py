"""Texts in a report's Markdown: whatever they hold, a reader sees them as they are."""

import html
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from drllm.reporting import markdown
from drllm.reporting.markdown import Tile, write_code, write_steps, write_table

MARKUP = "<b> </b> &amp; &lt; ` * _ __ [a](b) ![c](d) | \\ ~~ # - + = . ) 1. > ! : --- === a b 木"
texts = st.lists(st.sampled_from(MARKUP.split()) | st.text(max_size=3), min_size=1).map(" ".join)
texts |= st.text(st.sampled_from("ab1 <>&`*_[]()|\\~#-+=.!:\n"), min_size=1)
visible = texts.filter(lambda text: text.split() and text.replace("\n", "").isprintable())
READER = MarkdownIt("commonmark", {"html": True}).enable("table")
"""Renders Markdown as a reader of `report.md` does, who lets HTML through."""
WRITERS = {
    "paragraph": markdown.write_paragraph,
    "list": lambda text: markdown.write_list([text]),
    "verdict": lambda text: markdown.write_verdicts([("", text)]),
    "verdict on a task": lambda text: markdown.write_verdicts([(text, "Yes.")]),
    "tile": lambda text: markdown.write_tiles([Tile("a", text, "b")]),
    "cell": lambda text: write_table("about", "a|b", [[text, "c"]]),
    "bold cell": lambda text: write_table("about", "a|b", [[text, "c"]], bold=text),
    "caption": lambda text: write_table(text, "a|b", [["c", "d"]]),
    "step": lambda text: write_steps([(text, "drllm")]),
    "command": lambda text: write_steps([("Do:", text)]),
    "code": lambda text: write_code("It:", text),
    "title of code": lambda text: write_code(text, "it"),
}
"""Part of a report → a function that writes one with a text in it."""
ALLOWED = {"p", "ul", "ol", "li", "blockquote", "strong", "em", "code", "pre"}
ALLOWED |= {"table", "thead", "tbody", "tr", "th", "td"}


def read(page: str) -> str:
    """Return what is read on a page, without spaces."""
    return "".join(html.unescape(re.sub(r"<[^>]*>", "", page)).split())


@pytest.mark.parametrize("part", WRITERS)
@settings(max_examples=40)
@given(text=visible)
@example(text="---")
@example(text="__init__ and _x_")
@example(text="1. <script>alert(1)</script>")
@example(text="a\\|b`")
def test_any_text_is_shown_unchanged_and_adds_no_markup(part, text):
    page = READER.render(WRITERS[part](text))
    plain = READER.render(WRITERS[part]("letters"))
    assert re.findall(r"<[^>]*>", page) == re.findall(r"<[^>]*>", plain)
    assert set(re.findall(r"</?(\w+)", page)) <= ALLOWED
    assert read(page) == read(plain).replace("letters", "".join(text.split()))


def test_a_column_that_repeats_itself_goes_into_the_caption_and_an_empty_one_nowhere():
    rows = [["x", "1", "same", "–"], ["y", "2", "same", "–"]]
    text = write_table("About.", "name|number|word|nothing", rows, "word", bold="y")
    assert text.splitlines() == [
        "*About. The same in every row: word same.*",
        "",
        "| name | number |",
        "| --- | ---: |",
        "| x | 1 |",
        "| **y** | **2** |",
    ]
    same = write_table("About.", "name|word", [["x", "same"], ["y", "same"]], "word")
    assert same == "*About. The same in every row: word same.*"
