#!/usr/bin/env bash
# GCC 12.2.0 (Debian 12): a vector type twice as wide as the processor's registers is not split in two,
# its comparisons and choices are computed lane by lane, without a warning.
#
# `a < b ? a : b` of 16 floats (`vector_size(64)`) is one function of 5 instructions for AVX-512. For
# AVX2, where two registers of 8 floats would do (5 instructions each), it becomes some 80 scalar ones;
# written with the comparison's mask, and, or and not, it becomes twice as many. Additions and products
# of such vectors are split as one expects, so only a part of a kernel is slow. Code that is compiled for
# several widths has to choose its vector's width by the target. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq g++-12=12.2.0-14+deb12u1 libisl23 libmpc3 libmpfr6 libgmp10 2>/dev/null
for package in ./*.deb; do dpkg -x "$package" root; done
cat > choose.cpp <<'CPP'
typedef float Floats __attribute__((vector_size(4 * LANES)));
extern "C" void choose(Floats *to, const Floats *a, const Floats *b) { *to = *a < *b ? *a : *b; }
extern "C" void add(Floats *to, const Floats *a, const Floats *b) { *to = *a + *b; }
CPP
# Prints how many instructions FUNCTION has for FLAG and LANES.
instructions() {
    LD_LIBRARY_PATH=root/usr/lib/x86_64-linux-gnu root/usr/lib/gcc/x86_64-linux-gnu/12/cc1plus \
        -quiet -O3 "$2" -D"LANES=$3" choose.cpp -o choose.s
    awk -v name="$1:" '/^[a-z]+:/ { inside = $1 == name } inside && /^\t[a-z]/ { n++ } END { print n }' choose.s
}
one=$(instructions choose -mavx2 8) two=$(instructions choose -mavx2 16)
wide=$(instructions choose -mavx512f 16) sum=$(instructions add -mavx2 16)
echo "a choice: AVX2, 8 lanes $one; AVX2, 16 lanes $two; AVX-512, 16 lanes $wide; a sum: AVX2, 16 lanes $sum"
[ "$wide" -le 6 ] && [ "$one" -le 6 ] && [ "$sum" -le 10 ]
[ "$two" -ge 60 ] || { echo "a choice of wide vectors is split now"; exit 1; }
