"""LoRA adapters: grafted, combined and refined as PEFT and arithmetic on whole matrices have it; those that do not transfer."""

import json

import pytest
import torch
from helpers.random_models import save_qwen3
from helpers.raw_models import noise, read, write
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_rb.weights import adapter_problems, combine_adapters, graft, interpolate, refine
from hf_rb.weights.adapters import factor_svd


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def save_adapter(base, folder, seed=0, train=True, **config):
    """Saves an adapter of a model, with random weights as if it had been trained."""
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | config
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **config))
    if train:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_qwen3(folder / "base", seed=1), save_qwen3(folder / "instruct", seed=2)


def merged(model, adapter):
    return PeftModel.from_pretrained(load(model), adapter).merge_and_unload().state_dict()


class TestGraft:
    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"use_rslora": True},
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
            {"init_lora_weights": "gaussian", "target_modules": "all-linear"},
        ],
        ids=["plain", "rslora", "patterns", "all-linear"],
    )
    def test_as_peft_merges_and_as_the_full_delta(self, models, tmp_path, config):
        base, instruct = models
        adapter = save_adapter(base, tmp_path / "adapter", **config)
        report = graft(adapter, instruct, tmp_path / "out")
        ours, before = read(tmp_path / "out"), read(instruct)
        theirs = merged(instruct, adapter)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-6)
        changed = {row.name for row in report.merged}
        assert changed == {name for name in ours if not torch.equal(ours[name], before[name])}
        # The same as tuning Base by merging there, and grafting all of the difference.
        tuned = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
        tuned.save_pretrained(tmp_path / "tuned")
        graft(tmp_path / "tuned", instruct, tmp_path / "full", base=base)
        for name, tensor in read(tmp_path / "full").items():
            torch.testing.assert_close(tensor, ours[name], atol=1e-6, rtol=1e-6)

    def test_of_transposed_layers(self, tmp_path):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32))
        model.save_pretrained(tmp_path / "base")
        config = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
        adapter = save_adapter(tmp_path / "base", tmp_path / "adapter", **config)
        graft(adapter, tmp_path / "base", tmp_path / "out")
        ours, theirs = read(tmp_path / "out"), merged(tmp_path / "base", adapter)
        name = "transformer.h.0.attn.c_attn.weight"
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-6)

    def test_an_adapter_that_stays_one(self, models, tmp_path):
        base, instruct = models
        adapter = save_adapter(base, tmp_path / "adapter")
        assert graft(adapter, instruct, tmp_path / "out", keep_adapter=True) is None
        config = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(instruct)
        assert (tmp_path / "out/chat_template.jinja").is_file()
        assert str(tmp_path) not in (tmp_path / "out/README.md").read_text()
        for name, tensor in merged(instruct, tmp_path / "out").items():
            assert torch.equal(tensor, merged(instruct, adapter)[name])
        with pytest.raises(ValueError, match="written as a whole: leave out `include` and `dtype`"):
            graft(adapter, instruct, tmp_path / "no", keep_adapter=True, dtype="float32", include="attn")
        with pytest.raises(ValueError, match="An adapter holds its delta: leave out `base`"):
            graft(adapter, instruct, tmp_path / "no", base=base)

    def test_what_does_not_fit(self, models, tmp_path):
        base, instruct = models
        adapter = save_adapter(base, tmp_path / "adapter")
        other = save_qwen3(tmp_path / "wide", intermediate_size=128)
        with pytest.raises(
            ValueError, match=r"down_proj.weight has the shape \(64, 128\) in onto .* and \(64, 96\) in the"
        ):
            graft(adapter, other, tmp_path / "out")
        other = save_qwen3(tmp_path / "short", num_hidden_layers=1)
        with pytest.raises(
            ValueError, match=r"adapts model.layers.1.mlp.down_proj.weight.*does not have in its files"
        ):
            graft(adapter, other, tmp_path / "out")
        tensors = load_file(adapter / "adapter_model.safetensors")
        name = next(name for name in tensors if "layers.0.mlp.down_proj.lora_B" in name)
        save_file({k: v for k, v in tensors.items() if k != name}, adapter / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="has no two factors of one rank for model.layers.0.mlp.down_proj"):
            graft(adapter, instruct, tmp_path / "out")
        tensors[name][0, 0] = float("nan")
        save_file(tensors, adapter / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="layers.0.mlp.down_proj.weight: .*adapter holds NaN"):
            graft(adapter, instruct, tmp_path / "out")
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        with pytest.raises(FileNotFoundError, match="pickles are not read"):
            graft(adapter, instruct, tmp_path / "out")


class TestRefusedAdapters:
    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            ({"use_dora": True}, "DoRA scales the weights of the model it was trained on"),
            ({"init_lora_weights": "pissa"}, "it began as 'pissa', which changes the weights of Base before training"),
            ({"init_lora_weights": "olora"}, "it began as 'olora'"),
            ({"modules_to_save": ["lm_head"]}, "`modules_to_save` holds whole modules of Base"),
            ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "`trainable_token_indices` holds whole rows"),
            ({"target_modules": ["q_proj", "lm_head"]}, "it adapts .*lm_head: embeddings and heads"),
            ({"target_modules": ["q_proj", "embed_tokens"]}, "it adapts .*embed_tokens"),
            ({"bias": "all"}, "`bias: all` holds whole biases"),
            ({"lora_bias": True}, "`lora_bias` trains biases too"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_by_what_peft_has_saved(self, tmp_path, models, config, reason):
        base = models[0]
        if "init_lora_weights" in config or "lora_bias" in config or config.get("bias"):
            base = save_qwen3(tmp_path / "base", tie_word_embeddings=False)
        adapter = save_adapter(base, tmp_path / "adapter", train=False, **config)
        with pytest.raises(ValueError, match=f"cannot be moved or merged: .*{reason}.*Train a plain LoRA"):
            graft(adapter, models[1], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            ({"peft_type": "BOFT"}, "its type is BOFT; only LoRA"),
            ({"target_parameters": ["experts.gate_up_proj"]}, "merge it in memory with"),
            ({"alora_invocation_tokens": [1]}, "activated LoRA"),
            ({"layer_replication": [[0, 2]]}, "a model of other layers"),
            ({"use_something_new": True}, "`use_something_new: True` is an option whose effect"),
        ],
    )
    def test_by_configuration(self, config, reason):
        (problem,) = adapter_problems({"peft_type": "LORA"} | config)
        assert reason in problem

    def test_the_refused_ones_would_be_wrong(self, tmp_path, models):
        """PiSSA changes Instruct without any training; a DoRA's delta depends on the model."""
        instruct = load(models[1]).state_dict()
        adapter = save_adapter(models[0], tmp_path / "pissa", train=False, init_lora_weights="pissa")
        name = "model.layers.0.self_attn.q_proj.weight"
        assert (merged(models[1], adapter)[name] - instruct[name]).norm() > 1e-2 * instruct[name].norm()

    def test_a_converted_pissa_is_plain(self, tmp_path, models):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
        model = get_peft_model(load(models[0]), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = "pissa"
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        report = graft(tmp_path / "plain", models[1], tmp_path / "out")
        assert report.norm("wanted") < 1e-4 * report.norm("norm")


class TestCombined:
    def test_concatenation_is_the_sum_of_the_deltas(self, models, tmp_path):
        base = models[0]
        one = save_adapter(base, tmp_path / "one", seed=1, use_rslora=True)
        two = save_adapter(base, tmp_path / "two", seed=2, r=3, target_modules=["q_proj", "up_proj"])
        report = interpolate(one, two, tmp_path / "out", 0.7)
        start, plain, both = load(base).state_dict(), [merged(base, adapter) for adapter in (one, two)], None
        both = merged(base, tmp_path / "out")
        for name, tensor in both.items():
            expected = start[name] + 0.3 * (plain[0][name] - start[name]) + 0.7 * (plain[1][name] - start[name])
            torch.testing.assert_close(tensor, expected, atol=2e-6, rtol=1e-5)
        ranks = {row.name: row.measured["rank"] for row in report.tensors}
        assert ranks["model.layers.0.self_attn.q_proj"] == 7 and ranks["model.layers.0.mlp.up_proj"] == 3
        assert report.norm("error") == 0 and report.method == "interpolation"

    def test_a_smaller_rank_is_the_best_one(self, models, tmp_path):
        adapters = [save_adapter(models[0], tmp_path / name, seed=seed) for seed, name in enumerate(["one", "two"])]
        full = combine_adapters(adapters, [0.3, 0.7], tmp_path / "full", rank=8)
        assert full.norm("error") < 1e-6 * full.norm("wanted")
        report = combine_adapters(adapters, [0.3, 0.7], tmp_path / "small", rank=5)
        exact, small = merged(models[0], tmp_path / "full"), merged(models[0], tmp_path / "small")
        name = "model.layers.0.self_attn.q_proj.weight"
        delta = exact[name] - load(models[0]).state_dict()[name]
        lost = torch.linalg.svdvals(delta.double())[5:].norm().item()
        assert (small[name] - exact[name]).norm().item() == pytest.approx(lost, rel=1e-4)
        row = next(row for row in report.tensors if row.name == name.removesuffix(".weight"))
        assert row.measured["error"] == pytest.approx(lost, rel=1e-4)

    def test_pefts_linear_combination_is_another_thing(self, models, tmp_path):
        adapters = [save_adapter(models[0], tmp_path / name, seed=seed) for seed, name in enumerate(["one", "two"])]
        combine_adapters(adapters, [0.3, 0.7], tmp_path / "ours")
        ours = merged(models[0], tmp_path / "ours")
        errors = {}
        for kind in ("linear", "cat"):
            model = PeftModel.from_pretrained(load(models[0]), adapters[0], adapter_name="one")
            model.load_adapter(adapters[1], adapter_name="two")
            model.add_weighted_adapter(["one", "two"], [0.3, 0.7], "both", combination_type=kind)
            model.set_adapter("both")
            theirs = model.merge_and_unload().state_dict()
            errors[kind] = max((theirs[name] - tensor).abs().max().item() for name, tensor in ours.items())
        assert errors["cat"] < 1e-5 and errors["linear"] > 0.1

    def test_refusals(self, models, tmp_path):
        one = save_adapter(models[0], tmp_path / "one")
        two = save_adapter(models[1], tmp_path / "two")
        with pytest.raises(ValueError, match="adapters are of different models"):
            interpolate(one, two, tmp_path / "out")
        with pytest.raises(ValueError, match="one is an adapter and one a model"):
            interpolate(one, models[0], tmp_path / "out")
        for option in ({"rules": {"attn": 1.0}}, {"include": "attn"}, {"files_from": "start"}, {"dtype": "float32"}):
            with pytest.raises(ValueError, match=f"written as a whole: leave out `{[*option][0]}`"):
                interpolate(one, one, tmp_path / "out", **option)
        with pytest.raises(ValueError, match="one lambda at a time"):
            interpolate(one, one, tmp_path / "out", [0.1, 0.2])
        with pytest.raises(ValueError, match="`rank` is 0"):
            interpolate(one, one, tmp_path / "out", rank=0)
        with pytest.raises(ValueError, match="holds the model that the result is made from"):
            interpolate(one, one, one)
        with pytest.raises(FileExistsError, match="not empty"):
            interpolate(one, one, models[0])


class TestRefined:
    def test_singular_values_of_a_product(self):
        for rows, columns in ((20, 30), (30, 3)):
            a, b = noise(4, columns, seed=1), noise(rows, 4, seed=2)
            u, values, v = factor_svd(a, b)
            expected = torch.linalg.svdvals(b.double() @ a.double())[: len(values)]
            torch.testing.assert_close(values, expected)
            torch.testing.assert_close((u * values) @ v.mT, b.double() @ a.double())

    def test_the_tail_of_an_adapter(self, models, tmp_path):
        adapter = save_adapter(models[0], tmp_path / "adapter", r=8)
        tensors = load_file(adapter / "adapter_model.safetensors")
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor *= torch.logspace(0, -3, 8)
        save_file(tensors, adapter / "adapter_model.safetensors")
        report = refine(None, adapter, tmp_path / "out", 0.2)
        assert "hf_rb's extension, not in the paper" in report.notes[0]
        start, before, after = (
            load(models[0]).state_dict(), merged(models[0], adapter), merged(models[0], tmp_path / "out")
        )  # fmt: skip
        for row in report.tensors:
            name = f"{row.name}.weight"
            values = torch.linalg.svdvals((before[name] - start[name]).double())[:8]
            found = torch.linalg.svdvals((after[name] - start[name]).double())[:8]
            k = row.measured["k"]
            assert 1 <= k < 8
            values[k:] *= 0.2
            torch.testing.assert_close(found, values, atol=1e-5, rtol=1e-3)
            assert row.measured["change"] == pytest.approx(
                (after[name] - before[name]).norm().item(), rel=1e-2, abs=1e-5
            )
        refine(None, adapter, tmp_path / "same", 1.0)
        for name, tensor in merged(models[0], tmp_path / "same").items():
            torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=1e-6)
        with pytest.raises(ValueError, match="An adapter holds its delta: leave out `base`"):
            refine(models[0], adapter, tmp_path / "no")
        for option in ({"include": "attn"}, {"dtype": "float32"}, {"spectra": False}):
            with pytest.raises(ValueError, match=f"written as a whole: leave out `{[*option][0]}`"):
                refine(None, adapter, tmp_path / "no", **option)
        with pytest.raises(ValueError, match="one lambda at a time"):
            refine(None, adapter, tmp_path / "no", [0.1, 0.2])


def test_adapters_of_files_without_a_prefix(tmp_path):
    """The names of a model that was saved without its head."""
    weights = {f"layers.{layer}.self_attn.q_proj.weight": noise(8, 8, seed=layer) for layer in range(2)}
    onto = write(tmp_path / "onto", weights)
    (tmp_path / "adapter").mkdir()
    factors = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        factors |= {f"{prefix}.lora_A.weight": noise(2, 8, seed=7), f"{prefix}.lora_B.weight": noise(8, 2, seed=8)}
    save_file(factors, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    graft(tmp_path / "adapter", onto, tmp_path / "out")
    for name, tensor in read(tmp_path / "out").items():
        torch.testing.assert_close(tensor, weights[name] + 3 * noise(8, 2, seed=8) @ noise(2, 8, seed=7))
