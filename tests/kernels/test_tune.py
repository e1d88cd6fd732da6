"""What tuning writes: measured forms only, tiles from large to small, one small enough for an added tensor."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from lightning_int8.kernels import tile_table, tiles, tune
from lightning_int8.kernels.tiles import Tile

LARGE, MIDDLE, SMALL = tune.shapes("row")
WIDE, SQUARE, LITTLE = Tile(128, 256, 8, 3, 4), Tile(128, 128, 8, 3), Tile(64, 64, 4, 4)


def tuned(monkeypatch, tmp_path: Path, fastest, *arguments: str, architecture: int = 90) -> dict:
    """The table that `tune` writes."""
    output = tmp_path / "table.py"
    monkeypatch.setattr(tune, "chip", lambda device: (architecture, 132))
    monkeypatch.setattr(tune, "compile_all", lambda pairs, architecture, seconds: None)
    monkeypatch.setattr(tune, "fastest", lambda form, shape, architecture, until: fastest[form][shape])
    monkeypatch.setattr(sys, "argv", ["tune", "--output", str(output), *arguments])
    tune.main()
    if not output.exists():
        return {}
    spec = importlib.util.spec_from_file_location("table", output)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TILES


def test_only_what_was_measured_changes(monkeypatch, tmp_path) -> None:
    times = {
        "row": {LARGE: WIDE, MIDDLE: SQUARE, SMALL: LITTLE},
        "row_both": {tune.WGRAD: WIDE, MIDDLE: None, SMALL: None},
    }
    table = tuned(monkeypatch, tmp_path, times, "--forms", "row_both", "row")
    assert table[90] == {**tile_table.TILES[90], "row": [(128, 256, 8, 3, 4), (128, 128, 8, 3, 8), (64, 64, 4, 4, 8)]}
    assert {a: table[a] for a in (80, 86, 100, 120)} == {a: tile_table.TILES[a] for a in (80, 86, 100, 120)}


def test_nothing_is_written_where_there_was_no_time(monkeypatch, tmp_path, capsys) -> None:
    assert tuned(monkeypatch, tmp_path, {"row": dict.fromkeys(tune.shapes("row"))}, "--forms", "row") == {}
    assert "out of time (--seconds 600): sm_90 keeps its row" in capsys.readouterr().out


def test_equally_large_tiles_are_one_and_an_added_tensor_fits(monkeypatch, tmp_path) -> None:
    other = Tile(128, 256, 8, 4, 8)
    table = tuned(monkeypatch, tmp_path, {"row": {LARGE: WIDE, MIDDLE: other, SMALL: other}}, "--forms", "row")
    assert table[90]["row"] == [(128, 256, 8, 3, 4), (128, 128, 8, 3, 8)]
    # A new architecture starts from the list of the next lower one.
    table = tuned(
        monkeypatch, tmp_path, {"row": dict.fromkeys(tune.shapes("row"), SQUARE)}, "--forms", "row", architecture=89
    )
    assert table[89] == {**tile_table.TILES[86], "row": [(128, 128, 8, 3, 8)]}


@pytest.mark.parametrize("architecture", [80, 86, 90, 120])
def test_tiles_fit_the_chip_and_groups_are_for_large_ones(architecture) -> None:
    found = tune.every_tile(architecture, 128, (4, 8))
    assert all(tile.shared_memory(128) <= tiles.SHARED_MEMORY[architecture] for tile in found)
    assert {tile.group for tile in found if tile.rows * tile.columns < 128 * 128} == {8}
    assert {tile.group for tile in found} == {4, 8}
