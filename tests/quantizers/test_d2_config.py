"""D²Quant's configuration."""

import json

import pytest

from hf_rb import D2QuantConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"needs calibration text: write `dataset='texts.jsonl'`.* or `backend='rtn'`, which needs none"),
        ({"backend": "gptq"}, r"D²Quant with `backend='gptq'` needs calibration text"),
        ({"backend": "rtm"}, r"did you mean 'rtn'"),
        ({"dataset": []}, r"`dataset` as a list must hold texts"),
        ({"dataset": ["a", 1]}, r"`dataset` as a list must hold texts"),
        ({"dataset": 7}, r"`dataset` must be a name, a file or a list of texts; got int"),
        ({"dataset": "x", "bits": 5}, r"`bits` cannot be 5; it must be one of 2, 3, 4"),
        ({"dataset": "x", "rotate": True}, r"`rotate` cannot be True; it must be one of 'block_hadamard', False"),
        (
            {"dataset": "x", "rotation_block": 96},
            r"`rotation_block` must be 'auto' or a power of two such as 64; got 96",
        ),
        (
            {"dataset": "x", "rotate": False, "rotation_block": 64},
            r"`rotation_block=64` cannot act: it needs `rotate=",
        ),
        ({"dataset": "x", "dac": False, "dac_clip": 1.0}, r"`dac_clip=1.0` cannot act: it needs `dac=True`"),
        ({"dataset": "x", "dsq": False, "dsq_iters": 3}, r"`dsq_iters=3` cannot act"),
        ({"dataset": "x", "dsq": False, "dsq_weighting": "none"}, r"`dsq_weighting='none'` cannot act"),
        (
            {"dataset": "x", "dsq_weighting": "u"},
            r"`dsq_weighting` cannot be 'u'; it must be one of 'none', 'hessian'",
        ),
        ({"dataset": "x", "backend": "gptq", "asym_alpha": 0.5}, r"cannot act: it needs `backend='gptaq'`"),
        ({"backend": "rtn", "percdamp": 0.1}, r"it needs `backend='gptaq'` or `backend='gptq'`"),
        ({"backend": "rtn", "dac_clip": 5.0}, r"`dac_clip=5.0` cannot act: it needs `backend='gptaq'` or"),
        ({"backend": "rtn", "rotation_seed": 1}, r"`rotation_seed=1` cannot act: it needs `backend='gptaq'` or"),
        ({"dataset": ""}, r"needs calibration text: write `dataset='texts.jsonl'`"),
        ({"dataset": "x", "act_order": "asc"}, r"`act_order` cannot be 'asc'; it must be one of 'gar', None"),
        ({"dataset": "x", "bits_per_layer": {"down_proj": 5}}, r"`bits_per_layer\['down_proj'\]` must be 2, 3 or 4"),
        ({"dataset": "x", "modules_to_not_convert": "mlp"}, r"must be a list; got 'mlp', so write \['mlp'\]"),
        ({"dataset": "x", "seqlen": 1}, r"`seqlen` must be in \[2, inf\)"),
        ({"dataset": "x", "dac": 1}, r"`dac` must be True or False"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        D2QuantConfig(**options)


def test_round_to_nearest_switches_off_what_needs_the_model(caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    config = D2QuantConfig(backend="rtn")
    assert not config.calibrated and not config.dac and not config.rotate and config.dsq
    assert "`dac` and `rotate` switched off" in caplog.text
    caplog.clear()
    assert D2QuantConfig(backend="rtn", dac=False, rotate=False, dataset="texts.jsonl").dataset is None
    assert "`dataset` switched off" in caplog.text
    caplog.clear()
    D2QuantConfig.from_dict(config.to_dict())
    assert not caplog.text  # a checkpoint says it no more
    logging.disable_propagation()


def test_a_list_of_texts_is_stored_as_a_fingerprint(tmp_path):
    secret = "what nobody may read"
    config = D2QuantConfig(dataset=[secret, "more"], tokenizer="some/model", resume_dir=str(tmp_path))
    stored = json.dumps(config.to_dict())
    assert secret not in stored and secret not in repr(config) and str(tmp_path) not in stored
    assert config.to_dict()["dataset"].startswith("2 texts, sha256 ")
    assert config.dataset == [secret, "more"]
    others = [secret + "more"], [secret, "morE"], ["more", secret]
    assert (
        len({config.to_dict()["dataset"], *(D2QuantConfig(dataset=one).to_dict()["dataset"] for one in others)}) == 4
    )
    assert D2QuantConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_a_file_is_stored_by_its_name(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("text")
    assert D2QuantConfig(dataset=str(file)).to_dict()["dataset"] == "texts.txt"
    assert D2QuantConfig(dataset="allenai/c4:en").to_dict()["dataset"] == "allenai/c4:en"
    text = "a text where a name is expected " * 100
    assert D2QuantConfig(dataset=text).to_dict()["dataset"] == text  # refused when it is read


def test_summary():
    second = "with a second scale for the columns of down projections, absorbed where that is exact"
    assert f"2 bits, {second}, and a correction of the mean shift" in D2QuantConfig(dataset="x").summary
    assert D2QuantConfig(backend="rtn").summary.endswith(f"2 bits, {second}.")
    assert D2QuantConfig(backend="rtn", bits=4).summary == "Rounding without calibration to 4 bits."


def test_loading_needs_no_data():
    config = D2QuantConfig(dequantize=True)
    assert config.get_loading_attributes() == {"dequantize": True}
    assert "dequantize" not in config.to_dict()
