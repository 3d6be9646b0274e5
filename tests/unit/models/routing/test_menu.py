"""A menu of paths as a policy: rows of different paths in one batch, each as if alone."""

import pytest
import torch

from drllm.errors import PathError
from drllm.models.routers.depth_control import recorded
from drllm.models.routers.logistic import fit_logistic
from drllm.models.routing.batch_generation import generate_many
from drllm.models.routing.menu import MenuPolicy
from drllm.models.routing.policies import PromptView, full_precision
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import ATTENTION, StaticPath, Step
from slow_way import answers, tiny_adapter

PATHS = {
    "full": StaticPath(range(6)),
    "five": StaticPath([0, 1, 2, 3, 5]),
    "four": StaticPath([0, 1, 3, 5]),
}
HEALED = {
    "full": PATHS["full"],
    "five": PATHS["five"].with_adapter("a", 2),
    "four": PATHS["four"].with_adapter("b", 3),
}
PROMPTS = [[5, 6, 7, 8, 9], [3, 4], [10, 11, 12, 13, 14, 15, 16, 17], [20, 21, 22], [30, 31]]


WANTED = ["full", "five", "four", "five", "full"]
"""The path that each prompt is given."""


def menu(paths=PATHS, reads_at=2, kinds=None):
    return MenuPolicy(paths, kinds or torch.nn.Linear(8, 1), torch.eye(len(paths)), reads_at, 6)


@pytest.fixture(params=[PATHS, HEALED], ids=["plain", "healed"])
def paths(request):
    return request.param


@pytest.fixture
def routed(tiny_llama, paths):
    """A model under a menu whose kinds are its paths, told apart by the states of the prompts."""
    routed = RoutedModel(tiny_llama())
    for seed, name in enumerate("ab"):
        routed.add_adapter(name, tiny_adapter(routed, range(6), seed))
    states = recorded(routed, PROMPTS, PromptView.mean, [2], decision=1)[:, 0]
    labels = torch.tensor([[[*PATHS].index(name)] for name in WANTED])
    kinds = fit_logistic(states, labels, len(paths), penalty=1e-4)
    routed.driver.policy = menu(paths, kinds=kinds)
    return routed


def chosen(routed, prompt):
    """The path that a prompt takes by itself."""
    with torch.no_grad():
        routed(torch.tensor([prompt]))
    return routed.policy.by_route[tuple(routed.last_route[0].tolist())]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}], ids=str)
def test_rows_of_different_paths_say_what_each_says_alone_along_its_path(routed, paths, options):
    taken = [chosen(routed, prompt) for prompt in PROMPTS]
    assert taken == [paths[name] for name in WANTED]
    together = answers(routed, PROMPTS, max_new_tokens=6, min_new_tokens=6, **options)
    for prompt, path, said in zip(PROMPTS, taken, together, strict=True):
        with routed.fixed(path):
            assert answers(routed, [prompt], max_new_tokens=6, min_new_tokens=6, **options) == [
                said
            ]


def test_samples_with_a_cache_are_those_without(routed):
    def drawn(**options):
        torch.manual_seed(3)
        return answers(
            routed, PROMPTS, max_new_tokens=6, min_new_tokens=6, do_sample=True, **options
        )

    assert drawn() == drawn(use_cache=False)


def test_many_prompts_are_answered_in_batches_of_equal_paths_as_each_alone(routed, tiny_tokenizer):
    routed.tokenizer, texts = tiny_tokenizer, ["ab", "What is ice?", "x" * 9, "1 + 1 =", "No."]
    few = {"max_new_tokens": 4, "min_new_tokens": 4, "chat": False}
    together = generate_many(routed, texts, batch_size=2, **few)
    for text, answer in zip(texts, together, strict=True):
        with routed.fixed(routed.policy.by_route[answer.route]):
            [alone] = generate_many(routed, [text], **few)
        assert answer.tokens == alone.tokens


def test_a_path_with_an_adapter_before_it_is_chosen_is_refused():
    paths = {"full": PATHS["full"], "five": PATHS["five"].with_adapter("a", 1)}
    with pytest.raises(PathError, match="'five' leaves the full one at layer 1"):
        menu(paths, 2)


def test_the_path_of_the_greatest_expected_worth_is_taken_at_the_layer_that_reads(routed):
    policy, states = routed.policy, torch.randn(7, routed.model.config.hidden_size)
    with full_precision(states.device):
        expected = policy.kinds(states).softmax(dim=1) @ policy.worth
    assert policy.choose(states) == expected.argmax(dim=1).tolist()
    routed(torch.tensor([[5, 6, 7]]))
    assert routed.last_route[0, :2].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("paths", "reads_at", "said"),
    [
        ({"a": StaticPath([0, 1, Step(2, ATTENTION), 3])}, None, "'a' .* can't be on the menu"),
        ({"a": StaticPath([0, 1, 2, 2, 3, 4, 5])}, None, "'a' repeats .* it repeats a layer"),
        ({"a": StaticPath([0, 2, 1, 3, 4, 5])}, None, "'a' .* layer 1 follows layer 2"),
        ({"a": StaticPath([0, 1, 2]), "b": StaticPath([0, 1, 2])}, None, "'b' .* another does so"),
        ({"a": StaticPath([0, 1, 3, 4, 5])}, 3, "--reads-at 3: path 'a' leaves .* layer 2"),
        ({"a": StaticPath([0, 1, 6])}, None, "6 at position 2"),
    ],
)
def test_paths_that_no_menu_can_have_are_refused(paths, reads_at, said):
    with pytest.raises(PathError, match=said):
        menu(paths, reads_at)
