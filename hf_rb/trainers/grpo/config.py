"""Configuration of [`GRPOTrainer`]: TRL's, with advantage shapers and an auxiliary loss."""

from dataclasses import dataclass, field

import trl

from hf_rb.trainers.common.configs import ConfigMixin
from hf_rb.trainers.grpo.agent_config import AgentArguments
from hf_rb.trainers.grpo.rules import agent_rules, grpo_rules
from hf_rb.utils.fields import described


__all__ = ["GRPOConfig"]


@dataclass
class GRPOConfig(ConfigMixin, AgentArguments, trl.GRPOConfig):
    r"""
    Configuration class for the [`GRPOTrainer`].

    Everything in [`~trl.GRPOConfig`], and the fields below. With none of them set the trainer is TRL's.

    Parameters:
        advantage_shapers (`list[str]`, *optional*, defaults to `[]`):
            Shapers of the advantages, in the order in which they run: `"edas"`
            (https://huggingface.co/papers/2605.17333), `"calibadv"` (https://huggingface.co/papers/2604.18235),
            `"srar"` (https://huggingface.co/papers/2605.17291), or a name that an installed package registers under
            the entry-point group `hf_rb.shapers`.
        correct_reward (`str`, *optional*):
            Reward function that says which completions are correct. Its weight may be 0.
        correct_threshold (`float`, *optional*, defaults to `0.5`):
            A completion is correct if that function gives it at least this.
        answer_extractor (`str`, *optional*, defaults to `"boxed"`):
            Where the final answer of a completion is: in its last `\boxed{}` (`"boxed"`), after its last `####`
            (`"hashes"`), or in its last `<answer></answer>` (`"tag"`). The trainer takes a function too.
        edas_alpha (`float`, *optional*, defaults to `0.4`):
            Strength on groups with several different errors; 0 or more.
        edas_beta (`float`, *optional*, defaults to `0.3`):
            Strength on groups whose wrong answers are all the same; 0 or more. The paper: 0.3 with DAPO, 0.2 with
            GRPO.
        edas_kappa (`float`, *optional*, defaults to `2.0`):
            An advantage moves by at most the κ-th part of itself; above 1.
        edas_no_answer (`str`, *optional*, defaults to `"cluster"`):
            Wrong completions without an answer are one error (`"cluster"`, the authors' code), left alone (`"skip"`),
            or an error each (`"singleton"`).
        edas_equivalence (`str`, *optional*, defaults to `"auto"`):
            When two answers are the same: as rewards and evaluation compare them ([`~hf_rb.rl.answers.same_answer`]),
            with `math-verify` where it is installed (`"auto"`) or not without it (`"math"`; needs
            `pip install 'hf_rb[math]'`); or where their texts are, up to case and surrounding blanks (`"string"`).
        edas_warmup_start (`int`, *optional*, defaults to `0`), edas_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer step at which EDAS starts, and number of steps over which its strengths grow to their values.
        edas_format_reward (`str`, *optional*):
            Reward function that scores the format. Wrong completions to which it gives less than 0.5 are left alone,
            as in the authors' code.
        calibadv_soft (`bool`, *optional*, defaults to `True`):
            Whether search steps that found good documents are penalised less for a wrong answer.
        calibadv_pos_neg_ratio (`float`, *optional*, defaults to `1.0`):
            Positive over negative advantage of the answers of a group, summed over tokens, after rebalancing; above 0.
        calibadv_max_gain (`float`, *optional*):
            Largest factor by which rebalancing multiplies an advantage. Not in the paper, where it is unbounded.
        calibadv_weighting (`str`, *optional*, defaults to `"token"`):
            What a token weighs in that sum: each the same (`"token"`, the authors' code), or as much as in the loss
            (`"loss"`), which differs with `loss_type="grpo"` and `"sapo"`, means over the tokens of each completion
            first.
        calibadv_qualify (`float`, *optional*, defaults to `0.7`):
            Reward from which on the documents of a completion count as good.
        calibadv_answer_must_not_call_tool (`bool`, *optional*, defaults to `True`):
            Whether a last turn that calls a tool is a search step, and such a completion has no answer; `False` is the
            authors' code.
        srar_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the step scores, which are added to the advantages; 0 or more.
        srar_gk (`str`, *optional*, defaults to `"code"`):
            Which completions the score of a step is compared with: those with a criterion that is met in it (`"code"`,
            the authors'), or with a criterion that the judge places in it, met or not (`"paper"`). Also what becomes
            of steps that do not exist, see [`~hf_rb.advantages.srar_step_scores`].
        srar_ddof (`int`, *optional*, defaults to `1`):
            1 divides by the unbiased standard deviation, 0 by that of the population.
        srar_eps (`float`, *optional*, defaults to `1e-4`):
            Added to that deviation, 0 or more; a step whose scores deviate no more than this has no offset. 1e-4 is
            TRL's for advantages; the authors' code uses 1e-6.
        srar_only_mixed (`bool`, *optional*, defaults to `True`):
            Whether only groups with correct and wrong completions are judged.
        hidden_align_coef (`float`, *optional*, defaults to `0.0`):
            Weight of an auxiliary loss that aligns the hidden states before the answers of the correct completions of
            a prompt; 0 is off. A reconstruction of https://huggingface.co/papers/2606.03234, without code to compare
            with.
        hidden_align_marker (`str`, *optional*):
            Text before which the hidden state is taken. Defaults to what `answer_extractor` looks for.
        hidden_align_all_correct (`bool`, *optional*, defaults to `False`):
            Whether groups with correct completions only, which have no advantage, are aligned too.
        environment (`str`, *optional*), environment_kwargs (`dict`, *optional*):
            What the policy may act on: `"search"`, a search tool over passages, with its `corpus` and `top_k`.
        calibadv_step_field (`str`, *optional*):
            Field of the rollouts that holds the quality of each search step. By default it comes from silver
            documents.
        srar_judge (`str`, *optional*), srar_judge_model (`str`, *optional*):
            Who judges steps: the base URL of an OpenAI-compatible endpoint and the model that it serves, or `"tiny"`,
            an offline judge for `tiny:math`.
        srar_judge_api_key_env (`str`, *optional*):
            Name of the environment variable that holds the endpoint's key.
        srar_judge_timeout (`float`, *optional*, defaults to `60.0`),
        srar_judge_retries (`int`, *optional*, defaults to `2`),
        srar_judge_concurrency (`int`, *optional*, defaults to `32`), srar_judge_kwargs (`dict`, *optional*):
            Seconds an answer may take, further attempts, open requests of a process, and more fields of a request.

    Raises:
        ValueError: A value out of its range, or fields that exclude one another.
    """

    _rules = (grpo_rules, agent_rules)
    _VALID_DICT_FIELDS = trl.GRPOConfig._VALID_DICT_FIELDS + ["environment_kwargs", "srar_judge_kwargs"]

    advantage_shapers: list[str] = field(
        default_factory=list,
        metadata=described(
            "Shapers of the advantages, in the order in which they run: `edas`, `calibadv`, `srar`, or a name that "
            "an installed package registers under `hf_rb.shapers`."
        ),
    )
    correct_reward: str | None = field(
        default=None,
        metadata=described("Reward function that says which completions are correct. Its weight may be 0."),
    )
    correct_threshold: float = field(
        default=0.5, metadata=described("A completion is correct if `correct_reward` gives it at least this.")
    )
    answer_extractor: str = field(
        default="boxed",
        metadata=described(
            "Where the final answer of a completion is: in its last \\boxed{} (`boxed`), after its last #### "
            "(`hashes`), or in its last <answer></answer> (`tag`).",
            choices=["boxed", "hashes", "tag"],
        ),
    )
    edas_alpha: float = field(
        default=0.4,
        metadata=described("Strength of EDAS on groups with several different errors.", range="[0, inf)"),
    )
    edas_beta: float = field(
        default=0.3,
        metadata=described(
            "Strength of EDAS on groups whose wrong answers are all the same. The paper: 0.3 with DAPO, 0.2 with "
            "GRPO.",
            range="[0, inf)",
        ),
    )
    edas_kappa: float = field(
        default=2.0,
        metadata=described("EDAS moves an advantage by at most this part of itself, 1/kappa.", range="(1, inf)"),
    )
    edas_no_answer: str = field(
        default="cluster",
        metadata=described(
            "Wrong completions without an answer are one error (`cluster`, the authors' code), left alone (`skip`), "
            "or an error each (`singleton`).",
            choices=["cluster", "skip", "singleton"],
        ),
    )
    edas_equivalence: str = field(
        default="auto",
        metadata=described(
            "When two answers are the same: as rewards and evaluation compare them, with math-verify where it is "
            "installed (`auto`) or not without it (`math`; needs `pip install 'hf_rb[math]'`); or where their texts "
            "are (`string`).",
            choices=["auto", "math", "string"],
        ),
    )
    edas_warmup_start: int = field(
        default=0, metadata=described("Optimizer step at which EDAS starts.", range="[0, inf)")
    )
    edas_warmup_steps: int = field(
        default=0,
        metadata=described("Steps over which the strengths of EDAS grow to their values.", range="[0, inf)"),
    )
    edas_format_reward: str | None = field(
        default=None,
        metadata=described(
            "Reward function that scores the format. EDAS leaves wrong completions alone to which it gives less than "
            "0.5, as the authors' code does."
        ),
    )
    calibadv_soft: bool = field(
        default=True,
        metadata=described("Whether search steps that found good documents are penalised less for a wrong answer."),
    )
    calibadv_pos_neg_ratio: float | None = field(
        default=1.0,
        metadata=described(
            "Positive over negative advantage of the answers of a group, summed over tokens, after rebalancing; null "
            "does not rebalance.",
            range="(0, inf)",
        ),
    )
    calibadv_max_gain: float | None = field(
        default=None,
        metadata=described(
            "Largest factor by which rebalancing multiplies an advantage. Not in the paper, where it is unbounded.",
            range="[1, inf)",
        ),
    )
    calibadv_weighting: str = field(
        default="token",
        metadata=described(
            "What a token weighs where the answers of a group are balanced: each the same (`token`, the authors' "
            "code), or as much as in the loss (`loss`), which differs with `loss_type: grpo` and `sapo`.",
            choices=["token", "loss"],
        ),
    )
    calibadv_qualify: float = field(
        default=0.7,
        metadata=described("Reward from which on the documents of a completion count as good."),
    )
    calibadv_answer_must_not_call_tool: bool = field(
        default=True,
        metadata=described(
            "Whether a last turn that calls a tool is a search step, and such a completion has no answer; false is "
            "the authors' code."
        ),
    )
    srar_coef: float = field(
        default=1.0,
        metadata=described("Weight of the step scores, which are added to the advantages.", range="[0, inf)"),
    )
    srar_gk: str = field(
        default="code",
        metadata=described(
            "Which completions the score of a step is compared with: those with a criterion that is met in it "
            "(`code`, the authors'), or with a criterion that the judge places in it, met or not (`paper`).",
            choices=["code", "paper"],
        ),
    )
    srar_ddof: int = field(
        default=1,
        metadata=described(
            "1 divides step scores by the unbiased standard deviation, 0 by that of the population.", choices=[0, 1]
        ),
    )
    srar_eps: float = field(
        default=1e-4,
        metadata=described(
            "Added to the standard deviation that divides step scores. The authors' code uses 1e-6.", range="[0, inf)"
        ),
    )
    srar_only_mixed: bool = field(
        default=True,
        metadata=described("Whether only groups with correct and wrong completions are judged."),
    )
    hidden_align_coef: float = field(
        default=0.0,
        metadata=described(
            "Weight of an auxiliary loss that aligns the hidden states before the answers of the correct completions "
            "of a prompt; 0 is off. A reconstruction from the paper's abstract.",
            range="[0, inf)",
        ),
    )
    hidden_align_marker: str | None = field(
        default=None,
        metadata=described(
            "Text before which `hidden_align_coef` takes the hidden state. Defaults to what `answer_extractor` looks "
            "for."
        ),
    )
    hidden_align_all_correct: bool = field(
        default=False,
        metadata=described(
            "Whether `hidden_align_coef` aligns groups with correct completions only too, which have no advantage."
        ),
    )
