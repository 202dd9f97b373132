#!/usr/bin/env bash
# From image-text pairs to an artifact that serves and the evidence for it: every stage, in order.
#
#   training/pipeline.sh --miniature                      # the bundled LLaVA; minutes on two cores
#   training/pipeline.sh --miniature-clip                 # the bundled CLIP: concepts, zero-shot classification
#   training/pipeline.sh --model /models/llava-1.5-7b-hf --pairs 'webdataset:/data/cc3m/*.tar' --layer 30 \
#       --output /data/llava-vlsae --device cuda --dtype float16
#
# A folder of an open_clip model takes the way of CLIP: no layer, no auxiliary autoencoder, no artifact.
#
# Stopped during collection or training, the same command goes on where it was; the later stages start anew. Further
# options of a stage are given in an environment
# variable: COLLECT, AUXILIARY, SPARSE, INTERPRET, ARTIFACT, FAITHFUL, TUNE, EVALUATE, ZERO_SHOT, each as on that stage's
# command line (SPARSE="--num-concepts 65536"). TUNE, EVALUATE and ZERO_SHOT say what is tuned and judged on; where they
# are not set for a real model, that is left out and the presets stay off.
set -euo pipefail -f
here=$(pwd)
cd "$(dirname "$0")/.."

model="" pairs="" layer="" output="" artifact="" device=cpu dtype=float32 miniature="" thorough=""
while [ $# -gt 0 ]; do
    case $1 in
        --miniature) miniature=llava ;;
        --miniature-clip) miniature=clip ;;
        --thorough) thorough=yes ;;  # with --miniature: presets are searched for as long as those of the bundle were
        --model | --pairs | --layer | --output | --artifact | --device | --dtype)
            [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            declare "${1#--}=$2"
            shift ;;
        *) echo "error: unknown option $1; see the top of training/pipeline.sh" >&2; exit 2 ;;
    esac
    shift
done
from_caller() { case $1 in /* | "") echo "$1" ;; *) echo "$here/$1" ;; esac; }
model=$(from_caller "$model") output=$(from_caller "$output") artifact=$(from_caller "$artifact")
case $pairs in miniature:* | *:/*) ;; *:*) pairs="${pairs%%:*}:$here/${pairs#*:}" ;; esac

if [ "$miniature" = llava ]; then
    # another number of threads would round sums in another order: the bundle's artifact is rebuilt byte for byte
    export OMP_NUM_THREADS=1
    model=${model:-training/miniature/bundle/llava} pairs=${pairs:-miniature:vl_sae_pairs:6000} layer=${layer:-3}
    output=${output:-build/pipeline}
    COLLECT="--batch-size 64 --portion-size 1000 ${COLLECT:-}"
    AUXILIARY="--shared-size 128 --learning-rate 1e-3 --batch-size 512 --epochs 60 --held-out 500 ${AUXILIARY:-}"
    SPARSE="--num-concepts 1024 --active-concepts 32 --learning-rate 2e-3 --batch-size 256 --epochs 20
        --held-out 500 ${SPARSE:-}"
    INTERPRET="--top-texts 5 --top-images 3 --clip training/miniature/bundle/clip ${INTERPRET:-}"
    ARTIFACT="--name miniature-llava --card training/miniature/card.json ${ARTIFACT:-}"
    if [ -z "$thorough" ]; then
        TUNE=${TUNE-"--alphas 2.5 --search-captions 60 --search-questions 60 --refined 0 --finalists 1
            --final-captions 200 --final-questions 200"}
        EVALUATE=${EVALUATE-"--captions 200 --questions 200 --conditions steered default other_image"}
    else
        TUNE=${TUNE-"--alphas 1.5 2 2.5 --search-captions 320 --search-questions 100 --final-captions 1000
            --final-questions 4000 --finalists 4"}
    fi
elif [ "$miniature" = clip ]; then
    export OMP_NUM_THREADS=1
    model=${model:-training/miniature/bundle/clip} pairs=${pairs:-miniature:vl_sae_pairs:6000}
    output=${output:-build/clip-pipeline}
    COLLECT="--batch-size 64 --portion-size 1000 ${COLLECT:-}"
    SPARSE="--num-concepts 512 --active-concepts 16 --learning-rate 2e-3 --batch-size 256 --epochs 20 --held-out 500
        ${SPARSE:-}"
    INTERPRET="--top-texts 5 --top-images 3 --clip training/miniature/bundle/clip ${INTERPRET:-}"
    ZERO_SHOT=${ZERO_SHOT-"--miniature"}
fi
refuse() { echo "error: $1" >&2; exit 2; }
[ -z "$thorough" ] || [ "$miniature" = llava ] || refuse "--thorough goes with --miniature"
clip="" needs="model pairs layer output"
if [ -e "$model/open_clip_config.json" ]; then
    clip=yes needs="model pairs output"
    [ -z "$layer$artifact" ] || refuse "--layer, --artifact: an open_clip model has neither"
fi
for needed in $needs; do
    [ -n "${!needed}" ] || refuse "--$needed is needed (or --miniature)"
done
artifact=${artifact:-$output/artifact}

[ -e .venv/.ready-dev ] || make -s .venv/.ready-dev
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} HF_HUB_DISABLE_TELEMETRY=1 RAY_USAGE_STATS_ENABLED=0 DO_NOT_TRACK=1

stage() {
    local began=$SECONDS
    echo "== $1"
    .venv/bin/python -m "training.$1" "${@:2}"
    echo "   $1: $((SECONDS - began)) s"
}

# shellcheck disable=SC2086  # the variables hold several options each
train_clip() {
    stage collect_representations --model "$model" --pairs "$pairs" --output "$output/store" --device "$device" \
        --dtype "$dtype" ${COLLECT:-}
    stage train_sparse_autoencoder --representations "$output/store" --output "$output/sparse" --device "$device" \
        ${SPARSE:-}
    stage interpret_concepts --representations "$output/store" --sparse "$output/sparse" --device "$device" \
        --output "$output/concepts" ${INTERPRET:-}
    if [ -n "${ZERO_SHOT:-}" ]; then
        stage zero_shot_classification --clip "$model" --sparse "$output/sparse" --device "$device" \
            --json "$output/zero_shot.json" $ZERO_SHOT
    fi
    echo "done in $SECONDS s. The concepts: $output/concepts/atlas/index.html"
}

# shellcheck disable=SC2086
train_lvlm() {
    stage collect_representations --model "$model" --pairs "$pairs" --layers "$layer" --output "$output/store" \
        --device "$device" --dtype "$dtype" ${COLLECT:-}
    stage train_auxiliary_autoencoder --representations "$output/store" --layer "$layer" --device "$device" \
        --output "$output/auxiliary" ${AUXILIARY:-}
    stage train_sparse_autoencoder --representations "$output/store" --layer "$layer" --device "$device" \
        --auxiliary "$output/auxiliary" --output "$output/sparse" ${SPARSE:-}
    stage interpret_concepts --representations "$output/store" --layer "$layer" --device "$device" \
        --auxiliary "$output/auxiliary" --sparse "$output/sparse" --output "$output/concepts" ${INTERPRET:-}
    stage write_artifact --model "$model" --representations "$output/store" --layer "$layer" \
        --auxiliary "$output/auxiliary" --sparse "$output/sparse" --concepts "$output/concepts" \
        --device "$device" --dtype "$dtype" --output "$artifact" ${ARTIFACT:-}
    stage measure_faithfulness --model "$model" --artifact "$artifact" --device "$device" --dtype "$dtype" \
        ${FAITHFUL:-}
    if [ -n "${TUNE:-}" ]; then
        stage tune_presets --model "$model" --artifact "$artifact" --device "$device" --dtype "$dtype" \
            --json "$output/presets.json" $TUNE
    fi
    if [ -n "${EVALUATE:-}" ]; then
        stage evaluate_hallucination --model "$model" --artifact "$artifact" --device "$device" --dtype "$dtype" \
            --json "$output/evaluation.json" $EVALUATE
    fi
    echo "done in $SECONDS s. The concepts: $output/concepts/atlas/index.html. Serve it:"
    echo "  make serve MODEL=$model ARTIFACT=$artifact"
}

if [ -n "$clip" ]; then train_clip; else train_lvlm; fi
