"""Texts that the model writes by itself."""

from drllm.tuning import own_texts
from drllm.tuning.own_texts import write_own_texts


def test_the_model_writes_as_many_tokens_as_needed_and_the_same_for_a_seed(routed, monkeypatch):
    monkeypatch.setattr(own_texts, "MAX_NEW_TOKENS", 12)
    monkeypatch.setattr(own_texts, "TEXTS_AT_ONCE", 4)
    texts = write_own_texts(routed, 60, seed=0)
    assert sum(len(routed.tokenizer(text)["input_ids"]) for text in texts) >= 60
    assert write_own_texts(routed, 60, seed=0) == texts
    assert write_own_texts(routed, 60, seed=1) != texts


def test_texts_begin_with_a_word_of_the_vocabulary(routed, monkeypatch):
    monkeypatch.setattr(own_texts, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(own_texts, "TEXTS_AT_ONCE", 4)
    for text in write_own_texts(routed, 1, seed=0):
        assert text[0].isalpha()
