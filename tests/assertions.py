"""How tests compare tensors: by signal-to-quantization-noise ratio in float64, with a message a reader can act on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXACT = math.inf


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Signal-to-quantization-noise ratio of ``value`` in dB, computed in float64; higher is better.

    Positions that are not finite in the reference are left out, as they have no noise to measure.

    Args:
        reference: The exact result.
        value: The result under test, of the same shape.

    Returns:
        ``10·log10(Σ reference² / Σ (reference - value)²)``; ``inf`` when equal, ``-inf`` when ``value`` is not finite
        where the reference is, or when the reference is all zero and ``value`` is not.
    """
    if reference.shape != value.shape:
        raise AssertionError(
            f"shapes differ: reference {tuple(reference.shape)}, value {tuple(value.shape)}; they must be equal."
        )
    wanted = reference.detach().cpu().to(torch.float64)
    got = value.detach().cpu().to(torch.float64)
    finite = wanted.isfinite()
    wanted, got = wanted[finite], got[finite]
    if not got.isfinite().all():
        return -math.inf
    signal = wanted.square().sum().item()
    noise = (wanted - got).square().sum().item()
    if noise == 0.0:
        return math.inf
    if signal == 0.0:
        return -math.inf
    return 10.0 * math.log10(signal / noise)


def assert_close(name: str, reference: Tensor, value: Tensor, sqnr: float, *, check_dtype: bool = False) -> None:
    """Fails unless ``value`` equals ``reference`` up to noise of at least ``sqnr`` dB.

    Args:
        name: What is compared, for the message (``"dX"``).
        reference: The exact result; any floating dtype.
        value: The result under test.
        sqnr: Lowest accepted ratio in dB; ``math.inf`` (``EXACT``) demands equality.
        check_dtype: Also demand the same dtype (a float64 reference usually has another one).

    Raises:
        AssertionError: Shapes (or dtypes) differ, NaN or Inf lie elsewhere than in the reference, or the noise is
            higher than accepted.
    """
    for which, tensor in (("reference", reference), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise AssertionError(f"{name}: the {which} is a {type(tensor).__name__}, not a tensor.")
    if reference.shape != value.shape:
        raise AssertionError(f"{name}: shape {tuple(value.shape)}, but the reference has {tuple(reference.shape)}.")
    if check_dtype and reference.dtype != value.dtype:
        raise AssertionError(f"{name}: dtype {value.dtype}, but the reference has {reference.dtype}.")
    wanted = reference.detach().cpu().to(torch.float64)
    got = value.detach().cpu().to(torch.float64)
    for kind, where_wanted, where_got in (
        ("NaN", wanted.isnan(), got.isnan()),
        ("+Inf", wanted == math.inf, got == math.inf),
        ("-Inf", wanted == -math.inf, got == -math.inf),
    ):
        wrong = (where_wanted != where_got).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise AssertionError(
                f"{name}: {kind} at {int(where_got.sum())} position(s), {int(where_wanted.sum())} in the reference; "
                f"{len(wrong)} differ, first at {at}: {got[at].item()} where the reference has {wanted[at].item()}."
            )
    measured = sqnr_db(wanted, got)
    if measured < sqnr:
        finite = wanted.isfinite()
        error = torch.where(finite, (wanted - got).abs(), torch.zeros_like(wanted))
        at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape)) if error.dim() else ()
        raise AssertionError(
            f"{name}: SQNR {measured:.2f} dB is below {sqnr:.2f} dB; largest error {error[at].item():.6g} at {at}: "
            f"{got[at].item():.6g} where the reference has {wanted[at].item():.6g} "
            f"(shape {tuple(reference.shape)}, {value.dtype})."
        )
