"""Tiny models of nearly every class and family of transformers: its default configuration, with every size shrunk by the field's name."""

import copy
import inspect
import re
from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


__all__ = ["LARGEST", "build_family", "build_tiny", "families", "inputs_of", "output_of", "tiny_config"]

LARGEST = 4_000_000  # parameters of what counts as tiny
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

# Fields by what their whole name must match, the first that does, and their value. Only fields that hold a whole number change.
_SIZES = [
    (r"num_feat_extract_layers", None),  # as many as there are sizes of them
    (r"image_size", 32),
    (r"num_mel_bins|input_dim|feature_size", 16),
    (r"num_(mtp|nextn_predict|kv_shared)_layers|(mtp|num_mtp)_(num_)?hidden_layers|num_dense_layers", 0),
    (r"first_k_dense_replace|moe_layer_start_index|adapter_in_dim", 1),
    (r"(.*_)?layers|n_layers?|depth|num_blocks|num_layers_per_stack|moe_layer_end_index", 2),
    (r"qk_head_dim", 16),
    (r"type_vocab_size|n_langs|task_type_vocab_size", 2),
    (r"(.*_)?vocab_size(_per_layer_input)?|n_vocab|unpadded_vocab_size|.*vocab_size_base", 128),
    (r"mamba_n_heads|ssm_num_heads|mamba_num_heads|n_mamba_heads", 8),
    (r".*(key_value|kv|kv_n|query_groups).*(heads|groups)|multi_query_group_num|n_head_kv", 2),
    (r"(.*_)?heads|n_heads?|n_head", 4),
    (r"(linear|swa|global|qk_nope|qk_rope|qk|v|index|mamba|attention|.*_(key|value))?_?head_?dim|mamba_d_head|dim_head", 8),
    (r"kv_channels|d_kv|attention_head_size|d_head|rotary_dim|hidden_size_per_layer_input", 8),
    (r"(.*_)?rank|d_rel|.*_lowrank", 8),
    (r"(moe_)?(num|n)_(local_|routed_)?experts|zero_expert_num|num_local_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_top_?k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|num_shared_experts|n_shared_experts", 1),
    (r".*intermediate_size.*|(.*_)?ffn?_(dim|hidden_size|size)|d_inner|d_ff|dff|dim_ff|feed_forward_size|n_inner", 64),
    (r"(.*_)?(state_size|d_state)|n_groups|mamba_n(_)?groups|mamba_chunk_size|chunk_size", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length|.*(source|target)_positions", 64),
    (r"index_topk|index_topk_blocks|.*_chunk_length|index_block_size|rel_extent|max_window_layers", 8),
    (r"(.*_)?(hidden_size|embed_dim|embedding_size)|emb(edding)?_dim|d_model|n_embd|hidden_dim|lru_width|word_embed_proj_dim|mamba_d_ssm", 32),
    (r"(.*_)?sliding_window(_size)?|.*window_size|attention_chunk_size|local_attention", 16),
]  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
# What rules by name cannot know, by model type.
_SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_5_omni_thinker"),
            *("glm4v", "glm4v_text", "glm46v", "glm_image", "glm_image_text", "glm_ocr", "glm_ocr_text", "glmga"),
            *("cosmos3_edge", "cosmos3_edge_text"),
        ),
        {"rope_parameters": _MROPE},
    ),
    "bridgetower": {"hidden_size": 64},
    "cohere_compass_text": {"layer_types": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "dory": {  # as files have it: every layer is two blocks
        "num_hidden_layers": 6,
        "n_(input|recurrent|output)_layers": 2,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "full_attention", "mlp"],
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "glm5_next": {"index_kpool": 4, "qk_rope_head_dim": 0, "qk_head_dim": 8},
    "glm5_next_text": {"index_kpool": 4, "qk_rope_head_dim": 0, "qk_head_dim": 8},
    "hgnet_v2": {"stage_num_blocks": [1, 1, 3, 1], "stage_numb_of_layers": [6, 6, 6, 6]},
    "maskformer": {"depths": [2, 2, 2, 2], "num_heads": [4, 8, 16, 32], "num_layers": 4},
    "mistral4": {"head_dim": 16},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8},
    "neomme": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "pix2struct": {"patch_embed_hidden_size": 64},
    "qwen4_exp": {"layer_types": ["linear_attention", "linear_attention"]},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "linear_attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "n_mamba_heads": 2,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}


_DERIVED = {"out_features", "out_indices", "per_layer_config", "stage_names"}  # from other fields


def tiny_config(model_type: str, **fields: Any) -> PreTrainedConfig:
    """
    Returns the default configuration of a model type with every size shrunk.

    Args:
        model_type (`str`):
            Key of transformers' `CONFIG_MAPPING`.
        **fields:
            Values of fields by their names (regular expressions), in every configuration inside that has them.
    """
    config = CONFIG_MAPPING[model_type]().to_dict()
    shrunk = _shrunk(config, _SPECIAL.get(model_type, {}) | fields)
    return type(CONFIG_MAPPING[model_type]()).from_dict(shrunk)


def _shrunk(values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    layers = {value for key, value in values.items() if re.fullmatch(r"num_(hidden_)?layers|n_layers?", key)}
    if "kv_lora_rank" in values:  # multi-head latent attention has as many of both
        fields = {"num_key_value_heads": 4} | fields
    kept = {key: value for key, value in values.items() if key not in _DERIVED}
    return {key: _shrunk_value(key, value, layers, fields) for key, value in kept.items()}


def _shrunk_value(key: str, value: Any, layers: set, fields: Mapping[str, Any]) -> Any:
    for name, given in fields.items():
        if re.fullmatch(name, key):
            return copy.deepcopy(given)
    if key == "head_dim" and value is None:
        return 8
    if isinstance(value, Mapping):
        return _shrunk(value, fields) if "model_type" in value else value
    if isinstance(value, list):
        if len(value) in layers:
            kinds = [one for position, one in enumerate(value) if one not in value[:position]]
            return [kinds[-1] if len(kinds) > 1 else kinds[0], kinds[0]][::-1]
        if re.search(r"(layers|idxs|ids|indexes|indices)$", key):
            return [one for one in value if one < 2] or value[:1] and [1]
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        for pattern, size in _SIZES:
            if re.fullmatch(pattern, key):
                return value if size is None else size
        if key.endswith(("_token_id", "_token_index")) and value >= 128:
            return 127
    return value


def build_tiny(
    model_class: type[PreTrainedModel],
    model_type: str | None = None,
    seed: int = 0,
    largest: int = LARGEST,
    **fields: Any,
) -> PreTrainedModel:
    """
    Returns a tiny model of a class, in evaluation mode, in which no parameter has a special value.

    Raises:
        Exception: Whatever the class raises where rules by name do not make a configuration that it takes.
        ValueError: The model would have more than `largest` parameters.
    """
    wanted = model_class.config_class
    config = tiny_config(model_type or wanted.model_type, **fields)
    if not isinstance(config, wanted):
        config = next((one for one in vars(config).values() if isinstance(one, wanted)), config)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    if size > largest:
        raise ValueError(f"{model_class.__name__} has {size:,} parameters, more than {largest:,}.")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@cache
def families() -> dict[str, str]:
    """Returns the name of the class to try for each model type."""
    found: dict[str, str] = {}
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}) for task in TASKS]
    for mapping in [*mappings, modeling_auto.MODEL_MAPPING_NAMES]:
        for model_type, name in mapping.items():
            found.setdefault(model_type, name if isinstance(name, str) else name[0])
    return {model_type: name for model_type, name in sorted(found.items()) if model_type in CONFIG_MAPPING}


def build_family(model_type: str) -> PreTrainedModel:
    """Returns a tiny model of a family. Those of images and sounds stay larger."""
    return build_tiny(getattr(transformers, families()[model_type]), model_type, largest=30_000_000)


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
