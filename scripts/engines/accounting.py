"""Rounds of speculative decoding, counted in the same way whoever decoded.

A round is one verification: the target reads some guesses and gives those that it would have said itself (accepted),
and one token of its own. The first token of an answer comes from the prompt and belongs to no round. Hence

    tokens = 1 + rounds + accepted

for an answer whose rounds are counted up to its end and no further. vLLM and SGLang also count guesses that their last
verification accepts behind the end of the answer: those are taken off.

    python3 -m doctest scripts/engines/accounting.py
"""

from dataclasses import dataclass, field


@dataclass
class Answer:
    """One decoded answer."""

    tokens: list[int]
    # Guesses of each round, where they are known.
    drafts: list[list[int]] | None = None
    # What the engine itself says.
    rounds: int | None = None
    accepted: int | None = None


@dataclass
class Counts:
    """Sums over answers."""

    answers: int = 0
    tokens: int = 0
    rounds: int = 0
    guesses: int | None = 0
    accepted: int = 0
    # Rounds that accepted the first, the second ... guess; nothing where an engine does not say it.
    positions: list[int] | None = field(default_factory=list)
    # Guesses that the engine counts as accepted behind the end of the answers.
    behind_end: int = 0

    @property
    def tau(self) -> float:
        """Tokens for each verification."""
        return 1 + self.accepted / self.rounds if self.rounds else 1.0

    def by_position(self) -> list[float] | None:
        """Share of rounds that accept each position."""
        return None if self.positions is None else [count / max(1, self.rounds) for count in self.positions]


def cut(tokens: list[int], stops: set[int]) -> list[int]:
    """Tokens up to the first stop token, that included.

    >>> cut([5, 6, 2, 7], {2})
    [5, 6, 2]
    """
    end = next((index for index, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]


def rebuilt(tokens: list[int], drafts: list[list[int]]) -> list[tuple[int, int]]:
    """Guesses and accepted ones of each round, from an answer and the drafts in the order they were made.

    The last round of an answer of 6 tokens accepts 2 of 3 guesses: a third would be behind the end, and the last token
    counts as the target's own. Drafts made behind the end belong to no round; a verification for which none was made,
    with room for one token alone, is a round without guesses.

    >>> rebuilt([7, 1, 2, 3, 4, 5], [[1, 9, 9], [3, 4, 5], [6, 6, 6]])
    [(3, 1), (3, 2)]
    >>> rebuilt([7, 1], [[2, 2]])
    [(2, 0)]
    >>> rebuilt([7, 1, 2], [[2]])
    [(1, 0), (0, 0)]
    """
    rounds, committed = [], 1
    for draft in drafts:
        room = len(tokens) - committed - 1
        if room < 0:
            break
        accepted = 0
        while accepted < min(len(draft), room) and draft[accepted] == tokens[committed + accepted]:
            accepted += 1
        rounds.append((len(draft), accepted))
        committed += accepted + 1
    return rounds + [(0, 0)] * (len(tokens) - committed)


def count(answers: list[Answer]) -> Counts:
    """Sums up answers; those without drafts by what their engine says of each.

    >>> counts = count([Answer([7, 1, 2, 3, 4, 5], [[1, 9, 9], [3, 4, 5]], rounds=2, accepted=4)])
    >>> counts.rounds, counts.accepted, counts.positions, counts.behind_end, counts.tau
    (2, 3, [2, 1], 1, 2.5)
    >>> counts = count([Answer([7, 1, 2, 3, 4, 5], rounds=2, accepted=4)])
    >>> counts.rounds, counts.accepted, counts.positions, counts.behind_end
    (2, 3, None, 1)
    """
    total = Counts()
    for answer in answers:
        total.answers += 1
        total.tokens += len(answer.tokens)
        if answer.drafts is None:
            rounds, inside = answer.rounds or 0, len(answer.tokens) - 1 - (answer.rounds or 0)
            total.positions = total.guesses = None
        else:
            found = rebuilt(answer.tokens, answer.drafts)
            rounds, inside = len(found), sum(accepted for _, accepted in found)
            if total.positions is not None:
                total.guesses += sum(guesses for guesses, _ in found)
                deepest = max([accepted for _, accepted in found], default=0)
                total.positions += [0] * (deepest - len(total.positions))
                for _, accepted in found:
                    for position in range(accepted):
                        total.positions[position] += 1
        total.rounds += rounds
        total.accepted += inside
        total.behind_end += 0 if answer.accepted is None else answer.accepted - inside
    return total


def faults(answers: list[Answer], guesses: int) -> list[str]:
    """What an engine's own counters and its answers do not agree on.

    >>> faults([Answer([7, 1, 2, 3, 4, 5], [[1, 9, 9], [3, 4, 5]], rounds=2, accepted=4)], 3)
    []
    >>> faults([Answer([7, 1, 2, 3], [[1, 9, 9], [3, 4, 5]], rounds=2, accepted=5)], 3)
    ['answer 0: the engine counts 5 accepted guesses, its answer shows 1']
    >>> faults([Answer([7, 1, 2, 3], [[1, 9, 9]], rounds=3)], 3)
    ['answer 0: the engine counts 3 rounds, its drafts and its answer show 2']
    """
    found = []
    for index, answer in enumerate(answers):
        rounds, accepted = answer.rounds, None
        if answer.drafts is not None:
            pairs = rebuilt(answer.tokens, answer.drafts)
            rounds, accepted = len(pairs), sum(accepted for _, accepted in pairs)
            if answer.rounds not in (None, rounds):
                found.append(
                    f"answer {index}: the engine counts {answer.rounds} rounds, its drafts and its answer show {rounds}"
                )
                continue
        elif rounds is not None:
            accepted = len(answer.tokens) - 1 - rounds
        if None not in (answer.accepted, accepted) and not 0 <= answer.accepted - accepted <= guesses:
            found.append(
                f"answer {index}: the engine counts {answer.accepted} accepted guesses, its answer shows {accepted}"
            )
    return found
