"""Fields that the configurations of the MPI model classes share."""

import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from hf_rb.models.mpi.router import check_options


if TYPE_CHECKING:
    from transformers import PreTrainedConfig as NativeConfig
else:
    NativeConfig = object  # a family inherits the native one behind this


@dataclass(kw_only=True)
class MPIConfig(NativeConfig):
    """
    Fields of MPI beside those of the native configuration, to be inherited before it.

    The weights of the chosen experts sum to one (`norm_topk_prob=True`), as in the paper, and the default weight of
    the balance loss, which acts with `output_router_logits=True`, is the paper's.

    Args:
        mpi_matrix (`str`, *optional*, defaults to `"gate"`):
            Matrix of the experts to iterate with: `"gate"`, `"up"` or `"down"`.
        mpi_iters (`int`, *optional*, defaults to `1`):
            Power steps; 0 only brings the rows to their length.
        mpi_scale (`float`, *optional*, defaults to `2.0`):
            C', positive: rows of the router have length C' / √N.
        mpi_norm (`float`, *optional*):
            C, the length of the rows, positive, instead of `mpi_scale`.
        mpi_mode (`str`, *optional*, defaults to `"reparam"`):
            `"inplace"`, an experiment: the router is used as it is and iterated after every optimizer step.
        mpi_grad (`str`, *optional*, defaults to `"full"`):
            Where the router's gradient goes: `"full"`, `"detach_experts"` or `"detach_power"`.
        mpi_eps (`float`, *optional*, defaults to `1e-12`):
            Smallest length that is divided by.
        lb_type (`str`, *optional*, defaults to `"sequence"`):
            Balance loss: `"sequence"` is the paper's, `"layer"` is over the whole batch, `"hf"` is transformers'.
        z_loss_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the z-loss. The paper tries 0.001.

    Raises:
        ValueError: A value is out of range, or a checkpoint is of another family. One of the native type loads, with a
            warning.
    """

    native_class: ClassVar[Any]

    mpi_matrix: str = "gate"
    mpi_iters: int = 1
    mpi_scale: float | int = 2.0
    mpi_norm: float | int | None = None
    mpi_mode: str = "reparam"
    mpi_grad: str = "full"
    mpi_eps: float = 1e-12
    lb_type: str = "sequence"
    z_loss_coef: float | int = 0.0
    router_aux_loss_coef: float = 0.01

    def __post_init__(self, **kwargs: Any):
        read = kwargs.pop("model_type", self.model_type)  # from a file, which may be a native checkpoint's
        if read not in (self.model_type, self.native_class.model_type):
            raise ValueError(
                f"{type(self).__name__} is for checkpoints of the type {self.native_class.model_type!r} or "
                f"{self.model_type!r}; got one of the type {read!r}."
            )
        if read != self.model_type:
            warnings.warn(
                f"This checkpoint is of the type {read!r}, with ordinary routers: as {self.model_type!r} it computes "
                "something else until it is trained further. `apply_mpi(model, ramp_steps=...)` makes that gradual.",
                stacklevel=2,
            )
        super().__post_init__(**kwargs)
        try:
            check_options(**self.mpi_options())
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: mpi_{error}") from None
        if self.lb_type not in ("sequence", "layer", "hf"):
            raise ValueError(f"lb_type={self.lb_type!r} must be one of 'sequence', 'layer', 'hf'.")
        if not self.z_loss_coef >= 0:
            raise ValueError(f"z_loss_coef={self.z_loss_coef} must be 0 or more; the paper tries 0.001.")
        if getattr(self, "norm_topk_prob", True) is not True:
            raise ValueError(
                "The weights of the chosen experts must sum to one, as in the paper: pass `norm_topk_prob=True`, to "
                "`from_pretrained` too where a checkpoint says otherwise."
            )
        register_models(type(self))

    def mpi_options(self) -> dict[str, Any]:
        """Returns the options of [`~hf_rb.models.mpi.router.EffectiveRouter`]."""
        names = ("matrix", "iters", "scale", "norm", "mode", "grad", "eps")
        return {name: getattr(self, f"mpi_{name}") for name in names}


def register_models(config_class: type) -> None:
    """Registers the models of a configuration with the Auto classes, which build a configuration before they look for
    a model.
    """
    if not config_class.__module__.startswith("hf_rb."):
        return  # a subclass of somebody's, or code from the Hub, which says by itself where its models are
    import_module(config_class.__module__.replace("configuration_", "modeling_"))
