"""Public benchmarks through the Python API of lm-evaluation-harness (`pip install hf_rb[eval]`), task files of one's
own included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_rb.utils.optional import import_optional


__all__ = ["HarnessScore", "run_harness"]


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task.

    Attributes:
        task (`str`): Name of the task.
        metric (`str`): Name of the metric, with its filter where it is not the harness's `none`.
        value (`float`): Measured value.
        stderr (`float`, *optional*): Its standard error.
        fewshot (`int`, *optional*): Examples in front of every question.
        count (`int`, *optional*): Questions asked.
        version (`str`): Version that the task gives itself: scores of two versions do not compare.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    fewshot: int | None
    count: int | None
    version: str


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    batch_size: int = 8,
    allow_local_code: bool = False,
) -> list[HarnessScore]:
    """Runs tasks of lm-evaluation-harness, which generates as it always does, so that scores compare with those that
    others publish.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        tasks (`Sequence[str]`):
            Names of the harness's tasks (their data comes from the Hub or its cache), or paths of task files in its
            YAML format.
        limit (`int`, *optional*):
            Asks only the first so many questions of a task. Not for figures that are published.
        fewshot (`int`, *optional*):
            Examples in front of every question; each task's own number by default.
        chat (`bool`, *optional*, defaults to `False`):
            Whether the chat template renders the questions.
        batch_size (`int`, *optional*, defaults to `8`):
            Questions at a time.
        allow_local_code (`bool`, *optional*, defaults to `False`):
            Whether task files may name Python functions beside them (`!function`), which the harness imports.

    Returns:
        `list[HarnessScore]`: In the order of the tasks and of their metrics.

    Raises:
        ImportError: The harness is not installed.
        FileNotFoundError: There is no such task file.
        ValueError: No such task, a file that is no task, or one that names code.
    """
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [_task_name(Path(task), allow_local_code) if Path(task) in files else task for task in tasks]
    what = "An evaluation on tasks of lm-evaluation-harness"
    simple_evaluate = import_optional("lm_eval", what).simple_evaluate
    HFLM = import_optional("lm_eval.models.huggingface", what).HFLM
    TaskManager = import_optional("lm_eval.tasks", what).TaskManager

    # Reading the harness's own thousands of task files takes seconds.
    manager = TaskManager(
        include_path=sorted({str(file.parent) for file in files}) or None, include_defaults=len(files) < len(tasks)
    )
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(
                f"lm-evaluation-harness has no task {name!r}: `lm_eval ls tasks` lists them; or give a file."
            )
    training = model.training
    found = simple_evaluate(
        model=HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size),
        tasks=names,
        num_fewshot=fewshot,
        limit=limit,
        apply_chat_template=chat,
        log_samples=False,
        task_manager=manager,
    )
    model.train(training)
    return [score for task in found["results"] for score in _scores(found, task)]


def _task_name(file: Path, allow_local_code: bool) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"There is no task file {file}.")
    import yaml

    # The harness reads every task file of the folder.
    for neighbour in sorted([*file.parent.glob("*.yaml"), *file.parent.glob("*.yml")]):
        if "!function" in neighbour.read_text(encoding="utf-8") and not allow_local_code:
            raise ValueError(
                f"{neighbour} names Python code (`!function`), which would be imported: add `--allow-local-code` if "
                "you trust it."
            )

    class Loader(yaml.SafeLoader):
        """Takes the tag `!function` as text; nothing is imported here."""

    Loader.add_constructor("!function", lambda _, node: node.value)
    try:
        task = yaml.load(file.read_text(encoding="utf-8"), Loader)  # noqa: S506 (it is a SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise ValueError(f"{file} is no task of lm-evaluation-harness: the key `task` with its name is missing.")
    return task["task"]


def _scores(found: dict[str, Any], task: str) -> list[HarnessScore]:
    values = found["results"][task]
    scores = []
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue  # the task's alias, and what belongs to another value
        stderr = values.get(f"{metric}_stderr,{kind}")
        scores.append(
            HarnessScore(
                task=task,
                metric=metric if kind == "none" else f"{metric} ({kind})",
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                fewshot=found["n-shot"].get(task),
                count=found["n-samples"].get(task, {}).get("effective"),
                version=str(found["versions"].get(task)),
            )
        )
    return scores
