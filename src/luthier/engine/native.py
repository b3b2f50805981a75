"""The formulas of `engine.kernels` in C++: compiled in a second for this very CPU, one pass over memory each.

Sources: `native.cpp` and `products.cpp` beside this file, built by g++ into a temporary folder of this
process and called through ctypes (Python's foreign function library). They share OpenMP's threads with torch,
so that torch's `set_num_threads` holds here too. Rounding happens once at the end of each formula: bits
differ from the plain formulas, and between kinds of CPU, so a run uses one or the other to its end. What the
C++ does not take (another device, number type or memory layout) goes to the plain formula; so do products
where torch has a matrix unit (AMX) for them.

It does not know modules, adapters or graphs of gradients.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.engine import kernels as plain
from luthier.engine.kernels import PLAIN, Kernels, Seen
from luthier.errors import TrainError

SOURCE = Path(__file__).with_name("native.cpp")
PRODUCTS = Path(__file__).with_name("products.cpp")
COMPILER = "g++"
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fno-math-errno",
    "-fno-trapping-math", "-shared", "-fPIC",
)  # fmt: skip
_KINDS = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def kernels(compiled: bool) -> Kernels:
    """The compiled formulas, or the plain ones."""
    return _compiled() if compiled else PLAIN


@cache
def can_compile() -> bool:
    """Whether the formulas can be compiled here; a machine without a C++ compiler runs the plain ones."""
    if shutil.which(COMPILER) is None:
        return False
    try:
        _library()
    except TrainError:
        return False
    return True


def _library() -> ctypes.CDLL:
    return build(SOURCE)


@cache
def build(source: Path, *more: str) -> ctypes.CDLL:
    """A C++ file, compiled for this very CPU (with `more` flags); headers are those beside this file. Raises
    `TrainError` where that fails."""
    with tempfile.TemporaryDirectory(prefix="luthier-") as folder:
        built = Path(folder) / "native.so"
        flags = [flag for flag in FLAGS if "512" not in flag or "avx512f" in cpu_flags()]
        try:
            done = subprocess.run(
                [COMPILER, *flags, f"-I{SOURCE.parent}", "-o", str(built), str(source), *more],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            raise TrainError(f"this plan needs {COMPILER}: {error.strerror}", hint=_HINT) from error
        if done.returncode:
            raise TrainError(f"{COMPILER} cannot compile {source.name}: {done.stderr[-500:]}", hint=_HINT)
        return ctypes.CDLL(str(built))


_HINT = "install g++; or plan again on this machine: `plan.json` says what it counts on"


def cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float) -> None:
    function = getattr(_library(), f"{name}_{_KINDS[dtype]}")
    function(*[_plain_number(argument) for argument in arguments])


def _plain_number(argument: Tensor | int | float) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_long(argument)


def _takes(*tensors: Tensor) -> bool:
    """Whether these are of one kind that the C++ knows, and lie in memory without gaps."""
    kind = tensors[0].dtype
    return kind in _KINDS and all(x.dtype is kind and x.is_cpu and x.is_contiguous() for x in tensors)


def _norm(x_T_E: Tensor, weight_E: Tensor, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    if not _takes(x_T_E, weight_E):
        return plain.norm(x_T_E, weight_E, eps, shift)
    y_T_E, scale_T = torch.empty_like(x_T_E), torch.empty(len(x_T_E), 1)
    _call("norm", x_T_E.dtype, x_T_E, weight_E, y_T_E, scale_T, *x_T_E.shape, float(eps), float(shift))
    return y_T_E, scale_T


def _norm_backward(
    grad_T_E: Tensor, x_T_E: Tensor, weight_E: Tensor, scale_T: Tensor, shift: float
) -> Tensor:
    if not _takes(grad_T_E, x_T_E, weight_E):
        return plain.norm_backward(grad_T_E, x_T_E, weight_E, scale_T, shift)
    out_T_E = torch.empty_like(x_T_E)
    at = (*x_T_E.shape, float(shift))
    _call("norm_backward", x_T_E.dtype, grad_T_E, x_T_E, weight_E, scale_T, out_T_E, *at)
    return out_T_E


def _silu(both_T_2F: Tensor) -> Tensor:
    if not _takes(both_T_2F):
        out: Tensor = PLAIN.gate["silu"](both_T_2F)
        return out
    tokens, width = both_T_2F.shape[0], both_T_2F.shape[1] // 2
    out_T_F = both_T_2F.new_empty(tokens, width)
    _call("silu", both_T_2F.dtype, both_T_2F, out_T_F, tokens, width)
    return out_T_F


def _silu_backward(grad_T_F: Tensor, both_T_2F: Tensor) -> tuple[Tensor, Tensor]:
    if not _takes(grad_T_F, both_T_2F):
        found: tuple[Tensor, Tensor] = PLAIN.gate_backward["silu"](grad_T_F, both_T_2F)
        return found
    hidden_T_F, out_T_2F = torch.empty_like(grad_T_F), torch.empty_like(both_T_2F)
    at = (grad_T_F, both_T_2F, hidden_T_F, out_T_2F)
    _call("silu_backward", grad_T_F.dtype, *at, *grad_T_F.shape)
    return hidden_T_F, out_T_2F


def _soften(scores_NMR: Tensor, seen: Seen, scale: float) -> Tensor:
    if not _takes(scores_NMR):
        return plain.soften(scores_NMR, seen, scale)
    _call("soften", scores_NMR.dtype, scores_NMR, *_rows(scores_NMR, seen), float(scale))
    return scores_NMR


def _soften_backward(grad: Tensor, weights: Tensor, seen: Seen, scale: float) -> Tensor:
    if not _takes(grad, weights):
        return plain.soften_backward(grad, weights, seen, scale)
    _call("soften_backward", grad.dtype, grad, weights, *_rows(grad, seen), float(scale))
    return grad


def _rows(scores_NMR: Tensor, seen: Seen) -> tuple[int, int, int, int, int]:
    reach = scores_NMR.shape[-1]
    return scores_NMR.numel() // reach, seen.length, reach, seen.before, seen.window or 0


def _turned(x_THE: Tensor, turn: tuple[Tensor, Tensor], sign: float) -> Tensor | None:
    """A rotation forward (1) or back (-1), or None where the C++ does not take it."""
    tokens, heads, width = x_THE.shape
    if not _takes(x_THE[:0], *turn) or x_THE.dtype is not turn[0].dtype or x_THE.stride()[1:] != (width, 1):
        return None
    out_THE = x_THE.new_empty(x_THE.shape)
    at = (tokens, heads, width, turn[0].shape[-1], x_THE.stride(0), sign)
    _call("turn", x_THE.dtype, x_THE, *turn, out_THE, *at)
    return out_THE


def _turn(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    found = _turned(x_THE, (cos_TR, sin_TR), 1.0)
    return plain.turn(x_THE, cos_TR, sin_TR) if found is None else found


def _unturn(grad_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    found = _turned(grad_THE, (cos_TR, sin_TR), -1.0)
    return plain.unturn(grad_THE, cos_TR, sin_TR) if found is None else found


def _settle(logits_N_V: Tensor, targets_N: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    if not _takes(logits_N_V) or not targets_N.is_contiguous():
        return plain.settle(logits_N_V, targets_N, wanted)
    logp_N, right_N = torch.empty(len(targets_N)), torch.empty(len(targets_N), dtype=torch.bool)
    _call("settle", logits_N_V.dtype, logits_N_V, targets_N, logp_N, right_N, *logits_N_V.shape, int(wanted))
    return logp_N, right_N, logits_N_V if wanted else None


class _Thin(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w")),
        *((name, ctypes.c_int64) for name in ("x_line", "w_line", "depth", "rows", "columns")),
        ("out", ctypes.c_void_p),
    ]  # fmt: skip


class _Factors(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w")),
        *((name, ctypes.c_int64) for name in ("x_row", "w_line", "depth", "across")),
    ]  # fmt: skip


class _Job(ctypes.Structure):
    _fields_ = [
        ("factors", _Factors * 2),
        *((name, ctypes.c_int64) for name in ("count", "rows", "columns")),
        ("out", ctypes.c_void_p),
    ]  # fmt: skip


@cache
def multiplies() -> bool:
    """Whether this CPU multiplies bfloat16 and has no matrix unit, which torch's products would use."""
    return "amx_bf16" not in cpu_flags() and bool(build(PRODUCTS).products_has())


def _total(x_M_K: Tensor, w_K_N: Tensor, more: tuple[Tensor, Tensor] | None = None) -> Tensor:
    factors = [(x_M_K, w_K_N)] if more is None else [(x_M_K, w_K_N), more]
    if not all(map(_multiplied, factors)):
        return plain.total(x_M_K, w_K_N, more)
    factors = [(_in_pairs(x), w) for x, w in factors]  # kept alive until the call is over
    out_M_N = x_M_K.new_empty(len(x_M_K), w_K_N.shape[1])
    given = (_Factors * 2)(*(_described(*pair) for pair in factors))
    build(PRODUCTS).products_total(
        ctypes.byref(_Job(given, len(factors), *out_M_N.shape, out_M_N.data_ptr()))
    )
    return out_M_N


def _outer(x_T_M: Tensor, y_T_N: Tensor) -> Tensor:
    if not _multiplied((x_T_M, y_T_N)) or (x_T_M.stride(1), y_T_N.stride(1)) != (1, 1):
        return plain.outer(x_T_M, y_T_N)
    out_M_N = torch.empty(x_T_M.shape[1], y_T_N.shape[1])
    at = (x_T_M.stride(0), y_T_N.stride(0), len(x_T_M), *out_M_N.shape)
    build(PRODUCTS).products_thin(
        ctypes.byref(_Thin(x_T_M.data_ptr(), y_T_N.data_ptr(), *at, out_M_N.data_ptr()))
    )
    return out_M_N


def _multiplied(factors: tuple[Tensor, Tensor]) -> bool:
    plain_memory = 1 in factors[1].stride() and all(x.is_cpu and x.numel() for x in factors)
    return plain_memory and all(x.dtype is torch.bfloat16 for x in factors) and multiplies()


def _in_pairs(x_M_K: Tensor) -> Tensor:
    """Rows of numbers side by side, with a zero behind an odd one."""
    odd = x_M_K.shape[1] % 2
    if x_M_K.stride(1) == 1 and not odd:
        return x_M_K
    return torch.nn.functional.pad(x_M_K, (0, odd)).contiguous()[:, : x_M_K.shape[1]]


def _described(x_M_K: Tensor, w_K_N: Tensor) -> _Factors:
    across = w_K_N.stride(1) != 1
    line = w_K_N.stride(1) if across else w_K_N.stride(0)
    return _Factors(x_M_K.data_ptr(), w_K_N.data_ptr(), x_M_K.stride(0), line, len(w_K_N), across)


@cache
def _compiled() -> Kernels:
    _library()
    return Kernels(
        norm=_norm, norm_backward=_norm_backward,
        gate=PLAIN.gate | {"silu": _silu}, gate_backward=PLAIN.gate_backward | {"silu": _silu_backward},
        soften=_soften, soften_backward=_soften_backward, turn=_turn, unturn=_unturn, settle=_settle,
        total=_total, outer=_outer, flash=True,
    )  # fmt: skip
