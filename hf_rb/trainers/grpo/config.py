"""Configuration of [`GRPOTrainer`]: TRL's, with advantage shapers and an auxiliary loss."""

from dataclasses import dataclass

import trl

from hf_rb.advantages.calibadv import CalibAdvFlags
from hf_rb.advantages.edas import EdasFlags
from hf_rb.advantages.pass_at_k import PassAtKFlags
from hf_rb.advantages.srar import SrarFlags
from hf_rb.objectives.hidden_align import HiddenAlignFlags
from hf_rb.trainers.common.configs import ConfigMixin
from hf_rb.trainers.grpo.agent_config import AgentArguments
from hf_rb.trainers.grpo.rules import agent_rules, grpo_rules
from hf_rb.utils.fields import documented, flag


__all__ = ["GRPOConfig"]


@documented
@dataclass
class GRPOConfig(
    ConfigMixin, CalibAdvFlags, EdasFlags, HiddenAlignFlags, PassAtKFlags, SrarFlags, AgentArguments, trl.GRPOConfig
):
    r"""
    Configuration class for the [`GRPOTrainer`].

    Everything in [`~trl.GRPOConfig`], and the fields below. With none of them set the trainer is TRL's.

    Raises:
        ValueError: A value out of its range, or fields that exclude one another.
    """

    _rules = (grpo_rules, agent_rules)
    _VALID_DICT_FIELDS = trl.GRPOConfig._VALID_DICT_FIELDS + ["environment_kwargs", "srar_judge_kwargs"]

    advantage_shapers: list[str] = flag(
        [],
        "Shapers of the advantages, in the order in which they run; `hf-rb methods` lists them. A shaper with its "
        "flags is a mapping: `{edas: {alpha: 0.3}}`.",
    )
    correct_reward: str | None = flag(
        None, "Reward function that says which completions are correct. Its weight may be 0."
    )
    correct_threshold: float = flag(0.5, "A completion is correct if `correct_reward` gives it at least this.")
    answer_extractor: str = flag(
        "boxed",
        "Where the final answer of a completion is: in its last `\\boxed{}` (`boxed`), after its last `####` "
        "(`hashes`), or in its last `<answer></answer>` (`tag`). The trainer takes a function too.",
        choices=["boxed", "hashes", "tag"],
    )
