import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
from helpers.mixtures import MOE, MOE_SIZES
from helpers.random_models import save_qwen3

from hf_rb.integrations import registration
from hf_rb.integrations.registration import LazyMapping
from hf_rb.utils import compat, import_hooks


# What a program imports first, one statement a line; each order runs in a process of its own.
FAST = {
    "hf_rb first": "import hf_rb\nfrom transformers import AutoConfig, AutoModelForCausalLM",
    "an auto class first": "from transformers import AutoModelForCausalLM\nimport hf_rb",
    "peft first": "import peft\nimport hf_rb",
}
SLOW = {
    "transformers first": "import transformers\nimport hf_rb\nimport peft",
    "trl first": "from trl import SFTTrainer\nimport hf_rb",
    "hf_rb, then trl": "import hf_rb\nfrom trl import SFTTrainer\nimport peft",
    "hf_rb, then peft": "import hf_rb\nimport peft",
    "a quantizer's base first": "import transformers.quantizers.base\nimport hf_rb",
    "the registry of quantizers first": "import transformers.quantizers.auto\nimport hf_rb",
    "the registry of models first": "import transformers.models.auto.configuration_auto\nimport hf_rb",
    "hf_rb, then the values of the registry": (
        "import hf_rb\nfrom transformers.models.auto.configuration_auto import CONFIG_MAPPING\nCONFIG_MAPPING.items()"
    ),
    "reloaded": "import hf_rb, importlib, transformers.quantizers\nimportlib.reload(hf_rb)",
    "reloaded after the models": "import hf_rb, importlib, transformers.models.auto\nimportlib.reload(hf_rb)",
    "imported twice": (
        "import hf_rb, sys, transformers.quantizers\n"
        "for name in [name for name in sys.modules if name.startswith('hf_rb')]: del sys.modules[name]\n"
        "import hf_rb"
    ),
    "our config first": "from hf_rb import PTQTPConfig\nimport transformers",
    "our model first": "from hf_rb import MPIQwen3MoeForCausalLM",
    "our model's config first": "from hf_rb import MPIQwen3MoeConfig",
    "apply_mpi first": "from hf_rb import apply_mpi",
    "the native config first": "from transformers import Qwen3MoeConfig\nimport hf_rb",
}

QUANTIZERS = """
import sys
from transformers.quantizers import auto
from hf_rb import PTQTPConfig
from hf_rb.utils.import_hooks import require

require("transformers")
config = auto.AutoQuantizationConfig.from_dict({"quant_method": "ptqtp"})
assert type(config) is PTQTPConfig, type(config)
assert isinstance(config, auto.LOADING_ATTRIBUTES_CONFIG_TYPES)
assert not isinstance(object(), auto.LOADING_ATTRIBUTES_CONFIG_TYPES)
assert auto.AUTO_QUANTIZER_MAPPING["ptqtp"].__name__ == "PTQTPQuantizer"
assert auto.AutoHfQuantizer.supports_quant_method({"quant_method": "ptqtp"})
if "peft" in sys.modules:
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    require("peft")
    ours = LoraModel._create_new_module, BaseTuner._check_merge_allowed
    assert {function.__module__ for function in ours} == {"hf_rb.integrations.registration"}
"""

MODELS = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
import hf_rb
from hf_rb.utils.import_hooks import require

require("transformers")
sizes = dict(
    vocab_size=16, hidden_size=16, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=8, num_experts=2, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0, eos_token_id=1,
)
for name in ("Qwen3Moe", "Olmoe", "Mixtral"):
    native = {"Qwen3Moe": "qwen3_moe"}.get(name, name.lower())
    config = AutoConfig.for_model("mpi_" + native, **sizes)
    assert type(config) is getattr(hf_rb, f"MPI{name}Config"), type(config)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is getattr(hf_rb, f"MPI{name}ForCausalLM"), type(model)
    assert type(AutoModel.from_config(config)) is type(model.model)
    if name != "Olmoe":
        assert type(AutoModelForSequenceClassification.from_config(config).model) is type(model.model)
    assert type(AutoModelForCausalLM.from_config(AutoConfig.for_model(native, **sizes))).__name__ == name + "ForCausalLM"
"""

# Both checks start from what the order has imported: each runs in a fork.
FORK = """
import os, traceback
for check in {checks!r}:
    child = os.fork()
    if not child:
        try:
            exec(check, {{"__name__": "check"}})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed = os.waitpid(child, 0)[1]
    assert not failed
"""


def run_order(statements: str) -> subprocess.CompletedProcess:
    program = f"{statements}\n{FORK.format(checks=[QUANTIZERS, MODELS])}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "orders", [pytest.param(FAST, id="fast"), pytest.param(SLOW, id="all", marks=pytest.mark.slow)]
)
def test_registered_in_every_import_order(orders):
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(orders, pool.map(run_order, orders.values()), strict=True))
    failed = {order: result.stderr[-2000:] for order, result in results.items() if result.returncode}
    assert not failed, "\n".join(f"{order}:\n{error}" for order, error in failed.items())


WITHOUT = """
import sys, traceback
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        print("loaded", end="\\0")
    except Exception:
        print(traceback.format_exc(), end="\\0")
assert "hf_rb" not in sys.modules
"""


def test_without_this_package_our_checkpoints_are_refused(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from hf_rb import D2QuantConfig, PTQTPConfig

    source = save_qwen3(tmp_path / "source")
    for name, config in {"ptqtp": PTQTPConfig(), "d2quant": D2QuantConfig(backend="rtn")}.items():
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(tmp_path / name)
        saved = json.loads((tmp_path / name / "config.json").read_text())
        assert saved["quantization_config"]["quant_method"] == name
    sizes = MOE_SIZES | MOE["qwen3_moe"] | {"vocab_size": 64}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mpi_qwen3_moe", **sizes)).save_pretrained(tmp_path / "mpi")
    folders = [tmp_path / name for name in ("ptqtp", "d2quant", "mpi")]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    ptqtp, d2quant, mpi, end = done.stdout.split("\0")
    assert "RuntimeError" in ptqtp and "RuntimeError" in d2quant
    for name in ("ptqtp", "d2quant"):  # transformers warns of them
        assert f"Unknown quantization type, got {name}" in done.stderr
    assert "`mpi_qwen3_moe`" in mpi and not end


def test_a_lazy_mapping_imports_what_is_read():
    mapping = LazyMapping({"native": int}, ours="fractions:Fraction", gone="no_such_module:Thing")
    assert "ours" in mapping and len(mapping) == 3
    assert mapping["ours"].__name__ == "Fraction"
    assert mapping.get("ours") is mapping["ours"] and mapping.get("other", 3) == 3
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        mapping["gone"]
    del mapping["gone"]
    assert mapping.values() == [int, mapping["ours"]]
    assert dict(mapping.items()) == {"native": int, "ours": mapping["ours"]}


def test_copying_a_lazy_mapping_imports_nothing():
    lazy = LazyMapping(ours="no_such_module:Thing")
    assert "no_such_module" not in sys.modules and "ours" in LazyMapping(lazy, native=int)


def test_a_failed_hook_does_not_raise_and_the_first_use_does(monkeypatch):
    monkeypatch.setattr(import_hooks, "_errors", {})
    monkeypatch.setattr(import_hooks, "when_imported", lambda name: hooks.append)
    hooks = []
    monkeypatch.setitem(compat.TABLE, "AUTO_QUANTIZER_MAPPING", compat.Entry("transformers.quantizers.auto", "MOVED"))
    import_hooks.on_import("transformers.quantizers.auto", registration._register_quantizers)
    hooks[0](ModuleType("auto"))
    import_hooks.require("peft")
    with pytest.raises(
        ImportError, match=r"could not register with transformers.quantizers.auto: .*MOVED.*tested with"
    ):
        import_hooks.require("transformers")
