"""Rebuilds everything under `hf_rb/tiny/assets` from a seed: `python -m hf_rb.tiny.build` (about an hour on one CPU
core).

The same seed gives the same bytes on one machine with the same number of threads.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_rb.tiny import ASSETS, facts, problems, tool_schemas


VOCABULARY = 1024
BATCH = 16  # small models learn to copy operands by the number of steps, not of tokens
TRANSCRIPT_SHARE = 0.04  # transcripts per problem; one is three times as long
DRILL_SHARE = 0.5  # of the problems give their equations to drills: arithmetic is what takes long to learn
PROMPT_WEIGHT = 0.1  # enough to model questions and tool results, too little to crowd out the solutions

# Hidden size 192 is a multiple of 64 and not of 128, so that quantization meets a short last group.
_COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    head_dim=32,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)
MODELS: dict[str, tuple[Any, Any]] = {
    "teacher": (
        Qwen3ForCausalLM,
        Qwen3Config(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=3,
            **_COMMON,
        ),
    ),
    "student": (
        Qwen3ForCausalLM,
        Qwen3Config(
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            **_COMMON,
        ),
    ),
    "moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            hidden_size=128,
            intermediate_size=320,
            moe_intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            **_COMMON,
        ),
    ),
}
# Tokens seen and peak learning rate. The student stops early on purpose: it is the one that fine-tuning, distillation
# and RL improve.
BUDGETS = {"teacher": (10_000_000, 2e-3), "student": (3_200_000, 2e-3), "moe": (4_000_000, 2e-3)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trains the byte-level BPE tokenizer on generated conversations; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    markers = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(markers),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [f"{problem.question}\n{problem.solution}" for problem in problems.generate(size=5000)]
    text += [fact.text for fact in facts.fact_base()] + [json.dumps(tool) for tool in tool_schemas()] * 50
    text += [
        message["content"] + json.dumps(message.get("tool_calls", ""))
        for _, messages in facts.generate_transcripts()
        for message in messages
    ]
    tokenizer.train_from_iterator(text + ["system\nuser\nassistant\n# Tools\n<tools>\n</tools>"] * 50, trainer)
    tokenizer.add_tokens(markers)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        # How transformers parses a reply back into a message with tool calls.
        response_template={
            "defaults": {"role": "assistant"},
            "start_anchor": "<|im_start|>assistant\n",
            "fields": {
                "tool_calls": {
                    "open": "<tool_call>",
                    "close_pattern": r"</tool_call>\s*",
                    "repeats": True,
                    "content": "json",
                    "transform": {"type": "function", "function": "{content}"},
                },
                "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
            },
        },
    )
    fast.chat_template = Path(__file__).with_name("chat_template.jinja").read_text()
    return fast


Row = tuple[list[int], list[float]]  # token ids, and the weight of each in the loss


def _conversation(tokenizer: PreTrainedTokenizerFast, messages: list[dict], tools: list[dict] | None = None) -> Row:
    functions: Any = tools
    row: Any = tokenizer.apply_chat_template(
        messages, tools=functions, return_dict=True, return_assistant_tokens_mask=True
    )
    return row["input_ids"], [max(mask, PROMPT_WEIGHT) for mask in row["assistant_masks"]]


def _drill(tokenizer: PreTrainedTokenizerFast, equations: list[str]) -> Row:
    """Bare equations: four times as many results a token as in a conversation, and only they count."""
    ids, weights = [], []
    for equation in equations:
        left, equals, right = equation.partition(" =")
        for text, weight in ((f" {left}{equals}", PROMPT_WEIGHT), (f"{right}.", 1.0)):
            part = tokenizer(text)["input_ids"]
            ids, weights = ids + part, weights + [weight] * len(part)
    return ids, weights


def _rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Row]:
    """Yields endless training rows: word problems, drills of their equations and tool-call transcripts."""
    rng = Random(seed)
    transcripts = [messages for _, messages in facts.generate_transcripts()]
    equations = []
    for problem in problems.generate(seed=seed):
        if rng.random() < TRANSCRIPT_SHARE:
            yield _conversation(tokenizer, rng.choice(transcripts), tool_schemas())
        if rng.random() < DRILL_SHARE:
            equations += problem.equations
        else:
            question, solution = ("user", problem.question), ("assistant", problem.solution)
            yield _conversation(tokenizer, [{"role": role, "content": text} for role, text in (question, solution)])
        if len(equations) >= 12:
            yield _drill(tokenizer, rng.sample(equations, 12))
            equations = []


def _batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (ids, weights), both (B, T), of right-padded rows of similar length."""
    rng = Random(seed)
    stream = _rows(tokenizer, seed)
    while True:
        rows = sorted(islice(stream, 100 * BATCH), key=lambda row: len(row[0]))
        chunks = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        rng.shuffle(chunks)
        for chunk in chunks:
            length = max(len(ids) for ids, _ in chunk)
            ids = torch.full((len(chunk), length), tokenizer.pad_token_id)
            weights = torch.zeros(len(chunk), length)
            for index, (row_ids, row_weights) in enumerate(chunk):
                ids[index, : len(row_ids)] = torch.tensor(row_ids)
                weights[index, : len(row_weights)] = torch.tensor(row_weights)
            yield ids, weights


def train(name: str, tokenizer: PreTrainedTokenizerFast, seed: int, budget: int | None = None) -> PreTrainedModel:
    """Trains one member of the family from scratch and returns it in bfloat16."""
    model_class, config = MODELS[name]
    default_budget, peak = BUDGETS[name]
    budget = budget or default_budget
    torch.manual_seed(seed)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        None,
    )
    model = model_class(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    seen, mean, start = 0, 0.0, time.monotonic()
    for step, (ids, weights) in enumerate(_batches(tokenizer, seed)):
        progress = seen / budget
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, step / 100, max(0.02, (1 - progress) / 0.6))
        with torch.autocast("cpu", torch.bfloat16):
            # Right padding needs no mask: causal attention never lets a real token see a pad.
            outputs = model(
                input_ids=ids[:, :-1], use_cache=False, **({"output_router_logits": True} if name == "moe" else {})
            )
        loss = F.cross_entropy(outputs.logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (loss * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        total = loss + (0.01 * outputs.aux_loss if name == "moe" else 0.0)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += int((weights > 0).sum())
        mean += (loss.item() - mean) / min(step + 1, 50)
        if step % 200 == 0 or seen >= budget:
            print(f"{name}: {seen:,} tokens, loss {mean:.4f}, {time.monotonic() - start:.0f} s", flush=True)
        if seen >= budget:
            break
    return model.to(torch.bfloat16).eval()


def save(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes model and tokenizer as an ordinary Hugging Face folder."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write to")
    parser.add_argument("--only", nargs="*", choices=list(MODELS), default=list(MODELS), help="members to train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="one thread is the fastest that other work on the machine does not slow down",
    )
    parser.add_argument("--tokens", type=int, help="tokens to train on, instead of the member's own budget")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(args.out / "tokenizer")
    for name in args.only:
        save(name, train(name, tokenizer, args.seed, args.tokens), tokenizer, args.out)


if __name__ == "__main__":
    main()
