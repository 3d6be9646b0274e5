from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drllm.cli import main
from drllm.cli.show import show
from drllm.cli.show_search import (
    draw_paths,
    edits_between,
    least_harmful_first,
    show_question,
    show_search,
)
from drllm.cli.show_supervision import say_supervision
from drllm.cli.terminal import Terminal
from drllm.config import SuperviseConfig
from drllm.cost import executions
from drllm.errors import RecordError
from drllm.paths import Decision
from drllm.records import (
    FailedQuestion,
    Retest,
    SearchRecord,
    TriedPath,
    new_manifest,
    to_lines,
    write_atomically,
    write_records,
)
from drllm.search import CHUNKS_FOLDER
from drllm.supervision.select import supervise, targets

KEPT = Retest(passed=3, asked=4, margin=0.5, survived=True)
LOST = Retest(passed=1, asked=4, margin=-0.5, survived=False)


def tried(decisions: str, reward: float = 0.0, **fields: Any) -> TriedPath:
    values = tuple(map(int, decisions))
    return TriedPath(
        **{
            "decisions": values,
            "simulation": 0,
            "reward": reward,
            "margin": None,
            "executions": executions(values),
        }
        | fields
    )


def record(*paths: TriedPath, **fields: Any) -> SearchRecord:
    """A searched question; the first path is the full one, the others are numbered in order."""
    return SearchRecord(
        **{
            "id": "q1",
            "task": "facts",
            "question": "What is water?",
            "prompt": "Q: What is water?",
            "answer": "wet",
            "reward": "loglikelihood",
            "num_layers": len(paths[0].decisions),
            "seconds": 2.0,
        }
        | fields,
        paths=tuple(
            TriedPath(**{name: getattr(path, name) for name in path.__slots__} | {"simulation": n})
            for n, path in enumerate(paths)
        ),
    )


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, with single spaces."""
    return " ".join(capsys.readouterr().out.replace("\u00a0", " ").split())


# --- the story ---------------------------------------------------------------------------------

FOUND = [
    record(
        tried("1111", 1.0, margin=0.5, kl=0.0, retest=KEPT),
        tried("1110", 1.0, margin=0.25, kl=0.5, retest=KEPT),
        tried("1100", 1.0, margin=0.0, kl=0.75, retest=LOST),
        tried("2111", 1.0, margin=1.5, kl=0.25),
    ),
    record(
        tried("1111", margin=-1.0, kl=0.0),
        tried("1110", margin=-2.25, kl=1.0),
        tried("1011", 1.0, margin=0.5, kl=0.25, retest=KEPT),
        id="q2",
        task="other",
        question="What is ice?",
    ),
]


def test_the_story_tells_yields_by_task_before_and_after_the_retest(
    capsys: pytest.CaptureFixture[str],
):
    show_search(FOUND, Terminal())

    out = printed(capsys)
    assert "questions 2, 4 layers, reward loglikelihood" in out
    assert "paths tried 7, 3.5 a question" in out
    assert "facts 1 1 (100.0 %) 1 → 1 1 → 1 0 → 0" in out
    assert "other 1 0 (0.0 %) 1 → 1 1 → 1 1 → 1" in out
    assert "all 2 1 (50.0 %) 2 → 2 2 → 2 1 → 1" in out
    assert "re-test 4 paths asked again, 3 (75.0 %) survived" in out


def test_a_copy_of_a_question_counts_in_what_was_spent_and_in_no_yield(
    capsys: pytest.CaptureFixture[str],
):
    copy = record(*FOUND[0].paths, task="other", question="what is  WATER?")
    show_search([*FOUND, copy], Terminal())

    out = printed(capsys)
    assert "questions 2 and 1 copies, 4 layers, reward loglikelihood" in out
    assert "paths tried 11, 3.7 a question" in out
    assert "other 1 0 (0.0 %) 1 → 1 1 → 1 1 → 1" in out
    assert "all 2 1 (50.0 %) 2 → 2 2 → 2 1 → 1" in out


def test_the_story_tells_executions_and_time(capsys: pytest.CaptureFixture[str]):
    show_search(FOUND, Terminal())

    out = printed(capsys)
    # facts: 0 1 2 3 and 0 0 1 2 3 share one; other: 0 1 2 3 and 0 2 3.
    assert "executions 24 asked by paths, 14 (58.3 %) distinct in a question" in out
    assert "shortest 3.00 executions of 4 for the shortest surviving path, mean of 2" in out
    assert "time 4.0 s, 2.0 s a question, 1.8 paths a second" in out


def test_a_search_without_survivors_has_no_shortest_path(capsys: pytest.CaptureFixture[str]):
    show_search([record(tried("11"), tried("10"))], Terminal())

    assert "shortest" not in printed(capsys)


def test_single_edits_are_told_by_layer_the_least_harmful_first():
    skips = least_harmful_first(FOUND, Decision.SKIP)

    told = [(e.layer, e.questions, e.right, e.base_right, e.kl, e.margin) for e in skips]
    assert told == [(1, 1, 1.0, 0.0, 0.25, 1.5), (3, 2, 0.5, 0.5, 0.75, -0.75)]


def test_repeats_are_told_apart_from_skips():
    (repeat,) = least_harmful_first(FOUND, Decision.REPEAT)

    assert (repeat.layer, repeat.questions, repeat.margin) == (0, 1, 1.0)


def test_without_kl_edits_are_ranked_by_margin():
    found = [
        record(
            tried("111", margin=1.0),
            tried("011", margin=-1.0),
            tried("101", margin=2.0),
            tried("110", margin=0.0),
        )
    ]

    assert [edit.layer for edit in least_harmful_first(found, Decision.SKIP)] == [1, 2, 0]


def test_without_kl_and_margin_edits_are_ranked_by_answers():
    found = [record(tried("111", 1.0), tried("011"), tried("101", 1.0))]

    skips = least_harmful_first(found, Decision.SKIP)

    assert [edit.layer for edit in skips] == [1, 0]
    assert skips[0].kl is skips[0].margin is None


def test_of_many_layers_the_best_and_the_worst_are_shown(capsys: pytest.CaptureFixture[str]):
    full = tried("1" * 12, kl=0.0)
    skips = [tried("1" * layer + "0" + "1" * (11 - layer), kl=layer / 10) for layer in range(12)]
    show_search([record(full, *skips)], Terminal())

    table = printed(capsys).split("of 12 layers first")[1]
    shown = [word for word in table.split() if word.isdecimal()]
    assert shown[::2] == ["0", "1", "2", "3", "4", "9", "10", "11"]
    assert "…" in table


def test_edits_that_were_hardly_tried_are_not_ranked(capsys: pytest.CaptureFixture[str]):
    often = [
        record(tried("111", kl=0.0), tried("110", kl=0.5), id=f"q{number}") for number in range(6)
    ]
    once = record(tried("111", kl=0.0), tried("011", kl=0.001), id="rare")
    show_search([*often, once], Terminal())

    assert "of 1 layers first" in printed(capsys)


def test_the_story_of_a_search_fits_eighty_columns(capsys: pytest.CaptureFixture[str]):
    terminal = Terminal()
    terminal.out.width = 80
    long = [
        record(*one.paths, id=one.id, task=f"quite_a_long_name_{number}", seconds=12345.6)
        for number, one in enumerate(FOUND * 2)
    ]
    show_search(long, terminal)

    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_after_a_search_layers_are_not_ranked(capsys: pytest.CaptureFixture[str]):
    show_search(FOUND, Terminal(), edits=False)

    out = printed(capsys)
    assert "paths tried 7" in out
    assert "least harmful" not in out


# --- one question ------------------------------------------------------------------------------


def drawn(*decisions: str) -> list[str]:
    """The lines of the tree of paths that were tried in this order."""
    paths = record(*(tried(text) for text in decisions)).paths
    return [line for _, line in draw_paths(paths)]


def test_paths_stand_below_the_path_that_is_one_edit_shorter():
    assert drawn("1111", "1110", "0111", "0110", "0112") == [
        "full path",
        "├ skip 3",
        "│ then skip 0",
        "└ skip 0",
        "  then repeat 3",
    ]


def test_of_two_possible_parents_the_one_tried_first_is_taken():
    assert drawn("1111", "0111", "1110", "0110")[1:3] == ["├ skip 0", "│ then skip 3"]
    assert drawn("1111", "1110", "0111", "0110")[1:3] == ["├ skip 3", "│ then skip 0"]


def test_two_neighbours_are_skipped_by_one_edit():
    assert drawn("1111", "1001", "1101")[1:] == ["├ skip 1-2", "└ skip 2"]


def test_a_path_without_a_tried_parent_stands_below_the_nearest():
    assert drawn("11111", "01111", "01012")[1:] == ["then skip 0", "then skip 2, repeat 4"]


def test_a_chain_of_edits_stays_at_one_depth():
    lines = drawn(*("10" * n + "1" * (50 - 2 * n) for n in range(25)))

    assert lines == ["full path", *(f"then skip {2 * n + 1}" for n in range(24))]


@given(st.data())
def test_every_path_is_drawn_once_with_the_edits_that_lead_to_it(data: st.DataObject):
    rows = data.draw(
        st.lists(
            st.lists(st.integers(0, 2), min_size=4, max_size=4).filter(any).map(tuple),
            unique=True,
            max_size=12,
        )
    )
    full = (1, 1, 1, 1)
    texts = ["".join(map(str, row)) for row in (full, *(row for row in rows if row != full))]

    lines = list(draw_paths(record(*(tried(text) for text in texts)).paths))

    assert sorted(decisions for decisions, _ in lines) == sorted(
        tuple(map(int, text)) for text in texts
    )


def test_edits_do_not_lead_back():
    assert edits_between((0, 1), (1, 1)) is None
    assert edits_between((2, 1), (0, 1)) is None
    assert edits_between((1, 1), (1, 1)) == []


def line_of(out: str, start: str) -> str:
    """The rest of the line that begins so, with single spaces."""
    (line,) = [line for line in out.splitlines() if line.strip().startswith(start)]
    return " ".join(line.replace(start, "", 1).split())


def test_a_questions_tree_has_all_that_was_measured(capsys: pytest.CaptureFixture[str]):
    show_question(FOUND, "q1", Path("search.jsonl"), Terminal())

    out = capsys.readouterr().out
    assert "What is water?" in out
    assert line_of(out, "target") == "#1, 3.0 executions (rule shortest)"
    assert line_of(out, "full path") == "0 yes 0.50 4.0 0.000 + 3 of 4"
    assert line_of(out, "├ skip 3 ") == "1 yes 0.25 3.0 0.500 + 3 of 4"
    assert line_of(out, "├ skip 2-3") == "2 yes 0.00 2.0 0.750 − 1 of 4"
    assert line_of(out, "└ repeat 0") == "3 yes 1.50 5.0 0.250"


def test_what_was_not_measured_is_left_open(capsys: pytest.CaptureFixture[str]):
    found = record(tried("11"), tried("10", 0.5))
    show_question([found], "q1", Path("search.jsonl"), Terminal())

    out = capsys.readouterr().out
    assert line_of(out, "then skip 1") == "1 0.50 – 1.0 –"
    assert line_of(out, "target") == "none: no valid path"


def test_generated_answers_stand_beside_their_paths(capsys: pytest.CaptureFixture[str]):
    found = record(
        tried("11", 1.0, answer="B"), tried("10", answer="I [b]don't\nknow"), reward="letter"
    )
    show_question([found], "q1", Path("search.jsonl"), Terminal())

    out = capsys.readouterr().out
    assert line_of(out, "full path").endswith(" B")
    assert line_of(out, "then skip 1").endswith(" I [b]don't kn…")


def test_a_long_answer_keeps_its_path_on_one_line(capsys: pytest.CaptureFixture[str]):
    terminal = Terminal()
    terminal.out.width = 80
    found = record(tried("11", answer="so and so " * 20), tried("10", answer="B"), reward="boxed")
    show_question([found], "q1", Path("search.jsonl"), terminal)

    out = capsys.readouterr().out
    assert line_of(out, "full path").endswith("…")
    assert "so and so" in line_of(out, "full path")
    assert max(map(len, out.splitlines())) <= 80


def test_a_questions_tree_fits_eighty_columns(capsys: pytest.CaptureFixture[str]):
    rows = ["1" * 30, *("1" * n + "0" + "1" * (29 - n) for n in range(30))]
    rows += [text[:28] + "02" for text in rows[1:20]]
    found = record(
        *(tried(text, margin=-12.34, kl=12.345, retest=LOST) for text in rows),
        question="Why? " * 40,
    )
    terminal = Terminal()
    terminal.out.width = 80
    show_question([found], "q1", Path("search.jsonl"), terminal)

    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_an_unknown_id_names_the_nearest():
    found = [record(tried("11"), id=name) for name in ("train-7", "train-71", "other-3", "x")]

    with pytest.raises(
        RecordError, match=r"no question with id 'train-72'; .* of 4: train-7, train-71, other-3"
    ):
        show_question(found, "train-72", Path("search.jsonl"), Terminal())


def test_an_id_of_two_tasks_draws_both(capsys: pytest.CaptureFixture[str]):
    found = [record(tried("11"), task=name) for name in ("one", "two")]
    show_question(found, "q1", Path("search.jsonl"), Terminal())

    out = capsys.readouterr().out
    assert "q1 of one" in out
    assert "q1 of two" in out


# --- files -------------------------------------------------------------------------------------


def search_file(folder: Path, found: Sequence[SearchRecord] = FOUND) -> Path:
    file = folder / "search.jsonl"
    write_records(file, found, new_manifest("search", model={}, config={}))
    return file


@pytest.mark.parametrize("folder", [False, True])
def test_show_draws_a_question_of_a_file_or_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: bool
):
    file = search_file(tmp_path)
    assert main(["show", str(tmp_path if folder else file), "--question", "q2"]) == 0

    assert "What is ice?" in capsys.readouterr().out


def test_a_questions_target_follows_the_rule_of_the_supervision_next_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = search_file(tmp_path)
    config = SuperviseConfig(target="least_kl", min_saving=0.5)
    supervise([file], config, tmp_path / "supervision.jsonl")
    assert main(["show", str(file), "--question", "q1"]) == 0

    assert line_of(capsys.readouterr().out, "target") == "#2, 2.0 executions (rule least_kl)"


def test_show_tells_the_story_of_a_search_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    show(search_file(tmp_path), Terminal())

    assert "as the search found it → after the re-test" in printed(capsys)


def test_a_question_is_drawn_from_a_search_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "supervision.jsonl"
    supervise([search_file(tmp_path)], SuperviseConfig(), output)

    assert main(["show", str(output), "--question", "q1"]) == 2
    assert "supervision.jsonl is no search.jsonl" in capsys.readouterr().err
    assert main(["show", str(tmp_path / "nowhere"), "--question", "q1"]) == 2


def failed_file(folder: Path) -> Path:
    file = folder / "search.failed.jsonl"
    failed = [
        FailedQuestion(id="q7", task="facts", question="Why?", error=error, attempts=3)
        for error in ("TaskError: [b]no[/b] prompt", "ModelError: not finite")
    ]
    write_atomically(file, to_lines(failed))
    return file


def test_questions_that_failed_are_shown_with_their_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    show(failed_file(tmp_path), Terminal())

    out = printed(capsys)
    assert "failed 2 questions were set aside by the search" in out
    assert "facts q7 3 TaskError: [b]no[/b] prompt" in out
    assert "facts q7 3 ModelError: not finite" in out


def test_a_folder_tells_of_questions_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    search_file(tmp_path)
    failed_file(tmp_path)
    show(tmp_path, Terminal())

    assert "failed 2 questions were set aside" in printed(capsys)


def test_a_broken_line_of_the_failed_questions_is_named(tmp_path: Path):
    file = failed_file(tmp_path)
    file.write_text(file.read_text() + '{"error": "x"}\n')

    with pytest.raises(RecordError, match=r"failed\.jsonl, line 3: .*`id`"):
        show(file, Terminal())


@pytest.mark.parametrize("place", ["", CHUNKS_FOLDER])
def test_a_search_that_is_not_finished_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
):
    digest = "0123456789ab"
    whole = [f"batch-0-{digest}.json", f"batch-13-{digest}.json"]
    others = [f"batch-2-{digest}.round-0-{digest}.json", f"batch-3-{digest}.json.broken"]
    for name in (*whole, *others, "drllm.resume.json"):
        write_atomically(tmp_path / CHUNKS_FOLDER / name, "{}\n")
    show(tmp_path / place, Terminal())

    assert "search not finished: 2 batches of questions" in printed(capsys)


def test_what_is_kept_of_a_search_that_is_whole_is_not_mentioned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    search_file(tmp_path)
    write_atomically(tmp_path / CHUNKS_FOLDER / "batch-0-0123456789ab.json", "{}\n")
    show(tmp_path, Terminal())

    assert "not finished" not in capsys.readouterr().out


# --- supervision -------------------------------------------------------------------------------


def test_a_supervision_is_told_with_tasks_reasons_and_layers(capsys: pytest.CaptureFixture[str]):
    hopeless = record(tried("1111"), id="q3", question="Why?")
    say_supervision(targets([*FOUND, hopeless], SuperviseConfig()).summary, Terminal())

    out = printed(capsys)
    assert "base right 1 of 3 questions (33.3 %)" in out
    assert "valid path 2 questions, 2 after the re-test saving" in out
    assert "saving path 2 questions, 2 after the re-test; 2 of 3 such paths" in out
    assert "improving path 1 questions, 1 after the re-test; 1 of 1 such paths" in out
    assert "targets 2 of 3 questions (66.7 %), 3.00 executions on average" in out
    assert "facts 2 1 1 0 1 0 other 1 0 1 1 1 1" in out
    assert "without 1 no valid path" in out
    assert "most skipped layers 1 (1), 3 (1)" in out
    assert "most repeated" not in out


def test_questions_without_a_target_are_counted_by_task_and_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    hopeless = [
        record(tried("1111"), id=f"h{n}", question=f"{n}?", task="fa[ct]s" if n < 2 else "other")
        for n in range(3)
    ]
    file = search_file(tmp_path, [*FOUND, *hopeless])
    supervise([file], SuperviseConfig(quotas="other=1,facts=1"), tmp_path / "mine.jsonl")
    show(tmp_path / "mine.rejected.jsonl", Terminal())

    out = printed(capsys)
    assert "without 3 records have no target" in out
    assert "fa[ct]s no valid path 2" in out
    assert out.endswith("other no valid path 1")


def test_copies_of_questions_are_told_apart(capsys: pytest.CaptureFixture[str]):
    copies = [record(*FOUND[1].paths, task=name, question="What is water?") for name in "ab"]
    say_supervision(targets([*FOUND, *copies], SuperviseConfig()).summary, Terminal())

    out = printed(capsys)
    assert "base right 1 of 2 questions (50.0 %)" in out
    assert "targets 2 of 2 questions (100.0 %)" in out
    assert "without none copies 2 records, left out: each question counts once" in out


def test_a_summary_of_an_older_version_is_told_as_far_as_it_goes(
    capsys: pytest.CaptureFixture[str],
):
    summary = targets(FOUND, SuperviseConfig()).summary
    for name in ("copies", "paths", "tasks", "executions", "class_counts_by_layer"):
        del summary[name]
    say_supervision(summary, Terminal())

    out = printed(capsys)
    assert "saving path 2 questions, 2 after the re-test improving" in out
    assert out.endswith("decisions skip 2 (25.0 %), execute 6 (75.0 %), repeat 0 (0.0 %)")
