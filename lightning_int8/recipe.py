"""What is quantized and how: one frozen dataclass, its presets, and the one function that resolves either.

The same fields work from Python (`Int8Recipe(...)`), YAML and the command line (`recipe: row`, or a mapping of fields,
optionally with `preset:` as the base to change).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Scaling = Literal["row", "block", "vector"]
Backend = Literal["auto", "reference", "triton", "hopper"]
# Bands that limit nothing, that of arXiv 2503.08040, and without fallback.
ANY_RATE, FIXED_BAND, NO_FALLBACK = (0.0, 1.0), (0.1, 0.3), (0.0, 0.0)
RecomputeSwiGLU = Literal["nothing", "planes", "all"]
StochasticRounding = Literal["nothing", "small", "all"]


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"Int8Recipe.{name}={value!r} must be one of {', '.join(map(repr, allowed))}.")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Int8Recipe.{name}={value!r} must be a number.")


def _checked_band(name: str, value: Any) -> tuple[float, float]:
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != 2:
        raise TypeError(f"Int8Recipe.{name}={value!r} must be a pair (lowest, highest), such as (0.1, 0.3).")
    low, high = value
    _check_number(name, low)
    _check_number(name, high)
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(
            f"Int8Recipe.{name}={tuple(value)} must satisfy 0 <= lowest <= highest <= 1, such as (0.1, 0.3); (0, 0) "
            "turns fallback off."
        )
    return float(low), float(high)


@dataclass(frozen=True)
class Int8Recipe:
    """How one linear layer's three GEMMs are quantized.

    Args:
        scaling: Where the scales lie. ``"row"``: one scale per row along the whole contraction (this project's).
            ``"block"``: one per ``block_size``² block (arXiv 2503.08040). ``"vector"``: one per row, both operands
            quantized again for each GEMM (LLM.int8(), arXiv 2208.07339).
        block_size: Edge of the square blocks that fall back (and, for ``"block"``, share a scale). A multiple of 16
            from 16 to 256.
        activation_band: Lowest and highest fraction of X's blocks that may fall back to 16 bits before the threshold
            moves, each in [0, 1]; under a budget only a limit. ``(0, 0)`` turns fallback on X off.
        gradient_band: The same for dY.
        budget: Mean fallback rate that all operands of all layers share, above 0 and below 1, each weighted by the MMAs
            that its fallback blocks repeat: blocks go where they remove the most error (:mod:`lightning_int8.budget`),
            and the bands, which must start at 0, only limit the rate of an operand. ``None``: every operand's rate
            stays in its band, (0.1, 0.3) in arXiv 2503.08040.
        threshold_factor: Factor by which a threshold moves after a step whose rate left its band; above 1
            (1.3 in arXiv 2503.08040).
        stochastic_rounding: What of dY is rounded stochastically instead of to nearest. The gradients of tokens that
            a model predicts well are a thousandth of others', and to nearest most of them become zeros.
            ``"small"``: what is below one step, where a scale spans several tokens: with ``scaling="row"`` in the
            wgrad's operand (not under ``hadamard``, which leaves nothing small), with ``"block"`` in the one of
            dgrad and wgrad. ``"all"``: all of dY in both; unbiased, with 2 to 3 dB more noise. ``"vector"`` has
            ``"nothing"`` alone.
        forward: Run the forward GEMM in INT8; otherwise in the input's dtype.
        dgrad: The same for the input-gradient GEMM.
        wgrad: The same for the weight-gradient GEMM.
        hadamard: Mix the contraction of each GEMM by a Hadamard transform over 128 in-features, out-features or tokens
            before its operands are quantized, which leaves the product as it is: outliers are spread over 128 values
            (:mod:`lightning_int8.hadamard_scheme`; QuaRot, arXiv 2404.00456, has it for inference, NVFP4 training for
            the wgrad over 16 tokens, arXiv 2509.25149). X, W and dY are each quantized for their two GEMMs apart, the
            wgrad's operands without fallback. Otherwise X and W are quantized once, and the wgrad's operands have
            fallback. ``None``: with ``scaling="row"``, which alone can be mixed; there ``True`` is kept as ``None``.
        wgrad_group_tokens: So many tokens of a micro-batch share the wgrad's scales: a multiple of ``block_size``, such
            as 4096. Fewer make dW more accurate and its GEMM slower: the groups' products are added up in float32.
            ``None``: all tokens share them. Only with ``scaling="row"`` and without ``hadamard``.
        fuse_swiglu: Compute SwiGLU layers (``down(silu(gate(x)) * up(x))``) together with the quantization of what they
            produce, as :mod:`lightning_int8.fusion` says; the results stay the same. Only with ``scaling="row"`` and
            all three GEMMs in INT8; otherwise layers run one by one.
        recompute_swiglu: What a fused SwiGLU layer computes again in its backward instead of keeping it; the results
            stay the same. ``"planes"``: the transposed planes of its activation, from gate and up: 1.4 bytes less for
            each element of it, for one more read of both. ``"all"``: gate and up too, from its input's planes: 4 more
            bytes less, for two more GEMMs. Other than ``"nothing"`` only with ``fuse_swiglu``.
        outlier_threshold: Only for ``"vector"`` with ``forward``: activation columns whose AbsMax exceeds this stay in
            the input's dtype (6.0 in LLM.int8()). ``None``: none do.
        backend: Which kernels run: ``"auto"`` chooses by device; ``"reference"`` is plain PyTorch; ``"triton"`` needs a
            CUDA device of capability 8.0 or higher, ``"hopper"`` one of 9.0 (H100, H200). The environment variable
            ``LIGHTNING_INT8_BACKEND`` overrides ``"auto"``.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range, or fields contradict each other.
    """

    scaling: Scaling = "row"
    block_size: int = 128
    activation_band: tuple[float, float] = ANY_RATE
    gradient_band: tuple[float, float] = ANY_RATE
    budget: float | None = 0.05
    threshold_factor: float = 1.3
    stochastic_rounding: StochasticRounding = "small"
    forward: bool = True
    dgrad: bool = True
    wgrad: bool = True
    hadamard: bool | None = None
    wgrad_group_tokens: int | None = None
    fuse_swiglu: bool = True
    recompute_swiglu: RecomputeSwiGLU = "nothing"
    outlier_threshold: float | None = None
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        _check_choice("scaling", self.scaling, get_args(Scaling))
        _check_choice("backend", self.backend, get_args(Backend))
        _check_choice("recompute_swiglu", self.recompute_swiglu, get_args(RecomputeSwiGLU))
        for name in ("forward", "dgrad", "wgrad", "hadamard", "fuse_swiglu"):
            if not isinstance(getattr(self, name), bool) and (name, getattr(self, name)) != ("hadamard", None):
                raise TypeError(f"Int8Recipe.{name}={getattr(self, name)!r} must be true or false.")
        if self.hadamard and self.scaling != "row":
            raise ValueError(
                f"Int8Recipe.hadamard=True needs scaling='row', not {self.scaling!r}, whose operands are never mixed; "
                "leave hadamard out."
            )
        if self.hadamard:
            # Recipes that compute the same are equal.
            object.__setattr__(self, "hadamard", None)
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int):
            raise TypeError(f"Int8Recipe.block_size={self.block_size!r} must be an integer.")
        if not 16 <= self.block_size <= 256 or self.block_size % 16:
            raise ValueError(
                f"Int8Recipe.block_size={self.block_size} must be a multiple of 16 from 16 to 256; 128 is the default, "
                "32 is Jetfire's."
            )
        if self.mixes and 256 % self.block_size:
            raise ValueError(
                f"Int8Recipe.block_size={self.block_size} does not fit the 128 values that are mixed: take 16, 32, 64, "
                "128 or 256, or hadamard=False."
            )
        for name in ("activation_band", "gradient_band"):
            object.__setattr__(self, name, _checked_band(name, getattr(self, name)))
        self._check_budget()
        self._check_wgrad_groups()
        _check_number("threshold_factor", self.threshold_factor)
        if not 1.0 < self.threshold_factor <= 16.0:
            raise ValueError(
                f"Int8Recipe.threshold_factor={self.threshold_factor} must be above 1 and at most 16 (default 1.3)."
            )
        if not (self.forward or self.dgrad or self.wgrad):
            raise ValueError("Int8Recipe runs none of forward, dgrad and wgrad in INT8; leave at least one true.")
        if self.recompute_swiglu != "nothing" and not self.fuses:
            raise ValueError(
                f"Int8Recipe.recompute_swiglu={self.recompute_swiglu!r} needs fused SwiGLU layers: fuse_swiglu=True, "
                "scaling='row', and forward, dgrad and wgrad in INT8. Otherwise leave it at 'nothing'."
            )
        if self.outlier_threshold is not None:
            _check_number("outlier_threshold", self.outlier_threshold)
            if self.scaling != "vector":
                raise ValueError(
                    f"Int8Recipe.outlier_threshold={self.outlier_threshold} needs scaling='vector', not "
                    f"{self.scaling!r}; 'row' and 'block' keep outliers by block fallback instead."
                )
            if not self.forward:
                raise ValueError(
                    f"Int8Recipe.outlier_threshold={self.outlier_threshold} needs forward=True: it keeps columns of "
                    "the forward's X. Leave it at None."
                )
            if not self.outlier_threshold > 0:
                raise ValueError(f"Int8Recipe.outlier_threshold={self.outlier_threshold} must be above 0.")
        if self.scaling == "vector" and (self.activation_band != (0.0, 0.0) or self.gradient_band != (0.0, 0.0)):
            raise ValueError(
                "Int8Recipe(scaling='vector') has no block fallback: set activation_band and gradient_band to (0, 0), "
                "or use scaling='row' or 'block'."
            )
        self._check_rounding()

    def _check_rounding(self) -> None:
        if isinstance(self.stochastic_rounding, bool):
            raise TypeError(
                f"Int8Recipe.stochastic_rounding={self.stochastic_rounding!r} must be 'nothing', 'small' or 'all'; "
                "True was what 'all' is now."
            )
        _check_choice("stochastic_rounding", self.stochastic_rounding, get_args(StochasticRounding))
        if self.scaling == "vector" and self.stochastic_rounding != "nothing":
            raise ValueError(
                f"Int8Recipe.stochastic_rounding={self.stochastic_rounding!r} with scaling='vector', which "
                "rounds to nearest alone. Set it to 'nothing'."
            )
        if self.stochastic_rounding == "all" and self.mixes:
            raise ValueError(
                "Int8Recipe.stochastic_rounding='all' with hadamard=True, whose operands are rounded to nearest alone. "
                "Choose stochastic_rounding='small', or hadamard=False."
            )

    @property
    def mixes(self) -> bool:
        """Whether operands are mixed: with `row` scaling, unless ``hadamard`` is false."""
        return self.scaling == "row" and self.hadamard is not False

    @property
    def falls_back(self) -> bool:
        """Whether any operand may have fallback blocks, and so has a threshold."""
        return self.activation_band[1] > 0 or self.gradient_band[1] > 0

    @property
    def fuses(self) -> bool:
        """Whether ``fuse_swiglu`` applies: with `row` scaling and all three GEMMs in INT8."""
        return self.fuse_swiglu and self.scaling == "row" and self.forward and self.dgrad and self.wgrad

    def _check_budget(self) -> None:
        if self.budget is None:
            for name in ("activation_band", "gradient_band"):
                if getattr(self, name) == ANY_RATE and self.scaling != "vector":
                    raise ValueError(
                        f"Int8Recipe.{name}=(0, 1) without a budget would never move a threshold. Give the band its "
                        "limits, such as (0.1, 0.3), or set a budget."
                    )
            return
        _check_number("budget", self.budget)
        bands = (self.activation_band, self.gradient_band)
        if not 0.0 < self.budget < 1.0:
            raise ValueError(f"Int8Recipe.budget={self.budget} must be above 0 and below 1, such as 0.1.")
        if self.scaling == "vector":
            raise ValueError(
                f"Int8Recipe.budget={self.budget} needs scaling='row' or 'block': 'vector' has no block fallback; set "
                "it to None."
            )
        if any(low > 0 for low, _ in bands) or max(high for _, high in bands) < self.budget:
            raise ValueError(
                f"Int8Recipe.budget={self.budget} with activation_band={self.activation_band} and gradient_band="
                f"{self.gradient_band}: under a budget the bands limit each operand's rate. They must start at 0 and "
                "leave room above the budget, such as (0, 0.4) for a budget of 0.1. For bands of their own, or no "
                "fallback, set budget=None."
            )

    def _check_wgrad_groups(self) -> None:
        tokens = self.wgrad_group_tokens
        if tokens is None:
            return
        if isinstance(tokens, bool) or not isinstance(tokens, int):
            raise TypeError(f"Int8Recipe.wgrad_group_tokens={tokens!r} must be an integer or None.")
        if tokens < 1 or tokens % self.block_size:
            raise ValueError(
                f"Int8Recipe.wgrad_group_tokens={tokens} must be a positive multiple of block_size={self.block_size}, "
                f"such as {4096 // self.block_size * self.block_size}."
            )
        if self.scaling != "row" or not self.wgrad:
            raise ValueError(
                f"Int8Recipe.wgrad_group_tokens={tokens} needs scaling='row' and wgrad=True, not {self.scaling!r} and "
                f"{self.wgrad}; leave it at None."
            )
        if self.mixes:
            raise ValueError(
                f"Int8Recipe.wgrad_group_tokens={tokens} with hadamard=True, whose scales span all tokens. Set "
                "hadamard=False, or leave wgrad_group_tokens at None."
            )

    def describe(self) -> str:
        """The preset's name where the fields equal one, else the fields that differ from the default."""
        for name, preset in PRESETS.items():
            if dataclasses.replace(self, backend="auto") == preset:
                return name
        default = Int8Recipe()
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != getattr(default, f.name) and f.name != "backend"
        ]
        return f"Int8Recipe({', '.join(changed)})"


PRESETS: dict[str, Int8Recipe] = {
    "row": Int8Recipe(),
    "block": Int8Recipe(scaling="block", budget=None, activation_band=FIXED_BAND, gradient_band=FIXED_BAND),
    "jetfire": Int8Recipe(
        scaling="block",
        block_size=32,
        budget=None,
        activation_band=NO_FALLBACK,
        gradient_band=NO_FALLBACK,
        stochastic_rounding="nothing",
    ),
    "rowwise": Int8Recipe(
        scaling="vector",
        budget=None,
        activation_band=NO_FALLBACK,
        gradient_band=NO_FALLBACK,
        stochastic_rounding="nothing",
    ),
    "llm_int8": Int8Recipe(
        scaling="vector",
        budget=None,
        activation_band=NO_FALLBACK,
        gradient_band=NO_FALLBACK,
        stochastic_rounding="nothing",
        dgrad=False,
        wgrad=False,
        outlier_threshold=6.0,
    ),
}


def resolve_recipe(recipe: str | Int8Recipe | Mapping[str, Any]) -> Int8Recipe:
    """A recipe from a preset's name, a mapping of fields (with an optional ``preset`` to start from), or itself.

    Raises:
        TypeError: ``recipe`` is none of these.
        ValueError: Unknown preset or field, or a field out of range.
    """
    if isinstance(recipe, Int8Recipe):
        return recipe
    if isinstance(recipe, str):
        if recipe not in PRESETS:
            raise ValueError(f"Unknown recipe {recipe!r}; the presets are {', '.join(PRESETS)}.")
        return PRESETS[recipe]
    if isinstance(recipe, Mapping):
        values = dict(recipe)
        base = resolve_recipe(values.pop("preset", "row"))
        known = {f.name for f in dataclasses.fields(Int8Recipe)}
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ValueError(
                f"Unknown recipe field(s) {', '.join(unknown)}; the fields are preset, {', '.join(sorted(known))}."
            )
        return dataclasses.replace(base, **values)
    raise TypeError(
        f"recipe={recipe!r} of type {type(recipe).__name__} must be a preset's name ({', '.join(PRESETS)}), an "
        "Int8Recipe or a mapping of its fields."
    )
