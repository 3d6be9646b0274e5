"""The teacher's states of sequences: each is computed once, and always in the same company."""

import pytest
import torch

from drllm.models.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.tuning.distillation import Distillation
from drllm.tuning.teacher_states import SequenceStates, TeacherStates

A, B, C, D = (1, 2), (3, 4, 5), (6, 7), (8, 9)


class Recorder:
    """Computes states that say what was computed together."""

    def __init__(self):
        self.calls = []

    def __call__(self, batch):
        self.calls.append(list(batch))
        return [SequenceStates(None, torch.tensor([[float(sum(tokens))]])) for tokens in batch]


def test_a_sequence_is_computed_once():
    recorder = Recorder()
    teacher = TeacherStates(recorder, max_tokens=100)
    teacher.get([A, B])
    found = teacher.get([B, C, A, A])
    assert recorder.calls == [[A, B], [C]]
    assert [float(states.last) for states in found] == [12, 13, 3, 3]


def test_a_resumed_training_computes_the_same_sequences_together():
    recorder = Recorder()
    teacher = TeacherStates(recorder, max_tokens=100)
    for batch in ([A, B], [B, C]):  # done before the interruption
        teacher.register(batch)
    teacher.get([B, D])
    teacher.get([C])
    assert recorder.calls == [[A, B], [D], [C]]


def test_sequences_beyond_the_limit_are_computed_each_time():
    recorder = Recorder()
    teacher = TeacherStates(recorder, max_tokens=5)
    teacher.get([A, B])
    for _ in range(2):
        found = teacher.get([C, A, C])
        assert [float(states.last) for states in found] == [13, 3, 13]
    assert recorder.calls == [[A, B], [C], [C]]


@pytest.mark.parametrize("first_layer", [0, 2])
def test_states_of_sequences_drawn_again_are_those_of_the_model_alone(tiny_llama, first_layer):
    model = tiny_llama()
    routed = RoutedModel(model)
    path = StaticPath([0, 1, 2, 4])
    distillation = Distillation(routed, path, first_layer, [], None)
    distillation.last_states([A, B])
    found = distillation.last_states([B, C])
    drawn = [*B, *C]
    assert found.teacher.shape == found.student.shape == (len(drawn), model.config.hidden_size)
    routed.detach()

    def run(tokens, layers):
        kept = model.model.layers
        model.model.layers = torch.nn.ModuleList(kept[layer] for layer in layers)
        norm, model.model.norm = model.model.norm, torch.nn.Identity()
        try:
            return model.model(torch.tensor([tokens]), use_cache=False)[0][0]
        finally:
            model.model.layers, model.model.norm = kept, norm

    all_layers = range(len(model.model.layers))
    with torch.no_grad():
        teacher = torch.cat([run(tokens, all_layers) for tokens in (B, C)])
        student = torch.cat([run(tokens, path.layers) for tokens in (B, C)])
    assert torch.allclose(found.teacher, teacher, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.student, student, rtol=1e-4, atol=1e-4)
