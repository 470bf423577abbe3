"""What the configs refuse, and `hf-rb check` in the same words: verb, keys of a good recipe that change, and a part of the message."""

from hf_rb.methods.registry import PACKAGE, methods
from hf_rb.methods.rules import defaults_of


__all__ = ["REFUSED", "SECRETS"]

SFT = [
    ({"profit_threshold": 1.5}, "`profit_threshold` must be in [0, 1]; got 1.5"),
    ({"profit_threshold": -0.1}, "`profit_threshold` must be in [0, 1]; got -0.1"),
    (
        {"profit_threshold": 0.1, "profit_mode": "middle", "profit_threshold_high": 1.1},
        "`profit_threshold_high` must be in [0, 1]; got 1.1",
    ),
    ({"profit_threshold": 0.1, "profit_mode": "above"}, "must be one of 'higher', 'lower', 'middle', 'random'"),
    ({"profit_threshold": 0.1, "profit_normalize": "tokens"}, "must be one of 'all', 'sequence', 'kept'"),
    ({"profit_mode": "lower"}, "`profit_mode: lower` has no effect without `profit_threshold`"),
    ({"profit_threshold_high": 0.5}, "`profit_threshold_high: 0.5` has no effect without"),
    ({"profit_inclusive": True}, "`profit_inclusive: True` has no effect without"),
    ({"profit_normalize": "sequence"}, "`profit_normalize: sequence` has no effect without"),
    (
        {"profit_threshold": 0.1, "profit_threshold_high": 0.5},
        "`profit_threshold_high: 0.5` acts with `profit_mode: middle` only",
    ),
    (
        {"profit_threshold": 0.1, "profit_mode": "middle"},
        "Set `profit_threshold_high` to a number above `profit_threshold`",
    ),
    (
        {"profit_threshold": 0.5, "profit_mode": "middle", "profit_threshold_high": 0.5},
        "between `profit_threshold: 0.5` and `profit_threshold_high: 0.5`",
    ),
    (
        {"profit_threshold": 0.1, "profit_mode": "random", "profit_inclusive": True},
        "`profit_inclusive: true` has no effect with `profit_mode: random`",
    ),
    (
        {"profit_threshold": 0.1, "profit_normalize": "kept", "gradient_accumulation_steps": 2},
        "Set `gradient_accumulation_steps: 1`",
    ),
    ({"profit_threshold": 0.1, "loss_type": "dft"}, "Set `loss_type: nll` for ProFit"),
    (
        {"profit_threshold": 0.1, "label_smoothing_factor": 0.1},
        "`label_smoothing_factor: 0.1` trains on every label",
    ),
    ({"eval_packing": True}, "`eval_packing: true` without `packing: true`"),
]
GOPD = {"objective": "gopd", "lmbda": 1.0, "temperature": 1.0}
AKL_CACHE = {"teacher_cache": "x", "objective": "akl", "lmbda": 0.0, "teacher_model_name_or_path": None}
GKD = [
    ({"objective": "hpd", "lmbda": 1.0}, "`objective: hpd` needs `lmbda: 0.0`"),
    ({"objective": "hpd"}, "got `lmbda: 0.5`"),
    (GOPD | {"lmbda": 0.0}, "`objective: gopd` needs `lmbda: 1.0`"),
    (GOPD | {"lmbda": 0.5}, "`objective: gopd` needs `lmbda: 1.0`"),
    (
        {"objective": "forward_kl", "lmbda": 0.0, "temperature": 2.0},
        "`temperature: 2.0` has no effect with `lmbda: 0.0`",
    ),
    ({"objective": "gopd", "lmbda": 1.0}, "needs `temperature: 1.0`"),
    (GOPD | {"gopd_tis_cap": 5.0}, "Set `use_vllm: true` with `DistillationTrainer`"),
    (GOPD | {"gopd_teacher_column": "kind"}, "Use `DistillationTrainer`"),
    (GOPD | {"gopd_full_vocab": True, "gopd_logratio_clamp": 5.0}, "Remove one of the two"),
    (GOPD | {"reference_model_name_or_path": "x"}, "the reference cancels"),
    ({"kd_alpha": 0.5, "lmbda": 1.0}, "`kd_alpha: 0.5` needs `lmbda: 0.0`"),
    ({"kd_alpha": 0.5}, "`kd_alpha: 0.5` needs `lmbda: 0.0`"),
    ({"objective": "hpd", "kd_alpha": 0.5, "lmbda": 0.0}, "`objective: hpd` is none"),
    ({"loca_alpha": 0.9, "lmbda": 0.5}, "`loca_alpha: 0.9` needs `lmbda: 0.0`"),
    ({"loca_alpha": 0.9, "lmbda": 1.0}, "`loca_alpha: 0.9` needs `lmbda: 0.0`"),
    ({"objective": "hpd", "loca_alpha": 0.9, "lmbda": 0.0}, "`objective: hpd` is none"),
    ({"loca_alpha": 0.9, "lmbda": 0.0, "seq_kd": True}, "the labels are the teacher's own"),
    ({"lmbda": 1.0, "seq_kd": True}, "`seq_kd: true` has no effect"),
    (AKL_CACHE | {"objective": "jsd"}, "Set `objective: akl` or `objective: forward_kl`"),
    (AKL_CACHE | {"lmbda": 0.5}, "`teacher_cache` needs `lmbda: 0.0`"),
    (AKL_CACHE | {"lmbda": 1.0}, "`teacher_cache` needs `lmbda"),
    (AKL_CACHE | {"loss_impl": "dense"}, "Set `loss_impl: chunked`"),
    (AKL_CACHE | {"seq_kd": True}, "Set `seq_kd: false`"),
    (AKL_CACHE | {"teacher_model_name_or_path": "y"}, "are two teachers"),
    ({"objective": "akl", "beta": 0.1}, "`beta: 0.1` acts on `objective: jsd` only"),
    ({"akl_mu": 0.3}, "`akl_mu: 0.3` acts on `objective: akl` only"),
    ({"hpd_sample": False}, "acts on `objective: hpd` only"),
    ({"reward_scale": 1.25}, "acts on `objective: gopd` only"),
    ({"objective": "akl", "akl_mu": 0.0}, "`akl_mu` must be in (0, 1]; got 0.0"),
    ({"loca_alpha": 1.5, "lmbda": 0.0}, "`loca_alpha` must be in (0, 1]; got 1.5"),
    ({"kd_alpha": -0.1, "lmbda": 0.0}, "`kd_alpha` must be in [0, 1]"),
    ({"objective": "fkl"}, "`objective` cannot be 'fkl'"),
    ({"packing": True}, "`packing: true` needs completions from the dataset"),
    ({"padding_free": True, "lmbda": 0.0, "seq_kd": True}, "and `seq_kd: true` generates them"),
    ({"loss_type": "dft"}, "Remove `loss_type`"),
    ({"label_smoothing_factor": 0.1}, "acts on SFT's loss"),
    ({"eval_packing": True, "lmbda": 0.0}, "`eval_packing: true` without `packing: true`"),
]
EXOPD = {"objective": "gopd", "reward_scale": 1.25}
ONLY_GKD = {"kd_alpha": 0.5, "loca_alpha": 0.95, "teacher_cache": "x", "hpd_sample": False, "hpd_reinforce": False}
DISTILLATION = [
    ({"objective": "hpd"}, "`objective: hpd` trains on the completions of the dataset"),
    ({"objective": "akl", "beta": 0.5}, "`beta: 0.5` acts on `objective: jsd` only"),
    (EXOPD | {"temperature": 0.7}, "`objective: gopd` needs `temperature: 1.0`"),
    (EXOPD | {"top_p": 0.9}, "`objective: gopd` needs `top_p: 1.0`"),
    (EXOPD | {"top_k": 50}, "`objective: gopd` needs `top_k: 0`"),
    (EXOPD | {"min_p": 0.1}, "`objective: gopd` needs `min_p: None`"),
    (EXOPD | {"repetition_penalty": 1.1}, "needs `repetition_penalty: 1.0`"),
    (
        EXOPD | {"generation_kwargs": {"do_sample": False}},
        "`generation_kwargs: {do_sample: False}` replaces plain draws",
    ),
    ({"objective": "akl", "akl_mu": 1.5}, "`akl_mu` must be in (0, 1]"),
    ({"reward_scale": 1.25}, "`reward_scale: 1.25` acts on `objective: gopd` only"),
    (EXOPD | {"reward_scale": -1.0}, "`reward_scale` must be in"),
    (EXOPD | {"gopd_aggregation": "mean"}, "`gopd_aggregation` cannot be 'mean'"),
    (EXOPD | {"gopd_tis_cap": 5.0}, "`gopd_tis_cap: 5.0` needs a sampler that reports log-probabilities"),
    (EXOPD | {"gopd_full_vocab": True, "gopd_logratio_clamp": 5.0}, "acts on sampled tokens"),
    (
        EXOPD | {"gopd_full_vocab": True, "gopd_teacher_column": "domain"},
        "compares the student with one teacher's logits",
    ),
    (
        EXOPD | {"teacher_model_name_or_path": {"a": "b"}},
        "go together; got `teacher_model_name_or_path: {'a': 'b'}`",
    ),
    (EXOPD | {"reward_scale": 1.0, "reference_model_name_or_path": "x"}, "has no effect with `reward_scale: 1.0`"),
    *(
        ({key: value}, f"`{key}` acts on the completions of the dataset, which GKD alone distils on. Use `GKDTrainer`")
        for key, value in ONLY_GKD.items()
    ),
]
EDAS = {"advantage_shapers": ["edas"], "correct_reward": "exact_answer_reward"}
CALIBADV = {"advantage_shapers": ["calibadv"], "environment": "search"}
SRAR = {"advantage_shapers": ["srar"], "srar_judge": "http://localhost:8000/v1", "srar_judge_model": "m"}
GRPO = [
    ({**EDAS, "advantage_shapers": ["eda"]}, "cannot hold 'eda'; did you mean 'edas'?"),
    ({"advantage_shapers": ["other"]}, "it must be one of 'calibadv', 'edas', "),
    ({"advantage_shapers": ["os:system"]}, "add `--allow_local_code os:system` if you trust it"),
    ({"advantage_shapers": ["edas"]}, "needs to know which completions are wrong. Set `correct_reward`"),
    ({"advantage_shapers": ["pass_at_k"]}, "needs to know which completions are correct. Set `correct_reward`"),
    (
        {**EDAS, "advantage_shapers": ["pass_at_k"], "pass_at_k_k": 9},
        "`pass_at_k_k: 9` must be below `num_generations: 8`",
    ),
    (
        {**EDAS, "advantage_shapers": ["pass_at_k"], "pass_at_k_k": 8},
        "with as many, a group has one subset, and its completions no advantage",
    ),
    ({**EDAS, "advantage_shapers": ["edas", "edas"]}, "has a shaper twice"),
    (
        {**EDAS, **CALIBADV, "srar_judge": "tiny", "advantage_shapers": ["srar", "calibadv"]},
        "Write `advantage_shapers: [calibadv, srar]` instead of [srar, calibadv]",
    ),
    ({"edas_alpha": 0.2}, "no effect without the shaper 'edas'. Write `advantage_shapers: [edas]`"),
    ({"srar_coef": 0.5}, "no effect without the shaper 'srar'"),
    ({"srar_eps": 1e-6}, "no effect without the shaper 'srar'"),
    ({"edas_format_reward": "x"}, "no effect without the shaper 'edas'"),
    ({"calibadv_step_field": "q"}, "has no effect without the shaper 'calibadv'"),
    ({"srar_judge": "tiny"}, "has no effect without the shaper 'srar'"),
    ({"srar_step_pattern": "x"}, "has no effect without the shaper 'srar'"),
    ({"srar_eps": -1.0}, "`srar_eps` must be in [0, inf)"),
    ({**EDAS, "edas_kappa": 1.0}, "`edas_kappa` must be in (1, inf); got 1.0"),
    ({**EDAS, "edas_alpha": -0.1}, "`edas_alpha` must be in [0, inf)"),
    ({**EDAS, "edas_no_answer": "drop"}, "`edas_no_answer` cannot be 'drop'"),
    (
        {**CALIBADV, "multi_objective_aggregation": "normalize_then_sum"},
        "or `calibadv_pos_neg_ratio: null`",
    ),
    ({"hidden_align_coef": 0.1}, "aligns correct completions. Set `correct_reward`"),
    ({"hidden_align_marker": "=>"}, "no effect with `hidden_align_coef: 0.0`"),
    ({"hidden_align_all_correct": True}, "no effect with `hidden_align_coef: 0.0`"),
    (
        {"hidden_align_marker": "", "hidden_align_coef": 0.1, "correct_reward": "exact_answer_reward"},
        "`hidden_align_marker` is empty",
    ),
    ({"correct_threshold": 0.9}, "`correct_threshold: 0.9` has no effect without `correct_reward`"),
    ({**CALIBADV, "calibadv_soft": False, "calibadv_pos_neg_ratio": None}, "leave CalibAdv nothing to do"),
    (
        {**CALIBADV, "calibadv_pos_neg_ratio": None, "calibadv_max_gain": 5.0},
        "`calibadv_max_gain: 5.0` has no effect",
    ),
    (
        {**CALIBADV, "calibadv_pos_neg_ratio": None, "calibadv_weighting": "loss"},
        "`calibadv_weighting: loss` has no",
    ),
    ({**CALIBADV, "calibadv_soft": False, "calibadv_qualify": 0.5}, "no effect with `calibadv_soft: false`"),
    ({**CALIBADV, "calibadv_soft": False, "calibadv_step_field": "q"}, "no effect with `calibadv_soft: false`"),
    ({**CALIBADV, "calibadv_step_field": "q", "calibadv_qualify": 0.5}, "no effect with `calibadv_step_field`"),
    ({"environment": "serach"}, "`environment` cannot be 'serach'; did you mean 'search'"),
    ({"environment_kwargs": {"top_k": 3}}, "needs an environment: set `environment: search`"),
    ({"environment": "search", "environment_kwargs": {"topk": 3}}, "`environment_kwargs` has topk"),
    ({"environment": "search", "environment_kwargs": {"top_k": 0}}, "write a whole number of 1 or more"),
    ({"environment": "search", "environment_kwargs": {"top_k": "two"}}, "write a whole number of 1 or more"),
    ({**SRAR, "srar_step_pattern": "("}, "`srar_step_pattern: (` is not a regular expression"),
    ({"advantage_shapers": ["srar"], "srar_judge": "localhost:8000"}, "write the base URL"),
    ({"advantage_shapers": ["srar"], "srar_judge": "http://localhost/v1"}, "set `srar_judge_model`"),
    ({**SRAR, "srar_judge": "tiny"}, "`srar_judge_model` acts only"),
    (
        {"advantage_shapers": ["srar"], "srar_judge": "tiny", "srar_judge_timeout": 5.0},
        "`srar_judge_timeout` acts only",
    ),
    ({**SRAR, "srar_judge_timeout": 0.0}, "`srar_judge_timeout` must be in (0, inf)"),
    ({**SRAR, "srar_judge_retries": -1}, "`srar_judge_retries` must be in [0, inf)"),
    ({**SRAR, "srar_judge_concurrency": 0}, "`srar_judge_concurrency` must be in [1, inf)"),
]
KEY = "sk-a1B2c3"
SECRETS = (KEY, "hf_abcdefgh")
GRPO += [
    (SRAR | keys, "environment variable")
    for keys in (
        {"srar_judge_api_key_env": KEY},
        {"srar_judge_api_key_env": "hf_abcdefgh"},
        {"srar_judge": f"http://user:{KEY}@localhost/v1"},
        {"srar_judge": f"http://localhost/v1?api_key={KEY}"},
        {"srar_judge_kwargs": {"api_key": KEY}},
        {"srar_judge_kwargs": {"Authorization": f"Bearer {KEY}"}},
    )
]
REFUSED = {"sft": SFT, "gkd": GKD, "distillation": DISTILLATION, "grpo": GRPO}

# By the records: Liger's kernels under any objective that is not TRL's own, and flags of our methods that are off; those of another
# package are keys only where it is on.
for name, entry in methods("objective").items():
    completions = entry.method.completions
    lmbda = {"lmbda": 1.0, "temperature": 1.0} if completions == "student" else {"lmbda": 0.0}
    liger = {"objective": name, "use_liger_kernel": True}
    words = f"`use_liger_kernel: true` replaces the model's forward pass, and `objective: {name}` has a loss"
    GKD.append((liger | lmbda, words))
    if completions != "dataset" and name != "jsd":
        DISTILLATION.append((liger, words))
    for field, default in defaults_of(entry.method).items() if entry.package == PACKAGE else ():
        if isinstance(default, float | bool):
            other = not default if isinstance(default, bool) else default / 2
            GKD.append(({"lmbda": 0.0, field: other}, f"acts on `objective: {name}` only, and the objective is 'jsd'"))
for name, entry in methods("shaper").items():
    for field, default in defaults_of(entry.method).items() if entry.package == PACKAGE else ():
        if isinstance(default, float | bool) and default:
            other = not default if isinstance(default, bool) else default + 1
            GRPO.append(({field: other}, f"has no effect without the shaper {name!r}"))
