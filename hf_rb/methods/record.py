"""Records of methods: paper, flags, where a method may run, its metrics. Standard library only.

A method is one file. Its class, or the module where nothing but functions is needed, holds a record:

    @dataclass
    class HalveFlags:
        halve_factor: float = flag(0.5, "Factor of the advantages of wrong completions.", range="[0, 1]")

    class Halve(SequenceShaper):
        method = ShaperMethod(key="halve", name="Halve", summary="...", flags=HalveFlags)

The fields of the config, their help, `hf-rb check`, the cards and the tables of the documentation follow from it.
`hf-rb check` reads records without importing the file (`hf_rb.methods.static`), since the file may import torch. So a
record, its flags and its rules use the standard library and `hf_rb.methods` alone.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Literal

from hf_rb.utils.fields import flag


__all__ = [
    "Kind",
    "MergeMethod",
    "Method",
    "Metric",
    "ModelMethod",
    "ObjectiveMethod",
    "Paper",
    "QuantizerMethod",
    "ShaperMethod",
    "flag",
]

Kind = Literal["trainer", "objective", "shaper", "quantizer", "merge", "model"]
Rules = Callable[[Any], Iterable[str]]


def no_rules(config: Any) -> Iterable[str]:
    """Finds nothing wrong."""
    return ()


@dataclass(frozen=True)
class Paper:
    """
    A paper.

    Args:
        id (`str`): arXiv identifier.
        title (`str`): Title.
        authors (`str`): Authors in the paper's order, with commas between them.
    """

    id: str
    title: str
    authors: str

    @property
    def url(self) -> str:
        return f"https://huggingface.co/papers/{self.id}"

    def bibtex(self, key: str) -> str:
        """Returns the BibTeX entry, `key` followed by the year."""
        year = f"20{self.id[:2]}"
        fields = {
            "title        ": self.title,
            "author       ": self.authors.replace(", ", " and "),
            "year         ": year,
            "eprint       ": self.id,
            "archivePrefix": "arXiv",
            "url          ": self.url,
        }
        return "\n".join((f"@misc{{{key}{year},", *(f"    {k} = {{{v}}}," for k, v in fields.items()), "}"))


@dataclass(frozen=True)
class Metric:
    """
    A number in the logs.

    Args:
        name (`str`):
            Name in the logs. Of a shaper without `shaping/<key>/`, which is put before it.
        meaning (`str`):
            What it is, as a noun phrase.
        range (`str`, *optional*, defaults to `"(-inf, inf)"`):
            Interval of its values.
        better (`"higher"`, `"lower"` or `"neither"`, *optional*, defaults to `"neither"`):
            Which direction is an improvement.
        stat (`str`, *optional*):
            Of an objective: the value of [`~hf_rb.objectives.token_rule.Term`] whose mean over tokens it is. Defaults
            to `name`.
        extremes (`bool`, *optional*, defaults to `False`):
            Whether `<name>_min` and `<name>_max` are logged too.
    """

    name: str
    meaning: str
    range: str = "(-inf, inf)"
    better: Literal["higher", "lower", "neither"] = "neither"
    stat: str | None = None
    extremes: bool = False


@dataclass(frozen=True, kw_only=True)
class Method:
    """
    A method.

    Args:
        key (`str`):
            Short name: of flags, of the recipe folder, of the card, and the Hub tag.
        name (`str`):
            Name as the paper writes it.
        summary (`str`):
            What it does, in one sentence.
        paper (`Paper`, *optional*):
            Its paper. Without one it has no card.
        flags (`type`, *optional*):
            Dataclass of its flags. The config that has them derives from it. They raise where the method is off.
        rules (`Callable`, *optional*):
            From a config to what is wrong with its values, one message each. It runs where the method is on.
        recipe_rules (`Callable`, *optional*):
            The same for a recipe, where nothing can be passed as an object.
        warnings (`Callable`, *optional*):
            From a config to what acts otherwise than one may think.
        metrics (`tuple[Metric, ...]`, *optional*):
            What it logs.
    """

    key: str
    name: str
    summary: str
    paper: Paper | None = None
    flags: type | None = None
    rules: Rules = no_rules
    recipe_rules: Rules = no_rules
    warnings: Rules = no_rules
    metrics: tuple[Metric, ...] = ()
    kind: ClassVar[Kind] = "trainer"

    @property
    def paper_url(self) -> str:
        """Address of the paper; empty without one."""
        return "" if self.paper is None else self.paper.url

    @property
    def citation(self) -> str:
        """BibTeX entry; empty without a paper."""
        return "" if self.paper is None else self.paper.bibtex(self.key)

    @property
    def paper_of_trl(self) -> dict[str, str]:
        """The form of the `_paper` attribute of TRL's trainers."""
        return (
            {} if self.paper is None else {"title": self.paper.title, "id": self.paper.id, "citation": self.citation}
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveMethod(Method):
    """
    An objective of distillation, `objective: <key>`.

    Args:
        completions (`"any"`, `"dataset"` or `"student"`, *optional*, defaults to `"any"`):
            Whose completions it is defined on.
        because (`str`, *optional*):
            Reason for that, as a clause: "it trains on the completions of the dataset".
        mixes (`bool`, *optional*, defaults to `False`):
            Whether it is a divergence from the teacher, which `kd_alpha` and `loca_alpha` act on.
        cached (`bool`, *optional*, defaults to `False`):
            Whether the most probable tokens of a teacher cache are enough for it.
        own (`tuple[str, ...]`, *optional*):
            Fields of TRL's config that act on it alone.
    """

    completions: Literal["any", "dataset", "student"] = "any"
    because: str = ""
    mixes: bool = False
    cached: bool = False
    own: tuple[str, ...] = ()
    kind: ClassVar[Kind] = "objective"


@dataclass(frozen=True, kw_only=True)
class ShaperMethod(Method):
    """
    A shaper of advantages, one of `advantage_shapers`.

    Args:
        level (`"sequence"` or `"token"`, *optional*, defaults to `"sequence"`):
            Whether it maps one number a rollout or one number a token.
        additive (`bool`, *optional*, defaults to `False`):
            Whether a token shaper adds to what it is given; one that multiplies may not follow it.
        replaces (`bool`, *optional*, defaults to `False`):
            Whether a sequence shaper makes advantages anew, whatever it is given. It runs first.
    """

    level: Literal["sequence", "token"] = "sequence"
    additive: bool = False
    replaces: bool = False
    kind: ClassVar[Kind] = "shaper"

    @property
    def stage(self) -> int:
        """Place in the pipeline: new advantages, other shapers of sequences, factors of tokens, offsets of tokens."""
        return int(not self.replaces) if self.level == "sequence" else 2 + self.additive


@dataclass(frozen=True, kw_only=True)
class QuantizerMethod(Method):
    """
    A quantizer, `quant_method: <key>`.

    Its flags are the fields of its config.

    Args:
        config, quantizer (`str`):
            Config class and quantizer class, as `"module:Class"`: each is imported when transformers asks for it.
        unit (`str`, *optional*):
            Field that says how many of these a weight has: `"bits"`, `"planes"`. With it goes `<unit>_per_layer`, the
            same for layers by name.
        units (`tuple[int, ...]`, *optional*):
            Numbers of them that a layer may have.
        nsds (`tuple[int, int]`, *optional*):
            How many the least and the most sensitive layers get by `<unit>_per_layer: nsds:<average>`.
        uncalibrated (`dict[str, Any]`, *optional*):
            Of a method that runs the model on text to quantize it, the fields with which it does not.
        memory_bits (`Callable`):
            From a config to the bits of a weight in memory, scales included.
        trial (`dict[str, Any]`, *optional*):
            More fields with which `hf-rb doctor` tries it, without text.
        written (`tuple[str, ...]`, *optional*):
            Fields that quantizing fills in.
        solves_again (`bool`, *optional*, defaults to `False`):
            Whether it may solve a matrix a second time, and reports how often.
        lacks (`str`, *optional*):
            What GPTQ's format does not have of it, as a relative clause.
    """

    config: str
    quantizer: str
    memory_bits: Callable[[Any], float]
    unit: str = ""
    units: tuple[int, ...] = ()
    nsds: tuple[int, int] | None = None
    uncalibrated: dict[str, Any] | None = None
    trial: dict[str, Any] = field(default_factory=dict)
    written: tuple[str, ...] = ()
    solves_again: bool = False
    lacks: str = "whose codes GPTQ's format does not have"
    kind: ClassVar[Kind] = "quantizer"

    @property
    def per_layer(self) -> str:
        """The field that sets the number of units for layers by name; empty without units."""
        return f"{self.unit}_per_layer" if self.unit else ""

    def is_calibrated(self, config: dict[str, Any]) -> bool:
        """Returns whether the model is run on text to quantize it."""
        return any(config.get(name) != value for name, value in (self.uncalibrated or {}).items())

    def config_class(self) -> Any:
        """Imports the config class."""
        module, _, name = self.config.partition(":")
        return getattr(import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class MergeMethod(Method):
    """
    A way to make a model from models without training. Its class is an [`~hf_rb.weights.operation.Operation`].

    Args:
        models (`dict[str, str]`):
            Help of every model that it takes, as a noun phrase, by role.
        command (`str`, *optional*):
            What `hf-rb merge --method` calls it. Defaults to `key`.
        several (`tuple[str, ...]`, *optional*):
            Roles of two or more models.
        adapters (`tuple[str, ...]`, *optional*):
            Roles that may be LoRA adapters.
        optional (`tuple[str, ...]`, *optional*):
            Roles that are left out where another model is an adapter.
        for_adapters (`tuple[str, ...]`, *optional*):
            Flags that act on adapters alone.
        receiver (`str`, *optional*):
            Role of the model whose tensors, names, shapes and files the result has. Defaults to the first.
        files_from (`tuple[str, ...]`, *optional*):
            Roles of the models whose configuration, tokenizer and so on the result may get; where they differ, the
            user says whose. Defaults to the receiver.
        include (`str`, *optional*, defaults to `"linear"`):
            Pattern of the tensors that it changes, where the user gives none.
    """

    models: dict[str, str]
    command: str = ""
    several: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    for_adapters: tuple[str, ...] = ()
    receiver: str = ""
    files_from: tuple[str, ...] = ()
    include: str = "linear"
    kind: ClassVar[Kind] = "merge"

    def __post_init__(self) -> None:
        receiver = self.receiver or next(iter(self.models))
        given = {"command": self.command or self.key, "receiver": receiver}
        for name, value in (given | {"files_from": self.files_from or (receiver,)}).items():
            object.__setattr__(self, name, value)
        named = {receiver, *self.several, *self.adapters, *self.optional, *self.files_from}
        if unknown := sorted(named - self.models.keys()):
            raise ValueError(f"`models` has no {', '.join(unknown)}")


@dataclass(frozen=True, kw_only=True)
class ModelMethod(Method):
    """A model class, or a part of one."""

    kind: ClassVar[Kind] = "model"
