"""Models with other LM heads, in two processes: the same training, one outcome for all processes, and sharded weights."""

from pathlib import Path

import torch
import transformers
from gkd_cases import TRAINER
from helpers.tiny_zoo import build_tiny
from torch.distributed.fsdp import fully_shard

from hf_rb.ops.lm_head_queries import lm_head_logits
from hf_rb.ops.logit_source import LogitSource
from hf_rb.utils import compat


ROWS = ("forward_kl", "jsd, on-policy")
SHARDED = ("LlamaForCausalLM", "ModernBertDecoderForCausalLM")
INPUTS = {"input_ids": torch.arange(20, 32).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def save_models(folder):
    """A student whose head is more than a product, and a teacher with a cap."""
    for name, kind in {"student": "ModernBertDecoderForCausalLM", "teacher": "Gemma2ForCausalLM"}.items():
        build_tiny(getattr(transformers, kind), final_logit_softcapping=2.0).save_pretrained(Path(folder, name))


def logits(source, model):
    states, _ = source.output(model, INPUTS)
    with source.head(model) as head:
        return lm_head_logits(states.flatten(0, 1), head)


def sharded(name):
    """Whether a model's logits are its head's, and how far those of the loop are from its own, with the weights spread by FSDP2."""
    model = build_tiny(getattr(transformers, name))
    with torch.no_grad():
        expected = model(**INPUTS).logits.flatten(0, 1)
    for layer in model.model.layers:
        fully_shard(layer, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    source = LogitSource()
    found = compat.ForwardRedirection()(model, model, logits, source, model)
    return source.is_head(model), (found - expected).abs().max().item()


def outcome():
    """What each process takes, of which the second alone has another cap in its configuration than its class applies."""
    model = build_tiny(transformers.LlamaForCausalLM)
    model.config.final_logit_softcapping = 20.0 if torch.distributed.get_rank() else None
    outcomes = [None, None]
    torch.distributed.all_gather_object(outcomes, LogitSource().is_head(model))
    return outcomes


def two_processes(models, folder):
    """The rows on both processes, in half the batch, then what both see of single models."""
    TRAINER.models = models
    results = {name: TRAINER.train_row(TRAINER.rows[name], "2 processes")[:2] for name in ROWS}
    results["outcome"] = outcome()
    results |= {name: sharded(name) for name in SHARDED}
    return results
