"""Monte Carlo tree search: UCB over decision vectors, with transpositions and widening.

A simulation selects nodes, expands one node, and backs up the reward. The caller evaluates the new
path between `ask` and `tell`. This module doesn't import torch.
"""

import math
from dataclasses import dataclass, field
from random import Random

from drllm.config import SearchConfig
from drllm.paths import Decision, Decisions, num_executions
from drllm.search.actions import Action, apply, legal_actions
from drllm.search.strategies import STRATEGIES, PathSearch

WIDENING_FACTOR = 5.0
WIDENING_EXPONENT = 0.5

EDITS_DRAWN = 8
"""Number of edits drawn at random when a node widens; the most promising edit is made."""


@dataclass(slots=True, eq=False)
class Node:
    """The node of one decision vector `[L]`. All trails that lead to the node share its numbers."""

    decisions: Decisions
    executions: int
    untried: list[Action]  # legal edits that aren't children yet
    children: "dict[Action, Node]" = field(default_factory=dict)  # by edit; nodes may share one
    visits: int = 0  # simulations that pass through the node or end here, in flight or finished
    value_sum: float = 0.0  # sum of the rewards of these simulations; 0 while in flight
    is_closed: bool = False  # every path below was tried or is in flight

    @property
    def open_children(self) -> "list[Node]":
        """The children below which new paths may be left."""
        return [child for child in self.children.values() if not child.is_closed]

    @property
    def room(self) -> int:
        """The maximum number of open children."""
        return math.ceil(WIDENING_FACTOR * float(self.visits**WIDENING_EXPONENT))


@dataclass(slots=True)
class EditGain:
    """The gain in score over the full path, summed over the paths that contain one edit."""

    total: float = 0.0  # nats
    num_paths: int = 0

    def add(self, gain: float) -> None:
        """Add what one path gained."""
        self.total += gain
        self.num_paths += 1


@STRATEGIES.register("tree")
class TreeSearch(PathSearch):
    """Monte Carlo tree search over the decisions of one question.

    Each simulation goes down from the full path, and makes one edit that leads to a new decision
    vector. The reward of this vector is added to every node on the way. If an edit leads to a known
    vector, the edit is linked to the node of this vector, and the simulation continues there. From
    a node the simulation goes to the child with the highest

        Q / v + c · sqrt(ln V / v) − lambda · executions / L

    Here Q and v are the child's sum of rewards and its visits, and V is the node's visits. Ties go
    to the higher score, and now and then a random child is taken. A path's length counts here and
    when edits are drawn, but never in the reward. A node with nothing new below it is closed and
    passed over. The search is over when the root is closed.

    A few edits are drawn at random. The paths so far say which of them promises the highest score,
    and this edit is made. A right path gets only skips while any are left, since only skips make it
    shorter. Repeats are for paths that are still wrong.

    A path in flight counts as a visit with reward 0 on every node of its way (a virtual loss), so
    the next paths of a round go elsewhere. Backing up the path's reward undoes the loss exactly.

    A node with V visits has room for ceil(5 · sqrt(V)) open children. So the roughly 3L edits of
    the full path don't use up all simulations.

    Source: Dr.LLM section 3.1 and appendix (UCB rule, its constants, random child);
        transpositions, widening, the choice of edits and of ties are ours
        (docs/decisions/0003-progressive-widening.md).
    """

    own_settings = ("exploration_constant", "length_penalty", "random_child_probability")

    def __init__(self, num_layers: int, config: SearchConfig, rng: Random) -> None:
        super().__init__(num_layers, config, rng)
        self.nodes: dict[Decisions, Node] = {}
        self.root = self._get_node(self._full)
        self.root.visits = 1  # the evaluation of the full path, which comes first
        # For each path in flight, the nodes from the root to the path.
        self._trails: dict[Decisions, list[Node]] = {self._full: [self.root]}
        self._gains: dict[tuple[int, int], EditGain] = {}  # by (layer, decision)
        self._all_gains = EditGain()  # of all layers and decisions together

    def _select(self) -> Decisions | None:
        """Go down from the root: select children, and expand one node to get a new path."""
        trail = [self.root]
        while trail:
            node = trail[-1]
            open_children = node.open_children
            if node.untried and len(open_children) < node.room:
                child = self._expand(node)
            elif open_children:
                child = self._select_child(node, open_children)
            else:
                node.is_closed = True
                trail.pop()
                continue
            trail.append(child)
            is_new = child.visits == 0  # if not, the edit led to a known node: continue below it
            if is_new:
                self._start_simulation(trail)
                return child.decisions
        return None

    def _start_simulation(self, trail: list[Node]) -> None:
        """Remember the trail of a path in flight, with a virtual loss on each of its nodes."""
        for node in trail:
            node.visits += 1
        self._trails[trail[-1].decisions] = trail

    def _select_child(self, node: Node, children: list[Node]) -> Node:
        """Return the child with the highest bound, or now and then a random child."""
        if self._rng.random() < self.config.random_child_probability:
            return self._rng.choice(children)
        return max(children, key=lambda child: self._rank(node, child))

    def _rank(self, parent: Node, child: Node) -> tuple[float, float]:
        """Return a child's upper confidence bound minus its length penalty, and its score."""
        value = child.value_sum / child.visits
        constant = self.config.exploration_constant
        exploration = constant * math.sqrt(math.log(parent.visits) / child.visits)
        length = self.config.length_penalty * child.executions / self.num_layers
        trial = self.trials.get(child.decisions)
        score = -math.inf
        if trial is not None and trial.score is not None:
            score = trial.score
        return value + exploration - length, score

    def _expand(self, node: Node) -> Node:
        """Make the most promising of a few new edits, or a random edit before scores are known."""
        edits = self._edits_to_draw(node)
        num_drawn = EDITS_DRAWN if self._gains else 1
        drawn = [self._rng.choice(edits) for _ in range(num_drawn)]
        action = max(drawn, key=self._promise)
        node.untried.remove(action)
        child = self._get_node(apply(node.decisions, action))
        node.children[action] = child
        return child

    def _edits_to_draw(self, node: Node) -> list[Action]:
        """Return a node's untried edits; for a right path only skips, while any are left."""
        trial = self.trials.get(node.decisions)
        is_right = trial is not None and trial.reward >= 1
        if not is_right:
            return node.untried
        skips = [action for action in node.untried if action.decision == Decision.SKIP]
        if not skips:
            return node.untried
        return skips

    def _promise(self, action: Action) -> float:
        """Estimate what an edit adds to the score, from paths with the same changes.

        The mean gain of a layer is shrunk towards the mean of all layers, which counts as one more
        path. So an edit that no path contains promises the mean of all layers.
        """
        mean = self._all_gains.total / max(1, self._all_gains.num_paths)
        promise = 0.0
        for layer in range(action.layer, action.layer + action.span):
            gain = self._gains.get((layer, int(action.decision)), EditGain())
            promise += (mean + gain.total) / (1 + gain.num_paths)
        return promise

    def _backup(self, decisions: Decisions, reward: float) -> None:
        """Add a path's reward to the nodes of its trail, and its score to its edits' gains."""
        for node in self._trails.pop(decisions):
            node.value_sum += reward
        full_score = self.trials[self._full].score
        score = self.trials[decisions].score
        if full_score is not None and score is not None:
            self._add_gain(decisions, score - full_score)

    def _add_gain(self, decisions: Decisions, gain: float) -> None:
        """Share a path's gain over the full path evenly among its edits."""
        edits = [
            (layer, decision)
            for layer, decision in enumerate(decisions)
            if decision != Decision.EXECUTE
        ]
        for edit in edits:
            gain_of_edit = gain / len(edits)
            self._gains.setdefault(edit, EditGain()).add(gain_of_edit)
            self._all_gains.add(gain_of_edit)

    def _get_node(self, decisions: Decisions) -> Node:
        """Return the node of a decision vector; make the node the first time."""
        if decisions not in self.nodes:
            legal = list(legal_actions(decisions, self.limit))
            self.nodes[decisions] = Node(decisions, num_executions(decisions), legal)
        return self.nodes[decisions]
