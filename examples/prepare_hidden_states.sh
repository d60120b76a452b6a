#!/usr/bin/env bash
# Writes the hidden states of a target into a feature store: one run of the target, for any number of trainings.
#
#   MODEL=DIR DATA=FILE.jsonl STORE=DIR [CONFIG=FILE.json] [DTYPE=bfloat16] examples/prepare_hidden_states.sh
#
# DATA has one conversation a line, best with the target's own answers (`specforge regen`). Says how much disk it needs
# before it starts, and goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${MODEL:?set MODEL to a model folder}" "${DATA:?set DATA to a JSONL file}" "${STORE:?set STORE to a folder to write}"
config=${CONFIG:-configs/llama3-8B-eagle3.json}

[ -e .libtorch/complete ] || scripts/setup --cuda --no-model
cargo build --features cuda
target/debug/specforge capture --config "$config" --set target.path="$MODEL" --set "data.train=[\"$DATA\"]" \
  --out "$STORE" --dtype "${DTYPE:-bfloat16}"
