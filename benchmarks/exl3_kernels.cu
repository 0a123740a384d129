// EXL3's product of one linear and its parts as C functions, for `exl3_kernels.py`.
//
// Compiled with the sources of exllamav3's wheel, which are included, not copied. What is defined
// here of its own functions is never reached: kernels of other codebooks and rates, products of
// several linears, its own graphs, and products of 8-bit activations, which it leaves off.

#include "quant/exl3_gemm.cu"
#include "quant/hadamard.cuh"
#include "quant/reconstruct.cuh"

#define NONE(name) \
    fp_exl3_gemm_kernel tfp_exl3_gemm_kernel_##name[] = {nullptr}; \
    fp_exl3_mgemm_kernel tfp_exl3_mgemm_kernel_##name[] = {nullptr};
#define NONE_OF_BOTH(name) NONE(fp32_##name) NONE(fp16_##name)
#define NONE_OF_RATE(rate) NONE_OF_BOTH(b##rate##_cb0) NONE_OF_BOTH(b##rate##_cb1)
#define NONE_AT_ALL(rate) NONE_OF_RATE(rate) NONE_OF_BOTH(b##rate##_cb2)

NONE_AT_ALL(1) NONE_OF_RATE(2) NONE_OF_RATE(3) NONE_OF_RATE(4)
NONE_AT_ALL(5) NONE_AT_ALL(6) NONE_AT_ALL(7) NONE_AT_ALL(8)
NONE_OF_BOTH(h1) NONE_OF_BOTH(h2) NONE_OF_BOTH(h3)

void Graph::record_param(void*, int, int, int) { abort(); }

void* exl3_gemv_select_kernel_half(int, bool, int, int, bool) { return nullptr; }

bool exl3_gemv_int8_enabled() { return false; }

bool exl3_gemv_int8(
    const at::Tensor&, const at::Tensor&, at::Tensor&, const c10::optional<at::Tensor>&,
    const c10::optional<at::Tensor>&, const c10::optional<at::Tensor>&, cudaStream_t, Graph*)
{ abort(); }

static at::Tensor halves(const void* data, std::vector<int64_t> sizes)
{
    return at::Tensor(data, at::kHalf, std::move(sizes));
}

static c10::optional<at::Tensor> scales(const void* data, int64_t count)
{
    if (!data) return {};
    return halves(data, {count});
}

static at::Tensor circles(const void* data, int K, int N, int rate)
{
    return at::Tensor(data, at::kShort, {K / 16, N / 16, 16 * rate});
}

// Each gives what a check or CUDA said, or null.
extern "C" {

const char* exl3_version() { return EXLLAMAV3_VERSION; }

// y [tokens, N] of x [tokens, K]; scratch [tokens, K].
const char* exl3_product(
    const void* x, const void* trellis, const void* suh, const void* svh, void* scratch, void* y,
    int tokens, int K, int N, int rate, void* stream)
{
    return said(stream, [&] {
        at::Tensor out = halves(y, {tokens, N});
        exl3_gemm(
            halves(x, {tokens, K}), circles(trellis, K, N, rate), out, scales(suh, K),
            halves(scratch, {tokens, K}), scales(svh, N), -1, false, true, 0);
    });
}

// out [K, N], in the original basis where suh and svh are given.
const char* exl3_reconstruct(
    void* out, const void* trellis, const void* suh, const void* svh, int K, int N, int rate,
    void* stream)
{
    return said(stream, [&] {
        at::Tensor weight = halves(out, {K, N}), stored = circles(trellis, K, N, rate);
        if (suh) {
            reconstruct_had_slice(
                weight, stored, halves(suh, {K}), halves(svh, {N}), rate, false, true, 0);
        } else {
            reconstruct(weight, stored, rate, false, true);
        }
    });
}

// y [tokens, width] of x, rotated; before and after are scales or null.
const char* exl3_rotate(
    const void* x, const void* before, const void* after, void* y, int tokens, int width,
    void* stream)
{
    return said(stream, [&] {
        had_r_128(
            halves(x, {tokens, width}), halves(y, {tokens, width}), scales(before, width),
            scales(after, width), 1.0f);
    });
}

}
