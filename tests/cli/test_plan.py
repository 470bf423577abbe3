import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hf_rb import tiny
from hf_rb.cli import schemas
from hf_rb.cli.check import check, memory, plan, read_recipe
from hf_rb.cli.check.memory import Architecture, Run, estimate, peak
from hf_rb.io import data_files as data
from hf_rb.io.resources import find_recipe


RUN = Run(
    device="cpu",
    tokens=1024,
    length=256,
    weight_bytes=4,
    compute_bytes=4,
    checkpointing=False,
    accumulates=False,
    optimizer="adamw_torch_fused",
    targets=None,
    rank=16,
    dropout=0.0,
    eager=False,
    head="trl",
)


def changed(run=RUN, **changes) -> Run:
    return Run(**(vars(run) | changes))


@pytest.fixture(scope="module")
def student() -> Architecture:
    return Architecture.read(tiny.path("student"))


def planned(name, **changes):
    path = find_recipe(name)
    report = check(path, read_recipe(path) | changes)
    assert not report.errors
    return report.plan


@pytest.mark.parametrize("name", ["edas/tiny-cpu", "exopd/tiny-cpu"])
def test_completions_without_a_limit(name):
    plan = planned(name, max_completion_length=None)
    assert plan.tokens is None and plan.peak > 0


@pytest.mark.parametrize("name", tiny.MODELS)
def test_weights_counted_in_files_follow_from_the_widths(name):
    model = Architecture.read(tiny.path(name))
    widths = ("hidden", "layers", "attention", "key_value", "mlp", "vocabulary", "experts", "active", "gated", "tied")
    from_widths = memory._weights(**{width: getattr(model, width) for width in widths})
    assert from_widths == pytest.approx(model.weights, rel=0.01)
    assert model.file_bytes == model.weights * memory.WEIGHT_BYTES[model.dtype]


def test_every_part_has_a_cause(student):
    base = estimate(student, RUN)
    assert base["weights"] == 4 * student.weights and base["optimizer"] == 8 * student.weights
    assert base["teacher"] == base["cache"] == 0

    lora = estimate(student, changed(targets=["q_proj", "v_proj"]))
    assert lora["gradients"] < base["gradients"] / 10 and lora["optimizer"] == 2 * lora["gradients"]
    assert lora["activations"] < base["activations"]
    for change, part in (
        ({"checkpointing": True}, "activations"),
        ({"compute_bytes": 2}, "activations"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"quantized_bits": 4.0}, "weights"),
        ({"tokens": 512}, "activations"),
    ):
        assert estimate(student, changed(**change))[part] < base[part]
    for change, part in (({"eager": True}, "activations"), ({"generated": 4}, "cache"), ({"tokens": 2048}, "logits")):
        assert estimate(student, changed(**change))[part] > base[part]
    many = changed(tokens=1 << 16)
    assert estimate(student, changed(many, head="dense"))["logits"] > estimate(student, many)["logits"]
    teacher = Architecture.read(tiny.path("teacher"))
    assert estimate(student, RUN, [(teacher, 2)])["teacher"] > 2 * teacher.weights


def test_the_peak_is_one_moment():
    parts = dict.fromkeys(("weights", "optimizer", "teacher", "runtime"), 1)
    parts |= {"gradients": 10, "activations": 6, "logits": 2, "cache": 3}
    assert peak(parts, accumulates=False) == 4 + 10
    assert peak(parts, accumulates=True) == 4 + 18
    assert peak(parts | {"cache": 20}, accumulates=False) == 4 + 20
    assert peak(parts | {"loading": 30}, accumulates=False) == 3 + 30  # before there is an optimizer
    assert peak(parts | {"comparison": 5}, accumulates=False) == 4 + 5 + 10


def saved(folder, tensors, dtype="BF16", **config):
    """A folder that is read for its headers alone."""
    folder.mkdir()
    entries = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()}
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    base = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "vocab_size": 10, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(base | {"intermediate_size": 16} | config))
    return Architecture.read(folder)


def test_what_loading_takes(tmp_path):
    dense = saved(tmp_path / "dense", {"model.layers.0.mlp.up_proj.weight": [16, 100]})
    names = [f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in range(4)]
    mixture = saved(tmp_path / "moe", dict.fromkeys(names, [16, 100]) | {"gate": [4, 100]}, num_local_experts=4)
    assert (dense.separate, mixture.separate) == (0, 4 * 1600)

    def of(model, weight_bytes, device="cpu", frozen=()):
        run = changed(weight_bytes=weight_bytes, compute_bytes=4, device=device)
        parts = estimate(model, run, list(frozen))
        return parts["loading"], parts["runtime"] - estimate(dense, changed(run, weight_bytes=2))["runtime"]

    assert of(dense, 2) == (0, 0)  # the mapped file is the model
    assert of(dense, 4) == (dense.file_bytes, 0)  # and is there beside it
    assert of(mixture, 2) == (0, 2 * 6400)  # the mapped file stays, with the experts that were joined out of it
    unusable = int(memory.UNUSABLE_EXPERTS * 4 * 6400)
    assert of(mixture, 4) == (mixture.file_bytes + 4 * 6400 - unusable, unusable)
    assert of(mixture, 4, device="cuda")[0] == 0
    # A teacher is loaded after the student, whose file is gone by then.
    assert of(dense, 4, frozen=[(dense, 4)]) == (dense.file_bytes, 0)
    assert of(dense, 4, frozen=[(mixture, 4)])[0] == mixture.file_bytes + 4 * 6400 - unusable


def test_an_audit_is_planned(monkeypatch):
    plan = planned("akl/tiny-cpu")
    audit = plan.audit()
    assert audit.memory["optimizer"] == 0 and audit.memory["logits"] > plan.memory["logits"]
    assert audit.memory["comparison"] == 2 * plan.memory["gradients"] + plan.memory["weights"]
    assert audit.peak == peak(audit.memory, accumulates=False) and "comparison" in next(audit.memory_lines())
    assert "estimated" not in plan.as_dict() and json.dumps(plan.as_dict())
    monkeypatch.setattr(plan, "estimated", None)
    assert plan.audit() is plan


def test_gpt2s_names_and_a_config_of_no_decoder(tmp_path):
    config = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_inner": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = Architecture.read(tmp_path)
    assert model.tied and not model.gated and model.weights == pytest.approx(124e6, rel=0.01)
    for text in ("{}", "[]", "{", '{"hidden_size": "x", "num_attention_heads": 1}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="does not describe a decoder"):
            Architecture.read(tmp_path)


def test_a_config_that_is_no_decoder_is_a_warning(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    path = find_recipe("profit/tiny-cpu")
    report = check(path, read_recipe(path) | {"model_name_or_path": str(tmp_path)})
    assert report.plan is None and not report.errors
    assert "memory cannot be estimated" in report.warnings[0]


def test_a_packed_checkpoint_weighs_what_its_files_weigh(tmp_path):
    header = json.dumps({"layer.weight": {"dtype": "U8", "shape": [7, 9], "data_offsets": [0, 63]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(63))
    config = json.loads((tiny.path("student") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "ptqtp"}}))
    model = Architecture.read(tmp_path)
    assert model.packed and estimate(model, RUN)["weights"] == 63


@pytest.mark.parametrize(
    ("name", "changes", "steps", "tokens"),
    [
        ("profit/tiny-cpu", {}, 500, 500 * 16 * 256),
        ("profit/tiny-cpu", {"max_steps": -1, "num_train_epochs": 1.5}, 938, 938 * 16 * 256),
        ("profit/tiny-cpu", {"max_steps": -1, "packing": True}, None, None),
        ("profit/tiny-cpu", {"max_length": None}, 500, None),
        ("edas/tiny-cpu", {"max_steps": -1, "num_train_epochs": 1}, 1250, 1250 * 64 * 96),
        ("exopd/tiny-cpu", {}, 60, 60 * 64 * 128),
        ("profit/qwen3-0.6b-base", {}, None, None),
    ],
)
def test_steps_and_tokens(name, changes, steps, tokens):
    found = planned(name, **changes)
    assert (found.steps, found.tokens) == (steps, tokens)


def test_without_a_gpu_the_cpu_is_announced(monkeypatch):
    monkeypatch.setattr(plan, "_device", lambda: "cpu")
    found = planned("profit/qwen3-0.6b-base")
    assert (found.device, found.precision, found.cpu_arguments) == ("cpu", "bfloat16 autocast", ["--use_cpu", "true"])
    assert "no GPU was found: the run gets `--use_cpu true`" in next(found.lines())
    assert found.missing == ["Qwen/Qwen3-0.6B-Base"] and "is not on this machine" in list(found.lines())[-1]
    found = planned("profit/qwen3-0.6b-base", bf16=None)
    assert (found.precision, found.cpu_arguments) == ("float32", ["--use_cpu", "true", "--bf16", "false"])
    monkeypatch.setattr(plan, "_device", lambda: "cuda")
    found = planned("profit/qwen3-0.6b-base", bf16=None)
    assert (found.device, found.precision, found.cpu_arguments) == ("cuda", "bfloat16 autocast", [])


def test_a_model_in_the_hubs_cache_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "models--me--model" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (tmp_path / "models--me--model" / "refs").mkdir()
    (tmp_path / "models--me--model" / "refs" / "main").write_text("abc\n")
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert plan.local_folder("me/model") == folder and plan.local_folder("me/other") is None


def test_more_memory_than_there_is_comes_with_a_remedy(monkeypatch):
    monkeypatch.setattr(plan, "_machine_memory", lambda: 1 << 20)
    (problem,) = planned("profit/tiny-cpu").problems()
    assert "this machine has 1 MB" in problem and "lower `per_device_train_batch_size`" in problem


def test_without_sysconf_as_on_windows_memory_is_no_problem(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    path = find_recipe("profit/tiny-cpu")
    findings = check(path, read_recipe(path))
    assert findings.errors == findings.warnings == [] and findings.plan.peak
    findings.plan.peak = 1 << 60
    assert list(findings.plan.problems()) == []


def test_rows_of_files(tmp_path, monkeypatch):
    def args(*files, **entry):
        names = []
        for index, (suffix, text) in enumerate(files):
            names.append(str(tmp_path / f"{index}{suffix}"))
            (tmp_path / f"{index}{suffix}").write_text(text)
        return SimpleNamespace(
            dataset_name=None,
            dataset_text_field="text",
            datasets=[{"data_dir": None, "columns": None, "data_files": names} | entry],
        )

    assert data.rows(args((".jsonl", "{}\n{}\n"), (".jsonl", "{}"))) == 3
    assert data.rows(args((".csv", "a,b\n1,2\n"))) == 1
    assert data.rows(args((".parquet", "x"))) is None
    assert data.rows(args(data_files="absent.jsonl")) is None
    monkeypatch.setattr(data, "COUNTED_BYTES", 30)
    assert data.rows(args((".jsonl", '{"a": 1}\n' * 1000))) == pytest.approx(1000, rel=0.5)

    wrong = args((".jsonl", '{"question": 1}\n'))
    assert "The dataset has the columns question. SFT needs `messages`" in next(data.column_rules(wrong, "sft"))
    for good in (args((".jsonl", '{"text": 1}')), args((".jsonl", "no JSON")), args((".csv", "prompt,completion\n"))):
        assert not list(data.column_rules(good, "sft"))


def test_every_key_that_a_plan_reads_is_in_every_schema():
    for verb in ("sft", "gkd", "distillation", "grpo"):
        values = {key: entry.get("default") for key, entry in schemas.load(verb).items()}
        names = {"model_name_or_path": "tiny:student", "teacher_model_name_or_path": "tiny:teacher"}
        assert plan.make_plan(SimpleNamespace(**(values | names)), verb).peak


def test_a_recovery_is_planned(monkeypatch):
    def notes(**changes):
        path = find_recipe("recover/tiny-cpu")
        return check(path, read_recipe(path) | changes).notes

    monkeypatch.setattr(plan, "_device", lambda: "cpu")
    assert notes(examples=[332, 40], objectives=["forward_kl", "sft"]) == [
        "device: cpu (no GPU was found); adapters are trained in float32",
        "plan: forward_kl and sft on 332 examples, 42 steps of 16 sequences each on both bases, quantized and 3 bits",
        "plan: forward_kl and sft on 40 examples, 6 steps of 16 sequences each on both bases, quantized and 3 bits",
    ]
    monkeypatch.setattr(plan, "_device", lambda: "cuda")
    assert notes(training={"max_steps": 7}, baseline=False) == [
        "device: cuda; adapters are trained in bfloat16 autocast",
        "plan: forward_kl on 332 examples, 7 steps of 8 sequences each",
    ]


def test_check_needs_nothing_that_windows_lacks():
    program = """
import os, signal, sys
for name in ("chown", "fork", "getgid", "getpgid", "getuid", "killpg", "register_at_fork", "setsid", "sysconf", "uname"):
    delattr(os, name)
sys.modules |= dict.fromkeys(("fcntl", "grp", "pwd", "resource", "termios"))
del signal.SIGALRM, signal.SIGKILL, signal.alarm
from hf_rb.cli import main
sys.exit(main(["check", "profit/tiny-cpu"]))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "") and "a good recipe" in result.stdout
