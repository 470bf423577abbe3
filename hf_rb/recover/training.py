"""Trains the adapter: distillation from the full-precision model, or plain fine-tuning, on the same examples."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, set_seed

from hf_rb import GKDConfig, GKDTrainer, SFTConfig, SFTTrainer
from hf_rb.io.resumable import write_json
from hf_rb.recover.config import TRAINING, RecoverConfig
from hf_rb.recover.measuring import ADAPTER, BASE
from hf_rb.recover.stages import fingerprint
from hf_rb.teachers import cache_teacher


__all__ = ["capture", "make_config", "make_trainer", "train"]

ON_CPU: dict[str, Any] = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}


def make_config(config: RecoverConfig, objective: str, folder: Path, **options: Any) -> GKDConfig | SFTConfig:
    """
    Returns the config of one run; `options` go over those of the recipe.

    Raises:
        ValueError, TypeError: The recipe's `training` is no such config.
    """
    options = TRAINING | ({} if torch.cuda.is_available() else ON_CPU) | config.training | options
    options |= {"output_dir": str(folder / "run"), "seed": config.seed}
    options["model_init_kwargs"] = {"dtype": config.dtype} | options.get("model_init_kwargs", {})
    if objective == "sft":
        known = {field.name for field in fields(SFTConfig)}
        return SFTConfig(**{key: value for key, value in options.items() if key in known})
    options |= {"objective": objective, "lmbda": 0.0}
    return GKDConfig(**options)


def make_trainer(
    config: RecoverConfig,
    base: Path,
    teacher: str | Path,
    rows: list[dict],
    objective: str,
    folder: Path,
    **options: Any,
) -> Trainer:
    """Returns the trainer of an adapter for the packed model in `base`; `options` go into its config."""
    args = make_config(config, objective, folder, **options)
    adapter = LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    data: dict[str, Any] = {"train_dataset": Dataset.from_list(rows), "peft_config": adapter}
    set_seed(config.seed)  # of the adapter
    if not isinstance(args, GKDConfig):
        return SFTTrainer(str(base), args, **data)
    if args.teacher_cache is None:
        args.teacher_model_name_or_path = str(teacher)
        given: Any = args.teacher_model_init_kwargs or {}  # a string only until the config has read it
        args.teacher_model_init_kwargs = {"dtype": config.dtype} | given
    return GKDTrainer(str(base), args=args, **data)


def capture(config: RecoverConfig, base: Path, teacher: str | Path, rows: list[dict], folder: Path) -> None:
    """Runs the teacher once over the repair set."""
    trainer: Any = make_trainer(config, base, teacher, rows, "forward_kl", folder)  # GKD's, which has a teacher
    cache_teacher(trainer, folder / "cache")


def train(
    config: RecoverConfig,
    base: Path,
    teacher: str | Path,
    rows: list[dict],
    objective: str,
    folder: Path,
    cache: Path | None = None,
) -> None:
    """
    Trains an adapter and saves it in `folder / "adapter"`, in bfloat16, with the fingerprint of its base.

    Raises:
        ValueError: The loss became infinite or NaN, or the teacher does not fit.
    """
    options = {"teacher_cache": str(cache / "cache")} if cache and objective != "sft" else {}
    trainer = make_trainer(config, base, teacher, rows, objective, folder, **options)
    result = trainer.train()
    model: Any = trainer.model
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    target = folder / ADAPTER
    model.save_pretrained(target)
    (target / "README.md").unlink(missing_ok=True)  # PEFT's, empty
    _name_base(target, config)
    write_json(target / BASE, {"sha256": fingerprint(base)})
    write_json(
        folder / "training.json", {"seconds": result.metrics["train_runtime"], "log": trainer.state.log_history}
    )
    shutil.rmtree(folder / "run", ignore_errors=True)


def _name_base(adapter: Path, config: RecoverConfig) -> None:
    # The base lies beside the adapter; its path on this machine is nobody's business.
    path = adapter / "adapter_config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(stored | {"base_model_name_or_path": None}, indent=2) + "\n", encoding="utf-8")
