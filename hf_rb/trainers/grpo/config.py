"""Configuration of [`GRPOTrainer`]: TRL's, with advantage shapers and an auxiliary loss."""

from dataclasses import dataclass

import trl

from hf_rb.trainers.common.configs import ConfigMixin
from hf_rb.trainers.grpo.agent_config import AgentArguments
from hf_rb.trainers.grpo.rules import agent_rules, grpo_rules
from hf_rb.utils.fields import documented, flag


__all__ = ["GRPOConfig"]


@documented
@dataclass
class GRPOConfig(ConfigMixin, AgentArguments, trl.GRPOConfig):
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
        "Shapers of the advantages, in the order in which they run: `edas` "
        "(https://huggingface.co/papers/2605.17333), `calibadv` (https://huggingface.co/papers/2604.18235), `srar`"
        " (https://huggingface.co/papers/2605.17291), or a name that an installed package registers under the "
        "entry-point group `hf_rb.shapers`.",
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
    edas_alpha: float = flag(0.4, "Strength on groups with several different errors; 0 or more.", range="[0, inf)")
    edas_beta: float = flag(
        0.3,
        "Strength on groups whose wrong answers are all the same; 0 or more. The paper: 0.3 with DAPO, 0.2 with GRPO.",
        range="[0, inf)",
    )
    edas_kappa: float = flag(2.0, "EDAS moves an advantage by at most this part of itself, 1/kappa.", range="(1, inf)")
    edas_no_answer: str = flag(
        "cluster",
        "Wrong completions without an answer are one error (`cluster`, the authors' code), left alone (`skip`), or"
        " an error each (`singleton`).",
        choices=["cluster", "skip", "singleton"],
    )
    edas_equivalence: str = flag(
        "auto",
        "When two answers are the same: as rewards and evaluation compare them "
        "([`~hf_rb.rl.answers.same_answer`]), with `math-verify` where it is installed (`auto`) or not without it "
        "(`math`; needs `pip install 'hf_rb[math]'`); or where their texts are, up to case and surrounding blanks "
        "(`string`).",
        choices=["auto", "math", "string"],
    )
    edas_warmup_start: int = flag(0, "Optimizer step at which EDAS starts.", range="[0, inf)")
    edas_warmup_steps: int = flag(0, "Steps over which the strengths of EDAS grow to their values.", range="[0, inf)")
    edas_format_reward: str | None = flag(
        None,
        "Reward function that scores the format. EDAS leaves wrong completions alone to which it gives less than "
        "0.5, as the authors' code does.",
    )
    calibadv_soft: bool = flag(
        True, "Whether search steps that found good documents are penalised less for a wrong answer."
    )
    calibadv_pos_neg_ratio: float | None = flag(
        1.0,
        "Positive over negative advantage of the answers of a group, summed over tokens, after rebalancing; null "
        "does not rebalance.",
        range="(0, inf)",
    )
    calibadv_max_gain: float | None = flag(
        None,
        "Largest factor by which rebalancing multiplies an advantage. Not in the paper, where it is unbounded.",
        range="[1, inf)",
    )
    calibadv_weighting: str = flag(
        "token",
        "What a token weighs in that sum: each the same (`token`, the authors' code), or as much as in the loss "
        '(`loss`), which differs with `loss_type="grpo"` and `sapo`, means over the tokens of each completion '
        "first.",
        choices=["token", "loss"],
    )
    calibadv_qualify: float = flag(0.7, "Reward from which on the documents of a completion count as good.")
    calibadv_answer_must_not_call_tool: bool = flag(
        True,
        "Whether a last turn that calls a tool is a search step, and such a completion has no answer; `False` is "
        "the authors' code.",
    )
    srar_coef: float = flag(
        1.0, "Weight of the step scores, which are added to the advantages; 0 or more.", range="[0, inf)"
    )
    srar_gk: str = flag(
        "code",
        "Which completions the score of a step is compared with: those with a criterion that is met in it (`code`,"
        " the authors'), or with a criterion that the judge places in it, met or not (`paper`). Also what becomes "
        "of steps that do not exist, see [`~hf_rb.advantages.srar_step_scores`].",
        choices=["code", "paper"],
    )
    srar_ddof: int = flag(
        1, "1 divides step scores by the unbiased standard deviation, 0 by that of the population.", choices=[0, 1]
    )
    srar_eps: float = flag(
        1e-4,
        "Added to that deviation, 0 or more; a step whose scores deviate no more than this has no offset. 1e-4 is "
        "TRL's for advantages; the authors' code uses 1e-6.",
        range="[0, inf)",
    )
    srar_only_mixed: bool = flag(True, "Whether only groups with correct and wrong completions are judged.")
    hidden_align_coef: float = flag(
        0.0,
        "Weight of an auxiliary loss that aligns the hidden states before the answers of the correct completions "
        "of a prompt; 0 is off. A reconstruction of https://huggingface.co/papers/2606.03234, without code to "
        "compare with.",
        range="[0, inf)",
    )
    hidden_align_marker: str | None = flag(
        None,
        "Text before which `hidden_align_coef` takes the hidden state. Defaults to what `answer_extractor` looks for.",
    )
    hidden_align_all_correct: bool = flag(
        False, "Whether `hidden_align_coef` aligns groups with correct completions only too, which have no advantage."
    )
