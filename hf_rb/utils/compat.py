"""The one door to names of TRL, transformers and PEFT that are private, experimental or likely to move.

`from hf_rb.utils import compat` and use `compat.<name>`: the name is looked up in `TABLE` and imported on first use,
so that importing this module costs nothing. Private attributes of objects that these libraries make are used where
they are, and listed in `ATTRIBUTES`. A name that is gone raises one `ImportError` that says which library moved it,
the version that is installed and the versions we tested.

`hf-rb doctor` and `tests/test_compat.py` check each name of both tables by behaviour
(hf_rb/scripts/doctor/behaviours). The block for type checkers imports every name of `TABLE` that is an attribute of
this module.
"""

from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_rb.utils.versions import TESTED, check_versions, release_of


if TYPE_CHECKING:
    from accelerate.commands.config import default_config_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.integrations import skip_init_on_device
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        ConversionOps,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )
    from transformers.core_model_loading import _IdentityOp as IdentityOp
    from transformers.integrations.accelerate import load_offloaded_parameter
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.modelcard import TASK_MAPPING
    from transformers.modeling_utils import load_state_dict
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        LOADING_ATTRIBUTES_CONFIG_TYPES,
    )
    from transformers.quantizers.quantizers_utils import should_convert_module
    from transformers.trainer_utils import rotate_checkpoints
    from transformers.utils import PushInProgress
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY as CAN_RECORD_REGISTRY
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.models import prepare_deepspeed
    from trl.models.utils import _ForwardRedirection as ForwardRedirection
    from trl.models.utils import unwrap_model_for_generation
    from trl.trainer.utils import (
        FusedCausalLMOutput,
        create_model_from_path,
        disable_dropout_in_model,
        get_callable_name,
        maybe_gather_lm_head_ctx,
    )

__all__ = [
    "ATTRIBUTES",
    "AUTO_QUANTIZATION_CONFIG_MAPPING",
    "AUTO_QUANTIZER_MAPPING",
    "CAN_RECORD_REGISTRY",
    "CONFIG_MAPPING",
    "Concatenate",
    "ConversionOps",
    "Entry",
    "ForwardRedirection",
    "FusedCausalLMOutput",
    "GKDConfig",
    "GKDTrainer",
    "IdentityOp",
    "LOADING_ATTRIBUTES_CONFIG_TYPES",
    "MIN_PEFT_VERSION",
    "MergeModulelist",
    "ParamWrapper",
    "PushInProgress",
    "TABLE",
    "TASK_MAPPING",
    "WeightConverter",
    "WeightRenaming",
    "cache_of",
    "create_model_from_path",
    "default_config_file",
    "disable_dropout_in_model",
    "get_callable_name",
    "get_model_conversion_mapping",
    "is_removed",
    "launch_command",
    "launch_command_parser",
    "load_offloaded_parameter",
    "load_state_dict",
    "maybe_gather_lm_head_ctx",
    "native_adapters_problem",
    "prepare_deepspeed",
    "rename_source_key",
    "resolve",
    "rotate_checkpoints",
    "should_convert_module",
    "skip_init_on_device",
    "unwrap_model_for_generation",
]


class Entry(NamedTuple):
    """Place of a name.

    Attributes:
        module (`str`): Module to import.
        attribute (`str`): Attribute path inside the module, dots allowed (`"GRPOTrainer._compute_loss"`).
        parameters (`tuple[str, ...]`): For a callable, the parameters we pass by name or rely on. Checked by the
            tests.
    """

    module: str
    attribute: str
    parameters: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]


TABLE: dict[str, Entry] = {
    # Registries of quantization methods (hf_rb/integrations/registration.py).
    "AUTO_QUANTIZATION_CONFIG_MAPPING": Entry("transformers.quantizers.auto", "AUTO_QUANTIZATION_CONFIG_MAPPING"),
    "AUTO_QUANTIZER_MAPPING": Entry("transformers.quantizers.auto", "AUTO_QUANTIZER_MAPPING"),
    "LOADING_ATTRIBUTES_CONFIG_TYPES": Entry("transformers.quantizers.auto", "LOADING_ATTRIBUTES_CONFIG_TYPES"),
    # Registry of what a model of a class may return besides its output
    # (hf_rb/models/mpi/conversion.py).
    "CAN_RECORD_REGISTRY": Entry("transformers.utils.output_capturing", "_CAN_RECORD_REGISTRY"),
    # Registry of model types (hf_rb/integrations/registration.py).
    "CONFIG_MAPPING": Entry("transformers.models.auto.configuration_auto", "CONFIG_MAPPING"),
    # Overridden or called by the trainers (hf_rb/trainers).
    "FusedCausalLMOutput": Entry("trl.trainer.utils", "FusedCausalLMOutput", ("log_probs", "label_mask")),
    "GKDConfig": Entry("trl.experimental.gkd", "GKDConfig"),
    "GKDTrainer": Entry("trl.experimental.gkd", "GKDTrainer"),
    "GKDTrainer.generalized_jsd_loss": Entry(
        "trl.experimental.gkd",
        "GKDTrainer.generalized_jsd_loss",
        ("student_logits", "teacher_logits", "labels", "beta", "num_items_in_batch"),
    ),
    "GKDTrainer.generate_on_policy_outputs": Entry(
        "trl.experimental.gkd",
        "GKDTrainer.generate_on_policy_outputs",
        ("model", "inputs", "generation_config"),
    ),
    "GRPOTrainer._calculate_rewards": Entry(
        "trl", "GRPOTrainer._calculate_rewards", ("inputs", "prompts", "completions", "completion_ids_list")
    ),
    "GRPOTrainer._compute_loss": Entry("trl", "GRPOTrainer._compute_loss", ("model", "inputs")),
    "GRPOTrainer._generate_and_score_completions": Entry(
        "trl", "GRPOTrainer._generate_and_score_completions", ("inputs",)
    ),
    "GRPOTrainer._get_per_token_logps_and_entropies": Entry(
        "trl",
        "GRPOTrainer._get_per_token_logps_and_entropies",
        ("model", "input_ids", "attention_mask", "logits_to_keep"),
    ),
    "GRPOTrainer._generate_single_turn": Entry("trl", "GRPOTrainer._generate_single_turn", ("prompt_ids",)),
    "DistillationTrainer._generate_single_turn": Entry(
        "trl", "DistillationTrainer._generate_single_turn", ("prompt_ids",)
    ),
    "SFTTrainer._prepare_dataset": Entry(
        "trl",
        "SFTTrainer._prepare_dataset",
        ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"),
    ),
    "disable_dropout_in_model": Entry("trl.trainer.utils", "disable_dropout_in_model", ("model",)),
    "get_callable_name": Entry("trl.trainer.utils", "get_callable_name", ("func",)),
    "unwrap_model_for_generation": Entry(
        "trl.models.utils",
        "unwrap_model_for_generation",
        ("model", "accelerator", "gradient_checkpointing_kwargs"),
    ),
    "Trainer._get_num_items_in_batch": Entry(
        "transformers.trainer", "Trainer._get_num_items_in_batch", ("batch_samples", "device")
    ),
    "Trainer._get_output_dir": Entry("transformers.trainer", "Trainer._get_output_dir", ("trial",)),
    "Trainer._push_from_checkpoint": Entry(
        "transformers.trainer", "Trainer._push_from_checkpoint", ("checkpoint_folder",)
    ),
    "Trainer._save_checkpoint": Entry("transformers.trainer", "Trainer._save_checkpoint", ("model", "trial")),
    "PushInProgress": Entry("transformers.utils", "PushInProgress", ("jobs",)),
    "rotate_checkpoints": Entry(
        "transformers.trainer_utils",
        "rotate_checkpoints",
        ("output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime"),
    ),
    # A model that is not trained is loaded and placed by these, and run under its wrapper (hf_rb/teachers,
    # hf_rb/ops/backbone.py).
    "ForwardRedirection": Entry("trl.models.utils", "_ForwardRedirection"),
    "create_model_from_path": Entry("trl.trainer.utils", "create_model_from_path", ("model_id",)),
    "maybe_gather_lm_head_ctx": Entry("trl.trainer.utils", "maybe_gather_lm_head_ctx"),
    "prepare_deepspeed": Entry("trl.models", "prepare_deepspeed", ("model", "accelerator")),
    # Adapters are made and merged by these; the last is the one for parameters (hf_rb/integrations/registration.py,
    # hf_rb/quantizers/loading/adapters.py).
    "BaseTuner._check_merge_allowed": Entry("peft.tuners.tuners_utils", "BaseTuner._check_merge_allowed"),
    "BaseTuner._check_target_module_compatiblity": Entry(
        "peft.tuners.tuners_utils",
        "BaseTuner._check_target_module_compatiblity",
        ("peft_config", "model", "target_name"),
    ),
    "BaseTuner.__init__": Entry(
        "peft.tuners.tuners_utils", "BaseTuner.__init__", ("model", "peft_config", "adapter_name")
    ),
    "skip_init_on_device": Entry("peft.utils.integrations", "skip_init_on_device", ("func",)),
    "ModulesToSaveWrapper.update": Entry("peft.utils.other", "ModulesToSaveWrapper.update", ("adapter_name",)),
    "LoraModel._create_new_module": Entry(
        "peft.tuners.lora.model", "LoraModel._create_new_module", ("lora_config", "adapter_name", "target", "kwargs")
    ),
    "ParamWrapper": Entry("peft.tuners.lora.layer", "ParamWrapper", ("base_layer", "adapter_name", "config")),
    "ParamWrapper._activate_lora": Entry(
        "peft.tuners.lora.layer", "ParamWrapper._activate_lora", ("active_adapters",)
    ),
    "ParamWrapper._get_in_out_features": Entry(
        "peft.tuners.lora.layer", "ParamWrapper._get_in_out_features", ("module",)
    ),
    # From which PEFT on transformers adds, loads and saves adapters by itself.
    "MIN_PEFT_VERSION": Entry("transformers.integrations.peft", "MIN_PEFT_VERSION"),
    # A quantizer works on tensors with these while they load, and names modules (hf_rb/quantizers).
    "ConversionOps": Entry("transformers.core_model_loading", "ConversionOps"),
    "IdentityOp": Entry("transformers.core_model_loading", "_IdentityOp"),
    "load_state_dict": Entry("transformers.modeling_utils", "load_state_dict", ("checkpoint_file", "map_location")),
    "load_offloaded_parameter": Entry(
        "transformers.integrations.accelerate", "load_offloaded_parameter", ("model", "param_name")
    ),
    # Rules by which transformers maps the tensors of files to parameters (hf_rb/quantizers/folders/stream.py).
    "Concatenate": Entry("transformers.core_model_loading", "Concatenate", ("dim",)),
    "MergeModulelist": Entry("transformers.core_model_loading", "MergeModulelist", ("dim",)),
    "PreTrainedModel._from_config": Entry("transformers", "PreTrainedModel._from_config", ("config",)),
    # Counts of a model's parameters (hf_rb/integrations/registration.py).
    "PreTrainedModel.num_parameters": Entry(
        "transformers", "PreTrainedModel.num_parameters", ("only_trainable", "exclude_embeddings")
    ),
    "PreTrainedModel._get_dtype_plan": Entry("transformers", "PreTrainedModel._get_dtype_plan", ("dtype",)),
    "WeightConverter": Entry("transformers.core_model_loading", "WeightConverter"),
    "WeightRenaming": Entry("transformers.core_model_loading", "WeightRenaming"),
    "get_model_conversion_mapping": Entry(
        "transformers.conversion_mapping", "get_model_conversion_mapping", ("model",)
    ),
    "rename_source_key": Entry(
        "transformers.core_model_loading",
        "rename_source_key",
        ("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"),
    ),
    "should_convert_module": Entry(
        "transformers.quantizers.quantizers_utils", "should_convert_module", ("full_name", "patterns")
    ),
    # Tasks of the Hub with their classes (hf_rb/hub/loading.py).
    "TASK_MAPPING": Entry("transformers.modelcard", "TASK_MAPPING"),
    # `accelerate launch` without a shell (hf_rb/cli/train.py).
    "default_config_file": Entry("accelerate.commands.config", "default_config_file"),
    "launch_command": Entry("accelerate.commands.launch", "launch_command", ("args",)),
    "launch_command_parser": Entry("accelerate.commands.launch", "launch_command_parser"),
}

# Private attributes of objects by library. A comment names the class where it is not obvious.
ATTRIBUTES: dict[str, str] = {
    # Model types that other packages add (hf_rb/integrations/registration.py).
    "_extra_content": "transformers",
    # Rules by which a checkpoint's tensors became parameters, and become tensors of a file again (hf_rb/quantizers).
    "_weight_conversions": "transformers",
    "_original_source_patterns": "transformers",
    "_original_target_patterns": "transformers",
    # Overridden by a quantizer, or read of a model and its parameters.
    "_process_model_before_weight_loading": "transformers",
    "_process_model_after_weight_loading": "transformers",
    "_dequantize": "transformers",
    "_is_hf_initialized": "transformers",
    "_hf_peft_config_loaded": "transformers",
    "_is_quantized": "transformers",
    "_keep_in_fp32_modules": "transformers",
    "_keep_in_fp32_modules_strict": "transformers",
    "_keys_to_ignore_on_load_missing": "transformers",
    "_keys_to_ignore_on_load_unexpected": "transformers",
    "_keys_to_ignore_on_save": "transformers",
    "_name_or_path": "transformers",  # of a configuration
    # Read of the experts of a mixture (hf_rb/models/mpi, hf_rb/quantizers/packed/experts.py).
    "_apply_gate": "transformers",
    "_is_expert_parallel": "transformers",
    # Overridden or read by our model classes (hf_rb/models/mpi).
    "_auto_class": "transformers",
    "_can_record_outputs": "transformers",
    "_can_set_experts_implementation": "transformers",
    # Called or read by the trainers (hf_rb/trainers). Methods in `TABLE` are not here again.
    "_VALID_DICT_FIELDS": "transformers",  # of TrainingArguments
    "_finish_current_push": "transformers",
    "_prepare_inputs": "transformers",
    "_buffered_inputs": "trl",
    "_forward_redirection": "trl",
    "_get_last_hidden_state": "trl",
    "_is_vision_dataset": "trl",
    "_logs": "trl",
    "_metrics": "trl",
    "_name": "trl",
    "_paper": "trl",
    "_tag_names": "trl",
    "_tokenizer": "trl",
    # Dimensions of the parameter that LoRA was put on (hf_rb/quantizers/loading/adapters.py).
    "_param_ndim": "peft",
    # A layer's forward while accelerate's hook stands in its place (hf_rb/ops/wide_head.py).
    "_hf_hook": "accelerate",
    "_old_forward": "accelerate",
}


def cache_of(output: Any) -> dict[str, Any]:
    """Returns the cache in a model's output as the keyword argument that the model's next call takes."""
    # Transformers 5.24 renamed `past_key_values`.
    return {name: output[name] for name in ("cache", "past_key_values") if name in output.keys()}


def native_adapters_problem() -> str | None:
    """Returns why transformers will not have an adapter added to a model, loaded or saved with the installed PEFT, or
    `None`.
    """
    # transformers asks for a PEFT of its own choice, which may not be released yet.
    wanted, installed = resolve("MIN_PEFT_VERSION"), metadata.version("peft")
    if release_of(installed) >= release_of(wanted):
        return None
    return (
        f"transformers {metadata.version('transformers')} takes adapters from peft {wanted} on; peft {installed} is "
        "installed."
    )


def is_removed(name: str) -> bool:
    """
    Returns whether a name of `TABLE` was in an experimental module that the installed TRL does not have.

    TRL removes such modules without deprecation, so we have code of our own for what they held. A module that is there
    and lacks the name, or does not import, is no such case: [`resolve`] raises.
    """
    module = TABLE[name].module
    if not module.startswith("trl.experimental."):
        return False
    try:
        return find_spec(module) is None
    except ModuleNotFoundError as error:  # of the parent
        if (error.name or "").partition(".")[0] != "trl":
            raise
        return True


def resolve(name: str) -> Any:
    """Imports and returns the object that `TABLE` lists under `name`.

    Raises:
        ImportError: The library is missing or has moved the name.
    """
    entry = TABLE[name]
    try:
        value = import_module(entry.module)
        for part in entry.attribute.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        try:
            installed = metadata.version(entry.library)
        except metadata.PackageNotFoundError:
            raise ImportError(f"hf_rb needs {entry.library} for `{name}`, and it is not installed.") from error
        absent = (getattr(error, "name", None) or "") if isinstance(error, ModuleNotFoundError) else ""
        if absent and absent.partition(".")[0] != entry.library:
            raise ImportError(
                f"hf_rb needs `{entry.module}.{entry.attribute}`, and {entry.library} needs {absent}."
            ) from error
        raise ImportError(
            f"hf_rb needs `{entry.module}.{entry.attribute}`, which {entry.library} {installed} does not have. hf_rb "
            f"is tested with {entry.library} {TESTED.get(entry.library, '?')}; install that version or a newer hf_rb."
        ) from error
    return value


def __getattr__(name: str) -> Any:
    if name not in TABLE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_versions()
    value = globals()[name] = resolve(name)
    return value
