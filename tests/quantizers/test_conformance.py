"""The quantizers through the tests of `conformance.py`: ours, and one of another package."""

import pytest
import torch
from helpers.checkpoints import (
    SIZES,
    experts,
    fused_experts,
    qwen3,
    second_copy_of_tied_tensor,
    square_transposed_experts,
    transposed_experts,
    untied_with_biases,
    without_head,
)
from helpers.example_package import installed
from helpers.round_trips import load
from quantizers.conformance import CLAMPED, DOWN, STREAMS, UP, QuantizerConformance, put, put_value
from transformers import OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_rb.quantizers.packed.experts import projections


NEGATIVE = "A scale is negative, infinite or NaN"
MIXTURES = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", CLAMPED]


class TestPTQTP(QuantizerConformance):
    method = "ptqtp"
    variants = [
        (dict(architecture="qwen3", tied=True), dict()),
        (dict(architecture="qwen3", tied=False, bias=True), dict(packing="nibble")),
        (dict(architecture="llama", tied=True, bias=True), dict(packing="nibble", planes=1)),
        (dict(architecture="llama", tied=False), dict(planes_per_layer={"mlp.down_proj": 1}, group_size=64)),
        (dict(architecture="llama", dtype=torch.float32), dict(scale_mode="tied", tol_mode="relative")),
        (dict(architecture="llama", tied=False), dict(planes=3)),
        (dict(), dict(planes_per_layer={"o_proj": 3, "k_proj": 1}, packing="nibble", multistart=True)),
    ]
    streams = [
        (qwen3, dict(), "auto"),
        (qwen3, dict(group_size=64, packing="nibble", quantize_qk=False, scale_mode="tied"), "bfloat16"),
        (untied_with_biases, dict(modules_to_not_convert=["down_proj"], planes_per_layer={"o_proj": 1}), "auto"),
        (without_head, dict(), "auto"),
        (second_copy_of_tied_tensor, dict(), "auto"),
        (experts, dict(), "auto"),
        (fused_experts, dict(packing="nibble"), "auto"),
        (transposed_experts, dict(), "auto"),
        (square_transposed_experts, dict(), "auto"),
    ]
    mixtures = [(name, dict()) for name in MIXTURES]
    choices = [
        ("qwen3_moe", dict(planes=1), dict(gate_up_proj="planes=1", down_proj="planes=1")),
        (
            "qwen3_moe",
            dict(planes_per_layer={"down_proj": 3}, packing="nibble"),
            dict(gate_up_proj="planes=2", down_proj="planes=3"),
        ),
        (
            CLAMPED,
            dict(planes_per_layer={"mlp.experts": 3}),
            dict(gate_up_proj="planes=3", down_proj="planes=3"),
        ),
        (CLAMPED, dict(scale_mode="tied", group_size=64), dict(gate_up_proj="planes=2", down_proj="planes=2")),
        ("qwen3_moe", dict(modules_to_not_convert=["down_proj"]), dict(gate_up_proj="planes=2")),
        (CLAMPED, dict(modules_to_not_convert=["experts.gate_up_proj"]), dict(down_proj="planes=2")),
        ("qwen3_moe", dict(modules_to_not_convert=["experts"]), None),
    ]
    damages = [
        (dict(), put_value(UP, (3, 4), 243), f"^{UP}: A packed weight holds the code 243, 'dense' ends at 242: the file is damaged"),
        (dict(packing="nibble"), put_value(UP, (3, 4), 0x94), f"^{UP}: A packed weight holds the code 9, 'nibble' ends at 8"),
        (dict(packing="nibble"), put_value(UP, (3, 4), 0x4F), f"^{UP}: A packed weight holds the code 15, 'nibble' ends at 8"),
        (dict(packing="nibble", planes=1), put_value(UP, (3, 4), 0x30), f"^{UP}: A packed weight holds the code 3, 'nibble' ends at 2"),
        (dict(), put_value(f"{UP}_scale", (3, 1, 0), float("nan")), f"^{UP}{{scale}}: {NEGATIVE}"),
        (dict(), put_value(f"{UP}_scale", (3, 1, 0), float("inf")), f"^{UP}{{scale}}: {NEGATIVE}"),
        (dict(), put_value(f"{UP}_scale", (3, 1, 0), -0.5), f"^{UP}{{scale}}: {NEGATIVE}"),
        (dict(), put(UP, lambda tensor: tensor[:, 1:]), rf"^{UP}: .*\(160, 77\)"),
        (dict(), put(UP, torch.Tensor.float), f"^{UP}: Expected uint8 rows of 78 bytes .* got torch.float32"),
        (dict(), put(f"{UP}_scale", lambda tensor: tensor[:, 1:]), rf"^{UP}{{scale}}: Expected torch.float16 of shape \(160, 2, 2\)"),
        (dict(), put(f"{UP}_scale", torch.Tensor.float), f"^{UP}{{scale}}: Expected torch.float16 .*float32"),
        (dict(), put(UP, None), f"^{UP}: (not in the checkpoint|There are scales and no packed tensor)"),
        (dict(), put(f"{UP}_scale", None), f"^{UP}{{scale}}: (not in the checkpoint|1 packed tensors come with 0)"),
        (dict(), lambda stored: [stored.pop(name) for name in (UP, f"{UP}_scale")], f"^{UP}: not in the checkpoint"),
        (dict(), put("model.layers.1.self_attn.q_proj.bias", None), "q_proj.bias: not in the checkpoint"),
    ]  # fmt: skip
    bad_values = [
        (dict(planes=4), "`planes` .* must be one of 1, 2, 3"),
        (dict(tol=0.0), "`tol` must be in"),
        (dict(tol_mode="strict"), "`tol_mode` .* must be one of"),
        (dict(packing="base3"), "`packing` .* must be one of 'dense', 'nibble'"),
        (dict(planes_per_layer={"down_proj": 4}), "must be 1, 2 or 3; got 4"),
        (dict(planes=1, scale_mode="tied"), "use it with `planes=2`"),
        (dict(planes=True), "`planes` must be an integer; got True"),
        (dict(multistart="yes"), "`multistart` must be True or False; got 'yes'"),
        (dict(planes_per_layer={"down_proj": True}), "must be 1, 2 or 3; got True"),
        (dict(planes_per_layer=["x"]), r"`planes_per_layer` must be a dict such as .*; got \['x'\]"),
        (dict(planes_per_layer={"(": 3}), r"`planes_per_layer` has '\(', which is no regular expression \("),
    ]  # fmt: skip
    cannot_act = [
        (dict(planes_per_layer={"mlp": 3}), "'mlp' is the ending of model.layers.0.mlp, .* or '.[*]mlp' for all"),
        (dict(planes_per_layer={"experts": 1}), "'experts' matches no module of .*; its weights are down_proj, gate_proj, k_proj"),
        (dict(planes_per_layer={"lm_head": 3}), "'lm_head', which matches nothing of Qwen3ForCausalLM that is quantized"),
        (dict(planes_per_layer={"norm": 3}), "'norm', which matches nothing"),
        (dict(planes_per_layer={"q_proj": 3}, quantize_qk=False), "'q_proj', which matches nothing"),
    ]  # fmt: skip
    error, memory = (0.14, 0.18), 64 + 32

    def check_experts(self, source, quantized):
        for name, module in load(source).named_modules():
            if projections(module):
                packed = quantized.get_submodule(name)
                for parameter in ("gate_up_proj", "down_proj"):
                    weight = getattr(module, parameter).float()
                    weight = weight.mT if module.is_transposed else weight
                    assert 0.13 < (packed.unpacked(parameter) - weight).norm() / weight.norm() < 0.18


def relu(folder):
    sizes = dict(hidden_size=64, ffn_dim=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=64))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.bfloat16().save_pretrained(folder)


def smaller_neuron(folder):
    """As a pruned model has it, or one that was padded."""
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    model.model.layers[0].mlp.down_proj.weight.data[:, 7] = 0
    model.save_pretrained(folder)


class TestD2Quant(QuantizerConformance):
    method = "d2quant"
    options = dict(backend="rtn", dac=False, rotate=False)
    command = ["--backend", "rtn", "--no-dac", "--no-rotate"]
    variants = [
        (dict(architecture="qwen3", tied=True), dict()),
        (dict(architecture="qwen3", tied=False, bias=True), dict(bits=3)),
        (dict(architecture="llama", dtype=torch.float32), dict(bits=4, clip_search=False)),
        (dict(architecture="llama", tied=False), dict(group_size=64, dsq=False)),
        (dict(), dict(bits_per_layer={"o_proj": 4, "layers.1.mlp.down_proj": 3}, modules_to_not_convert=["k_proj"])),
        (dict(architecture="llama", dtype=torch.float32), dict(bits=3, modules_to_not_convert=["up_proj"])),
    ]
    streams = [
        (qwen3, dict(), "auto"),
        (smaller_neuron, dict(), "auto"),
        (qwen3, dict(bits=3, modules_to_not_convert=["up_proj"]), "auto"),
        (untied_with_biases, dict(bits_per_layer={"up_proj": 4}), "auto"),
        (relu, dict(group_size=64), "auto"),
        (without_head, dict(bits=3), "auto"),
        (experts, dict(), "auto"),
        (fused_experts, dict(bits=3), "auto"),
        (transposed_experts, dict(), "auto"),
        (square_transposed_experts, dict(dsq=False), "auto"),
    ]
    mixtures = [
        *((name, dict(bits=2)) for name in MIXTURES),
        *((name, dict(bits=3)) for name in MIXTURES),
    ]
    choices = [
        ("qwen3_moe", dict(bits_per_layer={"down_proj": 4}), dict(gate_up_proj="bits=2", down_proj="bits=4")),
        (
            CLAMPED,
            dict(bits_per_layer={"mlp.experts": 3}),
            dict(gate_up_proj="bits=3", down_proj="bits=3, sign planes, column scales"),
        ),
        ("mixtral", dict(dsq=False, group_size=64), dict(gate_up_proj="bits=2", down_proj="bits=2")),
        (
            "qwen3_moe",
            dict(modules_to_not_convert=["experts.gate_up_proj"]),
            dict(down_proj="bits=2, sign planes, column scales"),
        ),
        ("qwen3_moe", dict(modules_to_not_convert=["experts"]), None),
    ]
    damages = [
        (dict(bits=3), put(DOWN, lambda old: old[:, 1:]), rf"^{DOWN}(_hi)?: Expected torch.uint8 of shape"),
        (dict(bits=3), put(DOWN, None), rf"^{DOWN}: (not in the checkpoint|There are scales and no packed tensor)"),
        (dict(bits=3), put(f"{DOWN}_hi", None), f"^{DOWN}_hi: not in the checkpoint"),
        (dict(bits=3), put(f"{DOWN}_scale", None), f"^{DOWN}_scale: not in the checkpoint"),
        (dict(bits=3), put(f"{DOWN}_scale", lambda old: old * torch.nan), f"^{DOWN}_scale: {NEGATIVE}"),
        (dict(bits=3), put(f"{DOWN}_column", lambda _: torch.ones(160)), f"^{DOWN}_column: There is no such tensor"),
    ]
    cannot_act = [
        (
            dict(bits_per_layer={"_proj": 3}),
            "'_proj' matches no module of Qwen3ForCausalLM; did you mean 'down_proj'",
        ),
        (dict(bits_per_layer={"lm_head": 3}), "`bits_per_layer` has 'lm_head', which matches nothing"),
    ]
    error, memory = (0.28, 0.4), 48
    compiled = dict(bits=3, modules_to_not_convert=["up_proj"])  # column scales are kept
    offloads_alike = False  # what it cannot reach stays apart: test_d2_round_trips.py

    def check_files(self, stored, model, options):
        kept = model.config.quantization_config.column_modules or []
        dual = options.get("dsq", True) and options.get("bits", 2) < 4
        assert stored[f"{DOWN}_scale"].ndim == 2 + dual and (f"{DOWN}_zero" in stored) is not dual
        assert (f"{DOWN}_column" in stored) is (DOWN.removesuffix(".weight") in kept)
        assert bool(kept) is ("up_proj" in options.get("modules_to_not_convert", ()))

    def check_beside(self, endings, architecture):
        # Clamped experts keep their column scales.
        assert endings - {"hi"} == {"scale", "zero"} | ({"column"} if architecture == CLAMPED else set())


@pytest.fixture(scope="module", autouse=True)
def example_package(tmp_path_factory):
    with installed(tmp_path_factory.mktemp("site")):
        yield


class TestQuartet(QuantizerConformance):
    """A quantizer of the package in `tests/example_package`."""

    method = "quartet"
    command = ["--clip", "0.7"]
    options = dict(clip=0.7)
    variants = [
        (dict(tied=False, bias=True), dict()),
        (dict(architecture="llama", dtype=torch.float32), dict(clip=1.0)),
    ]
    streams = [STREAMS[0], STREAMS[4], STREAMS[7]]
    choices = [
        ("qwen3_moe", dict(modules_to_not_convert=["down_proj"]), dict(gate_up_proj="bits=2")),
        (CLAMPED, dict(), dict(gate_up_proj="bits=2", down_proj="bits=2")),
    ]
    damages = [
        (dict(), put(UP, lambda old: old[:, 1:]), rf"^{UP}: Expected torch.uint8 of shape \(160, 48\)"),
        (dict(), put(f"{UP}_scale", torch.Tensor.float), f"^{UP}_scale: Expected torch.float16"),
        (dict(), put_value(f"{UP}_scale", (3, 1, 0), -0.5), f"^{UP}_scale: {NEGATIVE}"),
        (dict(), put(f"{UP}_scale", None), f"^{UP}{{scale}}: (not in the checkpoint|1 packed tensors come with 0)"),
    ]
    bad_values = [
        (dict(clip=0), r"`clip` must be in \(0, 1\]; got 0"),
        (dict(group_size=6), "`group_size` must be a multiple of 4"),
    ]
    error, memory = (0.3, 0.45), 48
