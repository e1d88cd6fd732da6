"""One run of the study as data: what its YAML says, and what all runs share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from examples.model import CompileMode
from examples.study.corpus import Corpus
from examples.study.module import Objective
from lightning_int8.bench.precisions import TORCHAO
from lightning_int8.recipe import Int8Recipe, resolve_recipe

PLANS = Path(__file__).parent / "plans"


@dataclass(frozen=True)
class Run:
    """One training run. Without ``int8`` and ``peer`` it is BF16.

    Args:
        name: Its YAML's name.
        seed: Of weights, batches and masks.
        int8: Recipe of the INT8 plugin: a preset's name or a mapping of fields.
        peer: One of torchao's ways to train, see :mod:`lightning_int8.bench.precisions`.
        model: Fields of :class:`examples.llama.LlamaConfig` that differ from the study's.
        objective: See :class:`examples.study.module.StudyModule`.
        corpus: See :mod:`examples.study.corpus`.
        init_from: Name of the run whose weights this one starts from.
        branch_from: Name of the run whose checkpoint at the study's ``branch_at`` this one goes on with: weights,
            optimizer, batches and learning rate. So the runs have no time to part before what differs between them
            shows.
        learning_rate: Its highest if it differs from the study's. A branch takes its parent's.
        compile: Mode of `torch.compile` if it differs from the study's.
        share: Of the study's tokens a run, how many this one trains on.
        keep_weights: Whether to leave ``weights.pt``; set for the runs that others start from, or that the probe reads.
        keep_branch: Whether to leave ``branch.ckpt``; set for the runs that others branch from.

    Raises:
        ValueError: A field is out of range, or fields contradict each other.
    """

    name: str
    seed: int = 0
    int8: str | dict[str, Any] | None = None
    peer: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    objective: Objective = "next_token"
    corpus: Corpus = "python"
    init_from: str | None = None
    branch_from: str | None = None
    learning_rate: float | None = None
    compile: CompileMode | None = None
    share: float = 1.0
    keep_weights: bool = False
    keep_branch: bool = False

    def __post_init__(self) -> None:
        if self.int8 is not None and self.peer is not None:
            raise ValueError(f"{self.name}: int8={self.int8!r} and peer={self.peer!r} exclude each other.")
        if self.peer is not None and self.peer not in TORCHAO:
            raise ValueError(f"{self.name}: peer={self.peer!r} must be one of {', '.join(map(repr, TORCHAO))}.")
        if not 0 < self.share <= 1:
            raise ValueError(f"{self.name}: share={self.share!r} must be above 0 and at most 1.")
        rate = self.learning_rate
        if rate is not None and (not isinstance(rate, (int, float)) or not rate > 0):
            raise ValueError(f"{self.name}: learning_rate={rate!r} must be a number above 0, in YAML 1.0e-4, not 1e-4.")
        if rate is not None and self.branch_from is not None:
            raise ValueError(
                f"{self.name}: learning_rate={rate!r} has no effect on a branch, which goes on with"
                f" {self.branch_from!r}'s; use init_from to start from its weights alone, or leave learning_rate out."
            )
        if self.init_from is not None and self.branch_from is not None:
            raise ValueError(
                f"{self.name}: init_from={self.init_from!r} and branch_from={self.branch_from!r} exclude each other."
            )

    @property
    def parent(self) -> str | None:
        """Name of the run that this one starts from."""
        return self.init_from or self.branch_from

    @property
    def kind(self) -> str:
        """Equal for runs of the same programs, which run at the same speed."""
        return json.dumps([self.int8, self.peer, self.model, self.objective, self.compile], sort_keys=True)

    @property
    def full_precision(self) -> bool:
        """Whether it is BF16 throughout."""
        return self.int8 is None and self.peer is None

    @property
    def recipe(self) -> Int8Recipe | None:
        """The recipe, or ``None`` where nothing is INT8."""
        return None if self.int8 is None else resolve_recipe(self.int8)

    def digest(self, shared: dict[str, Any]) -> str:
        """Changes with whatever changes the run: a folder holds results of one digest only."""
        content = json.dumps([dataclasses.asdict(self), shared], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def load(file: Path) -> Run:
    """The run that a YAML file describes.

    Raises:
        ValueError: Unknown fields, or values that :class:`Run` refuses.
    """
    values = yaml.safe_load(file.read_text()) or {}
    known = {f.name for f in dataclasses.fields(Run)} - {"name"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{file}: unknown field(s) {', '.join(unknown)}; the fields are {', '.join(sorted(known))}.")
    return Run(name=file.stem, **values)


def in_order(runs: list[Run]) -> list[Run]:
    """The runs with each after the one it starts from.

    Raises:
        ValueError: A run starts from one that is not among them.
    """
    names = {run.name: run for run in runs}
    ordered: dict[str, Run] = {}

    def place(run: Run, above: tuple[str, ...]) -> None:
        if run.name in ordered:
            return
        if run.parent is not None:
            if run.parent not in names or run.parent in above:
                field_name = "init_from" if run.init_from is not None else "branch_from"
                raise ValueError(
                    f"{run.name}: {field_name}={run.parent!r} must be another of the runs: {', '.join(names)}."
                )
            place(names[run.parent], (*above, run.name))
        ordered[run.name] = run

    for run in runs:
        place(run, ())
    return list(ordered.values())
