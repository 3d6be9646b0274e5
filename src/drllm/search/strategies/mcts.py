"""Monte Carlo tree search: UCB over decision vectors, with transpositions and widening.

Select, expand, evaluate (by the caller, through `ask` and `tell`), back up. Loads no torch.

Axes: L layers.
"""

from __future__ import annotations

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
"""Edits that a node draws at random when it widens, to make the most promising one of them."""


@dataclass(slots=True, eq=False)
class Node:
    """One decision vector. Everything that leads to it shares its statistics.

    Attributes:
        decisions: `[L]`.
        executions: Their cost in layer equivalents.
        untried: Legal edits that have no edge yet.
        edges: Edges to the nodes below, in the order they were made.
        visits: Simulations that passed through or ended here, those in flight included.
        value_sum: Sum of those simulations' rewards, 0 for those in flight.
        closed: Every path below was tried or is in flight.
    """

    decisions: Decisions
    executions: int
    untried: list[Action]
    edges: list[Edge] = field(default_factory=list)
    visits: int = 0
    value_sum: float = 0.0
    closed: bool = False

    @property
    def value(self) -> float:
        """Mean reward of the simulations that came this way."""
        return self.value_sum / self.visits


@dataclass(slots=True, eq=False)
class Edge:
    """One edit that was made at a node.

    Attributes:
        action: The edit.
        node: Where it leads; several edges may lead to one node.
        visits: Simulations that took this edge, those in flight included.
    """

    action: Action
    node: Node
    visits: int = 0


@dataclass(slots=True)
class Gain:
    """What a change of a layer has added to the scores of paths, in sum.

    Attributes:
        total: Sum of the paths' scores above the full path's, each divided by its changes.
        times: Paths that were summed up.
    """

    total: float = 0.0
    times: int = 0


@STRATEGIES.register("tree")
class TreeSearch(PathSearch):
    """Monte Carlo tree search over the decisions of one question.

    Each simulation goes down from the full path, makes one edit that leads to a decision vector
    never tried before, and adds that vector's reward to every node it passed. An edit that leads
    to a known vector links it, and the simulation continues from there. Below a node the next edge
    is the one with the highest

        Q / v + c · sqrt(ln V / v) − lambda · executions / L

    with Q and v the sum of rewards and the visits of the node it leads to, V the visits of the
    node it starts from; ties go to the higher score, and now and then it is a random one. Length
    enters here and where edits are drawn, never the reward. Nodes below which nothing new is left
    are passed over; when the root is one, the search is over.

    Which edit is new: one of a few drawn at random, the one that promises the highest score by the
    paths seen so far. A right path is edited by skips alone while any are left, since nothing else
    makes it shorter; repeats are for paths that are still wrong.

    A path in flight counts as a visit with reward 0 of every node that it passed (a virtual loss),
    so that the next paths of a round go elsewhere; backing up its reward undoes the loss exactly.

    A node of V visits has room for ceil(5 · sqrt(V)) edges (closed ones not counted). Without such
    a bound the roughly 3L edits of the full path would use up all 50 simulations before the
    second edit is ever made; with a bound of one edge a node the search is a chain. The numbers
    are chosen by measurement: docs/decisions/0003-progressive-widening.md.

    Attributes:
        root: The full path's node.
        nodes: Every node, by its decisions.

    Source: Dr.LLM section 3.1 and appendix (UCB rule, its constants, random child);
        transpositions, widening, the choice of edits and of ties are ours
        (docs/decisions/0003-progressive-widening.md).

    Example:
        >>> search = TreeSearch(2, SearchConfig(num_simulations=3), Random(0))
        >>> while asked := search.ask():
        ...     search.tell(*asked, reward=1.0)
        >>> search.root.visits, len(search.nodes)
        (4, 4)
    """

    own_settings = ("exploration_constant", "length_penalty", "random_child_probability")

    def __init__(self, num_layers: int, config: SearchConfig, rng: Random) -> None:
        super().__init__(num_layers, config, rng)
        self.nodes: dict[Decisions, Node] = {}
        self.root = self._node(self._full)
        self.root.visits = 1  # its own, the first of all
        self._trails: dict[Decisions, list[Edge]] = {self._full: []}  # of the paths in flight
        self._gains: dict[tuple[int, int], Gain] = {}  # by layer and what it became
        self._usual = Gain()

    def _select(self) -> Decisions | None:
        trail: list[Edge] = []
        while True:
            node = trail[-1].node if trail else self.root
            edge = self._edge_below(node)
            if edge is None:
                node.closed = True
                if not trail:
                    return None
                trail.pop()
                continue
            trail.append(edge)
            if edge.node.visits == 0:
                self._add_virtual_loss(trail)
                return edge.node.decisions

    def _add_virtual_loss(self, trail: list[Edge]) -> None:
        """Count the visits of a path that goes into flight; its reward is 0 until it is known."""
        self.root.visits += 1
        for edge in trail:
            edge.visits += 1
            edge.node.visits += 1
        self._trails[trail[-1].node.decisions] = trail

    def _backup(self, decisions: Decisions, reward: float) -> None:
        for node in (self.root, *(edge.node for edge in self._trails.pop(decisions))):
            node.value_sum += reward
        self._credit(decisions)

    def _edge_below(self, node: Node) -> Edge | None:
        """Return the edge to go down by, a new one where the node has room, None at a dead end."""
        open_edges = [edge for edge in node.edges if not edge.node.closed]
        room = math.ceil(WIDENING_FACTOR * node.visits**WIDENING_EXPONENT)
        if node.untried and len(open_edges) < room:
            return self._expand(node)
        if not open_edges:
            return None
        if self._rng.random() < self.config.random_child_probability:
            return self._rng.choice(open_edges)
        return max(open_edges, key=lambda e: (self._bound(node, e.node), self._score(e.node)))

    def _expand(self, node: Node) -> Edge:
        """Make a new edit: a random one, or as soon as scores are known the best of a few."""
        num_drawn = EDITS_DRAWN if self._gains else 1
        drawable = (self._is_right(node) and _skips(node.untried)) or node.untried
        drawn = [self._rng.choice(drawable) for _ in range(num_drawn)]
        action = max(drawn, key=self._promise)
        node.untried.remove(action)
        edge = Edge(action, self._node(apply(node.decisions, action)))
        node.edges.append(edge)
        return edge

    def _credit(self, decisions: Decisions) -> None:
        """Share what a path scores above the full path evenly among the layers it changes."""
        full, own = self.tried[self._full].score, self.tried[decisions].score
        changes = [change for change in enumerate(decisions) if change[1] != Decision.EXECUTE]
        if full is None or own is None:
            return
        for change in changes:
            for gain in (self._gains.setdefault(change, Gain()), self._usual):
                gain.total += (own - full) / len(changes)
                gain.times += 1

    def _promise(self, action: Action) -> float:
        """Return what an edit may add to the score, from the paths that changed its layers alike.

        A layer's mean is drawn towards the mean of all, as if that had been seen once; so an edit
        never seen promises the mean.
        """
        usual = self._usual.total / max(1, self._usual.times)
        gains = (
            self._gains.get((layer, int(action.decision)), Gain())
            for layer in range(action.layer, action.layer + action.span)
        )
        return sum((usual + gain.total) / (1 + gain.times) for gain in gains)

    def _is_right(self, node: Node) -> bool:
        """Tell whether a path is known to be right; one in flight isn't."""
        tried = self.tried.get(node.decisions)
        return tried is not None and tried.reward >= 1

    def _score(self, node: Node) -> float:
        """Return a path's score, less than any where it has none yet."""
        tried = self.tried.get(node.decisions)
        return -math.inf if tried is None or tried.score is None else tried.score

    def _bound(self, parent: Node, child: Node) -> float:
        """Return a child's upper confidence bound, less its length penalty."""
        explore = self.config.exploration_constant * math.sqrt(
            math.log(parent.visits) / child.visits
        )
        length = self.config.length_penalty * child.executions / self.num_layers
        return child.value + explore - length

    def _node(self, decisions: Decisions) -> Node:
        if decisions not in self.nodes:
            self.nodes[decisions] = Node(
                decisions=decisions,
                executions=num_executions(decisions),
                untried=list(legal_actions(decisions, self.limit)),
            )
        return self.nodes[decisions]


def _skips(actions: list[Action]) -> list[Action]:
    return [action for action in actions if action.decision == Decision.SKIP]
