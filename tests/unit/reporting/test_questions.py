"""Questions that change, and the routes taken on them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from msgspec.structs import replace

from drllm.records.results import Outcome, Sample
from drllm.reporting.questions import choose_examples
from drllm.reporting.rendering import to_html
from drllm.reporting.run import read_run
from drllm.reporting.sections import document


def rewrite(folder: Any, outcomes: dict[int, tuple[float, float]]) -> None:
    """Let base and routed score as given on some questions, and both right on all others."""
    path = folder.path / "eval" / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        base, routed = outcomes.get(number, (1.0, 1.0))
        row["systems"] = {
            "base": {"correct": base, "gold_logprob": None, "decisions": [1, 1, 1, 1]},
            "routed": {"correct": routed, "gold_logprob": None, "decisions": [1, 0, 2, 1]},
        }
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def score(values: dict[str, Any]) -> None:
        for place, system in enumerate(values["systems"][:2]):
            scores = [outcomes.get(number, (1.0, 1.0))[place] for number in range(len(rows))]
            system.update(accuracy=sum(scores) / len(scores), interval=[0.0, 1.0])

    folder.change("eval/arc_easy.json", score)


@pytest.fixture
def folder(folder: Any) -> Any:
    folder.evaluation(questions=20)
    return folder


def test_won_and_lost_questions_are_listed_with_their_routes(folder, text_of):
    rewrite(folder, {3: (0, 1), 5: (1, 0), 7: (1, 0), 8: (0, 0)})
    text = text_of(folder.path).split("## Questions that change")[1].split("## Routes")[0]
    assert (
        "Of 20 questions, 16 stay right and 1 stay wrong under routing; 1 are won and 2 lost "
        "against base."
    ) in text
    won, lost = text.split("*Questions lost (right under base alone): 2*")
    assert "*Questions won (right under routing alone): 1*" in won
    assert re.findall(r"^\| arc_easy-(\d+) \|", won, re.MULTILINE) == ["3"]
    assert re.findall(r"^\| arc_easy-(\d+) \|", lost, re.MULTILINE) == ["5", "7"]
    assert "when ice melts in case 3? | `█·2█` | 4 | it glows |" in won


def test_no_change_has_no_table(folder, text_of):
    rewrite(folder, {})
    text = text_of(folder.path).split("## Questions that change")[1].split("## Routes")[0]
    assert "20 stay right and 0 stay wrong" in text
    assert "|" not in text


def test_grades_that_change_are_compared_as_grades(folder, text_of):
    rewrite(folder, {3: (0.2, 0.9), 4: (0.9, 0.2)})
    folder.grade()
    text = text_of(folder.path)
    assert "Of 20 questions, 18 keep their grade under routing; 1 are won and 1 lost" in text
    assert "*Questions with a better grade: 1*" in text
    assert "Base is graded 0.20, routed is graded 0.90." in text


def test_long_questions_are_cut_between_words(new_folder, text_of):
    folder = new_folder()
    folder.evaluation(questions=20, question=lambda n: f"{n} " + "several words " * 20)
    rewrite(folder, {3: (0, 1)})
    text = text_of(folder.path).split("*Questions won")[1]
    [cell] = re.findall(r"^\| arc_easy-3 \| ([^|]*) \|", text, re.MULTILINE)
    assert re.fullmatch(r"3 several words several .* words …", cell)
    assert len(cell) <= 90


def test_routes_in_tables_are_drawn_mark_by_mark_in_the_page(folder):
    rewrite(folder, {3: (0, 1)})
    html = to_html(document([read_run(folder.path)]))
    strip = '<span class="strip" role="img" aria-label="Route: █·2█">'
    assert html.count(strip) == 1
    marks = html.split(strip)[1].split("</td>")[0]
    assert re.findall(r'class="(\w+)"', marks) == ["execute", "skip", "repeat", "execute"]


def test_routes_of_tasks_are_coloured_by_what_they_do(folder):
    folder.evaluation(task="other", questions=20)
    html = to_html(document([read_run(folder.path)]))
    maps = html.split("<h2>Routes by task</h2>")[1].split("</section>")[0].split("heat")[1:]
    for decision, heat in zip(("skip", "repeat"), maps, strict=True):
        assert heat.count(f'<td class="{decision}"') == 2 * 4


def sample(name: str, base: float, routed: float, route: tuple[int, ...] | None) -> Sample:
    outcomes = {"base": (base, (1, 1, 1)), "routed": (routed, route)}
    systems = {
        system: Outcome(correct=correct, gold_logprob=None, decisions=decisions)
        for system, (correct, decisions) in outcomes.items()
    }
    return Sample(id=name, task="t", question="?", choices=("a", "b"), gold=0, systems=systems)


SAME, CHEAPER = sample("same", 1, 1, (1, 1, 1)), sample("cheaper", 0, 0, (1, 0, 0))
LOST, WON = sample("lost", 1, 0, (1, 0, 1)), sample("won", 0, 1, (1, 2, 1))
LATER, OTHER = sample("won later", 0, 1, (0, 0, 1)), sample("other", 0, 0, (1, 1, 1))
NO_ROUTE = sample("without a route", 0, 1, None)


@pytest.mark.parametrize(
    ("samples", "chosen"),
    [
        ([SAME, LOST, WON, LATER, CHEAPER], [WON, LOST, CHEAPER]),
        ([SAME, CHEAPER, OTHER, replace(OTHER, id="last")], [CHEAPER, SAME, OTHER]),
        ([NO_ROUTE, CHEAPER], [CHEAPER]),
    ],
    ids=["won, lost, cheapest unchanged", "filled with the first others", "only with routes"],
)
def test_examples_are_chosen_by_rule(run, samples, chosen):
    evaluation = replace(run.evaluations[0], samples=tuple(samples))
    assert [found for _, found in choose_examples(evaluation)] == chosen
