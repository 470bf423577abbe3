"""What the fields of a trainer config may not be together. Standard library only: `hf-rb check` runs these without torch."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from hf_rb.methods.registry import BUILT_IN, registered_shapers


__all__ = [
    "cache_rules",
    "distillation_rules",
    "gkd_rules",
    "grpo_rules",
    "grpo_warnings",
    "only_gkd",
    "packing_rules",
    "profit_rules",
]


def profit_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with the ProFit fields of an [`SFTConfig`]."""
    if config.profit_threshold is None:
        changed = {
            "profit_mode": config.profit_mode != "higher",
            "profit_threshold_high": config.profit_threshold_high is not None,
            "profit_inclusive": config.profit_inclusive,
            "profit_normalize": config.profit_normalize != "all",
        }
        for name in (name for name, is_changed in changed.items() if is_changed):
            yield (
                f"`{name}: {getattr(config, name)}` has no effect without `profit_threshold`. "
                f"Set `profit_threshold: 0.1` (the authors' recommendation), or remove `{name}`."
            )
        return

    low, high = config.profit_threshold, config.profit_threshold_high
    if config.profit_mode == "middle" and (high is None or high <= low):
        yield (
            f"`profit_mode: middle` keeps probabilities between `profit_threshold: {low}` and `profit_threshold_high: {high}`. "
            "Set `profit_threshold_high` to a number above `profit_threshold`."
        )
    if config.profit_mode != "middle" and high is not None:
        yield (
            f"`profit_threshold_high: {high}` acts with `profit_mode: middle` only, and the mode is {config.profit_mode!r}. "
            "Remove `profit_threshold_high`, or set `profit_mode: middle`."
        )
    if config.profit_mode == "random" and config.profit_inclusive:
        yield "`profit_inclusive: true` has no effect with `profit_mode: random`, which compares no probability. Remove it."
    if config.profit_normalize == "kept" and config.gradient_accumulation_steps > 1:
        yield (
            "`profit_normalize: kept` divides by the number of kept tokens, which is not known before the last of "
            f"`gradient_accumulation_steps: {config.gradient_accumulation_steps}` has run. Set `gradient_accumulation_steps: 1` "
            "with a larger `per_device_train_batch_size`, or `profit_normalize: all`."
        )
    if config.loss_type == "dft":
        yield (
            "`loss_type: dft` weighs tokens by their probability and `profit_threshold` gates them by it: two methods. "
            "Set `loss_type: nll` for ProFit, or remove `profit_threshold` for DFT."
        )
    if config.label_smoothing_factor > 0:
        yield (
            f"`label_smoothing_factor: {config.label_smoothing_factor}` trains on every label of the vocabulary, and "
            "`profit_threshold` gates the one label of the data. Set `label_smoothing_factor: 0`, or remove `profit_threshold`."
        )


def packing_rules(config: Any) -> Iterator[str]:
    """Yields what makes packed sequences see each other in every model: rows of evaluation whose collator keeps no positions."""
    if config.eval_packing and not config.packing and config.packing_strategy != "wrapped":
        if not config.allow_leaking_packing:
            yield (
                "`eval_packing: true` without `packing: true`: TRL's collator then keeps no positions, and the packed sequences of "
                "the evaluation see each other in every model. Set `packing: true` too, or remove `eval_packing`."
            )


# Fields that one objective reads, with the defaults that are silent under the others.
_FIELDS_OF = {
    "akl": {"akl_mu": 0.5, "akl_head_rule": "paper"},
    "hpd": {"hpd_sample": True, "hpd_reinforce": True},
    "gopd": {
        "reward_scale": 1.0,
        "reference_model_name_or_path": None,
        "gopd_aggregation": "seq-mean-token-mean",
        "gopd_tis_cap": None,
        "gopd_logratio_clamp": None,
        "gopd_full_vocab": False,
        "gopd_teacher_column": None,
    },
}
_DIVERGENCES = ("jsd", "forward_kl", "reverse_kl", "akl")


def _objective_rules(config: Any, beta: float) -> Iterator[str]:
    """Yields what is wrong with the fields that the distillation configs share; `beta` is the config's default."""
    if config.objective != "jsd" and config.beta != beta:
        yield (
            f"`beta: {config.beta}` acts on `objective: jsd` only, and the objective is {config.objective!r}. Remove `beta`, or "
            "set `objective: jsd`."
        )
    for objective, defaults in _FIELDS_OF.items():
        for name, default in defaults.items():
            value = getattr(config, name, default)
            if objective != config.objective and value != default:
                yield (
                    f"`{name}: {value}` acts on `objective: {objective}` only, and the objective is {config.objective!r}. "
                    f"Remove `{name}`, or set `objective: {objective}`."
                )
    if config.objective == "gopd":
        yield from _gopd_rules(config)


def _gopd_rules(config: Any) -> Iterator[str]:
    # Anything that makes the completions other than draws from the distribution that the loss is about.
    neutral = {
        "temperature": (1.0,),
        "top_p": (1.0,),
        "top_k": (0,),
        "min_p": (None, 0.0),
        "repetition_penalty": (1.0,),
    }
    for name, values in neutral.items():
        value = getattr(config, name, values[0])
        if value not in values:
            yield (
                f"`objective: gopd` needs `{name}: {values[0]}`: its loss is about the distribution that completions are drawn "
                f"from; got `{name}: {value}`."
            )
    overridden = getattr(config, "generation_kwargs", None) or {}
    for name in sorted({*neutral, "do_sample", "num_beams"} & {*overridden} if isinstance(overridden, dict) else ()):
        yield (
            f"`generation_kwargs: {{{name}: {overridden[name]}}}` replaces plain draws from the student, which `objective: gopd` "
            f"is about. Remove `{name}`."
        )
    if config.reward_scale == 1 and config.reference_model_name_or_path is not None:
        yield (
            "`reference_model_name_or_path` has no effect with `reward_scale: 1.0`, where the reference cancels. Set "
            "`reward_scale: 1.25` (the paper's value), or remove the reference."
        )
    for name in ("gopd_tis_cap", "gopd_logratio_clamp"):
        if config.gopd_full_vocab and getattr(config, name) is not None:
            yield (
                f"`{name}: {getattr(config, name)}` acts on sampled tokens, and `gopd_full_vocab: true` is about all of them. "
                "Remove one of the two."
            )


def gkd_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with the fields of a [`GKDConfig`]."""
    yield from _objective_rules(config, beta=0.5)
    objective, lmbda = config.objective, config.lmbda
    if objective == "hpd" and lmbda > 0:
        yield (
            f"`objective: hpd` needs `lmbda: 0.0`: it trains on the completions of the dataset; got `lmbda: {lmbda}`."
        )
    if objective == "gopd" and lmbda < 1:
        yield (
            "`objective: gopd` needs `lmbda: 1.0`: its advantage is defined on tokens that the student has drawn; got "
            f"`lmbda: {lmbda}`."
        )
    if objective == "gopd" and config.gopd_tis_cap is not None:
        yield (
            f"`gopd_tis_cap: {config.gopd_tis_cap}` needs the sampler's log-probabilities, and the sampler of GKD is the model "
            "in training itself. Remove it, or use `DistillationTrainer` with `use_vllm: true`."
        )
    if objective == "gopd" and config.gopd_teacher_column is not None:
        yield (
            "`gopd_teacher_column` needs the columns of the dataset, which GKD has turned into tokens. Use "
            "`DistillationTrainer` (`hf-rb distillation`)."
        )
    mixed = {"kd_alpha": config.kd_alpha != 1, "loca_alpha": config.loca_alpha is not None}
    for name in (name for name, is_set in mixed.items() if is_set):
        value = getattr(config, name)
        if lmbda > 0:
            yield (
                f"`{name}: {value}` needs `lmbda: 0.0`: it reads the labels of the dataset, which sampled completions do not "
                f"have; got `lmbda: {lmbda}`."
            )
        if objective not in _DIVERGENCES:
            yield (
                f"`{name}: {value}` acts on a divergence from the teacher, and `objective: {objective}` is none. Choose one of "
                f"{', '.join(_DIVERGENCES)}, or remove `{name}`."
            )
    if lmbda == 0 and not config.seq_kd and config.temperature not in (0.9, 1.0):
        yield (
            f"`temperature: {config.temperature}` has no effect with `lmbda: 0.0`: it is that of sampling, nothing is sampled, and the "
            "loss is at temperature 1, as in TRL. Remove it."
        )
    if config.seq_kd and lmbda == 1:
        yield (
            "`seq_kd: true` has no effect with `lmbda: 1.0`, where every completion is the student's. Set `lmbda` below 1, or "
            "remove `seq_kd`."
        )
    if config.seq_kd and config.loca_alpha is not None:
        yield (
            f"`loca_alpha: {config.loca_alpha}` corrects the teacher by the labels of the dataset, and with `seq_kd: true` the "
            "labels are the teacher's own. Remove one of the two."
        )
    if config.teacher_cache is not None:
        yield from cache_rules(config)
    if (lmbda > 0 or config.seq_kd) and (config.packing or config.padding_free):
        name = "packing" if config.packing else "padding_free"
        reason = "seq_kd: true" if lmbda == 0 else f"lmbda: {lmbda}"
        yield (
            f"`{name}: true` needs completions from the dataset, and `{reason}` generates them from one prompt a row. Set "
            f"`{name}: false`, or `lmbda: 0.0` without `seq_kd`."
        )
    if config.loss_type != "nll":
        yield f"`loss_type: {config.loss_type}` is a loss of SFT, and `objective: {objective}` replaces it. Remove `loss_type`."
    if config.label_smoothing_factor > 0:
        yield (
            f"`label_smoothing_factor: {config.label_smoothing_factor}` acts on SFT's loss, which `objective: {objective}` "
            "replaces. Remove it."
        )


def cache_rules(config: Any) -> Iterator[str]:
    """Yields what a [`GKDConfig`] may not say with a cached teacher."""
    if config.objective not in ("forward_kl", "akl"):
        yield (
            f"`teacher_cache` holds the teacher's most probable tokens, and `objective: {config.objective}` needs all of them. "
            "Set `objective: forward_kl` or `objective: akl`, or give `teacher_model_name_or_path` instead of the cache."
        )
    if config.lmbda > 0:
        yield (
            "`teacher_cache` needs `lmbda: 0.0`: it holds the completions of the dataset, not those that the student will "
            f"sample; got `lmbda: {config.lmbda}`."
        )
    for name, wrong, remedy in (
        ("seq_kd", True, "seq_kd: false"),
        ("loss_impl", "dense", "loss_impl: chunked"),
    ):
        if getattr(config, name) == wrong:
            yield (
                f"`{name}: {str(wrong).lower()}` needs the teacher itself, and `teacher_cache` is there to leave it out. Set "
                f"`{remedy}`, or give `teacher_model_name_or_path` instead of the cache."
            )
    if config.teacher_model_name_or_path is not None:
        yield "`teacher_cache` and `teacher_model_name_or_path` are two teachers. Remove one."


def only_gkd(name: str) -> str | None:
    """Returns what to say of a field that acts on the completions of a dataset, where another trainer is configured."""
    if name not in ("kd_alpha", "loca_alpha", "hpd_sample", "hpd_reinforce", "teacher_cache"):
        return None
    return (
        f"`{name}` acts on the completions of the dataset, which GKD alone distils on. Use `GKDTrainer` (`hf-rb gkd`) with "
        f"`lmbda: 0.0`, or remove `{name}`."
    )


def distillation_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with our fields of a [`DistillationConfig`]."""
    yield from _objective_rules(config, beta=1.0)
    if config.objective == "hpd":
        yield (
            "`objective: hpd` trains on the completions of the dataset, and `DistillationTrainer` on the student's own. Use "
            "`GKDTrainer` (`hf-rb gkd`) with `lmbda: 0.0`."
        )
    if config.gopd_tis_cap is not None and not config.use_vllm:
        yield (
            f"`gopd_tis_cap: {config.gopd_tis_cap}` needs a sampler that reports log-probabilities, and generation by transformers "
            "samples from the model in training itself. Set `use_vllm: true`, or remove `gopd_tis_cap`."
        )
    if config.gopd_full_vocab and config.gopd_teacher_column is not None:
        yield (
            "`gopd_full_vocab: true` compares the student with one teacher's logits, and `gopd_teacher_column` names several "
            "teachers. Remove one of the two."
        )
    several = isinstance(config.teacher_model_name_or_path, dict)
    if config.teacher_model_name_or_path is not None and several != (config.gopd_teacher_column is not None):
        yield (
            "Several teachers, `teacher_model_name_or_path: {math: ..., code: ...}`, and `gopd_teacher_column`, the dataset column "
            f"that chooses among them, go together; got `teacher_model_name_or_path: {config.teacher_model_name_or_path}` and "
            f"`gopd_teacher_column: {config.gopd_teacher_column}`."
        )


# Fields that one shaper reads, or the auxiliary loss, with the defaults that are silent without it.
_FIELDS_OF_SHAPER = {
    "edas": {
        "edas_alpha": 0.4,
        "edas_beta": 0.3,
        "edas_kappa": 2.0,
        "edas_no_answer": "cluster",
        "edas_equivalence": "auto",
        "edas_warmup_start": 0,
        "edas_warmup_steps": 0,
        "edas_format_reward": None,
    },
    "calibadv": {
        "calibadv_soft": True,
        "calibadv_pos_neg_ratio": 1.0,
        "calibadv_max_gain": None,
        "calibadv_weighting": "token",
        "calibadv_qualify": 0.7,
        "calibadv_answer_must_not_call_tool": True,
    },
    "srar": {"srar_coef": 1.0, "srar_gk": "code", "srar_ddof": 1, "srar_eps": 1e-4, "srar_only_mixed": True},
}
_TOKEN_SHAPERS = ("calibadv", "srar")


def grpo_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with the fields of a [`GRPOConfig`]."""
    names = config.advantage_shapers
    if isinstance(names, str):
        yield f"`advantage_shapers` is a list: write `advantage_shapers: [{names}]`."
        return
    yield from _shaper_name_rules(names)
    for shaper, defaults in _FIELDS_OF_SHAPER.items():
        for name, default in defaults.items():
            if shaper not in names and getattr(config, name) != default:
                yield (
                    f"`{name}: {getattr(config, name)}` has no effect without the shaper {shaper!r}. Write `advantage_shapers: "
                    f"[{', '.join([*names, shaper])}]`, or remove `{name}`."
                )
    if "edas" in names and config.correct_reward is None:
        yield (
            "`advantage_shapers: [edas]` needs to know which completions are wrong. Set `correct_reward` to the name of a reward "
            "function, such as `correct_reward: exact_answer_reward`."
        )
    if config.hidden_align_coef > 0 and config.correct_reward is None:
        yield (
            f"`hidden_align_coef: {config.hidden_align_coef}` aligns correct completions. Set `correct_reward` to the name of the "
            "reward function that says which are."
        )
    if config.correct_reward is None and config.correct_threshold != 0.5:
        yield f"`correct_threshold: {config.correct_threshold}` has no effect without `correct_reward`. Set it, or remove the threshold."
    if config.hidden_align_marker == "":
        yield "`hidden_align_marker` is empty, and a hidden state is taken before it. Write the text with which answers begin."
    if "calibadv" in names:
        yield from _calibadv_rules(config)
    if "calibadv" in names and config.calibadv_pos_neg_ratio is not None:
        if config.multi_objective_aggregation == "normalize_then_sum":
            yield (
                "`multi_objective_aggregation: normalize_then_sum` centres advantages over the batch, and CalibAdv balances positive "
                "with negative ones in each group, which may have one kind only. Set `multi_objective_aggregation: "
                "sum_then_normalize`, or `calibadv_pos_neg_ratio: null`."
            )
    for name, default in (("hidden_align_marker", None), ("hidden_align_all_correct", False)):
        if config.hidden_align_coef == 0 and getattr(config, name) != default:
            yield f"`{name}: {getattr(config, name)}` has no effect with `hidden_align_coef: 0.0`. Set the weight, or remove it."


def _calibadv_rules(config: Any) -> Iterator[str]:
    """Fields of CalibAdv that another of its fields has switched off."""
    if not config.calibadv_soft and config.calibadv_pos_neg_ratio is None:
        yield (
            "`calibadv_soft: false` and `calibadv_pos_neg_ratio: null` leave CalibAdv nothing to do. Remove one of them, or `calibadv`."
        )
    without = {
        "calibadv_pos_neg_ratio: null": (
            config.calibadv_pos_neg_ratio is None,
            {"calibadv_max_gain": None, "calibadv_weighting": "token"},
        ),
        "calibadv_soft: false": (not config.calibadv_soft, {"calibadv_qualify": 0.7, "calibadv_step_field": None}),
        "calibadv_step_field": (config.calibadv_step_field is not None, {"calibadv_qualify": 0.7}),
    }
    for reason, (switched_off, fields) in without.items():
        for name, default in fields.items():
            if switched_off and getattr(config, name) != default:
                yield f"`{name}: {getattr(config, name)}` has no effect with `{reason}`. Remove one of the two."


def _shaper_name_rules(names: list[str]) -> Iterator[str]:
    known = registered_shapers() if names else {}
    for name in names:
        if name in known:
            continue
        if ":" in name:
            yield (
                f"`advantage_shapers` names code, {name!r}. Code in a recipe is imported only if the command line says so too: add "
                f"`--allow_local_code {name}` if you trust it."
            )
            continue
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it must be one of {', '.join(map(repr, known))}."
        yield f"`advantage_shapers` cannot hold {name!r}; {hint}"
    ours = [name for name in names if name in BUILT_IN]
    ordered = sorted(ours, key=list(BUILT_IN).index)
    if len(set(names)) < len(names):
        yield f"`advantage_shapers: [{', '.join(names)}]` has a shaper twice. Each runs once."
    elif ours != ordered:
        yield (
            "Advantage shapers run in the order sequence, token-wise factors, token-wise offsets. Write `advantage_shapers: "
            f"[{', '.join(ordered)}]` instead of [{', '.join(ours)}]."
        )


def grpo_warnings(config: Any, token_shapers: bool | None = None) -> Iterator[str]:
    """
    Yields what acts otherwise than one may think with the fields of a [`GRPOConfig`].

    Args:
        config (`GRPOConfig`, or anything with its fields):
            The config.
        token_shapers (`bool`, *optional*):
            Whether a shaper makes advantages of tokens. By default it follows from `advantage_shapers`.
    """
    if token_shapers is None:
        token_shapers = any(name in _TOKEN_SHAPERS for name in config.advantage_shapers)
    if token_shapers:
        why = {
            "importance_sampling_level: sequence": config.importance_sampling_level == "sequence",
            "loss_type: vespo": config.loss_type == "vespo",
            "off_policy_mask_threshold": config.off_policy_mask_threshold is not None,
        }
        for name in (name for name, is_set in why.items() if is_set):
            yield (
                f"`{name}` is defined with one advantage a completion, and the shapers make one a token: what depends on its sign "
                "is decided token by token."
            )
    if "edas" in config.advantage_shapers and config.mask_truncated_completions and config.edas_no_answer == "cluster":
        yield (
            "`mask_truncated_completions` takes truncated completions out of the loss, and to EDAS they remain one error, that of "
            "no answer. `edas_no_answer: skip` leaves them out there too."
        )
    if (
        "calibadv" in config.advantage_shapers
        and config.calibadv_pos_neg_ratio is not None
        and config.calibadv_weighting == "token"
        and config.loss_type in ("grpo", "sapo")
    ):
        yield (
            f"`loss_type: {config.loss_type}` averages over the tokens of each completion first, and CalibAdv balances answers token by "
            "token, as in its paper's loss. `calibadv_weighting: loss` balances what this loss adds up."
        )
    once = config.steps_per_generation in (None, config.gradient_accumulation_steps)
    if config.hidden_align_coef > 0 and (config.num_iterations > 1 or not once):
        yield (
            "`hidden_align_coef` aligns with states of the policy that wrote the completions, and here it takes several steps on "
            "them: the gradient is exact in the first only."
        )
