"""Verbs on a model folder are `from_pretrained` of the class that its `architectures` names."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig

from hf_rb import PTQTPConfig, tiny
from hf_rb.cli import main
from hf_rb.evaluation import decode_speed
from hf_rb.io.model_class import check_causal, model_class, skeleton


TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=64, head_dim=16,
)  # fmt: skip
ENCODER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
VISION = ENCODER | dict(image_size=16, patch_size=8)
SPEECH = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))
}
MODELS = {
    "LlavaForConditionalGeneration": dict(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=5,
    ),
    "Gemma3ForConditionalGeneration": dict(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4),
    "Qwen2VLForConditionalGeneration": dict(
        text_config=TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        vision_config=dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=8),
    ),
    "T5ForConditionalGeneration": dict(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2),
    "BertModel": ENCODER | {"vocab_size": 64},
    "ViTForImageClassification": VISION,
    "WhisperForConditionalGeneration": SPEECH | dict(
        vocab_size=64, d_model=32, num_mel_bins=8, max_source_positions=20, max_target_positions=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    ),
}  # fmt: skip


def save(name, folder) -> Path:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    kind(kind.config_class(**MODELS[name])).save_pretrained(folder)
    return folder


def tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", MODELS)
def test_the_command_line_writes_what_python_writes(name, tmp_path, capsys):
    folder, kind = save(name, tmp_path / "model"), getattr(transformers, name)
    packed = kind.from_pretrained(folder, quantization_config=PTQTPConfig(group_size=16))
    packed.save_pretrained(tmp_path / "python")
    for result, options in (("memory", []), ("streamed", ["--stream"])):
        assert main(["quantize", str(folder), str(tmp_path / result), "--group-size", "16", *options]) == 0
        assert equal(tensors(tmp_path / result), tensors(tmp_path / "python"))
    assert main(["dequantize", str(tmp_path / "memory"), str(tmp_path / "plain")]) == 0
    plain = kind.from_pretrained(tmp_path / "plain", dtype="auto")
    assert equal(dict(plain.state_dict()), dict(packed.dequantize().state_dict()))

    capsys.readouterr()
    assert main(["eval", str(tmp_path / "memory"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size"]["weights"] == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("T5ForConditionalGeneration", "is an encoder-decoder"),
        ("BertModel", "generates no text"),
        ("ViTForImageClassification", "reads `pixel_values`"),
        ("WhisperForConditionalGeneration", "reads `input_features`"),
    ],
)
def test_perplexity_says_what_it_takes_before_the_work(name, why, tmp_path, capsys):
    folder, text = save(name, tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("One and two.")
    assert main(["quantize", str(folder), str(tmp_path / "packed"), "--eval-data", str(text)]) == 2
    message = capsys.readouterr().err
    assert f"Perplexity (`--eval-data`) needs a causal language model, and {name} {why}." in message
    assert not (tmp_path / "packed").exists()
    assert main(["eval", str(folder), "--perplexity", str(text)]) == 2
    message = capsys.readouterr().err
    assert (
        f"Measuring `--perplexity` needs a causal language model, and {name} {why}. Give another model, or leave"
        in message
    )


def test_a_vision_language_model_decodes_text(tmp_path):
    save("Gemma3ForConditionalGeneration", tmp_path)
    model = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path)
    assert decode_speed(model, new_tokens=2, repeats=1).tokens_per_second > 0  # its vocabulary is the text config's


def test_a_tied_model_of_another_class_is_exported(tmp_path):
    folder = save("T5ForConditionalGeneration", tmp_path / "model")
    options = ["--group-size", "16", "--scale-mode", "tied"]
    assert main(["quantize", str(folder), str(tmp_path / "packed"), *options]) == 0
    assert main(["export", str(tmp_path / "packed"), str(tmp_path / "gptq")]) == 0
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["architectures"] == [
        "T5ForConditionalGeneration"
    ]


def test_which_class_a_config_is_for():
    moe = AutoConfig.from_pretrained(tiny.resolve("tiny:moe"))
    assert model_class(moe).__name__ == moe.architectures[0] == "Qwen3MoeForCausalLM"
    assert model_class(LlamaConfig()).__name__ == "LlamaForCausalLM"  # as AutoModelForCausalLM, where nothing is said
    assert model_class(LlamaConfig(architectures=["LLaMAForCausalLM"])).__name__ == "LlamaForCausalLM"
    assert model_class(LlamaConfig(architectures=["LlamaModel"])).__name__ == "LlamaModel"
    model = skeleton(LlamaConfig(**TEXT, architectures=["LlamaForSequenceClassification"]), torch.bfloat16)
    assert model.score.weight.is_meta and model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="LlamaModel generates no text"):
        check_causal(LlamaConfig(architectures=["LlamaModel"]))


def test_a_class_of_ours_is_found():
    from hf_rb import MPIQwen3MoeConfig, MPIQwen3MoeForCausalLM

    assert model_class(MPIQwen3MoeConfig(architectures=["MPIQwen3MoeForCausalLM"])) is MPIQwen3MoeForCausalLM


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(architectures=["LlamaForPoetry"]), "of this llama model says `architectures: \\[LlamaForPoetry\\]`"),
        (LlamaConfig(architectures=["LlamaForPoetry"], auto_map={"AutoModel": "a.B"}), "`trust_remote_code=True`"),
        (transformers.ViTConfig(), "of this vit model has no `architectures`"),
    ],
)  # fmt: skip
def test_a_class_that_nobody_has_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        model_class(config)
