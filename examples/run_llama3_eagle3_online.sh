#!/usr/bin/env bash
# Trains an EAGLE-3 draft for Llama-3-8B-Instruct with the target in the loop, on the target's own answers.
#
#   MODEL=DIR PROMPTS=FILE.jsonl [OUT=DIR] [GPUS=N] examples/run_llama3_eagle3_online.sh
#
# MODEL is a Hugging Face folder (config.json, tokenizer.json, *.safetensors). PROMPTS has one conversation a line; see
# examples/README.md. One GPU with 80 GB holds target, draft and optimizer: `--plan` prints the sum.
# GPUS trains on several: the same update, sooner.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${MODEL:?set MODEL to the folder of Llama-3-8B-Instruct}" "${PROMPTS:?set PROMPTS to a JSONL file of prompts}"
out=${OUT:-runs/llama3-8B-eagle3}

scripts/setup --cuda --no-model
cargo build --features cuda
specforge=target/debug/specforge
settings=(--set target.path="$MODEL" --set train.output_dir="$out" --set "data.train=[\"$out-data.jsonl\"]")

# On-policy answers are worth more than any other choice here: the draft learns what the target itself says.
"$specforge" regen --target "$MODEL" --prompts "$PROMPTS" --out "$out-data.jsonl" --dtype bfloat16 --max-rows 64
"$specforge" vocab --config configs/llama3-8B-eagle3.json "${settings[@]}" --draft-vocab-size 32000 --out "$out-vocab.safetensors"
settings+=(--set draft.vocab_map="$out-vocab.safetensors")
"$specforge" train --config configs/llama3-8B-eagle3.json "${settings[@]}" --plan
launch=()
[ "${GPUS:-1}" = 1 ] || launch=(launch --nproc-per-node "$GPUS")
"$specforge" "${launch[@]}" train --config configs/llama3-8B-eagle3.json "${settings[@]}"
"$specforge" export --checkpoint "$out" --format eagle3 --out "$out/eagle3"
