"""SGLang 0.5.23 on the CPU: https://pypi.org/project/sglang, with torch and transformers of vLLM's environment.

Its CPU kernels are on no registry, so it runs on torch's own attention. For EAGLE-3 its Triton kernels run in Triton's
interpreter, and `inside/sglang_hook` lends the plain attention the lengths that a verification has. Slow: a few tokens
a second.
"""

import json
from pathlib import Path

from .accounting import Answer
from .case import Asked, Case
from .environment import Environment, worker
from .program import Decode

INSIDE = Path(__file__).parent / "inside"


class Sglang:
    """Runs each case in a process of its own."""

    name = "sglang"
    version = "SGLang 0.5.23"
    counting = "counts guesses that the last verification accepts behind the end of an answer"
    layouts = {"eagle3": ("eagle3",)}
    note = (
        "kernels run in Triton's interpreter, trees are built and verified by the kernels that it ships for XPU, "
        "and the verification's attention is torch_native's with that pass's lengths"
    )

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
            "model": str(asked.target), "draft": draft, "guesses": case.guesses, "new_tokens": asked.new_tokens,
            "prompts": asked.prompts, "stops": sorted(asked.stops), "result": str(result),
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
        return Decode(answers, found["tokens_per_second"], [f"by position, as it counts: {shares}", self.note])
