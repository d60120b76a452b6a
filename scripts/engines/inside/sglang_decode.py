"""Decodes token ids in SGLang, greedily and one request after the other. Its argument is a JSON file that says what."""

import json
import sys
import time
from pathlib import Path

import sglang


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    options = {
        "model_path": asked["model"], "device": "cpu", "dtype": "float32", "attention_backend": "torch_native",
        "sampling_backend": "pytorch", "disable_radix_cache": True, "skip_tokenizer_init": True, "log_level": "error",
        "max_total_tokens": 4096, "max_running_requests": 4, "disable_cuda_graph": True,
        "disable_overlap_schedule": True, "grammar_backend": "none",
    }
    if asked["draft"]:
        options |= {
            "speculative_algorithm": asked["algorithm"], "speculative_draft_model_path": asked["draft"],
            "speculative_num_draft_tokens": asked["guesses"] + 1,
        }
    if asked["algorithm"] == "DFLASH":
        # Domino's candidates are otherwise the 2048 likeliest tokens of a block.
        options |= {"speculative_domino_candidate_pool_size": 0}
    if asked["algorithm"] == "EAGLE3":
        options |= {
            "speculative_num_steps": asked["guesses"], "speculative_eagle_topk": 1,
            "speculative_draft_attention_backend": "triton",
        }
    engine = sglang.Engine(**options)
    sampling = {"temperature": 0, "max_new_tokens": asked["new_tokens"], "stop_token_ids": asked["stops"]}
    answers, decoded, seconds = [], 0, 0.0
    for prompt in asked["prompts"]:
        begin = time.perf_counter()
        said = engine.generate(input_ids=prompt, sampling_params=sampling)
        # The prompt's pass is in it: SGLang does not say when the first token came.
        seconds += time.perf_counter() - begin
        meta = said["meta_info"]
        answers.append({
            "tokens": list(said["output_ids"]),
            "rounds": meta.get("spec_verify_ct"),
            "accepted": meta.get("spec_num_correct_drafts"),
            # Verifications by the number of guesses they accepted.
            "lengths": meta.get("spec_correct_drafts_histogram") or [],
        })
        decoded += len(said["output_ids"]) - 1
    speed = decoded / seconds if seconds else 0.0
    Path(asked["result"]).write_text(json.dumps({"answers": answers, "tokens_per_second": speed}))
    engine.shutdown()


if __name__ == "__main__":
    main()
