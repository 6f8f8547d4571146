#!/usr/bin/env bash
# From nothing to a model that answers as you want: pre-train, instruct, prefer, talk, compare.
#
#     docs/story.sh            # three quarters of an hour on 2 CPU cores
#     docs/story.sh --quick    # three minutes, to see that all works: tiny models, which say nothing of sense
#
# Started again, it goes on where it was. The minutes beside the lines are of 2 CPU cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "$*" in "" | --quick) ;; *) echo "error: docs/story.sh takes --quick or nothing" >&2; exit 2 ;; esac
runs=${STORY_FOLDER:-runs/story}
question="Summarize this function in one line.

def area(width, height):
    return width * height"

# 1. Pre-train: a small Llama learns to go on with a text, from the State of the Union addresses.
./launch.sh causal_lm --run_dir "$runs/pretrained" --resume "$@"     # 4 minutes
./launch.sh chat "$runs/pretrained" --prompt "The state of our Union" --max_new_tokens 30

# 2. Instruct: a chat model that was pre-trained on 2 trillion tokens, which no one wants to wait for here, learns to
#    answer questions on Python code in the way of 6,000 examples. An adapter learns, its weights stay as they are.
./launch.sh chat smollm2 --prompt "$question"
./launch.sh sft --run_dir "$runs/instructed" --resume "$@"           # 10 minutes
./launch.sh chat "$runs/instructed" --prompt "$question"

# 3. Prefer: of two answers, the right and short one.
./launch.sh dpo --run_dir "$runs/preferred" --model "$runs/instructed/model" --resume "$@"   # 10 minutes
./launch.sh chat "$runs/preferred" --prompt "$question"

# 4. Compare: what does each ZeRO stage cost with this model?
./launch.sh compare sft --stages 0,2,3 --steps 10 --scored_rows 4 "$@"

# 5. Take it elsewhere: one file for llama.cpp, the adapters merged into it.
./launch.sh export "$runs/preferred" --gguf "$runs/model.gguf" --dtype f16 --overwrite
