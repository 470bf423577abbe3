"""What weighting the fit of dual scales does: errors of SmolLM2's down projections on text that they were not calibrated on.

    python benchmarks/d2quant_dsq.py MODEL_FOLDER TEXT_FOLDER [--layers 2 15 27] [--seeds 0 1 2]

writes `benchmarks/results/d2quant_dsq.json` and a table beside it. TEXT_FOLDER holds `c4_demo.jsonl`. GPTQ quantizes each
matrix on what it reads in the 16-bit model, with affine grids, with dual scales as published and with weighted ones; the output's
relative error is measured on further sequences of the same collection. "Rotated" turns the rows by the Hadamard matrix with
random signs of D²Quant's rotation, as the pipeline does.
"""

import argparse
import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rb.quantizers.d2quant.maths import gptq
from hf_rb.quantizers.d2quant.maths.rotation import hadamard


RESULTS = Path(__file__).parent / "results"
GROUP, SAMPLES, UNSEEN, SEQLEN = 64, 16, 16, 512
METHODS: dict[str, dict[str, Any]] = {
    "affine": {},
    "DSQ, all columns alike (paper)": {"dual": True, "dsq_weighting": "none"},
    "DSQ, weighted by the Hessian (ours)": {"dual": True, "dsq_weighting": "hessian"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", type=Path, help="folder of a causal language model with `mlp.down_proj` in its layers"
    )
    parser.add_argument("texts", type=Path, help="folder of the texts")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 15, 27])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rows = (args.texts / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n\n".join(json.loads(row)["text"] for row in rows)
    tokens = AutoTokenizer.from_pretrained(args.model)(text, return_tensors="pt", verbose=False).input_ids[0]
    sequences = tokens[: len(tokens) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    result: dict[str, Any] = {"model": args.model.resolve().name, "layers": args.layers, "errors": []}
    for seed in args.seeds:
        chosen = random.Random(seed).sample(range(len(sequences)), SAMPLES + UNSEEN)
        seen, unseen = (hessians(model, args.layers, sequences[part]) for part in (chosen[:SAMPLES], chosen[SAMPLES:]))
        for layer in args.layers:
            weight = model.model.layers[layer].mlp.down_proj.weight.detach()
            for found in measure(weight, seen[layer], unseen[layer]):
                result["errors"].append({"seed": seed, "layer": layer, **found})
                print(result["errors"][-1], flush=True)
    file = RESULTS / "d2quant_dsq.json"
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(render(result), encoding="utf-8")


@torch.no_grad()
def hessians(model: torch.nn.Module, layers: list[int], sequences: Tensor) -> dict[int, Tensor]:
    down = {layer: model.model.layers[layer].mlp.down_proj for layer in layers}
    gathered = {layer: gptq.InputStatistics(module.in_features) for layer, module in down.items()}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, layer=layer: gathered[layer].add(args[0]))
        for layer, module in down.items()
    ]
    for batch in sequences.split(4):
        model.model(batch)
    for hook in hooks:
        hook.remove()
    return {layer: one.hessian for layer, one in gathered.items()}


def measure(weight: Tensor, seen: Tensor, unseen: Tensor) -> Iterator[dict[str, Any]]:
    turn = hadamard(GROUP).float()
    for rotated in (False, True):
        if rotated:
            weight = (weight.T.unflatten(-1, (-1, GROUP)) @ turn).flatten(-2).T.contiguous()
        for bits in (2, 3):
            for method, options in METHODS.items():
                codes, stats = gptq.quantize(weight, seen, bits=bits, group_size=GROUP, **options)
                lost, kept = (((one @ unseen) * one).sum() for one in (codes.dequantize() - weight, weight))
                errors = {"calibration": stats.output_error, "unseen": (lost / kept).sqrt().item()}
                yield {"rotated": rotated, "bits": bits, "method": method, **errors}


def render(result: dict[str, Any]) -> str:
    """The table in Markdown."""
    errors, seeds = result["errors"], len({one["seed"] for one in result["errors"]})
    places = [(rotated, layer) for rotated in (False, True) for layer in result["layers"]]
    lines = [
        f"# Fitting dual scales: {result['model']}",
        "",
        f"Relative error of the output of down projections on {UNSEEN} sequences that are not among the {SAMPLES} of {SEQLEN} tokens "
        f"(c4) that GPTQ saw, mean of {seeds} seeds. Groups of {GROUP}; the inputs are those of the 16-bit model.",
        "",
        "| bits | method | " + " | ".join(f"layer {layer}{', rotated' * rotated}" for rotated, layer in places) + " |",
        "|---:|---|" + "---:|" * len(places),
    ]
    for bits in (2, 3):
        for method in METHODS:
            cells = []
            for rotated, layer in places:
                key = {"rotated": rotated, "layer": layer, "bits": bits, "method": method}
                cells.append(f"{statistics.mean(one['unseen'] for one in errors if key.items() <= one.items()):.4f}")
            lines.append(f"| {bits} | {method} | {' | '.join(cells)} |")
    lines += ["", f"torch {torch.__version__}, transformers {transformers.__version__}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
