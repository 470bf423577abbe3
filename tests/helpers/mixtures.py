"""Small mixtures of experts and their sizes."""

import torch


__all__ = ["MOE", "MOE_SIZES", "SMALL_MOE", "mixture"]

# Hidden size 192: a group and a half.
MOE_SIZES = dict(hidden_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=48)
MOE = {
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=80, decoder_sparse_step=1),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=80),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2, intermediate_size=80),
    "deepseek_v3": dict(
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=80, intermediate_size=96, first_k_dense_replace=1,
        n_group=1, topk_group=1, n_shared_experts=1, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=16,
        qk_nope_head_dim=32, v_head_dim=32, num_key_value_heads=4, head_dim=16,
    ),
    # A square `down_proj`, as in the published models: its shape does not say that it is transposed.
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=192),
}  # fmt: skip
# With the embedded tokenizer, for trainers.
SMALL_MOE = dict(
    vocab_size=1024, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, eos_token_id=2, pad_token_id=0,
    tie_word_embeddings=True, initializer_range=0.1,
)  # fmt: skip


def mixture(mpi=True, seed=0, lb_type="sequence", z_loss_coef=0.0, **fields):
    """Returns a random Qwen3-MoE with routers of MPI, or transformers' own with the balance loss that its config then names."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from hf_rb import MPIQwen3MoeConfig, MPIQwen3MoeForCausalLM

    torch.manual_seed(seed)
    if mpi:
        return MPIQwen3MoeForCausalLM(
            MPIQwen3MoeConfig(**SMALL_MOE | fields, lb_type=lb_type, z_loss_coef=z_loss_coef)
        )
    config = Qwen3MoeConfig(**SMALL_MOE | dict(norm_topk_prob=True, output_router_logits=True) | fields)
    config.lb_type, config.z_loss_coef = lb_type, z_loss_coef
    return Qwen3MoeForCausalLM(config)
