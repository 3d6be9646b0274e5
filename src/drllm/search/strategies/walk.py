"""The search of the paper's published code: a chain of random edits that ignores all rewards."""

from drllm.paths import Decisions
from drllm.search.actions import apply, legal_actions
from drllm.search.strategies import STRATEGIES, PathSearch, Rounds


@STRATEGIES.register("walk")
class WalkSearch(PathSearch):
    """Edits the last path at random, whatever its reward, as the paper's published code does.

    The first edit is of the full path. When no legal edit is left, the walk starts again from the
    full path. If the walk comes to a path that was tried before, this counts as a simulation. The
    path isn't evaluated again, and the walk continues from it. Unlike the published code, this walk
    makes only legal edits: each edit changes the path, no layer runs more than twice, and no path
    exceeds the budget.

    Source: the published code of Dr.LLM (commit 14e8837). In its search tree every node has one
        child, so the tree is a chain.
    """

    def run(self) -> Rounds:
        """Edit the last path again and again; have the paths of each round evaluated together."""
        path = self.full_path
        [evaluation] = yield [path]
        self.record(path, evaluation)
        while not self.is_over:
            paths: list[Decisions] = []
            while len(paths) < self.config.leaves_per_round and self.round_size > 0:
                actions = legal_actions(path, self.limit)
                if not actions:
                    path = self.full_path
                    actions = legal_actions(path, self.limit)
                if not actions:  # even the full path has no legal edit
                    break
                path = apply(path, self.rng.choice(actions))
                if path in self.trials or path in self.in_flight:
                    self.num_simulations += 1
                else:
                    self.begin(path)
                    paths.append(path)
            if not paths:
                return
            evaluations = yield paths
            for decisions, evaluation in zip(paths, evaluations, strict=True):
                self.record(decisions, evaluation)
