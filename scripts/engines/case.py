"""What is decoded: a way to guess, and the files that an engine is given for it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    # plain, eagle3, medusa, model (a draft that is a whole model) or lookup (of the prompt's own words)
    method: str
    # The layout of the files.
    layout: str
    # What this program exported; for `model` a model folder.
    folder: Path | None = None
    # Guesses of a round.
    guesses: int = 3

    @property
    def name(self) -> str:
        return self.method if self.layout in ("", self.method) else f"{self.method} ({self.layout})"


PLAIN = Case("plain", "")


@dataclass(frozen=True)
class Asked:
    """What every engine is asked."""

    target: Path
    prompts: list[list[int]]
    new_tokens: int
    stops: set[int]
    threads: int
    # Where an engine may write.
    work: Path
    # Longest wait for one case.
    seconds: float
