"""Facts that a visitor of a model's page needs to load it: class, task and packages, read from the model or its
folder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf_rb import __version__
from hf_rb.io.model_folder import ADAPTER_CONFIG, local_folder
from hf_rb.methods.registry import methods


__all__ = ["Loading", "adapter_settings", "hf_rb_requirement", "model_loading", "read_json", "read_loading"]

SOURCE = "git+https://github.com/hf-rb/hf_rb"
# Classes for the base of an adapter that cannot be read, by PEFT's `task_type`.
_TASK_TYPES = {
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
# What loads other formats; the versions are those with which an exported model was loaded.
_LOADERS = {"gptq": ("optimum>=2.3", "gptqmodel>=7.7"), "bitsandbytes": ("bitsandbytes",)}


@dataclass(frozen=True)
class Loading:
    """Facts that are needed to load a model.

    Args:
        architecture (`str`, *optional*, defaults to `"AutoModelForCausalLM"`):
            Class that saved the model, as `architectures` in its config.json names it; of an adapter that of its base.
        chat (`bool`, *optional*, defaults to `False`):
            Whether there is a chat template.
        reader (`str`, *optional*, defaults to `"AutoTokenizer"`):
            Auto class of what makes inputs: `"AutoTokenizer"`, `"AutoProcessor"`, or `""` for nothing.
        method (`str`, *optional*):
            `quant_method` of the weights, or of those of an adapter's base.
        mpi (`bool`, *optional*, defaults to `False`):
            Whether the class is one of ours.
        remote_code (`bool`, *optional*, defaults to `False`):
            Whether the class comes with the checkpoint, and transformers has none of its name.
    """

    architecture: str = "AutoModelForCausalLM"
    chat: bool = False
    reader: str = "AutoTokenizer"
    method: str | None = None
    mpi: bool = False
    remote_code: bool = False

    @cached_property
    def task(self) -> str | None:
        """The Hub's `pipeline_tag`, from transformers' tables of classes by task. `None` if no table has the class."""
        if self.architecture.endswith(("ForCausalLM", "LMHeadModel")):
            return "text-generation"
        from hf_rb.utils import compat

        def classes(mapping: Mapping[str, Any]) -> set[str]:
            found = (name if isinstance(name, (tuple, list)) else (name,) for name in mapping.values())
            return {name for names in found for name in names}

        # The tables go from text to images: a class for images and text is in both, so the last table decides.
        tasks = reversed(compat.TASK_MAPPING.items())
        return next((task for task, mapping in tasks if self.architecture in classes(mapping)), None)

    @property
    def model_class(self) -> str:
        """Name of the class of transformers that loads the model."""
        return "AutoModelForCausalLM" if self.task == "text-generation" else self.architecture

    @property
    def needs_hf_rb(self) -> bool:
        """Returns whether only hf_rb has the format or the class of the weights."""
        return self.mpi or self.method in methods("quantizer")

    def packages(self, adapter: bool) -> list[str]:
        """Returns what pip must install, for a model or for one with an adapter."""
        images = ["pillow", "torchvision"] if self.reader == "AutoProcessor" and "image" in (self.task or "") else []
        if self.needs_hf_rb:
            entry = methods("quantizer").get(self.method or "")
            others = [entry.package] if entry and entry.package != "hf_rb" else []
            return [hf_rb_requirement(), *others, *images]  # its dependencies are transformers, torch, PEFT and more
        beside = [*(["peft"] if adapter else []), *_LOADERS.get(self.method or "", ())]
        return [_at_least("transformers"), "torch", *images, *map(_at_least, beside)]


def hf_rb_requirement() -> str:
    """Returns what pip installs this hf_rb by: its version, or its repository while the version is not released."""
    return f"hf_rb @ {SOURCE}" if "dev" in __version__ else f"hf_rb=={__version__}"


def _at_least(library: str) -> str:
    """Returns a requirement. A bare name of an installed library gets that library's version, without the last part,
    as the lowest.
    """
    try:
        return f"{library}>={'.'.join(version(library).split('.')[:2])}"
    except (PackageNotFoundError, ValueError):
        return library


def read_json(path: Path) -> dict[str, Any]:
    """Returns what a JSON file holds; nothing if there is no such file or it is no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_loading(folder: str | Path) -> Loading:
    """Returns how the model or the adapter in a folder is loaded. An adapter's base that cannot be read counts as a
    causal model.
    """
    folder = Path(folder)
    config, adapter = read_json(folder / "config.json"), read_json(folder / ADAPTER_CONFIG)
    if not config and not adapter:
        return Loading()  # the card comes before the model
    base = adapter.get("base_model_name_or_path")
    if not config and base and (found := local_folder(base)):
        config = read_json(found / "config.json")
    named = (adapter.get("auto_mapping") or {}).get("base_model_class")
    default = _TASK_TYPES.get(adapter.get("task_type") or "", Loading.architecture)
    architecture, remote_code = _class_name(config, (config.get("architectures") or [named or default])[0])
    chat = any(folder.glob("chat_template*")) or read_json(folder / "tokenizer_config.json").get("chat_template")
    has = {"AutoProcessor": "*processor_config.json", "AutoTokenizer": "tokenizer*"}
    return Loading(
        architecture,
        bool(chat),
        next((reader for reader, pattern in has.items() if any(folder.glob(pattern))), ""),
        (config.get("quantization_config") or {}).get("quant_method"),
        str(config.get("model_type")).startswith("mpi_"),
        remote_code,
    )


def model_loading(model: Any, reader: Any) -> Loading:
    """Returns how a model in memory, or its adapter, will be loaded; `reader` is its tokenizer or processor."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    quantization = getattr(config, "quantization_config", None)
    quantization = quantization if isinstance(quantization, dict) else vars(quantization or object)
    method = quantization.get("quant_method")
    architecture, remote_code = _class_name(vars(config), (config.architectures or [type(base).__name__])[0])
    return Loading(
        architecture,
        bool(getattr(reader, "chat_template", None)),
        "AutoProcessor" if hasattr(reader, "tokenizer") else "AutoTokenizer",
        method and str(getattr(method, "value", method)),
        config.model_type.startswith("mpi_"),
        remote_code,
    )


def _class_name(config: Mapping[str, Any], architecture: str) -> tuple[str, bool]:
    """Returns the class that loads a model, and whether its code comes with the checkpoint: then it is the auto class
    that finds it.
    """
    autos = [name for name in config.get("auto_map") or {} if name.startswith("AutoModel")]
    if not autos:
        return architecture, False
    import transformers

    return (architecture, False) if hasattr(transformers, architecture) else (autos[0], True)


# Keys of an adapter's configuration that do not describe its training: where it lies, how it is used and loaded.
_SILENT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip


def adapter_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of an adapter for its card, such as `lora.r`, from the contents of its
    adapter_config.json.
    """
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type", "adapter"))).lower()
    settings = {}
    for key, value in sorted(config.items()):
        value = sorted(value) if isinstance(value, (set, frozenset)) else value
        if key == "target_modules" and isinstance(value, list) and value and all("." in name for name in value):
            ends = sorted({name.rpartition(".")[2] for name in value})
            value = f"{len(value)} modules, whose names end in {', '.join(ends)}"  # what "all-linear" has become
        if key not in _SILENT and value not in (None, False, "", "none", [], {}, set(), ()):
            settings[f"{kind}.{key}"] = value
    return settings
