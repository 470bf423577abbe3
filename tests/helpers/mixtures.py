"""Sizes of small mixtures of experts."""

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
