"""Whether models keep packed sequences apart is measured, for models that do and for models that do not."""

import inspect

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_rb.ops.packing import is_packed, leak_message, measure_leak


SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=100, bos_token_id=1, eos_token_id=2
)
GPT = dict(n_layer=2, n_head=2, vocab_size=100, bos_token_id=1, eos_token_id=2)
MOE = dict(num_key_value_heads=1, head_dim=16, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2)
APART = {
    "llama": SIZES | dict(intermediate_size=64),
    "gpt2": GPT | dict(n_embd=32),
    "gpt_neox": SIZES | dict(intermediate_size=64),
    "gemma3_text": SIZES | dict(intermediate_size=64, num_key_value_heads=1, head_dim=16, sliding_window=8),
    "qwen3_moe": SIZES | MOE,
}
MIXED = {
    "opt": SIZES | dict(ffn_dim=64, word_embed_proj_dim=32),
    "bloom": GPT | dict(hidden_size=32),
    "falcon": SIZES,
    "falcon:alibi": SIZES | dict(alibi=True),
    "mpt": dict(d_model=32, n_layers=2, n_heads=2, vocab_size=100),
    "mamba": SIZES,
    "mamba2": SIZES | dict(num_heads=4, head_dim=16, n_groups=1),
    "xglm": dict(d_model=32, num_layers=2, attention_heads=2, ffn_dim=64, vocab_size=100),
}
LENGTHS = (9, 14, 6)


def build(name, fields):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split(":")[0], **fields)).train()


def packed_batch(*more):
    ids = torch.randint(3, 100, (1, sum(LENGTHS) + sum(more)), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(length) for length in LENGTHS + more])[None]}


def mask_call(backbone):
    """How a backbone makes its attention mask."""
    source = inspect.getsource(backbone.forward)
    return source[source.index("create_causal_mask(") :].split("\n        )")[0]


KINDS = ["float32", "bfloat16", "autocast"]


def leak_in(model, kind, batch):
    model.to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        return measure_leak(model, batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", APART)
def test_models_that_separate(name, kind):
    assert leak_in(build(name, APART[name]), kind, packed_batch()).ratio <= 1


@pytest.mark.parametrize("name", MIXED)
def test_models_that_mix(name):
    model = build(name, MIXED[name])
    if name.startswith("falcon") and "position_ids=position_ids" in mask_call(type(model.transformer)):
        assert leak_in(model, "float32", packed_batch()).ratio <= 1
        pytest.skip(f"Falcon keeps packed rows apart in transformers {transformers.__version__}.")
    for kind in KINDS:
        leak = leak_in(model, kind, packed_batch())
        assert leak.ratio > 1, kind
    message = leak_message(model, leak)
    assert f"{type(model).__name__} does not keep the sequences of a packed row apart" in message
    assert f"differ by {leak.difference:.2g}" in message and "`packing: false`" in message


def test_an_attention_mask_beside_positions_is_a_leak():
    """TRL hands both to the model where a collator makes both, and transformers then takes the row for one sequence."""
    model, batch = build("llama", APART["llama"]), packed_batch()
    mask = torch.ones_like(batch["input_ids"])
    assert measure_leak(model, batch | {"attention_mask": mask}).ratio <= 1  # as GKD runs it: without the mask
    assert measure_leak(model, batch, attention_mask=mask).ratio > 1


def test_a_model_that_counts_positions_from_the_start_of_the_row():
    """It separates, but a packed sequence is not what it is by itself."""
    model = build("gpt2", APART["gpt2"] | dict(initializer_range=0.2))
    wpe = model.transformer.wpe
    wpe.register_forward_pre_hook(lambda module, args: (torch.arange(args[0].shape[-1]).expand_as(args[0]),))
    for kind in ("float32", "autocast"):
        assert leak_in(model, kind, packed_batch()).ratio > 1


def test_capacity_of_experts_is_no_leak():
    """Experts that take no more than half of all tokens: rows compete for them, packed or not, and every token may be dropped."""
    model = build("qwen3_moe", APART["qwen3_moe"] | dict(initializer_range=0.3))

    def drop(module, args, output):
        rank = output.norm(dim=-1).flatten().argsort().argsort().view(output.shape[:-1])
        return output * (rank >= rank.numel() / 2).unsqueeze(-1)

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(drop)
    batch = packed_batch()
    states = [model.eval().model(**one)[0][:, :9] for one in (batch, {"input_ids": batch["input_ids"][:, :9]})]
    assert (states[0] - states[1]).norm() > 0.01 * states[1].norm()  # the rows do compete
    assert measure_leak(model, batch).ratio <= 1


def test_the_model_with_adapters():
    for name, sizes, is_leaking in (("opt", MIXED["opt"], True), ("llama", APART["llama"], False)):
        model = get_peft_model(
            build(name, sizes), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        )
        leak = measure_leak(model, packed_batch())
        assert (leak.ratio > 1) == is_leaking
        assert leak_message(model, leak).startswith(f"{type(model.get_base_model()).__name__} does not")


def test_nothing_is_left_behind():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, hidden):
            self.calls += 1
            return hidden + 0 * torch.rand_like(hidden)

    model = build("opt", MIXED["opt"] | dict(dropout=0.5))
    model.model.decoder.layers[0].activation_fn = counter = Counting()
    model.model.decoder.layers[1].eval()
    modes = [module.training for module in model.modules()]
    forward, hooks = dict(model.__dict__), [len(module._forward_hooks) for module in model.modules()]
    batch = packed_batch()
    before, state = {key: value.clone() for key, value in batch.items()}, torch.get_rng_state()
    assert measure_leak(model, batch).ratio > 1
    assert counter.calls == 0 and torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert dict(model.__dict__) == forward and [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(batch[key], before[key]) for key in before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_which_batches_are_packed():
    batch = packed_batch()
    assert is_packed(batch)
    assert not is_packed({"input_ids": batch["input_ids"]})
    positions = torch.arange(29)[None]
    assert not is_packed(batch | {"position_ids": positions})
    assert not is_packed(batch | {"position_ids": positions * (positions < 20)})  # padding on the right, at position 0
    left = torch.tensor([[0] * 9 + [1] * 20])
    assert not is_packed(
        {"input_ids": batch["input_ids"], "position_ids": (left.cumsum(-1) - 1).clamp(0), "attention_mask": left}
    )
    assert not is_packed(batch | {"position_ids": torch.zeros(3, 1, 29)})  # three axes, of images
    two_rows = {
        "input_ids": batch["input_ids"].view(1, -1)[:, :28].view(2, 14),
        "position_ids": torch.arange(14).repeat(2, 1),
    }
    assert not is_packed(two_rows)


def test_a_batch_that_is_not_packed_has_no_leak():
    model = build("opt", MIXED["opt"])
    assert measure_leak(model, {"input_ids": packed_batch()["input_ids"]}) == (0.0, 0.0)


def test_a_model_that_gives_nan_is_not_judged():
    model = build("llama", APART["llama"])
    model.model.norm.weight.data.fill_(torch.nan)
    assert measure_leak(model, packed_batch()).ratio == 0
