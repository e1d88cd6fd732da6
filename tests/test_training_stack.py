"""What training scripts do around a model: decay groups made early, accumulation; and the matrix in the docs."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

from examples.model import parameter_groups
from lightning_int8 import FallbackInt8Precision, convert_to_int8
from tests.assertions import assert_close
from tests.tiny import RECIPE, TinyModel, TinyModule, batches, trainer

ROOT = Path(__file__).parents[1]


def test_weight_decay_groups_made_before_conversion_still_decide(tmp_path) -> None:
    class Grouped(TinyModule):
        """Makes its optimizer, with groups, when it is constructed: before the plugin converts."""

        def __init__(self) -> None:
            super().__init__(steps=2)
            # A learning rate so low that only the decay, scaled up to match, changes a weight.
            self.optimizer = torch.optim.AdamW(parameter_groups(self, 1e6), lr=1e-7)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer

    model = Grouped()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(tmp_path, plugin=FallbackInt8Precision(RECIPE, "32-true")).fit(model)
    for name, parameter in model.named_parameters():
        factor = 0.9**2 if name.endswith("weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=0, atol=1e-6)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    torch.manual_seed(1)
    plain = TinyModel()
    int8 = copy.deepcopy(plain)
    convert_to_int8(int8, RECIPE)
    x, _ = batches(1)
    plain(x).square().mean().backward()
    for part in x.chunk(4):
        (int8(part).square().mean() / 4).backward()
    for (name, expected), measured in zip(plain.named_parameters(), int8.parameters(), strict=True):
        assert_close(name, expected.grad, measured.grad, 18.0)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_evaluation_is_the_same_in_and_outside_of_inference_mode(tmp_path, inference_mode: bool) -> None:
    model = TinyModule()
    run = trainer(tmp_path, plugin=FallbackInt8Precision(RECIPE, "32-true"), inference_mode=inference_mode)
    run.fit(model)
    validated = run.validate(model, verbose=False)
    assert validated == run.test(model, verbose=False)
    (predicted,) = run.predict(model)
    torch.testing.assert_close(predicted, model.eval().model(batches(1, seed=1)[0]), rtol=0, atol=0)


def test_the_support_matrix_names_tests_that_exist() -> None:
    text = (ROOT / "docs/support.md").read_text()
    named = set(re.findall(r"`(\w+\.py)::(\w+)`", text))
    assert len(named) > 30
    for file, test in named:
        (path,) = (ROOT / "tests").rglob(file)
        assert re.search(rf"^def {test}\b", path.read_text(), re.MULTILINE), f"docs/support.md: {file}::{test}"
