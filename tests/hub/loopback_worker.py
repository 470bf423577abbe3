"""Pushes to a server on this machine that speaks the Hub's protocol, and prints what arrived as JSON.

A process of its own, because `huggingface_hub` reads its endpoint and its offline switch when it is imported: the tests set the
latter. `python loopback_worker.py FOLDER [REPO ...]` also runs the examples of the
cards of these repositories, and `--all-snippets` those of all.
"""

import base64
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


TOKEN = "hf_loopback"


class Hub(BaseHTTPRequestHandler):
    """create_repo, preupload, LFS batch and upload, commit; everything else is not found."""

    protocol_version = "HTTP/1.1"
    repos: dict[str, dict[str, bytes]] = {}
    private: dict[str, bool] = {}
    stored: dict[str, bytes] = {}
    tokens: set[str | None] = set()
    unknown: list[str] = []

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, value: dict | list | None = None, code: int = 200) -> None:
        body = json.dumps(value or {}).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass

    def _endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            self._answer({"name": "me", "type": "user", "orgs": []})
        elif "/tree/" in path and (files := self.repos.get(self._repo(path.partition("/tree/")[0]))):
            sizes = {name: len(data) for name, data in files.items()}
            self._answer([{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in sizes.items()])
        elif path.startswith("/api/") and (repo := self._repo(path.partition("/revision/")[0])) in self.repos:
            siblings = [{"rfilename": name} for name in self.repos[repo]]
            self._answer({"id": repo, "sha": "0" * 40, "siblings": siblings})
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            self._file(repo, rest.partition("/")[2])  # whatever the revision: there is one commit
        else:
            self._answer({"error": "not found"}, 404)

    do_HEAD = do_GET

    def _repo(self, path: str) -> str:
        """Name of a repository in `repos`: `me/model`, `datasets/me/cache`, `spaces/me/report`."""
        return path.removeprefix("/api/").removeprefix("models/")

    def _file(self, repo: str, name: str) -> None:
        data = self.repos.get(repo, {}).get(name)
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def do_PUT(self) -> None:
        self.stored[self.path.removeprefix("/lfs/")] = self._body()
        self._answer()

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self._body()
        if not path.startswith("/lfs/"):
            self.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            asked = json.loads(body)
            kind = asked.get("type") or "model"
            assert (kind == "space") == (asked.get("sdk") == "static")
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            repo = repo if kind == "model" else f"{kind}s/{repo}"
            existed = repo in self.repos
            self.repos.setdefault(repo, {})
            self.private.setdefault(repo, asked.get("visibility") == "private" or bool(asked.get("private")))
            self._answer({"url": f"{self._endpoint()}/{repo}", "name": repo}, 409 if existed else 200)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                for one in files
            ]
            self._answer({"files": [one | {"shouldIgnore": False} for one in modes]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            href = f"{self._endpoint()}/lfs/"
            self._answer(
                {
                    "transfer": "basic",
                    "objects": [one | {"actions": {"upload": {"href": href + one["oid"]}}} for one in objects],
                }
            )
        elif "/commit/" in path:
            repo = self._repo(path).partition("/commit/")[0]
            self._commit(self.repos[repo], body)
            self._answer(
                {"success": True, "commitUrl": f"{self._endpoint()}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40}
            )
        else:
            self.unknown.append(path)
            self._answer({"error": "not found"}, 404)

    def _commit(self, repo: dict[str, bytes], body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repo[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self.stored[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"] and len(data) == value["size"]
                repo[value["path"]] = data


def main(folder: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ.update(
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_TOKEN=TOKEN,
        HF_HOME=str(folder / "home"),
        TRL_EXPERIMENTAL_SILENCE="1",
        TOKENIZERS_PARALLELISM="false",
        CUDA_VISIBLE_DEVICES="",
    )
    os.environ.pop("HF_HUB_OFFLINE", None)
    exit_codes = push_everything(folder)
    snippets = [repo for repo in Hub.repos if repo in sys.argv or "--all-snippets" in sys.argv]
    print(
        json.dumps(
            {
                "exit_codes": exit_codes,
                "repos": {
                    repo: {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
                    for repo, files in Hub.repos.items()
                },
                "cards": {repo: files.get("README.md", b"").decode() for repo, files in Hub.repos.items()},
                "private": Hub.private,
                "tokens": sorted(map(str, Hub.tokens)),
                "unknown": Hub.unknown,
                "snippets": {repo: run_snippet(folder, repo) for repo in snippets},
            }
        )
    )


def push_everything(folder: Path) -> dict[str, int]:
    from hf_rb.cli import main as hf_rb

    student = str(folder / "student")
    codes = {"dry": hf_rb(["push", student, "me/dry", "--dry-run"])}
    codes["model"] = hf_rb(
        ["push", student, "me/model", "--private", "--results", str(folder / "eval.json"), "--json"]
    )
    codes["again"] = hf_rb(["push", student, "me/model"])

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_rb import PTQTPConfig, SFTConfig, SFTTrainer, apply_mpi, fold_mpi, tiny

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(student, quantization_config=PTQTPConfig(group_size=32))
    model.push_to_hub("me/quantized")
    before = model(torch.arange(8)[None]).logits
    loaded = AutoModelForCausalLM.from_pretrained("me/quantized")  # down again
    codes["quantized loads from the Hub"] = int(not torch.equal(loaded(torch.arange(8)[None]).logits, before))

    mixture = apply_mpi(AutoModelForCausalLM.from_pretrained(tiny.resolve("tiny:moe"), dtype=torch.float32))
    before = mixture(torch.arange(8)[None]).logits
    fold_mpi(mixture).push_to_hub("me/folded")
    loaded = AutoModelForCausalLM.from_pretrained("me/folded")  # an ordinary mixture of experts
    codes["folded routers load from the Hub"] = int(not torch.equal(loaded(torch.arange(8)[None]).logits, before))

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(student), LoraConfig(target_modules=["q_proj"]))
    adapted.push_to_hub("me/adapter")

    args = SFTConfig(
        output_dir=str(folder / "run"), hub_model_id="me/trained", max_steps=2, save_steps=1, profit_threshold=0.01,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(student, args, train_dataset=tiny.load_dataset("math", size=16))
    trainer.train()
    Path(args.output_dir, "teacher_cache").mkdir()
    Path(args.output_dir, "teacher_cache", "shard.safetensors").write_bytes(b"cache")
    Path(args.output_dir, "optimizer.pt").write_bytes(b"state")
    trainer.push_to_hub(dataset_name="tiny:math")

    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    base = "me/model"  # which is on the Hub
    args.output_dir, args.hub_model_id = str(folder / "adapted"), "me/trained-adapter"
    trainer = SFTTrainer(base, args, train_dataset=tiny.load_dataset("math", size=16), peft_config=lora)
    trainer.train()
    trainer.push_to_hub()
    AutoTokenizer.from_pretrained("me/trained")
    codes |= push_other_things(folder, hf_rb, model, student)
    return codes


def push_other_things(folder: Path, hf_rb, model, student: str) -> dict[str, int]:
    """What has no card of its own, other formats and other kinds of repositories."""
    from huggingface_hub import snapshot_download
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, codes = AutoTokenizer.from_pretrained(student), {}
    tokenizer.chat_template = None  # as that of a base model
    for name, save in {
        "base": AutoModelForCausalLM.from_pretrained(student).save_pretrained,
        "packed-base": model.save_pretrained,
        "peft": get_peft_model(AutoModelForCausalLM.from_pretrained("me/model"), LoraConfig(r=4)).save_pretrained,
    }.items():
        save(folder / name)
        tokenizer.save_pretrained(folder / name)
        codes[name] = hf_rb(["push", str(folder / name), f"me/{name}", "--json"])

    (folder / "gguf").mkdir()
    (folder / "gguf" / "model-q4.gguf").write_bytes(b"GGUF")
    codes["gguf"] = hf_rb(["push", str(folder / "gguf"), "me/gguf"])
    (folder / "report.html").write_text("<p>One.</p>")
    codes["report"] = hf_rb(["push", str(folder / "report.html"), "me/report"])
    cache = ["cache-teacher", "akl/tiny-cpu", str(folder / "cache"), "--k", "4", "--max_length", "64"]
    codes["capture"] = hf_rb([*cache, "--dataset_train_split", "test"])
    codes["cache"] = hf_rb(["push", str(folder / "cache"), "me/cache"])
    down = snapshot_download("me/cache", repo_type="dataset")
    same = all((Path(down) / file.name).read_bytes() == file.read_bytes() for file in (folder / "cache").iterdir())
    return codes | {"cache comes down": int(not same)}


def run_snippet(folder: Path, repo: str) -> str:
    """Runs the Python of a card where nothing can be imported but what its `pip install` line names; returns what went wrong."""
    card = Hub.repos[repo].get("README.md", b"").decode()
    blocks = dict(re.findall(r"```(bash|python)\n(.*?)```", card, flags=re.DOTALL))
    if "python" not in blocks:
        return ""
    environment = packages_of(shlex.split(blocks["bash"])[2:], folder / "environments")
    command = [sys.executable, "-S", "-s", "-W", "ignore", "-c", blocks["python"]]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(environment)})
    return done.stderr[-2000:] if done.returncode else "" if "generate(" not in card or done.stdout else "no output"


def packages_of(requirements: list[str], folder: Path) -> Path:
    """Makes a folder of links to what pip would install for the requirements, and to nothing else."""
    root, wanted, found = Path(__file__).parents[2], [Requirement(one) for one in requirements], {}
    while wanted:
        one = wanted.pop()
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        if name in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        if name == "hf-rb":  # this source tree, whatever is installed
            found[name] = [root / "hf_rb", root / "model_cards"]
            project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
            wanted += map(Requirement, project["dependencies"])
            continue
        distribution = metadata.distribution(one.name)
        assert not one.specifier or distribution.version in one.specifier, one
        tops = {file.parts[0] for file in distribution.files or () if not str(file).startswith("..")}
        found[name] = [Path(distribution.locate_file(top)) for top in tops if top != "__pycache__"]
        wanted += map(Requirement, distribution.requires or ())
    target = folder / hashlib.sha256(" ".join(sorted(found)).encode()).hexdigest()[:16]
    target.mkdir(parents=True, exist_ok=True)
    for path in {path for paths in found.values() for path in paths}:
        if not (target / path.name).exists():
            (target / path.name).symlink_to(path)
    return target


if __name__ == "__main__":
    main(Path(sys.argv[1]))
