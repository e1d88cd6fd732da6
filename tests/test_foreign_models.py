"""Models not written here, built from small random configs: what is converted, and gradients beside full precision."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_int8 import FallbackInt8Precision, Int8Linear, convert_to_int8, update_thresholds
from tests.assertions import assert_close, sqnr_db
from tests.tiny import RECIPE, trainer

pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[dev]'")

from tests.foreign_models import batch, bert, encoder, gpt2, llama, mistral, qwen2, vit


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(plain: dict[str, Tensor], int8: dict[str, Tensor]) -> None:
    assert plain.keys() == int8.keys()
    whole, other = (torch.cat([g.flatten() for g in grads.values()]) for grads in (plain, int8))
    assert_close("all gradients", whole, other, 20.0)
    for name, gradient in plain.items():
        # A key's bias shifts every score of a query alike, so that its gradient is rounding noise in any precision.
        if gradient.norm() > 1e-6 * whole.norm():
            assert_close(name, gradient, int8[name], 12.0)


@pytest.mark.parametrize(
    ("build", "converted", "skipped"),
    [(llama, 15, 0), (qwen2, 15, 0), (mistral, 15, 0), (gpt2, 1, 8), (bert, 14, 0), (vit, 13, 0)],
)
def test_gradients_are_near_full_precision_while_training(
    build: Callable[[], nn.Module], converted: int, skipped: int
) -> None:
    plain = build().train()
    int8 = copy.deepcopy(plain)
    report = convert_to_int8(int8, RECIPE)
    assert (len(report.converted), len(report.skipped)) == (converted, skipped)
    inputs = batch(plain)
    optimizer = torch.optim.AdamW(int8.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        # Both from the same weights, so that each step's difference is of that step alone.
        plain.load_state_dict(int8.state_dict())
        expected, measured = gradients(plain, inputs), gradients(int8, inputs)
        assert_gradients_close(expected, measured)
        optimizer.step()
        update_thresholds(int8)
        losses.append(int8(**inputs).loss.item())
    assert losses[-1] < losses[0]


def test_gpt2s_conv1d_is_reported_and_left_alone() -> None:
    report = convert_to_int8(gpt2(), RECIPE)
    assert report.converted == ("lm_head",)
    assert set(report.skipped.values()) == {"not an nn.Linear (transformers.pytorch_utils.Conv1D)"}
    assert "transformer.h.0.mlp.c_fc" in report.skipped
    with pytest.raises(ValueError, match=r"none of its 9 linear layers qualifies .*Conv1D"):
        convert_to_int8(gpt2(), RECIPE, ignore_modules=["lm_head"])


def test_a_head_tied_to_the_embedding_stays_tied_and_is_named() -> None:
    model = qwen2()
    report = convert_to_int8(model, RECIPE)
    (head,) = (row for row in report.rows if row.name == "lm_head")
    assert head.shared == ("model.embed_tokens.weight",)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head, Int8Linear)


def test_transformers_own_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = llama().train()
    other = copy.deepcopy(model)
    for each in (model, other):
        convert_to_int8(each, RECIPE)
    other.gradient_checkpointing_enable()
    inputs = batch(model)
    for _ in range(2):
        expected, measured = gradients(model, inputs), gradients(other, inputs)
        assert all(torch.equal(expected[name], measured[name]) for name in expected)
        update_thresholds(model)
        update_thresholds(other)


def test_generation_with_a_cache_works_and_moves_no_threshold() -> None:
    model = llama()
    convert_to_int8(model, RECIPE)
    gradients(model, batch(model))
    update_thresholds(model)
    before = model.lm_head.int8_state.tensor
    made = model.eval().generate(
        torch.randint(1, 128, (2, 5)), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert made.shape == (2, 9)
    assert torch.equal(model.lm_head.int8_state.tensor, before)


class Causal(pl.LightningModule):
    """Any of transformers' models under the Trainer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_trainer_plugin_follows_full_precision(tmp_path, precision: str) -> None:
    start = llama().state_dict()
    tokens = torch.randint(128, (8, 32))
    data = DataLoader([{"input_ids": row, "labels": row} for row in tokens], batch_size=8)
    losses = []
    for plugin in (None, FallbackInt8Precision(RECIPE, precision, ignore_modules=["lm_head"])):
        module = Causal(llama())
        module.model.load_state_dict(start)
        options = {"precision": precision} if plugin is None else {}
        trainer(tmp_path, plugin=plugin, max_epochs=6, **options).fit(module, data)
        losses.append(module.losses)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    assert losses[1][-1] < losses[1][0] - 0.2


def test_torchs_transformer_encoder_trains_and_evaluates_in_int8() -> None:
    plain = encoder()
    int8 = copy.deepcopy(plain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = convert_to_int8(int8, RECIPE)
    (said,) = (str(warning.message) for warning in caught)
    assert "nn.MultiheadAttention computes its projections without calling its layers" in said
    assert report.converted == tuple(f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2))
    assert set(report.skipped) == {f"layers.{i}.self_attn.out_proj" for i in range(2)}
    x, target = torch.randn(4, 16, 64), torch.randn(4, 16, 64)
    grads = []
    for model in (plain.train(), int8.train()):
        nn.functional.mse_loss(model(x), target).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert_gradients_close(*grads)
    # The hooks of linear1's and linear2's shared window keep torch off its fast path, which would not call them.
    with torch.inference_mode():
        assert 25.0 < sqnr_db(plain.eval()(x), int8.eval()(x)) < 70.0


@pytest.mark.filterwarnings("ignore:.*nn.MultiheadAttention computes")
def test_the_encoders_fast_path_bypasses_int8_where_the_warning_says_so() -> None:
    plain = encoder()
    int8 = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match=r"fast path in eval mode.*set_fastpath_enabled\(False\)"):
        convert_to_int8(int8, RECIPE, ignore_modules=["linear2"])
    x = torch.randn(4, 16, 64)
    with torch.inference_mode():
        expected = plain.eval()(x)
        assert torch.equal(int8.eval()(x), expected)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert 25.0 < sqnr_db(expected, int8(x)) < 70.0
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.gpu
def test_timms_vit() -> None:
    # timm imports torchvision, which does not import beside the CPU build of torch that the other tests run on.
    timm = pytest.importorskip("timm", exc_type=ImportError)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 2, "num_heads": 4, "num_classes": 8}
    plain = timm.models.VisionTransformer(**sizes).cuda().train()
    int8 = copy.deepcopy(plain)
    report = convert_to_int8(int8)
    assert "blocks.0.attn.qkv" in report.converted
    x, y = torch.randn(16, 3, 32, 32, device="cuda"), torch.randint(8, (16,), device="cuda")
    grads = []
    for model in (plain, int8):
        nn.functional.cross_entropy(model(x), y).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_gradients_close(*grads)
