"""Fills `model_cards/template.md.jinja`.

TRL's card loses the base model when it is a local folder, prints `None` for a model without a Hub id, misspells the
`license` key and cannot use another package's template; this one is rendered from our own data instead.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_rb import __version__
from hf_rb.hub.loading import Loading, read_loading
from hf_rb.io.model_folder import public_name
from hf_rb.io.resources import resource_folder
from hf_rb.methods.registry import catalog


if TYPE_CHECKING:
    from hf_rb.evaluation import Size

__all__ = [
    "MADE",
    "ModelCardData",
    "Result",
    "changed_hyperparameters",
    "read_origin",
    "render_card",
    "render_results",
    "write_model_card",
]


@dataclass(frozen=True)
class Result:
    """One row of a card's evaluation table.

    Args:
        metric (`str`):
            Name of the metric, as `"exact match"`.
        value (`float`):
            Measured value.
        dataset (`str`):
            What it was measured on: a Hub id, a file or an embedded task such as `"tiny:math"`.
        split (`str`, *optional*, defaults to `"test"`):
            Split of the dataset.
        before (`float`, *optional*):
            The same measurement on the model this one was made from.
    """

    metric: str
    value: float
    dataset: str
    split: str = "test"
    before: float | None = None


@dataclass
class ModelCardData:
    """Contents of a model card of ours.

    Args:
        model_name (`str`):
            Name of the model, not a path.
        methods (`Sequence[str]`, *optional*, defaults to `()`):
            Keys of [`~hf_rb.hub.METHODS`], in the order in which they were applied.
        base_model (`str` or `Sequence[str]`, *optional*):
            Hub id, folder or embedded model (`"tiny:student"`), several of a merge. Only a Hub id is linked and enters
            the metadata; a folder shows by its name alone.
        dataset_name (`str`, *optional*):
            Training data, treated like `base_model`.
        trainer (`str`, *optional*):
            Class name of the trainer.
        hyperparameters (`Mapping[str, Any]`, *optional*):
            What differs from the defaults; [`changed_hyperparameters`] finds it.
        results (`Sequence[Result]`, *optional*, defaults to `()`):
            Evaluation table. It is also written as the Hub's `model-index`.
        size ([`~hf_rb.evaluation.Size`], *optional*):
            Measured size of the files.
        repo_id (`str`, *optional*):
            Hub id that the loading example names.
        tags (`Sequence[str]`, *optional*, defaults to `()`):
            Hub tags beside `hf_rb` and the keys of the methods.
        library_name (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"` or `"peft"`: what the Hub's widget and snippet load it with.
        loading ([`Loading`], *optional*):
            Class, task, chat template and format. [`write_model_card`] reads it from the folder.
        load_with (`str`, *optional*):
            Quantization config with which the example loads the model, as Python: `"GPTQConfig(bits=4)"`.
        license (`str`, *optional*):
            License in the Hub's spelling, as `"apache-2.0"`.
        adapter (`str`, *optional*):
            Subfolder with an adapter for these weights, which the loading example adds.
        made_here (`bool`, *optional*, defaults to `True`):
            Whether hf_rb has made the model, and not only its card.
        summaries (`Mapping[str, str]`, *optional*):
            What methods did here, by their keys, where the sentence of [`~hf_rb.hub.METHODS`] says more or less.
        sections (`Mapping[str, str]`, *optional*):
            More sections, Markdown by heading.

    Raises:
        ValueError: A method or the library is not known.
    """

    model_name: str
    methods: Sequence[str] = ()
    base_model: str | Sequence[str] | None = None
    dataset_name: str | None = None
    trainer: str | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    results: Sequence[Result] = ()
    size: "Size | None" = None
    repo_id: str | None = None
    tags: Sequence[str] = ()
    library_name: str = "transformers"
    loading: Loading | None = None
    load_with: str | None = None
    license: str | None = None
    adapter: str | None = None
    made_here: bool = True
    summaries: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in self.methods:
            if key not in catalog():
                raise ValueError(f"There is no method {key!r}; the methods are {', '.join(catalog())}.")
        if self.library_name not in ("transformers", "peft"):
            raise ValueError(f"`library_name` must be 'transformers' or 'peft', not {self.library_name!r}.")

    @property
    def base_models(self) -> list[str]:
        return [self.base_model] if isinstance(self.base_model, str) else list(dict.fromkeys(self.base_model or ()))

    def metadata(self) -> huggingface_hub.ModelCardData:
        """Returns the YAML head of the card."""
        on_hub = [model for model in self.base_models if _is_hub_id(model)]
        return huggingface_hub.ModelCardData(
            base_model=on_hub[0] if len(on_hub) == 1 else on_hub or None,
            datasets=self.dataset_name if _is_hub_id(self.dataset_name) else None,
            eval_results=[_to_eval_result(result) for result in self.results if isfinite(result.value)] or None,
            library_name=self.library_name,
            license=self.license,
            model_name=self.model_name,
            pipeline_tag=(self.loading or Loading()).task,
            tags=["hf_rb"] * self.made_here + [*self.methods, *self.tags],
        )


def render_card(data: ModelCardData) -> str:
    """Returns the text of `README.md`."""
    methods = [catalog()[key] for key in data.methods]
    loading = data.loading or Loading()
    kinds = {method.kind for method in methods}
    loading = replace(
        loading,
        mpi=loading.mpi or "model" in kinds,
        method=next((method.key for method in methods if method.kind == "quantizer"), loading.method),
    )
    base, alone = next(iter(data.base_models), ""), data.library_name == "peft"
    text = (
        _environment()
        .get_template("template.md.jinja")
        .render(
            data=data,
            metadata=data.metadata().to_yaml(),
            methods=methods,
            loading=loading,
            packages=loading.packages(adapter=bool(alone or data.adapter)),
            load_with=data.load_with,
            adapter_alone=alone,
            base=base if _is_hub_id(base) else f"folder/of/{public_name(base) or 'the-base-model'}",
            base_on_hub=_is_hub_id(base),
            results=data.results,
            compared=_compared(data.results),
            location=data.repo_id or f"path/to/{data.model_name}",
            versions=_versions(data),
            hyperparameters={key: _public(value) for key, value in data.hyperparameters.items()},
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"  # sections that are left out leave blank lines


def render_results(results: Sequence[Result]) -> str:
    """Returns the table of a card's evaluation section."""
    text = _environment().get_template("results.md.jinja").render(results=results, compared=_compared(results))
    return text.rstrip()


def _compared(results: Sequence[Result]) -> bool:
    return any(result.before is not None for result in results)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(resource_folder("model_cards"), encoding="utf-8"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(cell=_cell, number=_number, reference=_reference)
    return environment


def write_model_card(folder: str | Path, data: ModelCardData) -> Path:
    """Writes `README.md` into a model's folder and returns its path. Without `data.loading` the folder's files say how
    to load it.
    """
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data if data.loading else replace(data, loading=read_loading(folder))
    path.write_text(render_card(data), encoding="utf-8")
    return path


# The sentence of the template that says what a model was made from and with.
MADE = re.compile(r"^Made(?: from (?P<model>.+?))?(?: with the data (?P<data>.+?))? by \[`hf_rb`\]", re.MULTILINE)


def read_origin(folder: str | Path) -> str | None:
    """Returns what a model was made from, in Markdown, by its card of ours; `None` if it has none."""
    path = Path(folder) / "README.md"
    found = path.is_file() and MADE.search(path.read_text(encoding="utf-8"))
    return found["model"] if found else None


# Fields that say where and how a run was watched, saved or sped up, not what was computed.
_SILENT_FIELDS = {
    "output_dir", "run_name", "project", "report_to", "disable_tqdm", "debug", "do_train", "do_eval", "do_predict",
    "local_rank", "push_to_hub", "resume_from_checkpoint", "use_cpu", "accelerator_config", "activation_checkpointing",
    "gradient_checkpointing", "include_num_input_tokens_seen", "pad_to_multiple_of", "trust_remote_code",
    "dataset_num_proc", "model_init_kwargs", "teacher_model_init_kwargs",
}  # fmt: skip
_SILENT_PREFIXES = (
    "hub_",
    "log_",
    "logging_",
    "save_",
    "eval_",
    "trackio_",
    "dataloader_",
    "per_device_eval_",
    "ddp_",
)


def changed_hyperparameters(config: Any) -> dict[str, Any]:
    """Returns the fields of a config dataclass that differ from their defaults and say what was computed.

    Paths, reporting, Hub and platform fields are left out, so that a card never publishes a folder name or a token.
    """
    changed = {}
    for config_field in fields(config):
        name, default = config_field.name, config_field.default
        if config_field.default_factory is not MISSING:
            default = config_field.default_factory()
        value = getattr(config, name)
        if value == default or name in _SILENT_FIELDS or name.startswith(_SILENT_PREFIXES):
            continue
        changed[name] = getattr(value, "value", value)  # an enum shows as its value
    return changed


def _is_hub_id(name: str | None) -> bool:
    # A name without a namespace is rather a file or a task than one of the Hub's oldest repositories.
    if name is None or "/" not in name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _reference(name: str, prefix: str = "") -> str:
    """A link to a Hub id; the bare name of anything else, without the folders above it."""
    if _is_hub_id(name):
        return f"[{name}](https://huggingface.co/{prefix}{name})"
    return f"`{_cell(Path(name).name)}`"


def _to_eval_result(result: Result) -> huggingface_hub.EvalResult:
    name = result.dataset if _is_hub_id(result.dataset) else Path(result.dataset).name
    return huggingface_hub.EvalResult(
        task_type="text-generation",
        dataset_type=name.replace(":", "-"),
        dataset_name=name,
        dataset_split=result.split,
        metric_type=result.metric.partition(" (")[0].replace(" ", "_"),  # without how it was measured
        metric_name=result.metric,
        metric_value=result.value,
    )


def _public(value: Any) -> Any:
    """A value without paths of this machine."""
    if isinstance(value, str | os.PathLike):
        return public_name(os.fspath(value))
    if isinstance(value, Mapping):
        return {key: _public(one) for key, one in value.items()}
    return [_public(one) for one in value] if isinstance(value, (list, tuple)) else value


def _cell(value: Any) -> str:
    """Text that cannot end a table cell or a code span."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("`", "'")


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _versions(data: ModelCardData) -> dict[str, str]:
    libraries = ["transformers", "torch", "tokenizers"]
    if data.trainer:
        libraries += ["trl", "datasets", "accelerate"]
    if data.library_name == "peft" or data.adapter:
        libraries.append("peft")
    return {"hf_rb": __version__} | {library: version(library) for library in libraries}
