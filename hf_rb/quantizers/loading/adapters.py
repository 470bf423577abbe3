"""Limits of PEFT on packed layers: adapters train beside them, and nothing needs their plain weights."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_rb.utils import compat


__all__ = ["ParamWrapper", "PlainWeightsNeeded", "check_merge", "dispatch"]

# Ways to initialize LoRA that leave the base weights alone. "orthogonal" is none: it takes over their type.
PLAIN_INITS = (True, False, "gaussian", "eva")


class PlainWeightsNeeded(ValueError):
    """Says that an adapter cannot work on packed weights."""


class ParamWrapper(compat.ParamWrapper):  # the name by which PEFT knows what may be nested
    """
    LoRA on a projection of packed experts.

    PEFT adds the product of its factors to the parameter for the time of a forward pass. Here the experts get the
    factors, and each applies its own to its tokens. The adapter's own weights are PEFT's, shape by shape.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        experts: Any = self.get_base_layer()
        in_features = experts.layouts[self.parameter_name].in_features
        self.num_experts, out_features = getattr(experts, self.parameter_name).shape[:2]
        self._param_ndim = 3
        # In the order of the model's own parameter, from which the parent tells one from the other.
        return (in_features, out_features) if experts.is_transposed else (out_features, in_features)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Generator[None]:
        experts: Any = self.get_base_layer()
        if self.parameter_name not in getattr(experts, "layouts", ()):  # dequantized since
            with super()._activate_lora(active_adapters):
                yield
            return
        active = [adapter for adapter in active_adapters if adapter in self.lora_A]
        experts.adapters[self.parameter_name] = [self._factors(adapter) for adapter in active]
        try:
            yield
        finally:
            del experts.adapters[self.parameter_name]

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        """Returns A `(experts, rank, in)`, B `(experts, out, rank)` and what their product is multiplied with."""
        first: Any = self.lora_A[adapter]
        second: Any = self.lora_B[adapter]
        down, up = first.weight, second.weight
        down = down.view(self.num_experts, -1, down.shape[1])
        return down, up.view(len(up), -1, self.num_experts).permute(2, 0, 1), self.scaling[adapter]


def dispatch(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module | None:
    """
    Makes a LoRA layer for a packed module, or leaves it to PEFT where its own layer will do.

    Raises:
        PlainWeightsNeeded: There is no such adapter for packed weights.
    """
    base: Any = target
    base = base.get_base_layer() if hasattr(base, "get_base_layer") else base
    parameter = kwargs.get("parameter_name")
    if parameter is not None and parameter not in base.layouts:
        return None
    if config.init_lora_weights not in PLAIN_INITS:
        raise PlainWeightsNeeded(
            f"`init_lora_weights={config.init_lora_weights!r}` starts from the plain weights, and these are packed: "
            "write `init_lora_weights=True`, or call `model.dequantize()` first."
        )
    if parameter is None:
        return None
    if config.use_dora:
        raise PlainWeightsNeeded(
            "DoRA needs the norms of the plain weights, and those of experts are packed: write `use_dora=False`."
        )
    if isinstance(base, nn.Linear):
        raise PlainWeightsNeeded(
            f"`target_parameters` adds to the plain weights, and those of {kwargs.get('target_name', parameter)} are "
            "packed: name the layer in `target_modules`."
        )
    return ParamWrapper(target, adapter_name, config=config, **kwargs)


def check_merge(model: nn.Module) -> None:
    """Raises a `ValueError` for a model that has packed layers, into which no adapter can be merged."""
    packed = sum(1 for module in model.modules() if hasattr(module, "layouts"))
    if packed:
        raise ValueError(
            f"An adapter cannot be merged into the {packed} packed layers of this model: dequantize first. Write "
            "`model.dequantize()`, which turns them into ordinary layers in place, then merge; quantize the result "
            "again if it is to be small."
        )
