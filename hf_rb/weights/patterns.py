"""Patterns for tensors of a checkpoint: a word, a range of layers or a regular expression.

| pattern | tensors |
|---|---|
| `all` | every one |
| `linear` | projections of attention and MLP, as Shadow-FT's code names them, their biases and fused forms too |
| `attn`, `mlp`, `embed`, `head`, `norm`, `router` | by their usual names |
| `layers:A-B` | layers A to B, counted from 0, both included; `layers:A` is one |
| anything else | a regular expression that is found in the name |
"""

import re
from collections.abc import Callable, Iterable


__all__ = ["LAYER", "WORDS", "matcher", "select"]

WORDS = {
    "all": r"",
    "linear": r"(q|k|v|o|up|gate|down)_proj",
    "attn": r"attn\.|attention\.",
    "mlp": r"\.(mlp|feed_forward|ffn|block_sparse_moe|experts)\.",
    "embed": r"embed_tokens|word_embeddings|embed_in|(^|\.)wte\.",
    "head": r"(^|\.)(lm_head|embed_out)\.",
    "norm": r"norm|(^|\.)ln_",
    "router": r"\.(mlp|block_sparse_moe)\.gate\.|router",
}
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")


def matcher(pattern: str) -> Callable[[str], bool]:
    """Returns the function that says of a tensor's name whether a pattern means it.

    Raises:
        ValueError: The pattern is not a regular expression, or a range of layers without numbers.
    """
    if pattern.startswith("layers:"):
        numbers = re.fullmatch(r"layers:(\d+)(?:-(\d+))?", pattern)
        if not numbers or int(numbers[1]) > int(numbers[2] or numbers[1]):
            raise ValueError(f"{pattern!r} is not a range of layers. Write layers:0-11 or layers:3.")
        layers = range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1)
        return lambda name: bool(match := LAYER.search(name)) and int(match[1]) in layers
    try:
        search = re.compile(WORDS.get(pattern, pattern)).search
    except re.error as error:
        raise ValueError(
            f"{pattern!r} is not a regular expression ({error}). Write one, layers:A-B, or one of {', '.join(WORDS)}."
        ) from error
    return lambda name: bool(search(name))


def select(pattern: str, names: Iterable[str]) -> set[str]:
    """Returns the names that a pattern means.

    Raises:
        ValueError: There are none.
    """
    names = list(names)
    match = matcher(pattern)
    found = {name for name in names if match(name)}
    if not found:
        raise ValueError(
            f"{pattern!r} means none of the {len(names)} tensors ({', '.join(names[:3])}, …). Write a regular "
            f"expression that is found in their names, layers:A-B, or one of {', '.join(WORDS)}."
        )
    return found
