"""The first training step, in which thresholds are seeded: the same gradients whatever lay in memory before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from examples.llama import Llama, LlamaConfig
from lightning_int8 import convert_to_int8

RECIPES = {
    "row": {},
    "unfused": {"fuse_swiglu": False},
    "recomputed": {"recompute_swiglu": "all"},
    "block": {"preset": "block"},
    "budget": {"budget": 0.1, "activation_band": (0.0, 0.4), "gradient_band": (0.0, 0.4)},
}
# The study's width on a GPU: several tiles a CTA, fewer blocks than a chunk of the selection and more.
SMALL = LlamaConfig(dim=96, n_layers=1, n_heads=3, n_kv_heads=1, ffn_dim=160, vocab_size=64, max_seq_len=64)
STUDY = LlamaConfig(dim=768, n_layers=2, n_heads=12, n_kv_heads=4, ffn_dim=2304, vocab_size=512, max_seq_len=1024)


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def first_gradients(device: str, recipe: dict, poison: bool) -> list[Tensor]:
    """Of a fresh model; ``poison``: uninitialized memory is NaN and the largest integers."""
    torch.utils.deterministic.fill_uninitialized_memory = poison
    config, batch = (STUDY, 16) if device == "cuda" else (SMALL, 2)
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(config)
        ids = torch.randint(config.vocab_size, (batch, config.max_seq_len + 1))
    convert_to_int8(model, recipe if device == "cuda" else recipe | {"block_size": 32}, ["lm_head"])
    with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        loss = cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.filterwarnings(
    "ignore:.*does not have a deterministic implementation.*", "ignore:Deterministic behavior.*"
)
def test_first_gradients_do_not_depend_on_what_memory_held(deterministic, device, recipe):
    expected = first_gradients(device, RECIPES[recipe], poison=False)
    # Again, since a race need not show each time.
    for _ in range(4 if device == "cuda" else 1):
        found = first_gradients(device, RECIPES[recipe], poison=True)
        for wanted, value in zip(expected, found, strict=True):
            assert value.isfinite().all()
            torch.testing.assert_close(value, wanted, rtol=0, atol=0)
