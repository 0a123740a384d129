#!/usr/bin/env bash
# ptxas 12.8 (as triton 3.6.0 ships it): (x & A) | B with two constants becomes two LOP3, not one.
#
# LOP3 computes any function of three words, but holds one constant at most; the other one would need
# a register. Unpacking low-bit weights is full of (word & mask) | exponent, and logical instructions
# run at half rate on recent GPUs. From `and` and `or` ptxas makes two instructions for each word,
# though one register would serve them all; the same function written as `lop3.b32` stays one
# instruction, with the constant in a register. A kernel for trellis codes went from 91 to 76 µs by
# this alone (H100). Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install --no-deps triton==3.6.0
"$work/venv/bin/python" - "$work" <<'PY'
import pathlib
import re
import subprocess
import sys
import sysconfig

folder = pathlib.Path(sys.argv[1])
tools = pathlib.Path(sysconfig.get_path("platlib"), "triton", "backends", "nvidia", "bin")
WORDS = 8


def instructions(apart):
    """LOP3 in the machine code of (x & 0x000f000f) | 0x64006400 for eight words."""
    lines = [f"ld.global.u32 %r{i}, [%rd1+{4 * i}];" for i in range(WORDS)]
    for i in range(WORDS):
        if apart:
            lines.append(f"and.b32 %r{i + 16}, %r{i}, 0x000f000f;")
            lines.append(f"or.b32 %r{i + 8}, %r{i + 16}, 0x64006400;")
        else:
            lines.append(f"lop3.b32 %r{i + 8}, %r{i}, 0x000f000f, 0x64006400, 0xea;")
    lines += [f"st.global.u32 [%rd2+{4 * i}], %r{i + 8};" for i in range(WORDS)]
    (folder / "kernel.ptx").write_text(
        ".version 8.0\n.target sm_90\n.address_size 64\n"
        ".visible .entry kernel(.param .u64 from, .param .u64 to) {\n"
        ".reg .b32 %r<32>;\n.reg .b64 %rd<4>;\n"
        "ld.param.u64 %rd1, [from];\nld.param.u64 %rd2, [to];\n" + "\n".join(lines) + "\nret;\n}\n"
    )
    output = folder / "kernel.cubin"
    subprocess.run([tools / "ptxas", "-arch=sm_90", "-O3", folder / "kernel.ptx", "-o", output], check=True)
    code = subprocess.run([tools / "cuobjdump", "-sass", output], capture_output=True, text=True, check=True)
    return len(re.findall(r"\bLOP3\b", code.stdout))


version = subprocess.run([tools / "ptxas", "--version"], capture_output=True, text=True, check=True)
print(re.search(r"release [\d.]+, V[\d.]+", version.stdout).group())
apart, joined = instructions(apart=True), instructions(apart=False)
print(f"{WORDS} words: {apart} LOP3 from and + or, {joined} from lop3.b32")
assert (apart, joined) == (2 * WORDS, WORDS), "ptxas joins them now"
PY
