"""The texts that come with drllm: `--text builtin_texts`."""

from drllm.config import HealConfig
from drllm.tasks.registry import get_task
from drllm.tuning.heal_texts import BUILTIN_TEXTS, BUILTIN_TEXTS_FILE, read_sources


def test_the_texts_are_a_source_of_their_own_name():
    [source] = read_sources(HealConfig(text=BUILTIN_TEXTS, limit=5))
    assert source.name == BUILTIN_TEXTS
    assert len(set(source.texts)) == 5
    assert not source.prompts


def test_the_file_is_small_and_has_enough_for_a_refit(smollm2):
    [source] = read_sources(HealConfig(text=BUILTIN_TEXTS))
    num_tokens = sum(len(smollm2.tokenizer(text)["input_ids"]) for text in source.texts)
    assert num_tokens > 20_000
    assert BUILTIN_TEXTS_FILE.stat().st_size < 150_000


def test_no_question_is_in_the_texts_that_results_are_reported_on():
    [source] = read_sources(HealConfig(text=BUILTIN_TEXTS))
    all_texts = "\n".join(source.texts)
    for split in ("select", "test"):
        for example in get_task("builtin_facts").examples(split):
            assert example.question not in all_texts
