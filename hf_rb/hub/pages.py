"""Cards for what is pushed without one: a folder that `save_pretrained` wrote, GGUF files, a teacher cache, a
report.
"""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub

from hf_rb.hub.card import ModelCardData, render_card
from hf_rb.hub.loading import adapter_settings, hf_rb_requirement, read_json, read_loading
from hf_rb.io.files import MANIFEST
from hf_rb.io.model_folder import ADAPTER_CONFIG, public_name
from hf_rb.methods.registry import methods


__all__ = ["CACHE_FORMAT", "cache_card", "existing_card", "model_card", "paths_in", "report_card"]

CACHE_FORMAT = "hf_rb teacher cache"
BY = "by [`hf_rb`](https://github.com/hf-rb/hf_rb)"


def existing_card(folder: Path) -> str | None:
    """Returns the text of a folder's card, or `None`. PEFT's card that nobody has filled in counts as none."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    is_empty = "# Model Card for Model ID" in text and text.count("[More Information Needed]") > 9
    return None if not text or is_empty else text


def model_card(folder: Path) -> str:
    """Returns a card made from nothing but the files of a model or an adapter."""
    name, adapter = folder.resolve().name, read_json(folder / ADAPTER_CONFIG)
    config = read_json(folder / "config.json")
    if not (config or adapter) and any(folder.glob("*.gguf")):
        return _gguf_card(folder, name)
    loading = read_loading(folder)
    ours = loading.method if loading.method in methods("quantizer") else "mpi" if loading.mpi else None
    used = [ours] if config and ours else []
    data = ModelCardData(
        name,
        used,
        base_model=adapter.get("base_model_name_or_path"),
        hyperparameters=adapter_settings(adapter) if adapter else {},
        tags=[loading.method] if config and loading.method and loading.method != ours else [],
        library_name="peft" if adapter and not config else "transformers",
        loading=loading,
        made_here=bool(used),
    )
    return render_card(data)


def _gguf_card(folder: Path, name: str) -> str:
    files = sorted(file.name for file in folder.glob("*.gguf"))
    head = huggingface_hub.ModelCardData(library_name="gguf", model_name=name, tags=["hf_rb", "gguf"])
    commands = [f"llama-cli --hf-repo path/to/{name} --hf-file {file}" for file in files]
    return _page(head, name, "GGUF files, which llama.cpp and what is built on it run.", "Run it", commands)


def cache_card(folder: Path) -> str:
    """Returns the dataset card of a teacher cache."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    identity, shards = manifest["identity"], manifest["shards"].values()
    name, teacher = folder.resolve().name, public_name(identity["model_name"])
    predictions, sequences = (sum(shard[key] for shard in shards) for key in ("tokens", "sequences"))
    head = huggingface_hub.DatasetCardData(pretty_name=name, tags=["hf_rb", "knowledge-distillation", "teacher-cache"])
    text = (
        f"What the teacher `{teacher}` predicts, made {BY} (`hf-rb cache-teacher`): the {identity['k']} most "
        f"probable tokens and the label, with their log-probabilities ({identity['dtype']}) and that of all other "
        f"tokens together, for each of {predictions:,} predictions in {sequences:,} sequences. A student trains on "
        "it without the teacher, on the data and with the tokenizer that were captured."
    )
    commands = [
        f'pip install "{hf_rb_requirement()}"',
        f"hf download path/to/{name} --repo-type dataset --local-dir {name}",
        f"hf-rb gkd RECIPE --teacher_cache {name}  # a recipe without `teacher_model_name_or_path`",
    ]
    return _page(head, name, text, "Train from it", commands)


def report_card(name: str) -> str:
    """Returns the README of a static Space, which shows a report as a page."""
    head = (
        f"title: {json.dumps(name)}\nemoji: 📈\ncolorFrom: blue\ncolorTo: gray\nsdk: static\npinned: false\n"
        "tags:\n- hf_rb"
    )
    return f"---\n{head}\n---\n\n# {name}\n\nA report of `hf-rb report`, made {BY}. It is one file, `index.html`.\n"


def _page(head: Any, name: str, text: str, heading: str, commands: list[str]) -> str:
    shell = "\n".join(["```bash", *commands, "```"])
    return f"---\n{head.to_yaml()}\n---\n\n# {name}\n\n{text}\n\n## {heading}\n\n{shell}\n"


def paths_in(text: str) -> list[str]:
    """Returns the words of a text that are absolute paths of this machine."""
    found = re.findall(r"""(?:^|[\s"'`(\[>=:,])(/[^\s"'`)\]<>,;]+)""", text)
    paths = dict.fromkeys(path.rstrip(".:") for path in found)
    return [path for path in paths if len(Path(path).parts) > 2 and Path(path).exists()]
