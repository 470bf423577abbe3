import pytest
import torch
from datasets import Dataset
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_rb.models.mpi import apply_mpi, effective_router
from hf_rb.models.mpi.callbacks import LossFreeBalanceCallback, MPICallback, RouterDoctorCallback
from hf_rb.models.mpi.conversion import routers
from hf_rb.models.mpi.optim import weight_decay_groups
from hf_rb.models.router_report import layer_alignments, max_vio


COMMON = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    moe_intermediate_size=16, num_experts_per_tok=2, initializer_range=0.2,
)  # fmt: skip
ROWS = torch.randint(0, 50, (16, 12), generator=torch.Generator().manual_seed(0))


def qwen(**fields):
    torch.manual_seed(0)
    options = dict(head_dim=16, num_experts=4, norm_topk_prob=True)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON | options | fields))


def deepseek():
    torch.manual_seed(0)
    config = DeepseekV3Config(
        n_routed_experts=4, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1, intermediate_size=32,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, head_dim=8, **COMMON,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def train(model, folder, callbacks, optimizers=(None, None), **fields):
    args = TrainingArguments(
        str(folder), use_cpu=True, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, lr_scheduler_type="constant", **{"max_steps": 1} | fields,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": ROWS.tolist(), "labels": ROWS.tolist()})
    trainer = Trainer(model, args, train_dataset=data, callbacks=callbacks, optimizers=optimizers)
    trainer.train()
    return trainer


class Batches(TrainerCallback):
    """Keeps which experts were chosen in the training passes of every optimizer step, by hooks of its own."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.steps, self.now = [], {}
        for layer in routers(model):
            layer.router.register_forward_hook(
                lambda m, a, out, name=layer.name: self.now.setdefault(name, []).append(out[2])
            )

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append(
            {name: torch.bincount(torch.cat(seen).flatten(), minlength=4) for name, seen in self.now.items()}
        )
        self.now = {}


def test_in_place_steps_with_frozen_experts_are_power_steps(tmp_path):
    """I13: k steps in place are k iterations of the map from the same router."""
    model = apply_mpi(qwen(), mode="inplace")
    starts = [layer.learned.detach().clone() for layer in routers(model)]
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.lm_head.weight)
    train(model, tmp_path, [MPICallback()], gradient_accumulation_steps=2)
    for layer, start in zip(routers(model), starts, strict=True):
        expected = effective_router(start, layer.expert_matrix(), 2.0)
        torch.testing.assert_close(layer.learned.detach(), expected)
    train(model, tmp_path, [MPICallback()])
    for layer, start in zip(routers(model), starts, strict=True):
        expected = effective_router(start, layer.expert_matrix(), 2.0, iters=2)
        torch.testing.assert_close(layer.learned.detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_callback_leaves_other_routers_alone(tmp_path):
    for model in (qwen(), apply_mpi(qwen())):
        before = [layer.learned.detach().clone() for layer in routers(model)]
        train(model, tmp_path, [MPICallback()], learning_rate=0.0)
        assert all(torch.equal(a, b.learned) for a, b in zip(before, routers(model), strict=True))


@pytest.mark.parametrize("mpi", [False, True])
def test_the_bias_moves_against_the_load_of_the_whole_step(tmp_path, mpi):
    model = apply_mpi(deepseek(), norm=1.0) if mpi else deepseek()
    batches = Batches()
    train(model, tmp_path, [batches, LossFreeBalanceCallback(rate=0.01)], gradient_accumulation_steps=2)
    (layer,) = routers(model)
    (step,) = batches.steps
    load = step[layer.name].float()
    assert load.sum() == 2 * 4 * 12 * 2
    expected = 0.01 * torch.sign(load.mean() - load)
    torch.testing.assert_close(layer.router.e_score_correction_bias, expected)
    assert not layer.router._forward_hooks or len(layer.router._forward_hooks) == 1  # the meter has taken its own away


def test_the_bias_balances(tmp_path):
    model = deepseek()
    (layer,) = routers(model)
    with torch.no_grad():
        layer.router.e_score_correction_bias += torch.tensor([0.3, 0.1, 0.0, -0.1])
    doctor = RouterDoctorCallback(alignments=False)
    trainer = train(
        model,
        tmp_path,
        [LossFreeBalanceCallback(rate=0.02), doctor],
        learning_rate=0.0,
        num_train_epochs=8,
        max_steps=-1,
    )
    logs = [log["router/max_vio"] for log in trainer.state.log_history if "router/max_vio" in log]
    assert sum(logs[-4:]) < 0.6 * sum(logs[:4])


def test_models_without_a_bias_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Qwen3MoeTopKRouter.*no `e_score_correction_bias`.*balance loss"):
        train(qwen(), tmp_path, [LossFreeBalanceCallback()])
    with pytest.raises(ValueError, match="rate=0 must be positive"):
        LossFreeBalanceCallback(rate=0)


def test_the_doctor_logs_what_training_does(tmp_path):
    model = apply_mpi(qwen())
    batches = Batches()
    trainer = train(
        model,
        tmp_path,
        [batches, RouterDoctorCallback(per_layer=True)],
        learning_rate=1e-3,
        gradient_accumulation_steps=2,
    )
    log = trainer.state.log_history[0]
    (step,) = batches.steps
    vios = [max_vio(picks) for picks in step.values()]
    assert log["router/max_vio"] == pytest.approx(sum(vios) / 2)
    assert log["router/global_max_vio"] == pytest.approx(sum(vios) / 2)
    assert log["router/model.layers.1.mlp/max_vio"] == pytest.approx(vios[1])
    alignments = [layer_alignments(layer, index) for index, layer in enumerate(routers(model))]
    for key in ("learned", "effective", "random"):
        assert log[f"router/lambda_{key}"] == pytest.approx(sum(one[key] for one in alignments) / 2, rel=1e-5)
    assert 0 <= log["router/entropy"] <= 1 and 0 <= log["router/load_entropy"] <= 1
    assert not any(key.startswith("router/") for key in trainer.state.log_history[-1])  # the summary


def test_a_dense_model_is_refused(tmp_path):
    model = qwen(mlp_only_layers=[0, 1])
    with pytest.raises(TypeError, match="no mixture of experts"):
        train(model, tmp_path, [RouterDoctorCallback()])


@pytest.mark.parametrize("mpi", [False, True])
def test_decay_groups_hold_every_trained_parameter_once(mpi):
    model = apply_mpi(qwen()) if mpi else qwen()
    model.model.embed_tokens.weight.requires_grad_(False)
    groups = weight_decay_groups(model, 0.1, router_weight_decay=0.01)
    by_decay = {group["weight_decay"]: {id(parameter) for parameter in group["params"]} for group in groups}
    assert by_decay[0.01] == {id(layer.learned) for layer in routers(model)}
    assert by_decay[0.0] == {id(parameter) for parameter in model.parameters() if parameter.ndim < 2}
    assert sum(map(len, by_decay.values())) == sum(parameter.requires_grad for parameter in model.parameters())
    default = {group["weight_decay"]: len(group["params"]) for group in weight_decay_groups(model)}
    assert default[0.0] == len(by_decay[0.0]) + 2 and default[0.1] == len(by_decay[0.1])
    with pytest.raises(ValueError, match="router_weight_decay=-1 must be 0 or more"):
        weight_decay_groups(model, router_weight_decay=-1)


def test_decay_does_not_touch_the_effective_router(tmp_path):
    """With the gradients at zero, decay shortens learned rows and leaves what they route with."""
    model = apply_mpi(qwen())
    before = [layer.weight().detach().clone() for layer in routers(model)]
    lengths = [layer.learned.detach().norm() for layer in routers(model)]
    optimizer = torch.optim.SGD(weight_decay_groups(model, 0.0, router_weight_decay=0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for layer, weight, length in zip(routers(model), before, lengths, strict=True):
        torch.testing.assert_close(layer.weight().detach(), weight)
        assert layer.learned.detach().norm() == pytest.approx(0.95 * length.item(), rel=1e-5)
