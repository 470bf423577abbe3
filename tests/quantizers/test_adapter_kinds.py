"""Every adapter of PEFT on packed layers: it trains as on the plain model, or it is refused when it is attached."""

import copy

import peft
import pytest
import torch
from helpers.round_trips import INPUT
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_rb import D2QuantConfig, PTQTPConfig
from hf_rb.integrations import registration
from hf_rb.quantizers.loading.adapters import PlainWeightsNeeded
from hf_rb.utils import compat


LAYERS = dict(target_modules=["q_proj", "o_proj"])
RANK = LAYERS | dict(r=4)
WORKS = {
    "lora": ("LoraConfig", RANK | dict(target_modules="all-linear")),
    "rslora": ("LoraConfig", RANK | dict(use_rslora=True, init_lora_weights="gaussian")),
    "lora_bias": ("LoraConfig", RANK | dict(lora_bias=True)),
    "dora": ("LoraConfig", RANK | dict(use_dora=True)),
    "head": ("LoraConfig", RANK | dict(modules_to_save=["lm_head"])),
    "tokens": ("LoraConfig", RANK | dict(trainable_token_indices=[1, 2])),
    "bias": ("LoraConfig", RANK | dict(bias="all")),
    "replication": ("LoraConfig", RANK | dict(layer_replication=[[0, 2], [1, 2]])),
    "eva": ("LoraConfig", RANK | dict(init_lora_weights="eva")),
    "qalora": ("LoraConfig", RANK | dict(use_qalora=True, qalora_group_size=16)),
    "adalora": ("AdaLoraConfig", LAYERS | dict(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1)),
    "ia3": ("IA3Config", dict(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "oft": ("OFTConfig", LAYERS | dict(oft_block_size=16)),
    "boft": ("BOFTConfig", LAYERS | dict(boft_block_size=4)),
    "vera": ("VeraConfig", RANK),
    "randlora": ("RandLoraConfig", RANK),
    "fourierft": ("FourierFTConfig", LAYERS | dict(n_frequency=50)),
    "vblora": ("VBLoRAConfig", RANK | dict(num_vectors=16, vector_length=16)),
    "miss": ("MissConfig", RANK),
    "c3a": ("C3AConfig", LAYERS | dict(block_size=16)),
    "road": ("RoadConfig", LAYERS | dict(group_size=16)),
    "waveft": ("WaveFTConfig", LAYERS | dict(n_frequency=50)),
    "gralora": ("GraloraConfig", RANK | dict(gralora_k=2)),
    "lily": ("LilyConfig", RANK),
    "poly": ("PolyConfig", RANK | dict(n_tasks=2, n_skills=2, task_type="CAUSAL_LM")),
    "ln": ("LNTuningConfig", dict(target_modules=["input_layernorm"])),
    "prefix": ("PrefixTuningConfig", dict(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prompt": ("PromptTuningConfig", dict(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "p-tuning": ("PromptEncoderConfig", dict(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "beft": ("BeftConfig", LAYERS),
    "pvera": ("PveraConfig", RANK),
}
REFUSED = {
    "loha": ("LoHaConfig", RANK),
    "lokr": ("LoKrConfig", RANK),
    "hra": ("HRAConfig", RANK),
    "shira": ("ShiraConfig", RANK),
    "osf": ("OSFConfig", LAYERS),
    "delora": ("DeloraConfig", RANK),
    "deft": ("DeftConfig", RANK),
    "frod": ("FrodConfig", LAYERS),
    "glora": ("GloraConfig", RANK),
    "hira": ("HiraConfig", RANK),
    "peanut": ("PeanutConfig", RANK),
    "psoft": ("PsoftConfig", RANK),
    "tinylora": ("TinyLoraConfig", LAYERS),
    "unilora": ("UniLoraConfig", RANK),
    "orthogonal": ("LoraConfig", RANK | dict(init_lora_weights="orthogonal")),
    "pissa": ("LoraConfig", RANK | dict(init_lora_weights="pissa")),
    "olora": ("LoraConfig", RANK | dict(init_lora_weights="olora")),
    "layer": ("LoraConfig", RANK | dict(modules_to_save=["up_proj"])),
    "block": ("LoraConfig", RANK | dict(modules_to_save=["mlp"])),
}
FAST = {"lora", "dora", "ia3", "oft", "vera", "miss", "poly", "ln", "prefix"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["ptqtp", "d2quant"])
def base(folder, request):
    config = PTQTPConfig(group_size=32) if request.param == "ptqtp" else D2QuantConfig(backend="rtn", bits=3)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def make(name):
    kind, options = (WORKS | REFUSED)[name]
    if not hasattr(peft, kind):
        pytest.skip(f"This PEFT has no {kind}.")
    return getattr(peft, kind)(**copy.deepcopy(options))


def trained(model, name):
    """Returns the losses of two steps and the state of random numbers that attaching left."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, make(name))
    state = torch.random.get_rng_state()
    options = dict(task_ids=torch.zeros(2, dtype=torch.long)) if name == "poly" else {}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = adapted(INPUT, labels=INPUT, **options).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), state


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in WORKS]
)
def test_trains_as_on_the_plain_model(base, name):
    packed = copy.deepcopy(base)
    before = {key: tensor.clone() for key, tensor in packed.state_dict().items() if tensor.dtype == torch.uint8}
    plain = copy.deepcopy(base).dequantize()
    losses, state = trained(packed, name)
    expected, plain_state = trained(plain, name)
    torch.testing.assert_close(losses, expected, atol=1e-3, rtol=0)
    assert torch.equal(state, plain_state)  # trying the adapter drew nothing
    assert losses[-1] < losses[0] or name in ("adalora", "pvera")
    after = [tensor for tensor in packed.state_dict().values() if tensor.dtype == torch.uint8]
    assert name == "replication" or all(map(torch.equal, before.values(), after))


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_in_a_sentence(base, name):
    model = copy.deepcopy(base)
    if name == "frod" and hasattr(peft, "FrodConfig"):
        get_peft_model(copy.deepcopy(base).dequantize(), make(name))  # on plain layers it is fine
    with pytest.raises(PlainWeightsNeeded) as error:
        get_peft_model(model, make(name))
    message = str(error.value)
    assert "packed" in message and "\n" not in message and len(message) < 300
    assert any(remedy in message for remedy in ("model.dequantize()", "modules_to_not_convert"))


CANNOT_BE_ATTACHED = "LoHaConfig as given cannot be attached to model.layers.0.self_attn.q_proj, which is packed"


def test_everywhere_that_transformers_attaches_adapters(folder, base, tmp_path):
    if problem := compat.native_adapters_problem():
        pytest.skip(problem)
    get_peft_model(copy.deepcopy(base).dequantize(), make("loha")).save_pretrained(tmp_path)
    for attach in (
        lambda model: model.add_adapter(make("loha")),
        lambda model: model.load_adapter(str(tmp_path)),
    ):
        with pytest.raises(PlainWeightsNeeded, match=CANNOT_BE_ATTACHED):
            attach(copy.deepcopy(base))


def test_everywhere_that_peft_attaches_adapters(folder, base, tmp_path):
    get_peft_model(copy.deepcopy(base).dequantize(), make("loha")).save_pretrained(tmp_path)
    for attach in (
        lambda model: PeftModel.from_pretrained(model, tmp_path),
        lambda model: PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=True),
        lambda model: get_peft_model(model, make("loha"), mixed=True),
    ):
        with pytest.raises(PlainWeightsNeeded, match=CANNOT_BE_ATTACHED):
            attach(copy.deepcopy(base))
    model = get_peft_model(copy.deepcopy(base), make("lora"))
    with pytest.raises(PlainWeightsNeeded, match="'pissa'` starts from the plain weights"):
        model.add_adapter("second", make("pissa"))


def test_errors_of_peft_are_its_own(base):
    config = peft.LoraConfig(target_modules=["no_such_layer"])
    with pytest.raises(ValueError, match="Target modules .*no_such_layer.* not found"):
        get_peft_model(copy.deepcopy(base), config)
    with pytest.raises(ValueError, match="should be a positive integer"):
        get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"], r=0))


def test_an_adapter_that_nobody_has_tried_yet(base, monkeypatch):
    """One that looks at the weight only when it runs is found out as well."""
    forward = peft.tuners.lora.layer.Linear.forward

    def reads(self, x, *args, **kwargs):
        return forward(self, x, *args, **kwargs) * (1 + self.get_base_layer().weight.float().mean())

    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "forward", reads)
    with pytest.raises(PlainWeightsNeeded, match="works with the plain weights"):
        get_peft_model(copy.deepcopy(base), make("lora"))


def test_an_offloaded_layer_is_tried_too(base):
    model = copy.deepcopy(base)
    model.model.layers[0].self_attn.q_proj.to("meta")
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta and isinstance(model.lm_head, nn.Linear)
    with pytest.raises(PlainWeightsNeeded, match="LoHaConfig"):
        get_peft_model(model, make("loha"))


def test_an_ordinary_model_is_looked_at_once(monkeypatch):
    """PEFT asks for every layer: a look at all modules each time would be quadratic."""
    seen = []
    monkeypatch.setattr(registration, "_is_packed", lambda module: seen.append(module))
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))
    get_peft_model(model, peft.LoraConfig(r=1, target_modules=[str(layer) for layer in range(50)]))
    of_layers = [module for module in seen if type(module) is nn.Linear]
    assert len(of_layers) <= 2 * 50  # once before the adapters, and once where each is put
