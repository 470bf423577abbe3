"""Layers with a weight that other code reads stay as they are, in every way of quantizing, and the result says so."""

import json
import random

import numpy as np
import pytest
import torch
from helpers import odd_models
from helpers.odd_models import READERS, Odd, OddConfig
from helpers.round_trips import INPUT, load, logits
from transformers import AutoModel, AutoModelForCausalLM, MambaConfig, MambaForCausalLM
from transformers.utils import logging

from hf_rb import D2QuantConfig, PTQTPConfig
from hf_rb.cli import main
from hf_rb.quantizers import dequantize_checkpoint, quantize, quantize_checkpoint
from hf_rb.quantizers.loading import readers
from hf_rb.quantizers.loading.readers import find_readers
from hf_rb.quantizers.loading.reads_in_forward import record
from hf_rb.quantizers.packed.linear import PackedLinear


METHODS = {"ptqtp": PTQTPConfig, "d2quant": lambda **options: D2QuantConfig(backend="rtn", **options)}
LINEAR = ["a", "b", "c", "pair.0", "pair.1", "free"]
TOKENS = torch.arange(12)[None]
CLOSE = 1e-5  # float32 sums of some 64 products in another order, 6e-8 each


@pytest.fixture
def odd(tmp_path):
    """Saves a model of one of the odd classes."""

    def make(cls):
        torch.manual_seed(0)
        cls(OddConfig()).save_pretrained(tmp_path / "odd")
        return tmp_path / "odd"

    return make


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mamba")
    config = MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=96, state_size=8, initializer_range=0.2)
    MambaForCausalLM(config).save_pretrained(folder)
    return folder


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


def packed(model):
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("cls", READERS, ids=lambda cls: cls.__name__)
def test_find_readers_of_odd_models(cls):
    with torch.device("meta"):
        model = cls(OddConfig())
    assert [*find_readers(model, LINEAR)] == READERS[cls]
    if READERS[cls]:
        assert {where.rpartition(".")[0] for where in find_readers(model, LINEAR).values()} == {cls.__name__}


def test_either_means_alone_finds_what_it_can():
    with torch.device("meta"):
        hidden, elsewhere = odd_models.Hidden(OddConfig()), odd_models.OnlyOnOneDevice(OddConfig())
    assert not find_readers(hidden, LINEAR, recorded=False)
    assert record(elsewhere, LINEAR) == ({}, None)


def test_looking_leaves_no_trace():
    with torch.device("meta"):
        model = odd_models.Seeding(OddConfig()).train()
    state, classes = torch.get_rng_state(), [type(module) for module in model.modules()]
    others = random.getstate(), np.random.get_state()[1].tolist()
    find_readers(model, LINEAR)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert (random.getstate(), np.random.get_state()[1].tolist()) == others
    assert [type(module) for module in model.modules()] == classes and not hasattr(model.config, "_is_quantized")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cls", READERS, ids=lambda cls: cls.__name__)
def test_the_packed_model_is_its_dequantized_one(odd, tmp_path, cls, method):
    config = METHODS[method]()
    model = cls.from_pretrained(odd(cls), quantization_config=config, dtype=torch.float32)
    assert sorted(packed(model)) == sorted(set(LINEAR) - set(READERS[cls]))
    report = model.hf_quantizer.report
    assert [*report.readers] == READERS[cls] and set(READERS[cls]) <= set(report.skipped)
    assert config.modules_to_not_convert is None  # it may be for other models too
    with torch.no_grad():
        (expected,) = model(TOKENS)
    model.save_pretrained(tmp_path / "packed")
    loaded = cls.from_pretrained(tmp_path / "packed")
    plain = cls.from_pretrained(tmp_path / "packed", quantization_config=METHODS[method](dequantize=True))
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS)[0], expected)
        assert relative(expected, plain(TOKENS)[0]) < CLOSE
        assert relative(expected, model.dequantize()(TOKENS)[0]) < CLOSE


def source_of(cls):
    return f"""
class Shell(Odd):
    def mix(self, hidden):
        {cls}
        return hidden @ self.a.weight
"""


def test_a_class_without_a_source(tmp_path):
    # As from a notebook: there is nothing to read, and the pass decides.
    scope = {"Odd": Odd, "__name__": "nowhere"}
    exec(source_of("pass"), scope)
    scope["Shell"](OddConfig()).save_pretrained(tmp_path)
    model = scope["Shell"].from_pretrained(tmp_path, quantization_config=PTQTPConfig())
    assert [*model.hf_quantizer.report.readers] == ["a"]

    exec(source_of("hidden.sum().item()"), scope)
    with pytest.raises(ValueError, match="source of Shell cannot be read, and Shell does not run on the meta device"):
        scope["Shell"].from_pretrained(tmp_path, quantization_config=PTQTPConfig())
    config = PTQTPConfig(modules_to_not_convert=["a", "b", "c", "pair", "free"])
    with pytest.raises(
        ValueError, match="nothing to quantize in Shell"
    ):  # what the message asks for: nothing is left to be read
        scope["Shell"].from_pretrained(tmp_path, quantization_config=config)


# Mamba multiplies with `dt_proj.weight`, and hands the weights of two more layers to a kernel.


@pytest.mark.parametrize("method", METHODS)
def test_mamba_in_memory_and_streamed(mamba, tmp_path, method):
    options = {} if method == "ptqtp" else {"backend": "rtn"}
    config = {"quant_method": method} | options
    memory, stream = (
        quantize(mamba, tmp_path / "memory", config),
        quantize_checkpoint(mamba, tmp_path / "stream", config),
    )
    names = ["dt_proj", "out_proj", "x_proj"]
    assert sorted({name.rpartition(".")[2] for name in memory.readers}) == names
    assert set(memory.readers.values()) == {"MambaMixer.forward"}
    assert stream.readers == memory.readers and stream.skipped == memory.skipped
    ours, streamed = (load(tmp_path / name) for name in ("memory", "stream"))
    assert torch.equal(logits(ours), logits(streamed))
    for folder in ("memory", "stream"):
        stored = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        assert sorted(stored["modules_to_not_convert"]) == names and stored["format_version"] == 1
    assert packed(ours) == [f"backbone.layers.{layer}.mixer.in_proj" for layer in (0, 1)]
    body = AutoModel.from_pretrained(tmp_path / "memory")  # its names have no prefix
    assert packed(body) == [f"layers.{layer}.mixer.in_proj" for layer in (0, 1)]
    assert relative(logits(ours), logits(ours.dequantize())) < CLOSE


def test_one_line_of_the_output(mamba, tmp_path, capsys):
    main(["quantize", str(mamba), str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "because the model reads them  2 x_proj, 2 dt_proj, 2 out_proj (MambaMixer.forward)" in printed
    assert json.loads((tmp_path / "out" / "report.json").read_text())["readers"]


def test_a_layer_whose_weights_are_read_is_left_with_a_warning(mamba):
    logger = logging.get_logger("hf_rb.quantizers.loading.readers")
    messages, warn = [], logger.warning
    logger.warning = messages.append
    try:
        load(mamba, PTQTPConfig())
    finally:
        logger.warning = warn
    assert messages == [
        "PTQTP leaves 6 linear layers of MambaForCausalLM (dt_proj, out_proj, x_proj) as they are, because MambaMixer.forward reads "
        "their weights."
    ]


def test_settings_for_such_layers_are_refused(mamba):
    with pytest.raises(ValueError, match="'dt_proj', which matches nothing of MambaForCausalLM that is quantized"):
        load(mamba, PTQTPConfig(planes_per_layer={"dt_proj": 3}))


@pytest.mark.parametrize("method", METHODS)
def test_an_older_checkpoint_is_unpacked(mamba, tmp_path, monkeypatch, method):
    # Versions before packed whatever there was.
    with monkeypatch.context() as patch:
        patch.setattr(readers, "find_readers", lambda *args, **kwargs: {})
        model = load(mamba, METHODS[method]())
        assert len(packed(model)) == 8
        model.save_pretrained(tmp_path / "old")
    loaded = load(tmp_path / "old")
    assert len(packed(loaded)) == 2
    plain = load(tmp_path / "old", METHODS[method](dequantize=True))
    assert relative(logits(loaded), logits(plain)) < CLOSE
    for folder in ("old", "new"):
        loaded.save_pretrained(tmp_path / "new")
        dequantize_checkpoint(tmp_path / folder, tmp_path / f"plain-{folder}", progress=False)
        assert torch.equal(logits(load(tmp_path / f"plain-{folder}")), logits(plain))
    again = load(tmp_path / "new")
    assert torch.equal(logits(again), logits(loaded)) and len(packed(again)) == 2


def test_types_of_what_is_not_packed(tmp_path):
    # In float16 T5 keeps `wo` in float32, also where the packed layers are read as ordinary ones.
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(d_model=64, d_ff=64, d_kv=16, num_layers=1, num_heads=4, vocab_size=96)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    options = dict(dtype=torch.float16)
    T5ForConditionalGeneration.from_pretrained(
        tmp_path / "t5", quantization_config=PTQTPConfig(), **options
    ).save_pretrained(tmp_path / "packed")
    for extra in ({}, {"quantization_config": PTQTPConfig(dequantize=True)}):
        model = T5ForConditionalGeneration.from_pretrained(tmp_path / "packed", **extra, **options)
        assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
        assert model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.dtype == torch.float16


class Tokens:
    bos_token_id = eos_token_id = None

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(letter) % 96 for letter in text] for text in texts]}


def test_calibration_leaves_layers_whose_weights_are_read(tmp_path, monkeypatch):
    # Bloom reads `dense.weight` with `slow_but_exact`.
    from transformers import BloomConfig, BloomForCausalLM

    monkeypatch.setattr("hf_rb.quantizers.d2quant.calibrate.pipeline.load_tokenizer", lambda config, model: Tokens())
    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=96)).save_pretrained(
        tmp_path / "bloom"
    )
    config = D2QuantConfig(backend="gptq", dataset=["the quick brown fox"] * 8, rotate=False, num_samples=4, seqlen=16)
    model = load(tmp_path / "bloom", config)
    assert sorted({name.rpartition(".")[2] for name in packed(model)}) == ["dense_h_to_4h", "query_key_value"]
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed")), logits(model))
    slow = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for module in slow.modules():
        if hasattr(module, "slow_but_exact"):
            module.slow_but_exact, module.pretraining_tp = True, 2
    with torch.no_grad():
        assert relative(slow(INPUT).logits, logits(model)) < CLOSE
