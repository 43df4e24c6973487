#!/usr/bin/env bash
# Makes Koala Nano, the bundled miniature, with the project's own commands: rows, tokenizer, corpora, a base from scratch, a
# Koala on top in two runs, 4 bits, answers. About two hours on one core. Every step leaves what it made in WORK; a run that
# was stopped goes on with the step that was not finished, training from its last checkpoint.
#
#     TEXT=c4.jsonl HELPFUL=helpful-base.jsonl examples/nano.sh [WORK]          # WORK: build/nano
#     ROWS=2000 BASE="max_steps=60" KOALA="max_steps=60" LAST="max_steps=60" .. examples/nano.sh WORK     # a small rehearsal
#
# TEXT has rows of {"text"}, HELPFUL rows of {"chosen", "rejected"} as Anthropic published them.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/nano" && pwd)"
work="${1:-build/nano}"
rows="${ROWS:-32000}"
text="$(realpath "${TEXT:?name a file of rows with plain text}")"
helpful="$(realpath "${HELPFUL:?name a file of helpful-base, of Anthropic HH}")"
python="${PYTHON:-python}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # one core computes as fast as two for a model of this size
mkdir -p "$work"
cp "$here"/*-mix.toml "$work"
cd "$work"
ln -sf "$text" text.jsonl
ln -sf "$helpful" helpful.jsonl

step() { # step OUTPUT COMMAND..: runs the command unless its output is there
    local made="$1"
    shift
    if [ ! -e "$made" ]; then
        echo "== $made"
        "$@"
    fi
}
rows() { # rows KIND SEED COUNT FILE
    "$python" "$here/rows.py" "$1" --seed "$2" --count "$3" >"$4.part"
    mv "$4.part" "$4"
}
written() { # written FILE SCRIPT MODEL
    "$python" "$here/$2" "$3" >"$1.part"
    mv "$1.part" "$1"
}
train() { # train OUTPUT ARGUMENT..
    local out="$1" resume=()
    shift
    [ -d "$out/checkpoints" ] && resume=(--resume)
    koala finetune -o "$out" --gpus 0 "$@" "${resume[@]}"
}

step world.jsonl rows dialogues 1 "$rows" world.jsonl
step more-world.jsonl rows dialogues 3 "$((rows * 3 / 5))" more-world.jsonl
step pairs.jsonl rows pairs 2 "$((rows / 10))" pairs.jsonl
step last-world.jsonl rows dialogues 5 "$((rows * 7 / 16))" last-world.jsonl
step last-pairs.jsonl rows pairs 6 "$((rows * 3 / 64))" last-pairs.jsonl
"$python" "$here/rows.py" check ./*.jsonl
step tokenizer koala data tokenizer world.jsonl text.jsonl helpful.jsonl --size "${PIECES:-3072}" -o tokenizer
step base-corpus koala data build base-mix.toml --tokenizer tokenizer -o base-corpus
step koala-corpus koala data build koala-mix.toml --tokenizer tokenizer -o koala-corpus
step last-corpus koala data build last-mix.toml --tokenizer tokenizer -o last-corpus
# shellcheck disable=SC2086 # several words each
step base/config.json train base --data base-corpus --tokenizer tokenizer --config "$here/base-run.toml" ${BASE:-}
# shellcheck disable=SC2086
step koala/config.json train koala --base base --data koala-corpus --config "$here/koala-run.toml" ${KOALA:-}
# shellcheck disable=SC2086
step koala-nano/config.json train koala-nano --base koala --data last-corpus --config "$here/last-run.toml" ${LAST:-}
# its own name and licence, which `koala quantize` takes over
sed 's/^license: other$/license: apache-2.0/; s/^license_name: see-below$/model_name: Koala Nano/' \
    koala-nano/README.md >README.part
mv README.part koala-nano/README.md
step koala-nano-q4_k_m.gguf koala quantize koala-nano --bits 4 -o koala-nano-q4_k_m.gguf --calibration more-world.jsonl
step koala-nano-gptq koala quantize koala-nano --bits 4 --format gptq -o koala-nano-gptq --calibration more-world.jsonl
step answers.md written answers.md ask.py koala-nano-q4_k_m.gguf
step measured.md written measured.md measure.py koala-nano-q4_k_m.gguf
