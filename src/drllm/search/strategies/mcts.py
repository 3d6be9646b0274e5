"""Monte Carlo tree search: UCB over decision vectors, with transpositions and widening.

Select, expand, evaluate (by the caller, through `ask` and `tell`), back up. Loads no torch.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from random import Random

from drllm.config import SearchConfig
from drllm.paths import Decision, Decisions, num_executions
from drllm.search.actions import Action, apply, legal_actions
from drllm.search.strategies import STRATEGIES, PathSearch

WIDENING_FACTOR = 5.0
WIDENING_EXPONENT = 0.5

EDITS_DRAWN = 8
"""Edits that a node draws at random when it widens, to make the most promising one of them."""


@dataclass(slots=True, eq=False)
class Node:
    """One decision vector `[L]`. Everything that leads to it shares its statistics."""

    decisions: Decisions
    executions: int
    untried: list[Action]  # legal edits that weren't made here yet
    children: "dict[Action, Node]" = field(default_factory=dict)  # by edit; nodes may share one
    visits: int = 0  # simulations that passed through or ended here, or are in flight
    value_sum: float = 0.0  # of those simulations' rewards, 0 in flight
    closed: bool = False  # every path below was tried or is in flight


@STRATEGIES.register("tree")
class TreeSearch(PathSearch):
    """Monte Carlo tree search over the decisions of one question.

    Each simulation goes down from the full path, makes one edit that leads to a decision vector
    never tried before, and adds that vector's reward to every node it passed. An edit that leads
    to a known vector links it, and the simulation continues from there. Below a node it goes to the
    child with the highest

        Q / v + c · sqrt(ln V / v) − lambda · executions / L

    with Q and v the child's sum of rewards and visits, V the node's visits; ties go to the higher
    score, and now and then it is a random child. Length enters here and where edits are drawn,
    never the reward. Nodes below which nothing new is left are passed over; when the root is one,
    the search is over.

    Which edit is new: one of a few drawn at random, the one that promises the highest score by the
    paths seen so far. A right path is edited by skips alone while any are left, since nothing else
    makes it shorter; repeats are for paths that are still wrong.

    A path in flight counts as a visit with reward 0 of every node that it passed (a virtual loss),
    so that the next paths of a round go elsewhere; backing up its reward undoes the loss exactly.

    A node of V visits has room for ceil(5 · sqrt(V)) children (closed ones not counted), so that
    the roughly 3L edits of the full path don't use up all simulations.

    Source: Dr.LLM section 3.1 and appendix (UCB rule, its constants, random child);
        transpositions, widening, the choice of edits and of ties are ours
        (docs/decisions/0003-progressive-widening.md).
    """

    own_settings = ("exploration_constant", "length_penalty", "random_child_probability")

    def __init__(self, num_layers: int, config: SearchConfig, rng: Random) -> None:
        super().__init__(num_layers, config, rng)
        self.nodes: dict[Decisions, Node] = {}
        self.root = self._node(self._full)
        self.root.visits = 1  # its own, the first of all
        self._trails: dict[Decisions, list[Node]] = {self._full: [self.root]}  # of those in flight
        # What changes of layers (which, to what; and all of them, under None) have added to scores,
        # and how many paths that is a sum over.
        self._gains: defaultdict[tuple[int, int] | None, float] = defaultdict(float)
        self._times: Counter[tuple[int, int] | None] = Counter()

    def _select(self) -> Decisions | None:
        trail = [self.root]
        while trail:
            node = self._below(trail[-1])
            if node is None:
                trail.pop().closed = True
                continue
            trail.append(node)
            if node.visits == 0:
                for passed in trail:
                    passed.visits += 1  # the virtual loss
                self._trails[node.decisions] = trail
                return node.decisions
        return None

    def _backup(self, decisions: Decisions, reward: float) -> None:
        for node in self._trails.pop(decisions):
            node.value_sum += reward
        # What a path scores above the full path is shared evenly among the layers it changes.
        full, own = self.tried[self._full].score, self.tried[decisions].score
        changes = [change for change in enumerate(decisions) if change[1] != Decision.EXECUTE]
        if full is None or own is None:
            return
        for change in changes:
            for key in (change, None):
                self._gains[key] += (own - full) / len(changes)
                self._times[key] += 1

    def _below(self, node: Node) -> Node | None:
        """Return the child to go down to, a new one where there is room, None at a dead end."""
        children = [child for child in node.children.values() if not child.closed]
        room = math.ceil(WIDENING_FACTOR * node.visits**WIDENING_EXPONENT)
        if node.untried and len(children) < room:
            return self._expand(node)
        if not children:
            return None
        if self._rng.random() < self.config.random_child_probability:
            return self._rng.choice(children)
        return max(children, key=lambda child: self._rank(node, child))

    def _expand(self, node: Node) -> Node:
        """Make a new edit: a random one, or as soon as scores are known the best of a few."""
        drawable = node.untried
        tried = self.tried.get(node.decisions)
        if tried is not None and tried.reward >= 1:
            skips = [action for action in node.untried if action.decision == Decision.SKIP]
            drawable = skips or node.untried
        drawn = [self._rng.choice(drawable) for _ in range(EDITS_DRAWN if self._gains else 1)]
        action = max(drawn, key=self._promise)
        node.untried.remove(action)
        node.children[action] = self._node(apply(node.decisions, action))
        return node.children[action]

    def _promise(self, action: Action) -> float:
        """Return what an edit may add to the score, from the paths that changed its layers alike.

        A layer's mean is drawn towards the mean of all, as if that had been seen once; so an edit
        never seen promises the mean.
        """
        usual = self._gains.get(None, 0.0) / max(1, self._times[None])
        changes = ((action.layer + i, int(action.decision)) for i in range(action.span))
        return sum((usual + self._gains.get(c, 0.0)) / (1 + self._times[c]) for c in changes)

    def _rank(self, parent: Node, child: Node) -> tuple[float, float]:
        """Return a child's upper confidence bound, less its length penalty, and its score."""
        constant = self.config.exploration_constant
        explore = constant * math.sqrt(math.log(parent.visits) / child.visits)
        length = self.config.length_penalty * child.executions / self.num_layers
        tried = self.tried.get(child.decisions)
        score = -math.inf if tried is None or tried.score is None else tried.score
        return child.value_sum / child.visits + explore - length, score

    def _node(self, decisions: Decisions) -> Node:
        if decisions not in self.nodes:
            legal = [*legal_actions(decisions, self.limit)]
            self.nodes[decisions] = Node(decisions, num_executions(decisions), legal)
        return self.nodes[decisions]
