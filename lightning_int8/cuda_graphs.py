"""Finds modules that replay CUDA graphs, with which PyTorch accumulates wrong gradients.

A replay writes the weights' gradients to the same memory each time. The first micro-batch's become ``weight.grad``
without a copy, so that the second's overwrite them before both are added (pytorch/pytorch issues 96693 and 169545), in
any precision.
"""

from __future__ import annotations

from torch import nn


def modules_with_cuda_graphs(module: nn.Module) -> list[str]:
    """Names of the submodules with trainable weights that `torch.compile` has been told to run as CUDA graphs.

    Args:
        module: Looked through for modules, and functions they hold, compiled with ``mode="reduce-overhead"``,
            ``"max-autotune"`` or the option ``triton.cudagraphs``. What is compiled elsewhere, such as a function of
            the user's file, is not seen.

    Returns:
        Dotted names; ``module`` itself is ``""``.
    """
    return [
        name
        for name, child in module.named_modules()
        if any(map(_replays, (child, type(child).forward, *vars(child).values())))
        and any(parameter.requires_grad for parameter in child.parameters())
    ]


def refuse_accumulation(module: nn.Module, batches: int) -> None:
    """Raises where gradients of several batches would be added up wrongly.

    Args:
        module: What is trained, on a CUDA device.
        batches: Micro-batches whose gradients make an optimizer step.

    Raises:
        ValueError: ``batches`` is above 1, and a module replays CUDA graphs.
    """
    names = modules_with_cuda_graphs(module) if batches > 1 else []
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"accumulate_grad_batches={batches} with {names[0] or 'the model'!r}{others} compiled into CUDA graphs "
            "(torch.compile's mode 'reduce-overhead' or 'max-autotune'): PyTorch's replay overwrites the gradients of "
            "the micro-batch before (pytorch/pytorch issue 96693). Compile with mode='default' or "
            "'max-autotune-no-cudagraphs', or take larger batches and accumulate_grad_batches=1."
        )


def _replays(compiled: object) -> bool:
    config = getattr(compiled, "get_compiler_config", None)
    settings = config() if callable(config) else None
    return isinstance(settings, dict) and bool(settings.get("triton.cudagraphs"))
