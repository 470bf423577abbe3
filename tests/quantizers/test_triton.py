"""The Triton kernels on what this machine has.

Their tests (`triton_cases.py`) run in a process of their own under Triton's interpreter, which has to be switched on before Triton
is imported, and once more on a GPU. That they compile is tested without one.
"""

import importlib
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hf_rb.quantizers import ptqtp
from hf_rb.quantizers.kernels import triton as gpu
from hf_rb.quantizers.kernels.layout import Layout, Part
from hf_rb.quantizers.ptqtp import solver


CASES = Path(__file__).with_name("triton_cases.py")
HAS_TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: pip install 'hf_rb[gpu]'")


def run_cases(**variables):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    environment = {**os.environ, "HF_RB_NATIVE": "off", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_under_the_interpreter():
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton before 3.7 does not work with numpy 2.4")
    run_cases(TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    run_cases(TRITON_INTERPRET="0")


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    try:
        importlib.reload(gpu)
        assert not gpu.available(torch.device("cuda"))
        assert not gpu.available(torch.device("cpu"))
        assert solver._compiled(torch.zeros(1, 1, device="meta")) is None
    finally:
        monkeypatch.undo()
        importlib.reload(gpu)


@pytest.mark.parametrize("is_there", [True, False])
def test_solver_off_the_cpu_is_that_of_triton(monkeypatch, is_there):
    """The choice needs neither Triton nor a GPU: its module is not run."""
    asked, weight, module = [], torch.empty(4, 64, device="meta"), object()
    monkeypatch.setattr(gpu, "available", lambda device: asked.append(device) or is_there)
    monkeypatch.setitem(sys.modules, "hf_rb.quantizers.ptqtp.solver_triton", module)
    monkeypatch.setattr(ptqtp, "solver_triton", module, raising=False)
    assert solver._compiled(weight) is (module if is_there else None)
    assert asked == [weight.device]


# Compiling needs no GPU. The interpreter is Python: it accepts what the compiler does not.

NIBBLE = Part(4, (tuple(code // 3 - 1 for code in range(9)), tuple(code % 3 - 1 for code in range(9))))
CRUMB = Part(2, ((-1, 0, 1),))


@pytest.fixture(scope="module")
def compile_for_gpu(tmp_path_factory):
    """Compiles a kernel whose arguments are types (`"*bf16"`, `"i32"`) or, for constants, their values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        triton = importlib.import_module("triton")
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        def compile(kernel, arguments, **options):
            names = kernel.arg_names
            signature = {
                name: value if isinstance(value, str) else "constexpr"
                for name, value in zip(names, arguments, strict=True)
            }
            constants = {(i,): value for i, value in enumerate(arguments) if not isinstance(value, str)}
            source = ASTSource(kernel, signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
            # The smallest shared memory among GPUs of this generation and later
            assert "cubin" in compiled.asm and compiled.metadata.shared <= 99 * 1024

        yield compile


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing compiles under the interpreter")
class TestCompiles:
    @pytest.mark.parametrize(("dtype", "block_m"), [("fp32", 1), ("bf16", 1), ("bf16", 16), ("fp16", 128)])
    def test_matmul(self, compile_for_gpu, dtype, block_m):
        from hf_rb.quantizers.kernels.triton import digits, gemm

        constants = digits.constants(Layout(448, 128, (NIBBLE, CRUMB)))
        warps, stages = gemm._warps_and_stages(block_m)
        pointers, sizes = [f"*{dtype}", "*u8", "*fp16", f"*{dtype}"], ["i32"] * 7
        arguments = [*pointers, *sizes, *constants, block_m, 64, dtype == "bf16"]
        compile_for_gpu(gemm._matmul_kernel, arguments, num_warps=warps, num_stages=stages)

    def test_dequantize_and_sum(self, compile_for_gpu):
        from hf_rb.quantizers.kernels.triton import decode, digits, gemm

        constants = digits.constants(Layout(448, 128, (NIBBLE, CRUMB)))
        compile_for_gpu(decode._dequantize_kernel, ["*u8", "*fp16", "*bf16", *["i32"] * 5, *constants, 8])
        compile_for_gpu(gemm._sum_kernel, ["*fp32", "*bf16", "i32", "i32", 256])

    @pytest.mark.parametrize(("planes", "tied"), [(1, False), (2, False), (2, True), (3, False)])
    def test_solver(self, compile_for_gpu, planes, tied):
        from hf_rb.quantizers.ptqtp import solver_triton as solver

        sizes, start = ["i32"] * 4, int(planes < 3)
        options = {"num_warps": solver._warps(128), "enable_fp_fusion": False}
        arguments = ["*bf16", "*fp64", "*fp64", *sizes, 128, planes, tied, False, start, 1, 2, 128]
        compile_for_gpu(solver._fit_kernel, arguments, **options)
        compile_for_gpu(
            solver._encode_kernel, ["*bf16", "*fp16", "*u8", "*fp64", *sizes, 70, planes, 53, 2], **options
        )
