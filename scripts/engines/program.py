"""This program beside the engines: its exports, and its own decode of the same prompts with a trace."""

import json
import os
import subprocess
from array import array
from dataclasses import dataclass, field
from pathlib import Path

from .accounting import Answer


@dataclass
class Decode:
    """What came out of a decode of this program or of an engine."""

    answers: list[Answer]
    tokens_per_second: float
    # What a reader should know of it.
    notes: list[str] = field(default_factory=list)


class Trace:
    """A decode that this program recorded."""

    def __init__(self, path: Path):
        self.path = path
        self.prompts: list[list[int]] = []
        self.answers: list[Answer] = []
        # Where each token's row of logits begins.
        self.rows: list[list[int]] = []
        places: dict[int, int] = {}
        for line in path.read_text().splitlines():
            record = json.loads(line)
            kind = record.get("record")
            if kind is None:
                self.header = record["header"]
            elif kind == "prompt":
                places[record["tag"]] = len(self.prompts)
                self.prompts.append(record["tokens"])
                self.answers.append(Answer([], []))
                self.rows.append([])
            elif kind == "round":
                self.answers[places[record["tag"]]].drafts.append(record["tokens"][1:])
            elif kind == "token":
                self.answers[places[record["tag"]]].tokens.append(record["token"])
                self.rows[places[record["tag"]]].append(record["row"])
        self.stops = set(self.header["settings"]["stop_tokens"])

    def margin(self, answer: int, index: int, token: int) -> float:
        """How much larger the logit of the recorded token is than that of another token in its place."""
        row = array("f")
        with open(f"{self.path}.rows", "rb") as rows:
            rows.seek(self.rows[answer][index])
            row.fromfile(rows, self.header["vocabulary"])
        return row[self.answers[answer].tokens[index]] - row[token]


class Program:
    """The built binary."""

    def __init__(self, path: Path, target: Path, threads: int):
        self.path, self.target, self.help = path, target, ""
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "RUST_BACKTRACE": "0"}

    def run(self, *arguments) -> dict:
        """Runs a command that prints JSON."""
        command = [str(part) for part in (self.path, *arguments)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr.strip()}")
        return json.loads(done.stdout) if done.stdout.strip() else {}

    def export(self, checkpoint: Path, layout: str, out: Path) -> Path:
        """Writes a draft in a layout."""
        self.run(
            "export", "--json", "--checkpoint", checkpoint, "--format", layout, "--out", out, "--dtype", "float32"
        )
        return out

    def unserved(self, export: Path, engine: str) -> str:
        """Why an engine does not serve an export, by the rules of `export --check`; nothing where it does.

        A check that fails for another reason says nothing of engines: what is wrong then is ours.
        """
        command = [str(part) for part in (self.path, "export", "--check", export, "--engine", engine)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stderr.strip() if done.returncode and "cannot be served" in done.stderr else ""

    def has_layout(self, layout: str) -> bool:
        """Whether `export` can write it."""
        if not self.help:
            self.help = subprocess.run([self.path, "export", "--help"], capture_output=True, text=True).stdout
        return f" {layout} (" in " ".join(self.help.split())

    def decode(self, trace: Path, questions: list, draft=None, tree: str | None = None) -> tuple[Trace, float | None]:
        """Answers the questions greedily in float32, and how fast, in tokens a second.

        A trace that is there already is taken as it is.
        """
        options = ["--draft", draft, "--tree", tree] if draft else []
        report = trace.with_suffix(".report.json")
        if not trace.exists():
            said = self.run(
                "eval", "--json", "--no-baseline", "--device", "cpu", "--dtype", "float32", "--target", self.target,
                *questions, *options, "--trace", trace,
            )
            report.write_text(json.dumps(said))
        recorded = Trace(trace)
        for answer in recorded.answers:
            # The trees of plain decoding are empty: such a pass is no round of speculative decoding.
            answer.drafts = answer.drafts if draft else None
            answer.rounds = len(answer.drafts) if draft else None
        speed = json.loads(report.read_text())["drafted"]["tokens_per_second"] if report.exists() else None
        return recorded, speed

    def judge(self, plain: Trace, drafted: Trace) -> str:
        """What `compare` says of two traces, every row of theirs held against a pass without a cache."""
        command = [self.path, "compare", "--json", plain.path, drafted.path, "--target", self.target, "--device", "cpu"]
        done = subprocess.run([str(part) for part in command], env=self.environment, capture_output=True, text=True)
        return json.loads(done.stdout)["verdict"] if done.stdout.strip() else done.stderr.strip()
