"""Kernels compiled ahead of time for sm_90, without a GPU: what a Triton upgrade could spoil.

Limits are instructions per weight of the inner loops, as a thread sees them, measured with
triton 3.6.0 (1.77, 2.58 and 1.76 for 2, 3 and 4 bits) and given a tenth of slack.
"""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from bitmill_kernels.divergence.divergence_triton import _divergence_kernel  # noqa: E402
from bitmill_kernels.gptq.block_triton import _gptq_block_kernel  # noqa: E402
from bitmill_kernels.gptq.clip_search_triton import _clip_search_kernel  # noqa: E402
from bitmill_kernels.gptq.code_descent_triton import _descend_block_kernel  # noqa: E402
from bitmill_kernels.gptq.group_solve_triton import _group_solve_kernel  # noqa: E402
from bitmill_kernels.gptq.polish_triton import _polish_kernel  # noqa: E402
from bitmill_kernels.matmul.decode_triton import decode_kernel  # noqa: E402
from bitmill_kernels.matmul.dequantize_triton import _dequantize_kernel  # noqa: E402
from bitmill_kernels.matmul.prologue import _prologue_kernel  # noqa: E402
from bitmill_kernels.rotary.rotary_triton import _rotary_kernel  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    "x_ptr": "*fp16",
    "planes_ptr": "*i16",
    "bias_ptr": "*fp16",
    "y_ptr": "*fp16",
    "rows_ptr": "*fp16",
    "out_ptr": "*fp16",
    "codes_ptr": "*u8",
    "new_ptr": "*u8",
    "parts_ptr": "*bf16",
    "h_parts_ptr": "*bf16",
    "max_code": "fp32",
    **dict.fromkeys(("q", "q_out", "k", "k_out"), ("*bf16", "i32", "i32", "i32")),
    **dict.fromkeys(("cos", "sin"), ("*bf16", "i32", "i32")),
}
INTEGER_TABLES = ("order", "slots", "segments", "tiles", "pairs", "grid", "counter", "kind")


def signature(kernel, constants):
    """Types by argument name: tables are i32 pointers, other pointers fp32, numbers i32."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in TYPES:
            types[name] = TYPES[name]
        elif name.endswith("_ptr"):
            types[name] = "*i32" if name.startswith(INTEGER_TABLES) else "*fp32"
        else:
            types[name] = "i32"
    return types


def binary_of(kernel, constants, *, capability=90, aligned=(), warps=4, stages=3):
    """Machine code of a kernel for a GPU of this capability."""
    types = signature(kernel, constants)
    names = [name for name in types if name.endswith("_ptr") or name in aligned]
    attributes = {(list(types).index(name),): [["tt.divisibility", 16]] for name in names}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options).asm["cubin"]


def compiled(kernel, constants, tmp_path, **how):
    """(resource line, instructions as (address, text)) of a kernel for sm_90."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(binary_of(kernel, constants, **how))

    def dump(flag):
        done = subprocess.run([CUOBJDUMP, flag, file], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    resources = next(line for line in dump("-res-usage").splitlines() if "REG:" in line)
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", dump("-sass"))
    return resources, [(int(address, 16), text) for address, text in found]


def loops(instructions):
    """Instruction texts of each loop: from the target of a backward branch to the branch."""
    bodies = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        if branch and int(branch.group(1), 16) < address:
            start = int(branch.group(1), 16)
            bodies.append([t for a, t in instructions if start <= a <= address])
    return bodies


def opcodes(texts):
    return Counter(re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for text in texts)


def test_the_decode_kernel_stays_lean(tmp_path):
    constants = {"BN": 128, "TOKENS": 16, "MASK": 0b1110, "HAS_BIAS": False}
    resources, code = compiled(
        decode_kernel, constants | {"ASM": True}, tmp_path, aligned=("N", "columns")
    )
    assert "STACK:0" in resources
    assert "LOCAL:0" in resources
    bodies = [body for body in loops(code) if opcodes(body)["HGMMA"]]
    per_weight = [len(body) * 128 / (2 * 128 * 128) for body in bodies]
    assert len(per_weight) == 3
    assert sorted(per_weight)[1] <= 1.95
    assert max(per_weight) <= 2.85
    assert sum("LDGSTS.E.BYPASS.128" in text for _, text in code) >= 40


@pytest.mark.parametrize(
    ("kernel", "constants", "warps"),
    [
        (_gptq_block_kernel, {"ROWS": 8, "COLUMNS": 128}, 1),
        (_prologue_kernel, {"HAS_ORDER": True, "SLOTS": 4, "BLOCK": 4096}, 4),
        (_dequantize_kernel, {"ROWS": 64, "ALIGNED": True}, 4),
        (_clip_search_kernel, {"ROWS": 16, "COLUMNS": 128, "row_stride": 1}, 1),
    ],
    ids=["gptq", "prologue", "dequantize", "clip search"],
)
def test_the_other_kernels_compile_without_spills(kernel, constants, warps, tmp_path):
    resources, _ = compiled(kernel, constants, tmp_path, warps=warps)
    assert "LOCAL:0" in resources


@pytest.mark.parametrize(
    ("kernel", "constants", "most", "spills"),
    [(_group_solve_kernel, {"SEARCH": True}, 4100, 24), (_polish_kernel, {}, 3280, 143)],
    ids=["search", "polish"],
)
def test_column_loops_stay_lean(kernel, constants, most, spills, tmp_path):
    """Instructions per part of 32 columns and 32 rows, unrolled, and those that move spilled
    registers; no thread waits for another's."""
    constants = {"ROWS": 32, "PART": 32, "WHOLE": True} | constants
    aligned = [name for name in ("wide", "h_wide") if name in kernel.arg_names]
    _, code = compiled(kernel, constants, tmp_path, aligned=aligned, warps=1, stages=1)
    assert opcodes(text for _, text in code)["SHFL"] == 0
    unrolled = [body for body in loops(code) if opcodes(body)["FFMA"] > 500]
    part = min(unrolled, key=len)
    assert len(part) <= most
    assert opcodes(part)["HMMA"] > 0
    assert opcodes(part)["LDL"] + opcodes(part)["STL"] <= spills


DECODED = {"BN": 128, "TOKENS": 16, "MASK": 0b1110, "HAS_BIAS": False, "ASM": True}
IN_COLUMNS = {"aligned": ("N", "columns")}
LOOP = {"ROWS": 32, "PART": 32, "WHOLE": True}
HEADS = {"HALF": 32, "REST": 0, "HEADS": 8, "COLUMNS": 32, "REST_COLUMNS": 1, "BACK": False}
OTHERS = (80, 89, 100, 120)
"""Ampere, Ada and the two Blackwells."""
LONG = ((80, 120), (89, 100))
"""The same for kernels that take seconds to compile: in every run of the tests, in slow ones."""


@pytest.mark.parametrize(
    ("kernel", "constants", "how"),
    [
        (decode_kernel, DECODED, IN_COLUMNS),
        (decode_kernel, DECODED | {"TOKENS": 8}, IN_COLUMNS),
        (_prologue_kernel, {"HAS_ORDER": True, "SLOTS": 4, "BLOCK": 4096}, {}),
        (_gptq_block_kernel, {"ROWS": 8, "COLUMNS": 128}, {"warps": 1}),
        (_clip_search_kernel, {"ROWS": 16, "COLUMNS": 128, "row_stride": 1}, {"warps": 1}),
        (_descend_block_kernel, {"ROWS": 8, "COLUMNS": 128}, {"warps": 1}),
        (_divergence_kernel, {"COLUMNS": 2048}, {}),
        (_rotary_kernel, HEADS, {}),
    ],
    ids=lambda value: getattr(value, "__name__", "")[:20],
)
@pytest.mark.parametrize("capability", OTHERS)
def test_ampere_ada_and_blackwell_get_machine_code(capability, kernel, constants, how):
    binary = binary_of(kernel, constants, capability=capability, **how)
    assert binary[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("kernel", "constants", "how"),
    [
        (_dequantize_kernel, {"ROWS": 64, "ALIGNED": True}, {}),
        (_group_solve_kernel, LOOP | {"SEARCH": True}, {"warps": 1, "stages": 1}),
        (_polish_kernel, LOOP, {"warps": 1, "stages": 1, "aligned": ("wide", "h_wide")}),
        (decode_kernel, DECODED | {"TOKENS": 64}, IN_COLUMNS | {"warps": 8}),
    ],
    ids=["dequantize", "search", "polish", "decode 64"],
)
@pytest.mark.parametrize(
    "capability", [*LONG[0], *(pytest.param(one, marks=pytest.mark.slow) for one in LONG[1])]
)
def test_long_kernels_get_machine_code_for_others(capability, kernel, constants, how):
    binary = binary_of(kernel, constants, capability=capability, **how)
    assert binary[:4] == b"\x7fELF"
