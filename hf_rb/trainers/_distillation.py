"""What the distillation trainers share: the rule of an objective."""

from typing import Any

from hf_rb.ops.lm_head import Rule
from hf_rb.ops.model import head_of, last_hidden
from hf_rb.ops.rules import DivergenceRule, GopdRule, HpdRule


__all__ = ["build_rule", "head_of", "last_hidden"]


def build_rule(args: Any) -> Rule:
    """Returns the per-token rule of a config's objective."""
    if args.objective == "hpd":
        return HpdRule(args.hpd_sample, args.hpd_reinforce)
    if args.objective == "gopd" and not args.gopd_full_vocab:
        return GopdRule(args.reward_scale, args.gopd_tis_cap, args.gopd_logratio_clamp)
    return DivergenceRule(
        "reverse_kl" if args.objective == "gopd" else args.objective,
        args.beta,
        args.akl_mu,
        args.akl_head_rule,
        getattr(args, "kd_alpha", 1.0),
        getattr(args, "loca_alpha", None),
    )
