"""Tiny random models of every family of transformers, made by shrinking the default configuration field by field."""

import inspect
import re
from functools import cache
from itertools import product
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


# The first task that a family has decides its class.
TASKS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
)

LARGEST = 3e7  # parameters

# What a field becomes, by the first pattern that fits its whole name.
SIZES = {
    r"(mamba_n_heads|mamba_num_heads)": 8,
    r"(num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num)": 2,
    r"\w*(num_attention_heads|attention_heads|num_heads|n_heads?|nhead|n_head|num_cross_attention_heads)": 4,
    r"(head_dim|attention_head_size|d_kv|kv_channels|v_head_dim|attention_head_dim|dim_head|mamba_d_head|mamba_head_dim|head_size)": 16,
    r"(qk_nope_head_dim|qk_rope_head_dim|index_head_dim)": 8,
    r"qk_head_dim": 16,
    r"(q_lora_rank|kv_lora_rank|time_step_rank|mamba_dt_rank)": 16,
    r"(hidden_size|d_model|n_embd|embed_dim|embedding_size|text_embed_dim|model_dim|decoder_hidden_size|encoder_hidden_size|\w+_hidden_size)": 64,
    r"(intermediate_size|\w*intermediate_size|d_ff|n_inner|ffn_dim|\w*ffn_dim|d_inner|ff_dim|ffn_hidden_size|\w+_intermediate_dim)": 96,
    r"(num_hidden_layers|num_layers|n_layers?|\w*(encoder|decoder)_layers|num_decoder_layers|num_encoder_layers|\w*depth|num_blocks|\w+_num_hidden_layers)": 2,
    r"(vocab_size|\w+_vocab_size)": 128,
    r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts)": 4,
    r"(num_experts_per_tok|num_selected_experts|moe_topk|moe_k|num_experts_per_token|top_k_experts)": 2,
    r"(n_group|topk_group|n_shared_experts|num_shared_experts|num_expert_group)": 1,
    r"(max_position_embeddings|n_positions|max_source_positions|max_target_positions|n_ctx|max_seq_len|max_sequence_length)": 64,
    r"image_size": 32,
    r"patch_size": 8,
    r"(num_mel_bins|input_dim|feature_size)": 16,
    r"(state_size|ssm_state_size|mamba_d_state)": 8,
    r"(\w*n_groups|mamba_n_groups)": 1,
    r"(sliding_window|local_attention|attention_window|window_size)": 8,
    r"(first_k_dense_replace|first_k_dense)": 1,
}
# What the shrunk fields of a family would contradict.
ROPE = dict(rope_type="default", rope_theta=10000.0)
OPTIONS: dict[str, dict[str, Any]] = {
    "codegen": dict(rotary_dim=8),
    "falcon_h1": dict(mamba_d_ssm=128),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "gptj": dict(rotary_dim=8),
    "llama4_text": dict(layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0], moe_layers=[1]),
    "mamba2": dict(num_heads=8, head_dim=16),
    "qwen2_5_vl": dict(rope_parameters=ROPE | dict(mrope_section=[2, 2, 4])),
    "qwen2_vl": dict(rope_parameters=ROPE | dict(mrope_section=[2, 2, 4])),
    "xlnet": dict(d_head=16),
    "zamba": dict(layer_types=["mamba", "hybrid"], layers_block_type=["mamba", "hybrid"]),
    "zamba2": dict(layer_types=["mamba", "hybrid"], layers_block_type=["mamba", "hybrid"], hybrid_layer_ids=[1]),
}
LEFT_OUT = {
    "transformers_version",
    "architectures",
    "dtype",
    "out_features",
    "out_indices",
    "stage_names",
    "per_layer_config",
}
DERIVED = {"layer_types", "mlp_layer_types", "layers_block_type", "attention_types", "attention_layers"}
TOKENS = re.compile(r"\w+_(token_id|token_index|token)")


@cache
def families() -> dict[str, str]:
    """Returns the name of the class to try for each model type."""
    found: dict[str, str] = {}
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}) for task in TASKS]
    for mapping in [*mappings, modeling_auto.MODEL_MAPPING_NAMES]:
        for model_type, name in mapping.items():
            found.setdefault(model_type, name if isinstance(name, str) else name[0])
    return {model_type: name for model_type, name in sorted(found.items()) if model_type in CONFIG_MAPPING}


def shrunk(values: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration's fields at the sizes of a tiny model."""
    result = {}
    latent = (
        "kv_lora_rank" in values
    )  # heads of keys are those of queries there, and a head's size is that of its rotated part
    for name, value in values.items():
        if name in options:
            result[name] = options[name]
        elif isinstance(value, dict) and name.endswith("_config") and value.get("model_type"):
            result[name] = shrunk(value, options)
        elif name in DERIVED or name in LEFT_OUT or (latent and name == "head_dim"):
            continue
        elif isinstance(value, dict) and "mrope_section" in value:
            half = max(4, int(8 * value.get("partial_rotary_factor", 1)))
            result[name] = value | {"mrope_section": [half // 4, half // 4, half // 2]}
        elif isinstance(value, bool) or not isinstance(value, int):
            result[name] = value
        elif TOKENS.fullmatch(name):
            result[name] = min(value, 100)
        elif latent and name == "num_key_value_heads":
            result[name] = 4
        else:
            size = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)
            result[name] = value if size is None else min(value, size)
    return result


def make(model_type: str) -> PreTrainedModel:
    """Returns a random model in float32, with weights that make it no constant function."""
    options, default = OPTIONS.get(model_type, {}), CONFIG_MAPPING[model_type]().to_dict()
    config = AutoConfig.for_model(**({"model_type": model_type} | options | shrunk(default, options)))
    cls = getattr(transformers, families()[model_type])
    with torch.device("meta"):
        if sum(parameter.numel() for parameter in cls._from_config(config).parameters()) > LARGEST:
            raise ValueError(f"{cls.__name__} stays large")
    torch.manual_seed(0)
    model = cls._from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                parameter.normal_(std=0.1)
    return model


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns inputs that the model takes; raises what the last of several says."""
    config = model.config
    text = config.get_text_config()
    ids = torch.arange(3, 19)[None] % min(getattr(text, "vocab_size", None) or 100, 100)
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    size = getattr(config, "image_size", None) or 32
    size = size if isinstance(size, int) else size[0]
    width = getattr(text, "hidden_size", None) or 64
    mels = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 16
    frames = 2 * (getattr(config, "max_source_positions", None) or 64)
    pixels = noise(getattr(config, "num_channels", None) or 3, size, size)
    given = {
        "input_ids": [ids],
        "pixel_values": [pixels, noise(4, 3, size, size)],
        "pixel_values_videos": [noise(4, 3, size, size)],
        "input_values": [noise(4000), noise(64, mels), noise(1, 4000)],
        "input_features": [noise(mels, frames), noise(frames, mels)],
        "flattened_patches": [noise(8, 66).abs()],
        "bbox": [torch.zeros(1, 16, 4, dtype=torch.long)],
        "inputs_embeds": [noise(16, width)],
        "past_values": [noise(64)],
    }
    signature = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    needed = [n for n, p in signature.items() if n in given and (p.default is p.empty or n in ("bbox", main))]
    asked = {"decoder_input_ids": ids} if "decoder_input_ids" in signature else {}
    sets = [[main], needed, ["input_ids"], ["input_ids", "pixel_values"], ["inputs_embeds"]]
    problem: Exception = ValueError("no inputs")
    for names in sets:
        for values in product(*(given.get(name, []) for name in names)):
            for more in (asked | {"use_cache": False}, asked, {}):
                inputs = dict(zip(names, values, strict=True)) | more
                try:
                    with torch.no_grad():
                        torch.manual_seed(0)
                        model(**inputs)
                    return inputs
                except Exception as error:
                    problem = error
    raise problem


def output_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the first floating tensor of a model's output."""
    with torch.no_grad():
        torch.manual_seed(0)
        output = model(**inputs)
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return next(
        value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim
    )
