"""The benchmark: that it times in turn, tells peers by their kernels, survives what fails, says what it measured."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rich.progress import Progress
from torch import nn

from benchmarks import readme
from examples.llama import Llama, LlamaConfig
from lightning_int8.bench import ahead, first_step, gemm, linear, report, roofline, run, step, timing, workload
from lightning_int8.bench.advice import least_features, linear_advice, step_advice
from lightning_int8.bench.cli import last_begin, main, parser
from lightning_int8.bench.precisions import Precision, precisions
from lightning_int8.kernels import reference
from lightning_int8.linear import Int8Linear
from lightning_int8.recipe import Int8Recipe, resolve_recipe

CPU = torch.device("cpu")
NAME = "tests.test_bench:llama"
ROW, BLOCK = resolve_recipe("row"), resolve_recipe("block")


def llama() -> Llama:
    return Llama(LlamaConfig(vocab_size=64, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=64, max_seq_len=16))


def test_rounds_run_everything_in_turn_after_the_warmup() -> None:
    order: list[str] = []
    times = timing.interleaved({n: lambda n=n: order.append(n) for n in "ab"}, CPU, rounds=3, warmup=1)
    assert "".join(order) == "ab" * 4
    assert set(times) == {"a", "b"}


def test_runs_in_a_row_are_timed_after_the_warmup() -> None:
    waits = iter([0.2, 0.0, 0.05, 0.05, 0.3])
    milliseconds = timing.in_a_row(lambda: timing.time.sleep(next(waits)), CPU, rounds=3, warmup=2)
    assert 40 < milliseconds < 150
    assert list(waits) == []


def test_the_median_is_of_what_was_run() -> None:
    waits = iter([0.0, 0.05, 0.05, 0.2])
    times = timing.interleaved({"wait": lambda: timing.time.sleep(next(waits))}, CPU, rounds=3, warmup=1)
    assert 40 < times["wait"] < 150


@pytest.mark.parametrize(
    ("kernel", "share"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NTT", 0.0),
        ("nvjet_sm90_qqtst_128x256_128x4_1x2_h_bz_coopA_TNT", 1.0),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<... cutlass::float_e4m3_t ...>>", 1.0),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x32_stage3_stages8_tensor16x8x16", 0.0),
        ("cutlass_80_tensorop_s8_i16832gemm_256x128_64x3_tn_align16", 1.0),
        ("_scaled_int8_mm_kernel", 1.0),
        ("_gemm_row_kernel", 1.0),
        ("block_kernel", 1.0),
    ],
)
def test_a_kernels_name_tells_its_precision(kernel, share) -> None:
    assert timing.low_precision_share({kernel: 2.0, "void at::native::vectorized_elementwise_kernel": 9.0}) == share


def test_no_gemm_is_no_share() -> None:
    assert math.isnan(timing.low_precision_share({"silu": 1.0}))


@pytest.mark.parametrize(
    ("gpu", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10G", 70), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)  # fmt: skip
def test_peaks_by_name(gpu, bf16) -> None:
    assert roofline.peak_of(gpu).bf16 == bf16


@pytest.mark.parametrize("gpu", ["NVIDIA RTX A4000", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla T4"])
def test_no_peaks_for_other_gpus(gpu) -> None:
    assert roofline.peak_of(gpu) is None


def test_the_roofline_takes_the_slower_of_arithmetic_and_memory() -> None:
    # 2·4096³ at 1000 TFLOP/s; a GEMM of depth 1 writes 2·4096² bytes.
    assert roofline.gemm_milliseconds(4096, 4096, 4096, 1000.0, 1e15, 2) == pytest.approx(0.137439, rel=1e-4)
    assert roofline.gemm_milliseconds(4096, 4096, 1, 1000.0, 1e12, 2) == pytest.approx(0.033571, rel=1e-4)
    peak = roofline.Peak(1000, 2000, 2000)
    plain = roofline.linear_milliseconds(4096, 4096, 4096, None, 0.0, peak, 1e18)
    transformed, folded = (
        roofline.linear_milliseconds(4096, 4096, 4096, Int8Recipe(hadamard=hadamard), 0.5, peak, 1e18)
        for hadamard in (True, False)
    )
    # Three GEMMs at twice the rate, with 1.5, 1.5 and 2.25 times the products, or in a mixed wgrad once.
    assert folded / plain == pytest.approx((1.5 + 1.5 + 2.25) / 6, rel=1e-3)
    assert transformed / plain == pytest.approx((1.5 + 1.5 + 1) / 6, rel=1e-3)


def line(k: int, n: int, ratio: float) -> dict:
    return {"tokens": 8, "k": k, "n": n, "cells": {"bf16": {"ms": 1.0, "ratio": 1.0}, "row": {"ms": 1, "ratio": ratio}}}


def test_the_threshold_leaves_out_every_layer_that_lost() -> None:
    lines = [line(4096, 4096, 1.2), line(2048, 2048, 0.9), line(8192, 2048, 1.01), line(1024, 1024, 1.1)]
    assert least_features(lines, "row") == 3276
    assert least_features([line(64, 64, 0.5)], "row") is None
    assert least_features([line(64, 64, 1.5)], "row") == 64


def test_advice_names_the_layers_and_the_fix() -> None:
    lines = [line(4096, 4096, 1.2), line(2048, 2048, 0.9)]
    (said,) = linear_advice(lines, ["row"], {(2048, 2048): ["layers.0.q_proj", "layers.1.q_proj"]})
    assert "2048 → 2048 (0.90×, layers.0.q_proj and 1 more)" in said
    assert "min_features=4096" in said
    assert "no layer gains" in linear_advice(lines[1:], ["row"], {})[0]
    assert "every layer" in linear_advice(lines[:1], ["row"], {})[0]


def test_advice_where_the_gpu_waits_for_the_host() -> None:
    cells = {
        "bf16": {"ms": 5.0, "gpu_ms": 5.0},
        "row": {"ms": 10.0, "gpu_ms": 4.0},
        "block": {"ms": 10.0, "gpu_ms": 9.5},
    }
    (said,) = step_advice([{"model": "m", "compiling": "layers", "cells": cells}], ["row", "block"])
    assert "m, row: the GPU waits for the host 60% of the step" in said
    assert "torch.compile" in said


def test_each_section_gets_its_share_of_the_time() -> None:
    first, second = last_begin(["linear", "gemm"], 2)
    assert first == pytest.approx({"gemm": 0.25, "linear": 0.5})
    assert second == pytest.approx({"gemm": 0.75, "linear": 1.0})


def test_gemms_are_timed_at_the_rates_of_their_recipes() -> None:
    unmixed = resolve_recipe({"preset": "row", "hadamard": False, "budget": 0.3})
    assert gemm.timed("forward", [ROW, BLOCK]) == {"row": (0.0, 0.05, 0.2), "block": (0.0, 0.2)}
    assert gemm.timed("wgrad", [ROW, BLOCK]) == {"row": (0.0,), "block": (0.0, 0.2)}
    assert gemm.timed("wgrad", [ROW, unmixed, resolve_recipe("llm_int8")]) == {"row": (0.0, 0.2, 0.3)}


def test_a_wrong_product_is_reported_not_timed(monkeypatch) -> None:
    right = reference.gemm_row

    class Wrong:
        @staticmethod
        def gemm_row(a, b, bias, dtype):
            return right(a, b, bias, dtype) * 1.01

    monkeypatch.setattr(gemm.backends, "load", lambda backend: Wrong)
    cells = gemm.measure("forward", 256, 128, 256, {"row": [0.2]}, [], "reference", CPU, None, 1e9)["cells"]
    assert "SQNR" in cells["row r=0.2"]["error"]
    assert "ms" not in cells["row r=0.2"]
    assert cells["bf16"]["ratio"] == 1.0


def test_a_peer_that_fails_is_an_entry_of_the_table() -> None:
    def fails(model: nn.Module, ignored: object) -> nn.Module:
        raise RuntimeError("needs another GPU\nand more")

    compared = [*precisions([ROW], []), Precision("peer", fails)]
    # 16 blocks an operand, of which the budget of 0.05 makes one fall back.
    cells = linear.measure(512, 512, 512, compared, CPU, None, 1e9)["cells"]
    assert cells["peer"] == {"error": "RuntimeError: needs another GPU"}
    assert 0.0 < cells["row"]["fallback_rate"] < 0.5
    assert cells["row"]["ratio"] == cells["bf16"]["ms"] / cells["row"]["ms"]


def test_unknown_peer_and_recipe(capsys) -> None:
    with pytest.raises(ValueError, match="--peers fp4: must be of fp8-tensorwise"):
        precisions([ROW], ["fp4"])
    with pytest.raises(SystemExit):
        main(["--recipes", "rows"])
    assert "argument --recipes: Unknown recipe 'rows'; the presets are row" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--min-features", "-1"])
    assert "min_features=-1 must be 'auto' or an integer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--tokens", "0"])
    assert "argument --tokens: '0' must be an integer of at least 1" in capsys.readouterr().err


def test_precisions_train_the_models_own_parameters_and_leave_it_as_it_was() -> None:
    work = workload.load(NAME, 64, CPU)
    before = work.model.layers[0].mlp.up_proj.weight.clone()
    measured = step.measure(work, precisions([ROW, BLOCK], []), "none", timing.Clock(60), 1.0, 1, lambda text: None)
    assert set(measured["cells"]) == {"bf16", "row", "block"}
    assert all(cell["ms"] > 0 and cell["first_step_s"] > 0 for cell in measured["cells"].values())
    assert type(work.model.layers[0].mlp.up_proj) is nn.Linear
    assert not torch.equal(work.model.layers[0].mlp.up_proj.weight, before)


def test_no_precision_is_begun_past_its_time() -> None:
    work = workload.load(NAME, 64, CPU)
    cells = step.measure(work, precisions([ROW], []), "none", timing.Clock(0), 1.0, 1, lambda text: None)["cells"]
    assert "ms" in cells["bf16"]
    assert cells["row"] == {"skipped": "out of time (0 s)"}


def test_repeated_layers_are_the_decoders() -> None:
    model = llama()
    assert step.repeated_layers(model) == list(model.layers)
    assert step.repeated_layers(nn.Sequential(nn.Linear(2, 2))) == []


def test_a_models_first_layer_runs_alone_without_the_models_memory() -> None:
    work = workload.load(NAME, 64, ahead.META)
    seen: list[tuple[torch.Size, torch.device, bool]] = []
    handle = work.model.layers[0].mlp.down_proj.register_full_backward_hook(
        lambda module, dx, dy: seen.append((dx[0].shape, dx[0].device, isinstance(module, Int8Linear)))
    )
    ahead.layer_pass(work, precisions([ROW], [])[1], None, CPU)()
    handle.remove()
    assert seen == [(torch.Size((4, 16, 64)), CPU, True)]
    assert {parameter.device.type for parameter in work.model.parameters()} == {"meta"}


def test_a_model_without_repeated_layers_cannot_be_compiled_ahead() -> None:
    work = workload.Workload("flat", nn.Linear(8, 8, device="meta"), None, 8, lambda model, batch: None)
    with pytest.raises(ValueError, match="flat has no repeated layer"):
        ahead.layer_pass(work, precisions([ROW], [])[0], None, CPU)


def test_precisions_are_made_anew_from_their_names() -> None:
    assert [ahead.Named(recipe, None).made().name for recipe in (None, ROW, BLOCK)] == ["bf16", "row", "block"]


def test_workload_of_a_transformers_folder(tmp_path) -> None:
    from transformers import LlamaConfig as Config

    Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    work = workload.load(str(tmp_path), 64, CPU)
    assert work.batch.shape == (4, 16)
    assert set(work.shapes) == {(32, 32), (32, 16), (32, 64), (64, 32)}
    assert work.shapes[32, 16][1] == "model.layers.0.self_attn.v_proj"
    assert work.loss(work.model, work.batch).item() == pytest.approx(math.log(64), rel=0.1)


def test_workload_of_a_lightning_config(tmp_path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  accelerator: cpu\n  plugins:\n    class_path: lightning_int8.FallbackInt8Precision\n"
        "    init_args: {recipe: block, ignore_modules: [layers.0], min_features: auto}\n"
        "model: {class_path: tests.tiny.TinyModule}\n"
    )
    work = workload.load(str(config), 1, CPU)
    assert (work.recipe.scaling, work.min_features) == ("block", "auto")
    assert work.shapes == {
        (64, 128): ["model.layers.1.up_proj"],
        (128, 64): ["model.layers.1.down_proj"],
        (64, 8): ["model.lm_head"],
    }
    assert work.loss(work.model, work.batch).ndim == 0


def test_unknown_config() -> None:
    with pytest.raises(ValueError, match=r"--config nothing must be a LightningCLI YAML file"):
        workload.load("nothing", 64, CPU)


def test_a_first_step_takes_time() -> None:
    assert first_step.seconds_here(NAME, ROW, 64, CPU) > 0
    assert first_step.seconds_here(NAME, None, 64, CPU) > 0


def test_the_whole_command(tmp_path, capsys) -> None:
    how = f"--device cpu --config {NAME} --tokens 256 --peers --compile none --min-features 40 --sections"
    recipes = ["gemm", "linear", "step", "--recipes", "row", '{"preset": "row", "block_size": 64}']
    assert main([*how.split(), *recipes, "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*-CPU-bench.json")
    results = json.loads(file.read_text())
    assert {(line["k"], line["n"]) for line in results["linear"]} == {(32, 32), (32, 16), (32, 64), (64, 32)}
    assert [(line["model"], line["min_features"]) for line in results["step"]] == [("llama", 40)]
    assert "not a GPU" in results["about"]["device"]
    assert "--recipes row" in results["about"]["command"]
    page = file.with_suffix(".md").read_text()
    assert "| Int8Recipe(block_size=64) |" in page
    assert "Training step of llama, 256 tokens, eager" in page
    assert file.with_suffix(".png").stat().st_size > 1000
    assert "too small to gain" in capsys.readouterr().out


def test_what_is_timed_is_compiled_ahead_and_what_fails_is_kept(monkeypatch) -> None:
    jobs: list[object] = []

    def side_by_side(given, workers, seconds):
        jobs.extend(given)
        assert (workers, seconds) == (3, pytest.approx(27, abs=5))
        yield 0, "RuntimeError: no compiler"

    monkeypatch.setattr(run, "side_by_side", side_by_side)
    how = "--device cpu --tokens 64 --peers --recipes row block --compile-workers 3 --seconds 60"
    measured = run.Run(parser().parse_args(how.split()), "CPU", Progress(disable=True), lambda results: None)
    measured.compile_ahead([NAME, "nothing"], ["step"])
    assert [job.precision.made().name for job in jobs] == ["bf16", "row", "block"]
    errors = measured.compiled["errors"]
    assert "nothing: ValueError: --config nothing must be" in errors[0]
    assert errors[1].endswith("RuntimeError: no compiler")
    assert (measured.compiled["jobs"], measured.compiled["ended"]) == (3, 1)


def test_a_second_run_adds_to_the_first(tmp_path, capsys) -> None:
    arguments = ["--device", "cpu", "--peers", "--shapes", "32,32", "--tokens", "64", "--recipes", "row", "--add"]
    for section in ("gemm", "linear"):
        assert main([*arguments, "--output", str(tmp_path), "--sections", section]) == 0
    results = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert (len(results["gemm"]), len(results["linear"])) == (3, 1)
    assert results["about"]["command"].count("--sections") == 2
    other = {"about": {**results["about"], "device": "another"}}
    with pytest.raises(ValueError, match=r"--add: device was another"):
        report.added(other, results)


def test_nothing_is_begun_without_time_and_all_of_it_is_named(tmp_path, capsys) -> None:
    arguments = ["--device", "cpu", "--peers", "--shapes", "32,32", "--tokens", "64", "--seconds", "0"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "GEMM from forward 32 32 on, 3 of 3: out of time (--seconds 0)" in out
    assert "linear from 32 32 on: out of time" in out
    assert "name a model with --config" in out
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".md"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "no CUDA GPU is visible" in capsys.readouterr().err


def test_a_peer_that_ran_bf16_kernels_is_named() -> None:
    low, high = (
        {"ms": 1.0, "ratio": 2.0, "low_precision_share": 0.9},
        {"ms": 1.0, "ratio": 1.0, "low_precision_share": 0.1},
    )
    cells = {
        "bf16": {"ms": 2.0, "ratio": 1.0},
        "fp8-rowwise": low,
        "torchao-int8": high,
        "late": {"skipped": "out of time"},
        "row": {"ms": 1.0, "ratio": 2.0, "fallback_rate": 0.05},
        "block": {"ms": 1.0, "ratio": 2.0, "fallback_rate": 0.2},
    }
    results = {
        "gemm": [], "first_step": [],
        "linear": [{"tokens": 8, "k": 4, "n": 4, "weights": "float32", "cells": cells}],
        "step": [{"model": "m", "tokens": 8, "compiling": "graphs", "min_features": 64, "cells": cells}],
    }  # fmt: skip
    page = "\n".join(table.markdown() for table in report.tables(results))
    assert page.count("ran BF16 kernels") == 2
    assert "| fp8-rowwise | 1.0 (2.00) |" in page
    assert "| row 0.05, block 0.20 |" in page
    assert "skipped: out of time" in page
    assert "min_features=64" in page


def test_the_page_says_what_was_compiled_ahead() -> None:
    about = {"device": "GPU", "date": "today", "versions": {}, "command": "c", "seconds": 9.0, "copy_bandwidth": 1e12}
    empty = {"gemm": [], "linear": [], "step": [], "first_step": [], "advice": [], "skipped": []}
    compiled = {"jobs": 4, "ended": 3, "seconds": 7.0, "errors": ["no compiler"]}
    page = report.markdown({"about": {**about, "compiled_ahead": compiled}, **empty}, None)
    assert "Compiled ahead: 3 of 4 jobs in 7 s, 1 failed (see the JSON)." in page
    assert "Compiled ahead" not in report.markdown({"about": about, **empty}, None)


def test_readmes_table_is_drawn_from_the_numbers_it_names() -> None:
    text = (readme.ROOT / "README.md").read_text()
    source = text.partition(readme.BEGIN.partition("{}")[0])[2].partition(" -->")[0]
    results = json.loads((readme.ROOT / source).read_text())
    assert readme.drawn(text, source, results) == text
    with pytest.raises(ValueError, match=r"no '<!-- drawn by"):
        readme.drawn("no markers", source, results)
