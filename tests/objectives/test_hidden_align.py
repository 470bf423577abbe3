"""Worked numbers and identities of the reconstruction, and that its split over micro-batches is exact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_rb.objectives.hidden_align import alignment_targets, cross_group_cosine, hidden_align, target_loss


H1 = torch.tensor([[3.0, 4, 0], [4, 3, 0], [0, 5, 0], [1, 0, 0]])
CORRECT = torch.tensor([True, True, True, False])


def dense(states, aligned, group_size):
    """The definition, pair by pair."""
    losses = []
    for group, keep in zip(states.split(group_size), aligned.split(group_size), strict=True):
        unit = torch.nn.functional.normalize(group[keep], dim=-1)
        pairs = [1 - unit[i] @ unit[j] for i in range(len(unit)) for j in range(len(unit)) if i != j]
        losses += [torch.stack(pairs).mean()] if pairs else []
    return torch.stack(losses).mean() if losses else states.sum() * 0


def test_three_of_four_are_correct():
    assert hidden_align(H1, CORRECT, 4).item() == pytest.approx(0.213333, abs=1e-6)


def test_lengths_do_not_matter():
    scaled = H1 * torch.tensor([2, 0.5, 7, 1])[:, None]
    assert hidden_align(scaled, CORRECT, 4).item() == pytest.approx(0.213333, abs=1e-6)


def test_it_is_half_the_mean_squared_distance_of_directions():
    unit = torch.nn.functional.normalize(H1[:3], dim=-1)
    distances = torch.cdist(unit, unit).square().sum() / 6
    assert distances.item() == pytest.approx(0.426667, abs=1e-6)


@pytest.mark.parametrize(
    "states, loss", [([[1.0, 0], [0.6, 0.8]], 0.4), ([[1.0, 0], [-3, 0]], 2.0), ([[1.0, 2], [2, 4]], 0.0)]
)
def test_two_correct(states, loss):
    assert hidden_align(torch.tensor(states), torch.tensor([True, True]), 2).item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("aligned", [[True, False, False], [False, False, False]])
def test_without_a_pair_there_is_no_loss_and_no_gradient(aligned):
    states = torch.randn(3, 5, requires_grad=True)
    aligned = torch.tensor(aligned)
    targets, weights = alignment_targets(states, aligned, 3)
    for loss in (hidden_align(states, aligned, 3), target_loss(states, targets, weights)):
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, states)
        assert not gradient.any()


groups = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(0, 10_000))


def random_batch(shape):
    count, group_size, seed = shape
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count * group_size, 4, generator=generator, dtype=torch.float64).float()
    return states, torch.rand(count * group_size, generator=generator) < 0.7, group_size, generator


@given(groups)
def test_the_split_has_the_value_and_the_gradient_of_the_whole(shape):
    """Over micro-batches in any order, each with targets that are constants."""
    states, aligned, group_size, generator = random_batch(shape)
    whole, split = states.clone().requires_grad_(), states.clone().requires_grad_()
    definition = states.clone().requires_grad_()
    targets, weights = alignment_targets(states, aligned, group_size)
    order = torch.randperm(len(states), generator=generator)
    parts = [target_loss(split[rows], targets[rows], weights[rows]) for rows in order.split(3)]
    losses = [dense(definition, aligned, group_size), hidden_align(whole, aligned, group_size), sum(parts)]
    gradients = [
        torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip(losses, (definition, whole, split), strict=True)
    ]
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-5)


@given(groups)
def test_bounds_and_permutation(shape):
    states, aligned, group_size, generator = random_batch(shape)
    loss = hidden_align(states, aligned, group_size)
    assert -1e-6 <= loss <= 2 + 1e-6
    within = torch.cat(
        [start + torch.randperm(group_size, generator=generator) for start in range(0, len(states), group_size)]
    )
    torch.testing.assert_close(hidden_align(states[within], aligned[within], group_size), loss, rtol=1e-4, atol=1e-6)
    _, weights = alignment_targets(states, aligned, group_size)
    assert weights.sum().item() == pytest.approx(float((aligned.view(-1, group_size).sum(1) > 1).any()), abs=1e-6)


def test_cosine_between_prompts():
    states = torch.tensor([[1.0, 0], [1, 0], [0.6, 0.8], [0, 5]])
    aligned = torch.tensor([True, True, True, False])
    assert cross_group_cosine(states, aligned, 2).item() == pytest.approx(0.6)
    assert cross_group_cosine(states[:2], aligned[:2], 2).isnan()
