import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drllm.cli import main
from drllm.cli.show import show
from drllm.cli.show_question import draw_paths, edits_between, show_question
from drllm.cli.show_search import print_supervision, show_search
from drllm.cli.terminal import Terminal
from drllm.config import SuperviseConfig
from drllm.errors import RecordError
from drllm.records.codec import write_atomically
from drllm.records.manifest import new_manifest, to_lines, write_records
from drllm.records.search import FailedQuestion, Retest, SearchRecord
from drllm.reporting.run import read_run
from drllm.search import CHUNKS_FOLDER
from drllm.supervision.select import pick_targets, supervise, supervise_to_file
from search_records import make_path, make_record

SHORTEST = SuperviseConfig(target="shortest")

KEPT = Retest(passed=3, asked=4, margin=0.5, survived=True)
LOST = Retest(passed=1, asked=4, margin=-0.5, survived=False)
SEARCH = Path("search.jsonl")


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """A function that returns what was printed, with single spaces."""
    return lambda: " ".join(capsys.readouterr().out.replace("\u00a0", " ").split())


@pytest.fixture
def narrow() -> Terminal:
    terminal = Terminal()
    terminal.out.width = 80
    return terminal


FOUND = [
    make_record(
        make_path("1111", 1.0, margin=0.5, kl=0.0, retest=KEPT),
        make_path("1110", 1.0, margin=0.25, kl=0.5, retest=KEPT),
        make_path("1100", 1.0, margin=0.0, kl=0.75, retest=LOST),
        make_path("2111", 1.0, margin=1.5, kl=0.25),
    ),
    make_record(
        make_path("1111", margin=-1.0, kl=0.0),
        make_path("1110", margin=-2.25, kl=1.0),
        make_path("1011", 1.0, margin=0.5, kl=0.25, retest=KEPT),
        id="q2",
        task="other",
        question="What is ice?",
    ),
]


def test_the_story_tells_yields_by_task_executions_and_time(printed):
    show_search(FOUND, Terminal())

    out = printed()
    assert "questions 2, 4 layers, reward loglikelihood" in out
    assert "paths tried 7, 3.5 a question" in out
    assert "facts 1 1 (100.0 %) 1 → 1 1 → 1 0 → 0" in out
    assert "other 1 0 (0.0 %) 1 → 1 1 → 1 1 → 1" in out
    assert "all 2 1 (50.0 %) 2 → 2 2 → 2 1 → 1" in out
    assert "re-test 4 paths tested again, 3 (75.0 %) survived" in out
    # facts: 0 1 2 3 and 0 0 1 2 3 share one; other: 0 1 2 3 and 0 2 3.
    assert "executions 24 in all paths, 14 (58.3 %) without those that paths share" in out
    assert "shortest 3.00 executions of 4 for the shortest surviving path, mean of 2" in out
    assert "time 4.0 s, 2.0 s a question, 1.8 paths a second" in out


def test_a_copy_of_a_question_counts_in_what_was_spent_and_in_no_yield(printed):
    copy = make_record(*FOUND[0].paths, task="other", question="what is  WATER?")
    show_search([*FOUND, copy], Terminal())
    out = printed()
    assert "questions 2 and 1 copies, 4 layers, reward loglikelihood" in out
    assert "paths tried 11, 3.7 a question" in out
    assert "other 1 0 (0.0 %) 1 → 1 1 → 1 1 → 1" in out
    assert "all 2 1 (50.0 %) 2 → 2 2 → 2 1 → 1" in out


def test_a_search_without_survivors_has_no_shortest_path(printed):
    show_search([make_record(make_path("11"), make_path("10"))], Terminal())
    assert "shortest" not in printed()


@pytest.mark.parametrize(
    ("decisions", "lines"),
    [
        (
            ["1111", "1110", "0111", "0110", "0112"],
            ["├ skip 3", "│ then skip 0", "└ skip 0", "  then repeat 3"],
        ),
        (["1111", "0111", "1110", "0110"], ["├ skip 0", "│ then skip 3", "└ skip 3"]),
        (["1111", "1110", "0111", "0110"], ["├ skip 3", "│ then skip 0", "└ skip 0"]),
        (["1111", "1001", "1101"], ["├ skip 1-2", "└ skip 2"]),
        (["11111", "01111", "01012"], ["then skip 0", "then skip 2, repeat 4"]),
        (
            ["10" * n + "1" * (50 - 2 * n) for n in range(25)],
            [f"then skip {2 * n + 1}" for n in range(24)],
        ),
    ],
    ids=[
        "below the path that is one edit shorter",
        "of two possible parents the one tried first",
        "and the other way round",
        "two neighbours are skipped by one edit",
        "without a tried parent below the nearest",
        "a chain of edits stays at one depth",
    ],
)
def test_tried_paths_are_drawn_as_a_tree_of_edits(decisions: list[str], lines: list[str]):
    paths = make_record(*map(make_path, decisions)).paths
    assert [line for _, line in draw_paths(paths)] == ["full path", *lines]


@given(st.data())
def test_every_path_is_drawn_once_with_the_edits_that_lead_to_it(data: st.DataObject):
    row = st.lists(st.integers(0, 2), min_size=4, max_size=4).filter(any).map(tuple)
    rows = data.draw(st.lists(row, unique=True, max_size=12))
    full = (1, 1, 1, 1)
    every = [full, *(row for row in rows if row != full)]
    drawn = draw_paths(make_record(*(make_path("".join(map(str, row))) for row in every)).paths)
    assert sorted(decisions for decisions, _ in drawn) == sorted(every)


def test_edits_do_not_lead_back():
    assert edits_between((0, 1), (1, 1)) is None
    assert edits_between((2, 1), (0, 1)) is None
    assert edits_between((1, 1), (1, 1)) == []


@pytest.fixture
def line_of(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """A function that returns the rest of the printed line that begins so, with single spaces."""
    lines: list[str] = []

    def rest(start: str) -> str:
        lines.extend(capsys.readouterr().out.splitlines())
        (line,) = [line for line in lines if line.strip().startswith(start)]
        return " ".join(line.replace(start, "", 1).split())

    return rest


def test_a_questions_tree_has_all_that_was_measured(line_of):
    show_question(FOUND, "q1", SEARCH, Terminal())
    assert line_of("What is water?") == ""
    assert line_of("target") == "#1, 3.0 executions (rule least_kl)"
    assert line_of("full path") == "0 yes 0.50 4.0 0.000 + 3 of 4"
    assert line_of("├ skip 3 ") == "1 yes 0.25 3.0 0.500 + 3 of 4"
    assert line_of("├ skip 2-3") == "2 yes 0.00 2.0 0.750 − 1 of 4"
    assert line_of("└ repeat 0") == "3 yes 1.50 5.0 0.250"


def test_what_was_not_measured_is_left_open(line_of):
    show_question([make_record(make_path("11"), make_path("10", 0.5))], "q1", SEARCH, Terminal())
    assert line_of("then skip 1") == "1 0.50 – 1.0 –"
    assert line_of("target") == "none: no KL in the record"


def test_generated_answers_stand_beside_their_paths(line_of):
    paths = make_path("11", 1.0, answer="B"), make_path("10", answer="I [b]don't\nknow")
    show_question([make_record(*paths, reward="letter")], "q1", SEARCH, Terminal())
    assert line_of("full path").endswith(" B")
    assert line_of("then skip 1").endswith(" I [b]don't kn…")


def test_a_long_answer_keeps_its_path_on_one_line(narrow, line_of):
    paths = make_path("11", answer="so and so " * 20), make_path("10", answer="B")
    show_question([make_record(*paths, reward="boxed")], "q1", SEARCH, narrow)
    assert line_of("full path").endswith("…")
    assert "so and so" in line_of("full path")


def test_an_unknown_id_names_the_nearest():
    found = [
        make_record(make_path("11"), id=name) for name in ("train-7", "train-71", "other-3", "x")
    ]
    with pytest.raises(
        RecordError, match=r"no question with id 'train-72'; .* of 4: train-7, train-71, other-3"
    ):
        show_question(found, "train-72", SEARCH, Terminal())


def test_an_id_of_two_tasks_draws_both(printed):
    found = [make_record(make_path("11"), task=name) for name in ("one", "two")]
    show_question(found, "q1", SEARCH, Terminal())
    out = printed()
    assert "q1 of one" in out
    assert "q1 of two" in out


def search_file(folder: Path, found: Sequence[SearchRecord] = FOUND) -> Path:
    file = folder / "search.jsonl"
    write_records(file, found, new_manifest("search", model={}, config={}))
    return file


@pytest.mark.parametrize("folder", [False, True])
def test_show_draws_a_question_of_a_file_or_folder(tmp_path: Path, drllm, folder: bool):
    file = search_file(tmp_path)
    assert "What is ice?" in drllm("show --question q2", tmp_path if folder else file).out


def test_a_questions_target_follows_the_rule_of_the_supervision_next_to_it(tmp_path: Path, line_of):
    file = search_file(tmp_path)
    config = SuperviseConfig(target="least_kl", min_saving=0.5)
    supervise([file], config, tmp_path)
    assert main(["show", str(file), "--question", "q1"]) == 0
    assert line_of("target") == "#2, 2.0 executions (rule least_kl)"


def failed_file(folder: Path) -> Path:
    file = folder / "search.failed.jsonl"
    failed = [
        FailedQuestion(id="q7", task="facts", question="Why?", error=error, attempts=3)
        for error in ("TaskError: [b]no[/b] prompt", "ModelError: not finite")
    ]
    write_atomically(file, to_lines(failed))
    return file


@pytest.mark.parametrize("folder", [False, True])
def test_questions_that_failed_are_shown_with_their_errors(tmp_path: Path, printed, folder: bool):
    file = failed_file(tmp_path)
    show(tmp_path if folder else file, Terminal())
    out = printed()
    assert "failed 2 questions failed at every attempt" in out
    assert "facts q7 3 TaskError: [b]no[/b] prompt" in out
    assert "facts q7 3 ModelError: not finite" in out


@pytest.mark.parametrize("place", ["", CHUNKS_FOLDER])
def test_a_search_that_is_not_finished_says_how_far_it_is(tmp_path: Path, printed, place: str):
    digest = "0123456789ab"
    whole = [f"batch-0-{digest}.json", f"batch-13-{digest}.json"]
    others = [f"batch-2-{digest}.round-0-{digest}.json", f"batch-3-{digest}.json.broken"]
    for name in (*whole, *others, "drllm.resume.json"):
        write_atomically(tmp_path / CHUNKS_FOLDER / name, "{}\n")
    show(tmp_path / place, Terminal())
    assert "search not finished: 2 batches of questions" in printed()


def test_what_is_kept_of_a_search_that_is_whole_is_not_mentioned(tmp_path: Path, printed):
    search_file(tmp_path)
    write_atomically(tmp_path / CHUNKS_FOLDER / "batch-0-0123456789ab.json", "{}\n")
    show(tmp_path, Terminal())
    assert "not finished" not in printed()


def test_a_supervision_is_told_with_tasks_and_reasons(printed):
    hopeless = make_record(make_path("1111"), id="q3", question="Why?")
    print_supervision(pick_targets([*FOUND, hopeless], SHORTEST).summary, Terminal())

    out = printed()
    assert "facts 2 1 (50.0 %) 1 → 1 1 → 1 0 → 0 1 0" in out
    assert "other 1 0 (0.0 %) 1 → 1 1 → 1 1 → 1 1 1" in out
    assert "all 3 1 (33.3 %) 2 → 2 2 → 2 1 → 1 2 1" in out
    assert "targets 2 (66.7 %), 3.00 executions on average" in out
    assert "without 1 no valid path" in out


def test_questions_without_a_target_are_counted_by_task_and_reason(tmp_path: Path, printed):
    hopeless = [
        make_record(make_path("1111"), id=f"h{n}", question=f"{n}?", task=task)
        for n, task in enumerate(("fa[ct]s", "fa[ct]s", "other"))
    ]
    file = search_file(tmp_path, [*FOUND, *hopeless])
    supervise_to_file(
        [file],
        SuperviseConfig(target="shortest", quotas="other=1,facts=1"),
        tmp_path / "mine.jsonl",
    )
    show(tmp_path / "mine.rejected.jsonl", Terminal())
    out = printed()
    assert "without 3 records without a target" in out
    assert "fa[ct]s no valid path 2" in out
    assert out.endswith("other no valid path 1")


def test_copies_of_questions_are_told_apart(printed):
    copies = [make_record(*FOUND[1].paths, task=name, question="What is water?") for name in "ab"]
    print_supervision(pick_targets([*FOUND, *copies], SHORTEST).summary, Terminal())
    out = printed()
    assert "all 2 1 (50.0 %)" in out
    assert "targets 2 (100.0 %)" in out
    assert "without none copies 2 records left out, since each question counts once" in out


def test_a_summary_of_an_older_version_is_told_as_far_as_it_goes(printed):
    summary = pick_targets(FOUND, SHORTEST).summary
    for name in ("copies", "paths", "tasks", "executions", "class_counts_by_layer"):
        del summary[name]
    print_supervision(summary, Terminal())
    out = printed()
    assert "all 2 1 (50.0 %) 2 → 2 2 → 2 1 → 1 2 –" in out
    assert out.endswith("decisions skip 2 (25.0 %), execute 6 (75.0 %), repeat 0 (0.0 %)")


def test_a_missing_count_of_a_task_is_left_open(printed):
    summary = pick_targets(FOUND, SHORTEST).summary
    for counts in summary["tasks"].values():
        del counts["improving_targets"]
    print_supervision(summary, Terminal())
    assert "all 2 1 (50.0 %) 2 → 2 2 → 2 1 → 1 2 –" in printed()


@pytest.mark.parametrize(
    ("name", "value"), [("questions", "x"), ("targets", None), ("class_counts", [1]), ("tasks", 3)]
)
def test_a_summary_that_was_changed_is_refused_in_one_line(tmp_path, name, value):
    file = tmp_path / "supervision.jsonl"
    write_records(tmp_path / SEARCH, FOUND, new_manifest("search", model={}, config={}))
    supervise_to_file([tmp_path / SEARCH], SHORTEST, file)
    show(file, Terminal())
    manifest = file.with_name("supervision.manifest.json")
    content = json.loads(manifest.read_text())
    content["summary"][name] = value
    manifest.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=r"supervision\.manifest\.json: 'summary': .*make"):
        show(file, Terminal())
    with pytest.raises(RecordError, match=r"supervision\.manifest\.json: 'summary': .*make"):
        read_run(tmp_path)
