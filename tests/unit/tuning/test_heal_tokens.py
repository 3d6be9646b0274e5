"""Texts as tokens, and the prompts that the full path answers."""

import pytest

from drllm.models.routed_model import RoutedModel
from drllm.tasks.examples import Prompt
from drllm.tuning.heal_texts import TextSource
from drllm.tuning.heal_tokens import ANSWERS_AT_ONCE, TextTokenizer
from drllm.work.store import ResultStore
from notes import Notes


@pytest.fixture
def routed(tiny_llama, tiny_tokenizer):
    return RoutedModel(tiny_llama(), tokenizer=tiny_tokenizer)


def tokenize_open(routed, store, num_prompts):
    """Answer prompts without answers, and return the texts and the notes on answers."""
    numbers = range(num_prompts)
    prompts = [Prompt(text=f"Say {number}.", reward="exact", answer="") for number in numbers]
    source = TextSource(name="mine", prompts=prompts, is_open=True)
    notes = Notes()
    texts = TextTokenizer(routed, 100, store, notes).tokenize_sources([source])["mine"]
    return texts, [note for note in notes.texts if note.startswith("answered")]


def test_a_note_says_how_long_the_prompts_took_that_were_answered_now(routed, tmp_path):
    store = ResultStore(tmp_path / "kept", {}, stage="healing")
    texts, notes = tokenize_open(routed, store, ANSWERS_AT_ONCE)
    assert len(texts) == ANSWERS_AT_ONCE
    [note] = notes
    assert note.startswith(f"answered {ANSWERS_AT_ONCE} prompts of mine in ")
    assert 0 <= float(note.split()[-2]) < 60
    more_texts, notes = tokenize_open(routed, store, ANSWERS_AT_ONCE + 1)
    assert more_texts[:ANSWERS_AT_ONCE] == texts
    [note] = notes
    assert note.startswith("answered 1 prompt of mine in ")
    assert tokenize_open(routed, store, ANSWERS_AT_ONCE + 1) == (more_texts, [])
