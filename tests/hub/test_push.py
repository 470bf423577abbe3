import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.random_models import save_qwen3
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError

from hf_rb.cli import main
from hf_rb.hub import ModelCardData, Result, add_results, plan_upload, read_results, write_model_card
from hf_rb.io import files as _files


@pytest.fixture
def folder(tmp_path):
    """A model folder as a run leaves it, with much that is nobody else's business."""
    folder = save_qwen3(tmp_path / "student", hidden_size=32, head_dim=16)
    write_model_card(folder, ModelCardData("student"))
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        "trainer_state.json",
        ".env",
        "notes.txt",
    ):
        (folder / name).write_text("x")
    for name in ("checkpoint-5", "teacher_cache", ".cache"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_text("x")
    (folder / "optimizer.safetensors").write_text("x")
    return folder


UPLOADED = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_only_the_model_is_uploaded(folder):
    upload = plan_upload(folder)
    assert set(upload.files) == UPLOADED
    assert upload.size == sum((folder / name).stat().st_size for name in UPLOADED)
    assert upload.card == (folder / "README.md").read_text() and upload.repo_type == "model"
    assert {"checkpoint-5/", "teacher_cache/", ".cache/", "optimizer.pt", "optimizer.safetensors", ".env"} < set(
        upload.left_out
    )


def test_a_dry_run_lists_and_uploads_nothing(folder, capsys, monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", None)
    before = (folder / "README.md").read_bytes()
    assert main(["push", str(folder), "me/student", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed.partition("not uploaded")[0] for name in UPLOADED)
    assert "7 files would go to me/student" in printed and "optimizer.pt" in printed.partition("not uploaded")[2]
    assert main(["push", str(folder), "me/student", "--dry-run", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["files"]) == UPLOADED
    assert (folder / "README.md").read_bytes() == before


def test_a_dry_run_counts_the_results(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", None)
    results, before = tmp_path / "eval.json", (folder / "README.md").read_bytes()
    push = ["push", str(folder), "me/model", "--results", str(results)]
    for model in (str(folder), "elsewhere/student", "me/model"):
        results.write_text(json.dumps({"model": model, "results": [vars(result) for result in RESULTS]}))
        assert main([*push, "--dry-run"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines()[:8] if "README.md" in line)
    assert line.endswith(f"README.md, with 2 results of {results}") and (folder / "README.md").read_bytes() == before
    assert main([*push, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["results"] == 2
    written = add_results(folder / "README.md", RESULTS).read_text().replace("path/to/student", "me/model")
    assert planned["files"]["README.md"] == len(written.encode())

    before = (folder / "README.md").read_bytes()
    results.write_text(json.dumps({"model": "outputs/teacher", "results": [vars(result) for result in RESULTS]}))
    assert main(push) == 2
    assert f"measures outputs/teacher, not {folder}" in capsys.readouterr().err
    assert (folder / "README.md").read_bytes() == before


def _link(folder):
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")


def _damage(folder):
    _files.write_manifest(folder)
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (_link, "is a link to a file outside the folder"),
        (_damage, "is not what was saved: config.json has"),
        (
            lambda folder: [(folder / "config.json").unlink(), (folder / "adapter_config.json").write_text("{}")],
            "no adapter_model.safetensors",
        ),
    ],
)
def test_what_is_no_whole_model_stays_here(folder, change, message, capsys, monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", None)
    change(folder)
    assert main(["push", str(folder), "me/student"]) == 2
    assert message in capsys.readouterr().err


def test_the_folder_of_a_recovery_names_its_model(folder, capsys):
    folder.rename(folder.parent / "model")
    assert main(["push", str(folder.parent), "me/student", "--dry-run"]) == 2
    assert f"{folder.parent / 'model'} is one." in capsys.readouterr().err


def test_files_of_other_programs_may_have_a_config_beside_them(tmp_path):
    """As repositories of GGUF files often have."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="its weights are missing"):
        plan_upload(tmp_path)
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    assert "model-q4.gguf" in plan_upload(tmp_path).files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/absent", "me/x"], "There is no folder"),
        (["{tmp}/model.gguf", "me/x"], "model.gguf is a file: give the folder that holds it."),
        (["{folder}", "me/x y"], "'me/x y' is no name of a repository"),
        (["{folder}", "me/x y", "--dry-run"], "'me/x y' is no name of a repository"),
        (["{folder}", "me/x y", "--results", "{tmp}/eval.json"], "'me/x y' is no name of a repository"),
        (["{folder}", "me/x", "--results", "{tmp}/absent.json"], "`hf-rb eval MODEL --out"),
        (["{folder}", "me/x", "--results", "{folder}/config.json"], "does not hold what `hf-rb eval --out` writes"),
    ],
)
def test_bad_input(folder, tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", None)
    results = [vars(result) for result in RESULTS]
    (tmp_path / "eval.json").write_text(json.dumps({"model": "me/x y", "results": results}))
    (tmp_path / "model.gguf").touch()
    before = (folder / "README.md").read_bytes()
    assert main(["push", *(argument.format(tmp=tmp_path, folder=folder) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err and (folder / "README.md").read_bytes() == before


def test_a_hub_that_cannot_be_reached_is_one_message(folder, capsys, monkeypatch):
    def refused(*_, **__):
        raise HTTPError("Connection refused")

    monkeypatch.setattr(HfApi, "create_repo", refused)
    assert main(["push", str(folder), "me/x"]) == 2
    assert "cannot be reached: Connection refused" in capsys.readouterr().err


RESULTS = [Result("exact match", 0.5, "tiny:math"), Result("perplexity", 9.25, "text.txt")]


def test_results_enter_the_card_once(tmp_path):
    data = ModelCardData("student", results=[Result("loss", 1.5, "tiny:math", before=2.5)], hyperparameters={"lr": 1})
    readme = write_model_card(tmp_path / "student", data)
    add_results(readme, RESULTS)
    changed = [Result("exact match", 0.75, "tiny:math"), RESULTS[1]]
    once = add_results(readme, changed).read_text()
    assert add_results(readme, changed).read_text() == once
    card = ModelCard(once)
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {"loss": 1.5, "exact match": 0.75, "perplexity": 9.25}
    assert once.count("## Measured with `hf-rb eval`") == 1 and "| exact match | `tiny:math` | test | 0.75 |" in once
    assert "| loss | `tiny:math` | test | 2.5 | 1.5 |" in once  # what was there stays
    order = [once.index(heading) for heading in ("## Evaluation", "## Measured", "## Hyper-parameters", "## Versions")]
    assert order == sorted(order)
    assert once.partition("# student")[2].replace(" ", "")  # the text is still there


def test_results_make_a_card_where_there_is_none(tmp_path):
    text = add_results(tmp_path / "README.md", RESULTS).read_text()
    assert ModelCard(text).data.model_name == tmp_path.name
    assert "| perplexity | `text.txt` | test | 9.25 |" in text and "## Versions" in text


def test_results_are_read_from_what_eval_writes(tmp_path):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"results": [vars(result) for result in RESULTS], "size": {}}))
    assert read_results(path) == RESULTS
    path.write_text(json.dumps({"results": [{"metric": "x", "value": "high", "dataset": "y"}]}))
    with pytest.raises(ValueError, match="a value is no number"):
        read_results(path)


BASE = UPLOADED - {"chat_template.jinja"}
OTHER_THINGS = {
    "me/base": BASE,
    "me/packed-base": BASE,
    "me/peft": {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    },
    "me/gguf": {"README.md", "model-q4.gguf"},
    "spaces/me/report": {"README.md", "index.html"},
    "datasets/me/cache": {"README.md", "manifest.json", "shard-00000.safetensors", "vocabulary.json"},
}


@pytest.mark.parametrize(
    "snippets",
    [["me/base", "me/packed-base"], pytest.param(["--all-snippets"], marks=pytest.mark.slow)],
    ids=["", "all"],
)
def test_all_files_reach_a_server_with_the_protocol_of_the_hub(folder, tmp_path, snippets):
    measured = {"model": "student", "results": [vars(result) for result in RESULTS]}
    (tmp_path / "eval.json").write_text(json.dumps(measured))
    command = [sys.executable, str(Path(__file__).with_name("loopback_worker.py")), str(tmp_path), *snippets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    repos, cards = seen["repos"], seen["cards"]
    # The examples of the cards, each where nothing is installed but what its card names.
    assert set(seen["snippets"].values()) == {""} and len(seen["snippets"]) >= len(snippets), seen["snippets"]
    assert set(seen["exit_codes"].values()) == {0} and seen["unknown"] == []
    assert seen["tokens"] == ["Bearer hf_loopback"]  # huggingface_hub's own, and on every request
    pushed = {"me/model", "me/quantized", "me/folded", "me/adapter", "me/trained", "me/trained-adapter"}
    assert set(repos) == pushed | OTHER_THINGS.keys()
    assert {repo: set(repos[repo]) for repo in OTHER_THINGS} == OTHER_THINGS
    for repo in OTHER_THINGS:
        assert "Model Card for Model ID" not in cards[repo] and str(tmp_path) not in cards[repo]
        ModelCard(cards[repo], ignore_metadata_errors=False)
    assert "apply_chat_template" in cards["me/trained"] and "apply_chat_template" not in cards["me/base"]
    assert (
        "Made by" not in cards["me/base"]
        and "Made from [me/model](https://huggingface.co/me/model)" in cards["me/peft"]
    )
    assert "| `lora.r` | `4` |" in cards["me/peft"] and ModelCard(cards["me/peft"]).data.base_model == "me/model"
    assert "hf download me/cache --repo-type dataset" in cards["datasets/me/cache"]
    assert "sdk: static" in cards["spaces/me/report"] and "--hf-repo me/gguf" in cards["me/gguf"]
    assert seen["private"]["me/model"] and not seen["private"]["me/quantized"]

    assert set(repos["me/model"]) == UPLOADED
    for name in UPLOADED - {"README.md"}:  # in which the example names the repository
        assert repos["me/model"][name] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert "| exact match | `tiny:math` | test | 0.5 |" in seen["cards"]["me/model"]

    assert {"config.json", "model.safetensors"} <= set(repos["me/quantized"]) & set(repos["me/folded"])
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(repos["me/adapter"])
    assert set(repos["me/trained"]) == UPLOADED
    assert "ProFit" in seen["cards"]["me/trained"] and 'from_pretrained("me/trained")' in seen["cards"]["me/trained"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} < set(repos["me/trained-adapter"])
    for files in repos.values():
        assert not [
            name for name in files if "optimizer" in name or "checkpoint" in name or name.endswith((".bin", ".pt"))
        ]
