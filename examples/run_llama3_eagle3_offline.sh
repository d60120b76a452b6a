#!/usr/bin/env bash
# Trains an EAGLE-3 draft for Llama-3-8B-Instruct from stored hidden states: the target's layers are not loaded.
#
#   MODEL=DIR DATA=FILE.jsonl [STORE=DIR] [OUT=DIR] [GPUS=N] examples/run_llama3_eagle3_offline.sh
#
# MODEL is the target's folder: its head, embedding and tokenizer are read. DATA has one conversation a line, best with
# the target's own answers.
# GPUS trains on several: the same update, sooner.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${MODEL:?set MODEL to the folder of Llama-3-8B-Instruct}" "${DATA:?set DATA to a JSONL file of conversations}"
out=${OUT:-runs/llama3-8B-eagle3}
store=${STORE:-$out-features}

MODEL=$MODEL DATA=$DATA STORE=$store examples/prepare_hidden_states.sh
specforge=target/debug/specforge
settings=(--set target.path="$MODEL" --set target.feature_store="$store" --set train.output_dir="$out"
  --set "data.train=[\"$DATA\"]")
"$specforge" train --config configs/llama3-8B-eagle3.json "${settings[@]}" --plan
launch=()
[ "${GPUS:-1}" = 1 ] || launch=(launch --nproc-per-node "$GPUS")
"$specforge" "${launch[@]}" train --config configs/llama3-8B-eagle3.json "${settings[@]}"
"$specforge" export --checkpoint "$out" --format eagle3 --out "$out/eagle3"
