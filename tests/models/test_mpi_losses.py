from types import SimpleNamespace

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_rb.models.mpi.losses import auxiliary_loss, balance_loss, sequence_ids, z_loss


PROBS = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])


def random_logits(tokens, experts=6, layers=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, experts, generator=generator) * 2 for _ in range(layers))


def config(**fields):
    return SimpleNamespace(**{"num_experts_per_tok": 2, "lb_type": "sequence", "router_aux_loss_coef": 0.01} | fields)


def test_worked_example_of_the_paper():
    logits = (PROBS.log(),)
    assert balance_loss(logits, top_k=2) == pytest.approx(1.0)
    assert load_balancing_loss_func(logits, 4, 2) == pytest.approx(2.0)  # K times as much


def test_collapse_of_layers_on_different_experts_does_not_cancel():
    collapsed = torch.full((8, 2), -20.0)
    collapsed[:, 0] = 20.0
    layers = (collapsed, collapsed.flip(1))
    assert balance_loss(layers, top_k=1) == pytest.approx(2.0)
    assert load_balancing_loss_func(layers, 2, 1) == pytest.approx(1.0)


def test_equals_the_definition_sequence_by_sequence():
    rows, length, top_k = 3, 5, 2
    logits = random_logits(rows * length)
    expected = []
    for layer in logits:
        for z in layer.view(rows, length, -1):
            experts = z.shape[-1]
            probs = z.softmax(-1)
            picks = probs.topk(top_k).indices
            f = torch.stack([(picks == i).sum() for i in range(experts)]) * experts / (top_k * length)
            expected.append((f * probs.mean(0)).sum())
    ids, count = sequence_ids((rows, length))
    assert balance_loss(logits, top_k, ids, count) == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["sequence", "layer", "hf"])
def test_padding_does_not_count(kind):
    lengths, width = [3, 5, 1], 5
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    logits = random_logits(len(lengths) * width)
    noisy = tuple(torch.where(mask.reshape(-1, 1) > 0, layer, layer * 50 + 9) for layer in logits)
    options = config(lb_type=kind, z_loss_coef=0.003)
    plain, padded = (auxiliary_loss(options, some, mask.shape, attention_mask=mask) for some in (logits, noisy))
    assert padded == pytest.approx(plain.item(), rel=1e-6)


def test_packed_rows_equal_padded_ones():
    lengths, width = [3, 5, 1], 5
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    logits = random_logits(len(lengths) * width)
    packed = tuple(layer[mask.reshape(-1) > 0] for layer in logits)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    expected = auxiliary_loss(config(), logits, mask.shape, attention_mask=mask)
    assert auxiliary_loss(config(), packed, positions.shape, position_ids=positions) == pytest.approx(expected.item())


def test_loss_per_sequence_does_not_depend_on_micro_batches():
    rows, length = 4, 6
    logits = random_logits(rows * length)
    whole = auxiliary_loss(config(), logits, (rows, length))
    halves = [auxiliary_loss(config(), [part.chunk(2)[i] for part in logits], (2, length)) for i in (0, 1)]
    assert torch.stack(halves).mean() == pytest.approx(whole.item(), rel=1e-6)


def test_ordinary_positions_are_one_sequence_a_row():
    positions = torch.arange(7).expand(1, 7)  # broadcast over rows, as models make them
    ids, count = sequence_ids((2, 7), position_ids=positions)
    assert count == 2 and ids.tolist() == [0] * 7 + [1] * 7
    shifted, count = sequence_ids((2, 3), position_ids=torch.tensor([[4, 5, 6], [2, 3, 0]]))
    assert count == 3 and shifted.tolist() == [0, 0, 0, 1, 1, 2]


def test_an_empty_sequence_does_not_count():
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    logits = random_logits(6)
    alone = balance_loss([layer[:3] for layer in logits], top_k=2)
    assert auxiliary_loss(config(), logits, mask.shape, attention_mask=mask) == pytest.approx(alone.item())
    nothing = auxiliary_loss(config(z_loss_coef=0.1), logits, mask.shape, attention_mask=torch.zeros_like(mask))
    assert nothing == 0


def test_layer_is_transformers_loss_of_each_layer_over_k():
    logits = random_logits(20)
    expected = torch.stack([load_balancing_loss_func((layer,), 6, 2) for layer in logits]).mean() / 2
    assert auxiliary_loss(config(lb_type="layer"), logits, (4, 5)) == pytest.approx(expected.item(), rel=1e-6)


def test_hf_is_transformers():
    logits = random_logits(20)
    assert auxiliary_loss(config(lb_type="hf"), logits, (4, 5)) == load_balancing_loss_func(logits, 6, 2)
    assert auxiliary_loss(SimpleNamespace(num_experts_per_tok=2), logits, (4, 5)) == load_balancing_loss_func(
        logits, 6, 2
    )


def test_every_expert_gets_a_gradient_picked_or_not():
    (logits,) = random_logits(8, layers=1)
    logits.requires_grad_()
    balance_loss((logits,), top_k=1).backward()
    assert (logits.grad != 0).all()
    assert logits.grad.sum(-1).abs().max() < 1e-6  # softmax: rows sum to 0


def test_sigmoid_scores_are_shares():
    logits = (torch.tensor([[3.0, 3.0, -50.0, -50.0], [-50.0, -50.0, 3.0, 3.0]]),)
    assert balance_loss(logits, top_k=2, score_func="sigmoid") == pytest.approx(1.0)


def test_bfloat16_logits_are_summed_in_float32():
    logits = random_logits(4096, layers=1)
    low = tuple(layer.bfloat16() for layer in logits)
    assert balance_loss(low, top_k=2).dtype == torch.float32
    assert balance_loss(low, top_k=2) == pytest.approx(balance_loss(logits, top_k=2).item(), rel=2e-3)


def test_z_loss_by_hand_and_its_weight():
    logits = (torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.zeros(2, 2))
    ln2 = torch.tensor(2.0).log()
    assert z_loss(logits) == pytest.approx(((ln2**2 + (1 + ln2) ** 2) / 2 + ln2**2).item() / 2)
    assert z_loss(logits, torch.tensor([True, False])) == pytest.approx((ln2**2).item())
    without, with_z = (auxiliary_loss(config(z_loss_coef=c), random_logits(6), (2, 3)) for c in (0.0, 0.001))
    assert 0.01 * (with_z - without) == pytest.approx(0.001 * z_loss(random_logits(6)).item(), rel=1e-4)


def test_a_z_loss_that_cannot_act_is_refused():
    with pytest.raises(ValueError, match="z_loss_coef=0.001 cannot act with router_aux_loss_coef=0"):
        auxiliary_loss(config(z_loss_coef=0.001, router_aux_loss_coef=0.0), random_logits(6), (2, 3))
