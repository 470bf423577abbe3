import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_rb import PTQTPConfig
from hf_rb.quantizers.ptqtp import TritPlanes, solve
from hf_rb.quantizers.ptqtp.format import layout_of, packed_width, repack


def planes_of(trits, group_size):
    trits = torch.as_tensor(trits, dtype=torch.int8)
    groups = -(-trits.shape[2] // group_size)
    return TritPlanes(trits, torch.ones(trits.shape[1], groups, len(trits), dtype=torch.float16), group_size)


EXAMPLE = [[[1, 0, 0, 0, -1, 1, -1, 0]], [[1, -1, 0, 1, -1, 0, 1, 1]]]


def test_worked_example_nibbles():
    codes = [3 * (a + 1) + b + 1 for a, b in zip(EXAMPLE[0][0], EXAMPLE[1][0], strict=True)]
    assert codes == [8, 3, 4, 5, 0, 7, 2, 5]
    assert bytes(planes_of(EXAMPLE, 8).pack("nibble")["weight"].flatten().tolist()).hex() == "08732455"


def test_worked_example_dense():
    # 21110 = 201, 20111 = 175 with two unused places; then 20120 and 12211 of the second plane.
    assert planes_of(EXAMPLE, 8).pack("dense")["weight"].tolist() == [[201, 175, 177, 157]]


@given(
    planes=st.integers(1, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 40),
    group_size=st.integers(1, 17),
    packing=st.sampled_from(["dense", "nibble"]),
    seed=st.integers(0, 10_000),
)
def test_unpack_inverts_pack(planes, rows, columns, group_size, packing, seed):
    trits = torch.randint(-1, 2, (planes, rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = planes_of(trits, group_size).pack(packing)
    assert packed["weight"].dtype == torch.uint8
    assert packed["weight"].shape == (rows, packed_width(columns, group_size, planes, packing))
    config = PTQTPConfig(group_size=group_size, packing=packing)
    found = TritPlanes.unpack(packed, config, in_features=columns)
    assert torch.equal(found.trits, trits.to(torch.int8)) and found.shape == (rows, columns)
    again = found.pack(packing)
    assert all(torch.equal(again[name], packed[name]) for name in packed)
    if columns % group_size == 0:
        assert torch.equal(TritPlanes.unpack(packed, config).trits, found.trits)
    layout = layout_of(columns, group_size, planes)
    for other in ("dense", "nibble"):
        expected = planes_of(trits, group_size).pack(other)["weight"]
        assert torch.equal(repack(packed["weight"], layout, packing, other), expected)


@pytest.mark.parametrize(
    ("columns", "planes", "dense", "nibble"),
    [(128, 2, 52, 64), (192, 2, 52 + 26, 96), (129, 2, 54, 65), (128, 1, 26, 32), (130, 1, 27, 33), (128, 3, 78, 96)],
)
def test_bytes_of_a_row(columns, planes, dense, nibble):
    assert packed_width(columns, 128, planes, "dense") == dense
    assert packed_width(columns, 128, planes, "nibble") == nibble


def test_a_plane_left_over():
    # One plane: digits 2, 1, 0, 2, 1, 1, 0 and a place that is not used, four of them a byte, q = 2 apart.
    trits = [[[1, 0, -1, 1, 0, 0, -1]]]
    packed = planes_of(trits, 7).pack("nibble")["weight"]
    assert packed.tolist() == [[2 | 0 << 2 | 1 << 4 | 0 << 6, 1 | 2 << 2 | 1 << 4 | 1 << 6]]
    # Three planes: the codes of the first two, then the digits of the third.
    three = planes_of([*EXAMPLE, [[1, 0, -1, 1, 0, 0, -1, 0]]], 8).pack("nibble")["weight"]
    assert bytes(three.flatten().tolist()[:4]).hex() == "08732455" and three[0, 4:].tolist() == packed[0].tolist()


def test_repacking_keeps_leading_dimensions():
    trits = torch.randint(-1, 2, (2, 12, 20), generator=torch.Generator().manual_seed(0))
    dense, nibble = (planes_of(trits, 8).pack(packing)["weight"].view(3, 4, -1) for packing in ("dense", "nibble"))
    layout = layout_of(20, 8, 2)
    assert torch.equal(repack(dense, layout, "dense", "nibble"), nibble)
    assert torch.equal(repack(nibble, layout, "nibble", "dense"), dense)
    assert repack(dense, layout, "dense", "dense") is dense
    with pytest.raises(ValueError, match=r"Expected uint8 rows of 10 bytes \(20 weights, 2 planes, 'dense'\)"):
        repack(nibble[..., 1:], layout, "dense", "nibble")


@pytest.mark.parametrize("packing", ["dense", "nibble"])
def test_every_code_round_trips(packing):
    trits = torch.cartesian_prod(*[torch.arange(-1, 2)] * 2).T[:, None]  # all nine pairs, an odd number
    config = PTQTPConfig(group_size=9, packing=packing)
    packed = planes_of(trits, 9).pack(packing)
    assert torch.equal(TritPlanes.unpack(packed, config).trits, trits.to(torch.int8))


@pytest.mark.parametrize(("packing", "byte"), [("dense", 243), ("nibble", 0x90), ("nibble", 0x09)])
def test_bytes_that_are_no_codes(packing, byte):
    config = PTQTPConfig(group_size=8, packing=packing)
    packed = planes_of(EXAMPLE, 8).pack(packing)
    packed["weight"][0, 0] = byte
    with pytest.raises(ValueError, match="the file is damaged"):
        TritPlanes.unpack(packed, config)


def test_short_last_group_needs_the_number_of_columns():
    weight = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    packed = solve(weight, 8).pack()
    config = PTQTPConfig(group_size=8)
    with pytest.raises(ValueError, match="pass `in_features`"):
        TritPlanes.unpack(packed, config)
    with pytest.raises(ValueError, match="24 bytes a row|is not a matrix"):
        TritPlanes.unpack(packed, config, in_features=28)
    assert TritPlanes.unpack(packed, config, in_features=20).shape == (4, 20)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="'dense' or 'nibble'"):
        planes_of(EXAMPLE, 8).pack("sparse")


def test_dequantize_multiplies_and_sums_in_float32():
    planes = solve(torch.randn(6, 200, generator=torch.Generator().manual_seed(0)))
    scales = planes.scales.float().repeat_interleave(128, dim=1)[:, :200]
    expected = (planes.trits.float() * scales.permute(2, 0, 1)).sum(0)
    assert torch.equal(planes.dequantize(), expected)
    assert torch.equal(planes.dequantize(torch.bfloat16), expected.bfloat16())
