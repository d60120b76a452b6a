"""Decodes token ids in vLLM, greedily and one request after the other. Its argument is a JSON file that says what."""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

COUNTERS = {"rounds": "vllm:spec_decode_num_drafts", "accepted": "vllm:spec_decode_num_accepted_tokens"}


def counters(engine: LLM) -> dict:
    values = {metric.name: getattr(metric, "value", None) for metric in engine.get_metrics()}
    return {key: values.get(name) or 0 for key, name in COUNTERS.items()}


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    longest = max(map(len, asked["prompts"])) + asked["new_tokens"]
    engine = LLM(
        model=asked["model"], speculative_config=asked["draft"], dtype="float32", enforce_eager=True,
        max_model_len=512 if longest < 500 else 2048, max_num_seqs=4, enable_prefix_caching=False,
        disable_log_stats=False, skip_tokenizer_init=True,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=asked["new_tokens"], detokenize=False, stop_token_ids=asked["stops"]
    )
    warm_up = SamplingParams(temperature=0.0, max_tokens=4, detokenize=False)
    engine.generate([{"prompt_token_ids": asked["prompts"][0]}], warm_up, use_tqdm=False)
    answers, decoded, seconds = [], 0, 0.0
    for prompt in asked["prompts"]:
        before = counters(engine)
        output = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
        after, tokens = counters(engine), list(output.outputs[0].token_ids)
        counted = {key: after[key] - before[key] for key in after}
        answers.append({"request": str(output.request_id), "tokens": tokens, **counted})
        decoded += len(tokens) - 1
        seconds += output.metrics.last_token_ts - output.metrics.first_token_ts
    speed = decoded / seconds if seconds else 0.0
    Path(asked["result"]).write_text(json.dumps({"answers": answers, "tokens_per_second": speed}))


if __name__ == "__main__":
    main()
