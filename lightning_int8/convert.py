"""Which linear layers compute in INT8: finds them by name, swaps their class in place, and reports what it did.

Nothing is replaced, added or moved: an ``nn.Linear`` becomes an :class:`~lightning_int8.linear.Int8Linear` by changing
its class, so parameters, optimizers, tied weights, hooks, wrappers and checkpoints stay valid.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_int8.fusion import fuse_swiglu
from lightning_int8.kernels import backends
from lightning_int8.linear import Int8Linear, is_plain_linear
from lightning_int8.names import check_patterns_match, checked_patterns, matches, strip_wrappers
from lightning_int8.recipe import Int8Recipe, resolve_recipe
from lightning_int8.report import ConversionReport, LayerReport, Status
from lightning_int8.sharing import share_inputs
from lightning_int8.small_layers import MinFeatures, check_min_features, effective_features, least_features

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def convert_to_int8(
    module: nn.Module,
    recipe: str | Int8Recipe | Mapping[str, Any] = "row",
    ignore_modules: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    min_features: MinFeatures = 0,
) -> ConversionReport:
    """Makes the ``nn.Linear`` layers of ``module`` compute in INT8, in place.

    Call it as often as you like: layers converted before are reported and keep their thresholds. After each optimizer
    step call :func:`lightning_int8.update_thresholds`; the Lightning and Fabric plugins do both by themselves.

    Args:
        module: Any module, on any device (also ``meta``), before or after optimizers, DDP, FSDP2 or ``torch.compile``.
        recipe: A preset's name, an :class:`Int8Recipe`, or a mapping of its fields.
        ignore_modules: Patterns of layers to leave in full precision. A pattern is a glob over whole dotted segments of
            a layer's or a parent's name, and may start anywhere in it: ``"lm_head"``, ``"layers.0"`` (not
            ``layers.01``), ``"layers.*.mlp"``, ``"*.router"``.
        device: Where the model will run, for the kernels that the report names; where its weights are when ``None``.
        min_features: Leave a layer in full precision whose effective features, 2·K·N / (K + N) (a square layer's
            width), are fewer. ``"auto"``: where ``lightning-int8-bench`` measured that layers begin to gain on the
            device, see :mod:`lightning_int8.small_layers`.

    Returns:
        What was converted, what was not, and why.

    Raises:
        TypeError: ``module`` is not a module, or ``ignore_modules`` not a list of strings.
        ValueError: A pattern matches nothing; nothing was left to convert; a layer was converted earlier with another
            recipe or is now to be ignored; or the device is a GPU whose kernels do not have the recipe's block size.
        RuntimeError: ``device`` names none, or is a GPU on which the backend that the recipe forces cannot run.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"convert_to_int8 takes a torch.nn.Module, not {type(module).__name__}; pass the model itself, not its "
            "class, parameters or state_dict."
        )
    recipe = resolve_recipe(recipe)
    device = None if device is None else torch.device(device)
    check_min_features(min_features)
    patterns = checked_patterns(ignore_modules)
    names = _names_by_module(module)
    check_patterns_match(patterns, [name for group in names.values() for name in group])

    tied = _names_by_parameter(module)
    rows: list[LayerReport] = []
    to_convert: list[nn.Linear] = []
    for child, aliases in names.items():
        row = _report(child, aliases, recipe, patterns, tied, device, min_features)
        if row is None:
            continue
        rows.append(row)
        if row.status == "converted":
            to_convert.append(child)  # type: ignore[arg-type]
    report = ConversionReport(recipe.describe(), tuple(rows))
    if not report.converted:
        raise ValueError(_nothing_converted(module, rows))
    # Only now, so that an error leaves the module as it was.
    for linear in to_convert:
        Int8Linear.swap(linear, recipe)
    share_inputs(m for m in names if sum(isinstance(child, Int8Linear) for child in m.children()) > 1)
    if recipe.fuses:
        fused = tuple(aliases[0] for child, aliases in names.items() if fuse_swiglu(child))
        report = dataclasses.replace(report, fused=fused)
    if to_convert:
        _warn_of_bypasses(names, patterns)
    return report


def _names_by_module(module: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all its names, in module order; a module registered twice has several."""
    names: dict[nn.Module, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        stripped = strip_wrappers(name)
        known = names.setdefault(child, [])
        if stripped not in known:
            known.append(stripped)
    return names


def _names_by_parameter(module: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(strip_wrappers(name))
    return names


def _report(
    module: nn.Module,
    aliases: Sequence[str],
    recipe: Int8Recipe,
    patterns: Sequence[str],
    tied: Mapping[int, list[str]],
    device: torch.device | None,
    min_features: MinFeatures,
) -> LayerReport | None:
    """The entry of ``module``, or ``None`` if it is nothing like a linear layer."""
    if not isinstance(module, nn.Linear) and not _looks_linear(module):
        return None
    name = aliases[0]
    own_weights = {f"{alias}.weight" if alias else "weight" for alias in aliases}
    weight = module._parameters.get("weight")
    shared = (*aliases[1:], *(n for n in tied.get(id(weight), ()) if weight is not None and n not in own_weights))
    ignored_by = next((p for p in patterns if any(alias and matches(p, alias) for alias in aliases)), None)

    status: Status
    if isinstance(module, Int8Linear):
        if ignored_by is not None:
            raise ValueError(
                f"{name!r} was converted earlier, and the pattern {ignored_by!r} of ignore_modules now names it. "
                "Conversion cannot be undone in place: build the model anew, or use the same ignore_modules as before."
            )
        if module.int8_recipe != recipe:
            raise ValueError(
                f"{name!r} was converted earlier with recipe {_describe(module.int8_recipe)}, and now "
                f"{_describe(recipe)} is asked for. Build the model anew to change the recipe, or convert each part of "
                "it once: convert_to_int8(model.layers, 'row'), convert_to_int8(model.head, 'block')."
            )
        status, reason = "already converted", ""
    elif ignored_by is not None:
        status, reason = "ignored", f"ignored by {ignored_by!r}"
    else:
        reason = _why_not(module) or _too_small(module, recipe, device, min_features)  # type: ignore[arg-type]
        status = "skipped" if reason else "converted"
    runs = status in ("converted", "already converted")
    return LayerReport(
        name=name,
        in_features=getattr(module, "in_features", None),
        out_features=getattr(module, "out_features", None),
        shared=shared,
        status=status,
        reason=reason,
        backend=_backend(recipe, device or module.weight.device) if runs else "",  # type: ignore[arg-type]
    )


def _why_not(module: nn.Module) -> str:
    """Why ``module`` cannot be converted; empty if it can."""
    cls = type(module)
    if not isinstance(module, nn.Linear):
        return f"not an nn.Linear ({cls.__module__}.{cls.__qualname__})"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    if isinstance(module, nn.LazyLinear):
        return "nn.LazyLinear without a shape yet: run one batch through the model first"
    if not is_plain_linear(module):
        return f"a subclass of nn.Linear ({cls.__qualname__}), whose own forward would be lost"
    if module.in_features == 0 or module.out_features == 0:
        return f"empty ({module.in_features} → {module.out_features})"
    if module.weight.dtype not in _WEIGHT_DTYPES:
        return f"its weight is {str(module.weight.dtype).removeprefix('torch.')}, not a real floating-point type"
    return ""


def _too_small(linear: nn.Linear, recipe: Int8Recipe, device: torch.device | None, min_features: MinFeatures) -> str:
    """Why ``linear`` would gain nothing; empty if it would."""
    least, source = least_features(min_features, recipe, device or linear.weight.device)
    if effective_features(linear.in_features, linear.out_features) >= least:
        return ""
    return f"too small to gain: 2·in·out / (in + out) is below {source}"


def _looks_linear(module: nn.Module) -> bool:
    """Whether something that is not an ``nn.Linear`` does its work: transformers' Conv1D, a library's own linear."""
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    return (name == "Conv1D" or "Linear" in name) and isinstance(weight, torch.Tensor) and weight.ndim == 2


def _describe(recipe: Int8Recipe) -> str:
    backend = "" if recipe.backend == "auto" else f" with backend {recipe.backend!r}"
    return f"{recipe.describe()!r}{backend}"


def _backend(recipe: Int8Recipe, device: torch.device) -> str:
    """The kernels that run on ``device``; without a GPU, a recipe that forces others fails in the first forward."""
    if device.type == "cuda":
        return backends.choose(recipe.backend, device, recipe.block_size)
    if recipe.backend != "auto":
        return recipe.backend
    return "auto" if device.type == "meta" else backends.choose("auto", device)


def _nothing_converted(module: nn.Module, rows: Sequence[LayerReport]) -> str:
    head = f"Nothing to convert to INT8 in {type(module).__name__}: "
    if not rows:
        return head + (
            "it has no nn.Linear layer. Layers made in setup() or configure_model() must exist before the conversion."
        )
    shown = "; ".join(f"{row.name or 'the module itself'}: {row.reason}" for row in rows[:5])
    more = f"; and {len(rows) - 5} more" if len(rows) > 5 else ""
    return head + (
        f"none of its {len(rows)} linear layers qualifies ({shown}{more}). Narrow ignore_modules, lower min_features, "
        "or train without INT8."
    )


def _warn_of_bypasses(names: Mapping[nn.Module, Sequence[str]], patterns: Sequence[str]) -> None:
    def found(cls: type, without: Collection[nn.Module] = ()) -> Iterator[str]:
        for child, aliases in names.items():
            if not isinstance(child, cls) or child in without:
                continue
            if not any(a and matches(p, a) for a in aliases for p in patterns):
                yield aliases[0] or "the module itself"

    attention = list(found(nn.MultiheadAttention))
    if attention:
        warnings.warn(
            f"{_some(attention)}: nn.MultiheadAttention computes its projections without calling its layers, so they "
            "stay in full precision. To run them in INT8 write them as nn.Linear around "
            "F.scaled_dot_product_attention.",
            stacklevel=3,
        )
    # Hooks, such as those of shared inputs, keep a layer off its fast path.
    hooked = {m for m in names if any(child._forward_hooks or child._forward_pre_hooks for child in m.modules())}
    encoders = list(found(nn.TransformerEncoderLayer, without=hooked))
    if encoders:
        warnings.warn(
            f"{_some(encoders)}: nn.TransformerEncoderLayer has a fast path in eval mode that reads weights without "
            "calling the layers: it evaluates in full precision what trained in INT8. Turn it off with "
            "torch.backends.mha.set_fastpath_enabled(False).",
            stacklevel=3,
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
