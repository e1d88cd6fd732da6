"""What each quantization method costs each linear of a model in accuracy, on one real batch.

A forward and backward in the model's own precision gives every linear its X and dY; right there, each method computes
Y, dX and dW again from them, and is compared with float32; dX and dW also as far as small gradients make them
(:mod:`lightning_int8.probe_small`). A forward and backward a method, with all linears replaced, gives the divergence of
the model's predictions and what small gradients come to in a whole network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_int8.float8 import float8_linear
from lightning_int8.functional import int8_linear
from lightning_int8.kernels.reference import block_amax
from lightning_int8.linear import Int8Linear, is_plain_linear
from lightning_int8.names import check_patterns_match, checked_patterns, matches, strip_wrappers
from lightning_int8.probe_small import SmallPredictions, SmallTokens, slope
from lightning_int8.recipe import NO_FALLBACK, PRESETS, Int8Recipe

Method = Callable[[Tensor, Tensor, Tensor | None], Tensor]
GEMMS = ("y", "dx", "dw")
# What tokens with small gradients make of dX and dW.
SMALL = ("dx_small", "dw_small")
# Below this ratio of the 99th percentile to the median, block AbsMax values are all alike.
OUTLIER_RATIO = 2.0


def methods(recipes: Mapping[str, Int8Recipe] | None = None, float8: bool = True) -> dict[str, Method]:
    """What to compare: differentiable functions of X, W and bias, by name.

    Args:
        recipes: INT8 recipes by name; when ``None`` the presets, ``row`` and ``block`` without fallback, and ``block``
            rounded to nearest, as ``row`` always is where it mixes.
        float8: Whether to add torchao's two FP8 recipes, emulated.
    """
    if recipes is None:
        recipes = dict(PRESETS)
        for name in ("row", "block"):
            recipes[f"{name}, no fallback"] = dataclasses.replace(
                PRESETS[name], budget=None, activation_band=NO_FALLBACK, gradient_band=NO_FALLBACK
            )
        recipes["block, nearest"] = dataclasses.replace(PRESETS["block"], stochastic_rounding="nothing")
    found: dict[str, Method] = {name: partial(int8_linear, recipe=recipe) for name, recipe in recipes.items()}
    if float8:
        found["float8 rowwise"] = partial(float8_linear, scaling="rowwise")
        found["float8 tensorwise"] = partial(float8_linear, scaling="tensorwise")
    return found


@dataclass(frozen=True)
class Outliers:
    """How the AbsMax of a matrix's blocks is spread.

    Attributes:
        ratio: 99th percentile over median.
        kind: ``"none"`` (ratio below 2), ``"channel-wise"`` or ``"token-wise"`` where columns or rows of blocks explain
            most of the variance of log AbsMax, else ``"diffuse"``.
    """

    ratio: float
    kind: str


@dataclass
class LinearProbe:
    """One linear.

    Attributes:
        name: Its name in the model.
        shape: Tokens M, in-features K and out-features N of the batch.
        x: Outliers of the input.
        dy: Outliers of the output's gradient.
        small_dy: How large small gradients are, as a fraction: ``dy_ratio`` of :class:`SmallTokens`.
        small_dw: What their tokens add to dW, as a fraction: ``dw_ratio`` there.
        sqnr: By method, the SQNR against float32 of Y, dX and dW, and of what small gradients make of dX and dW, in dB
            (NaN where an operand is all zeros).
        slope: By method, how much of dX and dW of small gradients is kept, on average: 1 all, 0 nothing.
        kept: By method, how much of dW of small gradients is kept when they come through a network of this method
            (NaN where the weight is frozen).
    """

    name: str
    shape: tuple[int, int, int]
    x: Outliers
    dy: Outliers
    small_dy: float
    small_dw: float
    sqnr: dict[str, tuple[float, ...]] = field(default_factory=dict)
    slope: dict[str, tuple[float, ...]] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)


@dataclass
class ProbeResult:
    """What :func:`probe` measured.

    Attributes:
        linears: One entry a linear, in the order of the model's modules.
        kl: By method, the mean over positions of KL(full precision ‖ method) of the predictions, in nats.
        top1: By method, the share of positions whose likeliest class is that of full precision.
    """

    linears: list[LinearProbe]
    kl: dict[str, float]
    top1: dict[str, float]

    def column(self, method: str, quantity: str) -> Tensor:
        """SQNR of one of ``GEMMS`` or ``SMALL`` in all linears, float64 ``[linears]``."""
        index = (*GEMMS, *SMALL).index(quantity)
        return torch.tensor([row.sqnr[method][index] for row in self.linears], dtype=torch.float64)

    def slopes(self, method: str, quantity: str) -> Tensor:
        """Slope of one of ``SMALL`` in all linears, float64 ``[linears]``."""
        index = SMALL.index(quantity)
        return torch.tensor([row.slope[method][index] for row in self.linears], dtype=torch.float64)

    def kept(self, method: str) -> Tensor:
        """``kept`` of all linears, float64 ``[linears]``."""
        return torch.tensor([row.kept[method] for row in self.linears], dtype=torch.float64)


def probe(
    model: nn.Module,
    step: Callable[[], Tensor],
    compared: Mapping[str, Method] | None = None,
    ignore_modules: Sequence[str] = (),
    block_size: int = 128,
    small_share: float = 0.5,
) -> ProbeResult:
    """Measures every ``nn.Linear`` of ``model`` that a forward calls.

    Args:
        model: The model, not converted, on its device; its gradients are used up.
        step: Runs the model on the batch, under whatever autocast it trains with, and returns the loss.
        compared: See :func:`methods`.
        ignore_modules: Patterns of linears to leave out, as in :func:`lightning_int8.convert_to_int8`.
        block_size: Of the outlier statistics.
        small_share: The share of the tokens, those with the smallest gradients, that count as small.

    Raises:
        TypeError: ``ignore_modules`` is not a list of strings.
        ValueError: ``small_share`` is not between 0 and 1, a pattern matches nothing, the model holds INT8 layers, or
            no linear is left.
    """
    if not 0 < small_share < 1:
        raise ValueError(f"small_share={small_share} must lie between 0 and 1.")
    compared = methods() if compared is None else compared
    linears = _linears(model, ignore_modules)
    found: dict[str, LinearProbe] = {}
    measure = partial(_measure, compared=compared, block_size=block_size, small_share=small_share)
    with _hooks(linears, partial(_measure_later, found, measure)):
        step().backward()
    model.zero_grad(set_to_none=True)
    if not found:
        raise ValueError(f"No gradient reached any of the {len(linears)} linears: does the step train the model?")
    trained = [name for name in found if linears[name].weight.requires_grad]
    weights = [linears[name].weight for name in trained]
    with _predictions(model) as predictions:
        small = SmallPredictions.of(small_share, step(), predictions[-1], weights)
    full = predictions[-1].detach()
    kl, top1 = {}, {}
    for method_name, method in compared.items():
        with (
            _hooks(linears, lambda _, linear, x, y, m=method: m(x, linear.weight, linear.bias)),
            _predictions(model) as predictions,
        ):
            slopes = small.slopes(step(), predictions[-1], weights)
        kl[method_name], top1[method_name] = _divergence(full, predictions[-1].detach())
        kept = dict(zip(trained, slopes, strict=True))
        for name, row in found.items():
            row.kept[method_name] = kept.get(name, float("nan"))
    rows = [found[name] for name in linears if name in found]
    return ProbeResult(rows, kl, top1)


def _linears(model: nn.Module, ignore_modules: Sequence[str]) -> dict[str, nn.Linear]:
    patterns = checked_patterns(ignore_modules)
    check_patterns_match(patterns, [strip_wrappers(name) for name, _ in model.named_modules()])
    linears: dict[str, nn.Linear] = {}
    for name, child in model.named_modules():
        if isinstance(child, Int8Linear):
            raise ValueError(f"{name!r} is an INT8 layer; probe the model before it is converted.")
        name = strip_wrappers(name)
        if is_plain_linear(child) and not any(matches(pattern, name) for pattern in patterns):
            linears[name] = child  # type: ignore[assignment]
    if not linears:
        raise ValueError(f"No nn.Linear to probe in {type(model).__name__} besides {list(patterns)}.")
    return linears


@contextmanager
def _hooks(linears: Mapping[str, nn.Linear], hook: Callable[..., Any]) -> Iterator[None]:
    """Calls ``hook(name, linear, x, y)`` after each linear's forward; what it returns takes the place of ``y``."""
    handles = [
        linear.register_forward_hook(lambda module, args, y, name=name: hook(name, module, args[0], y))
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _predictions(model: nn.Module) -> Iterator[list[Tensor]]:
    """The output of the linear that a forward calls last, which is the head of any model with a softmax."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, y: Tensor) -> None:
        outputs[:] = [y]

    handles = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _measure_later(
    found: dict[str, LinearProbe],
    measure: Callable[[str, nn.Linear, Tensor, Tensor], LinearProbe],
    name: str,
    linear: nn.Linear,
    x: Tensor,
    y: Tensor,
) -> None:
    x = x.detach()

    def at_gradient(dy: Tensor) -> None:
        # y's dtype is autocast's, which is what the linear computed in.
        found[name] = measure(name, linear, x.to(y.dtype), dy.detach())

    if y.requires_grad:
        y.register_hook(at_gradient)


def _measure(
    name: str,
    linear: nn.Linear,
    x: Tensor,
    dy: Tensor,
    compared: Mapping[str, Method],
    block_size: int,
    small_share: float,
) -> LinearProbe:
    # Float32 in and out, or the outputs' rounding to BF16 would bound what can be seen.
    x, dy, weight = x.flatten(0, -2).float(), dy.flatten(0, -2).float(), linear.weight.detach().float()
    exact = (x @ weight.t(), dy @ weight, dy.t() @ x)
    small = SmallTokens.of(small_share, x, dy, *exact[1:])
    turned = small.turned(dy)
    row = LinearProbe(
        name,
        (*x.shape, len(weight)),
        outliers(x, block_size),
        outliers(dy, block_size),
        small.dy_ratio,
        small.dw_ratio,
    )
    for method_name, method in compared.items():
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
            y = method(a, w, None)
            dx, dw = torch.autograd.grad(y, (a, w), dy, retain_graph=True)
            (turned_dw,) = torch.autograd.grad(y, w, turned)
        of_small = ((small.dx, dx[small.rows]), (small.dw, (dw - turned_dw) / 2))
        pairs = (*zip(exact, (y.detach(), dx, dw), strict=True), *of_small)
        row.sqnr[method_name] = tuple(_sqnr(want, got) for want, got in pairs)
        row.slope[method_name] = tuple(slope(want, got) for want, got in of_small)
    return row


def _sqnr(want: Tensor, got: Tensor) -> float:
    """Signal over quantization noise, in dB."""
    noise = (want.double() - got.double()).square().mean()
    return float(10 * torch.log10(want.double().square().mean() / noise))


def outliers(x: Tensor, block_size: int) -> Outliers:
    """Statistics of the block AbsMax of ``x [R, Q]``."""
    amax = block_amax(x, block_size).double()
    ratio = float(amax.quantile(0.99) / amax.median())
    log = amax.clamp_min(1e-30).log()
    variance = log.var(correction=0)
    if not ratio >= OUTLIER_RATIO or variance == 0:
        return Outliers(ratio, "none")
    by_column, by_row = (log.mean(axis).var(correction=0) / variance for axis in (0, 1))
    if max(by_column, by_row) < 0.5:
        return Outliers(ratio, "diffuse")
    return Outliers(ratio, "channel-wise" if by_column >= by_row else "token-wise")


def _divergence(full: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean KL divergence of the softmax over the last axis, and agreement of the likeliest class."""
    full, other = full.flatten(0, -2), other.flatten(0, -2)
    total = agree = 0.0
    # A few rows at a time: logits of a large vocabulary in float32 are large.
    for want, got in zip(full.split(1024), other.split(1024), strict=True):
        total += float(
            F.kl_div(got.float().log_softmax(-1), want.float().log_softmax(-1), log_target=True, reduction="sum")
        )
        agree += float((want.argmax(-1) == got.argmax(-1)).sum())
    return total / len(full), agree / len(full)
