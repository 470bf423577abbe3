"""What holds for every merge that is registered. A new one needs a line in `ROWS`."""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers.plugins import install
from helpers.raw_models import noise, read, write

from hf_rb.cli import main
from hf_rb.methods import MergeMethod, flag
from hf_rb.weights import engine, graft, interpolate, merge_models, operation, refine
from hf_rb.weights.interpolation import Interpolation
from hf_rb.weights.options import Options, merges, records
from hf_rb.weights.shadow_ft import Graft
from hf_rb.weights.timber import Timber


def arc(start, end, lam):
    """mergekit's `slerp`: the weights of the unit vectors are given to the vectors themselves."""
    unit = [one.double().flatten() / one.double().norm() for one in (start, end)]
    angle = torch.arccos(unit[0] @ unit[1])
    return (torch.sin((1 - lam) * angle) * start + torch.sin(lam * angle) * end) / torch.sin(angle)


def trimmed_mean(base, tuned, density, lam):
    """mergekit's `ties` with the weight 1 for every model, on whole tensors."""
    deltas = []
    for one in tuned:
        delta = (one - base).flatten()
        largest = torch.argsort(delta.abs(), descending=True, stable=True)[: int(density * len(delta))]
        deltas.append(torch.zeros_like(delta).index_copy(0, largest, delta[largest]).view(base.shape))
    stacked = torch.stack(deltas)
    sign = (stacked.sum(0) >= 0) * 2 - 1
    mask = stacked.sign() == sign
    count = mask.sum(0)
    count[count == 0] = 1
    return base + lam * (stacked * mask).sum(0) / count


def cut(base, model, lam):
    u, values, v = torch.linalg.svd(model.double() - base.double(), full_matrices=False)
    shares = values / values.sum()
    k = int(torch.exp(-(shares * shares.log()).sum()).ceil())
    values[k:] *= lam
    return base.double() + u @ torch.diag(values) @ v


class Row(NamedTuple):
    """Options of a call, what one tensor becomes, from the tensors by role, and how many in float32 it may hold."""

    options: dict[str, Any]
    dense: Callable[..., torch.Tensor]
    copies: int = 1


ROWS = {
    "linear": Row({"lam": 0.3}, lambda start, end: 0.7 * start + 0.3 * end),
    "graft": Row({}, lambda base, tuned, onto: onto + tuned - base),
    "slerp": Row({"lam": 0.3}, lambda start, end: arc(start, end, 0.3)),
    "ties": Row({"lam": 0.8, "density": 0.3}, lambda base, tuned: trimmed_mean(base, tuned, 0.3, 0.8)),
    "timber": Row({"lam": 0.2}, lambda base, model: cut(base, model, 0.2), copies=14),
}
every_merge = pytest.mark.parametrize("method", ROWS)


def test_every_merge_has_a_row():
    assert ROWS.keys() == merges().keys()


def tensors(seed, dtype=torch.float32):
    layers = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(4)]
    return {name: noise(24, 16, seed=seed + i, dtype=dtype) for i, name in enumerate([*layers, "model.norm.weight"])}


@pytest.fixture
def models(tmp_path):
    """Writes the models that a merge takes, of several the number three."""

    def write_models(method, dtype=torch.float32):
        found = {}
        for role in (record := records()[method]).models:
            count = 3 if role in record.several else 1
            numbers = [100 * len(found) + 10 * number for number in range(count)]
            folders = [
                write(tmp_path / f"{role}{seed}", tensors(seed, dtype), shards=1 + seed % 3) for seed in numbers
            ]
            found[role] = folders if role in record.several else folders[0]
        return found

    return write_models


def loaded(models, name):
    return {
        role: [read(one)[name] for one in given] if isinstance(given, list) else read(given)[name]
        for role, given in models.items()
    }


def command_line(models):
    pairs = [(role, given if isinstance(given, list) else [given]) for role, given in models.items()]
    return [word for role, given in pairs for one in given for word in (f"--{role}", str(one))]


@every_merge
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_dense_computation(method, dtype, models, tmp_path):
    given, row = models(method, dtype), ROWS[method]
    # bfloat16's differences are often equal in magnitude, and its result is rounded: half a step of 2^-8.
    exact = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    report = merge_models(method, given, tmp_path / "out", **row.options)
    merged, changed = read(tmp_path / "out"), {one.name for one in report.tensors if one.kept is None}
    assert len(changed) >= 4
    for name, tensor in merged.items():
        whole = loaded(given, name)
        before = whole[records()[method].receiver]
        if name not in changed:
            assert torch.equal(tensor, before)
            continue
        whole = {k: [one.float() for one in v] if isinstance(v, list) else v.float() for k, v in whole.items()}
        assert tensor.dtype == dtype and not torch.equal(tensor, before)
        torch.testing.assert_close(tensor.float(), row.dense(**whole).float(), **exact)


@every_merge
def test_writes_a_report_and_a_card(method, models, tmp_path, capsys):
    given, record = models(method), records()[method]
    assert main(["merge", "--method", method, *command_line(given), str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    for metric in record.metrics:
        assert f"{metric.name}: {metric.meaning}" in table
    report, card = json.loads((tmp_path / "out/merge.json").read_text()), (tmp_path / "out/README.md").read_text()
    assert report["method"] == record.key and all(row["measured"] for row in report["tensors"] if not row["kept"])
    merged = [row["measured"] for row in report["tensors"] if not row["kept"]]
    assert all({metric.stat or metric.name for metric in record.metrics} <= row.keys() for row in merged)
    assert {role.partition(" ")[0] for role in report["models"]} == record.models.keys()
    assert f"**{record.name}**" in card and record.citation in card and "[paper]()" not in card
    assert str(tmp_path) not in json.dumps(report) + card


class Killed(BaseException):
    pass


@every_merge
@pytest.mark.parametrize("stop", [0, 2, 4])
def test_goes_on_after_a_kill_to_the_same_bytes(method, stop, models, tmp_path, monkeypatch):
    given, options = models(method), dict(ROWS[method].options)
    if "lam" in options:
        options["lam"] = [options["lam"], 0.75]  # a sweep
    whole = merge_models(method, given, tmp_path / "whole", **options)
    monkeypatch.setattr(engine, "SYNC_BYTES", 1)
    write_tensor, done = engine._Writer._write_tensor, []

    def killed(self, job, files):
        if len(done) == stop:
            files[0].write(torch.zeros(3))  # half a tensor lies behind what is done
            raise Killed
        done.append(job.name)
        return write_tensor(self, job, files)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(engine._Writer, "_write_tensor", killed)
        merge_models(method, given, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and len(done) == stop
    monkeypatch.setattr(
        engine._Writer, "_write_tensor", lambda *args: done.append(args[1].name) or write_tensor(*args)
    )
    report = merge_models(method, given, tmp_path / "out", **options)
    assert len(done) == len(set(done)) == len(whole.tensors) and report.tensors == whole.tensors
    files = [path for path in (tmp_path / "whole").rglob("*.safetensors*")]
    assert len(files) >= (2 if "lam" in options else 1)
    for path in files:
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes()


def value(field):
    return [] if field.type is bool else ["attn=0.5" if field.type == dict[str, float] else "1"]


@every_merge
def test_refuses_what_is_missing_and_what_is_not_its_own(method, capsys):
    record = records()[method]
    needed = [role for role in record.models if role not in record.optional]
    models = {role: ["a", "b"] if role in record.several else "a" for role in record.models}
    assert main(["merge", "--method", method, "out"]) == 2
    assert f"--method {method} needs {' and '.join(f'--{role} MODEL' for role in needed)}." in capsys.readouterr().err
    for role in models:
        given = ["a"] if role in record.several else ["a", "b"]
        words = "needs two or more" if role in record.several else "takes one"
        assert main(["merge", "--method", method, *command_line(models | {role: given}), "out"]) == 2
        assert f"--method {method} {words} --{role} MODEL; " in capsys.readouterr().err
    own = {*record.models, *(field.name for field in dataclasses.fields(record.flags))}
    foreign = {}
    for other in records().values():
        foreign |= {f"--{role}": ["a"] for role in other.models if role not in own}
        for field in dataclasses.fields(other.flags):
            if field.name not in own:
                option = {"lam": "lambda", "rules": "rule"}.get(field.name, field.name.replace("_", "-"))
                foreign[f"--{option}"] = value(field)
    if len(record.files_from) < 2:
        foreign["--files-from"] = ["base"]
    assert foreign
    for option, words in foreign.items():
        assert main(["merge", "--method", method, *command_line(models), option, *words, "out"]) == 2
        assert f"{option} does nothing with --method {method}: leave it out." in capsys.readouterr().err
    with pytest.raises(TypeError, match="unexpected keyword argument 'overwrit'"):
        merge_models(method, models, "out", overwrit=True)
    with pytest.raises(ValueError, match=f"--method {method} takes no --nobody"):
        merge_models(method, models | {"nobody": "a"}, "out")


@every_merge
def test_flags_say_what_they_are(method):
    """A flag has a help, and its function in Python has every one."""
    record = records()[method]
    flags = [*dataclasses.fields(record.flags), *dataclasses.fields(Options)]
    assert all(field.metadata["help"] for field in flags)
    assert all(record.models.values()) and record.summary


MEASURE = """
import os, resource, sys, torch
from hf_rb.weights import merge_models
torch.set_num_threads(1)
for method, models, options in [("nothing", {{}}, {{}}), *{calls!r}]:
    child = os.fork()
    if not child:
        status = 1
        try:
            if models:
                merge_models(method, models, {folder!r} + "/" + method, progress=False, include="all", **options)
            status = 0
        finally:
            os._exit(status)
    _, status, usage = os.wait4(child, 0)
    assert status == 0, method
    print(method, usage.ru_maxrss * 1024)
"""


def test_memory_is_that_of_a_tensor(tmp_path):
    """Of models with three tensors of 14 million weights, a merge may hold one tensor in float32, or as many as its row
    says, beside 64 MB for pieces and what imports take.
    """
    size, names = 24576 * 576, ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
    folders = []
    for seed in range(3):
        one = noise(24576, 576, seed=seed, dtype=torch.bfloat16)
        folders.append(str(write(tmp_path / f"m{seed}", {name: one.clone() for name in names})))
    calls = []
    for method, row in ROWS.items():
        record, free = records()[method], iter(folders)
        models = {role: [next(free), next(free)] if role in record.several else next(free) for role in record.models}
        calls.append((method, models, row.options))
    code = MEASURE.format(calls=calls, folder=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    peaks = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    bars = {method: peaks["nothing"] + 2**26 + 4 * size * row.copies for method, row in ROWS.items()}
    assert {method: peaks[method] for method in ROWS if peaks[method] > bars[method]} == {}


CLASHING = """
from dataclasses import dataclass

from hf_rb.methods import MergeMethod, flag
from hf_rb.weights.operation import Operation


@dataclass
class {title}Flags:
    {name}: {kind} = flag({default}, "Something.")


class {title}(Operation):
    method = MergeMethod(key="{key}", name="{title}", summary="Something.", models={{"one": "a model"}}, flags={title}Flags)
"""


class TestOtherPackages:
    def test_the_documented_merge_is_one_with_its_flag(self, monkeypatch, tmp_path, capsys):
        (example,) = re.findall(r"```python\n(.*?)```", operation.__doc__, re.DOTALL)
        code = example.partition("\n\n\nreport =")[0]
        install(monkeypatch, tmp_path / "site", "averages", code, merge={"average": "Average"})
        folders = [write(tmp_path / name, tensors(seed)) for seed, name in ((0, "a"), (10, "b"))]
        models = ["--one", str(folders[0]), "--other", str(folders[1])]
        assert main(["merge", "--method", "average", *models, "--share", "0.25", str(tmp_path / "out")]) == 0
        assert "difference" in capsys.readouterr().out
        one, other, merged = (read(tmp_path / name) for name in ("a", "b", "out"))
        for name, tensor in merged.items():
            linear = 0.75 * one[name] + 0.25 * other[name]
            torch.testing.assert_close(tensor, linear if "proj" in name else one[name])
        assert "**Average**: The mean of two models." in (tmp_path / "out/README.md").read_text()
        assert json.loads((tmp_path / "out/merge.json").read_text())["options"]["share"] == 0.25
        assert main(["merge", "--method", "average", *models, "--share", "2", str(tmp_path / "no")]) == 2
        assert "`share` must be in [0, 1]; got 2.0." in capsys.readouterr().err
        assert main(["merge", "--method", "ties", *models, "--share", "0.5", str(tmp_path / "no")]) == 2
        assert "--one, --other, --share does nothing with --method ties" in capsys.readouterr().err
        assert main(["merge", "--help"]) == 0
        assert "average: share of the other model, in [0, 1] (default: 0.5)" in " ".join(
            capsys.readouterr().out.split()
        )

    def test_a_broken_one_is_named_and_the_rest_works(self, monkeypatch, tmp_path, capsys):
        code = CLASHING.format(key="odd", title="Odd", name="x", kind="int", default=0).replace("models=", "roles=")
        code += CLASHING.format(key="mine", title="Mine", name="strength", kind="int", default=0).replace(
            'key="mine"', 'key="mine", command="linear"'
        )
        code += CLASHING.format(key="taken", title="Taken", name="dtype", kind="str", default="'a'")
        code += CLASHING.format(key="unlike", title="Unlike", name="rank", kind="str", default="'a'")
        points = {"mine": "Mine", "gone": "Gone", "odd": "Odd", "taken": "Taken", "unlike": "Unlike"}
        install(monkeypatch, tmp_path / "site", "averages", code, merge=points)
        words = {
            "gone": "The merge 'gone' of the package averages (averages:Gone) cannot be used: ImportError",
            "odd": "The merge 'odd' of the package averages (averages:Odd) cannot be used: TypeError",
            "taken": "The merge 'taken' of the package averages cannot be used: `dtype` is an argument of another kind",
            "unlike": "The merge 'unlike' of the package averages cannot be used: `rank` is an argument of another kind",
        }
        for name, message in words.items():
            assert main(["merge", "--method", name, "--one", "a", "out"]) == 2
            assert message in capsys.readouterr().err
        assert merges().keys() == {*ROWS, "mine"}  # by its key, since ours has its command
        assert merges()["linear"].package == "hf_rb" and merges()["mine"].package == "averages"
        with pytest.raises(ValueError, match="There is no merge 'gone'; the merges are linear, graft"):
            merge_models("gone", {}, "out")


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"key": "x", "models": {"one": "a"}, "several": ("other",)}, "`models` has no other"),
        ({"key": "x", "models": {"one": "a"}, "receiver": "two", "files_from": ("three",)}, "no three, two"),
    ],
)
def test_a_record_names_its_roles(models, message):
    with pytest.raises(ValueError, match=message):
        MergeMethod(name="X", summary="X.", **models)


@pytest.mark.parametrize(
    ("function", "operation", "own"),
    [(interpolate, Interpolation, 4), (graft, Graft, 4), (refine, Timber, 4)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_function_shows_the_flags_of_its_record(function, operation, own):
    flags, parameters = dataclasses.fields(operation.method.flags), inspect.signature(function).parameters
    assert len(parameters) == len({*[*parameters][:own], *(one.name for one in (*flags, *shared(operation)))})
    for field in (*flags, *shared(operation)):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        assert parameters[field.name].default == default
        assert f"    {field.name} (`" in function.__doc__


def shared(operation):
    several = len(operation.method.files_from) > 1
    return [field for field in dataclasses.fields(Options) if field.name != "files_from" or several]


def test_files_of_one_of_several_models(models, tmp_path, capsys):
    """`--files-from tuned` means the first one; a model that does not fit is named by its number."""
    given = models("ties")
    for number, folder in enumerate([given["base"], *given["tuned"]]):
        (folder / "chat_template.jinja").write_text(f"template {number}")
    arguments = ["merge", "--method", "ties", *command_line(given)]
    assert main([*arguments, str(tmp_path / "out")]) == 2
    wanted = "base and tuned have different chat_template.jinja. Say whose configuration, tokenizer, chat template and"
    assert wanted in capsys.readouterr().err
    assert main([*arguments, "--files-from", "tuned", str(tmp_path / "out")]) == 0
    assert f"Everything else is from {given['tuned'][0].name}; merge.json" in capsys.readouterr().out
    assert (tmp_path / "out/chat_template.jinja").read_text() == "template 1"
    write(given["tuned"][1], tensors(0) | {"model.norm.weight": noise(20)})
    with pytest.raises(
        ValueError, match=r"model.norm.weight differs in shape: \(24, 16\) in base, \(20,\) in tuned 2"
    ):
        merge_models("ties", given, tmp_path / "no", files_from="base")


def test_rules_of_interpolation_may_be_none(models, tmp_path):
    report = interpolate(*models("linear").values(), tmp_path / "out", rules=None, include=None)
    assert report.options["rules"] == {} and report.options["include"] == "all"


@pytest.mark.parametrize(
    ("method", "options", "reported"),
    [
        ("linear", {"extrapolate": True, "lam": -0.5}, {"include": "all", "lambda": -0.5, "rules": {}}),
        ("graft", {}, {"include": "linear"}),
        ("slerp", {"include": "proj"}, {"include": "proj", "lambda": 0.5}),
        ("ties", {"lam": (1, 2)}, {"include": "all", "lambda": [1, 2], "density": 0.2}),
        ("timber", {"device": "cpu", "spectra": False}, {"include": "linear", "lambda": 0.2, "spectra": False}),
    ],
)
def test_what_was_asked_for_is_reported(method, options, reported, models, tmp_path):
    report = merge_models(method, models(method), tmp_path / "out", **options)
    assert report.options == {"mismatch": "refuse"} | reported


@dataclasses.dataclass
class PlainFlags:
    lam: float = flag(0.5, "A number.", range="[0, 1]")


class Plain(operation.Operation):
    """A flag `lam` that is one number, and a rule."""

    method = MergeMethod(
        key="plain",
        name="Plain",
        summary="Plain.",
        models={"one": "a model"},
        flags=PlainFlags,
        rules=lambda flags: ["`lam: 0.25` is a quarter."] if flags.lam == 0.25 else [],
    )


def test_rules_and_plain_lambdas(tmp_path):
    assert Plain(lam=0.75).options() == {"lam": 0.75} and Plain().lams == ()
    with pytest.raises(ValueError, match="`lam: 0.25` is a quarter"):
        Plain(lam=0.25)
    with pytest.raises(ValueError, match=r"`lam` must be in \[0, 1\]; got 2"):
        merge_models(Plain, {"one": "tiny:student"}, tmp_path / "out", lam=2)
