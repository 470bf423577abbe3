import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from helpers.mixtures import MOE, MOE_SIZES
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen3MoeForCausalLM,
)
from transformers.distributed import DistributedConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, load_balancing_loss_func

from hf_rb import MPIQwen3MoeConfig, MPIQwen3MoeForCausalLM, apply_mpi, fold_mpi
from hf_rb.evaluation import decode_speed
from hf_rb.models.mpi import effective_router
from hf_rb.models.mpi.conversion import advance, routers
from hf_rb.models.mpi.functional import expert_matrix
from hf_rb.models.mpi.losses import auxiliary_loss
from hf_rb.utils import compat


FAMILIES = ["qwen3_moe", "olmoe", "mixtral"]
SIZES = MOE_SIZES | MOE["qwen3_moe"] | dict(vocab_size=64)


@pytest.fixture
def said(recwarn):
    """Returns what has been warned of, by Python's warnings and by transformers' logger."""
    records, handler = [], logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield lambda: [*(str(one.message) for one in recwarn), *(one.getMessage() for one in records)]
    logger.removeHandler(handler)


def load(folder, auto=AutoModelForCausalLM, dtype=torch.float32, **options):
    model, report = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_is_the_native_class_with_the_router_of_the_paper(self, family, make_mixture, ids):
        model, native = make_mixture(f"mpi_{family}"), make_mixture(family)
        assert type(model).__name__ == "MPI" + type(native).__name__
        assert model.state_dict().keys() == native.state_dict().keys()
        native.load_state_dict(model.state_dict())
        torch.testing.assert_close(apply_mpi(native)(ids).logits, model(ids).logits, atol=0, rtol=0)

    def test_a_cache_by_either_name_is_taken_without_a_warning(self, family, make_mixture, ids, said):
        model = make_mixture(f"mpi_{family}")
        with torch.no_grad():
            whole = model(ids).logits[:, -1]
            for name in ("cache", "past_key_values"):
                (cache,) = compat.cache_of(model(ids[:, :-1], use_cache=True)).values()
                logits = model(ids[:, -1:], use_cache=True, **{name: cache}).logits[:, -1]
                # Sums over other lengths, in float32.
                torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)
        generated = model.generate(ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False), generated)
        decode_speed(model, new_tokens=2, prompt_tokens=3, repeats=1)
        assert [one for one in said() if "cache" in one or "past_key_values" in one] == []

    def test_native_checkpoints_load_and_a_folded_model_is_native(self, family, make_mixture, ids, tmp_path):
        native = make_mixture(family)
        native.save_pretrained(tmp_path / "native")
        with safe_open(tmp_path / "native" / "model.safetensors", "pt") as file:
            assert any(".experts.3." in key for key in file.keys())  # a tensor an expert, as on the Hub
        ours = type(make_mixture(f"mpi_{family}"))
        with pytest.warns(UserWarning, match=f"of the type '{family}', with ordinary routers.*`apply_mpi"):
            model = load(tmp_path / "native", ours)
        assert model.config.model_type == f"mpi_{family}"
        assert all(torch.equal(value, native.state_dict()[name]) for name, value in model.state_dict().items())
        logits = model(ids).logits
        generated = model.generate(ids, max_new_tokens=5, do_sample=False)

        model.save_pretrained(tmp_path / "ours")
        again = load(tmp_path / "ours")
        assert type(again) is ours and torch.equal(again(ids).logits, logits)

        folded = fold_mpi(model)
        assert type(folded) is type(native) and type(folded.model) is type(native.model)
        assert type(folded.config) is type(native.config) and folded.config is folded.model.config
        assert torch.equal(folded(ids).logits, logits)
        assert torch.equal(folded.generate(ids, max_new_tokens=5, do_sample=False), generated)
        assert len(folded(ids, output_router_logits=True).router_logits) == 2
        folded.save_pretrained(tmp_path / "folded")
        config = json.loads((tmp_path / "folded" / "config.json").read_text())
        assert config["model_type"] == family and config["architectures"] == [type(native).__name__]
        assert not {"auto_map", "lb_type", "z_loss_coef"} & config.keys() and not any("mpi" in key for key in config)
        again = load(tmp_path / "folded")
        assert type(again) is type(native) and torch.equal(again(ids).logits, logits)

    def test_experts_run_as_in_the_native_class(self, family, make_mixture, ids):
        model = make_mixture(f"mpi_{family}")
        assert model.config._experts_implementation == "grouped_mm"
        logits = model(ids).logits
        for implementation in ("eager", "batched_mm"):
            model.set_experts_implementation(implementation)
            torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-5)

    def test_routers_stay_in_float32(self, family, make_mixture, ids, tmp_path):
        make_mixture(f"mpi_{family}").save_pretrained(tmp_path)
        model = load(tmp_path, dtype=torch.bfloat16)
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
        assert wide == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)}
        assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
        assert model(ids, labels=ids).loss.isfinite()
        folded = fold_mpi(model)
        assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}
        assert folded(ids).logits.isfinite().all()

    def test_trains(self, family, make_mixture, ids):
        model = make_mixture(f"mpi_{family}", output_router_logits=True).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        losses = []
        for _ in range(8):
            outputs = model(ids, labels=ids)
            outputs.loss.backward()
            assert all(layer.learned.grad.any() for layer in routers(model))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(outputs.loss.item())
        assert losses[-1] < 0.5 * losses[0]

    def test_gradients_are_the_same_with_checkpointing(self, family, make_mixture, ids):
        gradients = []
        for checkpointing in (False, True):
            model = make_mixture(f"mpi_{family}", output_router_logits=True, router_aux_loss_coef=1.0).train()
            if checkpointing:
                model.gradient_checkpointing_enable()  # not reentrant by default
            model(ids, labels=ids).loss.backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        torch.testing.assert_close(*gradients, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        (dict(mpi_matrix="down", mpi_iters=3), dict(scale=2.0, iters=3)),
        (dict(mpi_scale=4), dict(scale=4.0)),
        (dict(mpi_norm=1.0), dict(scale=0.0, norm=1.0)),
        (dict(mpi_iters=0), dict(scale=2.0, iters=0)),
        (dict(mpi_grad="detach_experts"), dict(scale=2.0)),
    ],
)
def test_fields_of_the_configuration_act(fields, options, make_mixture):
    layer = next(routers(make_mixture("mpi_qwen3_moe", **fields)))
    matrices = expert_matrix(layer.experts, fields.get("mpi_matrix", "gate"))
    torch.testing.assert_close(layer.weight(), effective_router(layer.learned, matrices, **options))
    layer.weight().sum().backward()
    no_gradient = layer.experts.gate_up_proj if layer.mpi.matrix == "down" else layer.experts.down_proj
    assert no_gradient.grad is None
    assert (layer.experts.gate_up_proj.grad is None) == ("mpi_scale" not in fields and "mpi_norm" not in fields)


def test_in_place_mode_of_the_class(make_mixture, ids):
    model = make_mixture("mpi_qwen3_moe", mpi_mode="inplace")
    layer = next(routers(model))
    start = layer.learned.clone()
    assert torch.equal(layer.weight(), start)
    advance(model)
    torch.testing.assert_close(layer.weight(), effective_router(start, expert_matrix(layer.experts), 2.0))
    logits = model(ids).logits
    assert torch.equal(fold_mpi(model)(ids).logits, logits)


def test_it_is_built_once(monkeypatch):
    built, build = [], Qwen3MoeExperts.__init__
    monkeypatch.setattr(Qwen3MoeExperts, "__init__", lambda *args: (built.append(args), build(*args))[1])
    MPIQwen3MoeForCausalLM(MPIQwen3MoeConfig(**SIZES))
    assert len(built) == 2


def test_dense_layers_stay_dense(make_mixture, ids):
    model = make_mixture("mpi_qwen3_moe", mlp_only_layers=[0])
    assert [layer.name for layer in routers(model)] == ["model.layers.1.mlp"]
    assert model(ids).logits.isfinite().all()


def test_a_router_compiles_without_a_graph_break(make_mixture):
    block = next(routers(make_mixture("mpi_qwen3_moe")))
    hidden = torch.randn(5, 192)
    compiled = torch.compile(block.router, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden), block.router(hidden))


def test_other_heads(make_mixture, ids, tmp_path):
    make_mixture("mpi_qwen3_moe").save_pretrained(tmp_path)
    backbone, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and set(report["unexpected_keys"]) == {"lm_head.weight"}
    assert type(backbone).__name__ == "MPIQwen3MoeModel" and len(list(routers(backbone))) == 2
    config = AutoConfig.from_pretrained(tmp_path, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert type(model.model) is type(backbone)
    logits = model(ids).logits
    assert logits.shape == (2, 3)
    folded = fold_mpi(model)
    assert type(folded).__name__ == "Qwen3MoeForSequenceClassification" and torch.equal(folded(ids).logits, logits)


class TestAuxiliaryLoss:
    def test_it_is_that_of_the_configuration(self, make_mixture, ids):
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        for fields in (dict(), dict(lb_type="layer"), dict(lb_type="hf"), dict(z_loss_coef=0.001)):
            model = make_mixture("mpi_qwen3_moe", output_router_logits=True, **fields)
            outputs = model(ids, attention_mask=mask, labels=ids)
            expected = auxiliary_loss(model.config, outputs.router_logits, ids.shape, mask)
            torch.testing.assert_close(outputs.aux_loss, expected)
            model.config.output_router_logits = False
            plain = model(ids, attention_mask=mask, labels=ids)
            assert plain.aux_loss is None and plain.router_logits is None
            torch.testing.assert_close(outputs.loss, plain.loss + 0.01 * expected)
            if fields == dict(lb_type="hf"):
                torch.testing.assert_close(expected, load_balancing_loss_func(outputs.router_logits, 4, 2, mask))

    def test_through_it_the_router_reaches_the_gates_and_only_them(self, make_mixture, ids):
        model = make_mixture("mpi_qwen3_moe")
        model(ids, output_router_logits=True).aux_loss.backward()
        layer = list(routers(model))[-1]  # no layer behind it that the experts' outputs reach
        gate, up = layer.experts.gate_up_proj.grad.chunk(2, dim=1)
        weight = expert_matrix(layer.experts).detach()
        assert gate.any() and not up.any() and layer.experts.down_proj.grad is None
        assert torch.linalg.matrix_rank(gate).tolist() == [2] * 4
        torch.testing.assert_close((gate * weight).sum((1, 2)), torch.zeros(4), atol=1e-7, rtol=0)
        torch.testing.assert_close((layer.learned.grad * layer.learned).sum(1), torch.zeros(4), atol=1e-7, rtol=0)

    def test_reentrant_checkpointing_is_refused(self, make_mixture, ids):
        model = make_mixture("mpi_qwen3_moe").train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
        with pytest.raises(
            ValueError, match='auxiliary loss.*no gradient: use `gradient_checkpointing_kwargs={"use_reent'
        ):
            model(ids, labels=ids, output_router_logits=True)

    def test_generation_does_not_mind_it(self, make_mixture, ids):
        model = make_mixture("mpi_qwen3_moe")
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        model.config.output_router_logits = True
        mask = torch.ones_like(ids)
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False), generated)

    def test_a_tuple_on_request(self, make_mixture, ids):
        model = make_mixture("mpi_qwen3_moe")
        outputs = model(ids, labels=ids, return_dict=False)
        assert isinstance(outputs, tuple) and outputs[0].ndim == 0
        assert model(ids, logits_to_keep=1).logits.shape == (2, 1, 64)


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (dict(mpi_scale=0), "mpi_scale=0 must be positive"),
            (dict(mpi_norm=-1.0), "mpi_norm=-1.0 must be positive"),
            (dict(mpi_matrix="gates"), "mpi_matrix='gates' must be one of 'gate', 'up', 'down'"),
            (dict(mpi_iters=-1), "mpi_iters=-1 must be an integer of 0 or more"),
            (dict(mpi_mode="in_place"), "mpi_mode='in_place' must be one of"),
            (dict(mpi_grad="none"), "mpi_grad='none' must be one of"),
            (dict(mpi_eps=0.0), "mpi_eps=0.0 must be positive"),
            (dict(lb_type="batch"), "lb_type='batch' must be one of 'sequence', 'layer', 'hf'"),
            (dict(z_loss_coef=-1), "z_loss_coef=-1 must be 0 or more"),
            (dict(norm_topk_prob=False), "must sum to one.*pass `norm_topk_prob=True`"),
            (
                dict(model_type="olmoe"),
                "MPIQwen3MoeConfig is for checkpoints of the type 'qwen3_moe' or 'mpi_qwen3_moe'",
            ),
        ],
    )
    def test_config_fields_out_of_range_are_refused(self, fields, message):
        with pytest.raises((ValueError, TypeError), match=message):
            MPIQwen3MoeConfig(**SIZES, **fields)

    def test_config_fields_of_a_wrong_type_are_refused(self):
        for fields in (dict(mpi_scale="2"), dict(mpi_iters=1.0), dict(lb_type=1)):
            with pytest.raises(StrictDataclassFieldValidationError, match=f"field '{next(iter(fields))}'"):
                MPIQwen3MoeConfig(**SIZES, **fields)

    def test_a_checkpoint_or_a_configuration_of_another_family(self, make_mixture, tmp_path):
        make_mixture("mixtral").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="got one of the type 'mixtral'"):
            MPIQwen3MoeForCausalLM.from_pretrained(tmp_path)
        for config in (AutoConfig.for_model("mpi_olmoe"), AutoConfig.for_model("qwen3_moe")):
            with pytest.raises(
                TypeError, match="MPIQwen3MoeForCausalLM needs a configuration of the class MPIQwen3MoeConfig"
            ):
                MPIQwen3MoeForCausalLM(config)

    @pytest.mark.parametrize("plan", [dict(tp_size=2), dict(fsdp_size=2, ep_size=2)])
    def test_tensor_and_expert_parallelism(self, plan):
        config = MPIQwen3MoeConfig(**SIZES)
        config.distributed_config = DistributedConfig(**plan)
        with pytest.raises(ValueError, match="tensor and expert parallelism are not supported before `fold_mpi`"):
            MPIQwen3MoeForCausalLM(config)
        config.distributed_config = DistributedConfig(fsdp_size=2)
        MPIQwen3MoeForCausalLM(config)

    def test_rows_of_zeros(self, make_mixture, ids):
        model = make_mixture("mpi_qwen3_moe")
        with torch.no_grad():
            model.model.layers[0].mlp.gate.weight[1] = 0
        with pytest.raises(ValueError, match=r"1 of 4 rows of a router are zero \(1\)"):
            model(ids)


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
assert not any(name.partition(".")[0] == "hf_rb" for name in sys.modules)
assert type(model).__module__.startswith("transformers_modules.") and type(model.model).__name__.startswith("MPI")
assert model.config._experts_implementation == "grouped_mm", model.config._experts_implementation
data = torch.load(folder + "/expected.pt", weights_only=True)
torch.testing.assert_close(model(data["ids"]).logits, data["logits"], atol=0, rtol=0)
outputs = model(data["ids"], labels=data["ids"], output_router_logits=True)
outputs.loss.backward()
assert len(outputs.router_logits) == 2 and outputs.aux_loss > 1
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_code_from_the_hub_needs_nothing_of_this_package(family, make_mixture, ids, tmp_path, monkeypatch):
    model = make_mixture(f"mpi_{family}")
    monkeypatch.setattr(type(model), "_auto_class", None)
    monkeypatch.setattr(type(model.config), "_auto_class", None)
    model.config.register_for_auto_class()
    model.register_for_auto_class("AutoModelForCausalLM")
    with pytest.raises(ValueError, match=r"write `model.push_to_hub\(repo_id\)`"):
        model.save_pretrained(tmp_path / "model", push_to_hub=True)
    model.save_pretrained(tmp_path / "model")
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "model" / "expected.pt")
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "model")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_native_class_is_as_before(make_mixture, ids):
    """Nothing of ours is left in transformers' own classes."""
    make_mixture("mpi_qwen3_moe")
    model = make_mixture("qwen3_moe")
    assert type(model) is Qwen3MoeForCausalLM and not any(layer.mpi for layer in routers(model))
    assert model.config.router_aux_loss_coef == 0.001 and not hasattr(model.config, "mpi_scale")
