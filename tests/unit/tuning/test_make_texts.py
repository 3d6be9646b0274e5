"""The files of texts that the studies of static paths use."""

import gzip
import json

import pytest

ARC_ROW = {"choices": {"text": ["no", "yes"], "label": ["A", "B"]}, "answerKey": "B"}


@pytest.fixture
def data_dir(tmp_path):
    """A data folder with twelve rows of each set."""
    rows = {
        "gsm8k/train": {"answer": "#### 7"},
        "squad_v2/validation_subset1000": {"question": "?"},
        "hellaswag/validation_subset1000": {"choices": ["wrong", "right"], "label": 1},
        "arc_easy/train": ARC_ROW,
        "arc_easy/validation": ARC_ROW,
        "mmlu/validation": {"choices": ["wrong", "right"], "answer": 1},
        "winogrande/validation": {"option1": "cat", "option2": "dog", "answer": "2"},
    }
    for name, row in rows.items():
        file = tmp_path / f"{name}.jsonl.gz"
        file.parent.mkdir(exist_ok=True)
        texts = [f"{name} {number}" for number in range(12)]
        lines = []
        for text in texts:
            fields = {"question": text, "context": text, "query": text, "sentence": f"{text} _."}
            lines.append(json.dumps(fields | row))
        with gzip.open(file, "wt", encoding="utf-8") as out:
            out.write("\n".join(lines))
    return tmp_path


@pytest.fixture
def divided(benchmark, data_dir):
    """The texts of each file, three of a kind held out."""
    return dict(benchmark("make_texts").divide_kinds(data_dir, 3))


@pytest.mark.parametrize("kind", ["gsm8k", "squad", "hellaswag", "arc_easy"])
def test_no_text_is_fitted_on_and_held_out(divided, kind):
    assert len(divided[f"held-out/{kind}"]) == 3
    assert len(divided[f"fit/{kind}"]) >= 9
    assert not set(divided[f"held-out/{kind}"]) & set(divided[f"fit/{kind}"])


def test_a_text_has_the_right_answer(divided):
    assert all(text.endswith(" yes") for text in divided["fit/arc_easy"])
    assert all(text.endswith(" right") for text in divided["fit/hellaswag"])
    assert all(text.endswith(" right") for text in divided["unseen/mmlu"])
    assert all(text.endswith(" dog.") for text in divided["unseen/winogrande"])
    assert all(text.endswith("\n#### 7") for text in divided["fit/gsm8k"])
