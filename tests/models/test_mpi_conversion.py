import copy

import pytest
import torch
from helpers.mixtures import MOE
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_rb import apply_mpi, fold_mpi
from hf_rb.models.mpi import effective_router
from hf_rb.models.mpi.conversion import advance, routers
from hf_rb.models.mpi.functional import expert_matrix


LAYERS = {"deepseek_v3": 1}  # its first layer is dense; the others have two


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=6, do_sample=False, **options)


@pytest.mark.parametrize("architecture", MOE)
def test_apply_and_fold(architecture, make_mixture, ids, evaluations, tmp_path):
    """On every family: another function, trained through, folded to the same one, bit by bit, in a native checkpoint."""
    model = make_mixture(architecture)
    native, before = type(model), model(ids).logits
    assert apply_mpi(model) is model
    layers = list(routers(model))
    assert len(layers) == LAYERS.get(architecture, 2)
    for layer in layers:
        expected = effective_router(layer.learned, expert_matrix(layer.experts), 2.0)
        assert torch.equal(layer.weight(), expected) and torch.equal(layer.router.weight, expected)
    logits = model(ids).logits
    assert not torch.allclose(logits, before, atol=1e-4)

    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(layer.learned.grad.any() for layer in layers)
    model.zero_grad()
    model.eval()

    del evaluations[:]
    generated = generate(model, ids)
    assert len(evaluations) == len(layers)  # one a layer, however many tokens

    assert fold_mpi(model) is model and type(model) is native
    assert torch.equal(model(ids).logits, logits) and torch.equal(generate(model, ids), generated)
    assert all(type(layer.router).__name__.endswith("outer") and layer.mpi is None for layer in routers(model))
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert type(loaded) is native and not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded.eval()(ids).logits, logits)


def test_experts_without_a_gate(ids):
    sizes = dict(
        vocab_size=64, hidden_size=64, layers_block_type=["moe", "attention"], num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, intermediate_size=24, n_group=1,
        topk_group=1, mamba_num_heads=4, mamba_head_dim=32, n_shared_experts=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("nemotron_h", **sizes)).eval()
    (layer,) = routers(apply_mpi(model, norm=1.0))
    torch.testing.assert_close(layer.weight(), effective_router(layer.learned, layer.experts.up_proj, 1.0, norm=1.0))
    logits = model(ids).logits
    assert torch.equal(fold_mpi(model)(ids).logits, logits)


def test_plain_layers_have_routers_too(make_mixture):
    layers = list(routers(make_mixture("gpt_oss")))
    assert [layer.name for layer in layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for layer in layers:
        assert layer.mpi is None and layer.learned is layer.router.weight is layer.weight()
        assert layer.expert_matrix().shape == (4, 192, 192)


def test_router_logits_are_recorded(make_mixture, ids):
    model = apply_mpi(make_mixture())
    outputs = model(ids, output_router_logits=True)
    assert [logits.shape for logits in outputs.router_logits] == [(14, 4)] * 2
    # A row of length C, and a token of root mean square 1.
    assert all(logits.abs().max() <= 2.0 / 4**0.5 * 192**0.5 * 1.001 for logits in outputs.router_logits)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mpi_qwen3_moe"])
def test_the_effective_router_is_kept_until_something_changes(architecture, make_mixture, ids, evaluations):
    model = make_mixture(architecture)
    if architecture == "qwen3_moe":
        apply_mpi(model)
    layer = next(routers(model))

    def computed(change=lambda: None):
        change()
        del evaluations[:]
        with torch.no_grad():
            model(ids), model(ids)
        return len(evaluations)

    @torch.no_grad()
    def update(parameter):
        parameter.mul_(1.5).add_(0.01)

    assert computed(model.eval) == 2
    assert computed() == 0
    assert computed(lambda: update(layer.learned)) == 1
    assert computed(lambda: update(layer.experts.gate_up_proj)) == 1
    assert computed(lambda: update(layer.experts.down_proj)) == 0  # not what the router is iterated with
    assert computed(lambda: model.load_state_dict(model.state_dict())) == 2
    assert (
        computed(lambda: setattr(layer.experts, "gate_up_proj", nn.Parameter(layer.experts.gate_up_proj.detach())))
        == 1
    )
    assert computed(model.bfloat16) == 2
    assert computed(lambda: model(ids)) == 2  # a pass with gradients: an optimizer's step may follow
    assert computed(lambda: model.train()) == 2 and computed() == 0
    assert computed(lambda: model.eval()) == 2
    with torch.inference_mode():
        assert computed(model.eval) == 2
    assert computed() == 0
    assert not model(ids).logits.isnan().any() and model(ids).logits.requires_grad


def test_kept_routers_give_the_logits_of_new_ones(make_mixture, ids):
    model = apply_mpi(make_mixture())
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    with torch.no_grad():
        before = model(ids).logits
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(ids).logits
        model.eval()
        assert torch.equal(model(ids).logits, after) and not torch.equal(after, before)


def test_generation_does_not_depend_on_the_cache_or_on_padding(make_mixture, ids):
    model = apply_mpi(make_mixture())
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(10) >= 3).long().expand(2, 10)
    assert torch.equal(generate(model, padded, attention_mask=mask)[:, 3:], generate(model, ids))


@pytest.mark.parametrize("architecture", ["mpi_qwen3_moe", "mpi_mixtral", "qwen3_moe"])
def test_padded_prompts_after_a_training_that_saved_its_flag(architecture, make_mixture, ids):
    model = make_mixture(architecture)
    if architecture == "qwen3_moe":
        apply_mpi(model)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(10) >= 3).long().expand(2, 10)
    expected = generate(model, ids)
    model.config.output_router_logits = True  # as TRL's trainers leave it
    if architecture != "qwen3_moe":
        assert torch.equal(generate(model, padded, attention_mask=mask)[:, 3:], expected)
    assert torch.equal(generate(fold_mpi(model), padded, attention_mask=mask)[:, 3:], expected)


def test_copies_of_a_model_stand_alone_and_of_a_router_do_not(make_mixture, ids):
    model = apply_mpi(make_mixture())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for layer in routers(copied):
        assert layer.mpi.expert_matrix().data_ptr() == layer.experts.gate_up_proj.data_ptr()
    assert copied(ids).logits.any()
    layer = next(routers(copied))
    alone = copy.deepcopy(layer.router)
    assert torch.equal(alone.weight, layer.weight())
    assert alone.parametrizations.weight[0].expert_matrix().data_ptr() == layer.experts.gate_up_proj.data_ptr()


def test_in_place_iteration_is_as_many_steps_at_once(make_mixture, ids):
    model = apply_mpi(make_mixture(), mode="inplace")
    starts = [layer.learned.clone() for layer in routers(model)]
    for _ in range(3):
        advance(model)
    for layer, start in zip(routers(model), starts, strict=True):
        torch.testing.assert_close(layer.weight(), effective_router(start, expert_matrix(layer.experts), 2.0, iters=3))
    logits = model(ids).logits
    assert torch.equal(fold_mpi(model)(ids).logits, logits)


def test_a_ramp_begins_with_the_trained_router(make_mixture, ids):
    model = make_mixture()
    trained = model(ids).logits
    apply_mpi(model, ramp_steps=4)
    torch.testing.assert_close(model(ids).logits, trained)
    layer = next(routers(model))
    start, effective = layer.learned, effective_router(layer.learned, expert_matrix(layer.experts), 2.0)
    with torch.no_grad():
        for share in (0.25, 0.5, 0.75, 1.0, 1.0):
            advance(model)
            torch.testing.assert_close(layer.weight(), (1 - share) * start + share * effective)
    assert torch.equal(layer.weight(), effective)
    state = model.state_dict()
    resumed = apply_mpi(make_mixture(seed=1), ramp_steps=4)
    resumed.load_state_dict(state)
    assert torch.equal(resumed(ids).logits, model(ids).logits)
    logits = model(ids).logits
    assert torch.equal(fold_mpi(model)(ids).logits, logits)


def test_a_training_is_resumed_from_an_unfolded_checkpoint(make_mixture, ids, tmp_path):
    model = apply_mpi(make_mixture(), matrix="up", iters=2, scale=4.0)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    resumed = apply_mpi(make_mixture(seed=1), matrix="up", iters=2, scale=4.0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(resumed(ids).logits, model(ids).logits)


def test_bfloat16_is_folded_in_float32(make_mixture, ids):
    model = apply_mpi(make_mixture(dtype=torch.bfloat16))
    exact = [
        effective_router(layer.learned.float(), layer.expert_matrix().float(), 2.0).bfloat16()
        for layer in routers(model)
    ]
    assert model(ids).logits.isfinite().all()
    fold_mpi(model)
    assert all(torch.equal(layer.weight(), weight) for layer, weight in zip(routers(model), exact, strict=True))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("architecture", ["mpi_qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_the_gradient_that_goes_through_the_experts_is_autograds(architecture, implementation, make_mixture, ids):
    """With the weight that the router lends to its experts, and without, also where experts are left half way."""
    gradients = []
    for lends in (True, False):
        model = make_mixture(architecture)
        if architecture == "mpi_qwen3_moe":
            model.config.output_router_logits, model.router_aux_loss_coef = True, 1.0
        else:
            apply_mpi(model, matrix="up", iters=2)
        model.set_experts_implementation(implementation)
        layers = list(routers(model.train()))
        if not lends:
            for layer in layers:
                layer.mpi.remove_hooks()
        layers[0].weight()  # not used: the next pass does not mind
        model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        assert all(isinstance(layer.experts.gate_up_proj, nn.Parameter) for layer in layers)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        with pytest.raises((RuntimeError, IndexError)):
            layers[0].weight()
            layers[0].experts(torch.zeros(3, 5), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
        assert isinstance(layers[0].experts.gate_up_proj, nn.Parameter)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_router_makes_no_gradient_of_the_experts_size(make_mixture, ids, monkeypatch):
    made = []
    monkeypatch.setattr(
        torch, "zeros_like", lambda tensor: made.append(tensor.shape) or tensor.new_zeros(tensor.shape)
    )
    model = make_mixture("mpi_qwen3_moe").train()
    model(ids, labels=ids).loss.backward()
    experts = next(routers(model)).experts
    assert experts.gate_up_proj.shape not in made
    fold_mpi(model)
    assert not experts._forward_hooks and not experts._forward_pre_hooks


class TestLora:
    @pytest.fixture
    def adapted(self, make_mixture):
        """An adapter on both weights of the experts, with effect."""
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets)
        model = get_peft_model(apply_mpi(make_mixture()), config).eval()
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
        return model

    def test_routers_see_the_adapter(self, adapted, ids):
        logits = adapted(ids).logits
        layer = next(routers(adapted))
        base = effective_router(layer.learned, expert_matrix(layer.experts.get_base_layer()), 2.0)
        assert not torch.allclose(layer.weight(), base, atol=1e-3)
        with adapted.disable_adapter():
            torch.testing.assert_close(layer.weight(), base)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, logits, atol=1e-5, rtol=1e-4)

    def test_the_adapter_gets_the_routers_gradient(self, adapted):
        layer = next(routers(adapted))
        layer.weight()[:, 0].sum().backward()
        wrappers = {layer.experts.parameter_name: layer.experts}
        wrappers[layer.experts.base_layer.parameter_name] = layer.experts.base_layer
        assert wrappers["gate_up_proj"].lora_A["default"].weight.grad.any()
        assert wrappers["gate_up_proj"].lora_B["default"].weight.grad.any()
        assert wrappers["down_proj"].lora_A["default"].weight.grad is None

    def test_a_kept_router_follows_the_adapter(self, adapted, ids):
        with torch.no_grad():
            logits = adapted(ids).logits
            for name, parameter in adapted.named_parameters():
                if "experts" in name and "lora_B" in name:
                    parameter.mul_(2)
            changed = adapted(ids).logits
            assert not torch.equal(changed, logits)
            with adapted.disable_adapter():
                off = adapted(ids).logits
            assert torch.equal(adapted(ids).logits, changed) and not torch.equal(off, changed)

    def test_folding_needs_it_merged(self, adapted, ids):
        before = adapted(ids).logits
        with pytest.raises(ValueError, match=r"The experts have an adapter.*merge_and_unload\(\).*then fold"):
            fold_mpi(adapted)
        assert torch.equal(adapted(ids).logits, before)  # as it was
        model = adapted.merge_and_unload()
        logits = model(ids).logits
        assert torch.equal(fold_mpi(model)(ids).logits, logits)


class TestRefusals:
    def test_apply_to_a_model_without_experts_is_refused(self):
        with pytest.raises(TypeError, match="Linear has no layer with fused `experts` beside a `gate` or `router`"):
            apply_mpi(nn.Linear(2, 2))

    def test_apply_or_fold_a_second_time_is_refused(self, make_mixture):
        model = apply_mpi(make_mixture())
        with pytest.raises(ValueError, match="have MPI already: `fold_mpi` makes them ordinary"):
            apply_mpi(model)
        with pytest.raises(ValueError, match="have MPI already"):
            apply_mpi(make_mixture("mpi_mixtral"))
        with pytest.raises(ValueError, match="folded already, or `apply_mpi` was never called"):
            fold_mpi(fold_mpi(model))

    def test_rows_of_zeros(self, make_mixture):
        model = make_mixture()
        with torch.no_grad():
            model.model.layers[1].mlp.gate.weight[[0, 2]] = 0
        with pytest.raises(
            ValueError, match=r"2 of 4 rows of a router are zero \(0, 2\).*normal_\(router.weight, std=0.02\)"
        ):
            apply_mpi(model)
        assert not any(layer.mpi for layer in routers(model))  # nothing is done by halves
        model = apply_mpi(make_mixture())
        with torch.no_grad():
            next(routers(model)).learned.zero_()
        with pytest.raises(ValueError, match="4 of 4 rows of a router are zero"):
            fold_mpi(model)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scale": 0}, "scale=0 must be positive"),
            ({"norm": -1.0}, "norm=-1.0 must be positive"),
            ({"matrix": "gates"}, "matrix='gates' must be one of 'gate', 'up', 'down'"),
            ({"iters": 1.5}, "iters=1.5 must be an integer of 0 or more"),
            ({"mode": "in-place"}, "mode='in-place' must be one of 'reparam', 'inplace'"),
            ({"grad": "no"}, "grad='no' must be one of"),
            ({"ramp_steps": -1}, "ramp_steps=-1 must be an integer"),
            ({"ramp_steps": 3, "mode": "inplace"}, "ramp_steps has no meaning with mode='inplace'"),
        ],
    )
    def test_options(self, options, message, make_mixture):
        with pytest.raises(ValueError, match=message):
            apply_mpi(make_mixture(), **options)

    def test_fused_kernels(self, make_mixture):
        model = make_mixture("gpt_oss")
        model._use_kernels = True
        with pytest.raises(ValueError, match="`use_kernels=True` may pass the routers by"):
            apply_mpi(model)

    def test_experts_that_are_split_over_processes(self, make_mixture):
        model = make_mixture()
        for layer in model.model.layers:  # as expert parallelism leaves them: a part of the experts, routers whole
            layer.mlp.experts._is_expert_parallel, layer.mlp.experts.num_experts = True, 2
        with pytest.raises(ValueError, match="split over processes.*expert parallelism are not supported before"):
            apply_mpi(model)

    def test_another_adapter_on_the_experts(self, make_mixture):
        model = apply_mpi(make_mixture())
        layer = next(routers(model))
        wrapper = nn.Module()
        wrapper.base_layer, wrapper.num_experts = layer.experts, 4
        model.model.layers[0].mlp.experts = wrapper
        with pytest.raises(TypeError, match="cannot see the adapter Module on its experts: use LoRA"):
            layer.weight()


def test_a_trained_model_is_warned_about(make_mixture, tmp_path):
    make_mixture().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="was trained with ordinary routers.*`ramp_steps` makes that gradual"):
        apply_mpi(AutoModelForCausalLM.from_pretrained(tmp_path))


def test_weights_that_do_not_sum_to_one_are_warned_about(make_mixture):
    with pytest.warns(UserWarning, match="not normalized to a sum of one.*`norm_topk_prob=True`"):
        apply_mpi(make_mixture(norm_topk_prob=False))
