"""What the study trains: the example's decoder on next tokens or on masked ones, compiled layer by layer."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.model import CompileMode, LlamaModule

Objective = Literal["next_token", "masked"]
# The least share of tokens that a sequence has masked: its loss is divided by the share.
LEAST_MASKED = 0.1


class StudyModule(LlamaModule):
    """Trains the decoder, on next tokens or as a masked-diffusion model (LLaDA, arXiv 2502.09992).

    ``"masked"``: of each sequence a random share ``t`` of the tokens is replaced by the last id of the vocabulary,
    which the tokenizer must not use, and the loss is their cross entropy over ``t``: a bound on the negative
    log-likelihood.

    Args:
        objective: ``"next_token"`` or ``"masked"``; the latter needs a decoder with ``causal=False``.
        seed: Decides, with the step, what is masked.
        compile: `torch.compile`'s mode for the decoder layers (one program for all); ``None``: eager, the loss too.
        kwargs: See :class:`examples.model.LlamaModule`.
    """

    def __init__(
        self, objective: Objective = "next_token", seed: int = 0, compile: CompileMode | None = None, **kwargs: Any
    ) -> None:
        super().__init__(compile=compile, **kwargs)
        if objective not in get_args(Objective):
            raise ValueError(f"objective={objective!r} must be one of {', '.join(map(repr, get_args(Objective)))}.")
        if (objective == "masked") == self.config.causal:
            raise ValueError(
                f"objective={objective!r} with a decoder of causal={self.config.causal}: 'masked' needs causal=False, "
                "'next_token' needs causal=True."
            )
        self.objective = objective
        self.seed = seed
        self.cross_entropy = torch.compile(_cross_entropy) if compile else _cross_entropy

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of one batch ``[batch, length + 1]``."""
        if self.replays_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self.loss(batch, self.global_step)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Logs ``val_loss``, without compiling a program for evaluation alone."""
        with torch.compiler.set_stance("force_eager"):
            self.log("val_loss", self.loss(batch, -1 - batch_idx), batch_size=len(batch))

    def loss(self, batch: Tensor, step: int) -> Tensor:
        """Mean loss; ``step`` decides what is masked, and evaluations take negative ones."""
        if self.objective == "next_token":
            return self.cross_entropy(self(batch[:, :-1]), batch[:, 1:])
        tokens = batch[:, :-1]
        generator = torch.Generator(tokens.device).manual_seed((self.seed * 1_000_003 + step) % (1 << 63))
        share = torch.rand(len(tokens), 1, generator=generator, device=tokens.device)
        share = LEAST_MASKED + (1 - LEAST_MASKED) * share
        masked = torch.rand(tokens.shape, generator=generator, device=tokens.device) < share
        logits = self(tokens.masked_fill(masked, self.vocab_size - 1))
        return self.cross_entropy(logits, tokens, masked / share)


def _cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.mean() if weight is None else (losses * weight.flatten()).mean()
