import json

import pytest
import torch
from helpers.random_models import save_qwen3
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_rb.cli import main
from hf_rb.io.safetensors import Checkpoint
from hf_rb.models.mpi import apply_mpi
from hf_rb.models.mpi.conversion import routers
from hf_rb.models.router_report import row_cosine
from hf_rb.models.upcycle import SIMILAR, _shared_width, upcycle


SIZES = dict(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip
DENSE = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 5}),
}
IDS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def save_dense(folder, family="qwen3", dtype=torch.float32, max_shard_size="50GB", **fields):
    config, model, extra = DENSE[family]
    torch.manual_seed(0)
    dense = model(config(**SIZES | extra | fields)).to(dtype)
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # new ones are zero
    dense.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize(
    ("experts", "top_k", "splits"), [(4, 1, 1), (4, 2, 1), (4, 4, 4), (6, 2, 2), (8, 4, 2), (12, 3, 3)]
)
def test_the_mixture_is_the_dense_model(tmp_path, family, experts, top_k, splits):
    dense = save_dense(tmp_path / "dense", family)
    report = upcycle(dense, tmp_path / "moe", experts, top_k, splits=splits)
    assert report.exact and not report.warnings
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), rtol=0, atol=2e-5)
    config = AutoConfig.from_pretrained(tmp_path / "moe")
    assert config.model_type == {"qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}.get(family, "mixtral")
    assert config.num_experts == experts and config.num_experts_per_tok == top_k
    assert (getattr(config, "sliding_window", None) or None) == (5 if family == "mistral" else None)


@pytest.mark.parametrize(("experts", "top_k", "splits"), [(4, 4, 1), (4, 2, 2)])
def test_parameters_are_counted_as_the_model_has_them(tmp_path, experts, top_k, splits):
    dense = save_dense(tmp_path / "dense")
    report = upcycle(dense, tmp_path / "moe", experts, top_k, splits=splits)
    assert report.dense_parameters == AutoModelForCausalLM.from_pretrained(dense).num_parameters()
    assert report.parameters == AutoModelForCausalLM.from_pretrained(tmp_path / "moe").num_parameters()
    router = experts * 32 * 2
    mlp = 3 * 32 * 48 * 2
    assert report.active_parameters == report.dense_parameters + router + mlp * (top_k - splits) // splits


def test_other_numbers_start_elsewhere_and_say_so(tmp_path):
    dense = save_dense(tmp_path / "dense")
    report = upcycle(dense, tmp_path / "moe", 4, 2, splits=4)
    assert not report.exact and "top_k=2 is no multiple of splits=4" in report.warnings[0]
    assert (logits(tmp_path / "moe") - logits(dense)).abs().max() > 1e-3
    # Experts are scaled so that uniform weights would give the dense model on average; rows differ, so that tokens choose.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    assert all(len(layer.learned.unique(dim=0)) == 4 for layer in routers(model))


def test_copies_are_the_dense_model_with_mpi_routers_too(tmp_path):
    dense = save_dense(tmp_path / "dense")
    upcycle(dense, tmp_path / "moe", 4, 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    with pytest.warns(UserWarning, match="ordinary routers"):
        apply_mpi(model)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits(dense), rtol=0, atol=2e-5)


def with_spectrum(folder, alpha):
    """A dense model whose gates have singular values j^-alpha, as trained ones rather do than Gaussian ones."""
    config, model, _ = DENSE["qwen3"]
    torch.manual_seed(0)
    model = model(config(**SIZES | dict(hidden_size=256, intermediate_size=128, head_dim=32)))
    for layer in model.model.layers:
        u, s, v = torch.linalg.svd(layer.mlp.gate_proj.weight.data, full_matrices=False)
        layer.mlp.gate_proj.weight.data = u @ torch.diag(torch.arange(1, len(s) + 1) ** -alpha) @ v
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
@pytest.mark.parametrize("splits", [1, 2])
def test_the_mpi_class_loads_and_has_the_rows_reported(tmp_path, family, splits):
    dense = save_dense(tmp_path / "dense", family)
    report = upcycle(dense, tmp_path / "moe", 4, 2, splits=splits, mpi=True)
    config = AutoConfig.from_pretrained(tmp_path / "moe")
    assert config.model_type == {"qwen3": "mpi_qwen3_moe"}.get(family, "mpi_mixtral")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    layers = list(routers(model.eval()))
    assert all(layer.mpi is not None for layer in layers)
    cosines = [row_cosine(layer.weight()) for layer in layers]
    assert report.effective_row_cosine == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)
    if splits == 1:
        torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), rtol=0, atol=2e-5)
    else:
        assert not report.exact and any("different rows" in one for one in report.warnings)


def test_rows_that_turn_alike_are_warned_of(tmp_path):
    dense = with_spectrum(tmp_path / "dense", alpha=0.6)
    copies = upcycle(dense, tmp_path / "copies", 16, 2, mpi=True)
    split = upcycle(dense, tmp_path / "split", 16, 2, splits=16, mpi=True)
    assert copies.row_cosine < 0.1 and copies.effective_row_cosine > SIMILAR > split.effective_row_cosine
    assert "share the direction" in copies.warnings[0] and "Prefer `splits` of more than 1" in copies.warnings[0]
    plain = upcycle(dense, tmp_path / "plain", 16, 2)
    assert plain.effective_row_cosine == pytest.approx(copies.effective_row_cosine) and not plain.warnings


def test_shards_and_dtype_stay(tmp_path):
    dense = save_dense(tmp_path / "dense", dtype=torch.bfloat16, max_shard_size="8KB")
    whole = save_dense(tmp_path / "whole", dtype=torch.bfloat16)
    upcycle(dense, tmp_path / "a", 4, 2, splits=2)
    upcycle(whole, tmp_path / "b", 4, 2, splits=2)
    shards, single = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b")
    assert len(shards.files) > 2 and len(single.files) == 1
    assert {entry.dtype for entry in shards.entries.values()} == {torch.bfloat16}
    assert shards.entries.keys() == single.entries.keys()
    for name, entry in shards.entries.items():
        assert torch.equal(entry.read(), single.entries[name].read()), name
    torch.testing.assert_close(logits(tmp_path / "a"), logits(dense), rtol=0, atol=0.02)


def test_the_seed_draws_the_routers_and_nothing_else(tmp_path):
    dense = save_dense(tmp_path / "dense")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle(dense, tmp_path / name, 4, 2, seed=seed)
    a, b, c = (Checkpoint(tmp_path / name).entries for name in "abc")
    for name, entry in a.items():
        assert torch.equal(entry.read(), b[name].read())
        assert torch.equal(entry.read(), c[name].read()) != name.endswith("mlp.gate.weight")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (dict(num_experts=4, top_k=5), "do not fit"),
        (dict(num_experts=1, top_k=1), "do not fit"),
        (dict(num_experts=4, top_k=2, splits=3), "splits=3 must divide num_experts=4"),
        (dict(num_experts=5, top_k=2, splits=5), "the 48 neurons"),
        (dict(num_experts=4, top_k=2, splits=0), "splits=0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(tmp_path, numbers, message):
    dense = save_dense(tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        upcycle(dense, tmp_path / "moe", **numbers)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(("splits", "shared", "expert"), [(1, 32, 16), (2, 16, 16), (3, 24, 8), (5, 8, 8)])
def test_qwen2_shares_its_neurons_with_the_shared_expert(tmp_path, splits, shared, expert):
    """No neuron is left out or there twice: its own experts of a token and the shared one have 48 together with one of each split."""
    width = shared + splits * expert
    dense = save_dense(tmp_path / "dense", "qwen2", intermediate_size=width, tie_word_embeddings=True)
    report = upcycle(dense, tmp_path / "moe", 2 * splits, splits, splits=splits)
    config = AutoConfig.from_pretrained(tmp_path / "moe")
    assert (config.shared_expert_intermediate_size, config.moe_intermediate_size) == (shared, expert)
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), rtol=0, atol=2e-5)
    router = 2 * (2 * splits * 32 + 32)  # two layers, with the gate of the shared expert
    assert report.active_parameters == report.dense_parameters + router
    assert report.parameters == AutoModelForCausalLM.from_pretrained(tmp_path / "moe").num_parameters()
    tensors = Checkpoint(tmp_path / "moe").entries
    assert not tensors["model.layers.0.mlp.shared_expert_gate.weight"].read().any()


def test_blocks_of_neurons_are_those_of_hardware():
    for width, splits, expected in [
        (4864, 1, 2432),
        (4864, 2, 1792),
        (4864, 8, 768),
        (18944, 8, 2560),
        (11008, 4, 2304),
    ]:
        shared = _shared_width(Qwen2Config(intermediate_size=width), splits)
        assert shared == expected and shared % 128 == 0 and (width - shared) % (128 * splits) == 0


def test_qwen2_and_mpi(tmp_path):
    dense = save_dense(tmp_path / "dense", "qwen2")
    with pytest.raises(ValueError, match=r"no MPI class of qwen2_moe. Leave out `mpi` .*with `apply_mpi`"):
        upcycle(dense, tmp_path / "moe", mpi=True)
    upcycle(dense, tmp_path / "moe", 4, 2, splits=2)
    with pytest.warns(UserWarning):
        model = apply_mpi(AutoModelForCausalLM.from_pretrained(tmp_path / "moe"))  # what the message says
    assert len(list(routers(model))) == 2 and model(IDS).logits.isfinite().all()


def test_the_card_says_that_nothing_is_trained(tmp_path):
    dense = save_dense(tmp_path / "dense")
    report = upcycle(dense, tmp_path / "moe", 4, 2)
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "routers are drawn at random. It computes what the dense model does, up to rounding" in card
    assert f"has {report.parameters:,} parameters, of which a token uses {report.active_parameters:,}" in card
    upcycle(dense, tmp_path / "other", 4, 3, splits=2)
    assert "It does not start as the dense model" in (tmp_path / "other" / "README.md").read_text()


def test_tensors_that_the_mixture_has_no_place_for_are_refused(tmp_path):
    """Nobody has to have thought of the reason: here, a Llama with one more norm."""
    from safetensors.torch import load_file, save_file

    dense = save_dense(tmp_path / "dense", "llama")
    tensors = load_file(dense / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, dense / "model.safetensors")
    with pytest.raises(ValueError, match="MixtralForCausalLM has no place for model.layers.0.self_attn.q_norm.weight"):
        upcycle(dense, tmp_path / "moe")
    del tensors["model.norm.weight"]
    save_file(tensors, dense / "model.safetensors")
    with pytest.raises(ValueError, match="it has no model.norm.weight, which MixtralForCausalLM needs"):
        upcycle(dense, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_models_without_a_mixture_of_their_layout_are_refused(tmp_path):
    for name, why in (("gemma3_text", "Gemma's scaled embeddings and norms"), ("gpt2", "no mixture of its layout")):
        AutoConfig.for_model(name).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"'{name}' cannot be upcycled: .*{why}.* Use one of qwen2, qwen3, llama"):
            upcycle(tmp_path / name, tmp_path / "moe")
    for name in ("attention_bias", "mlp_bias"):
        with pytest.raises(ValueError, match=f"{name}=True, for which mixtral has no place"):
            upcycle(save_dense(tmp_path / name, "llama", **{name: True}), tmp_path / "moe")
    sliding = save_dense(tmp_path / "sliding", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match="sliding window"):
        upcycle(sliding, tmp_path / "moe")
    with pytest.raises(ValueError, match="holds the model"):
        upcycle(sliding, sliding, overwrite=True)


def test_the_verb(tmp_path, capsys):
    dense = save_qwen3(tmp_path / "dense")
    command = ["upcycle", str(dense), str(tmp_path / "moe"), "--experts", "4", "--top-k", "2", "--splits", "2"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "yes, up to rounding" in out and "Saved in" in out
    for name in ("tokenizer.json", "generation_config.json", "README.md", "config.json"):
        assert (tmp_path / "moe" / name).is_file()
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]
    assert main(command) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"] is True


def test_the_verb_reads_recipes_and_refuses_what_does_not_fit(tmp_path, capsys):
    dense = save_qwen3(tmp_path / "dense")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {dense}\noutput_dir: {tmp_path / 'moe'}\nnum_experts: 4\nsplits: 2\n")
    assert main(["check", str(recipe)]) == 0
    assert "hf-rb upcycle" in capsys.readouterr().out
    assert main(["upcycle", "--config", str(recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"] == 2
    for extra, message in (
        (["--experts", "3"], "`splits: 2` must divide `num_experts: 3`"),
        (["--top-k", "9"], "`top_k: 9` is more than `num_experts: 4`"),
        (["--experts", "1"], "`num_experts` must be in [2, inf)"),
    ):
        assert main(["upcycle", "--config", str(recipe), "--overwrite", *extra]) == 2
        assert message in capsys.readouterr().err
    assert main(["upcycle", str(dense)]) == 2
    assert "`output_dir` is missing" in capsys.readouterr().err
