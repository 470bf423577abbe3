import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_rb.objectives import profit_mask


PROBS = torch.tensor([0.9, 0.05, 0.1, 0.5, 0.02])
LOG_PROBS = PROBS.log()


def gated_loss(log_probs, *args, normalizer=None, **kwargs):
    """The paper's loss: kept negative log-likelihoods over the number of all tokens."""
    mask = profit_mask(log_probs, *args, **kwargs)
    return -(log_probs * mask).sum() / (log_probs.numel() if normalizer is None else normalizer)


def test_worked_example_strict():
    mask = profit_mask(LOG_PROBS, 0.1)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [True, False, False, True, False]
    assert gated_loss(LOG_PROBS, 0.1).item() == pytest.approx(0.15970154, abs=1e-7)
    assert gated_loss(LOG_PROBS, 0.1, normalizer=mask.sum()).item() == pytest.approx(0.39925385, abs=1e-7)


def test_worked_example_inclusive():
    mask = profit_mask(LOG_PROBS, 0.1, inclusive=True)
    assert mask.tolist() == [True, False, True, True, False]
    assert gated_loss(LOG_PROBS, 0.1, inclusive=True).item() == pytest.approx(0.62021856, abs=1e-7)
    assert gated_loss(LOG_PROBS, 0.1, inclusive=True, normalizer=mask.sum()).item() == pytest.approx(
        1.03369760, abs=1e-6
    )


def test_mask_of_each_mode_on_the_worked_example():
    assert profit_mask(LOG_PROBS, 0.1, "lower").tolist() == [False, True, False, False, True]
    assert profit_mask(LOG_PROBS, 0.1, "lower", inclusive=True).tolist() == [False, True, True, False, True]
    assert profit_mask(LOG_PROBS, 0.05, "middle", threshold_high=0.5).tolist() == [False, False, True, False, False]
    closed = profit_mask(LOG_PROBS, 0.05, "middle", inclusive=True, threshold_high=0.5)
    assert closed.tolist() == [False, True, True, True, False]
    uniforms = torch.tensor([0.0, 0.29, 0.3, 0.31, 0.99])
    assert profit_mask(LOG_PROBS, 0.3, "random", uniforms=uniforms).tolist() == [False, False, True, True, True]


def test_random_drops_with_the_given_probability():
    uniforms = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    kept = profit_mask(torch.zeros_like(uniforms), 0.3, "random", uniforms=uniforms).float().mean().item()
    assert kept == pytest.approx(0.7, abs=0.005)


def test_threshold_zero_is_sft():  # I1
    log_probs = torch.tensor([-0.1, -5.0, -200.0])  # exp(-200) is 0 in float32: the gate must not see that
    assert profit_mask(log_probs, 0.0).all()
    assert gated_loss(LOG_PROBS, 0.0).item() == pytest.approx(2.00176961, abs=1e-6)


def test_threshold_one_trains_on_nothing():  # I2
    log_probs = torch.tensor([0.0, -1e-7, -3.0], requires_grad=True)
    loss = gated_loss(log_probs, 1.0)
    loss.backward()
    assert loss.item() == 0 and log_probs.grad.tolist() == [0, 0, 0]


def test_improbable_beyond_float32_is_below_every_threshold():
    log_probs = torch.tensor([-math.inf, -120.0])
    assert profit_mask(log_probs, 0.0).tolist() == [False, True]
    assert profit_mask(log_probs, 0.0, inclusive=True).tolist() == [True, True]
    assert profit_mask(log_probs, 1e-30, "lower").tolist() == [True, True]


def test_half_precision_is_compared_in_float32():
    log_probs = torch.tensor([math.log(0.1)]).bfloat16()  # -2.296875, a probability of 0.10057
    assert profit_mask(log_probs, 0.1005).item() and not profit_mask(log_probs, 0.1006).item()


logits = st.lists(st.lists(st.floats(-8, 8, width=32), min_size=5, max_size=5), min_size=1, max_size=6)


@given(logits, st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_loss_never_grows_with_the_threshold(rows, thresholds):  # I3
    log_probs = torch.tensor(rows).log_softmax(-1)[:, 0]
    low, high = sorted(thresholds)
    assert gated_loss(log_probs, high) <= gated_loss(log_probs, low)


@given(logits, st.floats(0, 1))
def test_gradient_is_sft_on_kept_and_zero_on_gated(rows, threshold):  # I4, I6, I7
    x = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    log_probs = x.log_softmax(-1)[:, 0]
    mask = profit_mask(log_probs, threshold)
    gated_loss(log_probs, threshold).backward()
    probs = x.detach().softmax(-1)
    residual = probs - torch.eye(5, dtype=x.dtype)[0]
    torch.testing.assert_close(x.grad, residual * mask[:, None] / len(rows))
    assert (x.grad[~mask] == 0).all()
    assert (residual.norm(dim=-1) >= 1 - probs[:, 0] - 1e-12).all()


@given(logits, st.floats(0, 1), st.integers(0, 6))
def test_any_split_adds_up(rows, threshold, cut):  # I5
    log_probs = torch.tensor(rows).log_softmax(-1)[:, 0]
    parts = [gated_loss(part, threshold, normalizer=len(rows)) for part in (log_probs[:cut], log_probs[cut:])]
    assert sum(parts).item() == pytest.approx(gated_loss(log_probs, threshold).item(), rel=1e-5, abs=1e-6)


@given(logits, st.floats(0, 1))
def test_lower_is_the_rest(rows, threshold):
    log_probs = torch.tensor(rows).log_softmax(-1)[:, 0]
    higher = profit_mask(log_probs, threshold)
    assert torch.equal(higher, ~profit_mask(log_probs, threshold, "lower", inclusive=True))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1.5,), "Thresholds are probabilities, the lower one first; got threshold=1.5"),
        ((-0.1,), "got threshold=-0.1"),
        ((math.nan,), "got threshold=nan"),
        ((0.1, "above"), "`mode='above'` is unknown. Choose one of 'higher', 'lower', 'middle', 'random'"),
        ((0.1, "random"), "needs `uniforms`"),
        ((0.1, "middle"), "`threshold_high` belongs to `mode='middle'`; got mode='middle', threshold_high=None"),
        ((0.1, "higher", False, 0.5), "`threshold_high` belongs to `mode='middle'`; got mode='higher'"),
        ((0.1, "middle", False, 0.05), "the lower one first; got threshold=0.1, threshold_high=0.05"),
        ((0.1, "middle", False, 2.0), "got threshold=0.1, threshold_high=2.0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        profit_mask(LOG_PROBS, *arguments)
