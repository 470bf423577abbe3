"""PTQTP through `from_pretrained` and `save_pretrained`."""

import copy
import pickle

import pytest
import torch
from helpers.round_trips import INPUT, load, logits, same_files
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_rb import PTQTPConfig
from hf_rb.quantizers.ptqtp import PTQTPLinear, solve


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (dict(architecture="qwen3", tied=True), dict()),
        (dict(architecture="qwen3", tied=False, bias=True), dict(packing="nibble")),
        (dict(architecture="llama", tied=True, bias=True), dict(packing="nibble", planes=1)),
        (dict(architecture="llama", tied=False), dict(planes_per_layer={"mlp.down_proj": 1}, group_size=64)),
        (dict(architecture="llama", dtype=torch.float32), dict(scale_mode="tied", tol_mode="relative")),
        (dict(architecture="llama", tied=False), dict(planes=3)),
        (
            dict(architecture="qwen3"),
            dict(planes_per_layer={"o_proj": 3, "k_proj": 1}, packing="nibble", multistart=True),
        ),
    ],
)
def test_round_trip(make_model, tmp_path, model, options):
    source = make_model(**model)
    quantized = load(source, PTQTPConfig(**options))
    expected = logits(quantized)
    quantized.save_pretrained(tmp_path / "one")
    loaded = load(tmp_path / "one")
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "two")
    assert same_files(tmp_path / "one", tmp_path / "two")

    tensors = load_file(tmp_path / "one" / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not model.get("tied", True)
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    assert down.dtype == torch.uint8 and down.shape != (192, 160)
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].dtype == torch.float16
    assert tensors["model.embed_tokens.weight"].dtype == model.get("dtype", torch.bfloat16)

    plain = load(tmp_path / "one", PTQTPConfig(dequantize=True))
    assert not any(isinstance(module, PTQTPLinear) for module in plain.modules())
    assert plain.dtype == loaded.dtype
    torch.testing.assert_close(logits(plain), expected, atol=0.05, rtol=0.05)  # its weights are rounded to bfloat16
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain")), logits(plain))

    assert torch.equal(logits(loaded.dequantize()), logits(plain))
    assert not any(isinstance(module, PTQTPLinear) for module in loaded.modules())


def test_weights_are_those_of_the_solver(make_model):
    source = make_model()
    model = load(source, PTQTPConfig())
    weight = load_file(source / "model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    expected = solve(weight)
    layer = model.model.layers[1].self_attn.o_proj
    assert torch.equal(layer.dequantize(), expected.dequantize())
    assert layer.weight_scale.shape == (192, 2, 2)  # 192 weights are one group and a half
    x = torch.randn(3, 192)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, expected.dequantize()), atol=1e-5, rtol=1e-5)


def test_report(make_model):
    report = load(make_model(), PTQTPConfig()).hf_quantizer.report
    assert len(report.layers) == 14 and report.skipped == ["lm_head"] and report.resolved == 0
    assert all(0.14 < layer.relative_error < 0.18 for layer in report.layers)
    assert set(report.error_by_kind()) == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert report.weights_per_second > 0


def test_layers_of_small_weights_are_counted(make_model, tmp_path):
    source = make_model()
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e-3
    copy_model(source, tmp_path / "small", tensors)
    report = load(tmp_path / "small", PTQTPConfig()).hf_quantizer.report
    assert report.resolved == 1
    assert [layer.name for layer in report.layers if layer.resolved] == ["model.layers.0.mlp.up_proj"]
    assert load(tmp_path / "small", PTQTPConfig(tol_mode="absolute_strict")).hf_quantizer.report.resolved == 0


def copy_model(source, destination, tensors):
    destination.mkdir()
    (destination / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})


def test_dict_config_and_other_dtypes(make_model, tmp_path):
    model = load(make_model(), {"quant_method": "ptqtp", "group_size": 64}, dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.layout.group_size == 64 and layer.weight_scale.dtype == torch.float16
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight_scale, layer.weight_scale)
    assert not any(parameter.requires_grad for name, parameter in loaded.named_parameters() if "weight_scale" in name)


def test_casting_the_model_keeps_the_scales(make_model):
    model = load(make_model(), PTQTPConfig(), dtype=torch.float32)
    scale = model.model.layers[0].mlp.up_proj.weight_scale.clone()
    model.to(torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float16
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight_scale, scale)
    assert logits(model).dtype == torch.bfloat16


def test_skipped_modules(make_model, tmp_path):
    options = dict(modules_to_not_convert=["down_proj", "model.layers.1.self_attn"], quantize_qk=False)
    model = load(make_model(tied=False), PTQTPConfig(**options))
    quantized = {name for name, module in model.named_modules() if isinstance(module, PTQTPLinear)}
    assert quantized == {
        *(f"model.layers.0.self_attn.{name}_proj" for name in "vo"),
        *(f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up")),
    }
    assert "lm_head" in model.hf_quantizer.report.skipped  # the default skips stay
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_device_map(make_model, tmp_path):
    model = load(make_model(), PTQTPConfig(), device_map="auto")
    # What `device_map` plans with: the parameters have their packed shapes before anything is loaded.
    weight = model.model.layers[0].mlp.up_proj.weight
    size = model.hf_quantizer.param_element_size(model, "model.layers.0.mlp.up_proj.weight", weight)
    assert size * weight.numel() == 160 * (64 + 32)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", device_map={"": "cpu"})), logits(model))


@pytest.mark.parametrize("memory", ["150KB", "1KB"])  # some layers on disk, all of them
def test_offload(make_model, tmp_path, memory):
    source = make_model("llama", tied=False)
    expected = load(source, PTQTPConfig())
    expected.save_pretrained(tmp_path / "expected")
    options = dict(device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path / "offload")
    on_the_fly = load(source, PTQTPConfig(), **options)
    reloaded = load(tmp_path / "expected", **options)
    for name, model in {"one": on_the_fly, "two": reloaded}.items():
        assert "disk" in model.hf_device_map.values()
        assert any(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(logits(model), logits(expected))
        model.save_pretrained(tmp_path / name)
        assert same_files(tmp_path / name, tmp_path / "expected")
        with pytest.raises(ValueError, match=r"is offloaded.* Load the checkpoint with .*dequantize=True"):
            model.dequantize()
    plain = load(tmp_path / "expected", PTQTPConfig(dequantize=True), **options)
    assert torch.equal(logits(plain), logits(expected.dequantize()))


def test_other_heads(make_model, tmp_path):
    model = load(make_model("llama"), PTQTPConfig())
    model.save_pretrained(tmp_path / "whole")
    headless = AutoModel.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(headless(INPUT).last_hidden_state, model.model(INPUT).last_hidden_state)
    headless.save_pretrained(tmp_path / "headless")
    assert torch.equal(logits(load(tmp_path / "headless")), logits(model))  # the head is tied
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", pad_token_id=0)
    assert type(classifier.score) is nn.Linear and logits(classifier).shape == (2, 2)


def test_layers_that_transformers_keeps_in_float32(tmp_path):
    sizes = dict(
        d_model=64, d_ff=96, d_kv=16, num_layers=1, num_heads=4, vocab_size=64, feed_forward_proj="gated-gelu"
    )
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "source")
    load_t5 = AutoModelForSeq2SeqLM.from_pretrained
    model = load_t5(tmp_path / "source", quantization_config=PTQTPConfig(), dtype=torch.bfloat16)
    # Their input is cast to the type of their weight.
    assert [name.rpartition(".")[2] for name in model.hf_quantizer.report.skipped] == ["wo", "wo", "lm_head"]
    model.save_pretrained(tmp_path / "saved")
    inputs = dict(input_ids=INPUT, decoder_input_ids=INPUT)
    with torch.no_grad():
        assert torch.equal(load_t5(tmp_path / "saved")(**inputs).logits, model(**inputs).logits)


def test_no_split_over_devices(make_model):
    from hf_rb.quantizers.ptqtp import PTQTPQuantizer

    config = AutoConfig.from_pretrained(make_model())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.config.distributed_config = object()
    with pytest.raises(ValueError, match="leave out `distributed_config` and `tp_plan`"):
        PTQTPQuantizer(PTQTPConfig(), pre_quantized=False).preprocess_model(model)


def test_shards(make_model, tmp_path):
    model = load(make_model(), PTQTPConfig())
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_copies_and_state_dicts(make_model, tmp_path):
    model = load(make_model(), PTQTPConfig())
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


def test_rounded_activations(make_model, tmp_path):
    source = make_model(dtype=torch.float32)
    model = load(source, PTQTPConfig(activations="int8"))
    model.save_pretrained(tmp_path)
    assert load(tmp_path).model.layers[0].mlp.up_proj.activations == "int8"
    # A default says nothing about what is stored.
    assert load(tmp_path, PTQTPConfig()).model.layers[0].mlp.up_proj.activations == "int8"
    exact = load(source, PTQTPConfig())
    exact.save_pretrained(tmp_path / "exact")
    again = load(tmp_path / "exact", PTQTPConfig(activations="int8"))  # may be chosen anew
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="`activations` cannot be 'int9'; did you mean 'int8'"):
        again.model.layers[0].mlp.up_proj.activations = "int9"
    for module in again.modules():
        if isinstance(module, PTQTPLinear):
            module.activations = "exact"
    assert torch.equal(logits(again), logits(exact))
    torch.testing.assert_close(logits(exact), logits(model), atol=0.2, rtol=0.05)


def test_generation(make_model):
    model = load(make_model("llama"), PTQTPConfig(), dtype=torch.float32)
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = model.generate(INPUT, use_cache=False, **options)
    assert torch.equal(model.generate(INPUT, **options), expected)
    with torch.inference_mode():
        assert torch.equal(model.generate(INPUT, **options), expected)
    assert torch.equal(model.generate(INPUT, cache_implementation="static", **options), expected)


def test_compiled(make_model):
    model = load(make_model("llama"), PTQTPConfig(), dtype=torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(INPUT).logits, logits(model))


def test_checkpoints_of_a_trainer(make_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    def trainer(steps):
        model = load(make_model(), PTQTPConfig(), dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights="gaussian"))
        args = TrainingArguments(
            tmp_path, max_steps=steps, save_steps=2, use_cpu=True, per_device_train_batch_size=2, disable_tqdm=True
        )
        rows = [{"input_ids": row, "labels": row} for row in INPUT.repeat(4, 1)]
        return Trainer(model, args, train_dataset=rows)

    trainer(2).train()
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert len(saved) == 28 and all("lora" in name for name in saved)
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    weight = resumed.model.base_model.model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.uint8 and weight.grad is None


def test_training_without_adapters_is_refused(make_model, tmp_path):
    from transformers import Trainer, TrainingArguments

    with pytest.raises(ValueError, match="adapters"):
        Trainer(load(make_model(), PTQTPConfig()), TrainingArguments(tmp_path, use_cpu=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])  # with a kernel, and without
def test_a_layer_that_changes(make_model, dtype):
    layer = load(make_model(), PTQTPConfig()).model.layers[0].mlp.up_proj
    x = torch.randn(2, 192, dtype=dtype)
    first = layer(x)
    with torch.no_grad():
        layer.weight_scale *= 2
    torch.testing.assert_close(layer(x), 2 * first)
    layer.weight_scale.data = layer.weight_scale.data / 2
    assert torch.equal(layer(x), first)
    other = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(other.to("cpu")(x), first)


# Refusals.


def test_bad_weights_are_named(make_model, tmp_path):
    source = make_model()
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("inf")
    copy_model(source, tmp_path / "bad", tensors)
    with pytest.raises(ValueError, match="NaN or an infinite value") as error:
        load(tmp_path / "bad", PTQTPConfig())
    assert "model.layers.0.mlp.up_proj.weight" in str(error.value)
    assert "model.layers.1.self_attn.q_proj.weight" in str(error.value)


def test_weight_of_another_shape(make_model, tmp_path):
    source = make_model()
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(160, 128, dtype=torch.bfloat16)
    copy_model(source, tmp_path / "bad", tensors)
    with pytest.raises(ValueError, match=r"up_proj.weight: .*\(160, 128\), expected \(160, 192\)"):
        load(tmp_path / "bad", PTQTPConfig())


WEIGHT = "model.layers.0.mlp.up_proj.weight"


def set_byte(value):
    def damage(tensors):
        tensors[WEIGHT][3, 4] = value

    return damage


def set_scale(value):
    def damage(tensors):
        tensors[f"{WEIGHT}_scale"][3, 1, 0] = value

    return damage


def change(name, function):
    def damage(tensors):
        tensors[name] = function(tensors[name]).contiguous()

    return damage


def remove(*names):
    def damage(tensors):
        for name in names:
            del tensors[name]

    return damage


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize(
    ("options", "damage", "message"),
    [
        (dict(), set_byte(243), "{weight}: A packed weight holds the code 243, 'dense' ends at 242: the file is damaged"),
        (dict(packing="nibble"), set_byte(0x94), "{weight}: A packed weight holds the code 9, 'nibble' ends at 8"),
        (dict(packing="nibble"), set_byte(0x4F), "{weight}: A packed weight holds the code 15, 'nibble' ends at 8"),
        (dict(packing="nibble", planes=1), set_byte(0x30), "{weight}: A packed weight holds the code 3, 'nibble' ends at 2"),
        (dict(), set_scale(float("nan")), "{scale}: A scale is negative, infinite or NaN"),
        (dict(), set_scale(float("inf")), "{scale}: A scale is negative, infinite or NaN"),
        (dict(), set_scale(-0.5), "{scale}: A scale is negative, infinite or NaN"),
        (dict(), change(WEIGHT, lambda tensor: tensor[:, 1:]), r"{weight}: .*\(160, 77\)"),
        (dict(), change(WEIGHT, lambda tensor: tensor.float()), "{weight}: Expected uint8 rows of 78 bytes .* got torch.float32"),
        (dict(), change(f"{WEIGHT}_scale", lambda tensor: tensor[:, 1:]), r"{scale}: Expected float16 scales of shape \(160, 2, 2\)"),
        (dict(), change(f"{WEIGHT}_scale", lambda tensor: tensor.float()), "{scale}: Expected float16 scales .*float32"),
        (dict(), remove(WEIGHT), "{weight}: (not in the checkpoint|There are scales and no packed tensor)"),
        (dict(), remove(f"{WEIGHT}_scale"), "{scale}: (not in the checkpoint|1 packed tensors come with 0)"),
        (dict(), remove(WEIGHT, f"{WEIGHT}_scale"), "{weight}: not in the checkpoint"),
        (dict(), remove("model.layers.1.self_attn.q_proj.bias"), "q_proj.bias: not in the checkpoint"),
    ],
)  # fmt: skip
def test_damaged_files(make_model, tmp_path, options, damage, message, dequantize):
    load(make_model(bias=True), PTQTPConfig(**options)).save_pretrained(tmp_path / "good")
    tensors = load_file(tmp_path / "good" / "model.safetensors")
    damage(tensors)
    copy_model(tmp_path / "good", tmp_path / "bad", tensors)
    names = (
        dict(weight=WEIGHT, scale=f"{WEIGHT}(_scale)?") if dequantize else dict(weight=WEIGHT, scale=f"{WEIGHT}_scale")
    )
    if dequantize and "bias" in message:
        return  # an ordinary layer may lack its bias, with transformers' warning
    with pytest.raises(ValueError, match="^" * ("bias" not in message) + message.format(**names)):
        load(tmp_path / "bad", PTQTPConfig(dequantize=dequantize))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(group_size=0), r"`group_size` must be in \[1, inf\)"),
        (dict(planes=4), "`planes` .* must be one of 1, 2, 3"),
        (dict(tol=0.0), "`tol` must be in"),
        (dict(tol_mode="strict"), "`tol_mode` .* must be one of"),
        (dict(packing="base3"), "`packing` .* must be one of 'dense', 'nibble'"),
        (dict(planes_per_layer={"down_proj": 4}), "must be 1, 2 or 3; got 4"),
        (dict(planes=1, scale_mode="tied"), "use it with `planes=2`"),
        (dict(modules_to_not_convert="lm_head"), r"must be a list; got 'lm_head', so write \['lm_head'\]"),
        (dict(format_version=2), "Update hf_rb"),
        (dict(group_size=64.0), "`group_size` must be an integer; got 64.0"),
        (dict(planes=True), "`planes` must be an integer; got True"),
        (dict(multistart="yes"), "`multistart` must be True or False; got 'yes'"),
        (dict(dequantize="no"), "`dequantize` must be True or False; got 'no'"),
        (dict(planes_per_layer={"down_proj": True}), "must be 1, 2 or 3; got True"),
        (dict(planes_per_layer=["x"]), r"`planes_per_layer` must be a dict such as .*; got \['x'\]"),
        (dict(planes_per_layer={"(": 3}), r"`planes_per_layer` has '\(', which is no regular expression \("),
        (dict(modules_to_not_convert=["*.down_proj"]), r"has '\*.down_proj', which .*; write 'down_proj' for whatever ends so"),
        (dict(modules_to_not_convert=[3]), "`modules_to_not_convert` has 3; expected the name"),
        (dict(modules_to_not_convert=3), "`modules_to_not_convert` must be a list of names; got 3"),
    ],
)  # fmt: skip
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        PTQTPConfig(**options)


def test_misspelt_key(make_model):
    with pytest.raises(ValueError, match="no key 'group_sise'; did you mean 'group_size'"):
        load(make_model(), {"quant_method": "ptqtp", "group_sise": 64})


def test_newer_format_with_other_keys():
    with pytest.raises(ValueError, match="format version 2, this hf_rb reads 1. Update hf_rb"):
        PTQTPConfig.from_dict({"quant_method": "ptqtp", "format_version": 2, "rotation": "hadamard"})


def test_no_memory_names_the_layer(make_model, monkeypatch):
    def quantize_matrix(*args, **kwargs):
        raise MemoryError("The solver has no memory for a group of weights.")

    monkeypatch.setattr("hf_rb.quantizers.ptqtp.quantizer.quantize_matrix", quantize_matrix)
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj.weight: The solver has no memory"):
        load(make_model(), PTQTPConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(modules_to_not_convert=["dwon_proj"]), "'dwon_proj' matches no module of Qwen3ForCausalLM; did you mean 'down_proj'"),
        (dict(modules_to_not_convert=["_proj"]), "'_proj' matches no module of Qwen3ForCausalLM; did you mean 'down_proj'"),
        (dict(modules_to_not_convert=["layers.0"]), "'layers.0' is the ending of model.layers.0, .* write 'model.layers.0', or '.[*]layers.0'"),
        (dict(planes_per_layer={"mlp": 3}), "'mlp' is the ending of model.layers.0.mlp, .* or '.[*]mlp' for all"),
        (dict(planes_per_layer={"experts": 1}), "'experts' matches no module of .*; its weights are down_proj, gate_proj, k_proj"),
        (dict(planes_per_layer={"lm_head": 3}), "'lm_head', which matches nothing of Qwen3ForCausalLM that is quantized"),
        (dict(planes_per_layer={"norm": 3}), "'norm', which matches nothing"),
        (dict(planes_per_layer={"q_proj": 3}, quantize_qk=False), "'q_proj', which matches nothing"),
        (dict(dequantize=True), "`dequantize=True` is for loading a PTQTP checkpoint"),
        (dict(modules_to_not_convert=["model"]), "nothing to quantize in Qwen3ForCausalLM: its weights are in 15 Linear, 1 Embedding"),
    ],
)  # fmt: skip
def test_options_that_cannot_act(make_model, options, message):
    with pytest.raises(ValueError, match=message):
        load(make_model(), PTQTPConfig(**options))


def test_no_qk_needs_them(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no q_proj"):
        load(tmp_path, PTQTPConfig(quantize_qk=False))
