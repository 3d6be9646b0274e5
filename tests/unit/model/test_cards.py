"""Model cards: metadata that the hub reads, and values that can't break out of the text."""

import pytest
from huggingface_hub import ModelCard, ModelCardData

from drllm.model.cards import render_card


@pytest.fixture
def render(tmp_path):
    """Render a template's text with values."""

    def render(text: str, **values: object) -> str:
        template = tmp_path / "card.md.j2"
        template.write_text(text)
        return render_card(template, ModelCardData(library_name="drllm", tags=["a: b"]), **values)

    return render


def test_the_hub_reads_the_metadata_above_the_text(render):
    card = ModelCard(render("# {{ title }}\n", title="Routers"))
    assert card.data.to_dict() == {"library_name": "drllm", "tags": ["a: b"]}
    assert card.text.strip() == "# Routers"


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("`{{ value | code }}`", {"value": "a`b\n\n# Great"}, "`a'b # Great`"),
        ("{{ value | line }}", {"value": "<b>a`b\n\x1b"}, r"&lt;b&gt;a\`b \\x1b"),
        ("{{ value | line }}", {"value": 5}, "5"),
        ("{{ value | number }}", {"value": 0.123456}, "0.1235"),
        ("{{ value | number }}", {"value": None}, "–"),
    ],
)
def test_values_are_written_on_one_line_and_numbers_in_four_digits(render, text, values, expected):
    assert render(text, **values).endswith(f"---\n\n{expected}")
