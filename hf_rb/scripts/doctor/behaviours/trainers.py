"""One step of each of our trainers on the embedded models, and checks of the methods that TRL and transformers called
in it.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import Trainer

from hf_rb import tiny
from hf_rb.scripts.doctor.behaviours import Recorded, check_parameters, relies_on
from hf_rb.scripts.doctor.findings import expect
from hf_rb.utils import compat


__all__ = ["TRAINERS", "TrialRun", "trial_run"]


class TrialRun(NamedTuple):
    """A finished run.

    Attributes:
        trainer (`Trainer`): Our trainer.
        calls (`dict[str, list[tuple[dict, Any]]]`): Arguments and results of the library's own methods, by name in
            `compat.TABLE`.
        outputs (`list[Any]`): Outputs of the model, in order.
    """

    trainer: Any  # of classes whose private attributes are checked
    calls: dict[str, list[tuple[dict[str, Any], Any]]]
    outputs: list[Any]

    def call(self, name: str) -> tuple[dict[str, Any], Any]:
        """Returns the first call of a method, with the parameters that we rely on."""
        check_parameters(name)
        expect(self.calls[name], f"`{name}` is not called.")
        return self.calls[name][0]


def _sft(options: dict) -> Trainer:
    from hf_rb import SFTConfig, SFTTrainer

    config = SFTConfig(profit_threshold=0.1, **options | {"save_strategy": "steps", "save_steps": 1})
    return SFTTrainer(_path("student"), config, train_dataset=tiny.load_dataset("math", "messages", size=2))


def _gkd(options: dict) -> Trainer:
    from hf_rb import GKDConfig, GKDTrainer

    config = GKDConfig(objective="akl", lmbda=1.0, max_new_tokens=4, **options)
    data = tiny.load_dataset("math", "prompt_completion", size=2)
    return GKDTrainer(_path("student"), _path("teacher"), config, train_dataset=data)


def _distillation(options: dict) -> Trainer:
    from hf_rb import DistillationConfig, DistillationTrainer

    config = DistillationConfig(objective="gopd", max_completion_length=4, **options)
    data = tiny.load_dataset("math", "prompt_only", size=2)
    return DistillationTrainer(_path("student"), _path("teacher"), config, data)


def _grpo(options: dict) -> Trainer:
    from hf_rb import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        advantage_shapers=["edas"], correct_reward="every_second", answer_extractor="hashes", num_generations=2,
        max_completion_length=4, **options,
    )  # fmt: skip

    def every_second(completions: list, **kwargs: Any) -> list[float]:
        return [float(index % 2) for index in range(len(completions))]

    return GRPOTrainer(_path("student"), every_second, config, tiny.load_dataset("math", "prompt_only", size=2))


def _path(member: str) -> str:
    return str(tiny.path(member))


TRAINERS: dict[str, Callable[[dict], Any]] = {
    "SFTTrainer": _sft,
    "GKDTrainer": _gkd,
    "DistillationTrainer": _distillation,
    "GRPOTrainer": _grpo,
}


def trial_run(name: str) -> TrialRun:
    """
    Trains one step with one of our trainers, and notes arguments and results of the library's own methods. It trains
    once: later calls return the same run, or raise the same exception.
    """
    outcome = _outcome(name)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@cache
def _outcome(name: str) -> TrialRun | Exception:
    try:
        return _train(name)
    except Exception as error:  # a library of another version may raise anything
        return error


def _train(name: str) -> TrialRun:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        # On several devices, transformers' Trainer would spread a batch over them.
        options = {
            "output_dir": folder, "max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "bf16": False,
            "use_cpu": torch.accelerator.device_count() != 1, "save_strategy": "no", "disable_tqdm": True,
            "gradient_checkpointing": False, "logging_steps": 1, "learning_rate": 1e-3,
        }  # fmt: skip
        recorded = {}
        for entry, place in compat.TABLE.items():
            owner, _, method = place.attribute.partition(".")
            if method and owner in (name, "Trainer") and not compat.is_removed(entry):
                parent = getattr(import_module(place.module), owner)
                recorded[entry] = stack.enter_context(Recorded(parent, method))
        trainer = TRAINERS[name](options)
        outputs: list[Any] = []
        trainer.model.register_forward_hook(lambda model, given, output: outputs.append(output))
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        trainer.train()
        after = trainer.model.parameters()
        expect(
            any(not torch.equal(one, other) for one, other in zip(before, after, strict=True)),
            "No weight has changed.",
        )
        return TrialRun(trainer, {entry: one.calls for entry, one in recorded.items()}, outputs)


def _live(name: str) -> TrialRun:
    """Returns a finished run whose trainer can work again: another run has reset the state that accelerate shares."""
    found = trial_run(name)
    Accelerator()
    return found


def _rows(sampled: Any) -> list:
    """Returns the sampled ids, beside which GRPO returns more."""
    return sampled[0] if isinstance(sampled, tuple) else sampled


@relies_on("SFTTrainer._prepare_dataset")
def prepare_datasets() -> None:
    """TRL tokenizes a dataset in `_prepare_dataset`."""
    _, dataset = trial_run("SFTTrainer").call("SFTTrainer._prepare_dataset")
    expect("input_ids" in dataset.column_names, f"The columns are {', '.join(dataset.column_names)}.")


@relies_on("FusedCausalLMOutput")
def fused_outputs() -> None:
    """TRL's loss reads the log-probabilities of a fused output, with a mask of the labels."""
    check_parameters("FusedCausalLMOutput")
    fused = [one for one in trial_run("SFTTrainer").outputs if isinstance(one, compat.FusedCausalLMOutput)]
    expect(fused, "The model returns other outputs in training.")
    first: Any = fused[0]  # whose fields may be `None` in general
    expect(first.log_probs.shape == first.label_mask.shape, "The mask has another shape.")


@relies_on("Trainer._get_num_items_in_batch", "_prepare_inputs")
def count_labels() -> None:
    """The labels of the micro-batches of a step are counted at once, and a batch comes to the device as it is."""
    trainer, _, _ = found = _live("SFTTrainer")
    given, count = found.call("Trainer._get_num_items_in_batch")
    expect(isinstance(given["batch_samples"], list) and int(count) > 0, f"The count is {count!r}.")
    batch = next(iter(trainer.get_train_dataloader()))
    prepared = trainer._prepare_inputs(batch)
    expect(torch.equal(prepared["input_ids"].cpu(), batch["input_ids"].cpu()), "`_prepare_inputs` changes a batch.")


@relies_on("Trainer._save_checkpoint", "Trainer._get_output_dir", "Trainer._push_from_checkpoint")
def save_checkpoints() -> None:
    """A checkpoint is saved in the folder of the run, and pushed by `_push_from_checkpoint` alone."""
    trainer = _live("SFTTrainer").trainer
    given, _ = trial_run("SFTTrainer").call("Trainer._save_checkpoint")
    expect("trial" in given, "`_save_checkpoint` is called in another way.")
    check_parameters("Trainer._push_from_checkpoint")
    pushed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        before = trainer.args.output_dir, trainer.args.push_to_hub
        trainer.args.output_dir, trainer.args.push_to_hub = folder, True
        trainer._push_from_checkpoint = pushed.append
        try:
            expect(trainer._get_output_dir(trial=None) == folder, "A run saves in another folder.")
            Trainer._save_checkpoint(trainer, trainer.model, trial=None)
        finally:
            del trainer._push_from_checkpoint
            trainer.args.output_dir, trainer.args.push_to_hub = before
        path = Path(folder) / "checkpoint-1"
        expect((path / "trainer_state.json").is_file() and pushed == [str(path)], f"What is pushed is {pushed}.")


@relies_on("_finish_current_push")
def wait_for_pushes() -> None:
    """`_finish_current_push` waits for the push in `push_in_progress`."""
    trainer, waited = _live("SFTTrainer").trainer, []
    trainer._finish_current_push()
    trainer.push_in_progress = SimpleNamespace(is_done=lambda: False, wait_until_done=lambda: waited.append(True))
    try:
        trainer._finish_current_push()
    finally:
        del trainer.push_in_progress
    expect(waited, "It does not wait.")


@relies_on("GKDConfig", "GKDTrainer")
def distil() -> None:
    """Our GKDTrainer and its configuration are TRL's too."""
    check_parameters("GKDTrainer")
    trainer = trial_run("GKDTrainer").trainer
    expect(isinstance(trainer, compat.GKDTrainer), "Our trainer is no GKDTrainer of TRL.")
    expect(isinstance(trainer.args, compat.GKDConfig), "Our configuration is no GKDConfig of TRL.")


@relies_on("_is_vision_dataset", "_tokenizer")
def know_the_data() -> None:
    """TRL's SFTTrainer knows its tokenizer, and whether its dataset has images."""
    trainer = trial_run("GKDTrainer").trainer
    expect(trainer._is_vision_dataset is False, "A dataset of texts counts as one of images.")
    expect(trainer._tokenizer is trainer.processing_class, "The tokenizer is kept elsewhere.")


@relies_on("DistillationTrainer._generate_single_turn", "_get_last_hidden_state", "_buffered_inputs")
def distil_what_is_sampled() -> None:
    """DistillationTrainer samples turn by turn, keeps the batches of a step, and returns the hidden states of
    completions.
    """
    trainer, _, _ = found = _live("DistillationTrainer")
    given, sampled = found.call("DistillationTrainer._generate_single_turn")
    expect(len(_rows(sampled)) == len(given["prompt_ids"]), "A prompt gets no completion.")
    batch = trainer._buffered_inputs[0]
    expect({"prompt_ids", "completion_ids", "completion_mask"} <= batch.keys(), f"A batch has {', '.join(batch)}.")
    ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    length = batch["completion_ids"].shape[1]
    hidden = trainer._get_last_hidden_state(trainer.accelerator.unwrap_model(trainer.model), ids, mask, length)
    expect(hidden.shape[1] == length, f"{hidden.shape[1]} states stand for {length} tokens.")


@relies_on(
    "GRPOTrainer._generate_single_turn",
    "GRPOTrainer._generate_and_score_completions",
    "GRPOTrainer._calculate_rewards",
    "GRPOTrainer._compute_loss",
)
def reward() -> None:
    """GRPOTrainer samples a turn, calculates a reward for each completion and function, scores them, and then takes
    the loss.
    """
    found = trial_run("GRPOTrainer")
    given, sampled = found.call("GRPOTrainer._generate_single_turn")
    expect(len(_rows(sampled)) == len(given["prompt_ids"]), "A prompt gets no completion.")
    given, rewards = found.call("GRPOTrainer._calculate_rewards")
    expect(
        tuple(rewards.shape) == (len(given["completions"]), 1), f"The rewards have the shape {tuple(rewards.shape)}."
    )
    given, scored = found.call("GRPOTrainer._generate_and_score_completions")
    expect(isinstance(given["inputs"], list), "It is given something else than rows.")
    missing = {"prompt_ids", "completion_ids", "completion_mask", "advantages"} - scored.keys()
    expect(not missing, f"What it returns lacks {', '.join(sorted(missing))}.")
    given, loss = found.call("GRPOTrainer._compute_loss")
    expect("advantages" in given["inputs"] and loss.ndim == 0, "The loss is taken in another way.")


@relies_on("GRPOTrainer._get_per_token_logps_and_entropies")
def log_probabilities() -> None:
    """`_get_per_token_logps_and_entropies` returns the log-probabilities of the last tokens first."""
    check_parameters("GRPOTrainer._get_per_token_logps_and_entropies")
    trainer = _live("GRPOTrainer").trainer
    ids = torch.tensor([[5, 6, 7]], device=trainer.accelerator.device)
    with torch.no_grad():
        result = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), logits_to_keep=1)
        logits = trainer.model(ids).logits[:, -2]
    torch.testing.assert_close(result[0], logits.log_softmax(-1)[:, 7:8], rtol=1e-4, atol=1e-5)


@relies_on("_metrics", "_logs")
def logs() -> None:
    """GRPOTrainer keeps lists of metrics by mode, and of completions with further columns for its table."""
    trainer = trial_run("GRPOTrainer").trainer
    expect(trainer._metrics["train"] is not trainer._metrics["eval"], "Metrics of the modes are not kept apart.")
    trainer._metrics["train"]["doctor"].append(1.0)
    expect(trainer._metrics["train"].pop("doctor") == [1.0], "Metrics are no lists.")
    expect({"prompt", "completion", "advantages", "extra"} <= trainer._logs.keys(), "The table has other columns.")


@relies_on("_name", "_paper", "_tag_names")
def names() -> None:
    """TRL's trainers have a name and tags for their cards, and some a paper."""
    import trl

    expect(isinstance(trl.SFTTrainer._name, str) and isinstance(trl.SFTTrainer._tag_names, list), "SFT has none.")
    expect("title" in trl.GRPOTrainer._paper, "The paper of GRPO has no title.")
    expect("hf_rb" in trial_run("SFTTrainer").trainer._tag_names, "Ours are not asked for.")
