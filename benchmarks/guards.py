"""What the guards cost: `python benchmarks/guards.py [MODEL ...]`.

Processor seconds on one thread, medians:

- the look at who reads the weights of a model's linear layers, as a share of quantizing by PTQTP, bar 5 %;
- the comparison of a model's LM head on 8 tokens, and that of a packed batch with one of its sequences, each once a run, beside one
  training step of 4 packed rows of 256 tokens.

The models are the embedded student, further folders, and a Llama of SmolLM2-135M's shape with random weights.

Writes `benchmarks/results/guards.json` and `.md`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch


RESULTS = Path(__file__).parent / "results"
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def timed(function, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return median(seconds)


def measure(folder: str, repeats: int) -> dict:
    from transformers import AutoModelForCausalLM

    from hf_rb import PTQTPConfig
    from hf_rb.ops.head_check import why_not_head
    from hf_rb.ops.packing import measure_leak
    from hf_rb.quantizers.loading import readers, selection

    looking = []

    def note(*args):
        start = time.process_time()
        found = readers.note_readers(*args)
        looking.append(time.process_time() - start)
        return found

    original, selection.note_readers = selection.note_readers, note
    try:
        quantizing = timed(
            lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=PTQTPConfig()), repeats
        )
    finally:
        selection.note_readers = original

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    ids = torch.randint(model.config.vocab_size, (4, 256))
    packed = {"input_ids": ids, "position_ids": torch.arange(64).repeat(4, 4)}

    def step():
        model(**packed, labels=ids).loss.backward()

    why_not_head(model)  # what a process does once is done
    assert measure_leak(model, packed).ratio <= 1
    return {
        "weights": model.num_parameters(),
        "quantizing": quantizing,
        "readers": median(looking[1:]),
        "first": looking[0],
        "step": timed(step, repeats),
        "head": timed(lambda: why_not_head(model), repeats),
        "packing": timed(lambda: measure_leak(model, packed), repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="more folders")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_rb import tiny

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**SMOLLM2)).bfloat16().save_pretrained(folder)
        folders = {"tiny:student": tiny.resolve("tiny:student"), **{Path(one).name: one for one in args.models}}
        folders["Llama of SmolLM2-135M's shape"] = folder
        results = {name: measure(str(one), args.repeats) for name, one in folders.items()}
    (RESULTS / "guards.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# What the guards cost",
        "",
        f"Processor time on one thread, medians of {args.repeats}. Bars: the look at readers at most 5 % of quantizing; the two of training one forward "
        "of 8 tokens and one of a packed batch, once a run.",
        "",
        "The look scans the source of the model's classes (3 ms) and runs one block of each kind on the meta device (11 ms of Python, whatever its "
        "sizes). So its share falls with the model: the bar is met from about a third of a second of quantizing on, and missed by models of less than some "
        "million weights, for which it is 10 to 20 ms.",
        "",
        "| model | weights | quantizing (ms) | readers (ms) | share | first look of a process (ms) | training step (ms) | head (ms) | packed batch (ms) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in results.items():
        ms = {key: f"{1000 * value:.0f}" for key, value in found.items() if key != "weights"}
        lines.append(
            f"| {name} | {found['weights'] / 1e6:.1f}M | {ms['quantizing']} | {ms['readers']} | {found['readers'] / found['quantizing']:.1%} | "
            f"{ms['first']} | {ms['step']} | {ms['head']} | {ms['packing']} |"
        )
    text = "\n".join(lines) + "\n"
    (RESULTS / "guards.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
