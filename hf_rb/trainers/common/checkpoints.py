"""Checkpoints known to be whole."""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from hf_rb.io.files import MANIFEST, start_manifest, verify_manifest, write_manifest
from hf_rb.trainers.common.below import TrainerBelow
from hf_rb.utils import compat


__all__ = ["CheckpointsMixin", "complete_checkpoint"]

logger = logging.getLogger(__name__)


class CheckpointsMixin(TrainerBelow):
    """
    A checkpoint ends with a manifest of its files, written last. `train(resume_from_checkpoint=True)` takes the newest
    checkpoint that agrees with its manifest.
    """

    if TYPE_CHECKING:

        def _push_checkpoint(self, folder: Path) -> None:
            """Of [`~hf_rb.trainers.common.card.CardMixin`]."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run_folder = self._get_output_dir(trial)
        folder = Path(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            start_manifest(folder)
        # The parent ends by deleting old checkpoints. They must outlive the moment at which this one is known to be
        # whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # every process writes files of its own
        if self.args.should_save:
            write_manifest(folder)
        if self.args.push_to_hub and self.is_world_process_zero():
            self._push_checkpoint(folder)
        if self.args.should_save:
            compat.rotate_checkpoints(
                output_dir=run_folder,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Trains as [`~transformers.Trainer.train`] does, from a checkpoint that is known to be whole.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True` takes the newest checkpoint in `args.output_dir` that agrees with its manifest and warns of each
                newer one, naming its bad file. A path is checked against its manifest, if it has one.

        Raises:
            ValueError: The checkpoint, or every one of them, is incomplete.
        """
        if resume_from_checkpoint:
            # One process reads the files; all of them go on, or none.
            outcome: str | ValueError | None = None
            if self.is_world_process_zero():
                try:
                    outcome = complete_checkpoint(self.args.output_dir, resume_from_checkpoint)
                except ValueError as error:
                    outcome = error
            (outcome,) = broadcast_object_list([outcome])
            if isinstance(outcome, ValueError):
                raise outcome
            resume_from_checkpoint = outcome
        return super().train(resume_from_checkpoint, *args, **kwargs)


def complete_checkpoint(output_dir: str, resume: str | Literal[True]) -> str:
    """
    Returns the checkpoint to resume from.

    Args:
        output_dir (`str`):
            Folder of the `checkpoint-<step>` folders.
        resume (`str` or `bool`):
            Path of a checkpoint, or `True` for the newest complete one. A checkpoint without a manifest, such as TRL's
            own, counts as incomplete then, since an interrupted save looks no different; it is accepted by path.

    Raises:
        ValueError: Nothing complete was found.
    """
    if resume is not True:
        if not Path(resume, MANIFEST).exists():
            return resume
        problems = verify_manifest(resume)
        if problems:
            raise ValueError(
                f"Checkpoint {resume} is incomplete: {_listed(problems)}. Give another one, or "
                "`resume_from_checkpoint=True` to take the newest complete one."
            )
        return resume

    step_of: dict[Path, int] = {}
    for path in Path(output_dir).glob("*"):
        if found := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name):
            step_of[path] = int(found[1])
    newest_first = sorted(step_of, key=step_of.__getitem__, reverse=True)
    for path in newest_first:
        problems = verify_manifest(path)
        if not problems:
            return str(path)
        logger.warning(f"Not resuming from {path}, which is incomplete: {_listed(problems)}.")
    if newest_first:
        raise ValueError(
            f"None of the {len(newest_first)} checkpoints in {output_dir} is complete; the warnings above name their "
            "bad files. To resume from a checkpoint that another trainer has written, give its path."
        )
    raise ValueError(f"There is no checkpoint in {output_dir} to resume from. Train without `resume_from_checkpoint`.")


def _listed(problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else f"{problems[0]} (and {len(problems) - 1} more)"
