"""Run a pretrained language model with fewer layers, the same for a task or chosen by routers.

Each public name is imported when it is first used, so that `import drllm` loads no torch.
"""

import importlib
from typing import Any

_MODULES = {
    "ArchitectureError": "drllm.errors",
    "Artefact": "drllm.pipeline.bundle",
    "attach": "drllm.models.routed_model",
    "BaseModel": "drllm.model.load",
    "bundle": "drllm.pipeline.bundle",
    "Bypass": "drllm.models.routing.bypass",
    "BypassConfig": "drllm.config",
    "Calibration": "drllm.models.routing.depth_control",
    "CheckpointError": "drllm.errors",
    "ConfigError": "drllm.errors",
    "DepthConfig": "drllm.config",
    "detach": "drllm.models.routed_model",
    "DrllmError": "drllm.errors",
    "evaluate": "drllm.evaluation.stage",
    "EvaluateConfig": "drllm.config",
    "fit_bypass": "drllm.prune.bypass",
    "FixedPolicy": "drllm.models.routing.policies",
    "FullPolicy": "drllm.models.routing.policies",
    "GeneratedAnswer": "drllm.models.routing.batch_generation",
    "gap_costs": "drllm.prune.choose",
    "GapsConfig": "drllm.config",
    "get_task": "drllm.tasks.registry",
    "learn": "drllm.prune.learn",
    "LearnConfig": "drllm.config",
    "Listener": "drllm.work.listener",
    "load": "drllm.model.load",
    "load_bypass": "drllm.models.routing.bypass_file",
    "ModelConfig": "drllm.config",
    "ModelError": "drllm.errors",
    "NotShownError": "drllm.errors",
    "PathError": "drllm.errors",
    "POLICIES": "drllm.models.routing.policies",
    "Policy": "drllm.models.routing.policies",
    "PromptView": "drllm.models.routing.policies",
    "RecordError": "drllm.errors",
    "refit": "drllm.prune.repairs.refit",
    "report": "drllm.reporting.stage",
    "Results": "drllm.records.results",
    "RoutedModel": "drllm.models.routed_model",
    "RouterConfig": "drllm.models.routers.config",
    "RouterPolicy": "drllm.models.routing.policies",
    "RouterStack": "drllm.models.routers.stack",
    "RoutingError": "drllm.errors",
    "search_paths": "drllm.search.run",
    "SearchConfig": "drllm.config",
    "SearchRecords": "drllm.records.search",
    "shorten": "drllm.model.submodel",
    "shrink": "drllm.prune.shrink",
    "ShrinkConfig": "drllm.config",
    "ShrinkRecord": "drllm.records.shortened",
    "sketch": "drllm.paths",
    "StaticPath": "drllm.paths",
    "supervise": "drllm.supervision.select",
    "SuperviseConfig": "drllm.config",
    "Supervision": "drllm.supervision.select",
    "Task": "drllm.tasks.base",
    "TaskError": "drllm.errors",
    "to_decisions": "drllm.paths",
    "to_path": "drllm.paths",
    "train": "drllm.training.stage",
    "TrainConfig": "drllm.config",
    "WorkerError": "drllm.errors",
}
"""The public names and their modules; `__init__.pyi` repeats them for editors."""

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # takes as long as the rest of `import drllm`

        return version("drllm")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'drllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
