"""Reasons why two models of one architecture do not fit, for a refusal: other names, one tied head, padded rows."""

from collections.abc import Mapping
from typing import Any

from hf_rb.io.safetensors import Entry
from hf_rb.weights.source import EMBEDDINGS, HEADS, Source


__all__ = ["difference", "padding"]


def difference(one: Source, other: Source) -> str | None:
    """Returns why tensors of one model are not found in the other, where it is not the shape of the models."""
    ours, theirs = (_parameters(one.config, source.entries) for source in (one, other))
    if not ours or not theirs:
        return None
    same = ours.keys() == theirs.keys()
    renamed = [parameter for parameter in ours if ours[parameter] != theirs[parameter]] if same else []
    if renamed:
        parameter = renamed[0]
        return (
            f"{one.role} and {other.role} have the same parameters under other names ({ours[parameter]} and "
            f"{theirs[parameter]} are both of {parameter}), as two versions of transformers write them. Load each "
            "with `from_pretrained` and write it with `save_pretrained(folder, save_original_format=False)`: then "
            "both have transformers' names."
        )
    if one.tied != other.tied:
        tied, own = (one, other) if one.tied else (other, one)
        head = sorted(ours.keys() ^ theirs.keys())
        if len(head) <= 2 and head[0] in (theirs if own is other else ours):  # its weight, perhaps its bias
            return (
                f"{tied.role} ties its head to the embedding, and {own.role} has one of its own ({', '.join(head)}). "
                'Leave the head out with `include` (`--include`) or `mismatch="skip"` (`--mismatch skip`), or give '
                "two models of one kind."
            )
    return None


def padding(one: Source, other: Source, name: str) -> str | None:
    """Returns what to do about an embedding or a head with more rows in one of two models with the same tokens."""
    shapes = {source: entry.shape for source in (one, other) if (entry := source.find(name))}
    pair = sorted(shapes, key=shapes.__getitem__)
    few, many = (shapes[source] for source in pair)
    vocabulary = one.vocabulary()
    if (
        not name.endswith(EMBEDDINGS + HEADS)
        or few[1:] != many[1:]
        or not vocabulary
        or vocabulary != other.vocabulary()
    ):
        return None
    return (
        f"The tokens are the same, the rows behind the {len(vocabulary):,} tokens are padding: give {pair[0].role} as "
        f"many (`model.resize_token_embeddings({many[0]})`, `save_pretrained`), or keep these tensors of {one.role} "
        'with `mismatch="skip"` (`--mismatch skip`).'
    )


def _parameters(config: dict[str, Any], entries: Mapping[str, Entry]) -> dict[str, str] | None:
    """Returns a tensor's name by each parameter that the tensors become, or nothing where transformers does not know
    the model.
    """
    # By transformers' rules, which merging itself does without.
    from hf_rb.io.parameter_names import ParameterNames
    from hf_rb.io.skeleton import skeleton_of

    try:
        find = ParameterNames(skeleton_of(config))
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError):
        return None
    return {parameter: name for name in sorted(entries) for parameter in find(name)[0]}
