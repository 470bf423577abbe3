import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest

from hf_rb.integrations import registration
from hf_rb.integrations.registration import LazyMapping
from hf_rb.utils import compat, import_hooks


# What a program imports first, one statement a line; each order runs in a process of its own.
FAST = {
    "hf_rb first": "import hf_rb\nfrom transformers import AutoModelForCausalLM",
    "an auto class first": "from transformers import AutoModelForCausalLM\nimport hf_rb",
    "peft first": "import peft\nimport hf_rb",
}
SLOW = {
    "transformers first": "import transformers\nimport hf_rb\nimport peft",
    "trl first": "from trl import SFTTrainer\nimport hf_rb",
    "hf_rb, then trl": "import hf_rb\nfrom trl import SFTTrainer\nimport peft",
    "a quantizer's base first": "import transformers.quantizers.base\nimport hf_rb",
    "the registry first": "import transformers.quantizers.auto\nimport hf_rb",
    "reloaded": "import hf_rb, importlib, transformers.quantizers\nimportlib.reload(hf_rb)",
    "imported twice": (
        "import hf_rb, sys, transformers.quantizers\n"
        "for name in [name for name in sys.modules if name.startswith('hf_rb')]: del sys.modules[name]\n"
        "import hf_rb"
    ),
    "our config first": "from hf_rb import PTQTPConfig\nimport transformers",
}

CHECK = """
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


def run_order(statements: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", statements + CHECK], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "orders", [pytest.param(FAST, id="fast"), pytest.param(SLOW, id="all", marks=pytest.mark.slow)]
)
def test_registered_in_every_import_order(orders):
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(orders, pool.map(run_order, orders.values()), strict=True))
    failed = {order: result.stderr[-2000:] for order, result in results.items() if result.returncode}
    assert not failed, "\n".join(f"{order}:\n{error}" for order, error in failed.items())


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
