"""Does EDAS keep wrong answers diverse? A bandit where its formula says by how much: `python benchmarks/edas_bandit.py`.

A softmax policy over six answers: one is right and has probability p, the wrong ones share the rest 7:1:1:1:1. Each step draws
groups of G answers, takes GRPO's advantages as TRL computes them, and ascends the mean of A log π. Reported is the entropy of the
policy among wrong answers after 50 steps, with and without EDAS, on the same draws.

What the formula predicts. The advantages of a group sum to 0, so an answer's logit moves by η/G times the sum of its rollouts'
advantages. A wrong rollout has A = -a with a ≈ sqrt(p / (1 - p)): in the mean, the log-ratio of the common wrong answer (share 7/11
of the wrong ones) to a rare one (1/11) falls per step by

    GRPO     η a (1 - p) (7/11 - 1/11)                              = η sqrt(p (1 - p)) 0.545
    EDAS     η a (1 - p) (7/11 (1 - α T_7) - 1/11 (1 - α T_1)),     T_k = (-ln share_k - H) / ln(G (1 - p))

T_7 < 0 < T_1, so EDAS is faster: plain GRPO flattens the wrong answers too, by counting alone. At p = 0.2, G = 16 and α = 0.4 shares
at their means give 16 %; the mean over all 20,349 groups gives 11 %, because a rare answer that is drawn at all is less rare in its
group (`drift`, which `predicted` iterates). The entropies hence differ while the log-ratio is on its way from ln 7 to 0: at η = 0.1
GRPO is about half-way after 50 steps, and there the benchmark looks. At ten times the rate both have arrived (last row), and where
the wrong answers are equally frequent from the start the formula has nothing to add (second row).

Writes `benchmarks/results/edas_bandit.json` and `.md`.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from hf_rb.advantages import edas


RESULTS = Path(__file__).parent / "results"
SKEWED, EQUAL = (7, 1, 1, 1, 1), (1, 1, 1, 1, 1)


def start(shares: tuple[int, ...], right: float) -> torch.Tensor:
    """Logits of the right answer and the wrong ones."""
    wrong = torch.tensor(shares, dtype=torch.float64)
    return torch.cat([torch.tensor([right], dtype=torch.float64), (1 - right) * wrong / wrong.sum()]).log()


def wrong_entropy(logits: torch.Tensor) -> float:
    return torch.distributions.Categorical(logits=logits[1:]).entropy().item()


def sampled(
    seed: int, shares=SKEWED, right=0.2, alpha=0.0, beta=0.0, group_size=16, groups=8, steps=50, learning_rate=0.1
) -> float:
    """Entropy among wrong answers after training on draws; α = β = 0 is plain GRPO."""
    logits = start(shares, right)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        probs = logits.softmax(0)
        uniforms = torch.rand(groups * group_size, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(probs.cumsum(0), uniforms).clamp(max=len(probs) - 1)
        rewards = (drawn == 0).float().view(groups, group_size)
        centred = rewards - rewards.mean(1, keepdim=True)
        advantages = (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
        advantages = edas(advantages, group_size, drawn == 0, list(map(str, drawn.tolist())), alpha, beta)
        gained = torch.zeros_like(logits).index_add_(0, drawn, advantages.double())
        logits += learning_rate * (gained - advantages.sum() * probs) / len(drawn)
    return wrong_entropy(logits)


def groups_of(group_size: int, answers: int) -> torch.Tensor:
    """Every way in which a group can fall on the answers, as counts."""
    bars = torch.combinations(torch.arange(group_size + answers - 1), answers - 1)
    ends = torch.full((len(bars), 1), -1), torch.full((len(bars), 1), group_size + answers - 1)
    return torch.cat([ends[0], bars, ends[1]], dim=1).diff(dim=1) - 1


def drift(logits: torch.Tensor, counts: torch.Tensor, alpha: float = 0.0, beta: float = 0.0) -> torch.Tensor:
    """Expected change of the logits per unit of learning rate: the mean over all groups, each by its probability."""
    group_size, counts = int(counts[0].sum()), counts.double()
    log_probs = logits.log_softmax(0)
    chance = (math.lgamma(group_size + 1) - (counts + 1).lgamma().sum(1) + counts @ log_probs).exp()
    right, wrong = counts[:, :1], counts[:, 1:]
    mean, total = right / group_size, wrong.sum(1, keepdim=True)
    std = (mean * (1 - mean) * group_size / (group_size - 1)).sqrt() + 1e-4
    share = wrong / total.clamp(min=1)
    information = torch.where(wrong > 0, -share.log(), 0)
    tilt = (information - (share * information).sum(1, keepdim=True)) / total.clamp(min=2).log()
    one_error, several = (wrong > 0).sum(1, keepdim=True) == 1, total > 1
    penalty = 1 + several * torch.where(one_error, beta, -alpha * tilt)
    gained = torch.cat([right * (1 - mean), -wrong * mean * penalty], dim=1) / std
    return chance @ (gained - gained.sum(1, keepdim=True) * log_probs.exp()) / group_size


def predicted(shares=SKEWED, right=0.2, alpha=0.0, beta=0.0, group_size=16, steps=50, learning_rate=0.1) -> float:
    """Entropy among wrong answers if every step takes its expected value."""
    logits = start(shares, right)
    counts = groups_of(group_size, len(logits))
    for _ in range(steps):
        logits += learning_rate * drift(logits, counts, alpha, beta)
    return wrong_entropy(logits)


SETTINGS = {
    "7:1:1:1:1": {},
    "1:1:1:1:1": {"shares": EQUAL},
    "7:1:1:1:1, groups of 8": {"group_size": 8},
    "7:1:1:1:1, rate 1": {"learning_rate": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    results, lines = {}, ["# Entropy among wrong answers after 50 steps of a bandit", ""]
    lines += [
        "| wrong answers | start | predicted, GRPO | predicted, EDAS | GRPO | EDAS | seeds above |",
        "|---|" + "---:|" * 6,
    ]
    for name, setting in SETTINGS.items():
        plain = [sampled(seed, **setting) for seed in range(args.seeds)]
        shaped = [sampled(seed, alpha=0.4, beta=0.3, **setting) for seed in range(args.seeds)]
        above = sum(b > a for a, b in zip(plain, shaped, strict=True))
        initial = wrong_entropy(start(setting.get("shares", SKEWED), 0.2))
        results[name] = {
            "start": initial,
            "predicted": {"grpo": predicted(**setting), "edas": predicted(alpha=0.4, beta=0.3, **setting)},
            "grpo": plain,
            "edas": shaped,
        }
        cells = [initial, *results[name]["predicted"].values(), sum(plain) / len(plain), sum(shaped) / len(shaped)]
        lines.append(f"| {name} | {' | '.join(f'{cell:.4f}' for cell in cells)} | {above} of {args.seeds} |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "edas_bandit.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / "edas_bandit.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
