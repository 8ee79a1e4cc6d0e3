#!/usr/bin/env bash
# The commands for every cell of tables 1 to 3 of the paper (arXiv 2412.06263, ICLR 2026).
#
#     bash examples/paper_tables.sh            # print them
#     bash examples/paper_tables.sh table2     # those of one table
#     RUN=1 bash examples/paper_tables.sh      # run them, one after the other
#
# NOT RUN HERE: no score of these commands is known to this project yet. They need the checkpoints, the
# benchmarks (both are downloaded when first used), a GPU that holds a 7B model, and for MMVet and some
# questions of MMBench a judge (an OpenAI key). What is tested is that the commands are sound: that lmms-eval
# knows each task and illava each plan (tests/test_paper_tables.py), and that both harnesses give on a small
# checkpoint the scores that illava counts itself (tests/test_lmms_eval.py, tests/test_vlmevalkit.py).
#
# One command fills several cells: all tasks of one row. Give PROCESSES for several GPUs, for example 8.
set -euo pipefail

RUN=${RUN:-}
PROCESSES=${PROCESSES:-1}
OUT=${OUT:-paper_tables}
QWEN=${QWEN:-Qwen/Qwen2.5-VL-7B-Instruct}
LLAVA=${LLAVA:-llava-hf/llava-onevision-qwen2-7b-ov-hf}
# InternVL 2.5 in transformers' own form: convert it with transformers' convert_internvl_weights_to_hf.py.
INTERNVL=${INTERNVL:-InternVL2_5-8B-hf}
# As VLMEvalKit calls it; its code is published beside its weights, and VLMEvalKit loads it.
MINICPM=${MINICPM:-MiniCPM-V-2_6}
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$here/benchmarks${PYTHONPATH:+:$PYTHONPATH}" # the rivals

# The paper's settings (section 4.1): its rule, 40 % of the removed tokens in encoder blocks 5, 9, 13, the others
# in decoder layers 2, 8, 14. PLAN= (empty) takes illava's own defaults instead, in tables 1 and 2; table 3 says why
# it takes those in any case.
PLAN=${PLAN-,vit_layers=5-9-13,llm_layers=2-8-14,encoder_share=0.4,merge=recycle}
RIVALS="fastervlm pyramiddrop sparsevlm visionzip"

do_it() {
  if [[ -n $RUN ]]; then "$@"; else echo "${@@Q}"; fi
}

# lmms NAME CHECKPOINT TASKS MODEL_ARGS
lmms() {
  do_it accelerate launch --num_processes "$PROCESSES" -m lmms_eval --model illava --tasks "$3" \
    --model_args "pretrained=$2,dtype=bfloat16,$4" --batch_size 1 --log_samples --output_path "$OUT/$1"
}

# vlmeval NAME DATA MODEL HOW: benchmarks or models that only VLMEvalKit has (pip install ms-vlmeval)
vlmeval() {
  local script="import sys; from illava.harness import vlmevalkit as v; $4; from vlmeval.run import main;"
  do_it python -c "$script sys.argv = ['run', '--model', '$3', '--data', *'$2'.split(), '--work-dir', '$OUT/$1']; main()"
}

# in_python PLAN: the same settings as arguments of a call: ",a=1-2,b=0.4" is ", a='1-2', b=0.4"
in_python() {
  local setting value
  local -a settings
  IFS=, read -ra settings <<<"${1#,}"
  for setting in ${settings[@]+"${settings[@]}"}; do # bash before 4.4 takes an empty array for unset
    value=${setting#*=}
    if [[ ! $value =~ ^[0-9]*\.?[0-9]+$ ]]; then value="'$value'"; fi
    printf ", %s=%s" "${setting%%=*}" "$value"
  done
}

# rows NAME CHECKPOINT TASKS REDUCTION: ours and every rival at one reduction
rows() {
  lmms "$1/illava_$4" "$2" "$3" "reduction=$4$PLAN"
  local rival
  for rival in $RIVALS; do
    lmms "$1/${rival}_$4" "$2" "$3" "plan=rivals.at_harness:$rival,reduction=$4"
  done
}

table1() { # images, Qwen2.5-VL 7B; MMBench V1.1 is in VLMEvalKit only
  local tasks=mmmu_val,mmmu_pro,mmbench_en,mme,mmstar,mmvet,muirbench,realworldqa
  local v11="v.register('m', pretrained='$QWEN'"
  lmms table1/vanilla "$QWEN" "$tasks" reduction=0
  vlmeval table1/vanilla MMBench_DEV_EN_V11 m "$v11, reduction=0)"
  local reduction rival
  for reduction in 0.667 0.778 0.889; do
    rows table1 "$QWEN" "$tasks" "$reduction"
    vlmeval "table1/illava_$reduction" MMBench_DEV_EN_V11 m "$v11, reduction=$reduction$(in_python "$PLAN"))"
    for rival in $RIVALS; do
      vlmeval "table1/${rival}_$reduction" MMBench_DEV_EN_V11 m \
        "$v11, plan='rivals.at_harness:$rival', reduction=$reduction)"
    done
  done
}

table2() { # videos, Qwen2.5-VL 7B
  local tasks=videomme_w_subtitle,videomme,mvbench,egoschema,mlvu_test reduction
  lmms table2/vanilla "$QWEN" "$tasks" reduction=0
  for reduction in 0.90 0.95; do rows table2 "$QWEN" "$tasks" "$reduction"; done
}

table3() { # other models, 77.8 % removed; their depths differ, so layers are illava's scaled ones
  local tasks=mmmu_val,mmbench_en_dev,mmstar,realworldqa PLAN=,merge=recycle name rival
  for name in LLAVA INTERNVL; do
    lmms "table3/$name/vanilla" "${!name}" "$tasks" reduction=0
    rows "table3/$name" "${!name}" "$tasks" 0.778
  done
  local data="MMMU_DEV_VAL MMBench_DEV_EN MMStar RealWorldQA"
  vlmeval table3/MINICPM/vanilla "$data" "$MINICPM" pass
  vlmeval table3/MINICPM/illava_0.778 "$data" m "v.register_patched('m', '$MINICPM', reduction=0.778, merge='recycle')"
  for rival in $RIVALS; do
    vlmeval "table3/MINICPM/${rival}_0.778" "$data" m \
      "v.register_patched('m', '$MINICPM', plan='rivals.at_harness:$rival', reduction=0.778)"
  done
}

for table in "${@:-table1 table2 table3}"; do for one in $table; do "$one"; done; done
