#!/usr/bin/env bash
# All checks and tables that need a GPU, in under ten minutes, into one folder:
#     benchmarks/gpu.sh FOLDER
# A part that fails or runs out of its time fails alone: the exit status of each is printed at the end and
# written to FOLDER/status.txt (124: its time was up). PYTHON names the interpreter, default python3.
set -uo pipefail
if [ $# -ne 1 ]; then
  echo "usage: $0 FOLDER" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
: >"$out/status.txt"

part() { # part NAME SECONDS COMMAND...
  local name=$1 seconds=$2 begun=$SECONDS status
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  printf '%-14s status %3d  %4d s\n' "$name" "$status" $((SECONDS - begun)) >>"$out/status.txt"
}

speed() { # speed NAME SECONDS OPTIONS...: begins no case in its last 20 s; what a case has is written at its end
  local name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" "$python" benchmarks/speed.py --device cuda --csv "$out/speed_cuda.csv" \
    --plot "$out/speed_cuda" --budget $((seconds - 20)) --limit 30 "$@"
}

environment() {
  nvidia-smi || true
  "$python" - <<'PY'
import importlib.metadata as metadata
import torch, illava
print("illava from", illava.__file__)
for name in ("illava", "torch", "triton", "transformers", "flash-attn", "flash-attn-3", "fa3-fwd"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not installed")
print("CUDA", torch.version.cuda, torch.cuda.is_available() and torch.cuda.get_device_name())
raise SystemExit(0 if torch.cuda.is_available() else 1)
PY
}
export -f environment
export python

# Seconds add up to 590, the most important first, should somebody stop it. What the parts are expected to
# take on an H200, where nothing of this has been run: 15 s of imports and 5 to 15 s of building a model each,
# then calls of 0.1 to 2 s, five per arm before the rounds (one warm-up, one for memory, three for illava's own
# share) and one in each round, the unpatched model's around every four of them.
part environment 20 bash -c environment
# Most of what tests take is compiling, some hundreds of kernels at a second each, on one core: in processes
# side by side. Those that print times come after them, alone.
side_by_side=()
"$python" -c "import xdist" 2>/dev/null && side_by_side=(-n 8)
part tests 90 "$python" -m pytest -m gpu -k "not test_real" "${side_by_side[@]}"
part times 45 "$python" -m pytest -m gpu -k test_real -s
few=(--profile --rivals "illava recycle" --rivals-at 0.889 --new-tokens 0 --contents picture --batches 1 --warmup 1)
# 16,384 tokens at about 2 s a call: 30 calls before the one round its limit allows.
speed prefill-7b 115 "${few[@]}" --rounds 5 --models qwen2.5-vl-7b --tokens 4096 16384 1024 \
  --reductions 0 0.667 0.778 0.889 --limit 45
# Twelve arms and the 3B model; fast_windows alone and with merging among them.
speed rivals-7b 100 --models qwen2.5-vl-7b --tokens 4096 --contents picture --batches 1 --rounds 5 --warmup 1 \
  --new-tokens 0 --reductions 0.889 --rivals-at 0.889 --attn sdpa --limit 60
speed throughput 130 --models qwen2.5-vl-7b internvl2.5-26b --tokens 1024 --contents picture --batches 8 \
  --rounds 1 --warmup 1 --reductions 0.889 --rivals "smaller model" --attn sdpa --limit 80
speed others 50 "${few[@]}" --rounds 3 --models llava-onevision-7b internvl2.5-8b --tokens 4096 --reductions 0.889
part prefill.py 40 "$python" benchmarks/prefill.py --config qwen2.5-vl-7b --device cuda --dtype bfloat16 \
  --rounds 5 --csv "$out/prefill_cuda.csv"

echo
echo "== exit statuses"
cat "$out/status.txt"
echo "Results in $out"
