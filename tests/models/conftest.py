import pytest
import torch
from helpers.mixtures import MOE, MOE_SIZES


@pytest.fixture
def make_mixture():
    """Returns a random mixture of experts in evaluation mode; `mpi_…` are our classes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import hf_rb  # noqa: F401

    def make(architecture="qwen3_moe", dtype=torch.float32, seed=0, **options):
        native = architecture.removeprefix("mpi_")
        sizes = MOE_SIZES | MOE[native] | dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=None)
        if native in ("qwen3_moe", "olmoe"):
            sizes["norm_topk_prob"] = True
        torch.manual_seed(seed)
        config = AutoConfig.for_model(architecture, **sizes | options)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    return make


@pytest.fixture
def ids():
    return torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def evaluations(monkeypatch):
    """A list that grows by one with every effective router that is computed."""
    from hf_rb.models.mpi import router

    counted, compute = [], router.effective_router_and_weight

    def counting(*args, **kwargs):
        counted.append(None)
        return compute(*args, **kwargs)

    monkeypatch.setattr(router, "effective_router_and_weight", counting)
    return counted
