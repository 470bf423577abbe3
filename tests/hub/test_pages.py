"""Cards of what has none, what they are read from, and what of this machine may not be in them."""

import json
from pathlib import Path

import pytest
import torch
from helpers.random_models import save_qwen3
from huggingface_hub import DatasetCard, HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_rb import PTQTPConfig, SFTConfig, SFTTrainer, tiny
from hf_rb.cli import main
from hf_rb.hub import ModelCardData, Result, loading, plan_upload, read_loading, render_card, write_model_card
from hf_rb.hub.loading import Loading, adapter_settings
from hf_rb.hub.pages import paths_in
from hf_rb.io.model_folder import public_name
from hf_rb.quantizers import quantize


@pytest.fixture
def student(tmp_path):
    return save_qwen3(tmp_path / "student", hidden_size=32, head_dim=16)


@pytest.mark.parametrize(
    ("architecture", "task", "loads"),
    [
        ("Qwen3ForCausalLM", "text-generation", "AutoModelForCausalLM"),
        ("MPIQwen3MoeForCausalLM", "text-generation", "AutoModelForCausalLM"),
        ("LlavaForConditionalGeneration", "image-text-to-text", "LlavaForConditionalGeneration"),
        ("Gemma3ForConditionalGeneration", "image-text-to-text", "Gemma3ForConditionalGeneration"),
        ("T5ForConditionalGeneration", "text2text-generation", "T5ForConditionalGeneration"),
        ("BertForMaskedLM", "fill-mask", "BertForMaskedLM"),
        ("ViTForImageClassification", "image-classification", "ViTForImageClassification"),
        ("WhisperForConditionalGeneration", "automatic-speech-recognition", "WhisperForConditionalGeneration"),
        ("BertModel", None, "BertModel"),
    ],
)
def test_class_and_task(architecture, task, loads):
    text = render_card(ModelCardData("model", loading=Loading(architecture)))
    assert ModelCard(text, ignore_metadata_errors=False).data.pipeline_tag == task
    assert f"model = {loads}.from_pretrained(" in text


def test_what_a_folder_says_of_loading(student):
    assert read_loading(student) == Loading("Qwen3ForCausalLM", chat=True)
    (student / "chat_template.jinja").unlink()
    assert not read_loading(student).chat
    config = student / "tokenizer_config.json"
    for template, chat in ((None, False), ("{{ messages }}", True)):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
        assert read_loading(student).chat is chat
    (student / "preprocessor_config.json").write_text("{}")
    assert read_loading(student).reader == "AutoProcessor"
    assert read_loading(student / "nothing") == Loading()


def test_a_base_model_gets_no_chat_template(student, tmp_path):
    (student / "chat_template.jinja").unlink()
    quantize(student, tmp_path / "packed", PTQTPConfig())
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "apply_chat_template" not in card and 'tokenizer("…", return_tensors="pt")' in card


@pytest.mark.parametrize(
    ("version", "line"),
    [("0.1.0.dev0", '"hf_rb @ git+https://github.com/hf-rb/hf_rb"'), ("0.1.0", '"hf_rb==0.1.0"')],
)
def test_the_install_line_has_a_version_that_exists(version, line, monkeypatch):
    monkeypatch.setattr(loading, "__version__", version)
    assert f"pip install {line}\n" in render_card(ModelCardData("packed", ["ptqtp"]))


def test_other_formats_name_what_loads_them():
    for method, packages in (("bitsandbytes", "bitsandbytes"), ("gptq", "gptqmodel>=7.7")):
        card = render_card(ModelCardData("packed", loading=Loading(method=method)))
        assert f'"{packages}"' in card and "import hf_rb" not in card


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/somewhere/else/teacher", "teacher"),
        ("~/teacher", "teacher"),
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("tiny:teacher", "tiny:teacher"),
        (str(tiny.path("teacher")), "tiny:teacher"),
        ("cosine", "cosine"),
    ],
)
def test_public_names(name, shown):
    assert public_name(name) == shown


def train_lora(student, output, **options):
    args = SFTConfig(
        str(output), max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_length=32,
        gradient_checkpointing=False, save_strategy="no", **options,
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM")
    data = tiny.load_dataset("math", size=4)
    trainer = SFTTrainer(str(student), args, train_dataset=data, peft_config=lora)
    trainer.train()
    return trainer


def test_a_lora_run_from_python_has_our_card(student, tmp_path, capsys):
    trainer = train_lora(student, tmp_path / "run")
    trainer.create_model_card(dataset_name="tiny:math")
    trainer.save_model()  # PEFT writes its own, with the path of the base in its head
    text = (tmp_path / "run" / "README.md").read_text()
    card = ModelCard(text, ignore_metadata_errors=False)
    assert card.data.library_name == "peft" and card.data.base_model is None
    assert "Model Card for Model ID" not in text and str(tmp_path) not in text
    assert "Made from `student` with the data `tiny:math`" in text
    for row in (
        "| `lora.r` | `4` |",
        "| `lora.lora_alpha` | `12` |",
        "| `lora.target_modules` | `['q_proj', 'v_proj']` |",
    ):
        assert row in text
    settings = adapter_settings({"peft_type": "LORA", "target_modules": {"a.0.up_proj", "a.1.up_proj", "a.1.q_proj"}})
    assert settings == {"lora.target_modules": "3 modules, whose names end in q_proj, up_proj"}
    assert 'from_pretrained("folder/of/student")' in text  # nobody can guess where the base is
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "README.md").read_text() == text

    assert main(["push", str(tmp_path / "run"), "me/adapter", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "adapter_config.json names a folder of this machine as `base_model_name_or_path`" in said


def test_a_lora_run_on_packed_weights_says_that_it_needs_us(student, tmp_path):
    packed = {"quant_method": "ptqtp", "group_size": 32}
    trainer = train_lora(student, tmp_path / "run", model_init_kwargs={"quantization_config": PTQTPConfig(**packed)})
    trainer.save_model()
    assert "import hf_rb  # registers" in (tmp_path / "run" / "README.md").read_text()


def test_the_empty_card_of_peft_is_never_uploaded(student, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", None)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(student), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    written = (tmp_path / "adapter" / "README.md").read_text()
    assert "[More Information Needed]" in written
    upload = plan_upload(tmp_path / "adapter", "me/adapter")
    assert "[More Information Needed]" not in upload.card and str(tmp_path) not in upload.card
    assert "| `lora.r` | `4` |" in upload.card and '"me/adapter"' in upload.card
    assert (tmp_path / "adapter" / "README.md").read_text() == written  # a plan changes nothing

    assert main(["push", str(tmp_path / "adapter"), "me/adapter", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "has no card of its own: README.md is written from its files." in said
    assert "README.md names no license and no base model: add `license: …` and `base_model: …` to its head." in said


def test_a_card_that_says_all_is_left_alone(student, capsys):
    text = "---\nlicense: mit\nbase_model: me/base\n---\n\n# Mine\n"
    (student / "README.md").write_text(text)
    assert plan_upload(student, "me/x").card == text
    assert main(["push", str(student), "me/x", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_only_examples_of_the_card_get_the_repository_name(student):
    other = "Run `train.py --data path/to/data.json` in /home/path/to/student, or `path/to/student-2`.\n"
    write_model_card(student, ModelCardData("student", sections={"Use": other}))
    card = plan_upload(student, "me/x").card
    assert other.strip() in card and 'from_pretrained("me/x")' in card and '"path/to' not in card


def test_a_class_that_comes_with_the_checkpoint(student):
    """`from transformers import MineForCausalLM` fails for a visitor."""
    config = json.loads((student / "config.json").read_text())
    autos = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    for architecture in ("Qwen3ForCausalLM", "MineForCausalLM", "MineModel"):
        text = json.dumps(config | {"architectures": [architecture], "auto_map": autos})
        (student / "config.json").write_text(text)
        card = render_card(ModelCardData("mine", loading=read_loading(student)))
        trusted = ", trust_remote_code=True" * architecture.startswith("Mine")
        assert f'AutoModelForCausalLM.from_pretrained("path/to/mine"{trusted})' in card
        assert "pipeline_tag: text-generation" in card


def test_an_adapter_of_a_base_that_is_not_here_says_its_task(tmp_path):
    settings = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    card = render_card(ModelCardData("x", base_model="org/base", library_name="peft", loading=read_loading(tmp_path)))
    assert 'base = AutoModelForSequenceClassification.from_pretrained("org/base")' in card
    assert "text-generation" not in card and "generate" not in card


def test_a_name_that_json_escapes_is_replaced_too(student, tmp_path):
    student = student.rename(tmp_path / "r&d model")
    card = plan_upload(student, "me/x").card
    assert 'from_pretrained("me/x")' in card and "path/to" not in card


def test_a_path_of_this_machine_is_pointed_out(student, tmp_path, capsys):
    write_model_card(student, ModelCardData("student", sections={"Data": f"It read `{tmp_path / 'student'}`."}))
    assert main(["push", str(student), "me/x", "--dry-run"]) == 0
    assert f"README.md names paths of this machine, {student} for one" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["{}", "It read {}.", "<td>{}</td>", "`{}`", "data={}, x", "[{}]", 'a: "{}"', "model: {}: 3"]
)
def test_where_a_path_stands(text, tmp_path):
    assert paths_in(text.format(tmp_path)) == [str(tmp_path)]
    assert paths_in(text.format("/no/such/folder")) == paths_in("https://huggingface.co/me/x and 3/4") == []


def test_reports_and_ggufs_go_with_a_model(student):
    for name in ("report.html", "report.md", "model-q4_0.gguf"):
        (student / name).write_text("x")
    assert {"report.html", "report.md", "model-q4_0.gguf"} < plan_upload(student).files.keys()


def test_a_report_is_a_space_and_a_cache_a_dataset(tmp_path, capsys):
    (tmp_path / "mine.html").write_text("<p>One.</p>")
    upload = plan_upload(tmp_path / "mine.html", "me/mine")
    assert upload.repo_type == "space" and upload.files.keys() == {"index.html", "README.md"}
    cache = ["cache-teacher", "akl/tiny-cpu", str(tmp_path / "cache"), "--k", "4", "--max_length", "32"]
    assert main([*cache, "--dataset_train_split", "test"]) == 0
    upload = plan_upload(tmp_path / "cache", "me/cache")
    assert upload.repo_type == "dataset" and DatasetCard(upload.card).data.tags[0] == "hf_rb"
    assert "`tiny:teacher`" in upload.card and str(tiny.ASSETS) not in (tmp_path / "cache/manifest.json").read_text()
    capsys.readouterr()
    assert main(["push", str(tmp_path / "cache"), "me/cache", "--dry-run"]) == 0
    assert "would go to the dataset me/cache" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="cache is no model, and `--results` are measurements of one: leave them out."
    ):
        plan_upload(tmp_path / "cache", results=[Result("loss", 1.0, "text.txt")])

    shard = tmp_path / "cache" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["push", str(tmp_path / "cache"), "me/cache", "--dry-run"]) == 2
    assert "shard-00000.safetensors is missing or not what was captured" in capsys.readouterr().err


def test_measurements_and_reports_name_no_folder(student, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, page = tmp_path / "eval.json", tmp_path / "page.html"
    assert main(["eval", str(student), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["model"] == "student"
    out.write_text(out.read_text().replace('"model": "student"', f'"model": "{student}"'))  # as they were before
    assert main(["report", str(out), "--out", str(page)]) == 0
    for file in (page, page.with_suffix(".md")):
        assert str(tmp_path) not in file.read_text() and "hf-rb eval student" in file.read_text()


def test_no_file_of_a_merge_names_a_folder(student, tmp_path):
    torch.manual_seed(1)
    other = save_qwen3(tmp_path / "other", 1, hidden_size=32, head_dim=16)
    models = ["--start", str(student), "--end", str(other), "--files-from", "start"]
    assert main(["merge", "--method", "linear", *models, str(tmp_path / "merged")]) == 0
    for name in ("README.md", "merge.json", "config.json"):
        assert str(tmp_path) not in Path(tmp_path, "merged", name).read_text()
