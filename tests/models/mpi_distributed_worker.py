"""MPI routers in two processes: data parallelism, whole and sharded, and what is refused. Started by `test_mpi_distributed.py`.

torchrun --standalone --nproc_per_node 2 mpi_distributed_worker.py FOLDER
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig

from hf_rb import MPIQwen3MoeConfig, MPIQwen3MoeForCausalLM, apply_mpi


SIZES = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, initializer_range=0.1, norm_topk_prob=True,
)  # fmt: skip
IDS = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(0))


def build(kind):
    torch.manual_seed(0)
    if kind == "class":
        return MPIQwen3MoeForCausalLM(MPIQwen3MoeConfig(**SIZES, output_router_logits=True, router_aux_loss_coef=0.5))
    return apply_mpi(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)))


def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare(kind, wrap, checkpointing):
    """Two steps on halves of a batch are two steps of one process on all of it, in gradients and in what is routed after them."""
    alone = build(kind).train()
    model = copy.deepcopy(alone)
    if checkpointing:
        model.activation_checkpointing_enable()
    model = wrap(model)
    rank = dist.get_rank()
    for _ in range(2):
        sum(alone(input_ids=half, labels=half).loss for half in IDS.chunk(2)).div(2).backward()
        model(input_ids=IDS.chunk(2)[rank], labels=IDS.chunk(2)[rank]).loss.backward()
        for one in (alone, model):
            optimizer = torch.optim.SGD(one.parameters(), lr=0.5)
            for expected, parameter in zip(alone.parameters(), model.parameters(), strict=True):
                if one is alone:
                    torch.testing.assert_close(whole(parameter.grad), expected.grad, rtol=1e-4, atol=1e-7)
            optimizer.step()
            optimizer.zero_grad()
    for training in (True, False):
        with torch.no_grad():
            expected, logits = (one.train(training)(input_ids=IDS).logits for one in (alone, model))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def refused(folder, call, **plan):
    try:
        call(AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**plan)))
    except ValueError as error:
        assert "tensor and expert parallelism are not supported before `fold_mpi`" in str(error), error
    else:
        raise AssertionError(f"{plan} was not refused")


def main(folder):
    dist.init_process_group("gloo")
    for kind in ("class", "applied"):
        compare(kind, DistributedDataParallel, checkpointing=False)
        for checkpointing in (False, True):
            compare(kind, shard, checkpointing)
    for plan in (dict(tp_plan="auto"), dict(tp_size=2), dict(tp_size=2, ep_size=2)):
        refused(folder / "mpi", lambda model: model, **plan)
        refused(folder / "native", apply_mpi, **plan)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
