"""What mkdocs does for this site beside its plugins.

- README, CONTRIBUTING, CHANGELOG and SECURITY become pages, so that nothing is written twice.
- The page of commands is made from the table of verbs and the settings.
- In the Python reference, a group of settings is a table.
- A link that leaves docs/ becomes plain text, or a link to the repository if `repo_url` is set.
- Headings get the same anchors as in a repository's own view of the files.
- Lines don't end within a date, a commit or a flag.
"""

from __future__ import annotations

import dataclasses
import inspect
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import drllm
from drllm.cli.help import describe_flag, format_flag, format_title
from drllm.cli.verbs import CONFIG, SECTIONS, VERBS, Flag, Verb, list_flags
from drllm.config.fields import Settings

REPOSITORY = Path(__file__).resolve().parents[1]
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Files of the repository's root that are pages, and the names of these pages."""
PUBLIC_NAME = re.compile(r"^::: drllm\.(\w+)$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
MARKUP = str.maketrans({"&": "&amp;", "<": "&lt;", "|": "&#124;", "*": "&#42;", "_": "&#95;"})
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
TEXT = re.compile(r">[^<]+<")
WHOLE = re.compile(r"\b\d{4}-\d\d-\d\d\b|\b[0-9a-f]{7,8}\b|(?<![\w-])--[a-z][\w-]*")
"""A date, a commit or a flag."""


def make_anchor(heading: str, separator: str) -> str:
    """Return what a heading is linked by, as in a repository's view of the file."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the anchors of headings."""
    config.mdx_configs["toc"]["slugify"] = make_anchor
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that aren't files of docs/."""
    for name, page in ROOT_PAGES.items():
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "reference/commands.md", content=make_commands_page()))
    css = (Path(__file__).parent / "site.css").read_text(encoding="utf-8")
    files.append(File.generated(config, "site.css", content=css))
    return files


def make_commands_page() -> str:
    """Return the page of all commands with all flags."""
    lines = [
        "# Commands",
        "",
        "Every command with every flag. `drllm VERB --help` shows the common ones. "
        "A setting may also stand in a YAML file (`--config`), with underscores.",
        "",
        "A command ends with status 0; with 1 if a test didn't show what was asked for (`shrink`, "
        "`evaluate --max-drop`); with 2 after a mistake, in one line; with 130 after an "
        "interruption; with 141 if the reader of its output closed the pipe.",
        "",
    ]
    for title, names in SECTIONS.items():
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        for name in names:
            if name in VERBS:
                lines += describe_verb(VERBS[name])
            else:
                lines += [f"### drllm {name}", "", "See [its page](../lm-eval.md).", ""]
    return "\n".join(lines)


def describe_verb(verb: Verb) -> list[str]:
    """Return the lines of one verb: what it does, an example, and its flags."""
    words = ["drllm", verb.name, *(flag.names[0] for flag in list_flags(verb) if flag.positional)]
    lines = [f"### {' '.join(words)}", "", f"{verb.help[0].upper()}{verb.help[1:]}.", ""]
    lines += ["```", verb.example, "```", ""]
    by_group: dict[Any, list[Flag]] = {}
    for flag in list_flags(verb):
        by_group.setdefault(flag.group, []).append(flag)
    if verb.settings:
        by_group.setdefault(None, []).append(CONFIG)
    for group, flags in by_group.items():
        if group is not None:
            title = format_title(group)
            lines += [f"**{title[0].upper()}{title[1:]}**", ""]
        lines += ["| flag | |", "|---|---|"]
        for flag in flags:
            usage = escape(format_flag(flag, everything=True))
            lines.append(f"| <code>{usage}</code> | {escape(describe_flag(flag, verb))} |")
        lines.append("")
    return lines


def escape(text: str) -> str:
    """Return text of a table's cell in which nothing is markup."""
    return text.translate(MARKUP)


def describe_settings(group: type[Settings]) -> str:
    """Return a group of settings as a section with a table: name, type, default and meaning."""
    lines = [f"### {group.__name__} {{ #drllm.{group.__name__} }}", "", str(group.__doc__), ""]
    lines += ["| setting | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(group):
        kind = escape(inspect.formatannotation(field.type))
        default = escape(repr(field.default))
        meaning = escape(describe_setting(field))
        lines.append(
            f"| <code>{escape(field.name)}</code> | <code>{kind}</code> | "
            f"<code>{default}</code> | {meaning} |"
        )
    return "\n".join(lines) + "\n"


def describe_setting(field: dataclasses.Field[Any]) -> str:
    """Return what a setting means, and the values that it may have."""
    bounds = field.metadata
    parts = [bounds["help"]]
    if bounds["choices"] is not None:
        parts.append(f"one of {', '.join(bounds['choices'])}")
    if bounds["minimum"] is not None:
        parts.append(f"at least {bounds['minimum']:g}")
    if bounds["above"] is not None:
        parts.append(f"more than {bounds['above']:g}")
    if bounds["maximum"] is not None:
        parts.append(f"at most {bounds['maximum']:g}")
    return "; ".join(parts)


def _write_settings(match: re.Match[str]) -> str:
    """Return the section of a class, if it is a group of settings."""
    value = getattr(drllm, match[1])
    if isinstance(value, type) and issubclass(value, Settings):
        return describe_settings(value)
    return match[0]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Let links lead to pages of the site, and show settings as tables."""
    if page.file.src_uri == "reference/python.md":
        markdown = PUBLIC_NAME.sub(_write_settings, markdown)
    parts = CODE.split(markdown)
    for number in range(0, len(parts), 2):  # the others are code
        parts[number] = LINK.sub(lambda match: _rewrite(match, page, config), parts[number])
    return "".join(parts)


def on_page_content(html: str, **_: Any) -> str:
    """Keep dates, commits and flags on one line, and let lines end after a `|` between values."""
    html = TEXT.sub(lambda text: WHOLE.sub(r'<span class="whole">\g<0></span>', text[0]), html)
    return html.replace("&#124;", "&#124;<wbr>")


def _rewrite(match: re.Match[str], page: Page, config: MkDocsConfig) -> str:
    """Return a link as the site has it."""
    mark, text, link = match.groups()
    if re.match(r"[a-z]+:|#", link):
        return match[0]
    target, _, heading = link.partition("#")
    place = _find_in_repository(target, page)
    if place in ROOT_PAGES:
        place = f"docs/{ROOT_PAGES[place]}"
    if not place.startswith("docs/"):
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{place})"
        return text
    start = posixpath.dirname(page.file.src_uri) or "."
    target = posixpath.relpath(place.removeprefix("docs/"), start)
    return f"{mark}[{text}]({target}{'#' + heading if heading else ''})"


def _find_in_repository(target: str, page: Page) -> str:
    """Return the place in the repository that a link of a page leads to."""
    folder = posixpath.dirname(page.file.src_uri)
    if page.file.src_uri not in ROOT_PAGES.values():
        folder = posixpath.join("docs", folder)
    return posixpath.normpath(posixpath.join(folder, target))
