"""What an engine's decode is held against: its own plain decode, this program's tokens, and this program's rounds."""

from dataclasses import asdict, dataclass, field

from .accounting import Counts, count, faults, rebuilt
from .case import PARALLEL, Case
from .program import Decode, Trace

# Two logits of this program that are closer may change places in another engine's float32: its kernels add in another
# order. Rows of sound decodes were seen to differ by a tenth of it.
NEAR_TIE = 1e-3
# Tokens a verification, the engine against this program on the same tokens.
TOLERANCE = 0.01
# Methods whose drafts every engine must make as this program does. Prompt lookup is each engine's own.
COMPARED = {"eagle3", "medusa", "model", *PARALLEL}


@dataclass
class Line:
    """One line of the table, and of the JSON file."""

    engine: str
    version: str
    method: str
    layout: str
    answers: int = 0
    equal_to_own_plain: int = 0
    equal_to_specforge: int = 0
    # Answers whose first difference is a near tie.
    near_ties: list[str] = field(default_factory=list)
    counts: Counts | None = None
    specforge: Counts | None = None
    tokens_per_second: dict = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def values(self) -> dict:
        """What the JSON file says."""
        values = {**asdict(self), "passed": not self.problems}
        for key, counts in (("counts", self.counts), ("specforge", self.specforge)):
            if counts is not None:
                values[key] |= {"tau": counts.tau, "by_position": counts.by_position()}
        return values


def first_difference(left: list[int], right: list[int]) -> int | None:
    """Where two answers part."""
    if left == right:
        return None
    return next((index for index, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))


def judge(line: Line, name: str, got: list[int], want: list[int], ours: Trace, place: int, words: str) -> bool:
    """Whether two answers are equal; otherwise says whether they part at a near tie of this program's logits."""
    where = first_difference(got, want)
    if where is None:
        return True
    said = f"answer {place} differs from {words} at token {where}"
    tokens = ours.answers[place].tokens
    if where >= min(len(got), len(want), len(tokens)):
        line.problems.append(f"{name}: {said}: {len(got)} tokens, expected {len(want)}")
    elif tokens[:where] != want[:where]:
        line.problems.append(f"{name}: {said}, where this program's text is another: not judged")
    else:
        margin = max(ours.margin(place, where, token) for token in (got[where], want[where]))
        found = f"{said}: {got[where]} instead of {want[where]}, margin {margin:.2g}"
        (line.near_ties if margin <= NEAR_TIE else line.problems).append(found)
    return False


def held(case: Case, engine, decode: Decode, plain: Decode, ours: Trace) -> Line:
    """The line of a case. `plain` is the engine's own decode without a draft."""
    line = Line(engine.name, engine.version, case.method, case.layout, answers=len(decode.answers))
    line.notes += decode.notes
    same = []
    for place, (answer, own, mine) in enumerate(zip(decode.answers, plain.answers, ours.answers, strict=True)):
        if case.method != "plain":
            line.equal_to_own_plain += judge(line, "tokens", answer.tokens, own.tokens, ours, place, "its plain decode")
        if judge(line, "tokens", answer.tokens, mine.tokens, ours, place, "specforge's"):
            line.equal_to_specforge += 1
            same.append(place)
    if case.method == "plain":
        return line
    if case.method not in COMPARED:
        accepted = sum(answer.accepted or 0 for answer in decode.answers)
        mine = count(ours.answers).accepted
        line.notes.append(f"its own lookup: {accepted} guesses accepted, {mine} here; not compared")
        return line
    line.problems += faults([decode.answers[place] for place in same], case.guesses)
    line.counts = count([decode.answers[place] for place in same])
    line.specforge = count([ours.answers[place] for place in same])
    if line.counts.behind_end:
        line.notes.append(f"{engine.counting}: {line.counts.behind_end}, taken off")
    ratio = line.counts.tau / line.specforge.tau
    if same and abs(ratio - 1) > TOLERANCE:
        taus = f"tau {line.counts.tau:.4f} where this program has {line.specforge.tau:.4f}"
        line.problems.append(f"{taus} on the same tokens")
    compare_drafts(line, [(decode.answers[place], ours.answers[place]) for place in same])
    return line


def compare_drafts(line: Line, pairs: list) -> None:
    """How many drafts are the same, token for token, at the same place of the same text."""
    equal = other = 0
    for theirs, mine in pairs:
        if theirs.drafts is None:
            return
        places = [dict(zip(starts(answer), answer.drafts)) for answer in (theirs, mine)]
        for start, draft in places[1].items():
            if start in places[0]:
                # Ours are shorter where an answer ends at its limit.
                same = places[0][start][: len(draft)] == draft
                equal, other = equal + same, other + (not same)
    line.notes.append(f"drafts at the same place: {equal} equal, {other} not")


def starts(answer) -> list[int]:
    """Tokens in front of each round."""
    places, committed = [], 1
    for _, accepted in rebuilt(answer.tokens, answer.drafts):
        places.append(committed)
        committed += accepted + 1
    return places


def table(lines: list[Line]) -> str:
    """Every line in columns."""
    head = ("engine", "method", "= own plain", "= specforge", "rounds", "tau", "by position", "tokens/s", "")
    rows = [head]
    for line in lines:
        def both(words) -> str:
            return f"{words(line.counts)} / {words(line.specforge)}" if line.counts else "-"

        def positions(counts: Counts) -> str:
            return " ".join(f"{share:.3f}" for share in counts.by_position()) if counts.positions is not None else "?"

        plain = line.method == "plain"
        rows.append((
            line.engine,
            line.method + (f" ({line.layout})" if line.layout not in ("", line.method) else ""),
            "-" if plain else f"{line.equal_to_own_plain}/{line.answers}",
            f"{line.equal_to_specforge}/{line.answers}",
            both(lambda counts: counts.rounds),
            both(lambda counts: f"{counts.tau:.4f}"),
            both(positions),
            " / ".join("?" if speed is None else f"{speed:.1f}" for speed in line.tokens_per_second.values()),
            "FAILED" if line.problems else "near tie" if line.near_ties else "ok",
        ))
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(head))]
    text = ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    for line in lines:
        name = f"{line.engine}, {line.method}{f' ({line.layout})' if line.layout else ''}"
        text += [f"{name}: {words}" for words in (*line.problems, *line.near_ties, *line.notes)]
    return "\n".join(text)
