"""Pass@k advantages against the average over all subsets, their limits, and the pipeline."""

from itertools import combinations

import pytest
import torch
from torch.testing import assert_close

from hf_rb.advantages import EdasShaper, ShapingContext, TokenShaper, check_shapers, run_pipeline
from hf_rb.advantages.pass_at_k import PassAtKShaper, pass_at_k
from hf_rb.methods import ShaperMethod


def by_subsets(correct, k):
    """Mean over the subsets with a completion of their standardised reward, for each completion."""
    subsets = list(combinations(range(len(correct)), k))
    rewards = {subset: float(any(correct[i] for i in subset)) for subset in subsets}
    mean = sum(rewards.values()) / len(subsets)
    sigma = (mean * (1 - mean)) ** 0.5
    if sigma == 0:
        return [0.0] * len(correct)
    own = [[rewards[subset] for subset in subsets if i in subset] for i in range(len(correct))]
    return [(sum(values) / len(values) - mean) / sigma for values in own]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("right", range(7))
def test_pass_at_k_is_the_mean_over_subsets(k, right):
    correct = torch.tensor([i < right for i in range(6)])
    found, rewards = pass_at_k(correct, ~correct, 6, k)
    assert_close(found, torch.tensor(by_subsets(correct.tolist(), k)), atol=1e-6, rtol=1e-6)
    assert 0 <= rewards[0] <= 1


def test_pass_at_one_is_grpo_with_the_population_deviation():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    groups = rewards.view(2, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / groups.std(1, correction=0, keepdim=True)
    assert_close(pass_at_k(rewards > 0, rewards == 0, 4, 1)[0], expected.flatten())


def test_pass_at_k_of_an_unscored_completion_counts_nowhere():
    correct, wrong = torch.tensor([True, False, False, False]), torch.tensor([False, True, True, False])
    found, _ = pass_at_k(correct, wrong, 4, 2)
    assert found[3] == 0
    assert_close(found[:3], pass_at_k(correct[:3], wrong[:3], 3, 2)[0])


def test_pass_at_k_refuses_a_k_below_one():
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        pass_at_k(torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool), 2, 0)


def test_pass_at_k_runs_first():
    with pytest.raises(
        ValueError, match=r"Write `advantage_shapers: \[pass_at_k, edas\]` instead of \[edas, pass_at_k\]"
    ):
        check_shapers([EdasShaper(), PassAtKShaper()], ["prompt"], ["right"], has_correct=True)
    check_shapers([PassAtKShaper(), EdasShaper()], ["prompt"], ["right"], has_correct=True)


def test_a_record_of_the_other_level_is_refused():
    with pytest.raises(TypeError, match="Tokens is a shaper of one number a token, and its record says"):

        class Tokens(TokenShaper):
            method = ShaperMethod(key="tokens", name="Tokens", summary="Nothing.")


def test_pass_at_k_of_a_whole_group_says_nothing():
    correct = torch.tensor([True, False, False, False])
    found, _ = pass_at_k(correct, ~correct, 4, 4)
    assert not found.any()


def test_pass_at_k_in_the_pipeline_replaces_advantages():
    correct = torch.tensor([True, False, False, False, True, True, True, True])
    ctx = ShapingContext(
        base=torch.arange(8.0), group_size=4, rewards_per_func=correct.float()[:, None], reward_names=["right"],
        valid=torch.ones(8, dtype=torch.bool), mask=torch.ones(8, 3, dtype=torch.bool), correct=correct, wrong=~correct,
    )  # fmt: skip
    advantages, metrics, _ = run_pipeline(ctx, [PassAtKShaper(2)])
    assert_close(advantages, pass_at_k(correct, ~correct, 4, 2)[0])
    assert (advantages[4:] == 0).all()
    assert metrics["shaping/pass_at_k/groups_silent"] == 0.5
    assert metrics["shaping/pass_at_k/reward"] == pytest.approx((0.5 + 1) / 2)
