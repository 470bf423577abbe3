"""Checks of names of TRL, transformers and accelerate that need no training run."""

import functools
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hf_rb import tiny
from hf_rb.scripts.doctor.behaviours import check_parameters, relies_on
from hf_rb.scripts.doctor.findings import expect
from hf_rb.utils import compat


__all__: list[str] = []


@relies_on("disable_dropout_in_model")
def disable_dropout() -> None:
    """`disable_dropout_in_model` sets the probability of every dropout module to zero."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1))
    compat.disable_dropout_in_model(model)
    expect(model[0].p == 0, f"The probability is {model[0].p}.")


@relies_on("get_callable_name")
def name_of_a_reward() -> None:
    """`get_callable_name` names a reward function as TRL's logs do, without what `functools.partial` adds."""
    name = compat.get_callable_name(functools.partial(disable_dropout))
    expect(name == "disable_dropout", f"The name is {name!r}.")


@relies_on("ForwardRedirection", "_forward_redirection")
def run_inside_the_wrapper() -> None:
    """`_ForwardRedirection` runs a function as the forward of a wrapped model and puts the model's own forward
    back.
    """
    inner = nn.Identity()
    wrapper = nn.Sequential(inner)
    redirected = compat.ForwardRedirection()(wrapper, inner, lambda states: states + 1, torch.zeros(1))
    expect(redirected.item() == 1, "It does not run.")
    expect(wrapper(torch.zeros(1)).item() == 0, "The model's own forward is lost.")


@relies_on("unwrap_model_for_generation")
def unwrap_for_generation() -> None:
    """`unwrap_model_for_generation` lends the model without its wrapper."""
    from accelerate import Accelerator
    from transformers import AutoConfig, AutoModelForCausalLM

    check_parameters("unwrap_model_for_generation")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny.path("student")))
    with compat.unwrap_model_for_generation(model, Accelerator(), gradient_checkpointing_kwargs=None) as lent:
        expect(lent is model, f"It lends a {type(lent).__name__}.")


@relies_on("maybe_gather_lm_head_ctx")
def gather_the_head() -> None:
    """`maybe_gather_lm_head_ctx` takes a weight and a bias that may be `None`, and leaves both alone where none is
    split.
    """
    layer = nn.Linear(2, 2, bias=False)
    head: Any = (layer.weight, None)
    with compat.maybe_gather_lm_head_ctx(*head):
        expect(layer.weight.shape == (2, 2), "The weight has another shape.")


@relies_on("create_model_from_path")
def load_teachers() -> None:
    """`create_model_from_path` loads a causal language model of the architecture that its configuration names."""
    model = compat.create_model_from_path(str(tiny.path("student")), dtype="float32")
    expect(type(model).__name__ == "Qwen3ForCausalLM", f"It loads a {type(model).__name__}.")
    expect(model.dtype == torch.float32, f"Its weights are {model.dtype}.")


@relies_on("prepare_deepspeed")
def place_with_deepspeed() -> None:
    """`prepare_deepspeed` takes a model and an accelerator (it is not run: that needs DeepSpeed)."""
    check_parameters("prepare_deepspeed")


@relies_on("PushInProgress")
def pushes() -> None:
    """`PushInProgress` is done when all its jobs are."""
    job = SimpleNamespace(done=lambda: False)
    jobs: Any = [job]  # annotated as one
    expect(not compat.PushInProgress(jobs).is_done(), "It is done before its job.")
    job.done = lambda: True
    expect(compat.PushInProgress(jobs).is_done(), "It is not done after its job.")


@relies_on("rotate_checkpoints")
def delete_old_checkpoints() -> None:
    """`rotate_checkpoints` deletes the oldest checkpoints and keeps the best and the newest."""
    with tempfile.TemporaryDirectory() as folder:
        for step in (1, 2, 3):
            (path := Path(folder) / f"checkpoint-{step}").mkdir()
            os.utime(path, (step, step))
        best = str(Path(folder) / "checkpoint-1")
        compat.rotate_checkpoints(
            output_dir=folder, save_total_limit=2, best_model_checkpoint=best, use_mtime=True
        )  # fmt: skip
        left = sorted(os.listdir(folder))
    expect(left == ["checkpoint-1", "checkpoint-3"], f"It leaves {left}.")


@relies_on("_VALID_DICT_FIELDS")
def dictionaries_on_the_command_line() -> None:
    """A field of `_VALID_DICT_FIELDS` may be given as JSON."""
    from hf_rb import DistillationConfig

    with tempfile.TemporaryDirectory() as folder:
        config: Any = DistillationConfig(
            output_dir=folder, bf16=False, objective="gopd", gopd_teacher_column="domain",
            teacher_model_name_or_path='{"math": "tiny:teacher"}',
        )  # fmt: skip
    expect(config.teacher_model_name_or_path == {"math": "tiny:teacher"}, "JSON stays a text.")


@relies_on("GKDTrainer.generalized_jsd_loss")
def jensen_shannon() -> None:
    """`generalized_jsd_loss` at beta 0 is the mean KL(teacher || student) over labels, and at beta 1 KL(student ||
    teacher).
    """
    check_parameters("GKDTrainer.generalized_jsd_loss")
    student, teacher = torch.randn(2, 1, 3, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    labels = torch.tensor([[-100, 1, 1]])
    loss = compat.resolve("GKDTrainer.generalized_jsd_loss")
    for beta, (one, other) in enumerate([(student, teacher), (teacher, student)]):
        expected = functional.kl_div(one, other, log_target=True, reduction="none").sum(-1)[labels != -100].mean()
        torch.testing.assert_close(loss(student, teacher, labels, beta=float(beta)), expected)


@relies_on("GKDTrainer.generate_on_policy_outputs")
def sample_completions() -> None:
    """`generate_on_policy_outputs` returns prompts with completions and a mask that ends with the first
    end-of-sequence token.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    check_parameters("GKDTrainer.generate_on_policy_outputs")
    model = AutoModelForCausalLM.from_pretrained(tiny.path("student"))
    ids = torch.tensor([[5, 6], [7, 8]])
    options = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
    inputs = {"prompts": ids, "prompt_attention_mask": torch.ones_like(ids)}
    tokens, mask, _ = compat.resolve("GKDTrainer.generate_on_policy_outputs")(model, inputs, options)
    expect(tokens.shape == mask.shape == (2, 4) and torch.equal(tokens[:, :2], ids), "Prompts are left out.")


@relies_on("default_config_file", "launch_command", "launch_command_parser")
def launch() -> None:
    """Accelerate's launcher reads `--module` and the script's own arguments, and knows where its default configuration
    lies.
    """
    arguments = compat.launch_command_parser().parse_args(
        ["--num_processes", "1", "--module", "a.b", "--key", "value"]
    )
    expect(arguments.module and arguments.training_script == "a.b", "It takes the script for something else.")
    expect(arguments.training_script_args == ["--key", "value"], "It takes the script's arguments for its own.")
    expect(callable(compat.launch_command) and Path(compat.default_config_file).suffix, "There is no default file.")
