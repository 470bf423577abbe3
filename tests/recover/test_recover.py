"""`hf-rb recover` from end to end on a real, tiny model: what it leaves, how it goes on, and what it refuses."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_rb import tiny
from hf_rb.cli import main
from hf_rb.cli.check import read_recipe
from hf_rb.evaluation import Completion, decode_speed, generation
from hf_rb.hub import plan_upload
from hf_rb.io.resources import find_recipe
from hf_rb.recover import RecoverConfig, load_recovered, measuring, recover
from hf_rb.recover.pipeline import _calibration_stamp, _Pipeline
from hf_rb.recover.stages import fingerprint
from hf_rb.recover.training import make_trainer


# The recipe that ships with the package, made smaller.
RECIPE = read_recipe(find_recipe("recover/tiny-cpu")) | {
    "model_name_or_path": "tiny:student",
    "eval_problems": 12,
    "pool_problems": 48,
    "max_new_tokens": 64,
    "examples": [16],
    "lora_r": 4,
    "lora_alpha": 8,
    "training": {"learning_rate": 2e-3, "num_train_epochs": 1, "disable_tqdm": True},
    "baseline": False,
}
del RECIPE["output_dir"]
IDS = torch.arange(24).view(1, -1) + 300


@pytest.fixture(scope="module", autouse=True)
def short_speed():
    """Decoding is timed over a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "decode_speed", partial(decode_speed, new_tokens=4, repeats=1))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a run, and its report."""
    folder = tmp_path_factory.mktemp("recovered")
    report = recover(RecoverConfig(**RECIPE, output_dir=str(folder)))
    return folder, report


def write_recipe(folder: Path, **keys) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(folder / "out")} | keys))
    return str(path)


def test_the_table(done):
    folder, report = done
    full, quantized, recovered = report.rows
    assert [row.model for row in report.rows] == ["full precision", "PTQTP, 1 plane", "PTQTP, 1 plane + LoRA"]
    assert (recovered.objective, recovered.examples) == ("forward_kl", 16)
    adapter = (folder / "model/adapter/adapter_model.safetensors").stat().st_size
    assert quantized.bytes == (folder / "model/model.safetensors").stat().st_size < full.bytes
    assert recovered.bytes == quantized.bytes + adapter
    assert full.perplexity < recovered.perplexity < quantized.perplexity
    assert all(0 <= row.exact_match <= 1 and row.tokens_per_second > 0 for row in report.rows)
    assert json.loads((folder / "report.json").read_text()) == report.to_dict()
    failures = report.failures["quantized"]
    assert failures["flipped"] > 0
    assert sum(failures[name] for name in ("flipped", "kept", "gained", "failed")) == 48
    lines = [json.loads(line) for line in (folder / "stages/quantized-failures.jsonl").read_text().splitlines()]
    assert sum(line["right_before"] and not line["right_after"] for line in lines) == failures["flipped"]
    assert recovered.failing >= round(0.67 * 16) and report.notes == []
    assert full.perplexity < report.rounded_perplexity < quantized.perplexity and report.rounding_seconds > 0
    quality = report.quality()
    assert quality.times == recovered.perplexity / full.perplexity
    assert quality.rounded_times == report.rounded_perplexity / full.perplexity
    assert report.begins_with is None  # of problems, a template says what they begin with


def test_it_loads_in_two_lines(done):
    folder = done[0] / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    base = model(IDS).logits
    model = PeftModel.from_pretrained(model, folder, subfolder="adapter")
    assert not torch.equal(model(IDS).logits, base)
    ours, tokenizer = load_recovered(folder, dtype="float32")
    assert torch.equal(ours(IDS).logits, model(IDS).logits) and tokenizer.chat_template
    card = (folder / "README.md").read_text()
    for expected in (
        'subfolder="adapter"',
        "PTQTP, 1 plane + LoRA",
        "exact match on 12 problems of tiny:math",
        str(done[1].quality()),
        "peft",
        "to one ternary plane",
        f"The weight files hold {done[1].rows[2].bytes:,} bytes",
        "| exact match (12 problems) | `tiny:math` | test |",
        "| `quantization_config` | `{'planes': 1}` |",
    ):
        assert expected in card
    assert str(done[0]) not in card + (folder / "adapter/adapter_config.json").read_text()
    upload = plan_upload(folder)
    assert {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/base.json",
        "report.json",
    } < set(upload.files)
    assert upload.left_out == []


def test_training_leaves_the_packed_bytes_alone(done):
    folder, report = done
    assert fingerprint(folder / "model") == fingerprint(folder / "stages/quantized/model") == report.base_sha256
    rows = [json.loads(line) for line in (folder / "stages/quantized-16.jsonl").read_text().splitlines()]
    config = RecoverConfig(**RECIPE | {"training": {"max_steps": 2, "disable_tqdm": True}}, output_dir="unused")
    trainer = make_trainer(config, folder / "model", tiny.path("student"), rows, "forward_kl", folder / "again")
    before = {
        name: tensor.clone() for name, tensor in trainer.model.state_dict().items() if tensor.dtype == torch.uint8
    }
    trainer.train()
    after = trainer.model.state_dict()
    assert len(before) == 28 and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(parameter.any() for name, parameter in trainer.model.named_parameters() if "lora_B" in name)


@pytest.mark.slow
def test_the_shipped_recipe_brings_back_most_of_what_was_lost(tmp_path, capsys):
    assert main(["recover", "recover/tiny-cpu", "--output_dir", str(tmp_path), "--no_baseline", "--json"]) == 0
    full, quantized, recovered = json.loads(capsys.readouterr().out)["rows"]
    assert full["exact_match"] - quantized["exact_match"] > 0.2 and recovered["regained"] >= 0.5


def test_every_stage_is_done_once(done, tmp_path, capsys):
    folder, report = done
    path = write_recipe(tmp_path, output_dir=str(folder))
    assert main(["recover", path, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == report.to_dict()
    assert err.count("done before") == 6 and " …" not in err.replace("package …", "")


def test_what_the_trainers_print_is_not_in_the_json(done, tmp_path, capsys, monkeypatch):
    def talk(config, say):
        say("a stage")
        print({"loss": 1.0})
        return done[1]

    monkeypatch.setattr("hf_rb.recover.recover", talk)
    assert main(["recover", write_recipe(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == done[1].to_dict() and "a stage" in err and "loss" in err


def test_another_base_is_refused(done, tmp_path):
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(tiny.path("student")).save_pretrained(other)
    with pytest.raises(ValueError, match="was trained on weights with the SHA-256 .* on them it is noise"):
        load_recovered(done[0] / "model", base=other)


def test_a_quantized_model_is_refused(done, tmp_path, capsys):
    assert main(["recover", write_recipe(tmp_path, model_name_or_path=str(done[0] / "model"))]) == 2
    assert "is quantized with ptqtp already" in capsys.readouterr().err


def test_recover_of_an_unbroken_model_trains_nothing(tmp_path, capsys, monkeypatch):
    row = [Completion("#### 1", True)]
    monkeypatch.setattr(generation, "generate", lambda model, tokenizer, prompts, *_: [row] * len(prompts))
    for name in ("stages", "model"):  # of an earlier recipe
        (tmp_path / "out" / name).mkdir(parents=True)
    assert main(["recover", write_recipe(tmp_path, baseline=True)]) == 0
    out, err = capsys.readouterr()
    assert "quantization has broken none of the 48 problems of the pool" in out and "+ LoRA" not in out
    assert not (tmp_path / "out/model").exists() and "forward_kl" not in err and "rtn" not in err
    assert json.loads((tmp_path / "out/report.json").read_text())["failures"]["quantized"]["flipped"] == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"objectives": ["gopd"]}, "`objectives` cannot have 'gopd'"),
        ({"objectives": ["hpd"], "cached_teacher": True}, "needs the teacher's whole distribution"),
        ({"examples": []}, "`examples: []` must hold one value"),
        ({"examples": [0]}, "`examples` cannot have 0"),
        ({"task": None}, "there is nothing to measure"),
        ({"task": "nowhere.jsonl", "pool": "tiny:math"}, "`task` names 'nowhere.jsonl', which does not exist"),
        (
            {"training": {"learning_rat": 1e-3}},
            "unknown key `training.learning_rat`; did you mean `training.learning_rate`?",
        ),
        ({"training": {"learning_rate": "1e-3"}}, "`training.learning_rate` must be float"),
        ({"training": {"output_dir": "elsewhere"}}, "`training` cannot have `output_dir`"),
        ({"failing_share": 2}, "`failing_share` must be in (0, 1]"),
        ({"quantization_config": {"planes": 9}}, "planes"),
        ({"model_name_or_path": "tiny:pupil"}, "'tiny:pupil' does not exist"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_recipes(tmp_path, keys, message, capsys):
    path = write_recipe(tmp_path, **keys)
    assert main(["recover", path]) == 2
    assert message in capsys.readouterr().err
    assert main(["check", path, "--for", "recover"]) == 2


def test_a_training_that_cannot_be_is_found_before_the_work(tmp_path, capsys):
    assert main(["recover", write_recipe(tmp_path, training={"loca_alpha": 0.5}, objectives=["hpd"])]) == 2
    assert "loca_alpha" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_it_is_evaluated_with_its_adapter(done, tmp_path, capsys):
    out = tmp_path / "out.json"
    evaluate = ["eval", str(done[0] / "model"), "--task", "tiny:math", "--limit", "12", "--max-new-tokens", "64"]
    assert main([*evaluate, "--dtype", "float32", "--out", str(out)]) == 0
    assert "Measured with the adapter in" in capsys.readouterr().err
    assert json.loads(out.read_text())["size"]["file_bytes"] == done[1].rows[2].bytes
    assert json.loads(out.read_text())["exact_match"]["accuracy"] == done[1].rows[2].exact_match


def test_held_out_problems_are_not_learned(tmp_path, capsys):
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1} #### {n + 1}"} for n in range(9)]
    task, pool = tmp_path / "task.jsonl", tmp_path / "pool.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
    assert main(["recover", write_recipe(tmp_path, task=str(task), pool=str(pool))]) == 2
    assert "3 of the 7 problems to learn from are in the evaluation set too" in capsys.readouterr().err


def test_held_out_problems_are_not_learned_as_text(tmp_path, capsys):
    question = "A shop that sells three kinds of apples and four kinds of pears has how many kinds of fruit?"
    task, text = tmp_path / "task.jsonl", tmp_path / "train.txt"
    task.write_text(json.dumps({"question": question, "answer": "3 + 4 = 7 #### 7"}) + "\n")
    text.write_text(f"Something else.\n{question}\n")
    path = write_recipe(tmp_path, task=str(task), pool="tiny:math", train_text=str(text))
    assert main(["recover", path]) == 2
    assert "1 of the 1 lines of text to learn from are in the evaluation set too" in capsys.readouterr().err


def test_what_a_stage_depends_on(tmp_path):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(tiny.path("student"), model)
    config = RecoverConfig(**RECIPE | {"model_name_or_path": str(model), "output_dir": str(tmp_path / "out")})
    pipeline = _Pipeline(config, print)
    before = pipeline._source_stamp()
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert {"config.json", "model.safetensors", "tokenizer.json"} < set(before) and pipeline._source_stamp() != before
    stamps = []
    for content in ("one", "two"):
        text.write_text(content)
        stamps.append(_calibration_stamp({"dataset": str(text)}))
    assert stamps[0] != stamps[1] and not _calibration_stamp({"dataset": "tiny:math"}) and not _calibration_stamp({})


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").touch()
    assert main(["recover", write_recipe(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


class TestText:
    """Without problems: text to learn from, and the perplexity of other text. Every objective, a cached teacher, and a merged result."""

    @pytest.fixture
    def recipe(self, tmp_path):
        problems = tiny.load_dataset("math", "messages", "train", 60)
        solved = [" ".join(message["content"] for message in row["messages"]) for row in problems]
        for name, part in (("train", solved[:45]), ("eval", solved[45:])):
            (tmp_path / f"{name}.txt").write_text("\n".join(part))
        return RECIPE | {
            "task": None,
            "train_text": str(tmp_path / "train.txt"),
            "eval_text": str(tmp_path / "eval.txt"),
            "text_tokens": 32,
            "examples": [8],
            "training": {"max_steps": 2, "learning_rate": 2e-3, "disable_tqdm": True},
            "output_dir": str(tmp_path / "out"),
        }

    def test_objectives_and_a_merged_model(self, recipe, tmp_path):
        objectives = ["akl", "forward_kl", "hpd", "sft"]
        report = recover(RecoverConfig(**recipe | {"objectives": objectives, "merge": True}))
        assert [row.objective for row in report.rows] == [None, None, *objectives, None]
        assert report.rows[2].exact_match is None and report.task is None and report.text == "eval.txt"
        full, quantized, first, *_, merged = report.rows
        assert merged.perplexity == pytest.approx(first.perplexity, rel=1e-3) and merged.bytes > 2 * quantized.bytes
        assert first.perplexity != quantized.perplexity > full.perplexity
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
        assert not hasattr(model.config, "quantization_config") and not (tmp_path / "out/model/adapter").exists()

    def test_a_cached_teacher_trains_the_same(self, recipe, tmp_path):
        said = []
        local = recover(RecoverConfig(**recipe))
        cached = recover(RecoverConfig(**recipe | {"cached_teacher": True}), said.append)
        assert "quantized-8-teacher …" in said and "quantized-8-forward_kl, again (cached changed) …" in said
        assert cached.rows[2].perplexity == pytest.approx(local.rows[2].perplexity, rel=0.02)
        assert "full: done before" in said

    def test_held_out_lines_are_not_learned(self, recipe, tmp_path):
        train = Path(recipe["train_text"])
        train.write_text(train.read_text() + "\n" + Path(recipe["eval_text"]).read_text())
        with pytest.raises(ValueError, match="15 of the 60 lines of text to learn from are in the evaluation set too"):
            recover(RecoverConfig(**recipe))
