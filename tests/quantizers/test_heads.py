"""Heads stay in floating point, new ones are new, and what older versions packed is read."""

import pytest
import torch
from helpers.checkpoints import tensors
from helpers.round_trips import INPUT, logits, same_files
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_rb import D2QuantConfig, PTQTPConfig, tiny
from hf_rb.quantizers.loading import selection
from hf_rb.quantizers.loading.heads import heads
from hf_rb.quantizers.packed.linear import PackedModule


CONFIGS = [PTQTPConfig, lambda **options: D2QuantConfig(backend="rtn", **options)]
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    BertForMaskedLM(BertConfig(**SIZES, vocab_size=96)).save_pretrained(folder)
    return folder


def of_class(kind):
    t5 = dict(d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=4, vocab_size=32)
    whisper = dict(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4
    )
    whisper |= dict(
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=1
    )
    whisper |= dict(decoder_start_token_id=1, max_source_positions=16, max_target_positions=16, num_mel_bins=8)
    with torch.device("meta"):
        return {
            "masked": lambda: BertForMaskedLM(BertConfig(**SIZES)),
            "classes": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
            "bare": lambda: BertModel(BertConfig(**SIZES)),
            "image": lambda: ViTForImageClassification(ViTConfig(**SIZES)),
            "t5": lambda: T5ForConditionalGeneration(T5Config(**t5)),
            "whisper": lambda: WhisperForConditionalGeneration(WhisperConfig(**whisper)),
        }[kind]()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("masked", {"cls"}),
        ("classes", {"dropout", "classifier", "bert.pooler"}),
        ("bare", {"pooler"}),
        ("image", {"classifier", "vit.layernorm"}),
        ("t5", {"lm_head"}),
        ("whisper", {"proj_out"}),
    ],
)
def test_what_is_a_head(kind, expected):
    assert set(heads(of_class(kind))) == expected


def classes(model):
    return {
        name: type(module) for name, module in model.named_modules() if isinstance(module, (PackedModule, nn.Linear))
    }


@pytest.mark.parametrize("make", CONFIGS, ids=["ptqtp", "d2quant"])
def test_layers_by_other_names_are_not_packed_as_new_ones(make):
    """The base model of this class has another name, so that transformers finds none of the layers."""
    with pytest.raises(
        ValueError, match=r"^transformer\.\S+: not in the checkpoint, nor are \d+ more .* another class\?$"
    ):
        AutoModelForQuestionAnswering.from_pretrained(tiny.resolve("tiny:student"), quantization_config=make())


@pytest.mark.parametrize("make", CONFIGS, ids=["ptqtp", "d2quant"])
@pytest.mark.parametrize(
    ("auto", "source"),
    [
        (AutoModelForTokenClassification, "bert"),
        (AutoModelForTokenClassification, "student"),
        (AutoModelForSequenceClassification, "bert"),
        (AutoModelForSequenceClassification, "student"),
        (AutoModelForQuestionAnswering, "bert"),  # the student's is refused, see above
    ],
)
def test_new_heads(bert, tmp_path, source, auto, make):
    """From a plain and from a quantized folder: ordinary, new, trainable; saved and read again as they are."""
    source = bert if source == "bert" else tiny.resolve("tiny:student")
    options = dict(dtype=torch.float32) | ({} if "Question" in auto.__name__ else dict(num_labels=3))
    if "Sequence" in auto.__name__:
        options["pad_token_id"] = 0
    model = auto.from_pretrained(source, quantization_config=make(), **options)
    new = [name for name, kind in classes(model).items() if name.startswith(("classifier", "qa_outputs", "score"))]
    assert new and all(type(model.get_submodule(name)) is nn.Linear for name in new)
    assert model.get_submodule(new[0]).weight.isfinite().all()
    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    first = lambda one: one(INPUT)[0]  # noqa: E731
    with torch.no_grad():
        assert classes(again) == classes(model) and torch.equal(first(again), first(model))
        plain = auto.from_pretrained(
            tmp_path / "saved", quantization_config=make(dequantize=True), dtype=torch.float32
        )
        torch.testing.assert_close(first(plain), first(model), atol=1e-4, rtol=1e-4)
    if source == bert:
        language = BertForMaskedLM.from_pretrained(bert, quantization_config=make())
    else:
        language = AutoModelForCausalLM.from_pretrained(source, quantization_config=make())
    language.save_pretrained(tmp_path / "language")
    model = auto.from_pretrained(tmp_path / "language", **options)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in new)
    assert all(parameter.isfinite().all() for parameter in model.parameters() if parameter.is_floating_point())


@pytest.mark.parametrize("make", CONFIGS)
def test_another_number_of_labels(bert, tmp_path, make):
    BertForSequenceClassification(BertConfig(**SIZES, vocab_size=96)).save_pretrained(tmp_path / "plain")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "plain", quantization_config=make())
    assert type(model.classifier) is type(model.bert.pooler.dense) is nn.Linear
    model.save_pretrained(tmp_path / "packed")
    for folder, options in (("plain", dict(quantization_config=make())), ("packed", {})):
        again = BertForSequenceClassification.from_pretrained(
            tmp_path / folder, num_labels=5, ignore_mismatched_sizes=True, **options
        )
        assert type(again.classifier) is nn.Linear and logits(again).shape == (2, 5)


@pytest.mark.parametrize("make", CONFIGS)
def test_a_packed_head_of_an_older_version_is_read(tmp_path, monkeypatch, make):
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**SIZES, vocab_size=96)).save_pretrained(tmp_path / "plain")
    with monkeypatch.context() as older:
        older.setattr(selection, "heads", lambda model: ())
        old = BertForSequenceClassification.from_pretrained(tmp_path / "plain", quantization_config=make())
    assert isinstance(old.classifier, PackedModule) and isinstance(old.bert.pooler.dense, PackedModule)
    old.save_pretrained(tmp_path / "old")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "old")
    assert isinstance(model.classifier, PackedModule) and torch.equal(logits(model), logits(old))
    model.save_pretrained(tmp_path / "again")
    assert same_files(tmp_path / "old", tmp_path / "again")
    plain = BertForSequenceClassification.from_pretrained(
        tmp_path / "old", quantization_config=make(dequantize=True), dtype=torch.float32
    )
    assert type(plain.classifier) is nn.Linear
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-4, rtol=1e-4)
    bare = BertModel.from_pretrained(tmp_path / "old")  # whose names lack a prefix
    assert isinstance(bare.pooler.dense, PackedModule)


def test_a_layer_that_was_packed_and_is_missing_is_damage(bert, tmp_path):
    model = BertForMaskedLM.from_pretrained(bert, quantization_config=PTQTPConfig())
    model.save_pretrained(tmp_path)
    stored = tensors(tmp_path)
    name = "bert.encoder.layer.1.output.dense.weight"
    del stored[name], stored[f"{name}_scale"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"^{name}: not in the checkpoint"):
        BertForMaskedLM.from_pretrained(tmp_path)


def test_image_classes(tmp_path):
    ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=16)).save_pretrained(tmp_path)
    model = ViTForImageClassification.from_pretrained(tmp_path, quantization_config=PTQTPConfig())
    assert type(model.classifier) is nn.Linear and "classifier" in model.hf_quantizer.report.skipped


@pytest.mark.parametrize("make", CONFIGS)
def test_parameters_are_counted(make_model, make):
    source = make_model("llama", tied=False)
    plain = AutoModelForCausalLM.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=make())
    for options in ({}, dict(exclude_embeddings=True)):
        assert model.num_parameters(**options) == plain.num_parameters(**options)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert model.num_parameters(only_trainable=True) == trainable < plain.num_parameters()
    assert model.dequantize().num_parameters() == plain.num_parameters()
