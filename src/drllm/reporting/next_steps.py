"""Suggests what to do next after a run: commands to paste, with the most urgent first."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from msgspec.structs import asdict

from drllm.config import TIMING, EvaluateConfig
from drllm.config.constants import MAX_DROP
from drllm.records.results import PERMUTED, Evaluation, Result, System
from drllm.records.search import SEARCH_FILE
from drllm.records.static_paths import WITHOUT, read_path, split_path_list
from drllm.records.supervision import SUPERVISION_FILE
from drllm.reporting.commands import (
    evaluate_command,
    name_model,
    search_command,
    supervise_command,
    train_command,
    write_command,
)
from drllm.reporting.numbers import get_routed_verdict, write_count, write_difference, write_label
from drllm.reporting.run import Run
from drllm.statistics.differences import Verdict
from drllm.statistics.power import round_up
from drllm.supervision.rules import MIN_SAVING
from drllm.tasks.builtin import BUILTIN_TASKS
from drllm.tasks.registry import find_place

Step: TypeAlias = tuple[str, str]  # (what to do, the command)

MAX_STEPS = 3
SIMILAR = 0.01  # maximum difference of executions that counts as equal, as a share of the layers
# Values that the commands use as examples.
PROMPT = "Why is the sky blue?"
DEPTHS = "0.02,0.05,0.1"
OWN_QUESTIONS = "questions.jsonl"
ALLOWED_DROP = 2  # points of accuracy
NUM_FEWSHOT = 5


def suggest_steps(run: Run) -> list[Step]:
    """Return the steps that are worth taking next, and the command of each step."""
    if not run.evaluations:
        return [_step_before_evaluation(run)]
    steps: dict[str, str] = {}  # the command → what it is for
    for evaluation in run.evaluations:
        for what, command in _suggest_for_task(run, evaluation):
            steps.setdefault(command, what)
    return [(what, command) for command, what in steps.items()][:MAX_STEPS]


def _step_before_evaluation(run: Run) -> Step:
    """Return the stage that comes next in a run without evaluations, and its command."""
    folder = run.folder
    if run.router_config or run.epochs:
        values = {
            "routers": folder / "routers",
            "tasks": _list_searched_tasks(run),
            "output_dir": folder / "eval",
        }
        what = "Evaluate the routers against base and the baselines:"
        return what, write_command("evaluate", values)
    if run.supervision:
        values = {"supervision": folder / SUPERVISION_FILE, "output_dir": folder / "routers"}
        return "Train routers on these targets:", write_command("train", values)
    values = {"search": folder / SEARCH_FILE, "output_dir": folder / SUPERVISION_FILE}
    return "Make a target path of each searched question:", write_command("supervise", values)


def _list_searched_tasks(run: Run) -> str | None:
    """Return the tasks of the targets as the value of a flag; None if no file names them."""
    config = run.find_manifest(SEARCH_FILE).get("config") or {}
    if config.get("dataset"):
        return str(config["dataset"])
    training = run.router_config.get("training") or {}
    tasks = training.get("tasks")
    if not tasks:
        tasks = dict.fromkeys(target.task for target in run.supervision)
    return ",".join(tasks) or None


def _suggest_for_task(run: Run, evaluation: Result) -> Iterator[Step]:
    """Yield the steps for one task, the most urgent first; they follow from the headline."""
    system = evaluation.headline_system or evaluation.compared_system
    if system is None or system.against_base is None:
        yield _compare_step(run, evaluation)
        return
    if system.name in evaluation.paths and evaluation.task in BUILTIN_TASKS:
        yield _shrink_step(evaluation)
    yield from _suggest_other_questions(run, evaluation, system.against_base.accuracy)
    if system.name in evaluation.paths:
        yield from _suggest_for_path(run, evaluation, system)
    else:
        yield from _suggest_for_routing(run, evaluation, system)


def _suggest_for_path(run: Run, evaluation: Result, path: System) -> Iterator[Step]:
    """Yield the steps for a static path that the headline is about."""
    differences = path.against_base
    assert differences is not None
    if evaluation.drop_test is not None and evaluation.drop_test.chosen == path.name:
        yield _use_path_step(evaluation, path)
        return
    saves_layers = path.executions < evaluation.num_layers
    if _is_worse_than_base(path) or not saves_layers:
        yield _shrink_step(evaluation)
    if not saves_layers:
        return
    is_worse = _is_worse_than_base(path)
    if not is_worse and _may_be_used(evaluation, differences.accuracy):
        yield _use_path_step(evaluation, path)
    if evaluation.drop_test is None and _may_pass(differences.accuracy):
        yield _drop_step(run, evaluation, path)
    file = _find_path(evaluation, path)
    if file is not None:
        values = {**name_model(evaluation.model), "bypass": evaluation.bypass, "path": file}
        command = _generate_command(**values)
        yield f"Read an answer of {path.name} yourself:", command
    if evaluation.routed and run.search:
        yield _search_more_step(run)


def _suggest_for_routing(run: Run, evaluation: Result, routed: System) -> Iterator[Step]:
    """Yield the steps for a routed model that the headline is about."""
    differences = routed.against_base
    assert differences is not None
    is_worse = _is_worse_than_base(routed)
    saves_layers = routed.executions < evaluation.num_layers
    has_depths = any(point.setting for point in evaluation.curve)
    rival = _find_unbeaten_path(evaluation)
    if rival is not None:
        yield _use_rival_step(evaluation, rival)
    if is_worse and saves_layers:
        yield from _suggest_better_targets(run)
    if not has_depths:
        what = "See what is kept if fewer or more layers are saved:"
        yield what, _evaluate_command(run, evaluation, "depths", curve=DEPTHS)
    elif evaluation.drop_test is None and saves_layers and _may_pass(differences.accuracy):
        yield _drop_step(run, evaluation, routed)
    if saves_layers and not is_worse:
        routers = run.folder / "routers" if run.router_config else evaluation.routers
        command = _generate_command(bypass=evaluation.bypass, routers=routers)
        yield "Read an answer yourself:", command
    if not evaluation.seeds and run.supervision:
        yield _more_seeds_step(run)


def _may_be_used(evaluation: Result, accuracy: Verdict) -> bool:
    """Tell whether the headline lets a path be used that isn't shown to be worse."""
    drop_test = evaluation.drop_test
    has_failed = drop_test is not None and drop_test.chosen is None
    return accuracy.shown != "guessing" and not has_failed


def _is_worse_than_base(system: System) -> bool:
    """Tell whether a system is shown to be worse than base."""
    differences = system.against_base
    if differences is None:
        return False
    return _is_worse(differences.accuracy) or _is_worse(differences.text_loss)


def _is_worse(verdict: Verdict | None) -> bool:
    """Tell whether a verdict shows that a system is worse."""
    return verdict is not None and verdict.is_better is False


def _suggest_other_questions(run: Run, evaluation: Result, accuracy: Verdict) -> Iterator[Step]:
    """Suggest how to ask questions that can show more about the accuracy."""
    if accuracy.shown == "guessing":
        yield _other_task_step(run, evaluation)
    needed = _find_needed_questions(evaluation, accuracy)
    if needed is None:
        return
    needed = round_up(needed)
    if needed <= evaluation.num_questions and _lacks_texts(evaluation, needed):
        yield _more_texts_step(run, evaluation, needed)
    else:
        yield _more_questions_step(run, evaluation, needed)


def _other_task_step(run: Run, evaluation: Result) -> Step:
    """Suggest another task, or worked examples if there were fewer."""
    what = f"Take a task that the base model can do; on {evaluation.task} it may be guessing"
    if (evaluation.num_fewshot or 0) >= NUM_FEWSHOT:
        return f"{what}:", "drllm ls tasks"
    command = _evaluate_command(run, evaluation, "fewshot", num_fewshot=NUM_FEWSHOT)
    return f"{what}. Or show it worked examples:", command


def _find_needed_questions(evaluation: Result, accuracy: Verdict) -> int | None:
    """Return how many questions would do for what was asked; None if there are enough."""
    drop_test = evaluation.drop_test
    if drop_test is None:
        return accuracy.needed
    if drop_test.chosen is not None:
        return None
    for test in drop_test.trials[-1].tasks:
        if test.task == evaluation.task:
            return test.needed
    return None


def _lacks_texts(evaluation: Result, needed: int) -> bool:
    """Tell whether the loss of text is tested on fewer questions than are needed."""
    drop_test = evaluation.drop_test
    if drop_test is None or drop_test.limits.max_loss_increase is None:
        return False
    return _read_num_texts(evaluation) < needed


def _read_num_texts(evaluation: Result) -> int:
    """Return how many questions' text had its loss measured, at most."""
    return int(evaluation.config.get("num_texts", EvaluateConfig().num_texts))


def _more_texts_step(run: Run, evaluation: Result, needed: int) -> Step:
    """Suggest to measure the loss of text on more of the same questions."""
    number = write_count(_read_num_texts(evaluation))
    what = f"Measure the text of {write_count(needed)} questions instead of {number}:"
    return what, _evaluate_command(run, evaluation, "more", num_texts=needed)


def _more_questions_step(run: Run, evaluation: Result, needed: int) -> Step:
    """Suggest to ask as many questions as are needed, or as many as there are.

    Args:
        run: The run.
        evaluation: The evaluation, which had too few questions.
        needed: How many questions would do.
    """
    task = evaluation.task
    available = evaluation.num_available
    if available is not None and available <= evaluation.num_questions:
        what = (
            f"All {write_count(available)} questions of {task} were asked, and about "
            f"{write_count(needed)} would do. Look for a task with more:"
        )
        return what, "drllm ls tasks"
    if available is not None and available < needed:
        what = (
            f"Ask all {write_count(available)} questions of {task}, which may still be too few "
            f"(about {write_count(needed)} would do):"
        )
        return what, _ask_more_command(run, evaluation, available)
    number = write_count(evaluation.num_questions)
    what = f"Ask {write_count(needed)} questions of {task} instead of {number}:"
    return what, _ask_more_command(run, evaluation, needed)


def _ask_more_command(run: Run, evaluation: Result, number: int) -> str:
    """Write the command that asks more questions, and measures the text of all if it is tested."""
    changes: dict[str, object] = {"limit": number}
    if _lacks_texts(evaluation, number):
        changes["num_texts"] = number
    return _evaluate_command(run, evaluation, "more", **changes)


def _may_pass(accuracy: Verdict) -> bool:
    """Tell whether the test of a loss of `ALLOWED_DROP` points would pass on the same questions."""
    excluded = accuracy.excluded_loss
    return accuracy.needed is None and excluded is not None and 100 * excluded < ALLOWED_DROP


def _drop_step(run: Run, evaluation: Result, system: System) -> Step:
    """Suggest a test of whether a system loses more than is allowed."""
    paths = _find_path(evaluation, system) or evaluation.config.get("paths")
    command = _evaluate_command(run, evaluation, "drop", max_drop=ALLOWED_DROP, paths=paths)
    what = f"Check in a script that it loses less than {ALLOWED_DROP} points (else exit status 1):"
    return what, command


def _compare_step(run: Run, evaluation: Evaluation) -> Step:
    """Suggest a comparison with base on a task."""
    values = {**_name_task(evaluation), "output_dir": run.folder / "eval"}
    if run.router_config:
        values |= {"routers": run.folder / "routers", "bypass": evaluation.bypass}
        command = write_command("evaluate", values)
        return f"Compare the routed model on {evaluation.task} too:", command
    return _shrink_step(evaluation)


def _shrink_step(evaluation: Evaluation) -> Step:
    """Suggest a smaller checkpoint for the user's own questions, after one for built-in ones."""
    model = shlex.quote(str(evaluation.model.get("id")))
    command = f"drllm shrink {model} {OWN_QUESTIONS} smaller --max-drop {MAX_DROP:g}"
    return "Make a smaller checkpoint for questions of your own, one a line in a file:", command


def _name_task(evaluation: Evaluation) -> dict[str, object]:
    """Return the flags that name the questions of an evaluation, which may be in a file."""
    config = evaluation.config
    return {
        "tasks": find_place(config.get("tasks") or "", evaluation.task),
        "data_dir": config.get("data_dir"),
        "trust_task_code": config.get("trust_task_code") or None,
    }


def _evaluate_command(run: Run, evaluation: Result, folder: str, **changes: object) -> str:
    """Write the command that repeats an evaluation with other settings, into a new folder.

    It measures no time.
    """
    changes |= dict.fromkeys(TIMING)
    changes["output_dir"] = _name_folder(run, f"eval-{folder}")
    if evaluation.routers and run.router_config:
        changes["routers"] = run.folder / "routers"
    return evaluate_command(asdict(evaluation), **changes)


def _name_folder(run: Run, name: str) -> Path:
    """Return a new folder in the run folder, or beside a folder that only has results."""
    if run.is_eval_folder:
        return run.folder.with_name(name)
    return run.folder / name


def _generate_command(**values: object) -> str:
    return f"{write_command('generate', values)} {shlex.quote(PROMPT)}"


def _suggest_better_targets(run: Run) -> Iterator[Step]:
    """Suggest how to train better routers: with more targets, or with other targets."""
    if run.search:
        yield _search_more_step(run)
    config = run.find_manifest(SUPERVISION_FILE).get("config") or {}
    if config.get("target") == "least_kl":
        min_saving = config.get("min_saving")
        if min_saving is None:
            min_saving = MIN_SAVING
        if min_saving:
            command = _supervise_command(run, min_saving=min_saving / 2)
            yield "Take targets that save less:", command
    elif run.supervision:
        what = "Take other targets, the paths that change the model's answers least:"
        yield what, _supervise_command(run, target="least_kl")


def _search_more_step(run: Run) -> Step:
    """Suggest a search of more questions, to train routers on more targets."""
    output = run.folder.with_name(f"{run.folder.name}-more")
    manifest = run.find_manifest(SEARCH_FILE)
    what = f"Search more questions than these {write_count(len(run.search))}, and train again:"
    return what, search_command(manifest, limit=4 * len(run.search), output_dir=output)


def _supervise_command(run: Run, **changes: object) -> str:
    files = {
        "search": run.folder / SEARCH_FILE,
        "output_dir": run.folder / "supervision-again.jsonl",
    }
    return supervise_command(run.find_manifest(SUPERVISION_FILE), **changes, **files)


def _more_seeds_step(run: Run) -> Step:
    files = {
        "supervision": run.folder / SUPERVISION_FILE,
        "output_dir": run.folder / "routers-3-seeds",
    }
    command = train_command(run.router_config, num_seeds=3, **files)
    return "Train with other seeds, to see how much is luck:", command


def _use_rival_step(evaluation: Evaluation, rival: System) -> Step:
    """Suggest to use a static path that the routed model doesn't beat."""
    verdict = get_routed_verdict(rival)
    how, command = _use_path(evaluation, rival)
    what = (
        f"Routed minus {rival.name}, which reads no question: {write_difference(verdict)} points, "
        f"{write_label(verdict)}. A path needs no router; {how}"
    )
    return what, command


def _use_path_step(evaluation: Evaluation, path: System) -> Step:
    """Suggest to use a static path."""
    how, command = _use_path(evaluation, path)
    return f"Use {evaluation.name_in_sentence(path)}; {how}", command


def _use_path(evaluation: Evaluation, system: System) -> Step:
    """Return how to use a path, as the end of a sentence, and the command."""
    path = _find_path(evaluation, system)
    if path is None or not path.startswith(WITHOUT):
        how, command = _shrink_step(evaluation)
        return f"or {how[0].lower()}{how[1:]}", command
    values = {
        **name_model(evaluation.model),
        "skip": path.removeprefix(WITHOUT),
        "output_dir": "exported",
    }
    return "it can be an ordinary, smaller checkpoint:", write_command("export", values)


def _find_path(evaluation: Evaluation, system: System) -> str | None:
    """Return the value of `--path` for an evaluated path; None if none was given by name."""
    if system.name not in evaluation.paths:
        return None
    for place in split_path_list(str(evaluation.config.get("paths") or "")):
        is_named = place.startswith(WITHOUT)
        name = read_path(place).name if is_named else Path(place).stem
        if name == system.name:
            return place
    return None


def _find_unbeaten_path(evaluation: Evaluation) -> System | None:
    """Return a static path that the routed model doesn't beat, though it runs no more layers.

    This is `Evaluation.best_path` if the routed model doesn't beat it. Otherwise it is the most
    accurate unbeaten baseline that runs about as many layers. A path that is shown to be worse than
    base isn't returned.
    """
    routed = evaluation.routed
    if routed is None:
        return None
    unbeaten: list[System] = []
    for system in evaluation.systems:
        verdict = get_routed_verdict(system)
        is_path = system.reads_question is False and system.draws == 1
        if not is_path or system.name == PERMUTED or verdict is None or verdict.is_better:
            continue
        if system.name in evaluation.paths and _is_worse_than_base(system):
            continue
        extra_executions = system.executions - routed.executions
        if system is not evaluation.best_path:  # a baseline must not run fewer layers either
            extra_executions = abs(extra_executions)
        if extra_executions <= SIMILAR * evaluation.num_layers:
            unbeaten.append(system)
    if evaluation.best_path in unbeaten:
        return evaluation.best_path
    return max(unbeaten, key=lambda system: system.accuracy, default=None)
