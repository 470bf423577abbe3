"""What a config refuses, `hf-rb check` refuses in the same words."""

from pathlib import Path

import pytest
from all_rows import TRAINERS
from refusals import REFUSED, SECRETS

from hf_rb.cli.check import check


COMMON = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none"}
DATA = {"model_name_or_path": "tiny:student", "dataset_name": "tiny:math"}
TEACHER = {"teacher_model_name_or_path": "tiny:teacher"}
RECIPES = {
    "sft": {"dataset_config": "prompt_completion"},
    "gkd": {"dataset_config": "prompt_completion", **TEACHER},
    "distillation": {"dataset_config": "prompt_only", **TEACHER},
    "grpo": {"dataset_config": "rubric", "reward_funcs": ["exact_answer_reward"]},
}
ROWS = [(verb, *row) for verb, rows in REFUSED.items() for row in rows]


def config_of(verb, keys):
    return TRAINERS[verb].config(**{**COMMON, **keys})


def found_in(verb, keys):
    """Errors of a recipe with these keys."""
    return check(Path("recipe.yaml"), {**COMMON, **DATA, **RECIPES[verb], **keys}, verb).errors


@pytest.mark.parametrize(("verb", "keys", "message"), ROWS, ids=[f"{verb}-{keys}" for verb, keys, _ in ROWS])
def test_config_and_check_refuse_in_the_same_words(verb, keys, message):
    with pytest.raises((TypeError, ValueError)) as error:
        config_of(verb, keys)
    found = found_in(verb, keys)
    assert message in str(error.value) and str(error.value) in found
    assert len(found) <= 3, found  # one mistake is not drowned in what follows from it
    assert not any(secret in text for secret in SECRETS for text in (str(error.value), *found))


def test_config_wants_a_list_of_shapers():
    """Of a recipe, the parser makes a list."""
    with pytest.raises(ValueError, match=r"is a list: write `advantage_shapers: \[edas\]`"):
        config_of("grpo", {"advantage_shapers": "edas"})
    assert found_in("grpo", {"advantage_shapers": "edas", "correct_reward": "exact_answer_reward"}) == []


MIXED = {"objective": "akl", "loca_alpha": 0.9, "kd_alpha": 0.5, "lmbda": 0.0}
ALLOWED = [
    *(
        ("gkd", {"objective": objective, "lmbda": lmbda})
        for objective in ("jsd", "forward_kl", "reverse_kl", "akl", "skewed_kl")
        for lmbda in (0.0, 0.5, 1.0)
    ),
    ("gkd", {"objective": "hpd", "lmbda": 0.0}),
    ("gkd", {"objective": "gopd", "lmbda": 1.0, "temperature": 1.0}),
    ("gkd", MIXED),
    ("gkd", MIXED | {"teacher_cache": "x", "teacher_model_name_or_path": None}),
    ("gkd", {"objective": "hpd", "lmbda": 0.0, "seq_kd": True}),
    ("distillation", {"use_liger_kernel": True}),
    ("sft", {"profit_threshold": 0.1, "use_liger_kernel": True}),
    ("sft", {"eval_packing": True, "allow_leaking_packing": True}),
    ("grpo", {"advantage_shapers": ["edas"], "correct_reward": "exact_answer_reward"}),
    ("grpo", {"advantage_shapers": ["calibadv"], "environment": "search", "environment_kwargs": '{"top_k": 2}'}),
]


@pytest.mark.parametrize(("verb", "keys"), ALLOWED, ids=[f"{verb}-{keys}" for verb, keys in ALLOWED])
def test_config_and_check_accept_the_same(verb, keys):
    config_of(verb, keys)
    assert found_in(verb, keys) == []
