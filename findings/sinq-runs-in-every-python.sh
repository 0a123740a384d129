#!/usr/bin/env bash
# sinq 0.2.0 with transformers 5.24.0: once installed, it runs whenever a Python of that environment starts, imported
# or not.
#
# The wheel puts a `sitecustomize.py` beside the package, which every interpreter imports. It imports torch and
# transformers, replaces `save_pretrained`, `push_to_hub` and `from_pretrained` of every PreTrainedModel by its own, and
# prints a line to standard output where gemlite is not installed. `python -c pass` takes seconds and 3,000 modules
# instead of a hundredth of a second, in each worker, each hook and each tool of the environment, and what
# parses a program's output finds a line that the program has not written. A `sitecustomize` of one's own that lies
# there is overwritten. SINQ_AUTO_PATCH=0 in the environment leaves all of it out; the page on PyPI does not say so.
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install transformers==5.24.0 accelerate==1.15.0
"$work/venv/bin/python" -c 'from transformers import PreTrainedModel' # compiles what the next lines time
look='
import sys
modules = len(sys.modules)
loaded = "torch" in sys.modules
from transformers import PreTrainedModel
print(modules, loaded, PreTrainedModel.from_pretrained.__module__, PreTrainedModel.save_pretrained.__module__)
'
before=$("$work/venv/bin/python" -c "$look")
printf '# ours\n' >"$work/venv/lib/$(ls "$work/venv/lib" | head -1)/site-packages/sitecustomize.py"
pip install sinq==0.2.0
after=$("$work/venv/bin/python" -c "$look" 2>/dev/null)
off=$(SINQ_AUTO_PATCH=0 "$work/venv/bin/python" -c "$look" 2>/dev/null)
empty=$("$work/venv/bin/python" -c pass 2>/dev/null)
start=$(date +%s%N)
"$work/venv/bin/python" -c pass >/dev/null 2>&1
took=$((($(date +%s%N) - start) / 1000000))
echo "modules at the start, torch among them, where from_pretrained and save_pretrained are from:"
echo "  before sinq is installed: $before"
echo "  after it:                 $(tail -1 <<<"$after")"
echo "  with SINQ_AUTO_PATCH=0:   $off"
echo "python -c pass took $took ms and printed: $empty"
[[ $before == *"False transformers."*" transformers."* ]]
[[ $(tail -1 <<<"$after") == *"True sinq.hf_io sinq.hf_io" ]] || { echo "installing sinq changes no other program now"; exit 1; }
[[ $off == *"False transformers."* ]]
[[ $empty == *gemlite* && $took -gt 1000 ]]
grep -q sinq "$work"/venv/lib/python*/site-packages/sitecustomize.py
