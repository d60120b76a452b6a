"""SGLang 0.5.23 on the CPU: https://pypi.org/project/sglang, with torch and transformers of vLLM's environment.

Its CPU kernels are on no registry, so it runs on torch's own attention. With a draft its Triton kernels run in Triton's
interpreter, and `inside/sglang_hook` lends the plain attention the lengths that a verification has and lets block drafters
past their check of the device. Slow: a few tokens a second.
"""

import json
from pathlib import Path

from .accounting import Answer
from .case import BLOCKS, Asked, Case
from .environment import Environment, worker
from .program import Decode

INSIDE = Path(__file__).parent / "inside"


class Sglang:
    """Runs each case in a process of its own."""

    name = "sglang"
    version = "SGLang 0.5.23"
    counting = "counts guesses that the last verification accepts behind the end of an answer"
    layouts = {"eagle3": ("eagle3",)} | {name: ("block",) for name in BLOCKS}
    note = (
        "kernels run in Triton's interpreter, as XPU's, and the verification's attention is torch_native's with that "
        "pass's lengths"
    )
    block_note = "the draft's attention is torch_native's too, and what it is told of the device is XPU's"

    def __init__(self, environments: Path):
        self.beside = Environment(environments / "vllm")
        self.environment = Environment(environments / "sglang")

    def prepare(self) -> None:
        self.beside.install("vllm.txt")
        self.environment.install("sglang.txt", beside=[self.beside.packages])

    def decode(self, case: Case, asked: Asked) -> Decode:
        options, result = asked.work / "asked.json", asked.work / "result.json"
        draft = str(case.folder) if case.folder else None
        options.write_text(json.dumps({
            "model": str(asked.target), "draft": draft, "algorithm": algorithm(case), "guesses": case.guesses,
            "new_tokens": asked.new_tokens, "prompts": asked.prompts, "stops": sorted(asked.stops), "result": str(result),
        }))
        worker(
            [self.environment.python, INSIDE / "sglang_decode.py", options], asked.work / "sglang.log", asked.seconds,
            PYTHONPATH=str(INSIDE / "sglang_hook"), TRITON_INTERPRET="1", OMP_NUM_THREADS=str(asked.threads),
        )
        found = json.loads(result.read_text())
        answers = [Answer(one["tokens"], None, one["rounds"], one["accepted"]) for one in found["answers"]]
        if case.method == "plain":
            return Decode(answers, found["tokens_per_second"])
        rounds = sum(answer.rounds or 0 for answer in answers)
        reached = [
            sum(sum(one["lengths"][position:]) for one in found["answers"]) / max(1, rounds)
            for position in range(1, case.guesses + 1)
        ]
        shares = " ".join(f"{share:.3f}" for share in reached)
        notes = [f"by position, as it counts: {shares}", self.note]
        if case.method in BLOCKS:
            notes.append(self.block_note)
        return Decode(answers, found["tokens_per_second"], notes)


def algorithm(case: Case) -> str | None:
    """`speculative_algorithm` of a case. DFLASH finds out from config.json what its draft is."""
    match case.method:
        case "plain":
            return None
        case "dspark":
            return "DSPARK"
        case method:
            return "DFLASH" if method in BLOCKS else "EAGLE3"
