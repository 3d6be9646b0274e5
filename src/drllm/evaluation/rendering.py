"""Has lm-evaluation-harness ("the harness") render the questions of an evaluation's tasks."""

from dataclasses import dataclass

from drllm.config import EvaluateConfig
from drllm.evaluation.lm_eval.leaves import HarnessTask, describe_task
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.objects import make_task_objects
from drllm.evaluation.lm_eval.task import RenderedTask, draw_stock_task
from drllm.tasks.base import Task
from drllm.tasks.harness import LmEvalTask
from drllm.work.store import ResultStore


@dataclass(frozen=True)
class TaskRenderer:
    """Renders tasks for one evaluation.

    Attributes:
        lm: The model, whose tokenizer and chat template are used. Nothing is run.
        config: The settings.
        store: Refuses to resume an evaluation that had other questions.
        may_know_questions: Whether something may be trained or fitted on questions of the harness'
            own tasks.
    """

    lm: RoutedLM
    config: EvaluateConfig
    store: ResultStore
    may_know_questions: bool

    def render(self, task: Task, split: str, limit: int | None) -> RenderedTask:
        """Return the questions of a task as the harness renders them.

        Args:
            task: The task.
            split: The split of the questions.
            limit: Maximum number of questions; None takes all.

        Raises:
            ConfigError: An interrupted evaluation in the same folder had other questions, so it
                can't be resumed.
        """
        if isinstance(task, LmEvalTask):
            rendered = self._render_stock_task(task, split, limit)
        else:
            rendered = self._render_own_task(task, split, limit)
        questions = f"{rendered.task.name}, {limit or 'all'} of {split}"
        self.store.expect(questions, {"questions_sha256": rendered.digest()})
        return rendered

    def _render_stock_task(self, task: LmEvalTask, split: str, limit: int | None) -> RenderedTask:
        """Render one of the harness' own tasks.

        The questions are drawn from all that the harness reports if nothing can have been trained
        or fitted on them. Otherwise they are drawn only from the split.
        """
        config = self.config
        only_split: str | None = split
        if split == "test" and not self.may_know_questions:
            only_split = None
        harness_task = draw_stock_task(task, only_split, limit, config.seed, config.num_fewshot)
        return RenderedTask(harness_task, task.tasks, self.lm, chat=self._choose_chat(harness_task))

    def _render_own_task(self, task: Task, split: str, limit: int | None) -> RenderedTask:
        """Render one of drllm's tasks."""
        config = self.config
        harness_task, leaves = describe_task(
            task,
            split=split,
            limit=limit,
            seed=config.seed,
            data_dir=config.data_dir,
            num_fewshot=config.num_fewshot,
        )
        objects = make_task_objects(leaves)
        return RenderedTask(harness_task, objects, self.lm, chat=self._choose_chat(harness_task))

    def _choose_chat(self, task: HarnessTask) -> bool:
        """Tell whether a task's prompts are put into the chat template.

        Without a setting they are for tasks that are asked as in a search, if there is a template.
        """
        if self.config.chat is not None:
            return self.config.chat
        return task.chat and bool(self.lm.tokenizer.chat_template)
