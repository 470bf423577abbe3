"""Quality of search steps from the documents that they returned, without a judge (CalibAdv,
https://huggingface.co/papers/2604.18235).

The silver documents of a group are those that its best rollouts retrieved. The quality of a step is the share of its
documents that are silver and new to the rollout.
"""

from collections.abc import Collection, Hashable, Sequence, Set

import torch


__all__ = ["silver_documents", "step_quality", "word_similarity"]


def silver_documents(
    rewards: torch.Tensor | Sequence[float],
    documents: Sequence[Sequence[Collection[Hashable]]],
    group_size: int,
    qualify: float = 0.7,
) -> list[set]:
    """
    Returns the documents that the best rollouts of every group retrieved.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            Rewards, 0 for an invalid format. NaN does not qualify.
        documents (`Sequence` of length N):
            For each rollout, for each of its search steps, the ids of the documents it returned.
        group_size (`int`):
            Rollouts of one prompt.
        qualify (`float`, *optional*, defaults to `0.7`):
            Reward from which on a rollout qualifies. Of those, the ones with the highest reward count.

    Returns:
        `list[set]`: one set a group; empty if no rollout qualified.
    """
    rewards = torch.as_tensor(rewards)
    # Compared as a tensor, in its own type: a reward of 0.7 in float32 is less than Python's 0.7.
    qualified, rewards = (rewards >= qualify).tolist(), rewards.tolist()
    silver = []
    for start in range(0, len(rewards), group_size):
        group = [i for i in range(start, start + group_size) if qualified[i]]
        best = max((rewards[i] for i in group), default=None)
        silver.append({doc for i in group if rewards[i] == best for step in documents[i] for doc in step})
    return silver


def step_quality(
    documents: Sequence[Collection[Hashable]],
    silver: Set[Hashable],
    thoughts: Sequence[str] | None = None,
    max_similarity: float = 0.5,
    max_overlap: int = 1,
) -> list[float]:
    """
    Scores the search steps of one rollout.

    Args:
        documents (`Sequence` of length S):
            For each search step, the ids of the documents it returned.
        silver (`Set`):
            The group's silver documents.
        thoughts (`Sequence[str]` of length S, *optional*):
            What the model thought before each search.
        max_similarity (`float`, *optional*, defaults to `0.5`):
            A step whose thought is more similar than this to an earlier one is redundant.
        max_overlap (`int`, *optional*, defaults to `1`):
            A step that shares more documents than this with an earlier one is redundant.

    Returns:
        `list[float]`: the fraction of each step's documents that are silver and new to the rollout; 0 if it is
        redundant.
    """
    returned = [set(step) for step in documents]
    seen, quality = set(), []
    for t, step in enumerate(returned):
        useful = len((step & silver) - seen) if silver else 0
        seen |= step
        redundant = useful and (
            any(len(step & earlier) > max_overlap for earlier in returned[:t])
            or thoughts is not None
            and any(word_similarity(thoughts[t], earlier) > max_similarity for earlier in thoughts[:t])
        )
        quality.append(0.0 if redundant else useful / max(len(step), 1))
    return quality


def word_similarity(first: str, second: str) -> float:
    """Returns 1 minus the word-level edit distance over the longer one's number of words; 0 for two empty texts."""
    words, others = first.split(), second.split()
    longest = max(len(words), len(others))
    return 1 - _edit_distance(words, others) / longest if longest else 0.0


def _edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    # Myers (1999) in Hyyrö's form: a column of the table of differences is two integers, so that a word costs a few
    # integer operations instead of a pass over the other text.
    places: dict[str, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    every, last = (1 << len(first)) - 1, 1 << len(first) >> 1
    up, down, distance = every, 0, len(first)
    for word in second:
        equal = places.get(word, 0)
        vertical = equal | down
        horizontal = ((equal & up) + up) ^ up | equal
        right, left = down | every & ~(horizontal | up), up & horizontal
        distance += bool(right & last) - bool(left & last) if first else 1
        right, left = right << 1 | 1, left << 1
        up, down = every & (left | ~(vertical | right)), every & right & vertical
    return distance
