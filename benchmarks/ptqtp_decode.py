"""Greedy decoding end to end: PTQTP against the same model in bfloat16 and float32, and against llama.cpp.

    python benchmarks/ptqtp_decode.py MODEL_FOLDER [--llama FOLDER --gguf FILE]

writes `benchmarks/results/ptqtp_decode.json` and the table `ptqtp_decode.md` beside it. Every cell is a process of its own; it
reads a prompt of 32 tokens, generates 64 with a cache, and does that again. Both clocks are read: on a machine with other work
the processor time of one thread is the one to compare. llama.cpp is not a dependency: install a binding into a folder
(`pip install --no-deps --target FOLDER llama-cpp-python`, or `xllamacpp`) and name that, with a GGUF of the model.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median


RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 32, 64, 5
# name, whether it is quantized, type of everything else, activations
MODELS = [
    ("bfloat16", False, "bfloat16", None),
    ("float32", False, "float32", None),
    ("PTQTP, rest in bfloat16", True, "bfloat16", "exact"),
    ("PTQTP, rest in float32", True, "float32", "exact"),
    ("PTQTP, rest in float32, int8 activations", True, "float32", "int8"),
]

PLAIN = ("bfloat16", "float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a causal language model in 16 bits")
    parser.add_argument("--llama", type=Path, help="folder into which a binding of llama.cpp was installed")
    parser.add_argument("--gguf", type=Path, help="the model for llama.cpp")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        folder, dtype, activations, threads = args.cell
        cell = llama_cell if dtype == "gguf" else cell_of_ours
        print(json.dumps(cell(args, Path(folder), dtype, activations, int(threads))))
        return

    result = {"model": args.model.resolve().name, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        quantized = Path(scratch) / "quantized"
        subprocess.run(
            [sys.executable, "-m", "hf_rb.cli", "quantize", args.model, quantized, "--stream", "--json"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        cells = [(name, quantized if packed else args.model, dtype, str(a)) for name, packed, dtype, a in MODELS]
        if args.llama:
            cells.append(("llama.cpp, Q4_1", args.gguf, "gguf", "None"))
        for threads in args.threads:
            for name, folder, dtype, activations in cells:
                row = {"name": name, "threads": threads} | run(args, folder, dtype, activations, threads)
                result["rows"].append(row)
                print(row, flush=True)
    result["environment"] = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ptqtp_decode.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "ptqtp_decode.md").write_text(render(result), encoding="utf-8")


def run(args: argparse.Namespace, folder: Path, dtype: str, activations: str, threads: int) -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, args.model, "--cell", folder, dtype, activations, str(threads)]
    command += ["--llama", args.llama, "--gguf", args.gguf] if args.llama else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def cell_of_ours(args: argparse.Namespace, folder: Path, dtype: str, activations: str, threads: int) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    from hf_rb import PTQTPConfig
    from hf_rb.utils import compat

    torch.set_num_threads(threads)
    before = peak()
    options = {} if activations == "None" else {"quantization_config": PTQTPConfig(activations=activations)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    prompt = torch.arange(1, PROMPT_TOKENS + 1)[None]

    def decode() -> Clock:
        with torch.inference_mode():
            output = model(input_ids=prompt, use_cache=True)
            clock = Clock()
            for _ in range(NEW_TOKENS):
                token = output.logits[:, -1:].argmax(dim=-1)
                output = model(input_ids=token, use_cache=True, **compat.cache_of(output))
            return clock.stop()

    files = folder.glob("*.safetensors")
    return measure(decode, before) | {"file_bytes": sum(file.stat().st_size for file in files)}


def llama_cell(args: argparse.Namespace, gguf: Path, dtype: str, activations: str, threads: int) -> dict:
    sys.path.insert(0, str(args.llama))
    before = peak()
    decode, about = (llama_cpp_python if (args.llama / "llama_cpp").is_dir() else xllamacpp)(gguf, threads)
    return measure(decode, before) | {"file_bytes": gguf.stat().st_size, "about": about}


class Clock:
    """Seconds by the clock and of the processor, all threads."""

    def __init__(self):
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def stop(self) -> "Clock":
        self.wall, self.processor = time.perf_counter() - self.wall, time.process_time() - self.processor
        return self


def measure(decode: Callable[[], Clock], before: int) -> dict:
    decode()
    clocks = [decode() for _ in range(REPEATS)]
    wall, processor = ([NEW_TOKENS / getattr(clock, name) for clock in clocks] for name in ("wall", "processor"))
    return {
        "tokens_per_second": median(wall),
        "spread": (max(wall) - min(wall)) / median(wall),
        "tokens_per_processor_second": median(processor),
        "processor_spread": (max(processor) - min(processor)) / median(processor),
        "peak_bytes": peak(),
        "peak_growth": peak() - before,
    }


def llama_cpp_python(gguf: Path, threads: int) -> tuple[Callable[[], Clock], str]:
    """A function that decodes and times that without the prompt, and a line about the build."""
    import llama_cpp

    model = llama_cpp.Llama(str(gguf), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def decode() -> Clock:
        model.reset()
        model.eval(list(range(1, PROMPT_TOKENS + 1)))
        token, clock = model.sample(temp=0.0), Clock()
        for _ in range(NEW_TOKENS):
            model.eval([token])
            token = model.sample(temp=0.0)
        return clock.stop()

    return decode, f"llama-cpp-python {llama_cpp.__version__}: {llama_cpp.llama_print_system_info().decode()}"


def xllamacpp(gguf: Path, threads: int) -> tuple[Callable[[], Clock], str]:
    """The same by xllamacpp, whose wheels are compiled for AVX2. Its processor time is that of decoding two lengths, the
    difference of which is `NEW_TOKENS`: the prompt's is in both."""
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(gguf), 512, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = llama.Server(params)
    options = {"temperature": 0.0, "ignore_eos": True, "cache_prompt": False}

    def generate(tokens: int) -> tuple[float, float]:
        clock = Clock()
        prompt = list(range(1, PROMPT_TOKENS + 1))
        timings = server.handle_completions({"prompt": prompt, "n_predict": tokens} | options)["timings"]
        return timings["predicted_ms"] / 1e3 * tokens / timings["predicted_n"], clock.stop().processor

    def decode() -> Clock:
        clock, (_, first) = Clock(), generate(1)
        clock.wall, both = generate(NEW_TOKENS + 1)
        clock.wall *= NEW_TOKENS / (NEW_TOKENS + 1)
        clock.processor = both - first
        return clock

    return decode, f"xllamacpp {llama.__version__}: {llama.get_system_info()}"


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def render(result: dict) -> str:
    """The table in Markdown."""
    header = [
        "model",
        "threads",
        "tokens/s",
        "over 16/32 bits",
        "tokens/processor s",
        "over 16/32 bits",
        "peak memory, MB",
        "of which the model, MB",
        "file, MB",
    ]
    lines = [
        f"# Decoding {result['model']} on a CPU",
        "",
        f"Greedy decoding of {result['new_tokens']} tokens behind a prompt of {result['prompt_tokens']}, one sequence, "
        "every cell in a process of its own: median of five repeats, with their whole spread.",
        "",
        "| " + " | ".join(header) + " |",
        "|---|" + "---:|" * 8,
    ]
    for row in result["rows"]:
        plain = [one for one in result["rows"] if one["threads"] == row["threads"] and one["name"] in PLAIN]
        cells = [row["name"], str(row["threads"])]
        for speed, spread in (("tokens_per_second", "spread"), ("tokens_per_processor_second", "processor_spread")):
            best = max(one[speed] for one in plain)
            cells += [f"{row[speed]:.1f} ±{row[spread] / 2:.0%}", f"{row[speed] / best:.2f}"]
        cells += [f"{row[key] / 1e6:.0f}" for key in ("peak_bytes", "peak_growth", "file_bytes")]
        lines.append("| " + " | ".join(cells) + " |")
    about = sorted({row["about"] for row in result["rows"] if "about" in row})
    environment = result["environment"]
    lines += [
        "",
        "- `over 16/32 bits` divides by the faster of the two unquantized models at the same number of threads. Processor time "
        "counts all threads, waiting ones too: compare it at one thread.",
        "- Peak memory is that of the process; `of which the model` is its growth since the libraries were imported.",
        *(f"- {line}" for line in about),
        f"- {environment['machine']}, {environment['cores']} cores, load average at the end {environment['load']:.1f}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
