"""Texts that the model writes by itself."""

import pytest


@pytest.fixture
def script(benchmark, monkeypatch):
    """The script that writes the texts, with short texts."""
    script = benchmark("make_builtin_texts")
    monkeypatch.setattr(script, "MAX_NEW_TOKENS", 12)
    monkeypatch.setattr(script, "TEXTS_AT_ONCE", 4)
    return script


def test_the_model_writes_as_many_tokens_as_needed_and_the_same_for_a_seed(routed, script):
    write_own_texts = script.write_own_texts
    texts = write_own_texts(routed, 60, seed=0)
    assert sum(len(routed.tokenizer(text)["input_ids"]) for text in texts) >= 60
    assert write_own_texts(routed, 60, seed=0) == texts
    assert write_own_texts(routed, 60, seed=1) != texts


def test_texts_begin_with_a_word_of_the_vocabulary(routed, script):
    for text in script.write_own_texts(routed, 1, seed=0):
        assert text[0].isalpha()
