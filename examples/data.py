"""Real text as token batches in an order that a resumed run continues exactly."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.text import TokenCache, read_text


class TokenStream:
    """Shuffled training batches whose order depends on the seed and the number of batches handed out, nothing else.

    An endless sequence of passes over the data, each in its own order; one iteration yields one pass' worth of batches
    from wherever the last one stopped. The whole state is one count, so a run resumed from any checkpoint sees exactly
    the batches it would have seen. Lightning saves and restores it (`state_dict`, `load_state_dict`).

    Args:
        tokens: Token ids, 1-D.
        sequence_length: Tokens a sample predicts; a sample holds one more.
        batch_size: Samples in a batch of this process.
        seed: Decides the order.
        rank: This process' index among ``world_size``.
        world_size: Number of processes that share the data; each gets other samples.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        sequence_length: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.windows = max(0, (len(tokens) - 1) // sequence_length)
        self.batches_yielded = 0
        self._order: tuple[int, Tensor] | None = None
        if len(self) == 0:
            raise ValueError(
                f"The training text has {len(tokens)} tokens, {self.windows} sequence(s) of {sequence_length}: too few "
                f"for one batch of {batch_size} on {world_size} process(es). Give more text, or lower sequence_length "
                "or batch_size."
            )

    def __len__(self) -> int:
        return self.windows // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(len(self)):
            batch = self.batch(self.batches_yielded)
            self.batches_yielded += 1
            yield batch

    def batch(self, index: int) -> Tensor:
        """Batch ``index`` of the stream: int64 ``[batch_size, sequence_length + 1]``."""
        epoch, position = divmod(index, len(self))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
            self._order = (epoch, torch.randperm(self.windows, generator=generator))
        first = (position * self.world_size + self.rank) * self.batch_size
        return _gather(self.tokens, self._order[1][first : first + self.batch_size].tolist(), self.sequence_length)

    def state_dict(self) -> dict[str, int]:
        """The position, and what it counts."""
        return {"batches_yielded": self.batches_yielded, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at the saved position; warns when the saved run's batches were others."""
        changed = {k: (state[k], v) for k, v in self._identity().items() if state.get(k, v) != v}
        if changed:
            rank_zero_warn(
                "The run resumes with other batches than it was saved with ("
                + ", ".join(f"{k}: {old} → {new}" for k, (old, new) in changed.items())
                + "): its losses will differ from those of an uninterrupted run."
            )
        self.batches_yielded = state["batches_yielded"]

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "world_size": self.world_size,
            "windows": self.windows,
        }


class TokenWindows(Dataset[Tensor]):
    """The text's consecutive sequences in order, for evaluation."""

    def __init__(self, tokens: np.ndarray, sequence_length: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> Tensor:
        return _gather(self.tokens, [index], self.sequence_length)[0]


def _gather(tokens: np.ndarray, windows: list[int], length: int) -> Tensor:
    rows = [tokens[w * length : (w + 1) * length + 1].astype(np.int64) for w in windows]
    return torch.from_numpy(np.stack(rows))


class TextDataModule(L.LightningDataModule):
    """Token batches ``[batch_size, sequence_length + 1]`` of real text, with a held-out split by file.

    Args:
        path: A text file or a folder of them; left out, the sources of the running Python's standard library.
        sequence_length: Tokens a sample predicts.
        batch_size: Samples in a batch of one process.
        vocab_size: Most tokens the tokenizer may have; at least 257 (all bytes and the end of text).
        val_fraction: Share of the text held out for validation, test and prediction, above 0 and below 1.
        cache_dir: Where tokenizers and tokens are kept, by the content of the text.
        seed: Decides the order of the training batches.
    """

    def __init__(
        self,
        path: str | None = None,
        sequence_length: int = 128,
        batch_size: int = 16,
        vocab_size: int = 4096,
        val_fraction: float = 0.02,
        cache_dir: str = ".cache/text",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, lowest in (
            ("sequence_length", sequence_length, 1),
            ("batch_size", batch_size, 1),
            ("vocab_size", vocab_size, 257),
        ):
            if value < lowest:
                raise ValueError(f"TextDataModule: {name}={value} must be at least {lowest}.")
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"TextDataModule: val_fraction={val_fraction} must be above 0 and below 1, such as 0.02.")
        self.path = path
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.val_fraction = val_fraction
        self.cache_dir = cache_dir
        self.seed = seed
        self.cache: TokenCache | None = None

    def prepare_data(self) -> None:
        """Trains the tokenizer and writes the tokens, once for all processes of a node."""
        self._build()

    def setup(self, stage: str | None = None) -> None:
        """Opens the cache and checks it against the model.

        Raises:
            ValueError: The model's vocabulary is smaller than the tokenizer's, or the text is too short.
        """
        self.cache = self._build()
        model = self.trainer.lightning_module if self.trainer is not None else None
        model_vocab = getattr(model, "vocab_size", None)
        tokens = self.tokenizer.get_vocab_size()
        if model_vocab is not None and model_vocab < tokens:
            raise ValueError(
                f"The model's vocab_size={model_vocab} is smaller than the tokenizer's {tokens} tokens; set the "
                f"model's vocab_size to at least {tokens}, or the data's vocab_size to at most {model_vocab}."
            )
        held_out = self.cache.tokens("val")
        if len(held_out) <= self.sequence_length:
            raise ValueError(
                f"The held-out text has {len(held_out)} tokens, too few for one sequence of {self.sequence_length} and "
                f"its next token. Give more text, raise val_fraction={self.val_fraction} or lower sequence_length."
            )

    @property
    def tokenizer(self) -> Tokenizer:
        """The trained tokenizer; needs :meth:`setup`."""
        if self.cache is None:
            raise RuntimeError("TextDataModule has no tokenizer yet; call setup() first.")
        return self.cache.tokenizer

    def train_dataloader(self, rank: int | None = None, world_size: int | None = None) -> TokenStream:
        """Shuffled batches of the training text, resumable at any batch.

        Args:
            rank: This process' index among those that get other samples; the Trainer's where there is one, else 0.
            world_size: Number of such processes; the Trainer's where there is one, else 1.
        """
        assert self.cache is not None
        # Tensor-parallel ranks share their samples, so it is not the Trainer's number of processes.
        sampler = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"rank": 0, "num_replicas": 1}
        return TokenStream(
            self.cache.tokens("train"),
            self.sequence_length,
            self.batch_size,
            seed=self.seed,
            rank=sampler["rank"] if rank is None else rank,
            world_size=sampler["num_replicas"] if world_size is None else world_size,
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Consecutive batches of the held-out text."""
        assert self.cache is not None
        return DataLoader(TokenWindows(self.cache.tokens("val"), self.sequence_length), batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """The held-out text again."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """The held-out text again."""
        return self.val_dataloader()

    def _build(self) -> TokenCache:
        return TokenCache.build(read_text(self.path), self.vocab_size, self.val_fraction, self.cache_dir)
