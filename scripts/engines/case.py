"""What is decoded: a way to guess, and the files that an engine is given for it."""

import json
from dataclasses import dataclass
from pathlib import Path

# Methods that draft a block in one pass. Each makes as many guesses as it was trained for: with fewer rows, layers that see
# their whole block would see another one.
BLOCKS = ("dflash", "dflash2", "dspark", "lilicorr", "domino")
# P-EAGLE drafts in one pass too, with rows that see only those before them.
PARALLEL = (*BLOCKS, "peagle")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    # plain, eagle3, medusa, one of PARALLEL, model (a draft that is a whole model) or lookup (of the prompt's own words)
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


def guesses_of(folder: Path) -> int:
    """Guesses of a round that a parallel drafter was trained for."""
    config = json.loads((folder / "config.json").read_text())
    methods = config.get("speculators_config", {}).get("proposal_methods")
    if methods:
        return methods[0]["speculative_tokens"]
    # DSpark's is the number of guesses; everybody else counts the anchor's row.
    return config["block_size"] - (config["architectures"] != ["Qwen3DSparkModel"])


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
