"""The name, the tags and the model card of a run, and the uploads that carry the card."""

import logging
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

from accelerate.utils import is_peft_model
from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy

from hf_rb.hub import (
    ModelCardData,
    Result,
    adapter_settings,
    changed_hyperparameters,
    model_loading,
    plan_upload,
    push_folder,
    write_model_card,
)
from hf_rb.methods.registry import catalog
from hf_rb.trainers.common.below import TrainerBelow
from hf_rb.trainers.common.routers import has_mpi
from hf_rb.utils import compat


__all__ = ["CardMixin"]

logger = logging.getLogger(__name__)


class CardMixin(TrainerBelow):
    """
    The model card is ours ([`~hf_rb.hub.write_model_card`]), and an upload holds a model and its card. The class says
    in `_methods` which methods its flags switch on.
    """

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
        return " + ".join([super()._name, *(catalog()[key].name for key in self._all_methods)])

    @property
    def _paper(self) -> dict[str, str]:
        return catalog()[self._all_methods[0]].paper_of_trl if self._all_methods else super()._paper

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
        _write_card(self, self.args.output_dir, **given)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if is_peft_model(self.model) and self.is_world_process_zero():
            # In place of PEFT's, which says nothing but where the base lies on this machine.
            _write_card(self, output_dir or self.args.output_dir, **self._carded)

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
        Saves the model, writes its card and uploads what a model repository holds ([`~hf_rb.hub.plan_upload`]): no
        optimizer state, no checkpoints, caches or pickled arguments, which [`~transformers.Trainer.push_to_hub`] takes
        along when they lie in `args.output_dir`.

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
        repository = cast(str, self.hub_model_id)  # set by `init_hf_repo` at the latest
        self.create_model_card(**{"model_name": repository.split("/")[-1]} | kwargs)
        self._finish_current_push()
        return push_folder(
            self.args.output_dir,
            repository,
            commit_message=commit_message,
            token=token,
            revision=revision or self.args.hub_revision,
            create=False,
            run_as_future=not blocking,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: the parent pushes before the manifest is written, and all that lies in `args.output_dir`."""

    def _push_checkpoint(self, folder: Path) -> None:
        """
        Uploads the model of a checkpoint in the background, and no more than [`~hf_rb.hub.plan_upload`] lists. A
        `hub_strategy` that asks for checkpoints gets the checkpoint too, with optimizer state and all.
        """
        args, running = self.args, getattr(self, "push_in_progress", None)
        busy = running is not None and not running.is_done()
        if args.hub_strategy == HubStrategy.END or (busy and not args.hub_always_push):
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        repository = cast(str, self.hub_model_id)  # set at the start of a run that pushes
        try:
            for name, path in plan_upload(folder).paths.items():
                shutil.copyfile(path, Path(args.output_dir, name))
            jobs: list[Any] = [
                push_folder(
                    args.output_dir,
                    repository,
                    commit_message=message,
                    token=args.hub_token,
                    revision=args.hub_revision,
                    create=False,
                    run_as_future=True,
                )
            ]
        except (OSError, ValueError) as error:  # shards of FSDP are no model; the run goes on
            logger.warning(f"{folder} is not uploaded: {error}")
            return
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            future = HfApi().upload_folder(
                repo_id=repository,
                folder_path=str(folder),
                path_in_repo="last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name,
                commit_message=f"{message}, checkpoint",
                token=args.hub_token,
                revision=args.hub_revision,
                run_as_future=True,
            )
            jobs.append(future)
        if busy:
            running.jobs.extend(jobs)
        else:
            self.push_in_progress = compat.PushInProgress(jobs)  # pyrefly: ignore[bad-argument-type]  (it takes a list)


def _write_card(
    trainer: CardMixin,
    folder: str,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
    base_model: str | None = None,
) -> None:
    """Writes `README.md` into a folder; see [`CardMixin.create_model_card`]."""
    model, args, methods = trainer.model, trainer.args, trainer._all_methods
    tags = [tags] if isinstance(tags, str) else tags or []
    adapters: list[Any] = list(model.peft_config.values()) if is_peft_model(model) else []
    settings = [adapter_settings(config.to_dict()) for config in adapters]
    own_tags = {"hf_rb", *methods}  # the card adds these itself
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    data = ModelCardData(
        model_name=model_name or Path(args.output_dir).name,
        methods=methods,
        base_model=base_model or model.config._name_or_path or None,
        dataset_name=dataset_name,
        trainer=type(trainer).__name__,
        hyperparameters=changed_hyperparameters(args) | (settings[0] if settings else {}),
        results=_results(evaluations[-1], dataset_name) if evaluations else (),
        repo_id=trainer.hub_model_id,
        tags=[tag for tag in dict.fromkeys([*trainer._tag_names, *tags]) if tag not in own_tags],
        library_name="peft" if adapters else "transformers",
        loading=model_loading(model, trainer.processing_class),
    )
    write_model_card(folder, data)


def _results(evaluation: dict[str, float], dataset_name: str | None) -> list[Result]:
    names = {"eval_loss": "loss", "eval_mean_token_accuracy": "token accuracy", "eval_reward": "reward"}
    dataset = dataset_name or "evaluation data"
    return [Result(name, evaluation[key], dataset) for key, name in names.items() if key in evaluation]
