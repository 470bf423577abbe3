import torch

from hf_rb.ops.sequences import Sequences


DOCUMENTS = [[5, 6, 7, 8], [9, 10], [6, 5, 7, 8], [5, 6, 7]]
MASK64 = (1 << 64) - 1


def padded(left=False, extra=0):
    width = max(map(len, DOCUMENTS)) + extra
    pad = [[0] * (width - len(ids)) for ids in DOCUMENTS]
    ids = [p + d if left else d + p for d, p in zip(DOCUMENTS, pad, strict=True)]
    mask = [
        [0] * len(p) + [1] * len(d) if left else [1] * len(d) + [0] * len(p)
        for d, p in zip(DOCUMENTS, pad, strict=True)
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def packed(order=(0, 1, 2, 3)):
    ids = [token for i in order for token in DOCUMENTS[i]]
    positions = [position for i in order for position in range(len(DOCUMENTS[i]))]
    return {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}


def draws(inputs, seed=3, step=7):
    """The draws of each document, in its own order."""
    uniforms, mask = Sequences(inputs).uniforms(seed, step), inputs.get("attention_mask")
    if mask is not None:
        return [row[keep.bool()].tolist() for row, keep in zip(uniforms, mask, strict=True)]
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    return [part.tolist() for part in uniforms[0].tensor_split(starts[1:])]


def splitmix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def reference(ids, seed, step):
    golden = 0x9E3779B97F4A7C15
    stride = [position * golden for position in range(len(ids))]
    sequence = sum(
        splitmix((splitmix((token + golden) & MASK64) + s) & MASK64) for token, s in zip(ids, stride, strict=True)
    )
    key = splitmix((splitmix((seed + golden) & MASK64) + step) & MASK64)
    return [(splitmix((splitmix((sequence & MASK64) ^ key) + s) & MASK64) >> 40) / 2**24 for s in stride]


def test_draws_are_the_stated_function():
    assert draws(padded()) == [reference(ids, 3, 7) for ids in DOCUMENTS]


def test_draws_do_not_depend_on_the_layout():
    expected = draws(padded())
    assert draws(padded(extra=5)) == expected
    assert draws(padded(left=True, extra=2)) == expected
    assert draws(packed()) == expected
    assert draws(packed((2, 0, 3, 1))) == [expected[i] for i in (2, 0, 3, 1)]
    state = torch.get_rng_state()
    draws(padded())
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_depend_on_everything_else():
    documents = draws(padded())
    assert documents[0] != documents[2]  # the same tokens in another order
    assert documents[0][:3] != documents[3]  # one a prefix of the other
    assert draws(padded(), seed=4) != documents != draws(padded(), step=8)


def test_draws_are_uniform():
    ids = torch.randint(0, 1000, (500, 400), generator=torch.Generator().manual_seed(0))
    u = Sequences({"input_ids": ids}).uniforms(0, 0)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    chi_squared = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_squared < 150  # 99 degrees of freedom: beyond it in 0.1 % of tables
    for axis in (0, 1):  # neighbours, in a sequence and across sequences, are uncorrelated
        a, b = u.narrow(axis, 0, u.size(axis) - 1) - 0.5, u.narrow(axis, 1, u.size(axis) - 1) - 0.5
        assert abs((a * b).mean() * 12) < 0.01
    first = torch.stack([Sequences({"input_ids": ids}).uniforms(0, step)[:, 0] for step in range(40)]) - 0.5
    assert abs((first[1:] * first[:-1]).mean() * 12) < 0.03  # nor do steps follow one another


def test_total_of_packed_and_padded_rows_is_per_sequence():
    values = torch.tensor([[1, 2, 3, 4, 10, 20, 5, 6, 7, 8, 1, 1, 1]])
    assert Sequences(packed()).total(values).tolist() == [[10] * 4 + [30] * 2 + [26] * 4 + [3] * 3]
    assert Sequences(padded()).total(torch.ones(4, 4))[:, 0].tolist() == [4, 4, 4, 4]


def test_a_row_that_begins_inside_a_text_is_a_sequence():
    """As where a text is cut over processes: the first position is not 0."""
    sequences = Sequences({"input_ids": torch.zeros(2, 4), "position_ids": torch.tensor([[4, 5, 0, 1], [2, 3, 4, 5]])})
    assert sequences.spans() == [(0, 2), (2, 4), (4, 8)]
    assert sequences.total(torch.ones(2, 4)).tolist() == [[2, 2, 2, 2], [4, 4, 4, 4]]
