"""What a release and the host of the repository need: workflows without rights and secrets, forms,
and one version in all files."""

import re
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
HOST = REPOSITORY / ".github"
WORKFLOWS = sorted((HOST / "workflows").glob("*.yml"))
FORMS = sorted((HOST / "ISSUE_TEMPLATE").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
TARGETS |= {f"test-{file.stem}" for file in (REPOSITORY / "tests" / "versions").glob("*.txt")}


def read(file):
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def list_steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_runs_targets_that_exist(file):
    commands = [step["run"] for step in list_steps(read(file)) if "run" in step]
    for command in commands:
        if command.startswith("make "):
            words = [word for word in command.split()[1:] if "=" not in word]
            assert set(words) <= TARGETS, command


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_may_only_read_and_ends_in_time(file):
    workflow = read(file)
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in file.read_text(encoding="utf-8")
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90


def test_only_publishing_jobs_may_identify_themselves():
    trusted = {
        (file.stem, name)
        for file in WORKFLOWS
        for name, job in read(file)["jobs"].items()
        if "id-token" in job.get("permissions", {})
    }
    assert trusted == {("docs", "publish"), ("publish", "publish")}


def test_the_version_and_its_date_are_the_same_in_all_files():
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    [version] = re.findall(r'^version = "(.*)"', project, re.MULTILINE)
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == version
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (?!Unreleased)(.*)$", changelog, re.MULTILINE)
    assert newest[1] == f"{version} ({citation['date-released']})"


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_a_form_has_a_name_and_questions_with_names_of_their_own(file):
    form = read(file)
    assert form["name"]
    assert form["description"]
    names = [question["id"] for question in form["body"]]
    assert len(names) == len(set(names)) > 1
