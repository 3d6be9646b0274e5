"""Questions that change, with both models' answers, and the routes taken on them."""

import json
import re
from typing import Any

import pytest

from drllm.reporting.drawing import LIGHT
from drllm.reporting.evaluation_sections import ROWS, build_sections
from drllm.reporting.run import read_run


def rewrite(folder: Any, outcomes: dict[int, tuple[float, float]], **answers: Any) -> None:
    """Let base and routed score as given on some questions, and both right on all others."""
    path = folder.path / "eval" / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        base, routed = outcomes.get(number, (1.0, 1.0))
        row["systems"] = {
            "base": {"correct": base, "gold_logprob": None, "decisions": [1, 1, 1, 1]},
            "routed": {"correct": routed, "gold_logprob": None, "decisions": [1, 0, 2, 1]},
        }
        for name, answer in answers.items():
            row["systems"][name]["answer"] = answer
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


def changed(text: str) -> str:
    return text.split("## Questions won and lost")[1].split("\n## ")[0]


def test_won_and_lost_questions_stand_with_both_answers(folder, text_of):
    rewrite(folder, {3: (0, 1), 5: (1, 0), 7: (1, 0), 8: (0, 0)}, base=1, routed=3)
    text = changed(text_of(folder.path))
    assert (
        "Of 20 questions 1 are won (better with routing) and 2 lost; 16 stay right, 1 stay wrong."
    ) in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "in case" in line]
    assert [row[0].split("case ")[1] for row in rows] == ["3?", "5?", "7?"]
    assert rows[0][1:3] == ["won", "it glows"]
    assert "base it sinks; routed it glows" in text
    assert [row[1] for row in rows[1:]] == ["lost", "lost"]


def test_the_first_of_many_are_shown_and_the_others_counted(folder, text_of):
    rewrite(folder, dict.fromkeys(range(ROWS + 2), (0, 1)))
    text = changed(text_of(folder.path))
    assert len(re.findall(r"in case \d+\?", text)) == ROWS
    assert "The others (2) are in eval/samples.jsonl." in text


def test_no_change_has_no_table(folder, text_of):
    rewrite(folder, {})
    text = changed(text_of(folder.path))
    assert "20 stay right, 0 stay wrong" in text
    assert "|" not in text


def test_grades_that_change_are_compared_as_grades(folder, text_of):
    rewrite(folder, {3: (0.2, 0.9), 4: (0.9, 0.2)}, base="so", routed="or so")
    folder.grade()
    text = changed(text_of(folder.path))
    assert "1 are won (better with routing) and 1 lost; 18 keep their grade." in text
    assert "| so (graded 0.20) | or so (graded 0.90) |" in text


def test_results_without_answers_say_who_is_right(folder, text_of):
    rewrite(folder, {3: (0, 1)})
    assert "| wrong | right |" in changed(text_of(folder.path))


def test_long_questions_are_cut_between_words(new_folder, text_of):
    folder = new_folder()
    folder.evaluation(questions=20, question=lambda n: f"{n} " + "several words " * 20)
    rewrite(folder, {3: (0, 1)})
    [cell] = re.findall(r"^\| (3 [^|]*) \|", changed(text_of(folder.path)), re.MULTILINE)
    assert re.fullmatch(r"3 several words several .* words …|3 several .* several …", cell)
    assert len(cell) <= 120


def test_an_option_that_is_not_there_is_refused(folder, text_of):
    rewrite(folder, {}, base=4)
    with pytest.raises(Exception, match="'base' answered with option 4"):
        text_of(folder.path)


def test_routes_are_drawn_by_layer_with_what_the_routers_were_trained_for(folder):
    rewrite(folder, {})
    folder.search()
    folder.supervision()
    run = read_run(folder.path)
    _, _, routes, _ = build_sections(run, run.evaluations[0])
    [axes] = routes.blocks[0].draw(LIGHT, 4.2).axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights[:4] == [0, 100, 0, 0]  # skipped
    assert heights[4:8] == [100, 0, 0, 100]  # executed
    assert heights[8:] == [0, 0, 100, 0]  # repeated
    assert len(axes.collections[0].get_segments()) == 4
