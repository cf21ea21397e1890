#!/usr/bin/env bash
# Judge a dense and a compressed model by `structlin eval`, which needs lm-eval; print the outcome as Markdown.
#
#     bash tests/environments/evaluation.sh MODEL TEXT [VENV] > benchmarks/results/evaluation.md
#
# MODEL is a folder of transformers, TEXT a file of lines. VENV keeps the environment (default: a temporary one).
set -euo pipefail
model=$(realpath "$1")
text=$(realpath "$2")
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${3:-$work/venv}
[ -x "$venv/bin/lm-eval" ] || {
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet torch==2.13.0
    "$venv/bin/pip" install --quiet torch==2.13.0 -e . "lm-eval[hf]"
} >&2
export PATH="$venv/bin:$PATH" HF_HUB_OFFLINE=1

# A task of its own, since no hub is asked: the perplexity of whole texts.
mkdir "$work/tasks"
python - "$text" "$work" << 'PYTHON'
import json, sys
from pathlib import Path

text, work = Path(sys.argv[1]), Path(sys.argv[2])
lines = [line for line in text.read_text("utf-8").splitlines() if len(line) > 80][:32]
(work / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), "utf-8")
(work / "tasks" / "texts.yaml").write_text(f"""\
task: texts
dataset_path: json
dataset_kwargs:
  data_files: {{test: {work}/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
""", "utf-8")
PYTHON
structlin compress "$model" "$work/small" --structure lowrank --ratio 0.75 > /dev/null 2>&1

echo "\`bash tests/environments/evaluation.sh ${model##*/} ${text##*/}\`, $(date +%F), commit $(git rev-parse --short HEAD):"
pip list 2> /dev/null | awk '$1 ~ /^(torch|transformers|lm_eval)$/ {print "- " $1 " " $2}'
for folder in "$model" "$work/small"; do
    echo
    echo "\`structlin eval ${folder##*/} --tasks texts --include tasks\`"
    echo
    structlin eval "$folder" --tasks texts --include "$work/tasks" 2> /dev/null | grep "^|"
done
if structlin eval "$work/small" --tasks nonsense 2> "$work/refused"; then exit 1; fi
echo
echo "An unknown task: $(grep "^structlin eval" "$work/refused")"
