"""The shipped recipes with one mistake each, and what `hf-rb check` says of it."""

from pathlib import Path

import pytest

from hf_rb.cli.check import check, read_recipe
from hf_rb.io.resources import find_recipe


REMOVED = object()
PTQTP = {"quant_method": "ptqtp"}
D2QUANT = {"quant_method": "d2quant", "dataset": "texts.jsonl"}

MALFORMED = [
    # Keys
    ("profit/tiny-cpu", {"profit_treshold": 0.1}, "unknown key `profit_treshold`; did you mean `profit_threshold`?"),
    ("profit/qwen3-0.6b-base", {"lerning_rate": 1e-5}, "did you mean `learning_rate`?"),
    (
        "profit/tiny-cpu",
        {"overwrite_output_dir": True},
        "There is no key `overwrite_output_dir` any more. transformers 5 has dropped it.",
    ),
    ("akl/tiny-cpu", {"akl_muu": 0.5}, "did you mean `akl_mu`?"),
    ("hpd/tiny-cpu", {"hpd_samples": True}, "did you mean `hpd_sample`?"),
    ("exopd/tiny-cpu", {"reward_scales": 1.25}, "did you mean `reward_scale`?"),
    ("edas/tiny-cpu", {"edas_alhpa": 0.4}, "did you mean `edas_alpha`?"),
    ("srar/tiny-cpu", {"srar_coeff": 1.0}, "did you mean `srar_coef`?"),
    ("calibadv/tiny-cpu", {"calibadv_qualified": 0.7}, "did you mean `calibadv_qualify`?"),
    ("ptqtp/tiny-cpu", {"quantisation_config": PTQTP}, "did you mean `quantization_config`?"),
    (
        "profit/tiny-cpu",
        {"max_prompt_length": 64},
        "There is no key `max_prompt_length` any more. Prompts are not cut",
    ),
    ("profit/tiny-cpu", {"kd_alpha": 0.5}, "Use `GKDTrainer` (`hf-rb gkd`)"),
    ("exopd/tiny-cpu", {"loss_impl": "dense"}, "`loss_impl` is a key of `hf-rb gkd`"),
    ("profit/tiny-cpu", {"torch_dtype": "float32"}, "`torch_dtype` is now called `dtype`."),
    ("akl/tiny-cpu", {"batch_size": 8}, "unknown key `batch_size`; did you mean `per_device_train_batch_size`?"),
    # Types
    ("profit/tiny-cpu", {"max_steps": "many"}, "`max_steps` must be int; got 'many' (str)"),
    ("profit/tiny-cpu", {"learning_rate": "fast"}, "`learning_rate` must be float; got 'fast' (str)"),
    ("profit/tiny-cpu", {"save_strategy": False}, "YAML reads no, off, yes and on as booleans"),
    ("akl/tiny-cpu", {"max_length": 256.5}, "`max_length` must be int or null; got 256.5"),
    ("llm_neo/tiny-cpu", {"lora_target_modules": 5}, "`lora_target_modules` must be list[str] or null"),
    ("llm_neo/tiny-cpu", {"lora_r": True}, "`lora_r` must be int; got True (bool)"),
    ("edas/tiny-cpu", {"advantage_shapers": [1]}, "`advantage_shapers` must be"),
    ("edas/tiny-cpu", {"advantage_shapers": "edsa"}, "`advantage_shapers` cannot hold 'edsa'"),
    ("recover/tiny-cpu", {"examples": 332}, "got 332 (int). Write `examples: [332]`."),
    ("edas/tiny-cpu", {"num_generations": 8.5}, "`num_generations` must be int or null; got 8.5"),
    ("ptqtp/tiny-cpu", {"quantization_config": "ptqtp"}, "`quantization_config` must be dict; got 'ptqtp' (str)"),
    ("ptqtp/tiny-cpu", {"output_dir": REMOVED}, "`output_dir` is missing"),
    # Choices and ranges
    ("profit/tiny-cpu", {"profit_mode": "midle"}, "`profit_mode` cannot be 'midle'; did you mean 'middle'?"),
    (
        "profit/tiny-cpu",
        {"lr_scheduler_type": "cosin"},
        "`lr_scheduler_type` cannot be 'cosin'; did you mean 'cosine'?",
    ),
    ("akl/tiny-cpu", {"objective": "alk"}, "`objective` cannot be 'alk'; did you mean 'akl'?"),
    ("akl/tiny-cpu", {"objective": "AKL"}, "`objective` cannot be 'AKL'; did you mean 'akl'?"),
    ("akl/gpt2", {"akl_head_rule": "papers"}, "`akl_head_rule` cannot be 'papers'; did you mean 'paper'?"),
    (
        "edas/tiny-cpu",
        {"edas_no_answer": "clusters"},
        "`edas_no_answer` cannot be 'clusters'; did you mean 'cluster'?",
    ),
    ("ptqtp/qwen3-0.6b", {"dtype": "bf16"}, "`dtype` cannot be 'bf16'"),
    # What the libraries say nowhere
    (
        "profit/tiny-cpu",
        {"per_device_train_batch_size": 0},
        "`per_device_train_batch_size` must be in [1, inf); got 0",
    ),
    ("profit/tiny-cpu", {"max_length": -4}, "`max_length` must be in [1, inf); got -4"),
    ("profit/tiny-cpu", {"max_steps": -2}, "`max_steps` must be in [-1, inf); got -2"),
    ("akl/tiny-cpu", {"lmbda": 1.5}, "`lmbda` must be in [0, 1]; got 1.5"),
    ("edas/tiny-cpu", {"num_generations": 1}, "`num_generations` must be in [2, inf); got 1"),
    ("profit/tiny-cpu", {"report_to": ["wandbb"]}, "`report_to` cannot be 'wandbb'; did you mean 'wandb'?"),
    ("edas/tiny-cpu", {"generation_batch_size": 60}, "`num_generations: 8` must divide `generation_batch_size: 60`"),
    # Quantization configs inside a recipe
    (
        "ptqtp/tiny-cpu",
        {"quantization_config": D2QUANT},
        "`quantization_config`: `dataset` names 'texts.jsonl', which does not exist",
    ),
    (
        "ptqtp/tiny-cpu",
        {"quantization_config": {"quant_method": "d2quants"}},
        "`quantization_config.quant_method` cannot be 'd2quants'; did you mean 'd2quant'?",
    ),
    (
        "recover/tiny-cpu",
        {"quantization_config": {"quant_method": "awq"}},
        "`quantization_config.quant_method` cannot be 'awq'; it must be one of 'd2quant', 'ptqtp'.",
    ),
    ("ptqtp/tiny-cpu", {"quantization_config": {"group_sise": 64}}, "did you mean `quantization_config.group_size`?"),
    ("ptqtp/tiny-cpu", {"quantization_config": PTQTP | {"planes": 4}}, "`quantization_config.planes` cannot be 4"),
    ("ptqtp/tiny-cpu", {"quantization_config": PTQTP | {"tol": "1e-4"}}, "Write a number without quotes"),
    (
        "ptqtp/qwen3-8b-gptq",
        {"quantization_config": PTQTP | {"scale_mode": "tied", "planes": 1}},
        "`quantization_config`: `scale_mode='tied'` ties two scales",
    ),
    (
        "ptqtp/tiny-cpu",
        {"quantization_config": PTQTP | {"modules_to_not_convert": ["*.q_proj"]}},
        "`quantization_config`: `modules_to_not_convert` has '*.q_proj', which is no regular expression",
    ),
    (
        "ptqtp/tiny-cpu",
        {"quantization_config": {"quant_method": "d2quant"}},
        "`quantization_config`: D²Quant with `backend='gptaq'` needs calibration text",
    ),
    (
        "ptqtp/tiny-cpu",
        {"quantization_config": D2QUANT | {"bits_per_layer": {"down_proj": 5}}},
        "`quantization_config`: `bits_per_layer['down_proj']` must be 2, 3 or 4; got 5",
    ),
    (
        "ptqtp/tiny-cpu",
        {"quantization_config": D2QUANT | {"dsq": False, "dsq_iters": 3}},
        "`quantization_config`: `dsq_iters=3` cannot act: it needs `dsq=True`",
    ),
    (
        "ptqtp/tiny-cpu",
        {"quantization_config": PTQTP | {"bits": 3}},
        "`quantization_config.bits` is of `quant_method: d2quant` (`--method d2quant`); this method has `planes` (`--planes`).",
    ),
    (
        "profit/tiny-cpu",
        {"model_init_kwargs": {"quantization_config": PTQTP | {"packing": "densest"}}},
        "`model_init_kwargs.quantization_config.packing` cannot be 'densest'; did you mean 'dense'?",
    ),
    # What does not go together
    ("profit/tiny-cpu", {"fp16": True}, "`fp16: true` needs a GPU, and `use_cpu` is true"),
    ("akl/gpt2", {"fp16": True}, "`fp16` and `bf16` are both true"),
    ("exopd/qwen3-1.7b", {"objective": "hpd"}, "Use `GKDTrainer` (`hf-rb gkd`) with `lmbda: 0.0`"),
    ("edas/tiny-cpu", {"advantage_shapers": ["eads"]}, "did you mean 'edas'?"),
    ("recover/tiny-cpu", {"training": {"use_peft": True}}, "unknown key `training.use_peft`"),
    ("recover/tiny-cpu", {"training": {"akl_mu": 0.7}}, "`training`: `akl_mu: 0.7` acts on `objective: akl` only"),
    ("edas/tiny-cpu", {"correct_reward": "exact_anser"}, "is none of the reward functions, exact_answer_reward"),
    # Models, teachers, rewards, data
    ("profit/tiny-cpu", {"model_name_or_path": REMOVED}, "no model: write `model_name_or_path: ...`"),
    ("profit/tiny-cpu", {"model_name_or_path": "tiny:pupil"}, "write one of tiny:teacher"),
    ("profit/tiny-cpu", {"model_name_or_path": "./absent"}, "names './absent', which does not exist"),
    ("ptqtp/tiny-cpu", {"model_name_or_path": "d2quant/tiny-cpu"}, "is a recipe: write `--config d2quant/tiny-cpu`"),
    ("mpi/tiny-cpu", {"model_name_or_path": "mine.yaml"}, "is a recipe: write `--config mine.yaml`"),
    ("akl/tiny-cpu", {"teacher_model_name_or_path": REMOVED}, "no teacher: write `teacher_model_name_or_path: ...`"),
    ("exopd/tiny-cpu", {"reference_model_name_or_path": "~/absent"}, "names '~/absent', which does not exist"),
    ("edas/tiny-cpu", {"reward_funcs": REMOVED}, "no reward: write `reward_funcs: [...]`"),
    ("edas/tiny-cpu", {"reward_funcs": ["exact_anser_reward"]}, "exact_anser_reward"),
    ("profit/tiny-cpu", {"dataset_name": REMOVED}, "no dataset: write `dataset_name: ...`"),
    (
        "profit/tiny-cpu",
        {"dataset_name": "tiny:maths"},
        "`dataset_name` cannot be 'tiny:maths'; did you mean 'tiny:math'?",
    ),
    ("profit/tiny-cpu", {"dataset_train_split": "trian"}, "`dataset_train_split` cannot be 'trian'; did you mean"),
    ("profit/tiny-cpu", {"dataset_config": "prompt_complete"}, "did you mean 'prompt_completion'?"),
    ("profit/tiny-cpu", {"dataset_name": "mydata.jsonl"}, "names 'mydata.jsonl', which does not exist"),
    (
        "profit/tiny-cpu",
        {"datasets": [{"path": "json", "data_files": "data/*.jsonl"}], "eval_strategy": "steps"},
        "`eval_strategy: steps` needs a test split",
    ),
    ("profit/tiny-cpu", {"output_dir": __file__}, "which is a file: write a folder"),
    ("ptqtp/tiny-cpu", {"eval_data": "absent.txt"}, "`eval_data` names 'absent.txt', which does not exist"),
    ("recover/tiny-cpu", {"eval_text": "absent.txt", "train_text": __file__}, "`eval_text` names 'absent.txt'"),
    (
        "profit/tiny-cpu",
        {"dataset_config": "prompt_only"},
        "SFT needs `messages`, `prompt` with `completion`, or `text`",
    ),
    ("akl/tiny-cpu", {"dataset_config": "rubric"}, "GKD needs `messages`, `prompt` with `completion`, or `text`"),
    ("exopd/tiny-cpu", {"dataset_config": "messages"}, "This recipe needs `prompt`"),
    ("srar/tiny-cpu", {"dataset_config": "prompt_only"}, "This recipe needs `rubric`"),
    (
        "profit/tiny-cpu",
        {"datasets": [{"path": "json", "data_files": "absent.jsonl"}]},
        "'absent.jsonl', which does not",
    ),
    ("profit/tiny-cpu", {"datasets": [{"path": "json", "data_fils": "x"}]}, "did you mean `datasets[0].data_files`?"),
]


@pytest.mark.parametrize(
    ("name", "changes", "message"), MALFORMED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_malformed_recipe_is_told_what_is_wrong(name, changes, message):
    path = find_recipe(name)
    recipe = read_recipe(path)
    good = check(path, recipe)
    assert not good.errors
    changed = {key: value for key, value in (recipe | changes).items() if value is not REMOVED}
    errors = check(Path("recipe.yaml"), changed, good.verb).errors
    assert any(message in error for error in errors), errors
    assert len(errors) <= 3, errors  # one mistake is not drowned in what follows from it


def test_there_are_at_least_sixty():
    assert len(MALFORMED) >= 60
