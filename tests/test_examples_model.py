"""The example's decoder and its LightningModule."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from examples.llama import Llama, LlamaConfig, apply_rotary, rotary_table
from examples.model import LlamaModule, parallelize, parameter_groups, warmup_cosine
from tests.assertions import assert_close

SMALL = LlamaConfig(vocab_size=61, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=16)


def test_rotary_scores_depend_on_relative_position_only() -> None:
    cos, sin = rotary_table(32, 8, 10000.0, torch.device("cpu"))
    query, key = torch.randn(8, dtype=torch.float32), torch.randn(8, dtype=torch.float32)
    rotated_query = apply_rotary(query.expand(32, 8), cos, sin)
    rotated_key = apply_rotary(key.expand(32, 8), cos, sin)
    scores = rotated_query @ rotated_key.T
    for offset in (0, 1, 7):
        diagonal = scores.diagonal(offset)
        assert_close(f"scores at offset {offset}", diagonal[:1].expand_as(diagonal), diagonal, 90)
    assert not torch.allclose(scores.diagonal(1)[0], scores.diagonal(7)[0])


def test_rotary_keeps_norms_and_leaves_position_zero() -> None:
    cos, sin = rotary_table(16, 8, 10000.0, torch.device("cpu"))
    x = torch.randn(2, 3, 16, 8)
    rotated = apply_rotary(x, cos, sin)
    assert_close("norms", x.norm(dim=-1), rotated.norm(dim=-1), 100)
    assert_close("position 0", x[..., 0, :], rotated[..., 0, :], math.inf)


def test_logits_do_not_see_later_tokens() -> None:
    model = Llama(SMALL).eval()
    tokens = torch.randint(61, (2, 16))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 61
    before, after = model(tokens), model(changed)
    assert_close("logits before the change", before[:, :9], after[:, :9], 100)
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_grouped_queries_equal_repeated_keys(n_kv_heads: int) -> None:
    config = dataclasses.replace(SMALL, n_kv_heads=n_kv_heads)
    grouped = Llama(config)
    full = Llama(dataclasses.replace(SMALL, n_kv_heads=4))
    state = grouped.state_dict()
    for name, weight in state.items():
        if "k_proj" in name or "v_proj" in name:
            assert weight.shape == (n_kv_heads * config.head_dim, config.dim)
            heads = weight.view(n_kv_heads, config.head_dim, config.dim)
            state[name] = heads.repeat_interleave(4 // n_kv_heads, dim=0).reshape(-1, config.dim)
    full.load_state_dict(state)
    tokens = torch.randint(61, (2, 16))
    assert_close("logits", full(tokens), grouped(tokens), 100)


def test_tied_head_shares_one_parameter() -> None:
    tied = Llama(dataclasses.replace(SMALL, tie_embeddings=True))
    assert tied.lm_head.weight is tied.embed_tokens.weight
    untied = Llama(SMALL)
    assert untied.lm_head.weight is not untied.embed_tokens.weight
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(untied) - count(tied) == 61 * 32


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    plain = Llama(SMALL)
    checkpointed = Llama(dataclasses.replace(SMALL, activation_checkpointing=True))
    checkpointed.load_state_dict(plain.state_dict())
    tokens = torch.randint(61, (2, 16))
    for model in (plain, checkpointed):
        model(tokens).square().mean().backward()
    for (name, expected), actual in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert_close(name, expected.grad, actual.grad, 100)


def test_generate_is_deterministic_and_keeps_the_prompt() -> None:
    model = Llama(SMALL)
    prompt = torch.randint(61, (2, 5))
    draws = [model.generate(prompt, 20, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert draws[0].shape == (2, 25)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0][:, :5], prompt)
    greedy = model.generate(prompt, 1, temperature=0)
    assert torch.equal(greedy[:, 5], model(prompt)[:, -1].argmax(-1))
    assert model.training
    with pytest.raises(ValueError, match="prompt of at least 1 token"):
        model.generate(prompt[:, :0], 1)


def test_sequence_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"17 tokens is longer than LlamaConfig\.max_seq_len=16"):
        Llama(SMALL)(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 30}, r"dim=30 must be a multiple of 2 \* n_heads=8"),
        ({"n_kv_heads": 3}, "n_kv_heads=3 must divide n_heads=4"),
        ({"n_layers": 0}, "n_layers=0 must be an integer of at least 1"),
        ({"vocab_size": 61.0}, "vocab_size=61.0 must be an integer"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be above 0"),
    ],
)
def test_config_errors_name_value_and_fix(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize("tied", [False, True])
def test_weight_decay_spares_norms_and_embeddings(tied: bool) -> None:
    model = Llama(dataclasses.replace(SMALL, tie_embeddings=tied))
    decayed, spared = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert all("proj" in names[id(p)] or names[id(p)] == "lm_head.weight" for p in decayed["params"])
    assert all("norm" in names[id(p)] or names[id(p)] == "embed_tokens.weight" for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


@pytest.mark.parametrize(("name", "ranks"), [("n_kv_heads", 3), ("ffn_dim", 2)])
def test_tensor_parallel_size_must_divide_what_it_splits(name: str, ranks: int) -> None:
    model = Llama(dataclasses.replace(SMALL, ffn_dim=51))
    mesh = {"tensor_parallel": SimpleNamespace(size=lambda: ranks)}
    with pytest.raises(ValueError, match=rf"tensor_parallel_size={ranks} must divide LlamaConfig\.{name}="):
        parallelize(model, mesh)


def test_weight_decay_does_not_go_by_shapes() -> None:
    model = Llama(SMALL)
    sizes = [sum(p.numel() for p in group["params"]) for group in parameter_groups(model, 0.1)]
    for parameter in model.parameters():
        # As FSDP1's shards are.
        parameter.data = parameter.data.flatten()
    assert [sum(p.numel() for p in group["params"]) for group in parameter_groups(model, 0.1)] == sizes


def test_learning_rate_rises_then_falls_to_the_floor() -> None:
    factors = [warmup_cosine(step, 10, 100, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.1)


def test_module_trains_validates_tests_and_predicts(tmp_path) -> None:
    torch.manual_seed(0)
    # A sequence that counts upwards, so that a few steps learn it.
    rows = (torch.arange(17) + torch.randint(61, (64, 1))) % 61
    module = LlamaModule(SMALL, learning_rate=1e-2, warmup_steps=2)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=24, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    loader = DataLoader(rows, batch_size=16)
    trainer.fit(module, loader, loader)
    loss = trainer.callback_metrics["val_loss"].item()
    assert loss < 0.8 * math.log(61)
    expected = math.exp(loss)
    assert trainer.callback_metrics["val_perplexity"].item() == pytest.approx(expected, rel=0.05)
    tested = trainer.test(module, loader, verbose=False)[0]
    assert tested["test_loss"] == pytest.approx(loss, rel=1e-4)
    predicted = torch.cat(trainer.predict(module, loader))
    assert predicted.shape == (64, 16)

    restored = LlamaModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert restored.config == SMALL
    assert_close("restored logits", module(rows[:2, :-1]), restored(rows[:2, :-1]), math.inf)


def test_step_loss_is_next_token_cross_entropy() -> None:
    module = LlamaModule(SMALL)
    batch = torch.randint(61, (3, 17))
    loss, logits = module._loss(batch)
    expected = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:])
    assert_close("loss", expected, loss, 120)


def test_module_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="learning_rate=0"):
        LlamaModule(SMALL, learning_rate=0)
    with pytest.raises(ValueError, match="warmup_steps=-1"):
        LlamaModule(SMALL, warmup_steps=-1)


def test_accumulated_gradients_are_refused_with_cuda_graphs(tmp_path) -> None:
    rows = DataLoader(torch.randint(61, (4, 17)), batch_size=2)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2.*compile='default'"):
        trainer.fit(LlamaModule(SMALL, compile="reduce-overhead"), rows)


def test_checkpoint_of_another_architecture_is_refused(tmp_path) -> None:
    torch.save(Llama(SMALL).state_dict(), tmp_path / "model.pt")
    other = Llama(dataclasses.replace(SMALL, ffn_dim=64))
    with pytest.raises(RuntimeError, match=r"size mismatch for layers\.0\.mlp\.gate_proj\.weight"):
        other.load_state_dict(torch.load(tmp_path / "model.pt"))


def test_compiled_layers_compute_load_and_generate_as_eager_ones() -> None:
    """Inductor takes its time: some 15 seconds on two cores."""
    eager, compiled = LlamaModule(SMALL), LlamaModule(SMALL, compile="reduce-overhead")
    compiled.load_state_dict(eager.state_dict())
    ids = torch.randint(61, (2, 17))
    losses = []
    for module in (eager, compiled):
        loss, _ = module._loss(ids)
        loss.backward()
        losses.append(loss)
    assert_close("loss", losses[0], losses[1], 100)
    for name, parameter in eager.named_parameters():
        assert_close(name, parameter.grad, compiled.get_parameter(name).grad, 100)
    prompt = ids[:1, :4]
    assert torch.equal(eager.generate(prompt, 5, temperature=0), compiled.generate(prompt, 5, temperature=0))
