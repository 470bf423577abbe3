"""Trials of `hf-rb doctor` on the embedded models: quantize, save, reload, dequantize; adapters on packed layers; a
step of training.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_rb import PTQTPConfig, tiny
from hf_rb.methods.registry import find, methods
from hf_rb.scripts.doctor.behaviours.trainers import TRAINERS, trial_run
from hf_rb.scripts.doctor.findings import Skipped, expect
from hf_rb.utils import compat


__all__ = ["adapter_trials", "quantization_trials", "training_trials"]

Trials = Iterator[tuple[str, Callable[[], str | None]]]


def quantization_trials() -> Trials:
    """Yields names and checks: each method on a dense model and on a mixture."""
    for method in methods("quantizer"):
        for member in ("student", "moe"):
            yield f"{method}, tiny:{member}: quantize, save, reload, dequantize", _round_trip(method, member)


def adapter_trials() -> Trials:
    """Yields names and checks: LoRA on packed layers, saved by PEFT and by transformers."""
    yield "LoRA on packed layers, saved and loaded by PEFT", _peft_adapter
    yield "LoRA on packed layers, loaded by transformers", _native_adapter


def training_trials() -> Trials:
    """Yields names and checks: one step of each trainer."""
    for name in TRAINERS:
        yield f"{name}: one step", lambda name=name: _loss(name)


def _loss(name: str) -> str:
    return f"loss {float(trial_run(name).trainer.state.log_history[0]['loss']):.3g}"


def _round_trip(method: str, member: str) -> Callable[[], str]:
    record = find("quantizer", method).method

    def config(**options: bool) -> Any:
        return record.config_class()(**(record.uncalibrated or {}), **record.trial, **options)

    def check() -> str:
        model = _load(tiny.path(member), quantization_config=config())
        expected = _logits(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            expect(torch.equal(_logits(_load(folder)), expected), "The reloaded model computes other logits.")
            plain = _load(folder, quantization_config=config(dequantize=True))
            size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        names = {type(module).__name__ for module in plain.modules() if hasattr(module, "layouts")}
        expect(not names, f"`dequantize=True` leaves {', '.join(sorted(names))}.")
        difference = (_logits(plain) - expected).norm() / expected.norm()
        # The kernel and a product with unpacked weights add in another order, in the dtype of the model.
        expect(difference < 0.02, f"The dequantized model computes other logits, by {difference:.2g} of their norm.")
        return f"{size:,} bytes"

    return check


def _load(folder: str | Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(2, 34).reshape(2, 16)).logits


def _adapted(folder: Path) -> tuple[PreTrainedModel, torch.Tensor]:
    """Saves an adapter, and returns a packed model without it and the logits with it."""
    from peft import LoraConfig, get_peft_model

    model = _load(tiny.path("student"), quantization_config=PTQTPConfig())
    model.save_pretrained(folder / "model")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(str(folder / "adapter"))
    return _load(folder / "model"), _logits(adapted)


def _peft_adapter() -> None:
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        model, expected = _adapted(Path(folder))
        again = PeftModel.from_pretrained(model, Path(folder) / "adapter").eval()
        expect(torch.equal(_logits(again), expected), "The reloaded adapter computes other logits.")


def _native_adapter() -> None:
    if problem := compat.native_adapters_problem():
        raise Skipped(problem)
    with tempfile.TemporaryDirectory() as folder:
        model, expected = _adapted(Path(folder))
        model.load_adapter(str(Path(folder) / "adapter"))
        expect(torch.equal(_logits(model), expected), "The reloaded adapter computes other logits.")
