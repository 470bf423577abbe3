import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_rb.objectives import forward_kl, loca_calibrate, reverse_kl


P, Q = torch.tensor([0.6, 0.25, 0.1, 0.05]), torch.tensor([0.5, 0.3, 0.1, 0.1])
CALIBRATED = torch.tensor([0.42222222, 0.47222222, 0.07037037, 0.03518519])


def test_loca_on_example_a_of_the_notes():
    result = loca_calibrate(P, torch.tensor(1), 0.95)
    assert_close(result, CALIBRATED)
    assert_close(result[0] / result[2], torch.tensor(6.0))
    assert_close(result[1] - result[0], torch.tensor(0.05), atol=1e-6, rtol=0)
    assert forward_kl(Q.log(), P.log()).item() == pytest.approx(0.02915519, rel=1e-5)
    assert forward_kl(Q.log(), result.log()).item() == pytest.approx(0.08136344, rel=1e-5)
    assert reverse_kl(Q.log(), result.log()).item() == pytest.approx(0.0880323, rel=1e-5)


def test_calibrated_kl_is_a_mix_of_kl_and_cross_entropy():
    scale = 0.70370370
    mix = scale * forward_kl(Q.log(), P.log()) + (1 - scale) * 1.2039728 - 0.29588585
    assert_close(forward_kl(Q.log(), CALIBRATED.log()), mix, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("temperature", "scale"), [(1, 0.703704), (2, 0.825125), (4, 0.891206)])
def test_loca_with_temperature_on_example_t_of_the_notes(temperature, scale):
    soft = (P.log() / temperature).softmax(-1)
    result = loca_calibrate(soft, torch.tensor(1), 0.95)
    assert (result[0] / soft[0]).item() == pytest.approx(scale, rel=1e-5)
    assert (result[1] - result[0]).item() == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize(
    ("probs", "label"),
    [([0.3, 0.5, 0.2], 1), ([0.45, 0.45, 0.1], 0), ([0.6, 0.25, 0.15], -100), ([0.6, 0.25, 0.15], 9)],
)
def test_loca_without_label_or_error_changes_nothing(probs, label):
    probs = torch.tensor(probs)
    assert torch.equal(loca_calibrate(probs, torch.tensor(label)), probs)


def test_example_e_alpha_one_is_a_tie():
    result = loca_calibrate(torch.tensor([0.9, 0.06, 0.04]), torch.tensor(2), 1.0)
    assert_close(result, torch.tensor([0.48387097, 0.03225806, 0.48387097]))


@given(st.integers(2, 30), st.integers(0, 10_000), st.floats(0.05, 0.999))
def test_invariants(vocabulary, seed, alpha):
    generator = torch.Generator().manual_seed(seed)
    probs = (torch.randn(6, vocabulary, generator=generator) * 2).softmax(-1)
    labels = torch.randint(0, vocabulary, (6,), generator=generator)
    result = loca_calibrate(probs, labels, alpha)
    assert_close(result.sum(-1), torch.ones(6))
    wrong = probs.argmax(-1) != labels
    label = result.gather(-1, labels[:, None])
    others = result.scatter(-1, labels[:, None], 0).amax(-1, keepdim=True)
    assert_close((label - others)[wrong].squeeze(-1), torch.full((int(wrong.sum()),), 1 - alpha), atol=1e-5, rtol=0)
    assert torch.equal(result[~wrong], probs[~wrong])


def test_no_gradient():
    assert not loca_calibrate(torch.tensor([0.6, 0.4], requires_grad=True), torch.tensor(1)).requires_grad


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1.01])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        loca_calibrate(P, torch.tensor(1), alpha)


@pytest.mark.parametrize(("label", "scale", "as_a_token"), [(0, 1.0, 0.75), (1, 0.818182, 0.692308)])
def test_the_rest_of_a_cached_teacher_is_no_rival(label, scale, as_a_token):
    """Two stored tokens; fifty others, of .01 each, are one event of .5."""
    whole, events = torch.tensor([0.3, 0.2] + [0.01] * 50), torch.tensor([0.3, 0.2, 0.5])
    label, other = torch.tensor(label), 1 - label
    for probs, has_rest, expected in ((whole, False, scale), (events, True, scale), (events, False, as_a_token)):
        result = loca_calibrate(probs, label, 0.9, has_rest)
        assert (result[other] / probs[other]).item() == pytest.approx(expected, abs=1e-6)
        assert result.sum().item() == pytest.approx(1, abs=1e-6)
    assert_close(loca_calibrate(events, label, 0.9, True)[2], loca_calibrate(whole, label, 0.9)[2:].sum())
