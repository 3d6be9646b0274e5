"""Monte Carlo tree search over the decisions of a question.

A node of the tree is a decision vector, and its children are the results of one edit. Equal vectors
share a node, so the tree is in fact a graph. This module doesn't import torch.
"""

import math
from dataclasses import dataclass, field
from random import Random
from typing import TypeAlias

from drllm.config import SearchConfig
from drllm.paths import Decision, Decisions, num_executions
from drllm.search.actions import Action, apply, legal_actions
from drllm.search.strategies import STRATEGIES, Evaluation, PathSearch, Rounds

WIDENING_FACTOR = 5.0
WIDENING_EXPONENT = 0.5
"""A node with V visits may have WIDENING_FACTOR · V ** WIDENING_EXPONENT open children."""
EDITS_DRAWN = 8
"""Number of edits drawn at random for a new child; the most promising of them is made."""


@dataclass(slots=True, eq=False)
class Node:
    """The node of one decision vector; it is the same node whichever edits lead to the vector."""

    decisions: Decisions  # [L]
    executions: int
    untried: list[Action]  # legal edits that aren't children yet
    children: "dict[Action, Node]" = field(default_factory=dict)  # by edit
    visits: int = 0  # simulations through this node, in flight or finished
    value_sum: float = 0.0  # sum of the rewards of these simulations; a path in flight adds 0
    is_closed: bool = False  # whether every path below was tried or is in flight

    @property
    def open_children(self) -> "list[Node]":
        """The children that may still lead to new paths."""
        return [child for child in self.children.values() if not child.is_closed]

    @property
    def room(self) -> int:
        """The maximum number of open children."""
        return math.ceil(WIDENING_FACTOR * float(self.visits**WIDENING_EXPONENT))


Trail: TypeAlias = list[Node]
"""The nodes that a simulation passes through, from the root to its new path."""


@dataclass(slots=True)
class EditGain:
    """How much one edit has raised the score so far, over all paths that contain the edit."""

    total: float = 0.0  # in nats, compared with the full path
    num_paths: int = 0  # number of paths in the total

    def add(self, gain: float) -> None:
        """Add the edit's share of one path's gain."""
        self.total += gain
        self.num_paths += 1


@STRATEGIES.register("tree")
class TreeSearch(PathSearch):
    """Edits paths with high rewards more often, by Monte Carlo tree search as in the paper.

    Selection: each simulation goes down the tree from the full path until it makes a new decision
    vector. At each node it goes to the child with the highest

        Q / v + c · sqrt(ln V / v) − lambda · executions / L

    where Q is the child's sum of rewards, v its number of visits, and V the node's number of
    visits. Of equal children the one with the higher score is taken. With a small probability a
    random child is taken instead. A node below which nothing new is left is closed, and no
    simulation enters it again. The search is over when the root is closed.

    Expansion: a node with V visits may have ceil(5 · sqrt(V)) open children. While it has fewer, a
    simulation adds a child instead of selecting one. A few edits are drawn at random, and the edit
    that promises the highest score is made. A path that is right already gets skips first, since
    repeats would make it longer. If the edit leads to a known vector, the simulation continues from
    the node of that vector.

    Backup: the reward of the new path is added to every node on the way to it. A path in flight
    counts as a visit with reward 0 (a virtual loss), so that the next paths of a round go
    elsewhere. Its reward, once known, replaces the 0.

    Source: Dr.LLM section 3.1 and appendix for the selection. Shared nodes, the number of children
        and the choice of edits are ours (docs/decisions.md).
    """

    own_settings = ("exploration_constant", "length_penalty", "random_child_probability")

    def __init__(self, num_layers: int, config: SearchConfig, rng: Random) -> None:
        super().__init__(num_layers, config, rng)
        self.nodes: dict[Decisions, Node] = {}
        self.root = self._get_node(self.full_path)
        self._gains: dict[tuple[int, int], EditGain] = {}  # by (layer, decision)
        self._all_gains = EditGain()  # sum over all layers and decisions

    def run(self) -> Rounds:
        """Select, expand, evaluate and back up, round by round; the class explains each."""
        self._count_visits([self.root])
        [evaluation] = yield [self.full_path]
        self._back_up([self.root], evaluation)
        while not self.is_over:
            trails: list[Trail] = []
            for _ in range(self.round_size):
                trail = [self.root]
                while trail and trail[-1].visits > 0:  # until the trail ends at a new node
                    self._select(trail)
                    self._expand(trail)
                if not trail:  # the whole tree is closed
                    break
                self._count_visits(trail)
                self.begin(trail[-1].decisions)
                trails.append(trail)
            if not trails:
                return
            evaluations = yield [trail[-1].decisions for trail in trails]
            for trail, evaluation in zip(trails, evaluations, strict=True):
                self._back_up(trail, evaluation)

    def _select(self, trail: Trail) -> None:
        """Go down from the end of a trail to a node that gets another child.

        Nodes below which nothing new is left are closed and leave the trail. The trail is empty
        afterwards if the root is one of them.
        """
        while trail:
            node = trail[-1]
            open_children = node.open_children
            if node.untried and len(open_children) < node.room:
                return
            if open_children:
                trail.append(self._select_child(node, open_children))
            else:
                node.is_closed = True
                trail.pop()

    def _expand(self, trail: Trail) -> None:
        """Add a child to the last node of a trail, and go there; do nothing if there is no node.

        The child comes from the most promising of a few untried edits. If the edit leads to known
        decisions, their node becomes the child, which has visits then.
        """
        if not trail:
            return
        node = trail[-1]
        edits = self._list_edits(node)
        num_drawn = 1
        if self._gains:  # before any score is known, all edits promise the same
            num_drawn = EDITS_DRAWN
        candidates = [self.rng.choice(edits) for _ in range(num_drawn)]
        action = max(candidates, key=self._estimate_gain)
        node.untried.remove(action)
        child = self._get_node(apply(node.decisions, action))
        node.children[action] = child
        trail.append(child)

    def _count_visits(self, trail: Trail) -> None:
        """Count a visit of each node; until its reward is known, it is a virtual loss."""
        for node in trail:
            node.visits += 1

    def _back_up(self, trail: Trail, evaluation: Evaluation) -> None:
        """Add a path's reward to the nodes of its trail, and its gain in score to its edits."""
        decisions = trail[-1].decisions
        self.record(decisions, evaluation)
        for node in trail:
            node.value_sum += evaluation.reward
        full_score = self.trials[self.full_path].score
        if full_score is not None and evaluation.score is not None:
            self._add_gain(decisions, evaluation.score - full_score)

    def _select_child(self, node: Node, children: list[Node]) -> Node:
        """Return the child that `_rank` puts first or, with a small probability, a random child."""
        if self.rng.random() < self.config.random_child_probability:
            return self.rng.choice(children)
        return max(children, key=lambda child: self._rank(node, child))

    def _rank(self, parent: Node, child: Node) -> tuple[float, float]:
        """Return what children are compared by: bound minus length penalty, then the score."""
        value = child.value_sum / child.visits
        constant = self.config.exploration_constant
        exploration = constant * math.sqrt(math.log(parent.visits) / child.visits)
        length = self.config.length_penalty * child.executions / self.num_layers
        trial = self.trials.get(child.decisions)
        score = -math.inf
        if trial is not None and trial.score is not None:
            score = trial.score
        return value + exploration - length, score

    def _list_edits(self, node: Node) -> list[Action]:
        """Return a node's untried edits; only the skips if its path is right and skips are left."""
        trial = self.trials.get(node.decisions)
        is_right = trial is not None and trial.reward >= 1
        if not is_right:
            return node.untried
        skips = [action for action in node.untried if action.decision == Decision.SKIP]
        if not skips:
            return node.untried
        return skips

    def _estimate_gain(self, action: Action) -> float:
        """Estimate how much an edit adds to the score, from earlier paths that contain it.

        The estimate of each layer is a mean over the earlier paths and one more path, whose gain is
        the mean of all edits. So an edit without earlier paths gets the mean of all edits.
        """
        mean_of_all = self._all_gains.total / max(1, self._all_gains.num_paths)
        estimate = 0.0
        for layer in range(action.layer, action.layer + action.span):
            gain = self._gains.get((layer, int(action.decision)), EditGain())
            estimate += (mean_of_all + gain.total) / (1 + gain.num_paths)
        return estimate

    def _add_gain(self, decisions: Decisions, gain: float) -> None:
        """Divide a path's gain over the full path evenly among its edited layers."""
        edits = [
            (layer, decision)
            for layer, decision in enumerate(decisions)
            if decision != Decision.EXECUTE
        ]
        for edit in edits:
            share = gain / len(edits)
            self._gains.setdefault(edit, EditGain()).add(share)
            self._all_gains.add(share)

    def _get_node(self, decisions: Decisions) -> Node:
        """Return the node of a decision vector; make it if there is none yet."""
        if decisions not in self.nodes:
            legal = list(legal_actions(decisions, self.limit))
            self.nodes[decisions] = Node(decisions, num_executions(decisions), legal)
        return self.nodes[decisions]
