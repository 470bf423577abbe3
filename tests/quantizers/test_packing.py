import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rb import PTQTPConfig
from hf_rb.quantizers.ptqtp import TritPlanes, solve
from hf_rb.quantizers.ptqtp.packing import packed_width


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


@settings(max_examples=60, deadline=None)
@given(
    planes=st.integers(1, 2),
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


@pytest.mark.parametrize(
    ("columns", "packing", "width"),
    [
        (128, "dense", 52),
        (128, "nibble", 64),
        (192, "dense", 52 + 26),
        (192, "nibble", 96),
        (129, "dense", 54),
        (129, "nibble", 65),
    ],
)
def test_bytes_of_a_row(columns, packing, width):
    assert packed_width(columns, 128, 2, packing) == width


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
