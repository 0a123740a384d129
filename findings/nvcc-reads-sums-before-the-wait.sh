#!/usr/bin/env bash
# nvcc 13.0.88: a register that wgmma still writes is read before the wait that stands before its use.
# The source waits by `asm volatile("wgmma.wait_group ... 0" ::: "memory")`, as all asynchronous
# products are waited for, and then looks at a sum's bits. The PTX copies the sums to other registers
# in front of the wait: neither volatile nor a clobber of memory says that the wait changes registers.
# PTX leaves such reads undefined, and nvcc says nothing; with an index of `out` that is the same in
# all threads the copies stay behind the wait. An empty asm that takes the sums there ("+f") keeps
# them behind it. Compiled for sm_90a only, nothing is run; fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install --no-deps nvidia-cuda-nvcc==13.0.88 \
  nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96
"$work/venv/bin/python" - "$work" <<'PY'
import pathlib
import subprocess
import sys
import sysconfig

folder = pathlib.Path(sys.argv[1])
(root,) = pathlib.Path(sysconfig.get_path("platlib"), "nvidia").glob("cu13")
for program in [*root.glob("bin/*"), *root.glob("nvvm/bin/*")]:
    program.chmod(0o755)
SOURCE = """
__global__ void sums(unsigned a, unsigned long long b, const int* ends, int n, unsigned* out) {
  float d[4] = {};
  for (int i = 0; i < n; ++i) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, {%4, %4, %4, %4}, %5, "
        "1, 1, 1, 0;" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a), "l"(b));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (ends[i]) {
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      TIE
      for (int j = 0; j < 4; ++j) {
        const unsigned bits = __float_as_uint(d[j]);
        out[(4 * i + j) * 128 + threadIdx.x] = bits == 0xffffffffu ? 0x7fffffffu : bits;
      }
    }
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
"""
TIE = 'for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(d[j]) :: "memory");'


def reads_before_the_wait(tie):
    """Copies of sums between a branch and the wait behind it, of the whole kernel."""
    (folder / "sums.cu").write_text(SOURCE.replace("TIE", tie))
    command = [root / "bin/nvcc", "-O3", "-arch=sm_90a", "-ptx", "-o", "sums.ptx", "sums.cu"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert not done.stderr, done.stderr
    count, copies = 0, 0
    for line in (folder / "sums.ptx").read_text().splitlines():
        words = line.split()
        if words[:1] == ["mov.b32"] and words[1].startswith("%r") and words[2].startswith("%f"):
            copies += 1
        elif "bra" in words or "wgmma.mma_async" in line:
            copies = 0
        elif "wgmma.wait_group.sync.aligned 0" in line:
            count, copies = count + copies, 0
    return count


plain, tied = reads_before_the_wait(""), reads_before_the_wait(TIE)
print(f"sums read before the wait for them: {plain}, with an empty asm behind it {tied}")
assert plain > 0 and tied == 0, "nvcc does it otherwise now"
PY
