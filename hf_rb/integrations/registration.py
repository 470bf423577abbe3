"""Registers our classes with the Hugging Face libraries, whatever is imported first.

A hook stores names, never classes, and imports no module of ours or of another package that may import a library: at
that moment the library is still half imported. The records of methods are read from their sources.
"""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any

from hf_rb.methods.registry import methods
from hf_rb.utils import compat
from hf_rb.utils.import_hooks import on_import


__all__ = ["LazyMapping", "register"]


class LazyMapping(dict):
    """A dict whose values may be `"module:name"` strings, which are imported when they are read."""

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, str):
            module, _, name = value.partition(":")
            value = self[key] = getattr(import_module(module), name)
        return value

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default

    def values(self) -> Any:
        return [self[key] for key in self]

    def items(self) -> Any:
        return [(key, self[key]) for key in self]


class _OurConfigs(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return getattr(type(instance), "is_packed_config", False)


class _OurQuantizationConfig(metaclass=_OurConfigs):
    """Stands for our quantization configs in an `isinstance` test without importing them."""


_MODEL_TYPES = {
    "mpi_mixtral": "hf_rb.models.mpi_mixtral.configuration_mpi_mixtral:MPIMixtralConfig",
    "mpi_olmoe": "hf_rb.models.mpi_olmoe.configuration_mpi_olmoe:MPIOlmoeConfig",
    "mpi_qwen3_moe": "hf_rb.models.mpi_qwen3_moe.configuration_mpi_qwen3_moe:MPIQwen3MoeConfig",
}


def _register_models(auto: ModuleType) -> None:
    # Configurations only: each registers its models when it is made, which every Auto class does first.
    mapping = compat.resolve("CONFIG_MAPPING")
    mapping._extra_content = LazyMapping(mapping._extra_content, **_MODEL_TYPES)


def _register_quantizers(auto: Any) -> None:
    # `resolve`, not attributes: those are kept, and other plug-ins may have registered since.
    configs, quantizers = map(compat.resolve, ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"))
    ours = {name: entry.method for name, entry in methods("quantizer").items()}
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING = LazyMapping(configs, **{name: one.config for name, one in ours.items()})
    auto.AUTO_QUANTIZER_MAPPING = LazyMapping(quantizers, **{name: one.quantizer for name, one in ours.items()})
    # The config types whose `get_loading_attributes` may override what a checkpoint stores, as `dequantize=True` does.
    types = compat.resolve("LOADING_ATTRIBUTES_CONFIG_TYPES")
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*types, _OurQuantizationConfig)


def _register_lora(lora: ModuleType) -> None:
    # LoRA makes a layer for any module there.
    create = compat.resolve("LoraModel._create_new_module")
    if create.__module__ == __name__:
        return

    def create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        ours = None
        if _is_packed(target.get_base_layer() if hasattr(target, "get_base_layer") else target):
            ours = import_module("hf_rb.quantizers.loading.adapters").dispatch(
                lora_config, adapter_name, target, **kwargs
            )
        return create(lora_config, adapter_name, target, **kwargs) if ours is None else ours

    lora.LoraModel._create_new_module = staticmethod(create_new_module)


def _guard_merge(tuners: ModuleType) -> None:
    # Adapters of every kind ask it before they merge.
    check = compat.resolve("BaseTuner._check_merge_allowed")
    if check.__module__ == __name__:
        return

    def check_merge_allowed(self: Any) -> None:
        if any(_is_packed(module) for module in self.model.modules()):
            import_module("hf_rb.quantizers.loading.adapters").check_merge(self.model)
        check(self)

    tuners.BaseTuner._check_merge_allowed = check_merge_allowed


def _guard_adapters(tuners: ModuleType) -> None:
    # Adapters of every kind ask it of each layer before they are put on it.
    check, init = map(compat.resolve, ("BaseTuner._check_target_module_compatiblity", "BaseTuner.__init__"))
    if check.__module__ == __name__:
        return

    def check_adapter(self: Any, config: Any, model: Any, *target: str) -> None:
        if self.__dict__.get("_has_packed", True):
            import_module("hf_rb.quantizers.loading.trial").check_adapter(self, config, model, *target)

    def check_target_module(self: Any, peft_config: Any, model: Any, target_name: str) -> None:
        check(self, peft_config, model, target_name)
        check_adapter(self, peft_config, model, target_name)

    @wraps(init)
    def initialize(self: Any, model: Any, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # Once for all layers: PEFT asks for each, and a look at the whole model each time would be quadratic.
        self.__dict__["_has_packed"] = any(_is_packed(module) for module in model.modules())
        try:
            init(self, model, peft_config, adapter_name, *args, **kwargs)
        except (ImportError, ValueError):
            raise
        except Exception:  # some look at the weights before they ask
            check_adapter(self, self.peft_config[adapter_name], model)
            raise

    tuners.BaseTuner._check_target_module_compatiblity = check_target_module
    tuners.BaseTuner.__init__ = initialize


def _guard_trained_modules(other: ModuleType) -> None:
    # PEFT copies a module there that is to be trained as a whole.
    update = compat.resolve("ModulesToSaveWrapper.update")
    if update.__module__ == __name__:
        return

    @wraps(update, assigned=("__doc__", "__name__", "__qualname__"))
    def update_module(self: Any, *args: Any, **kwargs: Any) -> None:
        if any(_is_packed(module) for module in self.original_module.modules()):
            import_module("hf_rb.quantizers.loading.trial").check_trained_module(self.original_module)
        update(self, *args, **kwargs)

    other.ModulesToSaveWrapper.update = update_module


def _count_packed(modeling: ModuleType) -> None:
    count = compat.resolve("PreTrainedModel.num_parameters")
    if count.__module__ == __name__:
        return

    @wraps(count, assigned=("__doc__", "__name__", "__qualname__"))
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        hidden = (module.uncounted(only_trainable) for module in self.modules() if _is_packed(module))
        return count(self, only_trainable, exclude_embeddings) + sum(hidden)

    modeling.PreTrainedModel.num_parameters = num_parameters


def _is_packed(module: Any) -> bool:
    return getattr(type(module), "is_packed_module", False)


_HOOKS: dict[str, tuple[Callable[[ModuleType], None], ...]] = {
    "transformers.models.auto.configuration_auto": (_register_models,),
    "transformers.modeling_utils": (_count_packed,),
    "transformers.quantizers.auto": (_register_quantizers,),
    "peft.tuners.lora.model": (_register_lora,),
    "peft.tuners.tuners_utils": (_guard_merge, _guard_adapters),
    "peft.utils.other": (_guard_trained_modules,),
}


def register() -> None:
    """Installs the hooks. Installing them again replaces what is registered by the same."""
    for module, hooks in _HOOKS.items():
        for hook in hooks:
            on_import(module, hook)
