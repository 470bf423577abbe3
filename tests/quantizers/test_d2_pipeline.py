"""D²Quant on calibration text, through `from_pretrained`."""

import copy

import pytest
import torch
from helpers.round_trips import load, logits, same_files
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)
from transformers.utils import logging

from hf_rb import D2QuantConfig, tiny
from hf_rb.quantizers.d2quant.calibrate import pipeline
from hf_rb.quantizers.d2quant.calibrate.checks import check_model
from hf_rb.quantizers.d2quant.layers import D2QuantLinear
from hf_rb.quantizers.d2quant.maths import gptq


VOCABULARY = 96


class Tokens:
    """Stands for a tokenizer: every character is a token."""

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(letter) % VOCABULARY for letter in text] for text in texts]}


TEXTS = [
    "".join(chr(32 + int(i)) for i in torch.randint(95, (40,), generator=torch.Generator().manual_seed(seed)))
    for seed in range(30)
]


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch):
    monkeypatch.setattr(pipeline, "load_tokenizer", lambda config, model: Tokens())


def config(**options):
    sizes = dict(dataset=TEXTS, num_samples=6, seqlen=32, batch_size=2, group_size=64)
    return D2QuantConfig(**(sizes | options))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (dict(architecture="qwen3", tied=True), dict()),
        (dict(architecture="llama", tied=False), dict(bits=3, dac_mode="norm_bias", backend="gptq")),
        (dict(architecture="llama", tied=True, bias=True), dict(rotate=False, num_samples=5)),
        (dict(architecture="llama", bias=True, dtype=torch.float32), dict(group_size=128, dsq=False, act_order=None)),
        (dict(architecture="qwen3"), dict(bits=4, bits_per_layer={"down_proj": 2, "model.layers.1.mlp": 3})),
        (dict(architecture="qwen3"), dict(modules_to_not_convert=["up_proj"], dac_mode="fold")),
        (dict(architecture="qwen3", tied=True), dict(dac=False, clip_search=False, percdamp=0.1)),
    ],
)
def test_round_trip(make_model, tmp_path, model, options):
    quantized = load(make_model(**model), config(**options))
    expected = logits(quantized)
    assert quantized.config.tie_word_embeddings is (model.get("tied", True) and not options.get("rotate", True))
    quantized.save_pretrained(tmp_path / "one")
    loaded = load(tmp_path / "one")
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "two")
    assert same_files(tmp_path / "one", tmp_path / "two")
    stored = loaded.config.quantization_config
    assert stored.dataset.startswith("30 texts, sha256 ") and bool(stored.column_modules) is (
        "modules_to_not_convert" in options
    )
    assert bool(stored.bias_modules) is options.get("dac", True)


def test_other_architectures(tmp_path, caplog):
    """A ReLU MLP absorbs column scales; beside a GELU they stay, and parallel attention shifts no MLP. Norms are LayerNorms."""
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY)
    sizes |= dict(max_position_embeddings=64)
    models = {
        "opt": OPTForCausalLM(OPTConfig(ffn_dim=128, word_embed_proj_dim=64, **sizes)),
        "projected": OPTForCausalLM(OPTConfig(ffn_dim=128, word_embed_proj_dim=32, **sizes)),
        "neox": GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=128, **sizes)),
    }
    logging.enable_propagation()
    for name, model in models.items():
        for path, parameter in model.named_parameters():
            if "norm" not in path:
                torch.nn.init.normal_(parameter, std=0.1)
        model.bfloat16().save_pretrained(tmp_path / name)
        quantized = load(tmp_path / name, config(rotate=False))
        kept = quantized.config.quantization_config.column_modules
        assert len(kept) == 2 if name == "neox" else kept is None
        # Between the last norm of the second and its head there is a projection.
        assert (
            (quantized.lm_head.bias is None) == (name == "projected") == ("`dac_final=True` corrects" in caplog.text)
        )
        caplog.clear()
        quantized.save_pretrained(tmp_path / f"{name}-quantized")
        assert torch.equal(logits(load(tmp_path / f"{name}-quantized")), logits(quantized))
    logging.disable_propagation()


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_models_without_a_head(make_model, tmp_path, kind):
    source = make_model("llama")
    with pytest.raises(ValueError, match="it has no head that could undo the rotation. Use `rotate=False`"):
        kind.from_pretrained(source, quantization_config=config())
    model = kind.from_pretrained(source, quantization_config=config(rotate=False))
    assert (
        len(model.config.quantization_config.bias_modules) == 4
    )  # gate and up: what reads the final norm is not known
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        outputs = [one(torch.arange(1, 13)[None])[0] for one in (model, kind.from_pretrained(tmp_path))]
    assert torch.equal(*outputs)


def test_codes_and_corrections_from_outside(make_model):
    """Every matrix by what it reads in both models, every correction by what the original projections would have given."""
    source = make_model("llama", tied=False, bias=True, dtype=torch.float32)
    plain, model = load(source), load(source, config(rotate=False, dsq=False, dac_mode="norm_bias"))
    tokens = pipeline.calibration_tokens(config(), Tokens())
    names = [name for name, module in model.named_modules() if isinstance(module, D2QuantLinear)]

    @torch.no_grad()
    def outputs(model, names, of_input=False):
        seen = {}
        for name in names:
            module = model.get_submodule(name)
            module.register_forward_hook(
                lambda _, args, out, name=name: seen.update({name: args[0] if of_input else out})
            )
        model(tokens)
        return seen

    read, originals = (outputs(copy.deepcopy(one), names, of_input=True) for one in (model, plain))
    assert len(names) == 14
    for name in names:
        statistics = gptq.InputStatistics(read[name].shape[-1], cross=True)
        statistics.add(read[name], originals[name])
        weight = plain.get_submodule(name).weight
        expected, _ = gptq.quantize(weight, statistics.hessian, statistics.cross, bits=2, group_size=64)
        different = (model.get_submodule(name).dequantize() - expected.dequantize()).abs() > 1e-3
        assert different.float().mean() < 0.03, name

    attention, mlp = (names[i : i + 4] for i in (0, 7)), names[11:]
    norms = [f"model.layers.{i}.post_attention_layernorm" for i in (0, 1)]
    for norm, replaced in zip([*norms, "model.norm"], [*attention, mlp], strict=True):
        student = copy.deepcopy(model)
        bias = student.get_submodule(norm).bias.data.clone()
        student.get_submodule(norm).bias.data.zero_()
        teacher = copy.deepcopy(student)
        for name in replaced:
            teacher.set_submodule(name, copy.deepcopy(plain.get_submodule(name)))
        lost = outputs(teacher, [norm])[norm].double() - outputs(student, [norm])[norm]
        torch.testing.assert_close(bias.double(), lost.mean((0, 1)), atol=1e-6, rtol=1e-4)


def test_correction_lowers_the_error_by_the_square_of_the_mean(make_model):
    quantized = load(make_model(), config())
    blocks = quantized.hf_quantizer.report.blocks
    assert [block.name for block in blocks] == ["model.layers.0", "model.layers.1"]
    for block in blocks:
        assert block.shift_after < block.shift_before
        assert block.shift_after == pytest.approx(block.shift_expected, rel=1e-12)
        assert 0 < block.hidden_error < 2


def test_folded_is_the_same_as_a_bias_of_the_norm(make_model):
    source = make_model("llama", dtype=torch.float32)
    folded, kept = (load(source, config(dac_mode=mode)) for mode in ("fold", "norm_bias"))
    torch.testing.assert_close(logits(folded), logits(kept), atol=2e-3, rtol=2e-3)
    norms = kept.config.quantization_config.bias_modules
    assert norms == [*(f"model.layers.{i}.post_attention_layernorm" for i in (0, 1)), "model.norm"]
    assert kept.model.norm.bias.abs().max() > 0
    assert logits(load(source, config(dac=False))).sub(logits(kept)).abs().max() > 1e-3  # it is not nothing


def test_seed_decides_the_calibration_samples(make_model):
    source = make_model()
    one, same, other = (logits(load(source, config(seed=seed))) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_codes_are_those_of_the_formula(make_model):
    """The first group of the first layer, on what it reads: nothing before it is quantized, so that GPTAQ is GPTQ there."""
    source = make_model("llama", dtype=torch.float32)
    plain, options = load(source), dict(rotate=False, dac=False, dsq=False)
    tokens = pipeline.calibration_tokens(config(), Tokens())
    read = plain.model.layers[0].input_layernorm(plain.model.embed_tokens(tokens))
    statistics = gptq.InputStatistics(192)
    statistics.add(read.detach())
    attention = plain.model.layers[0].self_attn
    expected, _ = gptq.quantize(attention.q_proj.weight, statistics.hessian, bits=2, group_size=64)
    for backend in ("gptq", "gptaq"):
        found = load(source, config(backend=backend, **options)).model.layers[0].self_attn.q_proj
        assert isinstance(found, D2QuantLinear)
        assert (found.dequantize() != expected.dequantize()).float().mean() < 0.01


def test_calibration_is_better_than_rounding():
    source = tiny.resolve("tiny:student")
    texts = tiny.load_dataset("math", config="messages", split="train", size=60)
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in texts]
    inputs = tokenizer(texts[-10:], return_tensors="pt", padding=True)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()  # no calibration text has padding
    plain = load(source, dtype=torch.float32)(ids).logits.log_softmax(-1)

    def divergence(**options):
        model = load(source, D2QuantConfig(group_size=64, **options), dtype=torch.float32)
        found = model(ids).logits.log_softmax(-1)
        return (plain.exp() * (plain - found)).sum(-1)[real].mean().item()

    data = dict(dataset=texts[:-10], tokenizer=tokenizer, num_samples=16, seqlen=128)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(pipeline, "load_tokenizer", lambda *_: tokenizer)
        assert divergence(**data) < 0.7 * divergence(backend="rtn")


# Unfinished work.


def interrupted(monkeypatch, after: int):
    """Lets a run die when so many layers are kept."""
    kept = []

    def save(result, file):
        if len(kept) == after:
            raise KeyboardInterrupt
        kept.append(file)
        save_result(result, file)

    save_result = pipeline.save_result
    monkeypatch.setattr(pipeline, "save_result", save)


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("options", [dict(), dict(dac_mode="norm_bias", rotate=False)])
def test_resume(make_model, tmp_path, monkeypatch, after, options):
    source, work = make_model("llama", tied=True), tmp_path / "work"
    load(source, config(**options)).save_pretrained(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, after)
        load(source, config(resume_dir=str(work), **options))
    assert len(list(work.glob("layer-*.safetensors"))) == after

    calls, solve = [], gptq.quantize
    monkeypatch.setattr(gptq, "quantize", lambda *args, **kwargs: calls.append(1) or solve(*args, **kwargs))
    resumed = load(source, config(resume_dir=str(work), **options))
    assert len(calls) == 4 * (2 - after)  # four groups a layer, none of them twice
    resumed.save_pretrained(tmp_path / "resumed")
    assert same_files(tmp_path / "whole", tmp_path / "resumed")
    assert len(resumed.hf_quantizer.report.layers) == 14 and len(resumed.hf_quantizer.report.blocks) == 2

    again = load(
        source, config(resume_dir=str(work), **options)
    )  # everything is kept, down to the final norm's correction
    assert len(calls) == 4 * (2 - after) and torch.equal(logits(again), logits(resumed))


def test_other_work_is_refused(make_model, tmp_path):
    source, work = make_model("llama"), str(tmp_path / "work")
    load(source, config(resume_dir=work))
    for options, change in [
        (dict(seed=1), "calibration tokens was .* and is"),
        (dict(dataset=TEXTS[1:]), "calibration tokens was"),
        (dict(percdamp=0.02), "percdamp was 0.01 and is 0.02"),
    ]:
        with pytest.raises(ValueError, match=f"does not belong to this call: .*{change}"):
            load(source, config(resume_dir=work, **options))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    (tmp_path / "changed").mkdir()
    (tmp_path / "changed" / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not belong to this call: the model changed"):
        load(tmp_path / "changed", config(resume_dir=work))


# What cannot be.


def test_activations_that_are_not_finite(make_model, tmp_path):
    source = make_model("llama", tied=False)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.layers.1 of the original model has activations that are not finite"):
        load(tmp_path, config(rotate=False))


def test_sequences_longer_than_positions(make_model):
    source = make_model("llama")
    with pytest.raises(ValueError, match="`seqlen=4096` is longer than the 2048 positions"):
        load(source, config(seqlen=4096, num_samples=1, dataset=TEXTS * 10))


def test_weights_on_disk(make_model, tmp_path):
    options = dict(device_map="auto", max_memory={"cpu": "150KB"}, offload_folder=tmp_path)
    with pytest.raises(ValueError, match=r"model\..*\.weight is not in memory, and calibration runs the model"):
        load(make_model("llama", tied=False), config(), **options)


def test_fused_experts(make_moe):
    with pytest.raises(ValueError, match="holds fused experts.* Use `backend='rtn'`"):
        load(make_moe("qwen3_moe"), config(rotate=False))


@pytest.mark.parametrize("rotate", ["block_hadamard", False])
@pytest.mark.parametrize(
    ("kind", "sizes", "reads"),
    [
        (
            T5ForConditionalGeneration,
            dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
            "an encoder's output",
        ),
        (ViTForImageClassification, dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1), "`pixel_values`"),
    ],
)
def test_a_model_that_reads_more_than_text(kind, sizes, reads, rotate):
    with torch.device("meta"):
        model = kind(kind.config_class(**sizes))
    with pytest.raises(
        ValueError, match=f"{kind.__name__} needs {reads}, .* Use `backend='rtn'` \\(`--backend rtn`\\)"
    ):
        check_model(model, config(rotate=rotate))


def test_a_model_that_cannot_be_rotated_is_not_loaded(tmp_path, monkeypatch):
    OPTForCausalLM(OPTConfig(hidden_size=64, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4)).save_pretrained(
        tmp_path
    )

    def loads(*_, **__):
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr("transformers.PreTrainedModel._load_pretrained_model", loads)
    monkeypatch.setattr(pipeline, "calibration_tokens", loads)
    for options in (dict(), dict(bits_per_layer="nsds:3.0")):
        with pytest.raises(ValueError, match="Use `rotate=False`"):
            load(tmp_path, config(resume_dir=str(tmp_path / "work"), **options))
    with pytest.raises(ValueError, match="`seqlen=4096` is longer than the 2048 positions"):
        load(tmp_path, config(rotate=False, seqlen=4096, resume_dir=str(tmp_path / "work")))
    assert not (tmp_path / "work").exists()


def test_fewer_tokens_than_columns(make_model, caplog):
    """The Hessian has no full rank; damping makes up for it."""
    logging.enable_propagation()
    model = load(make_model("llama"), config(num_samples=1, seqlen=8, batch_size=1))
    assert logits(model).isfinite().all()
    (warning,) = [text for text in caplog.messages if "fewer than" in text]
    assert warning.startswith(
        "The calibration text has 8 tokens, fewer than the 192 inputs of model.layers.0.self_attn.q_proj"
    )
    assert "Raise `num_samples` or `seqlen`" in warning
    caplog.clear()
    load(make_model("llama"), config(num_samples=6, seqlen=32))  # just as many
    logging.disable_propagation()
    assert not [text for text in caplog.messages if "fewer than" in text]
