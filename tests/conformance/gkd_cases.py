"""Rows of GKD: all objectives, on the completions of the dataset and on given ones of the student."""

import torch
from datasets import Dataset, IterableDataset
from described import STEPS, Described, Row, batch, variants
from helpers.random_models import save_qwen3
from transformers import AutoTokenizer
from trl.experimental.utils import DataCollatorForChatML

from hf_rb import GKDConfig, GKDTrainer, tiny
from hf_rb.methods.registry import methods
from hf_rb.teachers import LocalTeacher
from hf_rb.utils import compat


VOCABULARY = 128
BATCHES = {
    "whole": batch(12),
    "4 x 3": batch(4, 3),
    "1 x 12": batch(1, 12),
    "padding-free": batch(4, 3, padding_free=True, max_length=None),
    "packed": batch(2, 2, packing=True, max_length=24),
    "2 processes": batch(6),
    "2 processes x 3": batch(2, 3),
}
GENERATED = {
    "whole": batch(8), "4 x 2": batch(4, 2), "1 x 8": batch(1, 8), "2 processes": batch(4), "2 processes x 2": batch(2, 2)
}  # fmt: skip
HALVES = {"whole": batch(2), "1 x 2": batch(1, 2), "2 processes": batch(1)}


def documents():
    """Twelve documents of unequal lengths with prompts; the last, of one token, has neither a prompt nor a prediction."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (5, 12, 3, 9, 14, 4, 8, 7, 2, 11, 6, 1):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        start = length // 4 or int(length > 1)
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return rows


def halves():
    """Documents of which every second has nothing to predict."""
    return [row for document in documents()[:STEPS] for row in (document, {"input_ids": [7], "labels": [7]})]


def outside():
    """The documents, with labels that the student alone has in the padding of its vocabulary."""
    more = len(AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")) + 3
    return [
        {**row, "labels": [*row["labels"][:-1], more] if len(row["labels"]) % 3 == 0 else row["labels"]}
        for row in documents()
    ]


def rows():
    """Every objective as its record says, with every other choice of its flags, and what other fields make of it."""

    def row(name, objective, more=(), group="", minor=False, **keys):
        keys = {"objective": objective, "lmbda": 0.0, **keys}
        splits = HALVES if group.startswith("nothing") else None if keys["lmbda"] == 0 else GENERATED
        if splits is GENERATED:  # those that have a prompt
            keys["rows"] = documents()[:8]
        return Row(name, keys, (objective, *more), splits, group, minor)

    for name, entry in methods("objective").items():
        method = entry.method
        base = {"lmbda": 1.0, "temperature": 1.0} if method.completions == "student" else {}
        yield row(name, name, **base)
        for label, flags in variants(method):
            yield row(f"{name}, {label}", name, minor=True, **base, **flags)
        if method.mixes:
            yield row(f"{name}, mixed", name, ("llm_neo", "loca"), "mixed", True, kd_alpha=0.5, loca_alpha=0.95)
    exopd = {"reward_scale": 1.25, "lmbda": 1.0, "temperature": 1.0}
    yield row("jsd, beta", "jsd", beta=0.3)
    yield row("jsd, on-policy", "jsd", group="on-policy", lmbda=1.0)
    # From the dataset at the first step, from the student at the second.
    yield row("reverse_kl, either", "reverse_kl", group="either", lmbda=0.3)
    yield row("akl, code mixed", "akl", ("llm_neo",), "mixed", akl_head_rule="code", kd_alpha=0.5)
    yield row("loca", "forward_kl", ("llm_neo", "loca"), "mixed", loca_alpha=0.95, kd_alpha=0.9)
    yield row("exopd", "gopd", group="exopd", **exopd)
    yield row("exopd, tokens", "gopd", group="tokens", **exopd, gopd_aggregation="token-mean", gopd_logratio_clamp=0.5)
    yield row(
        "exopd, full", "gopd", group="full", **exopd, gopd_aggregation="seq-mean-token-sum", gopd_full_vocab=True
    )
    yield row("akl, half with nothing", "akl", group="nothing", akl_head_rule="code", kd_alpha=0.5, rows=halves())
    yield row("hpd, half with nothing", "hpd", group="nothing hpd", rows=halves())
    yield row("forward_kl, outside", "forward_kl", folders=("padded-student", "full-teacher"), rows=outside())


def off():
    """TRL's dense loss through the whole path of each from `messages`. TRL pads on the left, which rounds differently: so one row, or
    its collator.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")
    for beta in (0.0, 0.5, 1.0):
        for collator in ("ours", "TRL's"):
            keys = {
                "rows": tiny.load_dataset("math", config="messages", size=16).select_columns("messages"),
                "folders": ("full-student", "full-teacher"),
                "beta": beta,
                "lmbda": 0.0,
                "optim": "adamw_torch",
                "learning_rate": 1e-3,
                "max_grad_norm": 1.0,
                "per_device_train_batch_size": 1 if collator == "ours" else 4,
                "gradient_accumulation_steps": 2,
            }
            if collator == "TRL's":
                keys |= {
                    "data_collator": DataCollatorForChatML(tokenizer=tokenizer, max_length=1024),
                    "dataset_kwargs": {"skip_prepare_dataset": True},
                    "remove_unused_columns": False,
                }
            yield f"beta {beta}, collator {collator}", keys


class Injected(GKDTrainer):
    """Takes each completion from a function of its prompt, so that it does not depend on the batch."""

    def _sample(self, writer, prompts):
        completions = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(int(prompt.sum()) + self.state.global_step)
            length = int(torch.randint(1, 9, (1,), generator=generator))
            completions.append(torch.randint(3, VOCABULARY, (length,), generator=generator).to(prompt))
        return completions


class GKD(Described):
    def save_models(self, folder, vocabulary=VOCABULARY, padding=32):
        """A random student and a wider teacher with more padding in its vocabulary; both with TRL's equal ones; and a student with more."""
        full = len(AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer"))
        for name, size in {"student": vocabulary, "full-student": full, "padded-student": full + 16}.items():
            save_qwen3(folder / name, vocab_size=size)
        for name, size in {"teacher": vocabulary + padding, "full-teacher": full}.items():
            save_qwen3(folder / name, seed=1, hidden_size=96, vocab_size=size)

    def data(self):
        return Dataset.from_list(documents())

    def local(self, model=None, **kwargs):
        """The saved teacher, or a model, with the embedded tokenizer."""
        tokenizer = AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")
        return LocalTeacher(model or str(self.models / "teacher"), tokenizer=tokenizer, **kwargs)

    def make(self, trainer_class, config_class, config, objects):
        student, teacher = (str(self.models / one) for one in objects.get("folders", ("student", "teacher")))
        keywords = {key: objects[key] for key in ("peft_config", "data_collator", "teacher") if key in objects}
        if issubclass(trainer_class, GKDTrainer):
            keywords.setdefault("teacher", self.local(teacher))
        else:
            keywords["teacher_model"] = teacher
        given = objects.get("rows") or documents()
        return trainer_class(
            student,
            args=config_class(**{"train_sampling_strategy": "sequential", **config}),
            train_dataset=given if isinstance(given, Dataset | IterableDataset) else Dataset.from_list(given),
            processing_class=AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer"),
            **keywords,
        )


TRAINER = GKD(
    "gkd", GKDTrainer, GKDConfig, compat.GKDTrainer, compat.GKDConfig, BATCHES, Injected, {row.name: row for row in rows()},
    dict(off()), rel=5e-5, weights_abs=1e-6,
)  # fmt: skip
