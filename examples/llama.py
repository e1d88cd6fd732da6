"""A Llama-style decoder in plain PyTorch; it knows nothing of Lightning or of INT8."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FeedForward = Literal["swiglu", "gelu"]


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a decoder.

    Args:
        vocab_size: Number of token ids; at least the tokenizer's.
        dim: Width of the residual stream; a multiple of twice ``n_heads``.
        n_layers: Number of decoder layers.
        n_heads: Number of query heads; RoPE rotates pairs of a head's channels, so their number is even.
        n_kv_heads: Number of key/value heads; divides ``n_heads`` (equal: multi-head, 1: multi-query attention).
        ffn_dim: Width of the feed-forward layer.
        ffn: ``"swiglu"`` (Llama's) or ``"gelu"``, two linears with a GELU between, as in GPT-2.
        causal: Whether a position sees only itself and what precedes it; otherwise it sees the whole sequence.
        max_seq_len: Longest sequence in tokens.
        rope_theta: Base of the rotary frequencies (10000 in RoFormer, 500000 in Llama 3).
        norm_eps: Epsilon of RMSNorm.
        tie_embeddings: Share the embedding's weight with the output head.
        activation_checkpointing: Recompute each layer's activations in the backward pass to save memory.

    Raises:
        ValueError: A field is out of range, or fields contradict each other.
    """

    vocab_size: int = 4096
    dim: int = 256
    n_layers: int = 4
    n_heads: int = 8
    n_kv_heads: int = 4
    ffn_dim: int = 704
    max_seq_len: int = 128
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    activation_checkpointing: bool = False
    ffn: FeedForward = "swiglu"
    causal: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"LlamaConfig.{name}={value!r} must be an integer of at least 1.")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"LlamaConfig.{name}={getattr(self, name)!r} must be above 0.")
        if self.ffn not in get_args(FeedForward):
            raise ValueError(
                f"LlamaConfig.ffn={self.ffn!r} must be one of {', '.join(map(repr, get_args(FeedForward)))}."
            )
        pair = 2 * self.n_heads
        if self.dim % pair:
            raise ValueError(
                f"LlamaConfig.dim={self.dim} must be a multiple of 2 * n_heads={pair}, because RoPE rotates pairs of a "
                f"head's channels; the nearest is {max(1, round(self.dim / pair)) * pair}."
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"LlamaConfig.n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}, so that every key/value "
                "head serves the same number of query heads."
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.n_heads


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, each float32 ``[length, head_dim / 2]``.

    Computed where used rather than kept as buffers, which ``bf16-true`` would round to 8 bits of position.
    """
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel ``i`` with channel ``i + head_dim / 2`` of ``x`` ``[..., length, head_dim]`` by its angle."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions, causal unless the config says otherwise."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        kv_dim = config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch, length, -1, self.config.head_dim).transpose(1, 2)

        query = apply_rotary(heads(self.q_proj(x)), cos, sin)
        key = apply_rotary(heads(self.k_proj(x)), cos, sin)
        grouped = self.config.n_kv_heads != self.config.n_heads
        value = heads(self.v_proj(x))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=self.config.causal, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, whose outliers are what INT8 fallback is for."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GeluMLP(nn.Module):
    """``down(gelu(up(x)))``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward layer, each added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config) if config.ffn == "swiglu" else GeluMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """The decoder: token ids ``[batch, length]`` to logits ``[batch, length, vocab_size]``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        for layer in self.layers:
            # Two additions a layer: this keeps the residual stream's variance independent of depth (GPT-2).
            for residual in (layer.attention.o_proj, layer.mlp.down_proj):
                nn.init.normal_(residual.weight, std=0.02 / math.sqrt(2 * config.n_layers))
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each position.

        Raises:
            ValueError: The sequence is longer than ``max_seq_len``.
        """
        length = tokens.shape[-1]
        if length > self.config.max_seq_len:
            raise ValueError(
                f"A sequence of {length} tokens is longer than LlamaConfig.max_seq_len={self.config.max_seq_len}; "
                "shorten the data's sequence_length or raise max_seq_len."
            )
        cos, sin = rotary_table(length, self.config.head_dim, self.config.rope_theta, tokens.device)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.8,
        top_k: int | None = 50,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues ``tokens`` ``[batch, length]`` by sampling.

        Args:
            tokens: The prompt; only its last ``max_seq_len`` tokens are seen.
            max_new_tokens: How many tokens to append.
            temperature: Divides the logits; 0 takes the likeliest token.
            top_k: Sample among this many likeliest tokens; ``None``: among all.
            generator: Source of randomness, on the tokens' device.

        Returns:
            The prompt with its continuation, ``[batch, length + max_new_tokens]``.
        """
        if tokens.shape[-1] < 1 or max_new_tokens < 0 or temperature < 0:
            raise ValueError(
                f"generate() needs a prompt of at least 1 token (got {tokens.shape[-1]}), max_new_tokens >= 0 (got "
                f"{max_new_tokens}) and temperature >= 0 (got {temperature})."
            )
        was_training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.config.max_seq_len :])[:, -1].float()
            if temperature == 0:
                chosen = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < lowest, -torch.inf)
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, chosen], dim=1)
        self.train(was_training)
        return tokens
