"""The forecast of a search, from a sample of its questions."""

import pytest

from drllm.config import SearchConfig
from drllm.errors import TaskError
from drllm.models.routed_model import RoutedModel
from drllm.search.forecast import forecast_search
from drllm.search.questions import collect_questions


@pytest.fixture
def short_sighted(tiny_llama, tiny_tokenizer):
    """A model whose context holds few tokens."""
    return RoutedModel(tiny_llama(max_position_embeddings=128), tokenizer=tiny_tokenizer)


def make_questions(*texts):
    rows = [{"question": text, "choices": ["odd", "even"], "answer": 0} for text in texts]
    return collect_questions(rows, SearchConfig())


def test_a_question_that_the_search_will_set_aside_does_not_end_its_forecast(short_sighted):
    questions = make_questions("What is one?", "What is three?", "What? " * 200)
    [forecast] = forecast_search(short_sighted, questions, SearchConfig(num_simulations=2))
    assert (forecast.questions, forecast.sample_questions) == (3, 2)
    assert (forecast.paths, forecast.sample_paths) == (9, 6)


def test_a_forecast_from_questions_that_all_fail_says_why(short_sighted):
    with pytest.raises(TaskError, match=r"none of the 1 questions .* context holds 128"):
        forecast_search(short_sighted, make_questions("What? " * 200), SearchConfig())
