"""What the routers of MPI cost: `python benchmarks/mpi_overhead.py`.

In training: processor seconds of the effective routers, forward and backward, as a share of those of a step's forward and backward passes,
both counted in the same run; the bar is 3 %. That is all there is to them: their part of the experts' gradient is added in place to the
rest. The ratio of whole steps with and without MPI, interleaved, is printed with the spread of that of two runs without it.

In generation: how often effective routers are computed (exactly once a layer and version of the weights), and whether logits and tokens are
those of the folded model. Either failing is an error.

Writes `benchmarks/results/mpi_overhead.json` and `.md`.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median, quantiles

import torch


RESULTS = Path(__file__).parent / "results"
BAR = 0.03


class Timed:
    """Stands in for a function and counts its calls and their processor seconds."""

    def __init__(self, function):
        self.function, self.calls, self.seconds = function, 0, 0.0

    def __call__(self, *args, **kwargs):
        start = time.process_time()
        result = self.function(*args, **kwargs)
        self.seconds += time.process_time() - start
        self.calls += 1
        return result


def make(args, mpi: bool):
    from transformers import AutoConfig, AutoModelForCausalLM

    import hf_rb  # noqa: F401

    config = AutoConfig.for_model(
        "mpi_qwen3_moe" if mpi else "qwen3_moe",
        num_experts=args.experts, num_experts_per_tok=args.active, hidden_size=args.hidden, moe_intermediate_size=args.width,
        num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=8, head_dim=args.hidden // 8,
        vocab_size=args.vocabulary, norm_topk_prob=True, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def step(model, ids) -> float:
    """Returns the processor seconds of a forward and a backward pass."""
    model.zero_grad()
    start = time.process_time()
    model(input_ids=ids, labels=ids).loss.backward()
    return time.process_time() - start


def share_of_a_step(args, ids, forward: Timed, backward: Timed) -> dict[str, float]:
    model = make(args, mpi=True).train()
    step(model, ids)
    found = []
    for _ in range(args.steps):
        forward.seconds = backward.seconds = 0.0
        forward.calls = backward.calls = 0
        found.append((step(model, ids), forward.seconds, backward.seconds))
        if (forward.calls, backward.calls) != (args.layers, args.layers):
            raise RuntimeError(
                f"{forward.calls} passes forward and {backward.calls} backward, of {args.layers} layers."
            )
    names = ("step_seconds", "forward_seconds", "backward_seconds")
    medians = {name: median(values) for name, values in zip(names, zip(*found, strict=True), strict=True)}
    return medians | {"share": median((there + back) / whole for whole, there, back in found)}


def ratios(args, ids) -> dict[str, list[float]]:
    """Whole steps: with MPI to without, and without to without, in turns."""
    models = {"native": make(args, False), "again": make(args, False), "mpi": make(args, True)}
    for model in models.values():
        step(model.train(), ids)
    found = {"mpi": [], "again": []}
    for pair in range(args.pairs):
        order = list(models)[pair % 3 :] + list(models)[: pair % 3]
        seconds = {name: step(models[name], ids) for name in order}
        for name in found:
            found[name].append(seconds[name] / seconds["native"])
    return found


def spread(values: list[float]) -> dict[str, float]:
    cuts = quantiles(values, n=20)
    return {"median": median(values), "5 %": cuts[0], "95 %": cuts[-1]}


def generation(args, forward: Timed) -> dict[str, int]:
    """
    Raises:
        RuntimeError: A router is computed more or less than once for a version of the weights, or differs from the folded one.
    """
    from hf_rb import fold_mpi

    model = make(args, mpi=True).eval()
    ids = torch.randint(1, args.vocabulary, (1, 32))
    counts = []
    for _ in range(2):
        forward.calls = 0
        tokens = model.generate(ids, max_new_tokens=args.new_tokens, do_sample=False)
        model.generate(ids, max_new_tokens=args.new_tokens, do_sample=False)
        counts.append(forward.calls)
        with torch.no_grad():
            logits = model(tokens).logits
            for layer in model.model.layers:
                kept = layer.mlp.gate.weight.clone()
                layer.mlp.gate.weight.mul_(1.0)  # a new version of the same weights
                assert torch.equal(kept, layer.mlp.gate.weight)
    if counts != [args.layers] * 2:
        raise RuntimeError(f"Effective routers were computed {counts} times in two versions of {args.layers} layers.")
    folded = fold_mpi(model)
    with torch.no_grad():
        same = torch.equal(folded(tokens).logits, logits)
    if not same or not torch.equal(folded.generate(ids, max_new_tokens=args.new_tokens, do_sample=False), tokens):
        raise RuntimeError("The folded model has other logits or tokens.")
    return {"layers": args.layers, "new_tokens": args.new_tokens, "evaluations_a_version": counts[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("experts", 64), ("active", 8), ("hidden", 512), ("width", 256), ("layers", 2), ("vocabulary", 1024),
        ("tokens", 2048), ("steps", 15), ("pairs", 30), ("new-tokens", 32),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)  # processor seconds are then those of one thread

    from hf_rb.models.mpi import functional, router

    forward = router.effective_router_and_weight = Timed(router.effective_router_and_weight)
    backward = Timed(functional._Retracted.backward)
    functional._Retracted.backward = staticmethod(backward)
    ids = torch.randint(1, args.vocabulary, (2, args.tokens // 2), generator=torch.Generator().manual_seed(0))
    training, served = share_of_a_step(args, ids, forward, backward), generation(args, forward)
    whole = {name: spread(values) for name, values in ratios(args, ids).items()}

    def row(name, values):
        return f"| {name} | {values['median']:.4f} | {values['5 %']:.4f} to {values['95 %']:.4f} |"

    lines = [
        "# What the routers of MPI cost",
        "",
        f"{args.layers} layers of {args.experts} experts ({args.active} active), hidden size {args.hidden}, expert width {args.width}, "
        f"{args.tokens:,} tokens, float32, one thread, `grouped_mm`.",
        "",
        f"Effective routers: {1000 * training['forward_seconds']:.0f} ms forward and {1000 * training['backward_seconds']:.0f} ms backward "
        f"of {1000 * training['step_seconds']:.0f} ms processor time, "
        f"**{training['share']:.2%}** of a step (median of {args.steps}; without the optimizer). Bar: 3 %.",
        "",
        f"| processor time of a whole step, {args.pairs} interleaved pairs | median ratio | 5 % to 95 % |",
        "|---|---:|---:|",
        row("with MPI / without", whole["mpi"]),
        row("without / without", whole["again"]),
        "",
        f"In generation: {served['evaluations_a_version']} effective routers for {served['layers']} layers and {2 * args.new_tokens} new "
        "tokens in two calls, and as many after a change of weights; logits and tokens equal those of the folded model.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    found = {"arguments": vars(args), "training": training, "whole_steps": whole, "generation": served, "bar": BAR}
    (RESULTS / "mpi_overhead.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "mpi_overhead.md").write_text(text)
    if training["share"] > BAR:
        raise SystemExit(f"The routers take {training['share']:.2%} of a step, more than {BAR:.0%}.")


if __name__ == "__main__":
    main()
