"""Mixtures of experts in every trainer: the balance loss of the configuration, MPI's ramp and routers in place, the doctor's numbers."""

import copy

import pytest
import torch
from helpers.mixtures import SMALL_MOE, mixture
from helpers.records import documented
from helpers.seeded_runs import ARGUMENTS
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_rb import (
    DistillationConfig,
    DistillationTrainer,
    GKDConfig,
    GKDTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
    tiny,
)
from hf_rb.models.mpi import apply_mpi
from hf_rb.models.mpi.callbacks import MPICallback
from hf_rb.models.mpi.conversion import routers
from hf_rb.trainers.audit import audit
from hf_rb.trainers.common.routers import add_router_doctor


RUN = ARGUMENTS | {"max_steps": 1, "per_device_train_batch_size": 4, "seed": 1}
TRAINERS = ("sft", "gkd", "distillation", "grpo")
# Trainers with a balance loss, in both paths of GKD, on padded and on packed rows.
PATHS = {
    "sft": ("sft", {}),
    "sft, packed": ("sft", {"packing": True, "max_length": 256}),
    "gkd, chunked": ("gkd", {"loss_impl": "chunked"}),
    "gkd, dense": ("gkd", {"loss_impl": "dense"}),
    "gkd, packed": ("gkd", {"packing": True, "max_length": 256}),
    "gkd, packed, dense": ("gkd", {"packing": True, "max_length": 256, "loss_impl": "dense"}),
    "grpo": ("grpo", {}),
}


def rows(size=4, config="prompt_completion"):
    return tiny.load_dataset("math", config=config, size=size).select_columns(
        ["prompt"] if config == "prompt_only" else ["prompt", "completion"]
    )


def given(prompt_ids):
    return [[5 + index, *prompt[3 : 6 + index % 3]] for index, prompt in enumerate(prompt_ids)]


class GivenGRPO(GRPOTrainer):
    """Takes given completions: transformers' own mixtures cannot write any while they compute a balance loss."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return given(prompt_ids), None


class GivenDistillation(DistillationTrainer):
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return given(prompt_ids)


def make_trainer(kind, model, tokenizer, folder, size=4, samples=False, **fields):
    """Makes any of the four trainers; the distillation trainers with an objective that is not TRL's."""
    run, teacher = RUN | fields, {"teacher_model": str(tiny.path("teacher"))}
    more = {"args": None, "processing_class": tokenizer}
    if kind in ("sft", "gkd"):
        more["train_dataset"], run = rows(size), {"max_length": 96, **run}
        if kind == "sft":
            return SFTTrainer(model, **more | {"args": SFTConfig(str(folder), **run)})
        args = GKDConfig(str(folder), objective="forward_kl", lmbda=0.0, **run)
        return GKDTrainer(model, **more | {"args": args}, **teacher)
    more["train_dataset"] = rows(size, "prompt_only")
    if kind == "distillation":
        args = DistillationConfig(str(folder), objective="forward_kl", max_completion_length=8, **run)
        return (DistillationTrainer if samples else GivenDistillation)(model, **more | {"args": args}, **teacher)
    args = GRPOConfig(str(folder), num_generations=4, max_completion_length=8, shuffle_dataset=False, **run)
    reward = lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids]  # noqa: E731
    return (GRPOTrainer if samples else GivenGRPO)(model, reward, **more | {"args": args})


def first_batch(trainer):
    """The sequences of the first step."""
    if isinstance(trainer, GRPOTrainer):
        batch, *_ = trainer._buffered_inputs
        return {
            "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        }
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "position_ids")}


def balance_of(model, batch, kind, z=0.0):
    """The balance loss by its formula, sequence after sequence, with `z` times the z-loss; `layer` takes all tokens for one sequence."""
    outputs = model(
        **batch, output_router_logits=True, use_cache=False
    )  # with a cache, packed sequences see each other
    mask = batch.get("attention_mask")
    if kind == "hf":
        return load_balancing_loss_func(outputs.router_logits, 4, 2, mask)
    length = batch["input_ids"].shape[1]
    ids = torch.arange(batch["input_ids"].numel()) // length
    if mask is not None:
        ids = ids.masked_fill(mask.flatten() == 0, -1)
    elif "position_ids" in batch:
        ids = (batch["position_ids"].flatten() == 0).cumsum(0)
    if kind == "layer":
        ids = ids.clamp(max=0) if mask is not None else ids * 0
    losses = []
    for logits in outputs.router_logits:
        for number in ids.unique():
            probs = logits[ids == number].softmax(-1)
            picks = torch.zeros_like(probs).scatter(1, probs.topk(2).indices, 1.0)
            losses += [] if number < 0 else [2 * (picks.mean(0) * probs.mean(0)).sum()]
    squares = [logits[ids >= 0].logsumexp(-1).square().mean() for logits in outputs.router_logits]
    return torch.stack(losses).mean() + z * torch.stack(squares).mean()


KINDS = [(kind, path) for path in PATHS for kind in ("sequence", "hf")] + [("layer", "sft"), ("layer", "sft, packed")]


@pytest.mark.parametrize(
    "mpi, kind, path",
    [
        pytest.param(mpi, kind, path, marks=() if kind == "sequence" or mpi == (index % 4 == 1) else pytest.mark.slow)
        for index, (kind, path) in enumerate(KINDS)
        for mpi in (True, False)
    ],
)
def test_balance_loss_is_that_of_the_configuration(tokenizer, tmp_path, mpi, kind, path):
    """Also of a native mixture, the forward pass of which knows only transformers'."""
    name, fields = PATHS[path]
    trainer = make_trainer(name, mixture(mpi, lb_type=kind), tokenizer, tmp_path, learning_rate=0.0, **fields)
    trainer.train()
    (logged,) = (entry["aux_loss"] for entry in trainer.state.log_history if "aux_loss" in entry)
    batch = first_batch(trainer)
    assert logged == pytest.approx(balance_of(mixture(mpi), batch, kind).item(), rel=1e-4)
    assert trainer.model(**batch, output_router_logits=True).aux_loss.item() == pytest.approx(logged, rel=1e-4)
    assert ("mpi" in trainer._tag_names) == mpi and name in trainer._tag_names


@pytest.mark.parametrize("mpi, path", [(False, path) for path in PATHS] + [(True, "sft"), (True, "grpo")])
def test_balance_loss_has_the_gradient_of_its_formula(tokenizer, tmp_path, path, mpi):
    """The step with a large weight less the step with none is that of the balance loss and the z-loss."""
    name, fields = PATHS[path]
    steps = []
    for coef in (0.0, 10.0):
        model = mixture(mpi, lb_type="sequence", router_aux_loss_coef=coef, z_loss_coef=coef / 5)
        fields = fields | {"router_aux_loss_coef": coef, "learning_rate": 1e-2, "max_grad_norm": 0.0}
        trainer = make_trainer(name, model, tokenizer, tmp_path, **fields)
        start = [layer.learned.detach().clone() for layer in routers(model)]
        trainer.train()
        steps.append([before - layer.learned.detach() for before, layer in zip(start, routers(model), strict=True)])
    own = mixture(mpi).train()
    balance_of(own, first_batch(trainer), "sequence", z=0.2).backward()
    for without, given, layer in zip(*steps, routers(own), strict=True):
        torch.testing.assert_close(given - without, 0.1 * layer.learned.grad, rtol=2e-3, atol=1e-7)
        assert (given - without).abs().max() > 1e-5


@pytest.mark.parametrize("path", ["sft", "gkd, chunked", "gkd, dense"])
def test_logged_loss_has_the_balance_loss_once(tokenizer, tmp_path, path):
    """And ProFit's gate, which no label passes here, leaves it alone."""
    name, fields = PATHS[path]
    run = fields | {"router_aux_loss_coef": 0.5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    gate = {"profit_threshold": 1.0} if name == "sft" else {}
    trainer = make_trainer(name, mixture(mpi=False), tokenizer, tmp_path, **run, **gate)
    trainer.train()
    log = trainer.state.log_history[0]
    other = log["profit/loss" if name == "sft" else "forward_kl"]
    assert (other == 0) == (name == "sft")
    assert log["loss"] == pytest.approx(other + 0.5 * log["aux_loss"], rel=1e-4)


@pytest.mark.parametrize("kind, size, steps", [("sft", 2, 2), ("sft", 1, 4), ("gkd", 1, 4), ("grpo", 2, 2)], ids=str)
def test_split_does_not_change_the_loss_of_a_sequence(tokenizer, tmp_path, kind, size, steps):
    """The loss over a whole micro-batch, as transformers', depends on the split by its nature."""
    trained = []
    for batch, accumulation in ((4, 1), (size, steps)):
        model = mixture(mpi=False, lb_type="sequence", router_aux_loss_coef=0.5)
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        make_trainer(
            kind, model, tokenizer, tmp_path, 8, learning_rate=1e-2, router_aux_loss_coef=0.5, **options
        ).train()
        trained.append(model)
    for name, parameter in trained[0].named_parameters():
        torch.testing.assert_close(trained[1].get_parameter(name), parameter, rtol=1e-4, atol=2e-6, msg=name)


def deepseek():
    sizes = SMALL_MOE | dict(
        n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, intermediate_size=32
    )
    heads = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, head_dim=8)
    config = DeepseekV3Config(**sizes | heads)
    config.lb_type = "sequence"
    return DeepseekV3ForCausalLM(config)


@pytest.mark.parametrize("kind", TRAINERS)
def test_balance_loss_that_cannot_act_is_refused(tokenizer, tmp_path, kind):
    model = mixture(mpi=False, lb_type="sequence")
    model.config.z_loss_coef, model.config.router_aux_loss_coef = 0.1, 0.0
    with pytest.raises(ValueError, match="z_loss_coef=0.1 cannot act with router_aux_loss_coef=0"):
        make_trainer(kind, model, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM has no auxiliary loss.*LossFreeBalanceCallback"):
        make_trainer(kind, deepseek(), tokenizer, tmp_path)


def test_a_trainer_without_an_auxiliary_loss_says_so(tokenizer, tmp_path, caplog):
    for kind in TRAINERS:
        caplog.clear()
        make_trainer(kind, mixture(), tokenizer, tmp_path, samples=True)
        assert ("DistillationTrainer has no auxiliary loss" in caplog.text) == (kind == "distillation")


def test_the_audit_compares_the_balance_loss(tokenizer, tmp_path):
    def found(break_it):
        model = mixture(mpi=False, lb_type="sequence")
        trainer = make_trainer("gkd", model, tokenizer, tmp_path)
        if break_it:  # transformers' own loss in the dense path, as without the set-up of the routers
            model.forward = type(model).forward.__get__(model)
        (one,) = (one for one in audit(trainer, batches=1) if one.path == "balance loss")
        assert not trainer.aux_loss_enabled and trainer.router_aux_loss_coef == 0.001
        return max(one.loss, one.gradient)

    assert found(break_it=False) < 1e-4  # what `hf-rb audit` accepts
    assert found(break_it=True) > 1e-2


@pytest.mark.parametrize("kind", TRAINERS)
def test_in_place_routers_are_iterated(tokenizer, tmp_path, kind):
    model = mixture(mpi_mode="inplace")
    trainer = make_trainer(kind, model, tokenizer, tmp_path, samples=True, learning_rate=1e-3)
    trainer.train()
    assert sum(isinstance(one, MPICallback) for one in trainer.callback_handler.callbacks) == 1
    for layer in routers(model):
        lengths = layer.learned.detach().norm(dim=-1).tolist()
        assert lengths == pytest.approx([1.0] * 4, rel=1e-5)  # C' / sqrt(N) = 2 / 2
        assert torch.equal(layer.weight(), layer.learned)
    plain = make_trainer(kind, mixture(), tokenizer, tmp_path)
    assert not any(isinstance(one, MPICallback) for one in plain.callback_handler.callbacks)


@pytest.mark.parametrize("kind", TRAINERS)
def test_ramp_and_doctor_move_on_with_the_optimizer(tokenizer, tmp_path, kind):
    """And what the doctor logs is documented, as are all numbers of a mixture."""
    model = apply_mpi(mixture(mpi=False), ramp_steps=4)
    start = copy.deepcopy(model)
    trainer = make_trainer(kind, model, tokenizer, tmp_path, 12, max_steps=3, learning_rate=1e-3)
    add_router_doctor(trainer)
    trainer.train()
    assert [layer.mpi.steps.item() for layer in routers(model)] == [3, 3]
    for before, after in zip(routers(start), routers(model), strict=True):
        assert not torch.equal(before.learned, after.learned)
        assert not torch.equal(before.experts.gate_up_proj, after.experts.gate_up_proj)
    logged = {key for entry in trainer.state.log_history for key in entry}
    of_routers = {name for name in documented() if name.startswith("router/")}
    assert {key for key in logged if key.startswith("router/")} == of_routers
    assert ("aux_loss" in logged) == (kind != "distillation")
