"""Checks of names that the MPI classes and packed experts rely on."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_rb import apply_mpi, fold_mpi, tiny
from hf_rb.scripts.doctor.behaviours import relies_on
from hf_rb.scripts.doctor.findings import Skipped, expect
from hf_rb.utils import compat


__all__: list[str] = []


def _mixture() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny.path("moe"))


@relies_on("_apply_gate", "_is_expert_parallel")
def gated_experts() -> None:
    """Fused experts gate what their first projection makes by `_apply_gate`, and say whether they are split over
    processes.
    """
    experts = _mixture().model.layers[-1].mlp.experts
    states = torch.randn(3, experts.gate_up_proj.shape[1])
    gate, up = states.chunk(2, -1)
    gated = type(experts)._apply_gate(experts, states)
    torch.testing.assert_close(gated, experts.act_fn(gate) * up)
    expect(not getattr(experts, "_is_expert_parallel", False), "Experts of one process count as split over several.")


@relies_on("CAN_RECORD_REGISTRY", "_can_record_outputs")
def recorded_outputs() -> None:
    """A class lists what its models may return besides their output, and a registry holds that for each model."""
    model = fold_mpi(apply_mpi(_mixture()))
    native: Any = type(model.model)
    expect("router_logits" in native._can_record_outputs, f"{native.__name__} does not list its router logits.")
    with torch.no_grad():
        output = model(torch.arange(4)[None], output_router_logits=True)
    expect(output.router_logits, "A folded model returns no router logits.")


@relies_on("_can_set_experts_implementation", "_auto_class")
def own_classes() -> None:
    """Transformers asks a class whether its experts can be run as one product, and saves the code of registered
    classes.
    """
    from hf_rb import MPIQwen3MoeForCausalLM

    config = AutoConfig.from_pretrained(tiny.path("moe"))
    config.num_hidden_layers = 1
    expect(callable(PreTrainedModel._can_set_experts_implementation), "Classes are not asked any more.")
    expect(MPIQwen3MoeForCausalLM._can_set_experts_implementation(), "Our class says no.")
    expect(PreTrainedModel._auto_class is None, "Every class counts as registered for code on the Hub.")
    kind = type(_mixture())

    class Registered(kind):
        pass

    Registered.register_for_auto_class("AutoModelForCausalLM")
    expect(Registered._auto_class == "AutoModelForCausalLM", "Registering a class is kept elsewhere.")


@relies_on("_hf_peft_config_loaded", "MIN_PEFT_VERSION")
def native_adapters() -> None:
    """A model to which transformers has added an adapter is marked, and saves the adapter alone."""
    from peft import LoraConfig

    if problem := compat.native_adapters_problem():
        raise Skipped(problem)
    model = _mixture()
    expect(not model._hf_peft_config_loaded, "A model without adapters is marked.")
    model.add_adapter(LoraConfig(r=1, target_modules=["q_proj"]))
    expect(model._hf_peft_config_loaded, "A model with an adapter is not marked.")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        expect((Path(folder) / "adapter_config.json").is_file(), "The adapter is not saved.")
