"""The model card of a run."""

from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from hf_rb.hub import (
    ModelCardData,
    Result,
    adapter_settings,
    changed_hyperparameters,
    model_loading,
    write_model_card,
)


__all__ = ["write_card"]


def write_card(
    trainer: Any,
    folder: str,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
    base_model: str | None = None,
) -> None:
    """Writes `README.md` into a folder; see [`~hf_rb.trainers.common.mixin.TrainerMixin.create_model_card`]."""
    model, args, methods = trainer.model, trainer.args, trainer._all_methods
    tags = [tags] if isinstance(tags, str) else tags or []
    adapters = model.peft_config.values() if is_peft_model(model) else ()
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
