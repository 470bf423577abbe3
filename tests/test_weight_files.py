"""Which files of a folder are the model: what `from_pretrained` takes, for every reader of the package."""

import itertools
import json
import shutil

import pytest
import torch
from helpers.random_models import save_qwen3
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import _get_resolved_checkpoint_files

from hf_rb import PTQTPConfig
from hf_rb.cli.check.memory import Architecture
from hf_rb.evaluation import model_size
from hf_rb.hub import plan_upload
from hf_rb.io.safetensors import Checkpoint
from hf_rb.io.weight_files import INDEX, SINGLE, find_weights, weight_bytes, weight_files
from hf_rb.models.upcycle import upcycle
from hf_rb.quantizers import dequantize_checkpoint, quantize, quantize_checkpoint
from hf_rb.recover.stages import fingerprint
from hf_rb.weights import interpolate


KINDS = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "num_hidden_layers": 1}


def of_variant(name, variant):
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def lay(folder, names):
    """A folder of empty weight files; each index names two shards of its own, and shards lie there that nothing names."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model-00001-of-00007.safetensors").touch()
    for name in names:
        text = ""
        if name.endswith("json"):
            shards = [f"{name.removesuffix('.json')}-{n}.{'bin' if 'bin' in name else 'safetensors'}" for n in (2, 1)]
            text = json.dumps({"metadata": {}, "weight_map": dict(zip("ab", shards, strict=True))})
            for shard in shards:
                (folder / shard).touch()
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("subfolder", ["", "inner"])
def test_every_layout_gives_the_files_of_from_pretrained(tmp_path, subfolder):
    places = [of_variant(kind, variant) for variant in (None, "fp16") for kind in KINDS]
    for number, there in enumerate(itertools.product((False, True), repeat=len(places))):
        top = tmp_path / str(number)
        lay(top / subfolder, [place for place, is_there in zip(places, there, strict=True) if is_there])
        for variant in (None, "fp16"):
            ask = dict(variant=variant, gguf_file=None, use_safetensors=None, user_agent=None, is_remote_code=False)
            try:
                expected, _ = _get_resolved_checkpoint_files(top, **ask, download_kwargs={"subfolder": subfolder})
            except OSError:
                with pytest.raises(FileNotFoundError, match="has no model"):
                    find_weights(top, variant, subfolder)
            else:
                assert list(map(str, find_weights(top, variant, subfolder).files)) == expected


@pytest.mark.parametrize("named", [INDEX, "consolidated.safetensors", "pytorch_model.bin", "../x.safetensors"])
def test_the_file_that_the_configuration_names(tmp_path, named):
    folder = lay(tmp_path / "model", [SINGLE, INDEX])
    (folder / "config.json").write_text(json.dumps({"transformers_weights": named}))
    if named in ("pytorch_model.bin", "../x.safetensors"):
        with pytest.raises(ValueError, match=f"names '{named}' as `transformers_weights`: write a safetensors file"):
            find_weights(folder)
        return
    if named != INDEX:
        with pytest.raises(FileNotFoundError, match="has no consolidated.safetensors, which its config.json names"):
            find_weights(folder)
        (folder / named).touch()
    ask = dict(variant=None, gguf_file=None, use_safetensors=None, user_agent=None, is_remote_code=False)
    expected, _ = _get_resolved_checkpoint_files(folder, **ask, transformers_explicit_filename=named)
    assert list(map(str, find_weights(folder).files)) == expected


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        ([SINGLE], "config.json", "is not a model folder: it has no config.json"),
        ([], None, "has no model.safetensors .*how model-00001-of-00007.safetensors and the other shards belong together"),
        ([of_variant(SINGLE, "fp16")], None, "holds the weights of variant='fp16'. Load the model with that"),
        ([of_variant(INDEX, "fp16")], None, "holds the weights of variant='fp16'"),
        ([INDEX], "model.safetensors.index-1.safetensors", r"has no model.safetensors.index-1.safetensors, which .*Copy"),
        (["pytorch_model.bin"], None, "in pytorch_model.bin, a pickle, .*write it with `save_pretrained` to another"),
        (["pytorch_model.bin.index.json"], None, "a pickle"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_the_remedy(tmp_path, names, change, message):
    folder = lay(tmp_path / "model", names)
    if change:
        (folder / change).unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        weight_files(folder)


def test_a_damaged_index_is_named(tmp_path):
    folder = lay(tmp_path / "model", [INDEX])
    (folder / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="index.json is damaged"):
        weight_files(folder)


def test_of_a_tensor_in_two_files_the_last_counts(tmp_path):
    folder = save_qwen3(tmp_path / "model", **SMALL)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="5KB")
    (folder / SINGLE).unlink()
    first, *_, last = find_weights(folder).files
    shutil.copy(last, folder / "model-99999.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["again"] = "model-99999.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert Checkpoint(folder).lost == ["again"]
    with pytest.raises(ValueError, match="the index lists again, which no file holds"):
        interpolate(folder, folder, tmp_path / "out")
    del index["weight_map"]["again"]
    index["weight_map"]["model.norm.weight"] = "model-99999.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    checkpoint = Checkpoint(folder)
    assert checkpoint.files[-1].name == "model-99999.safetensors" and last not in checkpoint.files
    assert sum(map(len, checkpoint.shards)) == len(checkpoint.entries)


def sharded_then_single(folder):
    """Saved in shards, then again in one file, other weights: the old index stays."""
    save_qwen3(folder, seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    return save_qwen3(folder, seed=2)


def single_then_sharded(folder):
    """Saved in one file, then again in shards, other weights: the old file stays, and is what is loaded."""
    other = AutoModelForCausalLM.from_pretrained(save_qwen3(folder, seed=1))
    save_qwen3(folder, seed=2)
    other.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / INDEX).is_file() and (folder / SINGLE).is_file()
    return folder


def with_everything_else(folder):
    """Shards with what lies beside them in published repositories."""
    save_qwen3(folder, seed=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    other = AutoModelForCausalLM.from_pretrained(save_qwen3(folder.parent / "other", seed=1))
    other.save_pretrained(folder, variant="fp16", max_shard_size="60KB")
    shutil.copy(folder.parent / "other" / SINGLE, folder / "consolidated.safetensors")
    shutil.copy(folder.parent / "other" / SINGLE, folder / "model-00001-of-00099.safetensors")
    torch.save(other.state_dict(), folder / "pytorch_model.bin")
    return folder


def tensors(model):
    return {name: tensor for name, tensor in model.state_dict().items()}


def loaded(folder, **options):
    return tensors(AutoModelForCausalLM.from_pretrained(folder, **options))


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("make", [sharded_then_single, single_then_sharded, with_everything_else])
def test_every_reader_reads_what_from_pretrained_loads(tmp_path, make):
    folder, clean = make(tmp_path / "model"), tmp_path / "clean"
    model = AutoModelForCausalLM.from_pretrained(folder)
    reference = tensors(model)
    shutil.copytree(folder, clean)
    for path in (*clean.glob("*.safetensors*"), *clean.glob("*.bin")):
        path.unlink()
    model.save_pretrained(clean, max_shard_size="60KB" if make is with_everything_else else "1GB")
    assert_same(reference, loaded(save_qwen3(tmp_path / "second", seed=2)))

    interpolate(folder, folder, tmp_path / "merged", 0.3)
    assert_same(loaded(tmp_path / "merged"), reference)

    options = PTQTPConfig(group_size=32, max_iter=3)
    reports = [way(folder, tmp_path / way.__name__, options) for way in (quantize, quantize_checkpoint)]
    quantized = [loaded(tmp_path / way.__name__) for way in (quantize, quantize_checkpoint)]
    assert_same(*quantized)
    quantize(clean, tmp_path / "from-clean", options)
    assert_same(quantized[0], loaded(tmp_path / "from-clean"))
    assert {report.source_bytes for report in reports} == {weight_bytes(clean)}

    upcycle(folder, tmp_path / "mixture", 2, 1, progress=False)
    upcycle(clean, tmp_path / "clean-mixture", 2, 1, progress=False)
    assert_same(loaded(tmp_path / "mixture"), loaded(tmp_path / "clean-mixture"))

    assert model_size(folder) == model_size(clean)
    assert weight_bytes(folder) == weight_bytes(clean)
    assert fingerprint(folder) == fingerprint(clean)
    assert Architecture.read(folder) == Architecture.read(clean)

    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()
    for name, path in plan_upload(folder).paths.items():
        shutil.copy(path, uploaded / name)
    assert_same(loaded(uploaded), reference)
    read = find_weights(folder)
    stale = {path.name for path in folder.glob("*.safetensors")} - {path.name for path in read.files}
    if make is with_everything_else:
        assert_same(loaded(uploaded, variant="fp16"), loaded(folder.parent / "other"))
        stale = {"consolidated.safetensors", "model-00001-of-00099.safetensors"}
    assert stale <= set(plan_upload(folder).left_out)


def test_a_quantized_folder_with_an_old_index(tmp_path):
    source = save_qwen3(tmp_path / "source", seed=2)
    options = PTQTPConfig(group_size=32, max_iter=3)
    folder = tmp_path / "packed"
    model = AutoModelForCausalLM.from_pretrained(
        save_qwen3(tmp_path / "other", seed=1), quantization_config=PTQTPConfig(group_size=32, max_iter=3)
    )
    model.save_pretrained(folder, max_shard_size="30KB")
    quantize(source, tmp_path / "whole", options)
    for path in (tmp_path / "whole").iterdir():
        shutil.copy(path, folder)
    assert (folder / INDEX).is_file()
    dequantize_checkpoint(folder, tmp_path / "plain")
    assert_same(
        loaded(tmp_path / "plain"), loaded(tmp_path / "whole", quantization_config=PTQTPConfig(dequantize=True))
    )
    assert model_size(folder) == model_size(tmp_path / "whole")


def test_variant_and_subfolder(tmp_path):
    top, folder = tmp_path / "top", tmp_path / "top" / "inner"
    model = AutoModelForCausalLM.from_pretrained(save_qwen3(folder, seed=1))
    AutoModelForCausalLM.from_pretrained(save_qwen3(tmp_path / "other", seed=2)).save_pretrained(
        folder, variant="other", max_shard_size="60KB"
    )
    del model
    ask, options = {"variant": "other", "subfolder": "inner"}, PTQTPConfig(group_size=32, max_iter=3)
    for way in (quantize, quantize_checkpoint):
        way(top, tmp_path / way.__name__, options, **ask)
        way(tmp_path / "other", tmp_path / f"{way.__name__}-other", options)
        assert_same(loaded(tmp_path / way.__name__), loaded(tmp_path / f"{way.__name__}-other"))
    upcycle(top, tmp_path / "mixture", 2, 1, progress=False, **ask)
    upcycle(tmp_path / "other", tmp_path / "mixture-other", 2, 1, progress=False)
    assert_same(loaded(tmp_path / "mixture"), loaded(tmp_path / "mixture-other"))
    assert model_size(top, **ask).weights == model_size(tmp_path / "other").weights


def test_an_adapter_beside_the_model_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    folder = save_qwen3(tmp_path / "model", seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    assert any("lora" in name for name in loaded(folder))  # what makes leaving it out wrong
    options = PTQTPConfig(group_size=32)
    for act in (
        lambda: interpolate(folder, folder, tmp_path / "out"),
        lambda: quantize(folder, tmp_path / "out", options),
        lambda: quantize_checkpoint(folder, tmp_path / "out", options),
        lambda: upcycle(folder, tmp_path / "out", 2, 1),
    ):
        with pytest.raises(ValueError, match="holds an adapter beside the model .*merge_and_unload"):
            act()
    assert AutoConfig.from_pretrained(folder) and not (tmp_path / "out").exists()


def test_quantizing_names_a_missing_shard_before_it_loads(tmp_path):
    folder = single_then_sharded(tmp_path / "model")
    (folder / SINGLE).unlink()
    lost = find_weights(folder).files[1]
    lost.unlink()
    for way in (quantize, quantize_checkpoint):
        with pytest.raises(FileNotFoundError, match=f"has no {lost.name}, which model.safetensors.index.json names"):
            way(folder, tmp_path / "out", PTQTPConfig(group_size=32))
    assert not (tmp_path / "out").exists()


def test_weights_that_nobody_loads_are_named_once(tmp_path, caplog):
    folder = lay(tmp_path / "model", [SINGLE, INDEX])
    for _ in range(2):
        assert find_weights(folder).files == [folder / SINGLE]
    (record,) = caplog.records
    assert "one in shards (model.safetensors.index.json). The one file is taken" in record.message
    caplog.clear()
    find_weights(lay(tmp_path / "other", [INDEX]))
    assert not caplog.records
