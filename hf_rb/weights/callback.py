"""Shadow-FT at the end of a training: what Base has learned goes onto the Instruct model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_rb.io.files import check_replaceable
from hf_rb.weights.adapters import REMEDY, adapter_problems
from hf_rb.weights.report import MergeReport
from hf_rb.weights.shadow_ft import graft
from hf_rb.weights.source import Source


if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["GraftCallback"]


class GraftCallback(TrainerCallback):
    """
    Saves the tuned Base model, or its adapter, when training ends, and writes the Instruct model with the delta beside
    it.

    It works on the saved files, so that sharded training needs nothing of its own. What could go wrong with the two
    models or the adapter is found when the callback is made, before training.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer of the Base model. Train in float32 or mixed precision: in 16-bit weights the delta itself is
            rounded.
        onto (`str` or `Path`):
            The Instruct model: an embedded model, a folder or a Hub id.
        destination (`str` or `Path`, *optional*):
            Folder to write. Defaults to `grafted` in the trainer's `output_dir`.
        base (`str` or `Path`, *optional*):
            The Base model before training. Defaults to where the trainer's model was loaded from.
        include, dtype (`str`, *optional*):
            As in [`graft`].
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a folder that is not empty.

    Attributes:
        report ([`MergeReport`], *optional*): What was grafted, on the process that did it, when training has ended.

    Raises:
        FileExistsError: The destination is not empty and `overwrite` is `False`.
        FileNotFoundError: There is no such model.
        ValueError: The adapter depends on Base's weights, or a model is quantized or damaged.

    Example:

    ```python
    >>> trainer.add_callback(GraftCallback(trainer, onto="Qwen/Qwen3-4B"))
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        trainer: "Trainer",
        onto: str | Path,
        destination: str | Path | None = None,
        *,
        base: str | Path | None = None,
        include: str | None = None,
        dtype: str | None = None,
        overwrite: bool = False,
    ):
        self.trainer, self.onto = trainer, onto
        self.options: dict[str, Any] = {"include": include, "dtype": dtype, "overwrite": overwrite}
        self.destination = Path(destination or Path(str(trainer.args.output_dir), "grafted"))
        check_replaceable(self.destination.resolve(), overwrite)
        Source("onto", onto)
        self.base: str | Path | None = None
        self.report: MergeReport | None = None
        adapters = getattr(trainer.model, "peft_config", {})
        for config in adapters.values():
            if problems := adapter_problems(config.to_dict()):
                raise ValueError(f"The adapter in training cannot be grafted: {'; '.join(problems)}. {REMEDY}")
        if not adapters:
            model: Any = trainer.model
            self.base = base or model.config._name_or_path
            if not self.base:
                raise ValueError(
                    "The trainer's model does not say where it is from. Give `base`, the model before training."
                )
            Source("base", self.base)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.save_model(args.output_dir)  # every process takes part
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            report = graft(str(args.output_dir), self.onto, self.destination, base=self.base, **self.options)
            self.report = report
            for line in (*(report.notes if report else ()), f"The grafted model is in {self.destination}."):
                self.trainer.accelerator.print(line)
        self.trainer.accelerator.wait_for_everyone()
