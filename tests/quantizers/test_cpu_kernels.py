import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.pairwise import pairwise
from torch import nn

from hf_rb.io import native
from hf_rb.quantizers import kernels
from hf_rb.quantizers.kernels import cpu, reference
from hf_rb.quantizers.kernels.layout import Layout, Part, pack, unpack


NIBBLE = Part(4, (tuple(code // 3 - 1 for code in range(9)), tuple(code % 3 - 1 for code in range(9))))
CRUMB = Part(2, ((-1, 0, 1),))
SIGNS = Part(2, ((-1, -1, 1, 1), (-1, 1, -1, 1)))  # two planes of signs
SIGN = Part(1, ((-1, 1),))
AFFINE_4 = Part(4, (tuple(range(16)), (1,) * 16))
AFFINE_2 = Part(2, ((0, 1, 2, 3), (1, 1, 1, 1)))
PARTS = {
    "two trits": (NIBBLE,),
    "one trit": (CRUMB,),
    "three trits": (NIBBLE, CRUMB),
    "tied trits": (Part(4, (tuple(range(-4, 5)),)),),
    "signs": (SIGN,),
    "two signs": (SIGNS,),
    "three signs": (SIGNS, SIGN),
    "4 bits": (AFFINE_4,),
    "2 bits": (AFFINE_2,),
    "3 bits": (AFFINE_2, SIGN),
    "all": (NIBBLE, CRUMB, SIGN),
}
SIZES = [(128, 128), (576, 128), (300, 128), (7, 128), (1, 1), (130, 13), (513, 256), (66, 64)]
ROWS = [1, 6]


@pytest.fixture(params=native.supported())
def kernel(request):
    """The kernel of each instruction set."""
    library = native.load(cpu.SOURCE, request.param)
    if library is None:
        pytest.skip("there is no compiler")
    return cpu.Kernel(library, request.param)


def make(layout, rows, seed=0):
    """A random packed matrix, its scales, the same in float64, and the sum of absolute terms."""
    generator = torch.Generator().manual_seed(seed)
    shape = rows, layout.in_features
    codes = [torch.randint(len(part.basis[0]), shape, generator=generator, dtype=torch.uint8) for part in layout.parts]
    scale = (torch.randn(rows, layout.groups, layout.num_scales, generator=generator) * 0.1).half()
    matrix, size = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    column = torch.arange(layout.in_features) // layout.group_size
    first = 0
    for part, code in zip(layout.parts, codes, strict=True):
        for row in part.basis:
            term = scale[:, column, first].double() * torch.tensor(row, dtype=torch.float64)[code.long()]
            matrix, size, first = matrix + term, size + term.abs(), first + 1
    return pack(codes, layout), scale, matrix, size


def inputs(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# The layout.


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_unpack_inverts_pack(parts):
    for (length, group_size), rows in itertools.product(SIZES, ROWS):
        layout = Layout(length, group_size, parts)
        generator = torch.Generator().manual_seed(length)
        codes = [torch.randint(len(part.basis[0]), (rows, length), generator=generator).byte() for part in parts]
        packed = pack(codes, layout)
        assert packed.shape == (rows, layout.row_bytes) and packed.dtype == torch.uint8
        assert all(torch.equal(*pair) for pair in zip(unpack(packed, layout), codes, strict=True))
        assert Layout.from_key(layout.key) == layout


def test_bytes_of_a_row():
    assert Layout(128, 128, (NIBBLE,)).row_bytes == 64
    assert Layout(128, 128, (CRUMB,)).row_bytes == 32
    assert Layout(576, 128, (NIBBLE, CRUMB)).row_bytes == 4 * (64 + 32) + 32 + 16
    layout = Layout(5, 128, (NIBBLE, CRUMB, SIGN))
    nibbles, crumbs, signs = [8, 3, 4, 5, 0], [0, 1, 2, 0, 1], [0, 1, 0, 1, 1]
    packed = pack([torch.tensor([codes], dtype=torch.uint8) for codes in (nibbles, crumbs, signs)], layout)
    # nibbles: 8|5, 3|0, 4|pad 4; crumbs: 0|2|1|pad 1, 1|0|pad|pad; signs: 0, 1, 0, 1, 1, pad 0, 0, 0
    assert packed.tolist() == [[0x58, 0x03, 0x44, 0x58, 0x51, 0b11010]]


@pytest.mark.parametrize(
    "arguments", [(3, ((0, 1),)), (2, ()), (1, ((0, 1, 2),)), (2, ((0, 1), (0, 1, 2))), (1, ((0, 99),))]
)
def test_part_refuses(arguments):
    with pytest.raises(ValueError, match="basis"):
        Part(*arguments)


# Every instruction set against float64.


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_gemv(kernel, parts):
    for (length, group_size), rows, m in itertools.product(SIZES, ROWS, [1, 6]):
        layout = Layout(length, group_size, parts)
        weight, scale, matrix, size = make(layout, rows)
        x = inputs(m, length)
        expected, bound = x.double() @ matrix.T, x.double().abs() @ size.T
        found = kernel.gemv(x, weight, scale, layout)
        assert ((found - expected).abs() <= 1e-6 * bound).all()
        single = kernel.gemv(x[-1:], weight, scale, layout)
        assert torch.equal(single, found[-1:])  # whatever else is in the batch
        rounded = kernel.gemv(x.bfloat16(), weight, scale, layout)
        assert torch.equal(rounded, kernel.gemv(x.bfloat16().float(), weight, scale, layout).bfloat16())


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_int8_gemv(kernel, parts):
    for (length, group_size), rows, m in itertools.product(SIZES, ROWS, [1, 6]):
        layout = Layout(length, group_size, parts)
        weight, scale, matrix, size = make(layout, rows)
        x = inputs(m, length)
        # What the kernel is meant to compute: activations on a grid of 255 values for each group.
        groups = F.pad(x, (0, -length % group_size)).unflatten(-1, (-1, group_size))
        largest = groups.abs().amax(-1, keepdim=True)
        on_grid = ((groups * (127 / largest)).round().double() * largest / 127).flatten(1)[:, :length]
        found = kernel.gemv(x, weight, scale, layout, int8=True)
        # A code that means zero is counted as what is above the lowest value, and that is taken off at the end.
        bound = 2e-5 * (x.double().abs() @ size.T) + 1e-6 * x.abs().sum(-1, keepdim=True) * scale.abs().max()
        assert ((found - on_grid @ matrix.T).abs() <= bound).all()


@pytest.mark.parametrize("rows", [1, 8, 13])
def test_int8_gemv_of_tied_scales(kernel, rows):
    """Rows whose first scale is three times the second take another way, also beside rows where it is not."""
    layout = Layout(576, 128, (NIBBLE,))
    weight, scale, *_ = make(layout, rows)
    scale = (scale.float() * 2**10).round().half() / 2**10  # so that three times a scale is exact
    tied = scale.clone()
    tied[..., 0] = 3 * tied[..., 1]
    tied[rows // 2 :, 2] = scale[rows // 2 :, 2]
    x = inputs(3, 576)
    expected = x.double() @ reference.dequantize(weight, tied, layout, torch.float64).T
    found = kernel.gemv(x, weight, tied, layout, int8=True)
    # The same rows, not recognized: a second part whose scales are zero.
    other = Layout(576, 128, (NIBBLE, CRUMB))
    codes = [*unpack(weight, layout), torch.ones(rows, 576, dtype=torch.uint8)]
    longer = torch.cat([tied, torch.zeros(rows, 5, 1, dtype=torch.float16)], dim=-1)
    same = kernel.gemv(x, pack(codes, other), longer, other, int8=True)
    torch.testing.assert_close(found, same, rtol=1e-5, atol=1e-5)
    assert (found - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e30])
def test_error_of_int8_activations(kernel, size):
    layout = Layout(576, 128, (NIBBLE,))
    weight, scale, matrix, _ = make(layout, 256)
    x = inputs(2, 576) * size
    expected = x.double() @ matrix.T
    error = (kernel.gemv(x, weight, scale, layout, int8=True) - expected).norm() / expected.norm()
    assert 1e-3 < error < 1e-2
    assert not kernel.gemv(x * 0, weight, scale, layout, int8=True).any()
    assert kernel.gemv(inputs(1, 576) * 1e-42, weight, scale, layout, int8=True).abs().max() < 1e-38


@pytest.mark.parametrize("int8", [False, True])
def test_gemv_does_not_depend_on_threads(kernel, int8, monkeypatch):
    monkeypatch.setattr(cpu, "WEIGHTS_PER_THREAD", 1)
    layout = Layout(576, 128, (NIBBLE, CRUMB))
    weight, scale, *_ = make(layout, 37)
    x, results = inputs(3, 576), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(
                (kernel.gemv(x, weight, scale, layout, int8), kernel.expand(weight, scale, layout, x.dtype))
            )
    finally:
        torch.set_num_threads(threads)
    for product, matrix in results[1:]:
        assert torch.equal(product, results[0][0]) and torch.equal(matrix, results[0][1])


@pairwise(
    ("kernel", native.supported()),
    ("parts", PARTS),
    ("dtype", [torch.float32, torch.bfloat16]),
    indirect=["kernel"],
)
def test_expand_is_the_reference(kernel, parts, dtype):
    for (length, group_size), rows in itertools.product(SIZES, ROWS):
        layout = Layout(length, group_size, parts)
        weight, scale, matrix, size = make(layout, rows)
        expected = reference.dequantize(weight, scale, layout, torch.float32)
        assert ((expected - matrix).abs() <= 2e-7 * size).all()
        assert torch.equal(kernel.expand(weight, scale, layout, dtype), expected.to(dtype))


def test_many_rows(kernel, monkeypatch):
    monkeypatch.setattr(cpu, "PANEL", 5 * 300)
    layout = Layout(300, 128, (NIBBLE, CRUMB))
    weight, scale, matrix, _ = make(layout, 37)
    x, grad = inputs(2, 9, 300), inputs(2, 9, 37)
    torch.testing.assert_close(kernel.matmul(x, weight, scale, layout), (x.double() @ matrix.T).float())
    torch.testing.assert_close(kernel.matmul_transposed(grad, weight, scale, layout), (grad.double() @ matrix).float())
    found = kernel.matmul(x.bfloat16(), weight, scale, layout).double()
    expected = x.bfloat16().double() @ matrix.T
    assert (found - expected).norm() <= 5e-3 * expected.norm()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("int8", [False, True])
def test_activations_that_are_not_numbers_stay_visible(kernel, value, int8):
    layout = Layout(300, 128, (NIBBLE,))
    weight, scale, *_ = make(layout, 8)
    x = inputs(2, 300)
    x[1, 290] = value
    found = kernel.gemv(x, weight, scale, layout, int8)
    assert found[0].isfinite().all() and not found[1].isfinite().any()


@pytest.mark.parametrize("int8", [False, True])
def test_group_that_is_longer_than_a_row(kernel, int8):
    layout = Layout(300, 300, (NIBBLE, CRUMB))
    longer = Layout(300, 1 << 45, layout.parts)
    weight, scale, *_ = make(layout, 9)
    x = inputs(2, 300)
    assert torch.equal(kernel.gemv(x, weight, scale, longer, int8), kernel.gemv(x, weight, scale, layout, int8))
    assert torch.equal(
        kernel.expand(weight, scale, longer, x.dtype), reference.dequantize(weight, scale, layout, x.dtype)
    )


def test_the_faster_way(kernel, monkeypatch):
    layout = Layout(256, 128, (NIBBLE,))
    weight, scale, *_ = make(layout, 8)
    ways = []
    for way in ("gemv", "matmul"):
        monkeypatch.setattr(kernel, way, lambda *arguments, way=way: ways.append(way))
    for rows in (8, 9, 16, 17):
        kernel.linear(inputs(rows, 256), weight, scale, layout)
    limit = {"avx512vnni": 16, "avx2": 8, "portable": 0}[kernel.variant]
    assert ways == ["gemv" if rows <= limit else "matmul" for rows in (8, 9, 16, 17)]


def test_shapes_that_do_not_fit(kernel):
    layout = Layout(256, 128, (NIBBLE,))
    weight, scale, *_ = make(layout, 8)
    for wrong in [(weight[:, :64].contiguous(), scale), (weight, scale[:4].contiguous())]:
        with pytest.raises(ValueError, match="does not fit"):
            kernel.gemv(inputs(1, 256), *wrong, layout)


# The dispatch.


class Layer(nn.Module):
    def __init__(self, in_features=576, out_features=40, parts=(NIBBLE,), bias=True, activations="exact"):
        super().__init__()
        self.layout, self.activations = Layout(in_features, 128, parts), activations
        weight, scale, *_ = make(self.layout, out_features)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = nn.Parameter(torch.linspace(-1, 1, out_features)) if bias else None

    def forward(self, input):
        return kernels.linear(input, self)

    def dense(self):
        matrix = reference.dequantize(self.weight, self.weight_scale, self.layout, torch.float64)
        return matrix, None if self.bias is None else self.bias.double()


DISPATCHES = [*native.supported(), "off"]


@pytest.fixture(params=DISPATCHES)
def dispatch(request, monkeypatch):
    """What `kernels` choose with each instruction set, and without a kernel."""
    monkeypatch.setenv("HF_RB_NATIVE", request.param)
    cpu.kernel.cache_clear()
    yield request.param
    cpu.kernel.cache_clear()


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-6}


@pairwise(
    ("dispatch", DISPATCHES),
    ("dtype", list(TOLERANCE)),
    ("shape", [(576,), (1, 576), (2, 4, 576), (3, 5, 576), (70, 576), (0, 576), (2, 0, 576)]),
    indirect=["dispatch"],
)
def test_linear(dispatch, dtype, shape):
    layer = Layer(parts=(NIBBLE, CRUMB)).to(dtype)
    layer.weight_scale.data = layer.weight_scale.data.half()
    x = inputs(*shape, dtype=dtype)
    found = layer(x)
    assert found.dtype == dtype and found.shape == (*shape[:-1], 40)
    expected = F.linear(x.double(), *layer.dense())
    assert (found - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pairwise(
    ("dispatch", DISPATCHES),
    ("m", [3, 40]),
    ("dtype", [torch.float32, torch.bfloat16, torch.float16]),
    indirect=["dispatch"],
)
def test_gradient(dispatch, m, dtype):
    layer = Layer()
    x = inputs(m, 576, dtype=dtype).requires_grad_()
    layer.bias.data = layer.bias.data.to(dtype)
    grad = inputs(m, 40, dtype=dtype)
    layer(x).backward(grad)
    expected = grad.double() @ layer.dense()[0]
    assert x.grad.dtype == dtype and (x.grad - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    torch.testing.assert_close(layer.bias.grad, grad.sum(0), rtol=1e-2, atol=1e-2)
    assert layer.weight.grad is None and layer.weight_scale.grad is None


def test_no_gradient_is_no_graph(dispatch):
    layer = Layer(bias=False)
    assert not layer(inputs(2, 576)).requires_grad
    with torch.no_grad():
        assert not layer(inputs(2, 576).requires_grad_()).requires_grad


def test_compile_without_a_graph_break(dispatch):
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (1, 3, 20):
        x, other = inputs(m, 576).requires_grad_(), inputs(m, 576).requires_grad_()
        torch.testing.assert_close(compiled(x), layer(other))
        compiled(x).square().sum().backward()
        layer(other).square().sum().backward()
        torch.testing.assert_close(x.grad, other.grad)


def test_operator():
    layer = Layer(bias=False)
    arguments = layer.weight, layer.weight_scale, layer.layout.key, "exact"
    torch.library.opcheck(kernels.lut_linear, (inputs(3, 576).requires_grad_(), *arguments))
    torch.library.opcheck(kernels.lut_linear_backward, (inputs(3, 40), *arguments[:3]))


def test_int8_is_asked_for(dispatch):
    exact, rounded = Layer(bias=False), Layer(bias=False, activations="int8")
    x = inputs(1, 576)
    kernel = cpu.kernel()
    assert torch.equal(exact(x), rounded(x)) == (kernel is None or not kernel.decodes)
    assert (exact(x) - rounded(x)).norm() <= 1e-2 * exact(x).norm()
    for m in (4, 30):
        assert torch.equal(exact(inputs(m, 576)), rounded(inputs(m, 576)))


def test_without_a_kernel_the_matrix_is_kept(dispatch, monkeypatch):
    calls = []
    monkeypatch.setattr(
        reference, "dequantize", lambda *arguments, inner=reference.dequantize: calls.append(1) or inner(*arguments)
    )
    layer = Layer()
    for _ in range(3):
        layer(inputs(1, 576))
    kernel = cpu.kernel()
    assert len(calls) == (kernel is None or not kernel.decodes)
    if calls:
        with torch.no_grad():
            layer.weight[0] = 0x44  # zeros
        assert layer(inputs(1, 576))[0, 0] == layer.bias[0] and len(calls) == 2
        kept = len(reference._kept)
        del layer
        kernels.forget()
        assert len(reference._kept) == kept - 1


def test_kept_matrices_are_announced_once(dispatch):
    reference._warn.cache_clear()
    kernel = cpu.kernel()
    kept = kernel is None or not kernel.decodes
    for dtype, expected in [
        (torch.float16, kept),
        (torch.float32, False),
        (torch.bfloat16, kept),
        (torch.float64, True),
    ]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                Layer(bias=False)(inputs(1, 576, dtype=dtype))
        named = torch.float32 if dtype is torch.float16 else dtype
        assert [f"no kernel for {named} activations" in str(warning.message) for warning in caught] == [
            True
        ] * expected


def test_float16_keeps_nothing(monkeypatch):
    """Neither its gradient nor the dequantized matrix goes through the reference where there is a kernel."""
    kernel = cpu.kernel()
    if kernel is None or not kernel.decodes:
        pytest.skip("there is no vector kernel")
    layer = Layer(parts=(NIBBLE, CRUMB))
    arguments = layer.weight, layer.weight_scale, layer.layout, torch.float16
    expected = reference.dequantize(*arguments)
    monkeypatch.setattr(reference, "dequantize", None)
    layer(inputs(3, 576, dtype=torch.float16).requires_grad_()).sum().backward()
    assert torch.equal(kernels.dequantize(*arguments), expected)


def test_forgetting_while_another_thread_forgets(monkeypatch):
    class Gone:
        calls = 0

        def expired(self):
            Gone.calls += 1
            if Gone.calls == 1:
                kernels.forget()  # as another thread would, in between
            return True

    monkeypatch.setattr(reference, "_kept", {place: reference._Kept(Gone(), (), None) for place in range(3)})
    kernels.forget()
    assert not reference._kept


@pairwise(
    ("dispatch", DISPATCHES),
    ("dtype", [torch.bfloat16, torch.float16]),
    ("given", [torch.float32, torch.float64]),
    indirect=["dispatch"],
)
def test_autocast(dispatch, dtype, given):
    layer, other = Layer(), nn.Linear(576, 40, dtype=given)
    x = inputs(3, 576, dtype=given).requires_grad_()
    if given is torch.float64:
        layer.bias.data = layer.bias.data.double()
    with torch.autocast("cpu", dtype):
        found, expected = layer(x), other(x)
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == given
    assert found.dtype == expected.dtype == (given if given is torch.float64 else dtype)
    exact = F.linear(x.double(), *layer.dense())
    assert (found - exact).norm() <= TOLERANCE[found.dtype] * exact.norm()
    found.sum().backward()
    assert x.grad.dtype == given


def test_wrong_activations():
    with pytest.raises(ValueError, match="must be 'exact' or 'int8'; got 'int9'"):
        Layer(activations="int9")(inputs(2, 576))


def test_wrong_input():
    with pytest.raises(ValueError, match="has 575 features, the weight has 576"):
        Layer()(inputs(2, 575))


def test_dequantize_of_experts(dispatch):
    layout = Layout(300, 128, (NIBBLE,))
    weight, scale, matrix, _ = make(layout, 12)
    found = kernels.dequantize(weight.view(3, 4, -1), scale.view(3, 4, 3, 2), layout, torch.float32)
    torch.testing.assert_close(found, matrix.view(3, 4, 300).float())


def test_meta_and_fake_tensors():
    layer = Layer().to("meta")
    assert layer(torch.empty(2, 3, 576, device="meta")).shape == (2, 3, 40)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert Layer(bias=False)(torch.empty(2, 3, 576)).shape == (2, 3, 40)
