"""MPI routers need the experts' weights: such models are refused before the work, and folded ones are not."""

import pytest
import torch
from helpers.mixtures import MOE, MOE_SIZES
from helpers.round_trips import load, logits
from transformers import AutoConfig, AutoModelForCausalLM

from hf_rb import D2QuantConfig, PTQTPConfig, apply_mpi, fold_mpi
from hf_rb.cli import main


METHODS = {"ptqtp": PTQTPConfig, "d2quant": lambda: D2QuantConfig(backend="rtn")}
SIZES = MOE_SIZES | MOE["qwen3_moe"] | dict(vocab_size=64, norm_topk_prob=True)


def model_of(model_type):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES))


@pytest.fixture(scope="module")
def mpi(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mpi")
    model_of("mpi_qwen3_moe").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_refused_at_once(mpi, tmp_path, capsys, method):
    said = "The routers of MPIQwen3MoeForCausalLM are computed from the experts' weights"
    with pytest.raises(ValueError, match=said):
        load(mpi, METHODS[method]())
    for more in ([], ["--stream"]):
        rtn = ["--backend", "rtn"] if method == "d2quant" else []
        assert main(["quantize", str(mpi), str(tmp_path / "out"), "--method", method, *rtn, *more]) == 2
        printed = capsys.readouterr().err
        assert said in printed and "`fold_mpi(model)`" in printed
        assert not [*tmp_path.iterdir()]


def test_the_remedy(mpi, tmp_path):
    model = fold_mpi(load(mpi))
    expected = logits(model)
    model.save_pretrained(tmp_path / "folded")
    quantized = load(tmp_path / "folded", PTQTPConfig())
    assert (logits(quantized) - expected).norm() < 0.5 * expected.norm()


def test_after_apply_mpi(tmp_path):
    model = apply_mpi(model_of("qwen3_moe"))
    model.save_pretrained(tmp_path / "applied")
    said = r"model.layers.0.mlp.gate.parametrizations.weight.original, a router of `apply_mpi`"
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "applied", PTQTPConfig())
    assert main(["quantize", str(tmp_path / "applied"), str(tmp_path / "out"), "--stream"]) == 2
    fold_mpi(model).save_pretrained(tmp_path / "folded")
    load(tmp_path / "folded", PTQTPConfig())
