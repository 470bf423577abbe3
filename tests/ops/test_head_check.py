"""The tile loop's logits are the model's own: for every causal class that can be built tiny, adapted, packed and in half precision."""

import contextlib
import copy
import logging
import re
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import cpu_offload
from helpers.tiny_zoo import build_tiny
from peft import LoraConfig, get_peft_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_rb import PTQTPConfig
from hf_rb.ops.backbone import model_inputs, recorded_hidden, undisturbed
from hf_rb.ops.head_check import head_difference, why_not_head
from hf_rb.ops.lm_head_queries import lm_head_logits
from hf_rb.ops.logit_source import LogitSource


# What a class may do to its logits, off the values that do nothing. Scales of 0 to 1 and caps that logits of 30 feel.
FIELDS = {
    r"final_logit_softcapping|(output_)?logits?_soft_cap": 20.0,
    r"logit_scale|output_multiplier|lm_head_multiplier|logits_mup_width_multiplier": 0.3,
    r"logits_scaling": 3.0,
    r"decoder_bias": True,
}
CLASSES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
TESTED = re.search(r"^transformers==(.*)$", CONSTRAINTS.read_text(), re.MULTILINE)[1]
CANNOT_BE_BUILT = {
    "BltForCausalLM",
    "CohereCompassForCausalLM",
    "DbrxForCausalLM",
    "Dots3NoteForCausalLM",
    "Gemma3nForConditionalGeneration",
    "Gemma4AssistantForCausalLM",
    "Gemma4UnifiedAssistantForCausalLM",
}
# For their speed, these must not fall back. They are the kinds of scale, cap, bias and backbone that `head_of` knows.
FAST = (
    "CohereForCausalLM",
    "FalconH1ForCausalLM",
    "GPT2LMHeadModel",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "OPTForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
ODD = {
    "BertLMHeadModel": "`cls.predictions.transform.dense.weight` and 3 more of its parameters would get no gradient",
    "Gemma3ForConditionalGeneration": "the two differ by",  # its class has no cap, where its configuration has one
    "Llama4ForCausalLM": "its forward does not call its backbone, which is taken to be Llama4ForCausalLM",
    "ModernBertDecoderForCausalLM": "`lm_head.dense.weight` and 1 more of its parameters would get no gradient",
    "MptForCausalLM": "the two differ by",  # its class has no scale, where its configuration has one
    "MusicgenForCausalLM": "its output layer, ModuleList, has no weight",
    "RecurrentGemmaForCausalLM": "the two differ by",
    "xLSTMForCausalLM": "the two differ by",
}


def inputs_of(model):
    """Four rows, as MusicGen takes them for its codebooks."""
    ids = torch.randint(5, 100, (4, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits_of(model, source=None):
    """Logits as the tile loop has them."""
    source, inputs = source or LogitSource(), inputs_of(model)
    with torch.no_grad():
        states, _ = source.output(model, inputs)
    with source.head(model) as head:
        return lm_head_logits(states.flatten(0, 1), head).unflatten(0, (4, 6))


def own_logits(model):
    with torch.no_grad():
        return model(**model_inputs(inputs_of(model)), use_cache=False).logits.float()


def assert_close(actual, expected, relative=1e-4):
    assert (actual - expected).norm() <= relative * expected.norm()


def tiny(name, **fields):
    return build_tiny(getattr(transformers, name), **FIELDS | fields)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in CANNOT_BE_BUILT])
def test_logits_are_the_models_own(name):
    model, source = tiny(name), LogitSource()
    assert_close(logits_of(model, source), own_logits(model))
    if source.is_head(model):  # not on states of this model alone
        assert head_difference(model)[0] < 1e-4
        assert torch.isfinite(torch.tensor(head_difference(model)[0]))
    assert source.is_head(model) or name not in FAST


@pytest.mark.parametrize("name", sorted(CANNOT_BE_BUILT))
def test_the_list_of_what_cannot_be_built_is_true(name):
    """On the tested version to the letter; another may lack a class, and may build one."""
    is_tested = transformers.__version__ == TESTED
    if not is_tested and not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}.")
    assert hasattr(transformers, name)
    try:
        tiny(name)
    except Exception:  # of whatever kind the class raises
        return
    assert not is_tested, f"{name} can be built: take it off the list."
    pytest.skip(f"transformers {transformers.__version__} builds {name}, which {TESTED} does not.")


def test_logits_that_are_not_over_the_vocabulary_are_refused():
    model = tiny("xLSTMForCausalLM")
    model.config.vocab_size = 130
    with pytest.raises(
        ValueError, match=r"xLSTMForCausalLM gives logits of shape \(4, 6, 128\) for .* of 130, so that no"
    ):
        logits_of(model)
    with pytest.raises(
        ValueError, match="a Llama4ForCausalLM, returns no `last_hidden_state`, which Hidden-Align reads"
    ):
        model = tiny("Llama4ForCausalLM")
        with recorded_hidden(model):
            own_logits(model)


@pytest.mark.parametrize("name, reason", ODD.items(), ids=ODD)
def test_reasons(name, reason):
    assert reason in why_not_head(tiny(name))


def test_says_it_once(caplog):
    model, source = tiny("xLSTMForCausalLM"), LogitSource()
    with caplog.at_level(logging.WARNING):
        logits_of(model, source), logits_of(model, source)
    (record,) = caplog.records
    assert record.message.startswith("The logits of xLSTMForCausalLM are not its last hidden states times its LM head")
    assert "So its own logits are taken" in record.message
    caplog.clear()
    logits_of(tiny("LlamaForCausalLM"))
    assert not caplog.records


# What may be missing from a head without a trace in the logits of an untrained model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "CohereForCausalLM", "PhiForCausalLM"])
def test_half_precision_is_told_from_a_wrong_head(name, dtype):
    model = tiny(name).to(dtype)
    difference, tolerance = head_difference(model)
    assert difference < tolerance / 2
    own = type(model).forward
    changed = copy.deepcopy(model)
    changed.forward = lambda **kwargs: _capped(own(changed, **kwargs))
    assert "the two differ by" in why_not_head(changed)


def _capped(output):
    output.logits = 50 * (output.logits / 50).tanh()
    return output


@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "LlamaForCausalLM"])
def test_autocast_rounds_more(name):
    model = tiny(name)
    with torch.autocast("cpu", torch.bfloat16):
        difference, tolerance = head_difference(model)
    assert head_difference(model)[0] < 1e-4 < difference < tolerance / 2
    assert tolerance == 8 * torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("tied", [False, True])
def test_bias_of_zero_behind_the_backbone(tied):
    """It changes no logit yet, and a loss that does not know it would never train it."""
    model = tiny("LlamaForCausalLM", tie_word_embeddings=tied)
    assert why_not_head(model) is None
    own, model.extra = type(model).forward, torch.nn.Parameter(torch.zeros(128))

    def forward(**kwargs):
        output = own(model, **kwargs)
        output.logits = output.logits + model.extra
        return output

    model.forward = forward
    assert why_not_head(model) == "`extra` would get no gradient"
    model.extra.requires_grad_(False)
    assert why_not_head(model) is None


def test_a_head_of_zeros_is_not_guessed():
    model = tiny("LlamaForCausalLM", tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert why_not_head(model) == "on 8 tokens, the LM head is zero"
    assert_close(logits_of(model), own_logits(model))


# Adapters, quantization, placement


ADAPTERS = {
    "lora": ({"target_modules": ["q_proj"]}, None),
    "lora on the head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.lora_A.default.weight"),
    "whole head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, None),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 4]}}, "lm_head"),
    "tokens of the embeddings": ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}, None),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("initial", [True, False], ids=["new", "trained"])
@pytest.mark.parametrize("options, reason", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters(options, reason, initial, tied):
    model = tiny("LlamaForCausalLM", tie_word_embeddings=tied)
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **options)).eval()
    if not initial:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    source = LogitSource()
    assert_close(logits_of(model, source), own_logits(model))
    tied_tokens = tied and "trainable_token_indices" in options
    assert source.is_head(model) == (reason is None and not tied_tokens)
    if reason is not None:
        assert reason in why_not_head(model)
    with model.disable_adapter():
        assert_close(logits_of(model), own_logits(model))


@pytest.mark.parametrize("is_packed", [False, True])
def test_quantized(tmp_path, is_packed):
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    tiny("LlamaForCausalLM", tie_word_embeddings=False, **sizes).save_pretrained(tmp_path)
    config, source = PTQTPConfig(group_size=32), LogitSource()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    if is_packed:  # as wide as the vocabulary
        model.lm_head = model.model.layers[0].mlp.gate_proj
        assert "the weight of the LM head is packed (torch.uint8" in why_not_head(model)
    assert_close(logits_of(model, source), own_logits(model))
    assert source.is_head(model) != is_packed


def test_offloaded_head(tmp_path):
    """A device map that keeps the head's weight away but for its own forward."""
    model = tiny("LlamaForCausalLM", tie_word_embeddings=False)
    expected = own_logits(model)
    cpu_offload(model, execution_device="cpu")
    source = LogitSource()
    assert_close(logits_of(model, source), expected)
    assert not source.is_head(model)


# Leaves no trace


class _Counting(torch.nn.Module):
    """Counts tokens and draws random numbers, as routers do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(2, dtype=torch.long))

    def forward(self, hidden):
        self.seen += hidden.shape[1]
        self.register_buffer("last", torch.ones(1))
        return hidden + 0 * torch.rand_like(hidden)


def test_leaves_no_trace():
    model = tiny("LlamaForCausalLM").train()
    model.model.norm = torch.nn.Sequential(model.model.norm, _Counting())
    model.model.norm[1].register_buffer("last", torch.full((1,), 7.0))
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert LogitSource().is_head(model)
    assert torch.equal(torch.rand(4), expected)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    with contextlib.suppress(ValueError):
        model.model.norm = torch.nn.Identity()
        model.model.forward = lambda **kwargs: 1 / 0
        why_not_head(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_dynamic_rotary_positions_are_restored():
    """They keep the length that they have seen beside their buffers; both are as before, or the next forward computes another thing."""
    model = tiny(
        "LlamaForCausalLM",
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )
    ids = torch.arange(20, 50).unsqueeze(0)
    expected = copy.deepcopy(model)(ids).logits
    with undisturbed(model):
        model(ids)
    assert torch.equal(model(ids).logits, expected)  # longer than before the context
    short = copy.deepcopy(model)(ids[:, :8]).logits
    assert LogitSource().is_head(model)
    assert torch.equal(model(ids[:, :8]).logits, short)


@pytest.mark.parametrize("autocast", [False, True])
def test_float16_with_a_small_scale(autocast):
    """Logits before a scale of 1/300 would be infinite in float16, where those of a run are not."""
    model = tiny("FalconH1ForCausalLM", lm_head_multiplier=1 / 300)
    model = model if autocast else model.half()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        difference, tolerance = head_difference(model)
    assert difference < tolerance / 2
    model.config.lm_head_multiplier = 1 / 280
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        assert "the two differ by" in why_not_head(model)


def test_an_auxiliary_head_is_no_part_of_the_logits():
    model = tiny("LlamaForCausalLM")
    model.timestamp_head = torch.nn.Linear(model.config.hidden_size, 3)
    assert why_not_head(model) is None
    own = type(model).forward

    def forward(**kwargs):
        output = own(model, **kwargs)
        output.logits = output.logits + 0 * model.timestamp_head.weight.sum()
        return output

    model.forward = forward
    assert "`timestamp_head.weight` would get no gradient" in why_not_head(model)
