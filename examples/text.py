"""Text files, a byte-level BPE trained once on them, and the memory-mapped tokens it makes, cached by content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sysconfig
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
# Bumped when the same text would give other tokens.
CACHE_FORMAT = 1
# A BPE's merges settle long before this; more text only costs time.
TOKENIZER_SAMPLE_CHARS = 4_000_000


def read_text(path: str | Path | None) -> dict[str, str]:
    """The text to train on, by file name in sorted order.

    Args:
        path: A file, or a folder whose UTF-8 files are all read; ``None`` reads the sources of the running Python's
            standard library (``*.py`` without installed packages).

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: It holds no text.
    """
    pattern = "*"
    if path is None:
        root, pattern = Path(sysconfig.get_paths()["stdlib"]), "*.py"
    else:
        root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(
            f"The text path {str(root)!r} does not exist; give a text file or a folder of them, or leave it out for "
            "Python's standard library."
        )
    texts: dict[str, str] = {}
    skipped = 0
    for file in [root] if root.is_file() else sorted(root.rglob(pattern)):
        name = file.name if root.is_file() else file.relative_to(root).as_posix()
        if not file.is_file() or {"site-packages", "dist-packages", "__pycache__", ".git"} & set(file.parts[:-1]) - set(
            root.parts
        ):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            skipped += 1
            continue
        if text.strip():
            texts[name] = text
    if skipped:
        log.info("%s: skipped %d file(s) that are not readable UTF-8 text.", root, skipped)
    if not texts:
        raise ValueError(
            f"The text path {str(root)!r} holds no text ({skipped} file(s) were not readable as UTF-8); give a "
            "non-empty text file or a folder of them."
        )
    return texts


def split_by_file(texts: dict[str, str], fraction: float) -> tuple[list[str], list[str]]:
    """Training and held-out texts: whole files, chosen by the hash of their names; a single file is cut near its end.

    Adding or removing a file moves few others between the two, and no file lies in both.
    """
    if len(texts) == 1:
        (text,) = texts.values()
        cut = text.rfind("\n", 0, max(1, int(len(text) * (1 - fraction)))) + 1
        cut = cut or int(len(text) * (1 - fraction))
        return [text[:cut]], [text[cut:]]
    order = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    wanted, taken, held_out = fraction * sum(map(len, texts.values())), 0, set()
    for name in order[:-1]:
        if taken >= wanted:
            break
        held_out.add(name)
        taken += len(texts[name])
    return [t for n, t in texts.items() if n not in held_out], [t for n, t in texts.items() if n in held_out]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` tokens, trained on an even sample of ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stride = max(1, -(-sum(map(len, texts)) // TOKENIZER_SAMPLE_CHARS))
    tokenizer.train_from_iterator(texts[::stride], trainer)
    return tokenizer


@dataclass(frozen=True)
class TokenCache:
    """A folder with a tokenizer and the tokens it made; whole or absent, never partial."""

    path: Path

    @classmethod
    def build(
        cls,
        texts: dict[str, str],
        vocab_size: int,
        val_fraction: float,
        cache_dir: str | Path,
        tokenizer: Tokenizer | None = None,
    ) -> TokenCache:
        """The cache of ``texts``, made now unless one of the same content exists.

        With ``tokenizer`` the texts are read with that one (``vocab_size`` is then its own), otherwise one is trained.
        """
        digest = hashlib.sha256(json.dumps([CACHE_FORMAT, vocab_size, val_fraction]).encode())
        for name, text in texts.items():
            digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(text.encode()).digest())
        if tokenizer is not None:
            digest.update(tokenizer.to_str().encode())
        root = Path(cache_dir).expanduser()
        final = root / digest.hexdigest()[:20]
        if final.is_dir():
            return cls(final)
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        partial = root / f".partial-{uuid.uuid4().hex}"
        partial.mkdir()
        try:
            train, val = split_by_file(texts, val_fraction)
            if tokenizer is None:
                tokenizer = train_tokenizer(train, vocab_size)
            tokenizer.save(str(partial / "tokenizer.json"))
            for split, part in (("train", train), ("val", val)):
                _write_tokens(partial / f"{split}.bin", tokenizer, part)
            # The rename publishes all files at once: a killed writer leaves nothing that looks finished, and of two
            # concurrent writers the second finds the first one's identical folder.
            try:
                partial.rename(final)
            except OSError:
                if not final.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return cls(final)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return Tokenizer.from_file(str(self.path / "tokenizer.json"))

    def tokens(self, split: str) -> np.ndarray:
        """Memory-mapped token ids of ``"train"`` or ``"val"``."""
        file = self.path / f"{split}.bin"
        dtype = _token_dtype(self.tokenizer.get_vocab_size())
        return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype=dtype)


def _token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _write_tokens(file: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    end = tokenizer.token_to_id(END_OF_TEXT)
    dtype = _token_dtype(tokenizer.get_vocab_size())
    with open(file, "wb") as out:
        for start in range(0, len(texts), 2048):
            for encoding in tokenizer.encode_batch_fast(texts[start : start + 2048]):
                np.array([*encoding.ids, end], dtype=dtype).tofile(out)
        out.flush()
        os.fsync(out.fileno())


def _remove_abandoned(root: Path) -> None:
    for folder in root.glob(".partial-*"):
        try:
            if time.time() - folder.stat().st_mtime > 3600:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            pass
