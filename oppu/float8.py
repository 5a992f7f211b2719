"""The frozen base in 8-bit floats: its Linear layers' weights, and the products with them forward and backward.

Everything is float8 e4m3 with one scale per row, a power of two. A token's scale comes from that token alone, so whom
it shares a batch with does not matter. Scaling by a power of two is exact, in bfloat16 too: nothing is rounded but to
the 8 bits. The adapters, norms, attention, embeddings and the head keep their dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from oppu.records import InputError

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
MULTIPLE = 16  # the hardware's products take inner and outer sizes that are multiples of it


def check_float8(device: str | torch.device, dtype: torch.dtype) -> None:
    """Raise InputError where the products cannot run: CUDA before 8.9, other accelerators, other dtypes.

    A CPU computes them from the same 8-bit numbers in float32: right, and slower than without; for tests.
    """
    device = torch.device(device)
    if dtype not in (torch.bfloat16, torch.float32):
        raise InputError(["model.quantization fp8: model.dtype must be bfloat16 or float32"])
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= (8, 9):
            return
        found = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}"
    elif device.type == "cpu":
        return
    else:
        found = f"this device is {'ROCm' if torch.version.hip else device.type}"
    raise InputError(
        [f"model.quantization fp8: needs CUDA with compute capability 8.9 or more; {found}; use 8bit or 4bit"]
    )


class Rounded(NamedTuple):
    """A matrix [N, K] as scale * values, but for rounding: values [N, K] in float8, scale [N, 1] in float32."""

    values: Tensor
    scale: Tensor


def rounded(x: Tensor) -> Rounded:
    """x [N, K] in float8. What is not finite makes its own row NaN, and no other."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).float()
    exponent = torch.frexp(largest / LARGEST).exponent.clamp(-100, 100)  # largest <= LARGEST * 2^exponent
    scaled = (x * _two_to(-exponent).to(x.dtype)).to(FLOAT8, memory_format=torch.contiguous_format)
    return Rounded(scaled, _two_to(exponent) + largest * 0)  # the cast may make 448 of infinity; 0 * inf is NaN


def _two_to(exponent: Tensor) -> Tensor:
    """2 to an int32 power as float32, by its bits: exp2 and pow may be off by a last bit."""
    return (exponent + 127 << 23).view(torch.float32)


def product(x: Rounded, weight: Rounded, dtype: torch.dtype) -> Tensor:
    """x [M, K] times weight [N, K] transposed, [M, N] in `dtype`; both contiguous, since the hardware wants them so.

    On CUDA by cuBLAS or CUTLASS behind torch._scaled_mm: it sums in float32 and gives bfloat16.
    """
    if x.values.device.type == "cuda":
        out = torch._scaled_mm(
            x.values,
            weight.values.t(),
            scale_a=x.scale,
            scale_b=weight.scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
        )
        return out.to(dtype)
    return (F.linear(x.values.float(), weight.values.float()) * x.scale * weight.scale.t()).to(dtype)


class _Frozen(torch.autograd.Function):
    """x [N, in] times a frozen weight [out, in]: nothing of x is kept, and the weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(values, scale)
        return product(rounded(x), Rounded(values, scale), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """dx = dy W. The weight's scales lie along what is summed over: dy is scaled by them, then rounded."""
        values, scale = ctx.saved_tensors
        dy = rounded(grad * scale.t().to(grad.dtype))
        turned = Rounded(values.t().contiguous(), torch.ones(values.shape[1], 1, device=grad.device))
        return product(dy, turned, grad.dtype), None, None


class Float8Linear(nn.Linear):
    """A frozen Linear layer in float8: `weight` [out, in] and `scale` [out, 1]; one byte per parameter.

    The hardware wants the weight the other way round for the backward pass: it is transposed there, layer by layer,
    instead of kept twice.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight, scale = rounded(linear.weight.data)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.data, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        out = _Frozen.apply(x.flatten(0, -2), self.weight, self.scale).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def to_float8(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, every Linear layer but the head in float8, one after the other.

    Layers whose sizes are no multiples of 16 stay as they are. Raises InputError where no layer is left (GPT-2 has none
    of torch's Linear layers).
    """
    head = model.get_output_embeddings()
    chosen = [
        (name, m)
        for name, m in model.named_modules()
        if type(m) is nn.Linear and m is not head and not (m.in_features % MULTIPLE or m.out_features % MULTIPLE)
    ]
    if not chosen:
        kind = type(model).__name__
        raise InputError(
            [f"model.quantization fp8: {kind} has no Linear layers whose sizes are multiples of {MULTIPLE}"]
        )
    for name, linear in chosen:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Float8Linear(linear))
    return model
