"""Checks of names of PEFT, on a layer or two."""

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_rb.scripts.doctor.behaviours import Recorded, relies_on
from hf_rb.scripts.doctor.findings import expect
from hf_rb.utils import compat


__all__: list[str] = []


class _Stack(nn.Module):
    """A stack of matrices, as the experts of a mixture have them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 2))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,bi->beo", self.weight, states)


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.stack, self.last = nn.Linear(2, 2), _Stack(), nn.Linear(2, 2)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.stack(self.last(self.first(states)))


@relies_on("LoraModel._create_new_module", "BaseTuner.__init__", "BaseTuner._check_target_module_compatiblity")
def make_adapters() -> None:
    """LoRA checks a layer by name before it makes one for it, in the constructor of the tuner."""
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    with (
        Recorded(LoraModel, "_create_new_module") as made,
        Recorded(BaseTuner, "_check_target_module_compatiblity") as checked,
        Recorded(BaseTuner, "__init__") as tuner,
    ):
        get_peft_model(_Layers(), LoraConfig(r=1, target_modules=["first"]))
    expect(len(made.calls) == 1, f"{len(made.calls)} layers were made instead of one.")
    arguments, layer = made.calls[0]
    expect(isinstance(arguments["target"], nn.Linear), "`target` is not the layer.")
    expect(layer is not None, "The new layer is not returned.")
    expect([call["target_name"] for call, _ in checked.calls] == ["first"], "No layer is checked by its name.")
    expect([call["adapter_name"] for call, _ in tuner.calls] == ["default"], "The tuner is made in another way.")


@relies_on("BaseTuner._check_merge_allowed")
def ask_before_merging() -> None:
    """An adapter asks whether it may be merged before it changes a weight."""
    from peft.tuners.tuners_utils import BaseTuner

    model = get_peft_model(_Layers(), LoraConfig(r=1, target_modules=["first"]))
    with Recorded(BaseTuner, "_check_merge_allowed") as asked:
        model.merge_and_unload()
    expect(asked.calls, "Nothing is asked.")


@relies_on("ModulesToSaveWrapper.update")
def train_whole_modules() -> None:
    """A module of `modules_to_save` is copied by `ModulesToSaveWrapper.update`."""
    from peft.utils.other import ModulesToSaveWrapper

    with Recorded(ModulesToSaveWrapper, "update") as updated:
        get_peft_model(_Layers(), LoraConfig(r=1, target_modules=["first"], modules_to_save=["last"]))
    expect(len(updated.calls) == 1, f"It was called {len(updated.calls)} times.")
    expect(updated.calls[0][0]["self"].original_module is not None, "It does not know the module.")


@relies_on("ParamWrapper", "ParamWrapper._activate_lora", "ParamWrapper._get_in_out_features", "_param_ndim")
def adapt_parameters() -> None:
    """LoRA on a stack of matrices has one pair of factors for each, and its product counts for the time of a forward
    pass.
    """
    plain = _Layers()
    with Recorded(compat.resolve("ParamWrapper"), "_get_in_out_features") as sizes:
        model: Any = get_peft_model(
            copy.deepcopy(plain),
            LoraConfig(r=1, target_modules=[], target_parameters=["stack.weight"], init_lora_weights=False),
        )
    expect(len(sizes.calls) == 1 and set(sizes.calls[0][1]) == {2, 4}, "Sizes are asked for in another way.")
    wrapper = model.base_model.model.stack
    expect(type(wrapper).__name__ == "ParamWrapper", f"A parameter's adapter is a {type(wrapper).__name__}.")
    expect(wrapper._param_ndim == 3 and wrapper.num_experts == 3, "The number of matrices is kept elsewhere.")
    expect(wrapper.lora_A["default"].weight.shape[0] == 3, "The factors of the matrices lie in another order.")
    with wrapper._activate_lora(["default"]):
        inside = wrapper.get_base_layer().weight.detach().clone()
    expect(not torch.equal(inside, plain.stack.weight), "The product is not added inside `_activate_lora`.")
    expect(torch.equal(wrapper.get_base_layer().weight, plain.stack.weight), "The product stays behind.")


@relies_on("skip_init_on_device")
def make_layers_with_memory() -> None:
    """A layer that `skip_init_on_device` wraps is made with memory, also while PEFT makes a model without."""
    made = compat.skip_init_on_device(lambda: nn.Linear(1, 1))()
    expect(not made.weight.is_meta, "The layer has no memory.")
