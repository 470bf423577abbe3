"""Base of the MPI model classes; a family adds the names of its native classes.

A model is built as its native class is. Then its routers, in place, become of a class that routes with the effective
router, and whose parameters have the native names: checkpoints of either kind load in the other.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from hf_rb.models.mpi.losses import auxiliary_loss
from hf_rb.models.mpi.router import EffectiveRouter


# Name of a cache in the native classes. Not in `compat`: this file goes to the Hub with a model, without the package.
CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

if TYPE_CHECKING:
    NativeRouter, NativeModel = nn.Module, PreTrainedModel
else:
    NativeRouter = NativeModel = object  # a family inherits the native class behind ours


class MPIRouter(NativeRouter):
    """Mixin before a native router: routes with the effective router, and otherwise behaves like the native one."""

    native_class: ClassVar[Any]
    mpi: EffectiveRouter
    weight: nn.Parameter

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        effective_ND = self.mpi(self.weight).to(hidden_states.dtype)
        return self.native_class.forward(_WithWeight(self, effective_ND), hidden_states)


class _WithWeight:
    """A router with another weight, for the native forward pass to read."""

    def __init__(self, router: nn.Module, weight: Tensor):
        self.router, self.weight = router, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.router, name)


class MPIPreTrainedModel(NativeModel):
    """Mixin before a native model."""

    native_class: ClassVar[type[PreTrainedModel]]
    # As in the paper's code: steps of a bfloat16 row would be lost to rounding.
    _keep_in_fp32_modules_strict = ["gate.weight"]

    def __init__(self, config: Any):
        self.check_config(config)
        super().__init__(config)

    @classmethod
    def check_config(cls, config: Any) -> None:
        """
        Raises:
            TypeError: It is the configuration of another family.
            ValueError: It splits experts over processes.
        """
        # Not `isinstance`: code from the Hub has its configuration once for each of its files.
        ours: Any = cls.config_class
        if config.model_type != ours.model_type:
            raise TypeError(
                f"{cls.__name__} needs a configuration of the class {ours.__name__}; got {type(config).__name__}."
            )
        parallel = getattr(config, "distributed_config", None)
        if parallel is not None and max(parallel.tp_size or 1, parallel.ep_size or 1) > 1:
            raise ValueError(
                "A power step needs an expert's matrix whole: tensor and expert parallelism are not supported before "
                "`fold_mpi`. Load the model without them, or fold it and load that."
            )

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for a decorator in the file of the class, and runs a loop over the experts where it finds
        # none.
        return True

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As transformers' own; code that was registered with `register_for_auto_class` takes along what it imports
        from here.
        """
        if self._auto_class is not None and push_to_hub:
            raise ValueError(
                "With code to go along, write `model.push_to_hub(repo_id)` instead of `push_to_hub=True`."
            )
        if self._auto_class is not None:
            self.config.auto_map = dict(
                self.config.auto_map
            )  # its own, instead of its class's: that is what is stored
        super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        if self._auto_class is not None:
            _bundle(Path(save_directory))


class MPIModel(MPIPreTrainedModel):
    """Inherited before a native backbone."""

    router_class: ClassVar[type[MPIRouter]]

    def __init__(self, config: Any):
        super().__init__(config)
        layers: Any = self.layers
        for layer in layers:
            if isinstance(getattr(layer.mlp, "gate", None), self.router_class.native_class):
                layer.mlp.gate.__class__ = self.router_class
                layer.mlp.gate.mpi = EffectiveRouter(layer.mlp, **config.mpi_options())
                layer.mlp.gate.mpi.add_hooks()


class MPIForCausalLM(MPIPreTrainedModel):
    """Inherited before a native language model, whose losses it replaces by those of the configuration."""

    model_class: ClassVar[type[MPIModel]]

    def __init__(self, config: Any):
        self.check_config(config)
        # Not the native constructor, which would build a native backbone first.
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """
        As the native class's, with the auxiliary loss of the configuration (`lb_type`, `z_loss_coef`).

        `cache` and `past_key_values` are the same argument: transformers 5.24 renamed it.

        Raises:
            ValueError: The auxiliary loss would have no gradient, because of reentrant checkpointing.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            use_cache=use_cache, output_router_logits=output_router_logits, **kwargs,
            **{CACHE: past_key_values if cache is None else cache},
        )  # fmt: skip
        hidden_BTD = outputs.last_hidden_state
        logits = self.lm_head(slice_logits_to_keep(hidden_BTD, logits_to_keep))
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        if output_router_logits:
            aux_loss = self._auxiliary_loss(outputs.router_logits, hidden_BTD, attention_mask, position_ids)
            if loss is not None:
                loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=aux_loss, logits=logits, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions, router_logits=outputs.router_logits, **{CACHE: getattr(outputs, CACHE)},
        )  # fmt: skip

    def _auxiliary_loss(
        self,
        router_logits: Sequence[Tensor],
        hidden_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        if (
            self.is_activation_checkpointing
            and hidden_BTD.requires_grad
            and not any(x.requires_grad for x in router_logits)
        ):
            raise ValueError(
                "With reentrant checkpointing the auxiliary loss of the routers has no gradient: use "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`, or `output_router_logits=False`.'
            )
        if attention_mask is not None:
            attention_mask = attention_mask[:, -hidden_BTD.shape[1] :]  # without what a cache holds
        return auxiliary_loss(
            self.config, router_logits, (hidden_BTD.shape[0], hidden_BTD.shape[1]), attention_mask, position_ids
        )


def register(native_type: str, config_class: type, models: dict[type, type[MPIPreTrainedModel]]) -> None:
    """
    Registers a family.

    Args:
        native_type (`str`):
            Model type of the native family, whose checkpoints these classes read and write.
        config_class (`type`):
            Configuration of the models.
        models (`dict`):
            The model of each Auto class.
    """
    for auto_class, model in models.items():
        auto_class.register(config_class, model, exist_ok=True)
    # By the names of the classes too, for a configuration that says to be of the native type.
    for key in (config_class.model_type, *(model.__name__ for model in models.values())):
        mapping: Any = get_checkpoint_conversion_mapping(native_type)  # a copy for each
        register_checkpoint_conversion_mapping(key, mapping, overwrite=True)


def _bundle(folder: Path) -> None:
    """Copies what the code in a folder imports from this package beside it, and makes those imports relative."""
    imports = re.compile(r"^from hf_rb\.models\.\w+\.(\w+) import", re.MULTILINE)
    waiting = list(folder.glob("*.py"))
    while waiting:
        file = waiting.pop()
        code = file.read_text(encoding="utf-8")
        for module in imports.findall(code):
            if not (folder / f"{module}.py").exists():
                shutil.copyfile(Path(__file__).with_name(f"{module}.py"), folder / f"{module}.py")
                waiting.append(folder / f"{module}.py")
        file.write_text(imports.sub(r"from .\1 import", code), encoding="utf-8")
