import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_rb.evaluation import decode_speed, format_table, model_size


def logical(model):
    """Counted by hand: embedding (tied), two layers of attention, MLP and norms, final norm."""
    h, i, v, d = 64, 96, model.config.vocab_size, 32
    attention = h * 2 * d + 2 * h * d + 2 * d * h + 2 * d
    return v * h + 2 * (attention + 3 * h * i + 2 * h) + h


def test_plain_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    size = model_size(tmp_path)
    assert size.weights == logical(model)
    assert size.file_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert size.bits_per_weight == 8 * size.file_bytes / size.weights
    assert 32 < size.bits_per_weight < 32.5  # float32 and the header
    assert (size.quantized_weights, size.quantized_bits_per_weight) == (0, None)


def test_shards_count_whole(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    size = model_size(tmp_path)
    assert size.file_bytes == sum(file.stat().st_size for file in files)
    assert size.weights == logical(model)


def test_packed_layers(model, tmp_path):
    """Packs one layer as dense ternary planes: 64 inputs in 2 planes of 13 bytes a row, and two 16-bit scales a row."""
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj"
    tensors[f"{name}.weight"] = torch.zeros(96, 26, dtype=torch.uint8)
    tensors[f"{name}.weight_scale"] = torch.zeros(96, 1, 2, dtype=torch.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "ptqtp", "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = model_size(tmp_path)
    assert size.weights == logical(model)
    assert size.quantized_weights == 96 * 64
    assert size.quantized_bits_per_weight == 8 * (96 * 26 + 96 * 2 * 2) / (96 * 64)  # 3.75
    assert size.file_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_ptqtp_folder(model, tmp_path):
    from transformers import AutoModelForCausalLM

    from hf_rb import PTQTPConfig

    model.save_pretrained(tmp_path / "plain")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=PTQTPConfig())
    quantized.save_pretrained(tmp_path / "ptqtp")
    size = model_size(tmp_path / "ptqtp")
    assert size.weights == logical(model)
    # (outputs, inputs) of one layer: q, k, v, o, gate, up, down. Five trits a byte in each of two planes, one short group a row.
    layers = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
    trit_bytes = {64: 13, 96: 20}
    stored = sum(2 * out * (2 * trit_bytes[inputs] + 2 * 2) for out, inputs in layers)
    assert size.quantized_weights == sum(2 * out * inputs for out, inputs in layers)
    assert size.quantized_bits_per_weight == 8 * stored / size.quantized_weights
    assert size.file_bytes == (tmp_path / "ptqtp" / "model.safetensors").stat().st_size


def test_refusals(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        model_size(tmp_path)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        model_size(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        model_size(tmp_path)


def test_decode_speed(model):
    speed = decode_speed(model, new_tokens=4, prompt_tokens=3, batch_size=2, repeats=3)
    assert speed.tokens_per_second > 0 and speed.spread >= 0
    assert (speed.new_tokens, speed.prompt_tokens, speed.batch_size, speed.repeats) == (4, 3, 2, 3)


def test_table():
    assert format_table(["model", "bits"], [["student", "16"], ["q", "3.5"]]) == (
        "model    bits\n-------------\nstudent    16\nq         3.5"
    )
