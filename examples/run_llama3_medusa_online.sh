#!/usr/bin/env bash
# Trains Medusa heads for Llama-3-8B-Instruct with the target in the loop, on the target's own answers.
#
#   MODEL=DIR PROMPTS=FILE.jsonl [OUT=DIR] [GPUS=N] examples/run_llama3_medusa_online.sh
#
# MODEL is a Hugging Face folder (config.json, tokenizer.json, *.safetensors). PROMPTS has one conversation a line; see
# examples/README.md. One GPU with 80 GB holds target, heads and optimizer: `--plan` prints the sum.
# GPUS trains on several: the same update, sooner.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${MODEL:?set MODEL to the folder of Llama-3-8B-Instruct}" "${PROMPTS:?set PROMPTS to a JSONL file of prompts}"
out=${OUT:-runs/llama3-8B-medusa}

scripts/setup --cuda --no-model
cargo build --features cuda
specforge=target/debug/specforge
settings=(--set target.path="$MODEL" --set train.output_dir="$out" --set "data.train=[\"$out-data.jsonl\"]")

# On-policy answers are worth more than any other choice here: heads learn what the target itself says.
"$specforge" regen --target "$MODEL" --prompts "$PROMPTS" --out "$out-data.jsonl" --dtype bfloat16 --max-rows 64
"$specforge" train --config configs/llama3-8B-medusa.json "${settings[@]}" --plan
launch=()
[ "${GPUS:-1}" = 1 ] || launch=(launch --nproc-per-node "$GPUS")
"$specforge" "${launch[@]}" train --config configs/llama3-8B-medusa.json "${settings[@]}"
"$specforge" export --checkpoint "$out" --format medusa --out "$out/medusa"
