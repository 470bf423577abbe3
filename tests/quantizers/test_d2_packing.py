from dataclasses import replace

import pytest
import torch
from helpers.d2_matrices import from_kernels, pack, unpack
from hypothesis import given
from hypothesis import strategies as st

from hf_rb.quantizers import kernels
from hf_rb.quantizers.d2quant import format as packing
from hf_rb.quantizers.d2quant.maths import dsq, grids
from hf_rb.quantizers.d2quant.maths.dsq import DualCodes
from hf_rb.quantizers.d2quant.maths.grids import AffineCodes
from hf_rb.quantizers.packed.weight import SUFFIXES, DamagedTensor, PackedWeight


def random_codes(bits, dual, rows, columns, group_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    if dual:
        signs = 2 * torch.randint(2, (bits, rows, columns), generator=generator).to(torch.int8) - 1
        scale = torch.rand(rows, groups, bits, generator=generator).half()
        return DualCodes(signs, scale, torch.rand(columns, generator=generator) + 0.5, group_size)
    codes, zero = (
        torch.randint(2**bits, (rows, n), generator=generator, dtype=torch.uint8) for n in (columns, groups)
    )
    scale = torch.randn(rows, groups, generator=generator).exp().mul(0.02).half()
    return AffineCodes(codes, scale, zero, bits, group_size)


KINDS = [(2, False), (3, False), (4, False), (2, True), (3, True)]


def test_worked_example():
    codes = torch.tensor([[3, 0, 1, 2, 2, 1, 0, 3]], dtype=torch.uint8)
    made = AffineCodes(codes, torch.tensor([[0.5, 2.0]]).half(), torch.tensor([[1, 2]], dtype=torch.uint8), 2, 4)
    packed = pack(made)
    # A group of four 2-bit codes is a byte, the first code in the lowest bits: 3 + 0 * 4 + 1 * 16 + 2 * 64.
    assert packed["weight"].tolist() == [[147, 2 + 1 * 4 + 0 * 16 + 3 * 64]]
    assert packed["weight_zero"].tolist() == [[1 + 2 * 4]]
    assert made.dequantize().tolist() == [[1.0, -0.5, 0.0, 0.5, 0.0, -2.0, -4.0, 2.0]]


def test_three_bits_are_two_tensors():
    codes = torch.tensor([[7, 0, 5, 2, 3, 4, 1, 6]], dtype=torch.uint8)
    zero = torch.tensor([[5, 1, 7, 2]], dtype=torch.uint8)
    packed = pack(AffineCodes(codes, torch.ones(1, 4).half(), zero, 3, 2))
    # Lower bits 3|0, 1|2, 3|0, 1|2; of n = 2 codes each is one byte's own. Third bits 1|0, 1|0, 0|1, 0|1.
    assert packed["weight"].tolist() == [[3, 1 + 2 * 4, 3, 1 + 2 * 4]]
    assert packed["weight_hi"].tolist() == [[1, 1, 2, 2]]
    stream = 5 + (1 << 3) + (7 << 6) + (2 << 9)
    assert packed["weight_zero"].tolist() == [[stream & 255, stream >> 8]]


@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 3),
    columns=st.integers(1, 40),
    group_size=st.integers(1, 17),
    seed=st.integers(0, 10_000),
)
def test_unpack_inverts_pack(kind, rows, columns, group_size, seed):
    bits, dual = kind
    made = random_codes(bits, dual, rows, columns, group_size, seed)
    packed = pack(made)
    found = unpack(packed, columns, group_size, bits)
    assert type(found) is type(made)
    assert torch.equal(found.dequantize(), made.dequantize())
    again = pack(found)
    assert again.keys() == packed.keys() and all(torch.equal(again[name], packed[name]) for name in packed)
    # The kernels see what the codes say: at 3 bits one addition is in another order.
    memory = packing.for_kernels(made)
    layout = packing.layout_of(columns, group_size, bits, dual)
    seen = kernels.dequantize(memory.packed, memory.scale, layout) * (1 if memory.column is None else memory.column)
    torch.testing.assert_close(seen, made.dequantize(), atol=0 if bits != 3 and not dual else 1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "bits_per_weight"),
    [
        ((2, False), 2 + 18 / 128),
        ((3, False), 3 + 19 / 128),
        ((4, False), 4 + 20 / 128),
        ((2, True), 2.25),
        ((3, True), 3.375),
    ],
)
def test_packed_bytes_are_the_stated_bits_per_weight(kind, bits_per_weight):
    packed = pack(random_codes(*kind, 64, 1024, 128))
    packed.pop("weight_column", None)  # in the scales of another matrix
    assert 8 * sum(tensor.nbytes for tensor in packed.values()) / (64 * 1024) == bits_per_weight


def test_matrices_of_the_quantizers():
    weight = torch.randn(12, 200, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    for made in (grids.round_to_nearest(weight, 2, 64), dsq.round_to_nearest(weight, 3, 64)):
        found = unpack(pack(made), 200, 64, made.bits)
        assert torch.equal(found.dequantize(), made.dequantize())


def test_experts_keep_their_dimensions():
    made = [random_codes(3, False, 4, 20, 8, seed) for seed in range(3)]
    layout = packing.layout_of(20, 8, 3)
    memory = [packing.for_kernels(one) for one in made]
    stacked = PackedWeight.join(memory, torch.stack)
    stored = packing.to_file(layout, stacked)
    for i, one in enumerate(made):
        alone, expert = pack(one), stored[i].named("weight")
        assert expert.keys() == alone.keys() and all(torch.equal(expert[name], alone[name]) for name in alone)
    found = packing.from_file(layout, stored).parts()
    assert all(torch.equal(found[part], tensor) for part, tensor in stacked.parts().items())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scaling_rows(bits):
    made = random_codes(bits, False, 6, 40, 16)
    layout = packing.layout_of(40, 16, bits)
    factor = torch.rand(6, generator=torch.Generator().manual_seed(1)) * 3 + 0.1
    memory = packing.for_kernels(made)
    scaled = from_kernels(layout, replace(memory, scale=packing.scale_rows(layout, memory.scale, factor)))
    assert torch.equal(scaled.codes, made.codes) and torch.equal(scaled.zero, made.zero)
    assert torch.equal(scaled.scale, (made.scale.float() * factor[:, None]).half())
    nothing = packing.scale_rows(layout, memory.scale, factor * torch.tensor([1, 0, 1, 1, 1, 1]))
    assert not from_kernels(layout, replace(memory, scale=nothing)).dequantize()[1].any()
    for beyond in (1e8, 1e-9):
        with pytest.raises(ValueError, match="out of the range of float16"):
            packing.scale_rows(layout, memory.scale, factor * beyond)


DAMAGES = [
    (
        "",
        lambda tensor: tensor[:, 1:],
        r"Expected torch.uint8 of shape \(4, \d+\), got torch.uint8 of shape \(4, ",
    ),
    ("", lambda tensor: tensor.float(), r"Expected torch.uint8 .* got torch.float32"),
    ("_scale", lambda tensor: tensor[:, 1:], "Expected torch.float16 of shape"),
    ("_scale", lambda tensor: tensor.float(), "Expected torch.float16 .* got torch.float32"),
    ("_scale", lambda tensor: tensor.fill_(-1), "negative, infinite or NaN: the file is damaged"),
    ("_scale", lambda tensor: tensor.fill_(torch.nan), "negative, infinite or NaN: the file is damaged"),
    ("_scale", lambda tensor: None, "not in the checkpoint"),
    ("_zero", lambda tensor: tensor[:, 1:], "Expected torch.uint8 of shape"),
    ("_zero", lambda tensor: None, "not in the checkpoint"),
    ("_hi", lambda tensor: tensor[:, 1:], "Expected torch.uint8 of shape"),
    ("_hi", lambda tensor: None, "not in the checkpoint"),
    ("_column", lambda tensor: tensor.fill_(torch.inf), "negative, infinite or NaN"),
    ("_column", lambda tensor: tensor[1:], "Expected torch.float32 of shape"),
    ("_column", lambda tensor: None, "not in the checkpoint"),
]
HELD = {(bits, dual): {"", "_scale", "_column" if dual else "_zero", "_hi" * (bits == 3)} for bits, dual in KINDS}


@pytest.mark.parametrize(
    ("kind", "suffix", "damage", "message"),
    [(kind, *case) for kind in KINDS for case in DAMAGES if case[0] in HELD[kind]]
    + [
        (kind, suffix, lambda tensor: torch.zeros(1), "There is no such tensor for")
        for kind in KINDS
        for suffix in sorted({*SUFFIXES.values()} - HELD[kind])
    ],
)
def test_damaged_tensors(kind, suffix, damage, message):
    packed = pack(random_codes(*kind, 4, 300, 128))
    packed[f"weight{suffix}"] = damage(packed.get(f"weight{suffix}"))
    with pytest.raises(DamagedTensor, match=message) as error:
        stored = PackedWeight.collect("weight", packed.get)
        packing.from_file(packing.layout_of(300, 128, *kind), stored, column=kind[1])
    assert error.value.suffix == suffix


def test_zero_points_that_no_float16_holds():
    made = AffineCodes(
        torch.zeros(1, 4, dtype=torch.uint8), torch.tensor([[6e4]]).half(), torch.full((1, 1), 3).byte(), 2, 4
    )
    stored = packing.to_file(
        packing.layout_of(4, 4, 2), packing.for_kernels(AffineCodes(made.codes, made.scale, made.zero * 0, 2, 4))
    )
    with pytest.raises(DamagedTensor, match="too large for float16"):
        packing.from_file(packing.layout_of(4, 4, 2), replace(stored, zero=torch.tensor([[3]], dtype=torch.uint8)))
