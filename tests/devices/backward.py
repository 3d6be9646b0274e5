"""What autograd's engine does, in Python: the engine itself wants a stream of a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Edge = tuple[Any, int]
"""Where a gradient arrives: a node of the graph, and the number of the node's output."""


def run_backward(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    retain_graph: bool,
    create_graph: bool,
    inputs: Sequence[Tensor],
    *,
    accumulate_grad: bool,
    **_: Any,
) -> tuple[Tensor | None, ...]:
    """Stand in for `torch.autograd._engine_run_backward`; hooks aren't called."""
    assert not create_graph
    backward = BackwardPass(outputs, inputs, accumulate_grad=accumulate_grad)
    for output, gradient in zip(outputs, gradients, strict=True):
        node, number = edge_of(output)
        backward.add(node, number, torch.ones_like(output) if gradient is None else gradient)
    with torch.no_grad():
        backward.run()
    if accumulate_grad:
        _accumulate(inputs, backward.input_gradients)
    return tuple(backward.input_gradients)


class BackwardPass:
    """One pass over the graph. A node runs once all nodes before it have run.

    Attributes:
        input_gradients: The gradient of each input; None as long as none has arrived.
    """

    def __init__(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], *, accumulate_grad: bool
    ) -> None:
        self.accumulate_grad = accumulate_grad
        self.input_gradients: list[Tensor | None] = [None] * len(inputs)
        self._places = {edge_of(tensor): place for place, tensor in enumerate(inputs)}
        self._gradients: dict[Any, dict[int, Tensor]] = {}  # by node, by number of the output
        self._num_before = count_nodes_before([edge_of(output)[0] for output in outputs])

    def add(self, node: Any, number: int, gradient: Tensor | None) -> None:
        """Add a gradient to those that have arrived at a node."""
        gradients = self._gradients.setdefault(node, {})
        if gradient is None:
            return
        like = node._input_metadata[number]
        gradient = gradient.sum_to_size(like.shape).to(like.dtype)  # of what was broadcast
        if number in gradients:
            gradient = gradients[number] + gradient
        gradients[number] = gradient

    def run(self) -> None:
        """Run all nodes, in an order in which each has its gradients."""
        ready = [node for node in self._gradients if not self._num_before[node]]
        while ready:
            node = ready.pop()
            gradients = self._gradients.pop(node, {})
            self._keep_input_gradients(node, gradients)
            if hasattr(node, "variable"):
                self._reach_leaf(node, gradients)
                continue
            results = run_node(node, gradients)
            for (after, number), gradient in zip(node.next_functions, results, strict=True):
                if after is None:
                    continue
                self.add(after, number, gradient)
                self._num_before[after] -= 1
                if not self._num_before[after]:
                    ready.append(after)

    def _keep_input_gradients(self, node: Any, gradients: dict[int, Tensor]) -> None:
        for number, gradient in gradients.items():
            place = self._places.get((node, number))
            if place is not None:
                self.input_gradients[place] = gradient

    def _reach_leaf(self, node: Any, gradients: dict[int, Tensor]) -> None:
        """Add the gradient of a leaf, such as a parameter, to its `grad`."""
        is_input = not self._places or (node, 0) in self._places
        if not gradients or not self.accumulate_grad or not is_input:
            return
        leaf = node.variable
        if leaf.grad is None:
            leaf.grad = gradients[0].detach()
        else:
            leaf.grad = leaf.grad + gradients[0]


def edge_of(tensor: Tensor) -> Edge:
    """Return where a tensor's gradient arrives."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    with torch.enable_grad():
        view = tensor.view_as(tensor)
    assert view.grad_fn is not None
    [(node, _)] = view.grad_fn.next_functions
    return node, 0


def count_nodes_before(roots: Sequence[Any]) -> Counter[Any]:
    """Count for each node below the roots how many edges lead to it."""
    num_before = Counter[Any]()
    seen: set[Any] = set()
    left = list(roots)
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        following = [after for after, _ in node.next_functions if after is not None]
        num_before.update(following)
        left += following
    return num_before


def run_node(node: Any, gradients: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradients that a node passes on; none where it got none."""
    if not gradients:
        return (None,) * len(node.next_functions)
    num_outputs = max(gradients) + 1
    results = node(*[gradients.get(number) for number in range(num_outputs)])
    return results if isinstance(results, tuple) else (results,)


def _accumulate(inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to those of inputs that aren't leaves; leaves have theirs already."""
    for tensor, gradient in zip(inputs, gradients, strict=True):
        if tensor.grad_fn is None or gradient is None:
            continue
        tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
