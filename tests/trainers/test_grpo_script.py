import json
import sys
from pathlib import Path

import pytest
import yaml
from helpers.plugins import forget
from transformers import AutoModelForCausalLM

from hf_rb import tiny
from hf_rb.cli import main
from hf_rb.cli.check import check, read_recipe
from hf_rb.methods import registry
from hf_rb.scripts import grpo


pytestmark = pytest.mark.usefixtures("small_embedded")

RECIPE = {
    "model_name_or_path": "tiny:student",
    "dataset_name": "tiny:math",
    "dataset_config": "prompt_only",
    "output_dir": "out",
    "reward_funcs": ["exact_answer_reward", "answer_format_reward"],
    "reward_weights": [0.9, 0.1],
    "correct_reward": "exact_answer_reward",
    "answer_extractor": "hashes",
    "advantage_shapers": ["edas"],
    "edas_beta": 0.2,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 8,
    "max_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
}

CODE = """
from dataclasses import dataclass

from hf_rb.advantages import SequenceShaper, Shaped
from hf_rb.methods import ShaperMethod, flag

def length(completion_ids, kind, **kwargs):
    return [len(ids) / 8 + len(name) for ids, name in zip(completion_ids, kind)]

@dataclass
class DoubleFlags:
    double_factor: float = flag(2.0, "Factor.", range="(0, inf)")

class Double(SequenceShaper):
    method = ShaperMethod(key="double", name="Double", summary="Doubles advantages.", flags=DoubleFlags)

    @classmethod
    def from_config(cls, args, trainer):
        double = cls()
        double.factor = args.double_factor
        return double

    def shape(self, ctx, advantages):
        return Shaped(self.factor * advantages)
"""
LOCAL = {
    "reward_funcs": ["exact_answer_reward", "mine:length"],
    "advantage_shapers": ["edas", {"mine:Double": {"factor": 3.0}}],
    "reward_weights": None,
}
ALLOW = ["--allow_local_code", "mine:length", "--allow_local_code", "mine:Double"]


@pytest.fixture(autouse=True)
def nothing_stays_allowed(monkeypatch):
    forget(monkeypatch)  # a module of the same name in another folder
    yield
    registry.LOCAL.clear()
    sys.modules.pop("mine", None)


def recipe(**keys):
    """The recipe with other keys; `None` removes a key."""
    keys = {key: value for key, value in (RECIPE | keys).items() if value is not None}
    Path("recipe.yaml").write_text(yaml.safe_dump(keys))
    return ["--config", "recipe.yaml"]


def first_log():
    return json.loads(Path("out/trainer_state.json").read_text())["log_history"][0]


def test_script_runs_a_recipe_and_logs_its_shaper(capsys):
    grpo.main([*recipe(eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4), "--log_completions"])
    AutoModelForCausalLM.from_pretrained("out")
    log = first_log()
    assert {"rewards/exact_answer_reward/mean", "rewards/answer_format_reward/mean", "shaping/edas/mean"} <= log.keys()
    assert "advantages: GRPO over groups of 4 -> edas (alpha 0.4, beta 0.2," in capsys.readouterr().out
    card = Path("out/README.md").read_text()
    for expected in ("# out", "`tiny:math`", "`tiny:student`", "`advantage_shapers` | `['edas']`"):
        assert expected in card
    assert json.loads(Path("out/eval_results.json").read_text())["eval_reward"] is not None


def test_check_says_what_the_recipe_does(capsys):
    recipe()
    assert main(["check", "recipe.yaml"]) == 0
    good, advantages, *_ = capsys.readouterr().out.splitlines()
    assert good == "recipe.yaml: a good recipe for `hf-rb grpo`."
    assert advantages == (
        "recipe.yaml: advantages: GRPO over groups of 4 -> edas (alpha 0.4, beta 0.2, kappa 2.0, no_answer cluster, equivalence "
        "auto, warmup_start 0, warmup_steps 0) -> dapo loss"
    )


def test_check_warns():
    recipe(mask_truncated_completions=True)
    (warning,) = check(Path("recipe.yaml"), read_recipe(Path("recipe.yaml"))).warnings
    assert "`edas_no_answer: skip` leaves them out there too" in warning


def test_local_code_runs_where_the_command_line_allows_it():
    Path("mine.py").write_text(CODE)
    grpo.main([*recipe(**LOCAL), *ALLOW])
    log = first_log()
    assert log["rewards/length/mean"] > 1
    assert log["shaping/double/std"] == pytest.approx(3 * log["shaping/edas/std"], rel=1e-5)


@pytest.mark.parametrize("allowed", [[], ALLOW[:2], ALLOW[2:]])
def test_local_code_is_not_imported_otherwise(allowed):
    is_allowed = "mine:Double" in allowed  # then its file is imported
    Path("mine.py").write_text(CODE if is_allowed else f"{CODE}\nraise SystemExit('imported')")
    with pytest.raises(ValueError, match="add `--allow_local_code mine:(Double|length)` if you trust it"):
        grpo.main([*recipe(**LOCAL), *allowed])


def test_a_recipe_cannot_allow_it_itself():
    with pytest.raises(ValueError, match="`allow_local_code` in recipe.yaml is not an option"):
        grpo.main(recipe(allow_local_code=["mine:length"], **LOCAL | {"advantage_shapers": ["edas"]}))


def test_the_verb_passes_it_on(monkeypatch):
    from hf_rb.utils import compat

    calls = []
    monkeypatch.setattr(compat, "launch_command", calls.append, raising=False)
    recipe(**LOCAL)
    assert main(["check", "recipe.yaml"]) == 2
    assert main(["grpo", "recipe.yaml"]) == 2
    assert not calls
    assert main(["check", "recipe.yaml", *ALLOW]) == 0
    assert main(["grpo", "recipe.yaml", *ALLOW, "--learning_rate", "1e-5"]) == 0
    (call,) = calls
    assert call.training_script == "hf_rb.scripts.grpo"
    assert call.training_script_args == ["--config", "recipe.yaml", "--learning_rate", "1e-5", *ALLOW]


BAD = [
    ({"model_name_or_path": None}, "There is no model", "no model"),
    ({"reward_funcs": None, "reward_weights": None}, "There is no reward", "no reward: write `reward_funcs"),
    ({"reward_funcs": ["exact_answer"], "reward_weights": None}, "did you mean 'exact_answer_reward'?", None),
    ({"edas_kappa": 0.5}, r"must be in \(1, inf\); got 0.5", None),
    ({"edas_alhpa": 0.5}, "Did you mean `edas_alpha`?", "did you mean `edas_alpha`?"),
    ({"num_generations": 3}, "divisible", False),
    ({"reward_funcs": ["math_accuracy_reward"], "reward_weights": None, "correct_reward": "math_accuracy_reward"},
     "The reward function 'math_accuracy_reward' needs `solution`", False),
]  # fmt: skip


@pytest.mark.parametrize("keys, message, in_check", BAD)
def test_bad_input_is_found_before_a_model_is_loaded(monkeypatch, keys, message, in_check):
    """By the script, and by `hf-rb check` where the recipe alone says it."""
    monkeypatch.setattr(grpo, "GRPOTrainer", lambda *_, **__: pytest.fail("a model would be loaded"))
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        grpo.main(recipe(**keys))
    errors = check(Path("recipe.yaml"), read_recipe(Path("recipe.yaml")), "grpo").errors
    if in_check is False:
        assert not errors
    else:
        assert any((in_check or message).replace("\\", "") in error for error in errors)


@pytest.mark.parametrize(
    "keys, message, in_check",
    [
        ({"edas_format_reward": "form"}, "needs the reward function 'form'", "`edas_format_reward: form` is none of"),
        (
            {"advantage_shapers": ["calibadv"], "edas_beta": None},
            "reads what tools return",
            "write `environment: search`",
        ),
        (
            {"advantage_shapers": ["srar"], "edas_beta": None, "dataset_config": "rubric"},
            "Set `srar_judge`",
            "write `srar_judge: ...`",
        ),
        (
            {
                "advantage_shapers": ["srar"],
                "edas_beta": None,
                "dataset_config": "rubric",
                "srar_judge": "tiny",
                "correct_reward": None,
            },
            "'srar' needs to know which completions are correct",
            "Set `correct_reward`, or `srar_only_mixed: false`",
        ),
    ],
)
def test_what_the_shapers_lack(keys, message, in_check):
    """The trainer says it too, before it loads a model."""
    with pytest.raises(ValueError, match=message):
        grpo.main(recipe(**keys, model_name_or_path="there/is/no/model"))
    (error,) = check(Path("recipe.yaml"), read_recipe(Path("recipe.yaml")), "grpo").errors
    assert in_check in error


def test_a_correct_reward_that_is_not_there():
    recipe(correct_reward="accuracy_reward")
    (error,) = check(Path("recipe.yaml"), read_recipe(Path("recipe.yaml"))).errors
    assert error == (
        "`correct_reward: accuracy_reward` is none of the reward functions, exact_answer_reward, answer_format_reward."
    )


def test_a_dataset_without_prompts():
    Path("rows.jsonl").write_text(json.dumps({"question": "?", "answer": "7"}))
    data = {"dataset_name": None, "datasets": [{"path": "json", "data_files": "rows.jsonl"}]}
    with pytest.raises(ValueError, match="The dataset has the columns answer, question. GRPO needs `prompt`"):
        grpo.main(recipe(**data, dataset_config=None))


def test_the_embedded_task_has_the_columns():
    assert {"prompt", "answer"} <= set(tiny.load_dataset("math", "prompt_only", size=1).column_names)
