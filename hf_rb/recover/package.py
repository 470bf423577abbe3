"""The folder that is published: packed base, adapter, card and report; or an ordinary model with the adapter merged
in.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from peft import PeftModel
from transformers.quantizers import AutoQuantizationConfig

from hf_rb.evaluation import load_model, model_size
from hf_rb.hub import ModelCardData, Result, write_model_card
from hf_rb.io.files import atomic_folder
from hf_rb.io.model_folder import copy_companions
from hf_rb.io.resumable import write_json
from hf_rb.methods.registry import methods
from hf_rb.quantizers.folders.quantize import describe
from hf_rb.recover.config import RecoverConfig
from hf_rb.recover.measuring import ADAPTER
from hf_rb.recover.report import RecoverReport


__all__ = ["merged_model", "write_package"]

SUMMARIES = {
    "llm_neo": "Distillation into LoRA; here by the forward KL alone, from the model itself in full precision.",
}


def _methods(objective: str) -> list[str]:
    """Returns the methods of a card: that of the objective, which trains an adapter."""
    if objective == "forward_kl":
        return ["llm_neo"]
    return [objective] if objective != "sft" and methods("objective")[objective].method.paper else []


def merged_model(base: Path, trained: Path, destination: Path, dtype: str) -> None:
    """Writes an ordinary model: the packed one unpacked, with the adapter added."""
    model, tokenizer = load_model(base, dtype)
    model.dequantize()
    merged = PeftModel.from_pretrained(model, trained / ADAPTER).merge_and_unload()
    with atomic_folder(destination, overwrite=True) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        copy_companions(base, folder)


def write_package(
    destination: Path, weights: Path, trained: Path | None, config: RecoverConfig, report: RecoverReport
) -> None:
    """Writes the folder: a copy of `weights`, the adapter of `trained` if there is one, card and report."""
    name = f"{Path(config.model_name_or_path.replace(':', '-')).name}-recovered"
    packed = [config.quantization_config["quant_method"]] if trained else []  # a merged model is in no packed format
    quantization = describe(AutoQuantizationConfig.from_dict(dict(config.quantization_config)))
    with atomic_folder(destination, overwrite=True) as folder:
        shutil.copytree(weights, folder, dirs_exist_ok=True)
        if trained:
            shutil.copytree(trained / ADAPTER, folder / ADAPTER)
        write_json(folder / "report.json", report.to_dict())
        card = ModelCardData(
            name,
            [*packed, *_methods(config.objectives[0]), "recover"],
            base_model=config.model_name_or_path,
            hyperparameters={
                "quantization_config": quantization["hyperparameters"],
                "objective": config.objectives[0],
                "examples": config.examples[0],
                "lora_r": config.lora_r,
                "lora_alpha": config.lora_alpha,
                "seed": config.seed,
                **config.training,
            },
            size=model_size(folder),
            adapter=ADAPTER if trained else None,
            results=list(_results(report, merged=trained is None)),
            summaries=quantization["summaries"] | SUMMARIES,
            sections={"Recovered": report.markdown()},
        )
        write_model_card(folder, card)


def _results(report: RecoverReport, merged: bool) -> Iterator[Result]:
    """What was measured of the model in the folder, and of the one in full precision."""
    full = report.rows[0]
    row = report.rows[-1] if merged else next(row for row in report.rows if row.objective)
    if report.task and row.exact_match is not None:
        yield Result(
            f"exact match ({report.problems} problems)", row.exact_match, report.task, before=full.exact_match
        )
    measure = "perplexity" if report.text else "perplexity (worked solutions)"
    yield Result(measure, row.perplexity, report.text or report.task or "", before=full.perplexity)
