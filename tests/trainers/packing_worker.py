"""Packed training in two processes, one of which has a batch that is not packed: started by `test_packed_rows.py` with torchrun."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_rb import GKDConfig, GKDTrainer, SFTConfig, SFTTrainer, tiny
from hf_rb.teachers import LocalTeacher


def build(family, tokenizer, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    sizes |= {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "llama": {"intermediate_size": 64}}[family]
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, bos_token_id=2, eos_token_id=2, pad_token_id=0, **sizes)
    )


def main(folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")
    # Two short sequences and a long one: with a batch of one row, one process gets a row of two and the other a row of one.
    rows = Dataset.from_list([{"input_ids": list(range(10, 10 + size))} for size in (20, 20, 40, 20, 20, 40)])
    run = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=2, per_device_train_batch_size=1, packing=True,
               max_length=40, save_strategy="no", report_to="none", disable_tqdm=True, output_dir=folder, lr_scheduler_type="constant")  # fmt: skip
    results = {}
    for name, family, teacher in (
        ("sft", "opt", None),
        ("sft", "llama", None),
        ("gkd", "llama", "opt"),
        ("gkd", "llama", "llama"),
    ):
        common = {"train_dataset": rows, "processing_class": tokenizer}
        if name == "sft":
            trainer = SFTTrainer(build(family, tokenizer), SFTConfig(**run), **common)
        else:
            source = LocalTeacher(build(teacher, tokenizer, 1), tokenizer=tokenizer)
            trainer = GKDTrainer(build(family, tokenizer), args=GKDConfig(lmbda=0.0, **run), teacher=source, **common)
        try:
            trainer.train()
            message = f"trained {trainer.state.global_step}"
        except ValueError as error:
            message = str(error)
        results[f"{name} {family} {teacher}"] = message
    rank = torch.distributed.get_rank()
    Path(folder, f"result-{rank}.txt").write_text("\n".join(f"{key}: {value}" for key, value in results.items()))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
