#!/usr/bin/env bash
# ptxas 13.0.88: a bound of threads alone, __launch_bounds__(512), can cost three quarters of the
# registers. With 512 threads a block, 128 registers a thread fit. A kernel with 200 live values gets
# 32 of them, and stores 1,496 bytes a thread to memory. With one block named too,
# __launch_bounds__(512, 1), the same kernel gets 128 and stores 404 bytes, though a block must fit on
# a processor in either case. Kernels that need fewer registers than fit differ as well, the other
# way: 60 against 48. Seen while compiling for sm_90; fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install --no-deps nvidia-cuda-nvcc==13.0.88
"$work/venv/bin/python" - "$work" <<'PY'
import pathlib
import re
import subprocess
import sys
import sysconfig

folder = pathlib.Path(sys.argv[1])
(ptxas,) = pathlib.Path(sysconfig.get_path("platlib"), "nvidia").glob("*/bin/ptxas")
ptxas.chmod(0o755)


def compiled(live, bounds):
    """Registers of a thread and bytes that it spills, of a kernel with so many live values."""
    lines = [f"ld.global.f32 %f{i}, [%rd1+{2048 * i}];" for i in range(live)]
    lines.append("bar.sync 0;")
    lines += [f"fma.rn.f32 %f{i}, %f{i}, %f{i}, %f{(7 * i + 3) % live};" for i in range(live)]
    lines.append("bar.sync 0;")
    lines += [f"st.global.f32 [%rd1+{2048 * i + 4}], %f{i};" for i in reversed(range(live))]
    (folder / "kernel.ptx").write_text(
        ".version 8.0\n.target sm_90\n.address_size 64\n"
        f".visible .entry kernel(.param .u64 at) {bounds} {{\n"
        f".reg .f32 %f<{live}>;\n.reg .b64 %rd<2>;\nld.param.u64 %rd1, [at];\n"
        + "\n".join(lines)
        + "\nret;\n}\n"
    )
    command = [ptxas, "-arch=sm_90", "-O3", "-v", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = [re.search(form, said) for form in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
    return tuple(int(one.group(1)) for one in found)


for live, expected in {40: ((60, 0), (48, 0)), 200: ((32, 1496), (128, 404))}.items():
    alone = compiled(live, ".maxntid 512, 1, 1")
    named = compiled(live, ".maxntid 512, 1, 1 .minnctapersm 1")
    print(f"{live} live values: registers, bytes spilled {alone} with threads alone, {named} with a block")
    assert (alone, named) == expected, "ptxas does it otherwise now"
PY
