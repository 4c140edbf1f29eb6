"""The CUDA kernels compiled by g++ and executed on the CPU (cuda_runtime.h tells how)."""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).parent
KERNELS = Path(__file__).parents[4] / "dn_detr" / "layers" / "csrc" / "cuda"

_SCALARS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_PROBE = (
    "#include <ucontext.h>\n_Float16 half(float x) { ucontext_t c; return getcontext(&c) + x; }"
)
_MARGIN = 64  # elements around every tensor, which nothing may touch


class _Level(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("height", "width", "first_token", "first_point", "num_points")
    ]


class Problem(ctypes.Structure):
    """dn_detr::Problem of problem.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "tokens", "heads", "channels", "queries", "points")
        ),
        ("value_batch_stride", ctypes.c_int64),
        ("value_token_stride", ctypes.c_int64),
        ("levels", ctypes.POINTER(_Level)),
        ("num_levels", ctypes.c_int64),
        ("value_type", ctypes.c_int),
        ("weight_type", ctypes.c_int),
    ]


class BackwardTensors(ctypes.Structure):
    """dn_detr::cuda::BackwardTensors of kernels.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("gradient", "value", "locations", "weights"),
            *("value_gradient", "location_gradient", "weight_gradient", "fixed_point"),
        )
    ]


def why_not() -> str:
    """Why the kernels cannot be compiled here; empty if they can."""
    if shutil.which("g++") is None:
        return "there is no g++"
    command = ["g++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(command, input=_PROBE, text=True, capture_output=True).returncode:
        return "g++ has no _Float16 or the system no ucontext"
    return ""


def make_problem(
    value: torch.Tensor,
    shapes: Sequence[tuple[int, int]],
    points: Sequence[int],
    weights: torch.Tensor,
) -> Problem:
    levels = (_Level * len(points))()
    token = point = 0
    for level, (height, width), count in zip(levels, shapes, points, strict=True):
        level.height, level.width, level.num_points = height, width, count
        level.first_token, level.first_point = token, point
        token += height * width
        point += count
    batch, tokens, heads, channels = value.shape
    assert tokens == token and weights.shape[3] == point
    return Problem(
        *(batch, tokens, heads, channels, weights.shape[1], point),
        *(value.stride(0), value.stride(1), levels, len(points)),
        *(_SCALARS[value.dtype], _SCALARS[weights.dtype]),
    )


class _Guarded:
    """Memory of a dense tensor between two margins of NaN; outputs begin as NaN as well."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, shift: int = 0):
        count = torch.Size(sizes).numel()
        poison = 0x7FF8 << 48 if dtype == torch.int64 else float("nan")
        self.flat = torch.full((count + 2 * _MARGIN + shift,), poison, dtype=dtype)
        begin = _MARGIN + shift
        self.tensor = self.flat[begin : begin + count].view(sizes)
        self._margins = [self.flat[:begin], self.flat[begin + count :]]
        self._before = [self._bits(margin).clone() for margin in self._margins]

    @staticmethod
    def _bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(torch.uint8)

    def check(self) -> None:
        for margin, before in zip(self._margins, self._before, strict=True):
            assert torch.equal(self._bits(margin), before), "written outside of the tensor"


class CudaOnCpu:
    """Calls of the kernels with CPU tensors; every call runs threads and blocks in another order.

    `shift` elements are added to the addresses of outputs and copied inputs, which makes them
    unaligned.
    """

    def __init__(self, directory: Path, architecture: int = 900):
        path = directory / f"kernels_{architecture}.so"
        command = ["g++", "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-shared"]
        command += [f"-D__CUDA_ARCH__={architecture}", f"-I{HERE}", f"-I{KERNELS}", "-x", "c++"]
        command += [*map(str, sorted(KERNELS.glob("*.cu"))), str(HERE / "emulator.cpp")]
        result = subprocess.run([*command, "-o", str(path)], text=True, capture_output=True)
        assert result.returncode == 0, result.stderr
        self.library = ctypes.CDLL(str(path))
        self.library.fixed_point_words.restype = ctypes.c_int64
        self.seed = 0

    def _next_order(self) -> None:
        self.seed += 1
        self.library.set_seed(ctypes.c_uint64(self.seed))

    def forward(self, value, shapes, points, locations, weights, shift: int = 0):
        problem = make_problem(value, shapes, points, weights)
        batch, queries, heads = weights.shape[:3]
        inputs = [_copy(tensor, shift) for tensor in (locations, weights)]
        output = _Guarded((batch, queries, heads * value.shape[-1]), value.dtype, shift)
        self._next_order()
        error = self.library.forward(
            ctypes.byref(problem),
            *(_address(tensor) for tensor in (value, *(i.tensor for i in inputs), output.tensor)),
        )
        assert error == 0, f"error {error}"
        output.check()
        return output.tensor

    def backward(
        self, gradient, value, shapes, points, locations, weights, shift=0, deterministic=False
    ):
        """The gradients of value (float32 or float64), locations and weights."""
        problem = make_problem(value, shapes, points, weights)
        inputs = [_copy(tensor, shift) for tensor in (gradient, locations, weights)]
        real = locations.dtype
        value_gradient = _Guarded(value.shape, real, shift)
        value_gradient.tensor.zero_()
        location_gradient = _Guarded(locations.shape, real, shift)
        weight_gradient = _Guarded(weights.shape, weights.dtype, shift)
        words = self.library.fixed_point_words(ctypes.byref(problem))
        fixed_point = _Guarded((words,), torch.int64)
        fixed_point.tensor.zero_()
        tensors = BackwardTensors(
            inputs[0].tensor.data_ptr(),
            value.data_ptr(),
            *(memory.tensor.data_ptr() for memory in inputs[1:]),
            *(m.tensor.data_ptr() for m in (value_gradient, location_gradient, weight_gradient)),
            fixed_point.tensor.data_ptr() if deterministic else None,
        )
        self._next_order()
        error = self.library.backward(ctypes.byref(problem), ctypes.byref(tensors))
        assert error == 0, f"error {error}"
        for memory in (value_gradient, location_gradient, weight_gradient, fixed_point):
            memory.check()
        return value_gradient.tensor, location_gradient.tensor, weight_gradient.tensor


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _copy(tensor: torch.Tensor, shift: int) -> _Guarded:
    guarded = _Guarded(tensor.shape, tensor.dtype, shift)
    guarded.tensor.copy_(tensor)
    return guarded
