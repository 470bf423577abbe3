"""Keys that recipes of other versions and tools have: what each is called now, or why it is gone.

From the migration guides of transformers 5 and TRL 1, the fields that TRL's configs have lost since version 0.11, and
the recipes of open-r1. Standard library only, so that `hf-rb check` stays fast.
"""

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any


__all__ = ["REMOVED", "RENAMED", "REWRITTEN", "former_key", "nearest_key"]

# Another name for the same values.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "hub_model_revision": "hub_revision",  # open-r1
    "include_tokens_per_second": "include_num_input_tokens_seen",
    "lora_rank": "lora_r",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "torch_dtype": "dtype",
    "use_liger": "use_liger_kernel",
    "use_liger_loss": "use_liger_kernel",
    "vllm_guided_decoding_regex": "vllm_structured_outputs_regex",
    "vllm_max_model_len": "vllm_max_model_length",
    "wandb_log_unique_prompts": "log_unique_prompts",
    "warmup_ratio": "warmup_steps",  # below 1 it is the same fraction
}

# A key and value that are now written otherwise.
REWRITTEN: dict[tuple[str, bool | str], tuple[str, Any]] = {
    ("adafactor", True): ("optim", "adafactor"),
    ("group_by_length", True): ("train_sampling_strategy", "group_by_length"),
    ("include_inputs_for_metrics", True): ("include_for_metrics", ["inputs"]),
    ("packing_strategy", "bfd-requeue"): ("packing_strategy", "bfd_split"),
}

_TORCH_AMP = "Mixed precision is torch's own. Remove it."
_FSDP = "Write it into `fsdp_config`."
_SERVER_OPTION = "It is an option of the vLLM server (`trl vllm-serve`). Remove it."
_WHOLE = "The loss is over the whole vocabulary. Remove it."
_TEACHER = "TRL's stable trainer has no served teacher. Name a model in `teacher_model_name_or_path`."

# Keys that are gone, and what to do.
REMOVED = {
    "adafactor": "In place of `true` write `optim: adafactor`; in place of `false` nothing.",
    "benchmarks": "It belongs to open-r1's own scripts. Run `hf-rb eval` afterwards.",
    "callbacks": "It belongs to open-r1's own scripts. Remove it.",
    "chars_per_token": "Packing counts tokens. Remove it.",
    "chat_template": "A recipe names a file or a model that has a template: `chat_template_path`.",
    "dataset_batch_size": "Remove it.",
    "dataset_mixture": "TRL's key is `datasets`, a list of `{path, name, split, columns, fraction}`.",
    "fp16_backend": _TORCH_AMP,
    "fsdp_min_num_params": _FSDP,
    "fsdp_transformer_layer_cls_to_wrap": _FSDP,
    "group_by_length": "In place of `true` write `train_sampling_strategy: group_by_length`; in place of `false` "
    "nothing.",
    "half_precision_backend": _TORCH_AMP,
    "include_inputs_for_metrics": "In place of `true` write `include_for_metrics: [inputs]`; in place of `false` "
    "nothing.",
    "jit_mode_eval": "In place of `true` write `torch_compile: true`; in place of `false` nothing.",
    "log_completions_steps": "`log_completions: true` logs them whenever metrics are logged. Remove it.",
    "logging_dir": "TensorBoard's folder comes from the environment variable `TENSORBOARD_LOGGING_DIR`. Remove it.",
    "loss_add_tail": _WHOLE,
    "loss_top_k": _WHOLE,
    "max_prompt_length": "Prompts are not cut any more. Filter the long ones out of the dataset, and remove it.",
    "mp_parameters": "Remove it.",
    "num_of_sequences": "Packing counts tokens. Remove it.",
    "overwrite_output_dir": "transformers 5 has dropped it. Choose another `output_dir`; `overwrite: true` deletes "
    "what an earlier run has left there.",
    "past_index": "Remove it.",
    "push_to_hub_organization": "Write the organization into `hub_model_id: organization/name`.",
    "ray_scope": "Set the environment variable `RAY_SCOPE`, and remove it.",
    "reverse_kl_top_1_mode": _WHOLE,
    "save_safetensors": "Weights are always saved as safetensors. Remove it.",
    "system_prompt": "It belongs to open-r1's own scripts. Put the system turn into the dataset's messages.",
    "teacher_model_server_url": _TEACHER,
    "tpu_metrics_debug": "In place of `true` write `debug: tpu_metrics_debug`; in place of `false` nothing.",
    "tpu_num_cores": "Set the environment variable `TPU_NUM_CORES`, and remove it.",
    "use_legacy_prediction_loop": "Remove it.",
    "use_mps_device": "An Apple GPU is used where there is one. Remove it.",
    "use_teacher_server": _TEACHER,
    "vllm_device": "vLLM shares the devices of training (`vllm_mode: colocate`) or runs as a server "
    "(`vllm_mode: server`). Remove it.",
    "vllm_dtype": _SERVER_OPTION,
    "vllm_enable_prefix_caching": _SERVER_OPTION,
    "vllm_sync_frequency": "The weights reach vLLM at every step. Remove it.",
    **{
        f"wandb_{name}": f"Set the environment variable `WANDB_{name.upper()}`, and remove it."
        for name in ("entity", "project", "run_group")
    },
}

# Names in other tools, which may mean slightly different things.
_ALSO_CALLED = {
    "batch_size": "per_device_train_batch_size",
    "dataset": "dataset_name",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "num_epochs": "num_train_epochs",
    "teacher": "teacher_model_name_or_path",
    "teacher_model": "teacher_model_name_or_path",
    "train_batch_size": "per_device_train_batch_size",
}


def former_key(key: Any, known: Collection[str], prefix: str = "") -> str | None:
    """
    Returns the sentence about a key that older versions had: its new name, or what to write instead. `None` for any
    other key.

    Args:
        key (`Any`):
            Key of a recipe that is not among `known`.
        known (`Collection[str]`):
            Keys that there are.
        prefix (`str`, *optional*, defaults to `""`):
            Where the key stands, such as `"training."`.
    """
    if RENAMED.get(key) in known:
        return f"`{prefix}{key}` is now called `{prefix}{RENAMED[key]}`."
    return f"There is no key `{prefix}{key}` any more. {REMOVED[key]}" if key in REMOVED else None


def nearest_key(key: Any, known: Collection[str]) -> str | None:
    """Returns the known key that was probably meant."""
    if _ALSO_CALLED.get(key) in known:
        return _ALSO_CALLED[key]
    return next(iter(get_close_matches(str(key), known, n=1)), None)
