"""`drllm.report`: what it writes, where, from what, and what it never does."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from drllm.errors import ConfigError, RecordError
from drllm.records.markdown import escape
from drllm.reporting.document import to_markdown
from drllm.reporting.numbers import (
    write_count_of,
    write_count_with_share,
    write_number,
    write_signed,
)
from drllm.reporting.page import to_html
from drllm.reporting.run import read_run
from drllm.reporting.sections import build_document
from drllm.reporting.stage import list_pictures, report
from run_folder import WHOLE, report_text

GOLDEN = Path(__file__).parents[2] / "golden" / "report.md"
VOID = {"meta", "br", "hr", "img", "input", "link", "use", "path"}
SHOWN = [
    "What to do next",
    "Accuracy over layers run",
    "Systems",
    "Limits on the loss",
    "Routes by layer",
    "Questions won and lost",
]
FOLDED = [
    "Findings in sentences",
    "What the systems are",
    "All depths in numbers",
    "Cost",
    "Search and targets",
    "Router metrics",
    "Provenance",
]


class Page(HTMLParser):
    """Collects the tags and texts of a page, and the tags that don't nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.words_in_sight: list[str] = []  # with details closed; of both drawings of a figure
        self.errors: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.errors.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        is_folded = "details" in self.open and "summary" not in self.open
        if not is_folded and "head" not in self.open:
            self.words_in_sight += data.split()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(page):
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def md(page):
    return page.with_suffix(".md").read_text(encoding="utf-8")


def test_the_page_nests_leads_to_its_sections_and_needs_nothing_from_elsewhere(html):
    page = Page(html)
    assert (page.errors, page.open) == ([], [])
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {str(attributes["href"]) for attributes in page.all("a")}
    assert len(links) > 8
    assert links <= {f"#{name}" for name in ids}
    assert page.all("script") + page.all("link") == []
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset"):
            assert (attributes.get(name) or "#").startswith("#")
    assert re.findall(r"http|@import|url\((?!#)", html) == []


def test_every_figure_is_whole_and_has_words_for_those_who_cannot_see_it(html):
    ids = set(re.findall(r' id="([^"]+)"', html))
    used = set(re.findall(r'href="#([^"]+)"', html)) | set(re.findall(r"url\(#([^)]+)\)", html))
    assert used
    assert used <= ids
    drawings = Page(html).all("svg")
    assert len(drawings) == 5  # two of the three figures are drawn for desks and for phones
    assert {drawing["role"] for drawing in drawings} == {"img"}
    assert min(len(drawing["aria-label"] or "") for drawing in drawings) > 40


def test_tables_name_each_cell_for_a_narrow_window_and_no_column_repeats_itself(html):
    tables = re.findall(r"<table.*?</table>", html, flags=re.DOTALL)
    assert len(tables) > 5
    for table in tables:
        _, *names = re.findall(r'<th [^>]*scope="col"[^>]*>(.*?)</th>', table)
        rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table.split("<tbody>")[1], flags=re.DOTALL)
        columns: list[set[str]] = [set() for _ in names]
        for row in rows:
            assert row.strip().startswith('<th scope="row"')
            cells = re.findall(r'data-label="([^"]*)"[^>]*>(.*?)</td>', row, flags=re.DOTALL)
            assert [label for label, _ in cells] == names
            for texts, (_, text) in zip(columns, cells, strict=True):
                texts.add(text)
        assert len(rows) == 1 or all(len(texts) > 1 for texts in columns)


def test_verdict_and_tiles_stand_first_and_details_are_folded(html, md):
    assert re.findall(r"^## (.*)$", md, re.MULTILINE) == SHOWN + FOLDED
    assert re.findall(r"<h2>(.*?)</h2>", html) == SHOWN + FOLDED
    assert html.index("<blockquote>") < html.index('class="tiles"') < html.index("<h2>")
    assert re.findall(r"<details [^>]*><summary><h2>(.*?)</h2>", html) == FOLDED


def test_the_page_is_short_while_its_details_are_closed(html):
    page = Page(html)
    assert len(page.all("details")) == len(FOLDED)
    assert not any("open" in attributes for attributes in page.all("details"))
    assert 300 < len(page.words_in_sight) < 1200


def test_every_colour_that_is_used_is_defined_in_both_schemes(html):
    assert "prefers-color-scheme: dark" in html
    for drawing in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        assert "var(--ink)" in drawing
        assert re.findall(r"#[0-9a-fA-F]{6}\b", drawing) == []
    schemes = re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL)
    light, dark = (set(re.findall(r"--([\w-]+):", scheme)) for scheme in schemes)
    assert set(re.findall(r"var\(--([\w-]+)\)", html)) <= light & dark


def test_two_reports_of_the_same_records_are_equal_but_for_their_folders(
    new_folder, page, html, md
):
    folder = new_folder(num_layers=30, seed=1)  # as the fixture's
    folder.everything(**WHOLE)
    folder.static_paths()
    document = build_document([read_run(folder.path)])
    place = str(folder.path), str(page.parent)
    assert to_html(document).replace(*place) == html
    assert to_markdown(document, "report_figures").replace(*place) == md


def test_the_markdown_is_the_golden_one(new_folder):
    folder = new_folder(name="golden", num_layers=6, seed=3)
    document = build_document([read_run(folder.everything(**WHOLE))])
    text = re.sub(r"\b[0-9a-f]{64}\b", "SHA-256", to_markdown(document, "figures"))
    text = text.replace(str(folder.path), "runs/golden")
    if os.environ.get("DRLLM_UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


EVIL = "<script>alert('x')</script> & \"quoted\" | `code` $\\frac{1}{2}$ 木"


def test_markup_and_control_characters_in_any_text_are_shown_and_not_obeyed(folder):
    folder.evaluation(task="evil", question=lambda number: f"{EVIL} \x1b[31m {number}")
    for old, new in (
        ("what permuted routes means", "<img src=x onerror=alert(1)> \\u001b[2J"),
        ("Accuracy is", "<b>No</b> Accuracy is"),
        ("permuted routes", "$x_ <i>"),
    ):
        for name in ("eval/evil.json", "eval/samples.jsonl"):
            text = (folder.path / name).read_text(encoding="utf-8")
            folder.text(name, text.replace(old, new))
    folder.text("run.yaml", "model: </pre><script>alert(1)</script>\n")
    html, md = (file.read_text(encoding="utf-8") for file in report(folder.path))
    page = Page(html)
    assert not any(page.all(tag) for tag in ("img", "script", "b", "i"))
    assert page.errors == []
    assert EVIL in "".join(page.texts)
    assert sum("$x_ <i>" in text for text in page.texts) >= 3  # table, words, figure
    outside = re.sub(r"```.*?```", "", md, flags=re.DOTALL)
    assert re.findall(r"<\w", outside) == []
    for rows in re.findall(r"(?:^\|.*\n)+", md, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows.splitlines()}) == 1
    for text in (html, md):
        assert "\x1b" not in text
        assert "x1b[31m" in text.replace("\\[", "[")


def test_the_recipe_can_hold_a_fence_of_its_own(folder):
    folder.evaluation()
    folder.text("run.yaml", "note: |\n  ```\n  # not a heading\n  ```\n")
    assert "\n````\nnote: |" in report_text(folder.path)


def test_several_runs_stand_side_by_side_and_then_one_by_one(new_folder):
    first, second, third = (new_folder(name) for name in ("a", "b", "c"))
    first.evaluation(**WHOLE)
    second.evaluation(depths=(0.1,))
    third.search()
    text = report_text(first.path, second.path, third.path)
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert headings == ["Runs compared", "Run 1: a", "Run 2: b", "Run 3: c"]
    comparison = text.split("## Run 1")[0]
    assert re.findall(r"^\| (\d: \w) \| ([^|]*) \|", comparison, re.MULTILINE) == [
        ("1: a", "base"),
        ("1: a", "routed"),
        ("1: a", "routed, 10 % saved"),
        ("1: a", "routed, 20 % saved"),
        ("2: b", "base"),
        ("2: b", "routed"),
        ("2: b", "routed, 10 % saved"),
    ]
    assert "Nothing was evaluated yet." in text.split("## Run 3")[1]


@pytest.fixture
def quick(folder):
    """A folder that is quick to report on, for tests of where a report lies."""
    folder.evaluation(questions=12)
    return folder.path


@pytest.mark.parametrize(
    ("output", "page"),
    [(None, "report.html"), ("new/place", "new/place/report.html"), ("one.html", "one.html")],
)
def test_the_report_lies_where_it_is_wanted(quick, tmp_path, output, page):
    html, md = report(quick, output_dir=output and tmp_path / output)
    assert html == (tmp_path if output else quick) / page
    assert md == html.with_suffix(".md")
    assert html.is_file()
    assert md.is_file()


@pytest.mark.parametrize(
    ("runs", "output", "error", "message"),
    [
        (["quick"], "one.pdf", ConfigError, r"one\.pdf"),
        (["quick"], "taken", RecordError, "taken"),
        (["quick", "empty"], "out", RecordError, "holds no search"),
        ([], None, ConfigError, "no run folder"),
    ],
)
def test_what_cannot_be_reported_or_written_to_is_refused_and_nothing_is_written(
    quick, tmp_path, runs, output, error, message
):
    quick.rename(tmp_path / "quick")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        report(*[tmp_path / name for name in runs], output_dir=output and tmp_path / output)
    assert set(tmp_path.rglob("*")) == before
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "mine"


def test_figures_lie_beside_the_markdown_and_replace_those_of_an_earlier_report(quick, tmp_path):
    figures = tmp_path / "one_figures"
    figures.mkdir()
    for name in ("03-old-curve.png", "mine.png"):
        (figures / name).write_bytes(b"")
    html, md = report(quick, output_dir=tmp_path / "one.html")
    pictures = re.findall(r"^!\[(.+)\]\((one_figures/[\w-]+\.png)\)$", md.read_text(), re.MULTILINE)
    assert len(pictures) == html.read_text(encoding="utf-8").count("<figure") == 2
    for words, picture in pictures:
        assert len(words) > 40
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    names = ["01-arc-easy-systems.png", "02-routes-by-layer.png"]
    assert [place.name for place in list_pictures(html)] == names
    assert sorted(place.name for place in figures.iterdir()) == [*names, "mine.png"]


def test_pictures_that_a_link_leads_to_are_not_deleted(quick, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "01-beach.png").write_bytes(b"")
    (tmp_path / "one_figures").symlink_to(pictures)
    report(quick, output_dir=tmp_path / "one.html")
    assert (pictures / "01-beach.png").exists()


def test_reporting_loads_no_torch_and_matplotlib_only_when_drawing():
    code = (
        "import sys, drllm.reporting.stage\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_drawing_leaves_the_settings_of_matplotlib_alone(quick):
    from matplotlib import rcParams

    names = [name for name in rcParams if name != "backend"]  # reading it chooses a backend
    before = [rcParams[name] for name in names]
    report(quick)
    assert [rcParams[name] for name in names] == before
    assert "matplotlib.pyplot" not in sys.modules


def test_one_thing_is_counted_in_the_singular():
    counts = [write_count_of(number, "batch", "batches") for number in (0, 1, 2000)]
    assert counts == ["0 batches", "1 batch", "2,000 batches"]


def test_texts_and_numbers_are_written_as_they_are_meant():
    assert escape("a|b <i>arc_easy</i>") == "a\\|b &lt;i&gt;arc_easy&lt;/i&gt;"
    assert [write_number(-0.04, 1), write_number(-1.25, 2)] == ["0.0", "−1.25"]
    assert [write_signed(0.5, 1), write_signed(-0.5, 1), write_signed(0.0, 1)] == [
        "+0.5",
        "−0.5",
        "0.0",
    ]
    assert write_count_with_share(3000, 4000) == "3,000 (75.0\u00a0%)"
