"""The plan of an evaluation: which systems answer which questions, and what each needs first.

A routed model may need a depth bias first. A baseline needs a routed model's routes, and may be
fitted on other questions. Questions are answered in blocks. A place is the index of a question in
the task.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from drllm.config import EvaluateConfig
from drllm.evaluation.baselines.base import (
    BASELINES,
    Baseline,
    read_curve,
    select_baselines,
)
from drllm.evaluation.baselines.material import Material
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.scoring import HarnessRequest
from drllm.evaluation.lm_eval.task import RenderedTask
from drllm.evaluation.questions import choose_fitting_split
from drllm.evaluation.rendering import TaskRenderer
from drllm.model.batching import group_by_length
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.policies import FullPolicy
from drllm.models.scoring.score import Request
from drllm.paths import StaticPath
from drllm.records.results import BASE, PERMUTED, ROUTED
from drllm.records.supervision import SupervisionRecord, read_supervision
from drllm.tasks.base import Task
from drllm.tasks.examples import choose

MIN_BLOCK_SIZE = 64
"""The fewest questions in a block, if options are scored. Scoring them takes seconds, so the time
to write the block's file hardly counts."""
NUM_CALIBRATION = 64
"""Default number of questions that depths and baselines are fitted on."""
NUM_PROBES = 12
"""About how often the routers decide on all calibration prompts until the bias of a depth is found.
Only the progress depends on it."""
NUM_RANDOM_DRAWS = 10  # default number of draws of a random baseline


@dataclass(frozen=True, kw_only=True)
class System:
    """A system that answers the questions of a task.

    Attributes:
        name: Its name in tables.
        key: Its name among all systems of the evaluation; its result is kept under this name.
        setting: The depth in words; empty for the depth of training, and for base and paths.
        num_draws: In how many ways it decides on all questions.
    """

    name: str
    key: str
    setting: str = ""
    num_draws: int = 1


@dataclass(frozen=True, kw_only=True)
class FixedSystem(System):
    """Base, or a static path: it needs nothing first."""

    routing: FullPolicy | StaticPath


@dataclass(frozen=True, kw_only=True)
class RoutedSystem(System):
    """The routed model at one depth.

    Attributes:
        routers: The folder of the routers.
        search_key: The name of the search for the depth bias; empty for the depth of training,
            which needs no search.
        executions: The mean executions at the depth; not used for the depth of training.
        obstacle: How a note begins that says that the depth can't be reached.
    """

    routers: str
    search_key: str = ""
    executions: float = 0.0
    obstacle: str = ""


@dataclass(frozen=True, kw_only=True)
class BaselineSystem(System):
    """A baseline: it needs the routes of a routed model, and may be fitted first."""

    baseline: type[Baseline]


@dataclass(frozen=True)
class SeedPlan:
    """The routed model with one seed's routers at one depth, and its baselines."""

    routed: RoutedSystem
    baselines: Sequence[BaselineSystem]


@dataclass(frozen=True)
class DepthPlan:
    """The routed models of all seeds at one depth, the first seed's first.

    Baselines run at the executions of the first seed's routers. The only baseline of another seed
    is its permuted routes, at the executions of that seed's routers.
    """

    seeds: Sequence[SeedPlan]


@dataclass(frozen=True)
class TaskQuestions:
    """The questions and texts of one task, as tokens and in blocks.

    Attributes:
        rendered: The questions as the harness renders them.
        requests: The requests of each question's options; empty if answers are generated.
        texts: The texts to measure the next-token loss on.
        lengths: How many tokens each question reads and writes at most.
        blocks: The places of the questions that are run together.
    """

    rendered: RenderedTask
    requests: Sequence[Sequence[HarnessRequest]]
    texts: Sequence[HarnessRequest]
    lengths: Sequence[int]
    blocks: Sequence[Sequence[int]]

    @property
    def num_text_tokens(self) -> int:
        """The number of tokens of all texts."""
        return sum(len(text.context) + len(text.continuation) for text in self.texts)

    def cost(self, num_draws: int) -> int:
        """Return how many tokens a system with this number of draws reads and writes at most."""
        return num_draws * sum(self.lengths) + self.num_text_tokens


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """What is evaluated on one task.

    Attributes:
        questions: The task's questions.
        material: What depths and baselines are fitted on.
        base: The base model.
        depths: The routed models and their baselines, by depth; empty without routers.
        paths: The static paths.
        notes: Notes on the task, as sentences.
        search_cost: About how many tokens a search for a depth bias reads.
    """

    questions: TaskQuestions
    material: Material
    base: FixedSystem
    depths: Sequence[DepthPlan]
    paths: Sequence[FixedSystem]
    notes: Sequence[str]
    search_cost: int

    @property
    def name(self) -> str:
        """The task's name."""
        return self.questions.rendered.task.name

    def systems(self) -> Iterator[System]:
        """Yield all systems."""
        yield self.base
        for depth in self.depths:
            for seed in depth.seeds:
                yield seed.routed
                yield from seed.baselines
        yield from self.paths

    @property
    def cost(self) -> int:
        """About how many tokens all systems and all searches for a depth bias read and write."""
        cost = 0
        for system in self.systems():
            cost += self.questions.cost(system.num_draws)
            if isinstance(system, RoutedSystem) and system.search_key:
                cost += self.search_cost
        return cost


@dataclass
class Planner:
    """Plans the tasks of one evaluation.

    Attributes:
        config: The settings.
        lm: The model. It may be without weights, since nothing is run.
        renderer: Renders the tasks.
        routers: Routers by folder, the first seed's routers first; empty if there is no routed
            model.
        paths: Static paths by name.
    """

    config: EvaluateConfig
    lm: RoutedLM
    renderer: TaskRenderer
    routers: Mapping[Path, RouterStack]
    paths: Mapping[str, StaticPath]

    def plan_tasks(self, tasks: Sequence[Task]) -> list[TaskPlan]:
        """Return the plan of each task."""
        supervision: list[SupervisionRecord] = []
        if self.config.supervision is not None:
            supervision = list(read_supervision(Path(self.config.supervision)))
        return [self._plan_task(task, supervision) for task in tasks]

    def _plan_task(self, task: Task, supervision: Sequence[SupervisionRecord]) -> TaskPlan:
        config = self.config
        split = config.split
        rendered = self.renderer.render(task, split, config.limit)
        questions = read_questions(rendered, self.lm, config)
        tokens_a_question = questions.cost(1) // len(rendered.keys)
        num_calibration = config.num_calibration or NUM_CALIBRATION
        depths = [self._plan_depth(task.name, share) for share in self._list_depths()]
        return TaskPlan(
            questions=questions,
            material=self._read_material(task, depths, supervision),
            base=FixedSystem(name=BASE, key=f"{task.name}: {BASE}", routing=FullPolicy()),
            depths=depths,
            paths=[
                FixedSystem(name=name, key=f"{task.name}: {name}", routing=path)
                for name, path in self.paths.items()
            ],
            notes=list(rendered.task.notes),
            search_cost=NUM_PROBES * num_calibration * tokens_a_question,
        )

    def _list_depths(self) -> list[float | None]:
        """Return the depths as shares of saved executions; None is the depth of training."""
        if not self.routers:
            return []
        return [None, *read_curve(self.config.curve)]

    def _plan_depth(self, task: str, share: float | None) -> DepthPlan:
        """Plan the routed models at one depth, with their baselines."""
        names = select_baselines(self.config.baselines)
        seeds: list[SeedPlan] = []
        for folder in self.routers:
            label = ""  # distinguishes the systems of this depth and seed from those of others
            if seeds:
                label = f" of {folder}"
                names = [name for name in names if name == PERMUTED]
            if share is not None:
                label += f" at {name_depth(share)}"
            routed = self._plan_routed(task, folder, share, label)
            baselines = [self._plan_baseline(task, name, routed, label) for name in names]
            seeds.append(SeedPlan(routed, baselines))
        return DepthPlan(seeds)

    def _plan_routed(
        self, task: str, folder: Path, share: float | None, label: str
    ) -> RoutedSystem:
        """Plan a routed model; its depth bias has to be searched unless it is as trained."""
        key = f"{task}: {ROUTED}{label}"
        if share is None:
            return RoutedSystem(name=ROUTED, key=key, routers=str(folder))
        depth = name_depth(share)
        obstacle = f"Not evaluated at {depth}"
        if folder != next(iter(self.routers)):
            obstacle = f"{folder} isn't evaluated at {depth}"
        return RoutedSystem(
            name=ROUTED,
            key=key,
            setting=depth,
            routers=str(folder),
            search_key=f"{task}: depth for {depth} of {folder}",
            executions=(1 - share) * self.lm.routed.num_layers,
            obstacle=obstacle,
        )

    def _plan_baseline(
        self, task: str, name: str, routed: RoutedSystem, label: str
    ) -> BaselineSystem:
        """Plan a baseline of a routed model."""
        baseline = BASELINES.get(name)
        num_draws = 1
        if baseline.is_drawn:
            num_draws = self.config.num_random_draws or NUM_RANDOM_DRAWS
        return BaselineSystem(
            name=name,
            key=f"{task}: {name}{label}",
            setting=routed.setting,
            num_draws=num_draws,
            baseline=baseline,
        )

    def _read_material(
        self,
        task: Task,
        depths: Sequence[DepthPlan],
        supervision: Sequence[SupervisionRecord],
    ) -> Material:
        """Collect what depths and baselines are fitted on; read questions only if they are needed.

        Args:
            task: The task on whose questions they are fitted.
            depths: What is planned.
            supervision: The routers' targets.
        """
        label_counts: Sequence[Sequence[int]] = ()
        first_routers = next(iter(self.routers.values()), None)
        if first_routers is not None:
            label_counts = first_routers.config.label_counts
        material = Material(name=task.name, supervision=supervision, label_counts=label_counts)
        if not needs_questions(depths):
            return material
        split = choose_fitting_split(self.config)
        limit = self.config.num_calibration or NUM_CALIBRATION
        rendered = self.renderer.render(task, split, limit)
        questions = find_questions_with_one_prompt(rendered)
        return replace(
            material,
            prompts=rendered.prompt_tokens,
            questions=list(questions.values()),
            golds=[rendered.golds(place)[0] for place in questions],
        )


def needs_questions(depths: Sequence[DepthPlan]) -> bool:
    """Tell whether a depth or a baseline is fitted on questions."""
    for depth in depths:
        for seed in depth.seeds:
            if seed.routed.search_key:
                return True
            if any(system.baseline.needs_material() for system in seed.baselines):
                return True
    return False


def find_questions_with_one_prompt(rendered: RenderedTask) -> dict[int, Request]:
    """Find the questions whose options all follow the same prompt; return them by place.

    In some tasks the prompt contains an option, so each option has a prompt of its own.
    """
    questions: dict[int, Request] = {}
    if not rendered.has_options:
        return questions
    for place, requests in enumerate(rendered.requests()):
        prompt = requests[0].context
        if all(request.context == prompt for request in requests):
            questions[place] = Request(prompt, [request.continuation for request in requests])
    return questions


def name_depth(share: float) -> str:
    """Return the name of the depth that saves a share of the executions.

    Example:
        >>> name_depth(0.1)
        '10 % saved'
    """
    return f"{100 * share:g} % saved"


def read_questions(rendered: RenderedTask, lm: RoutedLM, config: EvaluateConfig) -> TaskQuestions:
    """Make tokens of a task's questions, draw its texts, and divide it into blocks.

    Args:
        rendered: The questions.
        lm: The model, whose tokenizer is used.
        config: The settings.
    """
    requests: list[list[HarnessRequest]] = []
    if rendered.has_options:
        requests = rendered.requests()
    places = choose(range(len(rendered.keys)), config.num_texts, config.seed)
    texts = [rendered.text(place) for place in places]
    if rendered.has_options:
        lengths = [_count_option_tokens(question) for question in requests]
        batches_a_block = math.ceil(MIN_BLOCK_SIZE / config.batch_size)
        blocks = list(group_by_length(lengths, config.batch_size * batches_a_block))
    else:
        settings = rendered.instances[0][0].args[1]
        num_new = settings.get("max_gen_toks", lm.max_gen_toks)
        lengths = [len(tokens) + num_new for tokens in rendered.prompt_tokens]
        blocks = _divide_prompts(rendered.prompts(), lengths, config.batch_size)
    return TaskQuestions(rendered, requests, texts, lengths, blocks)


def _count_option_tokens(requests: Sequence[HarnessRequest]) -> int:
    """Return the number of tokens of a question with its options."""
    option_lengths = [len(request.continuation) for request in requests]
    return len(requests[0].context) + sum(option_lengths)


def _divide_prompts(
    prompts: Sequence[str], lengths: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Divide questions whose answers are generated into blocks.

    Generating takes longer than scoring, so each batch is a block. The routes of a block are found
    by prompt, so a prompt may occur only once in a block.
    """
    blocks: list[list[int]] = []
    for batch in group_by_length(lengths, batch_size):
        blocks += separate_repeats(batch, prompts)
    return blocks


def separate_repeats(block: Sequence[int], prompts: Sequence[str]) -> list[list[int]]:
    """Divide a block into parts in which no prompt occurs twice.

    Args:
        block: The places of the block's questions.
        prompts: The prompts of all questions.
    """
    parts: defaultdict[int, list[int]] = defaultdict(list)
    num_seen: Counter[str] = Counter()
    for place in block:
        prompt = prompts[place]
        # The second question with a prompt belongs to the second part, and so on.
        parts[num_seen[prompt]].append(place)
        num_seen[prompt] += 1
    return list(parts.values())
