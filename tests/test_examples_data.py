"""Text, tokenizer, cache and the training stream's order."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.data import TextDataModule, TokenStream
from examples.text import END_OF_TEXT, TokenCache, read_text, split_by_file, train_tokenizer

WORDS = ["def", "return", "self", "value", "for", "in", "range", "(x)", "=", "+", "größe", "数", "\n    "]


def write_text(folder: Path, files: int = 6, words: int = 400, seed: int = 0) -> Path:
    choose = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        text = " ".join(choose.choice(WORDS) for _ in range(words))
        (folder / f"file{index}.txt").write_text(text, encoding="utf-8")
    return folder


def data_module(folder: Path, cache: Path, **changes) -> TextDataModule:
    arguments = {"sequence_length": 16, "batch_size": 4, "vocab_size": 300, "val_fraction": 0.2}
    data = TextDataModule(path=str(folder), cache_dir=str(cache), **(arguments | changes))
    data.prepare_data()
    data.setup()
    return data


def test_default_text_is_the_standard_library() -> None:
    texts = read_text(None)
    assert "json/decoder.py" in texts
    assert not any("site-packages" in name for name in texts)


def test_missing_and_empty_paths_are_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-folder' does not exist; give a text file"):
        read_text(tmp_path / "no-such-folder")
    with pytest.raises(ValueError, match="holds no text"):
        read_text(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        read_text(tmp_path / "empty.txt")
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match=r"1 file\(s\) were not readable"):
        read_text(tmp_path)


def test_split_is_by_file_and_stable(tmp_path) -> None:
    texts = read_text(write_text(tmp_path / "text", files=20))
    train, held_out = split_by_file(texts, 0.2)
    assert len(train) + len(held_out) == 20
    assert not set(train) & set(held_out)
    assert 3 <= len(held_out) <= 5
    assert split_by_file(dict(reversed(texts.items())), 0.2)[1] == list(reversed(held_out))


@pytest.mark.parametrize("text", ["line\n" * 100, "x" * 500])
def test_single_file_is_cut_near_its_end(text: str) -> None:
    (train,), (held_out,) = split_by_file({"file": text}, 0.1)
    assert train + held_out == text
    assert 0.05 * len(text) <= len(held_out) <= 0.15 * len(text)


def test_tokenizer_round_trips_any_text() -> None:
    tokenizer = train_tokenizer(["def value(x):\n    return x\n" * 50], 300)
    assert tokenizer.get_vocab_size() <= 300
    for text in ("def value(x):", "größe 数 🙂\t\r\n", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokens_are_the_files_in_order(tmp_path) -> None:
    folder = write_text(tmp_path / "text")
    data = data_module(folder, tmp_path / "cache")
    texts = read_text(folder)
    train, _ = split_by_file(texts, 0.2)
    end = data.tokenizer.token_to_id(END_OF_TEXT)
    tokens = data.cache.tokens("train")
    assert tokens.dtype == np.uint16
    ends = np.flatnonzero(tokens == end)
    assert len(ends) == len(train)
    assert data.tokenizer.decode(tokens[: ends[0]].tolist()) == train[0]


def test_cache_is_keyed_by_content_and_made_once(tmp_path) -> None:
    folder, cache = write_text(tmp_path / "text"), tmp_path / "cache"
    first = data_module(folder, cache).cache.path
    stamp = (first / "train.bin").stat().st_mtime_ns
    assert data_module(folder, cache).cache.path == first
    assert (first / "train.bin").stat().st_mtime_ns == stamp
    assert data_module(folder, cache, vocab_size=280).cache.path != first
    (folder / "file0.txt").write_text("other words " * 100)
    assert data_module(folder, cache).cache.path != first


def _build(folder: str, cache: str) -> None:
    TokenCache.build(read_text(folder), 300, 0.2, cache)


def _build_forever(folder: str, cache: str) -> None:
    original = Path.rename
    Path.rename = lambda self, target: (time.sleep(60), original(self, target))[1]
    _build(folder, cache)


def test_killed_writer_leaves_nothing_that_looks_finished(tmp_path) -> None:
    folder, cache = write_text(tmp_path / "text"), tmp_path / "cache"
    writer = multiprocessing.get_context("fork").Process(target=_build_forever, args=(str(folder), str(cache)))
    writer.start()
    deadline = time.monotonic() + 30
    while not list(cache.glob(".partial-*/val.bin")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert list(cache.glob(".partial-*"))
    assert not [p for p in cache.iterdir() if not p.name.startswith(".")]
    data = data_module(folder, cache)
    assert len(data.train_dataloader()) > 0
    # A partial folder nobody has touched for an hour is removed by the next writer.
    (abandoned,) = cache.glob(".partial-*")
    os.utime(abandoned, (0, 0))
    data_module(folder, cache, vocab_size=290)
    assert not abandoned.exists()


def test_concurrent_writers_agree(tmp_path) -> None:
    folder, cache = write_text(tmp_path / "text"), tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_build, args=(str(folder), str(cache))) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(list(cache.iterdir())) == 1


def test_text_too_short_is_refused(tmp_path) -> None:
    folder = write_text(tmp_path / "text", files=2, words=20)
    with pytest.raises(ValueError, match=r"held-out text has .* too few for one sequence of 4096"):
        data_module(folder, tmp_path / "cache", sequence_length=4096)
    data = data_module(folder, tmp_path / "cache", sequence_length=8, batch_size=500)
    with pytest.raises(ValueError, match="too few for one batch of 500 on 1 process"):
        data.train_dataloader()


def test_smaller_model_vocabulary_is_refused(tmp_path) -> None:
    data = data_module(write_text(tmp_path / "text"), tmp_path / "cache")
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(vocab_size=270))
    with pytest.raises(ValueError, match="model's vocab_size=270 is smaller than the tokenizer's"):
        data.setup()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 256}, "vocab_size=256 must be at least 257"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"sequence_length": 0}, "sequence_length=0 must be at least 1"),
        ({"val_fraction": 1.0}, "val_fraction=1.0 must be above 0 and below 1"),
    ],
)
def test_arguments_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextDataModule(**changes)


def test_setup_comes_before_the_tokenizer() -> None:
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        _ = TextDataModule().tokenizer


def stream(**changes) -> TokenStream:
    arguments = {"sequence_length": 8, "batch_size": 3, "seed": 0}
    return TokenStream(np.arange(8 * 20 + 1, dtype=np.uint16), **(arguments | changes))


def test_a_pass_sees_every_sequence_once() -> None:
    starts = torch.cat([batch[:, 0] for batch in stream(batch_size=4)])
    assert sorted(starts.tolist()) == list(range(0, 160, 8))
    batch = next(iter(stream()))
    assert batch.shape == (3, 9)
    assert batch.dtype == torch.int64
    assert torch.equal(batch - batch[:, :1], torch.arange(9).expand(3, 9))


def test_order_depends_on_seed_and_pass() -> None:
    one = stream()
    first, second = torch.cat(list(one)), torch.cat(list(one))
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat(list(stream())), first)
    assert not torch.equal(torch.cat(list(stream(seed=1))), first)


@given(stops=st.lists(st.integers(0, 9), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_resumed_stream_continues_exactly(stops: list[int]) -> None:
    reference, resumed = stream(), stream()
    for stop in stops:
        # Lightning may ask for an iterator without using it, and may leave one before its end.
        iter(resumed)
        for _, batch in zip(range(stop), resumed, strict=False):
            assert torch.equal(batch, reference.batch(reference.batches_yielded))
            reference.batches_yielded += 1
        state = resumed.state_dict()
        resumed = stream()
        resumed.load_state_dict(state)


def test_ranks_share_each_batch_without_overlap() -> None:
    whole = list(stream(batch_size=6))
    parts = [list(stream(batch_size=3, rank=rank, world_size=2)) for rank in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(batch, torch.cat(shares))


def test_resuming_with_other_batches_warns() -> None:
    with pytest.warns(UserWarning, match="batch_size: 3 → 4"):
        stream(batch_size=4).load_state_dict(stream().state_dict())


def test_held_out_batches_are_consecutive(tmp_path) -> None:
    data = data_module(write_text(tmp_path / "text"), tmp_path / "cache")
    tokens = data.cache.tokens("val")
    seen = torch.cat([batch[:, :-1].flatten() for batch in data.val_dataloader()])
    assert torch.equal(seen, torch.from_numpy(tokens[: len(seen)].astype(np.int64)))
    assert len(data.test_dataloader()) == len(data.predict_dataloader()) == len(data.val_dataloader())
