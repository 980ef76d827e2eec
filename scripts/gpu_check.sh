#!/usr/bin/env bash
# Everything that needs a GPU, in steps; what they are and how a run goes on: scripts/lib/gpu_steps.py
root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python3 -m scripts.lib.gpu_steps "$@"
