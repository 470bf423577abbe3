import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest


# What a program imports first; each order runs in a process of its own.
FAST = {
    "hf_rb first": "import hf_rb\nfrom transformers import AutoConfig, AutoModelForCausalLM",
    "an auto class first": "from transformers import AutoModelForCausalLM\nimport hf_rb",
}
SLOW = {
    "the model first": "from hf_rb import MPIQwen3MoeForCausalLM",
    "the configuration first": "from hf_rb import MPIQwen3MoeConfig",
    "apply_mpi first": "from hf_rb import apply_mpi",
    "the native configuration first": "from transformers import Qwen3MoeConfig\nimport hf_rb",
    "the registry first": "import transformers.models.auto.configuration_auto\nimport hf_rb",
    "peft first": "import peft\nimport hf_rb",
    "trl first": "from trl import SFTTrainer\nimport hf_rb",
    "hf_rb, then peft": "import hf_rb\nimport peft",
    "hf_rb, then the values of the registry": (
        "import hf_rb\nfrom transformers.models.auto.configuration_auto import CONFIG_MAPPING\nCONFIG_MAPPING.items()"
    ),
    "reloaded": "import hf_rb, importlib, transformers.models.auto\nimportlib.reload(hf_rb)",
}

CHECK = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
import hf_rb

hf_rb.utils.import_hooks.require("transformers")
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


@pytest.mark.parametrize(
    "orders", [pytest.param(FAST, id="fast"), pytest.param(SLOW, id="all", marks=pytest.mark.slow)]
)
def test_registered_in_every_import_order(orders):
    def run(statements):
        return subprocess.run([sys.executable, "-c", statements + CHECK], capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(orders, pool.map(run, orders.values()), strict=True))
    failed = {order: result.stderr[-2000:] for order, result in results.items() if result.returncode}
    assert not failed, "\n".join(f"{order}:\n{error}" for order, error in failed.items())


def test_the_registry_can_be_copied():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    import hf_rb

    copied = pickle.loads(pickle.dumps(CONFIG_MAPPING))
    assert copied["mpi_qwen3_moe"] is CONFIG_MAPPING["mpi_qwen3_moe"] is hf_rb.MPIQwen3MoeConfig


def test_without_this_package_a_checkpoint_is_refused(make_mixture, tmp_path):
    make_mixture("mpi_qwen3_moe").save_pretrained(tmp_path)
    program = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode and "`mpi_qwen3_moe`" in result.stderr
