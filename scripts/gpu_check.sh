#!/usr/bin/env bash
# Everything that needs a GPU, in one run of less than 9 minutes: the tests marked gpu, then speed on random weights of
# published shapes. Results go to $OUT (default benchmarks/) as gpu_check.json and gpu_check.md, which are written anew
# after every step, so that a run that is stopped leaves what it has.
#
#     OUT=/tmp/results scripts/gpu_check.sh
#     OUT=/tmp/results/large scripts/gpu_check.sh large        # instead: the 70B, quantised, in less than 7 minutes
set -uo pipefail
refuse() { echo "gpu_check.sh: $1" >&2; exit 2; }
[ $# -eq 0 ] || [ "$*" = large ] || refuse "the only argument is large, and OUT=FOLDER before the command says where to write; not: $*."
OUT=$(realpath -m "${OUT:-$(dirname "$0")/../benchmarks}" 2> /dev/null) || refuse "OUT is no path that can be."
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$OUT" 2> /dev/null && [ -w "$OUT" ] || refuse "OUT=$OUT is no folder that can be written; name another one."
for file in "$OUT"/gpu_check.json "$OUT"/gpu_check.md; do
    [ ! -e "$file" ] || { [ -f "$file" ] && [ -w "$file" ]; } || refuse "$file is there already and is no file that can be written."
done
work=$(mktemp -d 2> /dev/null) || refuse "no temporary folder can be made in ${TMPDIR:-/tmp}."
trap 'rm -rf "$work"' EXIT
began=$SECONDS
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null || refuse "PyTorch sees no GPU here; run it on a machine with CUDA."
python -c 'import transformers' 2> /dev/null && peers=--peers || peers=

step() { # step NAME SECONDS COMMAND...: runs it under a time limit, keeps its output, and writes the report anew
    local name=$1 limit=$2
    shift 2
    echo "[$((SECONDS - began)) s] $name: $*"
    timeout "$limit" "$@" > "$work/$name.log" 2>&1
    echo "$?" > "$work/$name.rc"
    tail -n 3 "$work/$name.log" | cut -c 1-300
    python - "$work" "$OUT" << 'PY' || exit 2
import json, pathlib, sys

from cli import run_script
from files import write_file

work, out = map(pathlib.Path, sys.argv[1:])
report, text = {}, ["# What scripts/gpu_check.sh found", ""]
for rc in sorted(work.glob("*.rc"), key=lambda file: file.stat().st_mtime):
    name, figures, table = rc.stem, work / f"{rc.stem}.json", work / f"{rc.stem}.md"
    tail = (work / f"{name}.log").read_text(errors="replace").splitlines()[-15:]
    report[name] = {"exit_code": int(rc.read_text())}
    if figures.exists():
        report[name] |= json.loads(figures.read_text())
        text += [f"## {name}", "", table.read_text()]
    else:
        report[name]["tail"] = tail
        text += [f"## {name}: exit code {rc.read_text().strip()}", "", "```", *tail, "```", ""]
run_script("gpu_check.sh", lambda: [write_file(out / file, content.encode()) for file, content in (
    ("gpu_check.json", json.dumps(report, indent=1) + "\n"), ("gpu_check.md", "\n".join(text)))])
PY
}

bench() { # bench NAME SECONDS FLAGS...
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" python scripts/benchmark.py "$@" --out "$work/$name.json"
}

# 70B in 8 bits takes 75 GB beside its draft: an H200; where there is less memory it says so
if [ "${1:-}" = large ]; then
    bench products_70b 90 --products --preset Llama-3.1-70B --repeats 3
    bench pair_70b_8b 300 --compile --preset Llama-3.1-70B --mode int8 --draft_preset Llama-3.1-8B --draft_mode int4 \
        --speculate_k 20 --accept 17 --prefill 2048 --repeats 5
    echo "[$((SECONDS - began)) s] done: $OUT/gpu_check.md"
    exit
fi

# M of 20 and 17 accepted a round are what Judge Decoding reports for 8B/70B; 17 and 33 rows are the usual verifications
step tests 120 python -m pytest -q -o addopts= -m gpu
bench pair_8b_1b 150 --compile --preset Llama-3.1-8B --draft_preset Llama-3.2-1B --speculate_k 20 --accept 17 \
    --prefill 2048 8192 --repeats 5
bench rows_8b 130 --compile --preset Llama-3.1-8B --draft_preset Llama-3.2-1B --speculate_k 16 --rows 33 --prefill 8192 --repeats 5
bench attention_8b 30 --attention --preset Llama-3.1-8B --repeats 3
bench products_8b 60 --products --preset Llama-3.1-8B --repeats 3
bench demo 50 --compile $peers
echo "[$((SECONDS - began)) s] done: $OUT/gpu_check.md"
