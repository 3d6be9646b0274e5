"""One whole search tree, stored so that a change of the search shows as a readable diff.

python tests/golden/test_search_tree.py     writes the stored tree anew
"""

from pathlib import Path
from random import Random

from drllm.config import SearchConfig
from drllm.paths import Decisions, sketch
from drllm.search.strategies import Evaluation
from drllm.search.strategies.mcts import Node, TreeSearch

STORED = Path(__file__).with_name("search_tree.txt")
CONFIG = SearchConfig(num_simulations=24, budget=1.2, leaves_per_round=1)


def margin(decisions: Decisions) -> float:
    """The full path is right by 1 nat, a skip costs 0.75; repeating layer 3 gains 0.5.

    Without layer 0 nothing is right.
    """
    lost = 0.75 * decisions[1:].count(0) + 5 * (decisions[0] == 0)
    return 1 - lost + 0.5 * (decisions[3] == 2)


def draw() -> str:
    """Draw the tree: one line an edge, below its parent; a node met again is not drawn again."""
    search = TreeSearch(5, CONFIG, Random(0))
    paths = search.start()
    while paths:
        score = margin(*paths)
        paths = search.advance([Evaluation(float(score >= 0), score)])

    lines = [
        "edit · decisions · simulation, reward and margin · visits and mean reward of the node",
        "",
    ]
    drawn: set[Decisions] = set()

    def add(label: str, node: Node, depth: int) -> None:
        simulation, reward, score = search.trials[node.decisions]
        start = f"{'  ' * depth}{label}".ljust(26)
        if node.decisions in drawn:
            lines.append(f"{start}{sketch(node.decisions)}  as above")
            return
        drawn.add(node.decisions)
        lines.append(
            f"{start}{sketch(node.decisions)}  #{simulation:<2} "
            f"{reward:.0f} {score:+.2f}  "
            f"{node.visits:>2} visits, {node.value_sum / node.visits:.3f}"
        )
        for action, child in node.children.items():
            add(str(action), child, depth + 1)

    add("full path", search.root, 0)
    return "\n".join(lines) + "\n"


def test_the_search_grows_the_stored_tree():
    assert STORED.read_text(encoding="utf-8") == draw()


def test_the_stored_tree_shows_every_node_and_a_shared_one():
    text = STORED.read_text(encoding="utf-8")
    assert text.count("#") == CONFIG.num_simulations + 1
    assert "as above" in text


if __name__ == "__main__":
    STORED.write_text(draw(), encoding="utf-8")
