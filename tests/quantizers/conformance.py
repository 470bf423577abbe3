"""What every quantizer must do, as tests that a class of one method inherits:

    class TestMine(QuantizerConformance):
        method, options = "mine", {"bits": 3}

The models have a hidden size of 192, so that the last group of a row is short.
"""

import copy
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from helpers.checkpoints import (
    assert_same,
    experts,
    fused_experts,
    qwen3,
    second_copy_of_tied_tensor,
    square_transposed_experts,
    tensors,
    transposed_experts,
    untied_with_biases,
    without_head,
)
from helpers.round_trips import INPUT, load, logits, same_files, train
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers import AutoHfQuantizer

from hf_rb.cli import main
from hf_rb.methods.registry import find
from hf_rb.quantizers import dequantize_checkpoint, quantize, quantize_checkpoint
from hf_rb.quantizers.packed.experts import PackedExperts
from hf_rb.quantizers.packed.linear import PackedLinear, PackedModule


DOWN, UP = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
CLAMPED = "gpt_oss"  # whose experts keep what others absorb


def packed(model, kind=PackedModule):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def codes(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8}


def rewrite(source, destination, change):
    """Copies a folder with other tensors: `change` edits their dict."""
    shutil.copytree(source, destination)
    stored = load_file(destination / "model.safetensors")
    change(stored)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, destination / "model.safetensors", {"format": "pt"})  # fmt: skip


def put(name, function):
    """A damage: a tensor is what a function makes of it; `None` takes it away."""

    def damage(stored):
        old = stored.pop(name, None)
        if function is not None:
            stored[name] = function(old)

    return damage


def put_value(name, place, value):
    def change(tensor):
        tensor[place] = value
        return tensor

    return put(name, change)


STREAMS = [
    (qwen3, dict(), "auto"),
    (untied_with_biases, dict(modules_to_not_convert=["down_proj"]), "auto"),
    (without_head, dict(), "auto"),
    (second_copy_of_tied_tensor, dict(), "auto"),
    (experts, dict(), "auto"),
    (fused_experts, dict(), "auto"),
    (transposed_experts, dict(), "auto"),
    (square_transposed_experts, dict(), "auto"),
]
BAD_VALUES = [
    (dict(group_size=0), r"`group_size` must be in \[1, inf\)"),
    (dict(group_size=64.0), "`group_size` must be an integer; got 64.0"),
    (dict(dequantize="no"), "`dequantize` must be True or False; got 'no'"),
    (dict(format_version=2), "Update hf_rb"),
    (dict(modules_to_not_convert="lm_head"), r"must be a list; got 'lm_head', so write \['lm_head'\]"),
    (dict(modules_to_not_convert=["*.down_proj"]), r"has '\*.down_proj', which .*; write 'down_proj' for whatever ends so"),
    (dict(modules_to_not_convert=[3]), "`modules_to_not_convert` has 3; expected the name"),
    (dict(modules_to_not_convert=3), "`modules_to_not_convert` must be a list of names; got 3"),
    (dict(quant_method="gptq"), "`quant_method` cannot be 'gptq'"),
]  # fmt: skip
CANNOT_ACT = [
    (dict(modules_to_not_convert=["dwon_proj"]), "'dwon_proj' matches no module of Qwen3ForCausalLM; did you mean 'down_proj'"),
    (dict(modules_to_not_convert=["_proj"]), "'_proj' matches no module of Qwen3ForCausalLM; did you mean 'down_proj'"),
    (dict(modules_to_not_convert=["layers.0"]), "'layers.0' is the ending of model.layers.0, .* write 'model.layers.0', or '.[*]layers.0'"),
    (dict(modules_to_not_convert=["model"]), "nothing to quantize in Qwen3ForCausalLM: its weights are in 15 Linear, 1 Embedding"),
]  # fmt: skip


class QuantizerConformance:
    """
    The tests, and what they are told of a method.

    Attributes:
        method (`str`): Its name.
        options (`dict`): What its config is made with, beside what a test is about.
        command (`list[str]`): The same on the command line.
        variants (`list`): Models (arguments of `make_model`) and options that are saved and read again.
        streams (`list`): Makers of checkpoints, options and types that are streamed.
        mixtures (`list`): Architectures and options.
        choices (`list`): Architecture, options, and how the projections of its experts are stored then.
        damages (`list`): Options, a damage of a saved model with biases, and what is said.
        bad_values (`list`): Options that no config has, and what is said.
        cannot_act (`list`): Options that mean nothing for a model, and what is said.
        error (`tuple`): Least and largest relative error of a layer.
        memory (`int`): Bytes of a row of 192 weights in memory.
        offloads_alike (`bool`): Whether quantizing with offloading gives the same files.
        compiled (`dict`): Options of the model that is compiled.
    """

    method: str
    options: dict[str, Any] = {}
    command: list[str] = []
    variants: list = [(dict(), dict())]
    streams: list = STREAMS
    mixtures: list = [("qwen3_moe", dict()), (CLAMPED, dict())]
    choices: list = []
    damages: list = []
    bad_values: list = []
    cannot_act: list = []
    error = (0.0, 1.0)
    memory: int
    offloads_alike = True
    compiled: dict[str, Any] = {}

    def make(self, **options):
        return find("quantizer", self.method).method.config_class()(**self.options | options)

    def check_files(self, stored, model, options):
        """More that is true of the tensors of a saved model."""

    # The dimensions of parametrized tests are those of the class.

    def pytest_generate_tests(self, metafunc):
        for name, values in (
            ("variant", self.variants),
            ("stream", self.streams),
            ("mixture", self.mixtures),
            ("choice", self.choices),
            ("damage", self.damages),
            ("bad_value", [*self.bad_values, *BAD_VALUES]),
            ("idle", [*self.cannot_act, *CANNOT_ACT]),
        ):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=[str(number) for number in range(len(values))])

    # Files.

    def test_round_trip(self, make_model, tmp_path, variant):
        model, options = variant
        quantized = load(make_model(**model), self.make(**options))
        expected = logits(quantized)
        quantized.save_pretrained(tmp_path / "one")
        loaded = load(tmp_path / "one")
        assert torch.equal(logits(loaded), expected)
        assert not any(parameter.requires_grad for name, parameter in loaded.named_parameters() if "weight_" in name)
        loaded.save_pretrained(tmp_path / "two")
        assert same_files(tmp_path / "one", tmp_path / "two")

        stored = tensors(tmp_path / "one")
        assert ("lm_head.weight" in stored) is not model.get("tied", True)
        assert stored[DOWN].dtype == torch.uint8 and stored[DOWN].shape != (192, 160)
        assert stored[f"{DOWN}_scale"].dtype == torch.float16
        assert stored["model.embed_tokens.weight"].dtype == model.get("dtype", torch.bfloat16)
        self.check_files(stored, quantized, options)

        plain = load(tmp_path / "one", self.make(dequantize=True))
        assert not packed(plain) and plain.dtype == loaded.dtype
        torch.testing.assert_close(
            logits(plain), expected, atol=0.05, rtol=0.05
        )  # its weights are rounded to bfloat16
        plain.save_pretrained(tmp_path / "plain")
        assert torch.equal(logits(load(tmp_path / "plain")), logits(plain))
        assert torch.equal(logits(loaded.dequantize()), logits(plain)) and not packed(loaded)
        dequantize_checkpoint(tmp_path / "one", tmp_path / "folder")
        assert torch.equal(logits(load(tmp_path / "folder")), logits(plain))

    def test_streaming_writes_the_same_tensors(self, tmp_path, stream):
        make, options, dtype = stream
        torch.manual_seed(1)
        make(tmp_path / "source")
        in_memory = quantize(tmp_path / "source", tmp_path / "a", self.make(**options), dtype=dtype)
        streamed = quantize_checkpoint(tmp_path / "source", tmp_path / "b", self.make(**options), dtype=dtype)
        assert_same(tmp_path / "b", tmp_path / "a")
        assert (tmp_path / "b" / "config.json").read_text() == (tmp_path / "a" / "config.json").read_text()
        assert (tmp_path / "b" / "generation_config.json").is_file()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "source"]
        assert sorted(streamed.skipped) == sorted(in_memory.skipped)
        assert [layer.name for layer in streamed.layers] == [layer.name for layer in in_memory.layers]
        assert streamed.error() == pytest.approx(in_memory.error(), rel=1e-9)
        found = [logits(load(tmp_path / name)) for name in ("a", "b")]
        assert torch.equal(*found) and found[0].isfinite().all()

    def test_shards(self, make_model, tmp_path):
        model = load(make_model(), self.make())
        model.save_pretrained(tmp_path, max_shard_size="40KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
        assert torch.equal(logits(load(tmp_path)), logits(model))

    def test_command_line_is_python(self, make_model, tmp_path, capsys):
        source = make_model()
        quantize(source, tmp_path / "python", self.make(modules_to_not_convert=["k_proj"], group_size=32))
        command = ["--method", self.method, "--skip", "k_proj", "--group-size", "32", *self.command]
        assert main(["quantize", str(source), str(tmp_path / "line"), *command]) == 0
        assert "true bits per weight" in capsys.readouterr().out
        assert_same(tmp_path / "line", tmp_path / "python")
        configs = [(tmp_path / name / "config.json").read_text() for name in ("line", "python")]
        assert configs[0] == configs[1]

    # In memory.

    def test_report(self, make_model):
        report = load(make_model(), self.make()).hf_quantizer.report
        assert len(report.layers) == 14 and report.skipped == ["lm_head"] and report.resolved == 0
        assert all(self.error[0] < layer.relative_error < self.error[1] for layer in report.layers)
        assert set(report.error_by_kind()) == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
        assert report.weights_per_second > 0

    def test_dict_config_and_other_dtypes(self, make_model, tmp_path):
        config = {"quant_method": self.method, "group_size": 32} | self.options
        model = load(make_model(), config, dtype=torch.float32)
        layer = model.model.layers[0].mlp.up_proj
        assert layer.layout.group_size == 32 and layer.weight_scale.dtype == torch.float16
        assert model.dtype == torch.float32
        model.save_pretrained(tmp_path / "saved")
        loaded = load(tmp_path / "saved", dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight_scale, layer.weight_scale)

    def test_casting_the_model_keeps_the_scales(self, make_model):
        model = load(make_model(), self.make(), dtype=torch.float32)
        scale = model.model.layers[0].mlp.up_proj.weight_scale.clone()
        model.to(torch.bfloat16)
        assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float16
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight_scale, scale)
        assert logits(model).dtype == torch.bfloat16

    def test_skipped_modules(self, make_model, tmp_path):
        skipped = ["down_proj", "model.layers.1.self_attn"]
        model = load(make_model(tied=False), self.make(modules_to_not_convert=skipped))
        assert packed(model).keys() == {
            *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"),
            *(f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up")),
        }
        assert "lm_head" in model.hf_quantizer.report.skipped  # the default skips stay
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(load(tmp_path / "saved")), logits(model))

    def test_device_map(self, make_model, tmp_path):
        model = load(make_model(), self.make(), device_map="auto")
        # What `device_map` plans with: the parameters have their packed shapes before anything is loaded.
        weight = model.model.layers[0].mlp.up_proj.weight
        size = model.hf_quantizer.param_element_size(model, "model.layers.0.mlp.up_proj.weight", weight)
        assert size * weight.numel() == 160 * self.memory
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(load(tmp_path / "saved", device_map={"": "cpu"})), logits(model))

    @pytest.mark.parametrize("memory", ["150KB", "1KB"])  # some layers on disk, all of them
    def test_offload(self, make_model, tmp_path, memory):
        source = make_model("llama", tied=False)
        expected = load(source, self.make())
        expected.save_pretrained(tmp_path / "expected")
        options = dict(device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path / "offload")
        models = {"two": load(tmp_path / "expected", **options)}
        if self.offloads_alike:
            models["one"] = load(source, self.make(), **options)
        for name, model in models.items():
            assert "disk" in model.hf_device_map.values()
            assert any(parameter.is_meta for parameter in model.parameters())
            assert torch.equal(logits(model), logits(expected))
            model.save_pretrained(tmp_path / name)
            assert same_files(tmp_path / name, tmp_path / "expected")
            with pytest.raises(ValueError, match=r"is offloaded.* Load the checkpoint with .*dequantize=True"):
                model.dequantize()
        plain = load(tmp_path / "expected", self.make(dequantize=True), **options)
        assert torch.equal(logits(plain), logits(expected.dequantize()))

    def test_other_heads(self, make_model, tmp_path):
        model = load(make_model("llama"), self.make())
        model.save_pretrained(tmp_path / "whole")
        headless = AutoModel.from_pretrained(tmp_path / "whole")
        with torch.no_grad():
            assert torch.equal(headless(INPUT).last_hidden_state, model.model(INPUT).last_hidden_state)
        headless.save_pretrained(tmp_path / "headless")
        assert torch.equal(logits(load(tmp_path / "headless")), logits(model))  # the head is tied
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", pad_token_id=0)
        assert type(classifier.score) is nn.Linear and logits(classifier).shape == (2, 2)

    def test_no_split_over_devices(self, make_model):
        config = AutoConfig.from_pretrained(make_model())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.config.distributed_config = object()
        with pytest.raises(ValueError, match="leave out `distributed_config` and `tp_plan`"):
            AutoHfQuantizer.from_config(self.make(), pre_quantized=False).preprocess_model(model)

    def test_copies_and_state_dicts(self, make_model, tmp_path):
        model = load(make_model(), self.make())
        expected = logits(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other), expected)
        other.save_pretrained(tmp_path / "one")
        model.save_pretrained(tmp_path / "two")
        assert same_files(tmp_path / "one", tmp_path / "two")
        # A state dict is what is in memory.
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for tensor in other.state_dict().values():
                tensor.zero_()
        other.load_state_dict(state)
        assert torch.equal(logits(other), expected)

    def test_threads_do_not_disturb_one_another(self, make_model):
        model = load(make_model(), self.make())
        expected = logits(model)
        with ThreadPoolExecutor(3) as pool:
            assert all(torch.equal(found, expected) for found in pool.map(lambda _: logits(model), range(6)))

    def test_generation(self, make_model):
        model = load(make_model("llama"), self.make(), dtype=torch.float32)
        options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
        expected = model.generate(INPUT, use_cache=False, **options)
        assert torch.equal(model.generate(INPUT, **options), expected)
        with torch.inference_mode():
            assert torch.equal(model.generate(INPUT, **options), expected)
        assert torch.equal(model.generate(INPUT, cache_implementation="static", **options), expected)

    def test_compiled(self, make_model):
        # One MLP: whole models of both kinds are compiled in test_ptqtp.py and test_d2_round_trips.py.
        model = load(make_model("llama", tied=False), self.make(**self.compiled), dtype=torch.float32)
        part, x = model.model.layers[0].mlp, torch.randn(2, 3, 192)
        compiled = torch.compile(part, backend="aot_eager", fullgraph=True)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(compiled(x), part(x))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])  # with a kernel, and without
    def test_a_layer_that_changes(self, make_model, dtype):
        layer = load(make_model(), self.make()).model.layers[0].mlp.up_proj
        x = torch.randn(2, 192, dtype=dtype)
        first = layer(x)
        with torch.no_grad():
            layer.weight_scale *= 2
        torch.testing.assert_close(layer(x), 2 * first)
        layer.weight_scale.data = layer.weight_scale.data / 2
        assert torch.equal(layer(x), first)
        other = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
        assert torch.equal(other.to("cpu")(x), first)

    # Adapters.

    def test_lora(self, make_model, tmp_path):
        folder = make_model(bias=True)
        base = load(folder, self.make(), dtype=torch.float32)
        base.save_pretrained(tmp_path / "packed")
        without = logits(base)
        with torch.inference_mode():
            base(INPUT)  # what a kernel keeps from here must not stop training
        before = codes(base)
        model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4))
        assert len(packed(model, PackedLinear)) == 14
        model(INPUT, labels=INPUT).loss.backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert len([name for name in trained if "lora_B" in name]) == 14 and all("lora" in name for name in trained)
        model.zero_grad()
        losses = train(model, 4)
        assert losses[-1] < losses[0] - 0.1
        after = codes(model)
        assert len(after) == len(before) and all(map(torch.equal, before.values(), after.values()))

        expected = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), without)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(tmp_path / "packed", dtype=torch.float32), tmp_path / "adapter")
        assert torch.equal(logits(again), expected)
        assert torch.equal(logits(again.unload()), without)

        for merge in ("merge_and_unload", "merge_adapter"):
            said = r"14 packed layers of this model: dequantize first. Write `model.dequantize\(\)`"
            with pytest.raises(ValueError, match=said):
                getattr(model, merge)()
        assert torch.equal(logits(model), expected) and codes(model).keys() == after.keys()
        model.dequantize()
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)

    def test_training_without_adapters_is_refused(self, make_model, tmp_path):
        with pytest.raises(ValueError, match="adapters"):
            Trainer(load(make_model(), self.make()), TrainingArguments(tmp_path, use_cpu=True))

    @pytest.mark.parametrize("architecture", ["qwen3_moe", CLAMPED])
    def test_lora_on_experts(self, make_moe, architecture):
        model = load(make_moe(architecture), self.make(), dtype=torch.float32)
        targets = ["experts.gate_up_proj", "experts.down_proj"]
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", target_parameters=targets, r=4))
        losses = train(adapted, 6)
        assert losses[-1] < losses[0]
        expected = logits(adapted)
        adapted.dequantize()
        torch.testing.assert_close(logits(adapted), expected, atol=1e-3, rtol=1e-3)

    # Mixtures of experts.

    def test_experts(self, make_moe, tmp_path, mixture):
        architecture, options = mixture
        source = make_moe(architecture)
        quantized = load(source, self.make(**options), dtype=torch.float32)
        found = packed(quantized, PackedExperts)
        assert len(found) == (1 if architecture == "deepseek_v3" else 2)
        assert {tuple(layer.layouts) for layer in found.values()} == {("gate_up_proj", "down_proj")}
        assert not any("experts" in name for name in quantized.hf_quantizer.report.skipped)
        self.check_experts(source, quantized)
        expected = logits(quantized)
        for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
            assert torch.equal(logits(other), expected)
        other.dequantize()
        assert torch.equal(logits(quantized), expected) and not packed(other)

        quantized.save_pretrained(tmp_path / "one")
        loaded = load(tmp_path / "one", dtype="auto")
        assert torch.equal(logits(loaded), expected)
        loaded.save_pretrained(tmp_path / "two")
        assert same_files(tmp_path / "one", tmp_path / "two")

        # The names are those of the model's own checkpoint. What stands beside a weight has its name and an ending.
        before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "one"))
        ours = {name for name, tensor in after.items() if name in before and tensor.dtype == torch.uint8}
        assert before.keys() <= after.keys() and all(after[name].shape != before[name].shape for name in ours)
        beside = after.keys() - before.keys()
        assert {name.rpartition("_")[0] for name in beside} == ours
        assert all(after[f"{name}_scale"].dtype == torch.float16 for name in ours)
        self.check_beside({name.rpartition("_")[2] for name in beside}, architecture)

        plain = load(tmp_path / "one", self.make(dequantize=True))
        assert not packed(plain)
        torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)
        plain.save_pretrained(tmp_path / "plain")
        assert load_file(tmp_path / "plain" / "model.safetensors").keys() == before.keys()
        assert torch.equal(logits(load(tmp_path / "plain")), logits(plain))
        assert torch.equal(logits(loaded.dequantize()), logits(plain))
        loaded.save_pretrained(tmp_path / "dequantized")
        assert same_files(tmp_path / "plain", tmp_path / "dequantized")

    def check_experts(self, source, quantized):
        """More that is true of quantized experts."""

    def check_beside(self, endings, architecture):
        assert endings == {"scale"}

    def test_options_decide_which_experts_are_packed(self, make_moe, tmp_path, choice):
        architecture, options, stored = choice
        model = load(make_moe(architecture, num_hidden_layers=1), self.make(**options), dtype=torch.float32)
        expected = logits(model)
        experts = packed(model, PackedExperts).values()
        found = [{name: layer.described(name) for name in layer.layouts} for layer in experts]
        assert found == ([stored] if stored else [])
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(load(tmp_path)), expected)
        plain = load(tmp_path, self.make(dequantize=True))
        torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits(model.dequantize()), expected, atol=1e-4, rtol=1e-4)

    # Refusals.

    def test_bad_weights_are_named(self, make_model, tmp_path):
        def change(stored):
            stored[UP][3, 4] = torch.nan
            stored["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.inf

        rewrite(make_model(), tmp_path / "bad", change)
        with pytest.raises(ValueError, match="NaN or an infinite value") as error:
            load(tmp_path / "bad", self.make())
        assert UP in str(error.value) and "model.layers.1.self_attn.q_proj.weight" in str(error.value)

    def test_weight_of_another_shape(self, make_model, tmp_path):
        rewrite(make_model(), tmp_path / "bad", put(UP, lambda old: torch.zeros(160, 128, dtype=torch.bfloat16)))
        with pytest.raises(ValueError, match=r"up_proj.weight: .*\(160, 128\), expected \(160, 192\)"):
            load(tmp_path / "bad", self.make())

    @pytest.fixture(scope="class")
    def good(self, make_model, tmp_path_factory):
        """Returns the folder of a model with biases that is quantized with some options."""

        @cache
        def make(**options):
            folder = tmp_path_factory.mktemp("good")
            load(make_model(bias=True), self.make(**options)).save_pretrained(folder)
            return folder

        return make

    @pytest.mark.parametrize("dequantize", [False, True])
    def test_damaged_files(self, good, tmp_path, damage, dequantize):
        options, change, message = damage
        rewrite(good(**options), tmp_path / "bad", change)
        if dequantize and "bias" in message:
            return  # an ordinary layer may lack its bias, with transformers' warning
        scale = "(_scale)?" if dequantize else "_scale"  # a weight that is unpacked is one
        with pytest.raises(ValueError, match=message.replace("{scale}", scale)):
            load(tmp_path / "bad", self.make(dequantize=True) if dequantize else None)

    def test_bad_values(self, bad_value):
        options, message = bad_value
        with pytest.raises(ValueError, match=message):
            self.make(**options)

    def test_options_that_cannot_act(self, make_model, idle):
        options, message = idle
        with pytest.raises(ValueError, match=message):
            load(make_model(), self.make(**options))

    def test_quantized_twice(self, make_model):
        name = find("quantizer", self.method).method.name
        with pytest.raises(ValueError, match=f"`dequantize=True` is for loading a {name} checkpoint"):
            load(make_model(), self.make(dequantize=True))

    def test_misspelt_key(self, make_model):
        with pytest.raises(ValueError, match="no key 'group_sise'; did you mean 'group_size'"):
            load(make_model(), {"quant_method": self.method, "group_sise": 64})

    def test_other_formats(self):
        config = self.make()
        name = find("quantizer", self.method).method.name
        said = f"{name} format version 2, this hf_rb reads 1. Update hf_rb"
        with pytest.raises(ValueError, match=said):
            type(config).from_dict({"quant_method": self.method, "format_version": 2, "new_key": "hadamard"})
        stored = config.to_dict()
        assert "dequantize" not in stored and json.loads(json.dumps(stored)) == stored
        assert type(config).from_dict(stored).to_dict() == stored
        assert pickle.loads(pickle.dumps(config)).to_dict() == stored
        assert self.make(dequantize=True).get_loading_attributes() == {"dequantize": True}

    def test_no_memory_names_the_layer(self, make_model, monkeypatch):
        def solve(*args, **kwargs):
            raise MemoryError("The solver has no memory for a group of weights.")

        quantizer = type(AutoHfQuantizer.from_config(self.make(), pre_quantized=False))
        monkeypatch.setattr(quantizer, "solve", solve)
        with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj.weight: The solver has no memory"):
            load(make_model(), self.make())
