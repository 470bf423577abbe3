"""Rows of SFT: random label probabilities scatter around 1/vocabulary, on both sides of the thresholds."""

import torch
import trl
from datasets import Dataset, IterableDataset
from described import Described, Row, batch
from helpers.random_models import save_qwen3
from transformers import AutoTokenizer

from hf_rb import SFTConfig, SFTTrainer, tiny


EOS = AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer").eos_token_id
RANDOM = {"profit_threshold": 0.4, "profit_mode": "random"}
FLAGS = {
    "higher": {"profit_threshold": 0.0085},
    "lower": {"profit_threshold": 0.0085, "profit_mode": "lower"},
    "middle": {"profit_threshold": 0.006, "profit_mode": "middle", "profit_threshold_high": 0.011},
    "random": RANDOM,
    "sequence": {"profit_threshold": 0.0085, "profit_normalize": "sequence"},
    "random sequence": {**RANDOM, "profit_normalize": "sequence"},
}
GROUPS = {"higher": "threshold", "lower": "threshold", "middle": "threshold"}
ROWS = {"off": Row("off", {})} | {
    name: Row(name, keys, ("profit",), group=GROUPS.get(name, name)) for name, keys in FLAGS.items()
}
OFF = {
    "plain": {},
    "adam, accumulation, checkpointing": {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
    "packed, dft": {"packing": True, "max_length": 24, "loss_type": "dft"},
    "bf16, shuffled": {"bf16": True, "train_sampling_strategy": "random"},
}
# All documents are in one step, since packing reorders them: 12 padded rows, or 4 rows of up to 24 tokens.
BATCHES = {
    "whole": batch(12),
    "4 x 3": batch(4, 3),
    "1 x 12": batch(1, 12),
    "padding-free": batch(4, 3, padding_free=True, max_length=None),
    "packed": batch(2, 2, packing=True, max_length=24),
    "2 processes": batch(6),
    "2 processes x 3": batch(2, 3),
}


def documents():
    """Twelve documents of unequal lengths, with prompts without labels, half with an end; of one token, nothing is predicted."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (5, 12, 3, 9, 14, 4, 8, 1, 2, 11, 6, 7):
        ids = torch.randint(3, 128, (length - length % 2,), generator=generator).tolist() + [EOS] * (length % 2)
        rows.append({"input_ids": ids, "labels": [-100] * (length // 4) + ids[length // 4 :]})
    return rows


class SFT(Described):
    def save_models(self, folder):
        save_qwen3(folder / "student", vocab_size=128)

    def data(self):
        return Dataset.from_list(documents())

    def make(self, trainer_class, config_class, config, objects):
        rows = objects.get("rows") or documents()
        return trainer_class(
            str(self.models / "student"),
            config_class(**{"train_sampling_strategy": "sequential", **config}),
            train_dataset=rows if isinstance(rows, Dataset | IterableDataset) else Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer"),
            peft_config=objects.get("peft_config"),
        )


TRAINER = SFT(
    "sft", SFTTrainer, SFTConfig, trl.SFTTrainer, trl.SFTConfig, BATCHES, SFTTrainer, ROWS, OFF, frozenset({"entropy"}),
    rel=2e-5, abs=1e-6, weights_abs=1e-6,
)  # fmt: skip
