"""What MPI routers do to the pretraining of a small mixture of experts.

    python benchmarks/mpi_pretrain.py                        # the embedded task
    python benchmarks/mpi_pretrain.py --text stories.txt     # and a text

Qwen3-MoE with and without MPI from the same initial weights on the same batches, with the paper's optimizer settings and balance loss
for both: AdamW (0.9, 0.95), decay 0.1 on matrices, cosine to zero, clipping at 1, 0.01 times the loss per sequence and layer. Reported
are the loss on held-out data, the load of the experts there (MaxVio) and λ, the alignment of router rows with their experts, of the
learned router, of the one that routes, and of random rows after one power step.

One thing is checked, and fails the script: after pretraining, λ of the effective router is above that of the random rows. A power step
raises λ of any row, so that below it nothing would have been learned.

Writes `benchmarks/results/mpi_pretrain.json` and `.md`.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_rb import MPIQwen3MoeConfig, MPIQwen3MoeForCausalLM, tiny
from hf_rb.models.mpi.losses import auxiliary_loss
from hf_rb.models.mpi.optim import weight_decay_groups
from hf_rb.models.router_report import examine


RESULTS = Path(__file__).parent / "results"
SIZES = dict(
    vocab_size=1024, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    moe_intermediate_size=64, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True, tie_word_embeddings=True,
    max_position_embeddings=256, router_aux_loss_coef=0.01,
)  # fmt: skip
WINDOW, BATCH, HELD_OUT = 128, 16, 64  # tokens, windows a step, windows that are never trained on
PLAIN, MPI = "learned router", "MPI"


def windows(data: str, tokens: int) -> torch.Tensor:
    """Token windows `(rows, WINDOW)` of `"tiny:math"` or a text file."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")
    if data == "tiny:math":
        # A problem has about 100 tokens.
        rows = tiny.load_dataset("math", config="messages", size=tokens // 60)["messages"]
        texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    else:
        # A token of this tokenizer has about three bytes.
        texts = [Path(data).read_text(encoding="utf-8")[: tokens * 5]]
    ids = [id for text in texts for id in tokenizer(text, verbose=False)["input_ids"]][:tokens]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


def build(name: str, seed: int, scale: float) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    if name == MPI:
        return MPIQwen3MoeForCausalLM(MPIQwen3MoeConfig(**SIZES, mpi_scale=scale))
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES))
    model.config.lb_type = "sequence"
    return model


def pretrain(name: str, seed: int, rows: torch.Tensor, args: argparse.Namespace) -> dict:
    """Trains one model and measures it."""
    model = build(name, seed, args.scale).train()
    groups = weight_decay_groups(model, 0.1, router_weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    warmup = args.steps // 10
    factor = lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * step / args.steps)) / 2)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    held_out, train = rows[:HELD_OUT], rows[HELD_OUT:]
    draws = torch.Generator().manual_seed(1000 + seed)
    order = torch.cat(
        [torch.randperm(len(train), generator=draws) for _ in range(args.steps * BATCH // len(train) + 1)]
    )
    curve, start = [], time.process_time()
    for step in tqdm(range(args.steps), desc=f"{name}, seed {seed}", delay=2, leave=False, disable=None):
        batch = train[order[step * BATCH : (step + 1) * BATCH]]
        outputs = model.model(batch, output_router_logits=True, use_cache=False)
        loss = _cross_entropy(model, outputs.last_hidden_state, batch)
        aux_loss = auxiliary_loss(model.config, outputs.router_logits, batch.shape)
        (loss + model.config.router_aux_loss_coef * aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        curve.append(loss.item())
    seconds = time.process_time() - start
    model.eval()
    with torch.no_grad():
        parts = held_out.split(BATCH)
        losses = [_cross_entropy(model, model.model(part, use_cache=False).last_hidden_state, part) for part in parts]
    report = examine(model, [{"input_ids": part} for part in parts], seed=seed)
    names = ("batch_max_vio", "max_vio", "dead", "load_entropy", "lambda_learned", "lambda_effective", "lambda_random")
    every = max(args.steps // 10, 1)
    return {
        "router": name,
        "seed": seed,
        "cpu_seconds": seconds,
        "curve": [mean(curve[i : i + every]) for i in range(0, args.steps, every)],
        "loss": torch.stack(losses).mean().item(),
        **{key: report.mean(key) for key in names},
        "layers": [[getattr(layer, key) for key in names[4:]] for layer in report.layers],
    }


def _cross_entropy(model: Qwen3MoeForCausalLM, hidden_BTD: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    logits = model.lm_head(hidden_BTD[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", metavar="FILE", help="a text to pretrain on, beside the embedded task")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=2.0, help="C' (default 2)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    results: dict = {
        "arguments": vars(args) | {"text": args.text and Path(args.text).name},
        "sizes": SIZES,
        "runs": {},
    }
    for data in ["tiny:math", *([args.text] if args.text else [])]:
        rows = windows(data, (args.steps * BATCH + HELD_OUT) * WINDOW)
        name = data if data == "tiny:math" else Path(data).name
        runs = results["runs"][name] = []
        for seed in range(args.seeds):
            for router in (PLAIN, MPI):
                runs.append(pretrain(router, seed, rows, args))
                shown = {key: value for key, value in runs[-1].items() if key not in ("curve", "layers")}
                print(name, shown, flush=True)
        _write(results, args)  # what is measured is kept if a later part is interrupted
    return 0 if all(map(all, results["effective_above_one_step_on_random_rows"].values())) else 1


def _write(results: dict, args: argparse.Namespace) -> None:
    results["effective_above_one_step_on_random_rows"] = {
        name: [run["lambda_effective"] > run["lambda_random"] for run in runs if run["router"] == MPI]
        for name, runs in results["runs"].items()
    }
    text = "\n".join(_render(results, args))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "mpi_pretrain.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "mpi_pretrain.md").write_text(text + "\n")
    print(text)


def _render(results: dict, args: argparse.Namespace) -> list[str]:
    sizes = f"{SIZES['num_hidden_layers']} layers, D = {SIZES['hidden_size']}, N = {SIZES['num_experts']} experts of width "
    sizes += f"{SIZES['moe_intermediate_size']}, K = {SIZES['num_experts_per_tok']}"
    command = "python benchmarks/mpi_pretrain.py" + (f" --text {Path(args.text).name}" if args.text else "")
    lines = [
        "# Pretraining with and without MPI routers",
        "",
        f"Qwen3-MoE with {sizes}; {args.steps} steps of {BATCH} windows of {WINDOW} tokens, {args.seeds} seeds, C' = {args.scale}. "
        f"Mean (lowest to highest) on held-out windows; `{command}` repeats it. A model of this size says little about large ones.",
        "",
        "| data | router | held-out loss | MaxVio of a batch | MaxVio, all | λ learned | λ effective | λ random, one step | CPU s |",
        "|---|---|" + "---:|" * 7,
    ]
    keys = ("loss", "batch_max_vio", "max_vio", "lambda_learned", "lambda_effective", "lambda_random")
    for name, runs in results["runs"].items():
        for router in (PLAIN, MPI):
            chosen = [run for run in runs if run["router"] == router]
            cells = [[run[key] for run in chosen] for key in keys]
            shown = [f"{mean(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in cells]
            shown.append(f"{mean(run['cpu_seconds'] for run in chosen):.0f}")
            lines.append(f"| {name} | {router} | {' | '.join(shown)} |")
    lines += [
        "",
        "Held-out loss with MPI minus without, seed by seed; training loss in tenths of the run, mean over seeds:",
        "",
    ]
    for name, runs in results["runs"].items():
        plain, mpi = ([run for run in runs if run["router"] == router] for router in (PLAIN, MPI))
        differences = [b["loss"] - a["loss"] for a, b in zip(plain, mpi, strict=True)]
        lines.append(f"- {name}: {', '.join(f'{value:+.4f}' for value in differences)}")
        for router, chosen in ((PLAIN, plain), (MPI, mpi)):
            curve = [mean(values) for values in zip(*(run["curve"] for run in chosen), strict=True)]
            lines.append(f"  - {router}: {', '.join(f'{value:.3f}' for value in curve)}")
        passed = results["effective_above_one_step_on_random_rows"][name]
        lines.append(
            f"  - λ of the effective router above one power step on random rows: {sum(passed)} of {len(passed)} seeds"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
