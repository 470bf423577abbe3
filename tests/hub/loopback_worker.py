"""Pushes to a server on this machine that speaks the Hub's protocol, and prints what arrived as JSON.

A process of its own, because `huggingface_hub` reads its endpoint and its offline switch when it is imported: the tests set the
latter. `python loopback_worker.py FOLDER`.
"""

import base64
import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


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

    def _answer(self, value: dict | None = None, code: int = 200) -> None:
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
        elif path.startswith("/api/models/") and path.removeprefix("/api/models/") in self.repos:
            self._answer({"id": path.removeprefix("/api/models/"), "sha": "0" * 40, "siblings": []})
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            self._file(repo, rest.partition("/")[2])  # whatever the revision: there is one commit
        else:
            self._answer({"error": "not found"}, 404)

    do_HEAD = do_GET

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
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
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
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
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
    args.output_dir, args.hub_model_id = str(folder / "adapted"), "me/trained-adapter"
    trainer = SFTTrainer(student, args, train_dataset=tiny.load_dataset("math", size=16), peft_config=lora)
    trainer.train()
    trainer.push_to_hub()
    AutoTokenizer.from_pretrained("me/trained")
    return codes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
