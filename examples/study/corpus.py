"""The study's text, found on the machine: sources and documentation of Python packages, and C++ headers."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from examples.data import TextDataModule
from examples.text import TokenCache

Corpus = Literal["python", "headers"]

# Sources and documentation of the running Python's standard library and of everything installed beside it; and, as a
# different text to fine-tune on, the C++ and CUDA headers that packages such as PyTorch come with.
SUFFIXES: dict[str, tuple[str, ...]] = {
    "python": (".py", ".pyi", ".pyx", ".md", ".rst"),
    "headers": (".h", ".hpp", ".cuh", ".inl"),
}
# Longer files are tables and generated code.
MAX_FILE_CHARS = 200_000
# Beside the tokens: the names of the files they come from.
FILES = "files.txt"


def _files(corpus: Corpus) -> Iterator[tuple[str, Path]]:
    paths = sysconfig.get_paths()
    for root in (Path(paths["stdlib"]), Path(paths["purelib"])):
        for folder, inner, names in os.walk(root):
            # The standard library's folder holds that of the packages.
            inner[:] = [name for name in inner if name not in ("site-packages", "dist-packages", "__pycache__")]
            for name in names:
                if name.endswith(SUFFIXES[corpus]):
                    file = Path(folder, name)
                    yield f"{root.name}/{file.relative_to(root).as_posix()}", file


def collect(corpus: Corpus, max_bytes: int) -> dict[str, str]:
    """Texts by file name, each content once, in an order by the names' hashes, up to ``max_bytes`` of UTF-8.

    Raises:
        ValueError: Nothing was found.
    """
    texts: dict[str, str] = {}
    seen: set[bytes] = set()
    taken = 0
    found = sorted(_files(corpus), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    for name, content in _read(found):
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(content).digest()
        if digest in seen or not text.strip() or len(text) > MAX_FILE_CHARS:
            continue
        seen.add(digest)
        texts[name] = text
        taken += len(content)
        if taken >= max_bytes:
            break
    if not texts:
        raise ValueError(
            f"No text for the corpus {corpus!r} ({', '.join(SUFFIXES[corpus])}) below "
            f"{sysconfig.get_paths()['purelib']}: install PyTorch there, or choose another corpus."
        )
    return texts


def _read(files: list[tuple[str, Path]]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of what can be read, side by side: a file that no one has read yet waits for the disk."""

    def content(file: Path) -> bytes:
        try:
            return file.read_bytes()
        except OSError:
            return b""

    with ThreadPoolExecutor(32) as pool:
        for start in range(0, len(files), 1024):
            part = files[start : start + 1024]
            yield from zip((name for name, _ in part), pool.map(content, (file for _, file in part)), strict=True)


class StudyData(TextDataModule):
    """A corpus as token batches; every corpus is read with the tokenizer of the ``python`` one.

    Args:
        corpus: Which text.
        max_bytes: How much of each corpus to take at most.
        kwargs: See :class:`examples.data.TextDataModule`.
    """

    def __init__(self, corpus: Corpus, max_bytes: int, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        if corpus not in SUFFIXES:
            raise ValueError(f"corpus={corpus!r} must be one of {', '.join(map(repr, SUFFIXES))}.")
        self.corpus = corpus
        self.max_bytes = max_bytes

    def _key(self) -> tuple[object, ...]:
        return (self.corpus, self.max_bytes, self.vocab_size, self.val_fraction, self.cache_dir)

    def _build(self) -> TokenCache:
        key = self._key()
        if key not in _OPENED:
            tokenizer = None
            if self.corpus != "python":
                options = {
                    "vocab_size": self.vocab_size,
                    "val_fraction": self.val_fraction,
                    "cache_dir": self.cache_dir,
                }
                tokenizer = StudyData("python", self.max_bytes, **options)._build().tokenizer
            texts = collect(self.corpus, self.max_bytes)
            cache = TokenCache.build(texts, self.vocab_size, self.val_fraction, self.cache_dir, tokenizer)
            (cache.path / FILES).write_text("".join(f"{name}\n" for name in texts))
            _OPENED[key] = cache
        return _OPENED[key]


# Hashing the whole text for each of the study's runs would take longer than some runs.
_OPENED: dict[tuple[object, ...], TokenCache] = {}


def prepare(corpora: Iterable[Corpus], data: Mapping[str, Any]) -> dict[str, str]:
    """Tokenizes the corpora, or finds the tokens of an earlier call; their folders by corpus.

    Args:
        corpora: Which.
        data: Arguments of :class:`StudyData`.
    """
    return {corpus: str(StudyData(corpus, **data)._build().path) for corpus in sorted(set(corpora), reverse=True)}


def describe(cache: TokenCache) -> str:
    """How much text a corpus is."""
    files = len((cache.path / FILES).read_text().splitlines())
    train, held_out = (len(cache.tokens(split)) for split in ("train", "val"))
    return f"{files:,} files, {train:,} tokens and {held_out:,} held out, in {cache.path}"


def open_caches(caches: Mapping[str, str], data: Mapping[str, Any]) -> None:
    """Lets every :class:`StudyData` with the arguments ``data`` in this process use what :func:`prepare` returned."""
    for corpus, folder in caches.items():
        with_them = StudyData(corpus, **data)  # type: ignore[arg-type]
        _OPENED[with_them._key()] = TokenCache(Path(folder))
