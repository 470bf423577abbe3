"""MPI routers through the real trainers, with adapters, and quantized after folding."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_rb import (
    DistillationConfig,
    DistillationTrainer,
    GKDConfig,
    GKDTrainer,
    GRPOConfig,
    GRPOTrainer,
    MPIQwen3MoeConfig,
    MPIQwen3MoeForCausalLM,
    PTQTPConfig,
    SFTConfig,
    SFTTrainer,
    tiny,
)
from hf_rb.cli import main
from hf_rb.io.resources import resource_folder
from hf_rb.models.mpi import apply_mpi, fold_mpi
from hf_rb.models.mpi.callbacks import MPICallback
from hf_rb.models.mpi.conversion import routers
from hf_rb.report import make_report, read_source
from hf_rb.scripts import sft
from hf_rb.trainers.audit import audit
from hf_rb.trainers.common.routers import add_router_doctor


RECIPES = resource_folder("recipes") / "mpi"
SIZES = dict(
    vocab_size=1024, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, eos_token_id=2, pad_token_id=0,
    tie_word_embeddings=True, initializer_range=0.1,
)  # fmt: skip
RUN = dict(
    use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=1, per_device_train_batch_size=4, logging_steps=1,
    save_strategy="no", report_to="none", disable_tqdm=True, max_length=96, seed=1,
)  # fmt: skip


def mixture(mpi=True, seed=0, **fields):
    torch.manual_seed(seed)
    if mpi:
        return MPIQwen3MoeForCausalLM(MPIQwen3MoeConfig(**SIZES | fields))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | dict(norm_topk_prob=True) | fields))


def rows(size=4, config="prompt_completion"):
    return tiny.load_dataset("math", config=config, size=size).select_columns(
        ["prompt"] if config == "prompt_only" else ["prompt", "completion"]
    )


def train_sft(model, tokenizer, folder, data=None, **fields):
    args = SFTConfig(str(folder), **RUN | fields)
    trainer = SFTTrainer(model, args=args, train_dataset=data or rows(), processing_class=tokenizer)
    trainer.train()
    return trainer


def batch_of(trainer):
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "position_ids")}


def expected_aux(model, batch, kind):
    with torch.no_grad():
        outputs = model(
            **batch, output_router_logits=True, use_cache=False
        )  # with a cache, packed sequences see each other
    if kind != "hf":
        return outputs.aux_loss.item()
    return load_balancing_loss_func(outputs.router_logits, 4, 2, batch.get("attention_mask")).item()


@pytest.mark.parametrize("kind", ["sequence", "layer", "hf"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_sft_has_the_auxiliary_loss_of_the_configuration(tokenizer, tmp_path, kind, padding_free):
    model = mixture(lb_type=kind)
    start = copy.deepcopy(model)
    packing = dict(packing=True, packing_strategy="bfd", max_length=256) if padding_free else {}
    trainer = train_sft(model, tokenizer, tmp_path, learning_rate=0.0, **packing)
    logged = trainer.state.log_history[0]["aux_loss"]
    assert logged == pytest.approx(expected_aux(start, batch_of(trainer), kind), rel=1e-4)
    assert "mpi" in trainer._tag_names


def test_balance_loss_gradient_is_that_of_the_models_own_pass(tokenizer, tmp_path):
    start = mixture(router_aux_loss_coef=0.5, z_loss_coef=0.1)
    model = copy.deepcopy(start)
    trainer = train_sft(model, tokenizer, tmp_path, learning_rate=1e-2, optim="sgd", max_grad_norm=0.0)
    batch = next(iter(trainer.get_train_dataloader()))
    start.train()(
        **{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}, output_router_logits=True
    ).loss.backward()
    for before, after in zip(routers(start), routers(model), strict=True):
        step = before.learned.detach() - after.learned.detach()
        torch.testing.assert_close(step, 1e-2 * before.learned.grad, rtol=2e-3, atol=1e-8)
        assert step.abs().max() > 0


def test_the_split_into_micro_batches_does_not_change_training(tokenizer, tmp_path):
    """True for the loss per sequence; the loss over a whole micro-batch, as transformers', depends on the split by its nature."""
    trained = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        model = mixture(router_aux_loss_coef=0.5)
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=2)
        train_sft(model, tokenizer, tmp_path, data=rows(8), learning_rate=1e-2, optim="sgd", **options)
        trained.append(model)
    for other in trained[1:]:
        for name, parameter in trained[0].named_parameters():
            torch.testing.assert_close(other.get_parameter(name), parameter, rtol=1e-4, atol=2e-6, msg=name)


def test_a_native_mixture_takes_the_loss_of_its_configuration(tokenizer, tmp_path):
    model = mixture(mpi=False, output_router_logits=True, router_aux_loss_coef=0.01)
    model.config.lb_type = "sequence"
    start = copy.deepcopy(model)
    trainer = train_sft(model, tokenizer, tmp_path, learning_rate=0.0)
    batch = batch_of(trainer)
    logged = trainer.state.log_history[0]["aux_loss"]
    assert logged != pytest.approx(expected_aux(start, batch, "hf"), rel=0.2)
    assert trainer.model(**batch, output_router_logits=True).aux_loss.item() == pytest.approx(logged, rel=1e-4)
    assert "mpi" not in trainer._tag_names


def test_a_balance_loss_that_cannot_act_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="z_loss_coef=0.1 cannot act with router_aux_loss_coef=0"):
        train_sft(mixture(z_loss_coef=0.1), tokenizer, tmp_path, router_aux_loss_coef=0.0)
    sizes = SIZES | dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, intermediate_size=32)
    heads = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, head_dim=8)
    config = DeepseekV3Config(**sizes | heads)
    config.lb_type = "sequence"
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM has no auxiliary loss.*LossFreeBalanceCallback"):
        train_sft(DeepseekV3ForCausalLM(config), tokenizer, tmp_path)


def test_a_trainer_without_an_auxiliary_loss_says_so(tokenizer, tmp_path, caplog):
    run = {key: value for key, value in RUN.items() if key != "max_length"}
    DistillationTrainer(
        mixture(), teacher_model=str(tiny.path("teacher")), args=DistillationConfig(str(tmp_path), **run),
        train_dataset=rows(config="prompt_only"), processing_class=tokenizer,
    )  # fmt: skip
    assert "DistillationTrainer has no auxiliary loss" in caplog.text


def make_trainer(kind, model, tokenizer, folder, **fields):
    """Any of the four trainers, with a recipe of its own for the fields that it alone has."""
    run, teacher = RUN | fields, {"teacher_model": str(tiny.path("teacher"))}
    if kind == "sft":
        return SFTTrainer(model, args=SFTConfig(str(folder), **run), train_dataset=rows(), processing_class=tokenizer)
    if kind == "gkd":
        args = GKDConfig(str(folder), objective="forward_kl", lmbda=0.0, **run)
        return GKDTrainer(model, args=args, train_dataset=rows(), processing_class=tokenizer, **teacher)
    del run["max_length"]
    prompts = {"train_dataset": rows(config="prompt_only"), "processing_class": tokenizer}
    if kind == "distillation":
        args = DistillationConfig(str(folder), max_completion_length=8, **run)
        return DistillationTrainer(model, args=args, **teacher, **prompts)
    args = GRPOConfig(str(folder), num_generations=4, max_completion_length=8, **run)
    return GRPOTrainer(
        model, lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids], args, **prompts
    )


TRAINERS = ("sft", "gkd", "distillation", "grpo")


def aux_losses(trainer):
    trainer.train()
    return [entry["aux_loss"] for entry in trainer.state.log_history if "aux_loss" in entry]


@pytest.mark.parametrize("kind", ["sequence", "hf"])
@pytest.mark.parametrize("mpi", [True, False], ids=["mpi", "native"])
def test_gkd_trains_with_the_auxiliary_loss_of_sft(tokenizer, tmp_path, mpi, kind):
    def start():
        model = mixture(mpi)
        model.config.lb_type = kind
        return model

    trainer = make_trainer("sft", start(), tokenizer, tmp_path, learning_rate=0.0)
    expected = aux_losses(trainer)
    if mpi or kind == "hf":  # transformers knows no other
        assert expected == pytest.approx([expected_aux(start(), batch_of(trainer), kind)], rel=1e-4)
    for loss_impl in ("chunked", "dense"):
        trainer = make_trainer("gkd", start(), tokenizer, tmp_path, learning_rate=0.0, loss_impl=loss_impl)
        assert aux_losses(trainer) == pytest.approx(expected, rel=1e-5), loss_impl
        assert "gkd" in trainer._tag_names and ("mpi" in trainer._tag_names) == mpi


def test_the_balance_loss_of_gkd_has_one_gradient(tokenizer, tmp_path):
    """In both paths, of a native mixture with a large weight and without any learning from the teacher in the routers' way."""
    gradients = []
    for loss_impl in ("chunked", "dense"):
        model = mixture(mpi=False, router_aux_loss_coef=10.0)
        model.config.lb_type = "sequence"
        trainer = make_trainer("gkd", model, tokenizer, tmp_path, loss_impl=loss_impl)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.compute_loss(trainer.model.train(), batch).backward()
        gradients.append([layer.mlp.gate.weight.grad for layer in model.model.layers])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_the_audit_compares_the_balance_loss(tokenizer, tmp_path):
    def found(break_it):
        model = mixture(mpi=False)
        model.config.lb_type = "sequence"
        trainer = make_trainer("gkd", model, tokenizer, tmp_path)
        if break_it:  # transformers' own loss in the dense path, as without the set-up of the routers
            model.forward = type(model).forward.__get__(model)
        (one,) = (one for one in audit(trainer, batches=1) if one.path == "balance loss")
        assert not trainer.aux_loss_enabled and trainer.router_aux_loss_coef == 0.001
        return max(one.loss, one.gradient)

    assert found(break_it=False) < 1e-4  # what `hf-rb audit` accepts
    assert found(break_it=True) > 1e-2


def test_gkd_refuses_an_auxiliary_loss_that_cannot_act(tokenizer, tmp_path):
    model = mixture(mpi=False)
    model.config.lb_type = "sequence"
    model.config.z_loss_coef, model.config.router_aux_loss_coef = 0.1, 0.0
    with pytest.raises(ValueError, match="z_loss_coef=0.1 cannot act"):
        make_trainer("gkd", model, tokenizer, tmp_path)


def test_grpo_trains_routers_and_experts(tokenizer, tmp_path):
    model = mixture()
    start = copy.deepcopy(model)
    run = {key: value for key, value in RUN.items() if key != "max_length"}
    args = GRPOConfig(
        str(tmp_path), num_generations=4, max_completion_length=8, learning_rate=1e-3, **run | {"max_steps": 2}
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completion_ids, **kwargs: [float(len(set(ids))) for ids in completion_ids],
        args=args,
        train_dataset=rows(config="prompt_only"),
        processing_class=tokenizer,
    )
    trainer.train()
    assert 0.9 < trainer.state.log_history[0]["aux_loss"] < 4
    for before, after in zip(routers(start), routers(model), strict=True):
        assert not torch.equal(before.learned, after.learned)
        assert not torch.equal(before.experts.gate_up_proj, after.experts.gate_up_proj)


@pytest.mark.parametrize("kind", TRAINERS)
def test_in_place_routers_are_iterated_by_our_trainers(tokenizer, tmp_path, kind):
    model = mixture(mpi_mode="inplace")
    trainer = make_trainer(kind, model, tokenizer, tmp_path, learning_rate=1e-3)
    trainer.train()
    assert sum(isinstance(one, MPICallback) for one in trainer.callback_handler.callbacks) == 1
    for layer in routers(model):
        assert layer.learned.detach().norm(dim=-1).tolist() == pytest.approx(
            [1.0] * 4, rel=1e-5
        )  # C' / sqrt(N) = 2 / 2
        assert torch.equal(layer.weight(), layer.learned)
    plain = make_trainer(kind, mixture(), tokenizer, tmp_path)
    assert not any(isinstance(one, MPICallback) for one in plain.callback_handler.callbacks)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_ramp_moves_on_with_the_optimizer(tokenizer, tmp_path, kind):
    model = apply_mpi(mixture(mpi=False), ramp_steps=4)
    make_trainer(kind, model, tokenizer, tmp_path, max_steps=3).train()
    assert [layer.mpi.steps.item() for layer in routers(model)] == [3, 3]


def test_a_run_is_saved_resumed_and_folded(tokenizer, tmp_path):
    model = mixture()
    options = dict(save_strategy="steps", save_steps=1, max_steps=2, learning_rate=1e-3)
    trainer = train_sft(model, tokenizer, tmp_path, data=rows(8), **options)
    again = SFTTrainer(
        mixture(seed=3), args=SFTConfig(str(tmp_path), **RUN | options | {"max_steps": 3}), train_dataset=rows(8),
        processing_class=tokenizer,
    )  # fmt: skip
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Manifold Power Iteration" in card and "without this line, loading fails" in card

    folder = tmp_path / "folded"
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
        fold_mpi(model).save_pretrained(folder)
        native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert type(native) is Qwen3MoeForCausalLM and torch.equal(native(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)


def test_a_trainer_takes_the_path_of_a_checkpoint(tokenizer, tmp_path):
    mixture().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    trainer = train_sft(str(tmp_path / "start"), None, tmp_path / "run")
    assert isinstance(trainer.model, MPIQwen3MoeForCausalLM)
    assert json.loads((tmp_path / "start" / "config.json").read_text())["model_type"] == "mpi_qwen3_moe"


def test_routers_see_lora_on_experts_and_fold_after_merging(tokenizer, tmp_path):
    model = mixture()
    before = [layer.weight().detach().clone() for layer in routers(model)]
    lora = LoraConfig(
        r=4, lora_alpha=16, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"], init_lora_weights=False
    )
    args = SFTConfig(str(tmp_path), learning_rate=1e-2, **RUN)
    trainer = SFTTrainer(model, args=args, train_dataset=rows(), processing_class=tokenizer, peft_config=lora)
    trainer.train()
    adapted = trainer.model.eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = adapted(ids).logits
        moved = [layer.weight() for layer in routers(adapted)]
        assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(before, moved, strict=True))
        with pytest.raises(ValueError, match="merge it first"):
            fold_mpi(adapted)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fold_mpi(merged)(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_quantization_comes_after_folding(tokenizer, tmp_path):
    sizes = dict(hidden_size=128, moe_intermediate_size=128, head_dim=64)
    model = mixture(**sizes).eval()
    routed = [layer.weight().detach().clone() for layer in routers(model)]
    model.save_pretrained(tmp_path / "mpi")
    fold_mpi(model).save_pretrained(tmp_path / "folded")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", quantization_config=PTQTPConfig())
    for layer, weight in zip(routers(quantized), routed, strict=True):
        torch.testing.assert_close(layer.learned.detach(), weight)  # the routers are what they were before
    ids = torch.tensor([[5, 6, 7, 8]])
    assert quantized(ids).logits.isfinite().all()
    with pytest.raises((TypeError, ValueError), match="fold"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "mpi", quantization_config=PTQTPConfig())(ids)


def test_a_step_on_rows_without_a_chat_template(tokenizer, tmp_path):
    data = Dataset.from_dict({"text": ["one two three four five six"] * 4})
    trainer = train_sft(mixture(), tokenizer, tmp_path, data=data)
    assert trainer.state.log_history[0]["loss"] > 0


def test_the_recipes_and_what_the_doctor_logs_of_them(tmp_path, monkeypatch):
    """The two commands of the recipes, and the map of `hf-rb report`."""
    monkeypatch.chdir(tmp_path)
    assert main(["upcycle", "--config", str(RECIPES / "tiny-cpu.yaml")]) == 0
    recipe = ["--config", str(RECIPES / "tiny-cpu-sft.yaml"), "--max_steps", "2", "--logging_steps", "1"]
    sft.main([*recipe, "--router_doctor", "layers"])
    log = json.loads((tmp_path / "outputs/mpi-tiny/trainer_state.json").read_text())["log_history"]
    assert {"router/max_vio", "router/dead", "router/lambda_effective", "router/model.layers.0.mlp/max_vio"} <= log[
        1
    ].keys()
    report = make_report([read_source("outputs/mpi-tiny")])
    assert "MaxVio of every layer at 2 logs" in report.markdown()


def test_a_doctor_for_a_dense_model_is_refused(tokenizer, tmp_path):
    model = MPIQwen3MoeForCausalLM(MPIQwen3MoeConfig(**SIZES, mlp_only_layers=[0, 1]))
    trainer = SFTTrainer(model, args=SFTConfig(str(tmp_path), **RUN), train_dataset=rows(), processing_class=tokenizer)
    with pytest.raises(ValueError, match="`router_doctor` looks at the routers .* has none"):
        add_router_doctor(trainer)
