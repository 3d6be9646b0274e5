"""ARC, the AI2 Reasoning Challenge: `arc_easy` and `arc_challenge`, together `arc`.

The published validation file is the test here; the published test file is left alone. Loads no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from drllm.tasks.base import Example
from drllm.tasks.multiple_choice import MultipleChoiceTask, labelled_example
from drllm.tasks.published import PublishedTask


class ArcTask(PublishedTask, MultipleChoiceTask):
    """Grade-school science questions, of one of the two sets.

    Args:
        name: Our name of the task, and of its folder below the data folder.
        config: The set's name on the hub.
        description: One line for `drllm ls tasks`.
    """

    repository = "allenai/ai2_arc"
    files: ClassVar = {"train": "train", "validation": "validation"}
    related = ("arc_easy", "arc_challenge")

    def __init__(self, name: str, config: str, description: str) -> None:
        self.name = name
        self.config = config
        self.description = description

    def read(self, row: Mapping[str, Any], row_id: str) -> Example:
        """Read a row with `id`, `question`, `choices` (`text`, `label`) and `answerKey`.

        Raises:
            TaskError: What is missing or wrong, without file and line.
        """
        return labelled_example(row, self.name)


ARC_EASY = ArcTask("arc_easy", "ARC-Easy", "grade-school science, the easy set")
ARC_CHALLENGE = ArcTask("arc_challenge", "ARC-Challenge", "grade-school science, the hard set")
