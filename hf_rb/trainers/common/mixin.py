"""What all our trainers share beside their losses: identity and model card, metrics, and checkpoints known to be whole."""

import logging
import re
import shutil
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from huggingface_hub import CommitInfo, HfApi
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from hf_rb.hub import METHODS, plan_upload, push_folder
from hf_rb.io.files import MANIFEST, start_manifest, verify_manifest, write_manifest
from hf_rb.ops.backbone import has_prompt_learning
from hf_rb.trainers.common.card import write_card
from hf_rb.trainers.common.routers import has_mpi, prepare_routers
from hf_rb.utils import compat


__all__ = ["TrainerMixin", "complete_checkpoint", "own_config"]

logger = logging.getLogger(__name__)


class TrainerMixin:
    """
    Comes before a TRL trainer among a class's bases. The class says in `_methods` which methods its flags switch on.

    - The model card is ours ([`~hf_rb.hub.write_model_card`]).
    - A mixture of experts gets the auxiliary loss of its configuration, and MPI routers their steps.
    - `_add_metric` averages over tokens, accumulation steps and processes, with one reduction each time the trainer logs.
    - A checkpoint ends with a manifest of its files, written last. `train(resume_from_checkpoint=True)` takes the newest
      checkpoint that agrees with its manifest.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        prepare_routers(self)

    @property
    def _methods(self) -> list[str]:
        """Keys of `hf_rb.hub.METHODS` that the flags switch on."""
        return []

    @property
    def _all_methods(self) -> list[str]:
        """Those of the flags, and those that are part of the model."""
        return [*self._methods, *(["mpi"] if has_mpi(getattr(self, "model", None)) else [])]

    # TRL's class attributes, computed: what a trainer is depends on its flags.
    @property
    def _tag_names(self) -> list[str]:
        return ["hf_rb", *super()._tag_names, *self._all_methods]

    @property
    def _name(self) -> str:
        return " + ".join([super()._name, *(METHODS[key].name for key in self._all_methods)])

    @property
    def _paper(self) -> dict[str, str]:
        return METHODS[self._all_methods[0]].paper if self._all_methods else super()._paper

    def _check_sequences(self, name: str) -> None:
        """
        Refuses what shifts labels or cuts sequences.

        Raises:
            ValueError: With the name of what does not support it.
        """
        if has_prompt_learning(self.model):
            raise ValueError(
                f"{name} does not support prompt-learning adapters, whose virtual tokens shift the labels. Use LoRA."
            )
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                f"{name} does not support context or sequence parallelism, which cut sequences over processes. Set `cp_size: 1` "
                "and `sp_size: 1`."
            )

    # Metrics

    @cached_property
    def _metric_sums(self) -> dict[str, dict[str, torch.Tensor]]:
        """Of each metric, the sums of its numerator and denominator since the last log, on this process."""
        return {"train": defaultdict(float), "eval": defaultdict(float)}

    @cached_property
    def _metric_extremes(self) -> dict[str, dict[str, torch.Tensor]]:
        """Of each metric, its largest negative and its largest value since the last log, on this process."""
        return {"train": {}, "eval": {}}

    def _add_metric(self, name: str, numerator: torch.Tensor, denominator: torch.Tensor) -> None:
        """
        Adds to a metric that is logged as the ratio of two sums, over everything since the last log and all processes.

        Args:
            name (`str`):
                Name in the logs, where evaluation puts `eval_` before it. A metric whose denominator is zero is left out.
            numerator, denominator (`torch.Tensor`):
                Scalars of this process. All processes must add the same metrics in the same order.
        """
        sums = self._metric_sums["train" if self.model.training else "eval"]
        sums[name] = sums[name] + torch.stack([numerator.detach().float(), denominator.float()])

    def _add_extremes(self, name: str, values: torch.Tensor) -> None:
        """
        Adds to a metric that is logged as `<name>_min` and `<name>_max` over everything since the last log and all processes.

        Args:
            name (`str`):
                Name in the logs.
            values (`torch.Tensor` of shape `(N,)`):
                Values of this process. All processes must add the same metrics in the same order; N may be 0.
        """
        extremes = self._metric_extremes["train" if self.model.training else "eval"]
        values = values.detach().float()
        both = torch.stack([-values, values], dim=-1)
        before = extremes.get(name, both.new_full((2,), -torch.inf))
        extremes[name] = torch.cat([both, before.unsqueeze(0)]).amax(0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        sums, extremes = self._metric_sums[mode], self._metric_extremes[mode]
        prefix = "" if mode == "train" else "eval_"
        if sums:
            totals = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
            logs.update(
                {prefix + name: total / count for name, (total, count) in zip(sums, totals, strict=True) if count}
            )
            sums.clear()
        if extremes:
            largest = self.accelerator.gather(torch.stack(list(extremes.values())).unsqueeze(0)).amax(0).tolist()
            for name, (negative, value) in zip(extremes, largest, strict=True):
                if value > -torch.inf:
                    logs.update({f"{prefix}{name}_min": -negative, f"{prefix}{name}_max": value})
            extremes.clear()
        super().log(logs, start_time)

    # Model card

    _carded: dict[str, Any] = {}  # what `create_model_card` was given

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        base_model: str | None = None,
    ) -> None:
        """
        Writes `README.md` into `args.output_dir`, with the last evaluation in its table.

        Args:
            model_name (`str`, *optional*):
                Name of the model. Defaults to the name of `args.output_dir`.
            dataset_name (`str`, *optional*):
                Training data: a Hub id, a file or an embedded task.
            tags (`str` or `list[str]`, *optional*):
                Hub tags, beside those of the trainer and its methods.
            base_model (`str`, *optional*):
                What was trained, when it is not what the model's config says.
        """
        if not self.is_world_process_zero():
            return
        given = {"model_name": model_name, "dataset_name": dataset_name, "tags": tags, "base_model": base_model}
        self._carded = self._carded | {key: value for key, value in given.items() if value is not None}
        write_card(self, self.args.output_dir, **given)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if is_peft_model(self.model) and self.is_world_process_zero():
            # In place of PEFT's, which says nothing but where the base lies on this machine.
            write_card(self, output_dir or self.args.output_dir, **self._carded)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """
        Saves the model, writes its card and uploads what a model repository holds ([`~hf_rb.hub.plan_upload`]): no optimizer state, no
        checkpoints, caches or pickled arguments, which [`~transformers.Trainer.push_to_hub`] takes along when they lie in
        `args.output_dir`.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait for the upload; otherwise a future is returned.
            token, revision, private (*optional*):
                In place of those in `args`.
            **kwargs:
                Arguments of [`create_model_card`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{"model_name": self.hub_model_id.split("/")[-1]} | kwargs)
        self._finish_current_push()
        return push_folder(
            self.args.output_dir,
            self.hub_model_id,
            commit_message=commit_message,
            token=token,
            revision=revision or self.args.hub_revision,
            create=False,
            run_as_future=not blocking,
        )

    # Checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run_folder = self._get_output_dir(trial)
        folder = Path(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            start_manifest(folder)
        # The parent ends by deleting old checkpoints. They must outlive the moment at which this one is known to be whole.
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

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: the parent pushes before the manifest is written, and all that lies in `args.output_dir`."""

    def _push_checkpoint(self, folder: Path) -> None:
        """
        Uploads the model of a checkpoint in the background, and no more than [`~hf_rb.hub.plan_upload`] lists. A `hub_strategy` that asks for
        checkpoints gets the checkpoint too, with optimizer state and all.
        """
        args, running = self.args, getattr(self, "push_in_progress", None)
        busy = running is not None and not running.is_done()
        if args.hub_strategy == HubStrategy.END or (busy and not args.hub_always_push):
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        how = {"token": args.hub_token, "revision": args.hub_revision, "run_as_future": True}
        message = f"Training in progress, step {self.state.global_step}"
        try:
            for name, path in plan_upload(folder).paths.items():
                shutil.copyfile(path, Path(args.output_dir, name))
            jobs = [push_folder(args.output_dir, self.hub_model_id, commit_message=message, create=False, **how)]
        except (OSError, ValueError) as error:  # shards of FSDP are no model; the run goes on
            logger.warning(f"{folder} is not uploaded: {error}")
            return
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            how |= {"repo_id": self.hub_model_id, "commit_message": f"{message}, checkpoint"}
            name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
            jobs.append(HfApi().upload_folder(folder_path=str(folder), path_in_repo=name, **how))
        if busy:
            running.jobs.extend(jobs)
        else:
            self.push_in_progress = compat.PushInProgress(jobs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Trains as [`~transformers.Trainer.train`] does, from a checkpoint that is known to be whole.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True` takes the newest checkpoint in `args.output_dir` that agrees with its manifest and warns of each newer
                one, naming its bad file. A path is checked against its manifest, if it has one.

        Raises:
            ValueError: The checkpoint, or every one of them, is incomplete.
        """
        if resume_from_checkpoint:
            # One process reads the files; all of them go on, or none.
            outcome = None
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


def complete_checkpoint(output_dir: str, resume: str | bool) -> str:
    """
    Returns the checkpoint to resume from.

    Args:
        output_dir (`str`):
            Folder of the `checkpoint-<step>` folders.
        resume (`str` or `bool`):
            Path of a checkpoint, or `True` for the newest complete one. A checkpoint without a manifest, such as TRL's own,
            counts as incomplete then, since an interrupted save looks no different; it is accepted by path.

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

    numbered = {
        path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(output_dir).glob("*")
    }
    newest_first = sorted((path for path in numbered if numbered[path]), key=lambda path: -int(numbered[path][1]))
    for path in newest_first:
        problems = verify_manifest(path)
        if not problems:
            return str(path)
        logger.warning(f"Not resuming from {path}, which is incomplete: {_listed(problems)}.")
    if newest_first:
        raise ValueError(
            f"None of the {len(newest_first)} checkpoints in {output_dir} is complete; the warnings above name their bad "
            "files. To resume from a checkpoint that another trainer has written, give its path."
        )
    raise ValueError(f"There is no checkpoint in {output_dir} to resume from. Train without `resume_from_checkpoint`.")


def _listed(problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else f"{problems[0]} (and {len(problems) - 1} more)"


def own_config(
    config_class: type[TrainingArguments],
    args: TrainingArguments | None,
    model: str | PreTrainedModel,
    suffix: str,
    **derived: Any,
) -> TrainingArguments:
    """
    Returns `args` as our config class, with the flags off where `args` is TRL's or missing. `derived` are fields that TRL's config
    has set from others and refuses beside them.
    """
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return config_class(f"{name.split('/')[-1]}-{suffix}")
    if not isinstance(args, config_class):
        # Not `args.to_dict()`, which replaces the value of every field called `..._token`, `eos_token` too.
        return config_class(
            **{field.name: getattr(args, field.name) for field in fields(args) if field.init} | derived
        )
    return args
