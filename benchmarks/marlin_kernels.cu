// Marlin's product of one linear of 4 bits and fp16 activations as C functions, for
// `marlin_kernels.py`.
//
// Compiled with the sources of GPTQModel, which are included, not copied. They choose among
// kernels of every type and group size; here are those of 4 bits in groups of 128, with zero points
// or symmetric, and the choice among all is given another name, under which nothing calls it.

#include "kernel.h"

namespace marlin {

using MarlinFuncPtr = void (*)(MARLIN_KERNEL_PARAMS);

template <typename scalar_t>
MarlinFuncPtr get_marlin_kernel(
    const vllm::ScalarType type, int m, int n, int k, bool eight_rows, bool ordered, bool zeros,
    int group_blocks, int threads, bool float_zeros, int stages);

}

#define get_marlin_kernel(...) get_marlin_kernel_of_any_type(__VA_ARGS__)
#include "gptq_marlin_fp16.cu"
#undef get_marlin_kernel
#include "gptq_marlin_repack.cu"
#include "marlin_template.h"

namespace marlin {

constexpr int GROUP = 128;

template <int threads, int m, int n, int k, bool eight_rows>
MarlinFuncPtr kernel_of(bool zeros)
{
    constexpr auto group = GROUP / 16;
    constexpr auto scales = vllm::kFloat16.id();
    if (zeros)
        return Marlin<
            half, vllm::kU4.id(), scales, threads, m, n, k, eight_rows, pipe_stages, group, false>;
    return Marlin<
        half, vllm::kU4B8.id(), scales, threads, m, n, k, eight_rows, pipe_stages, group, false>;
}

template <typename scalar_t>
MarlinFuncPtr get_marlin_kernel(
    const vllm::ScalarType type, int m, int n, int k, bool eight_rows, bool ordered, bool zeros,
    int group_blocks, int threads, bool float_zeros, int stages)
{
    if (group_blocks * 16 != GROUP || stages != pipe_stages || ordered || float_zeros)
        return MarlinDefault;
#define KERNEL(M, N, K, THREADS, EIGHT) \
    if (m == M && n == N && k == K && threads == THREADS && eight_rows == EIGHT) \
        return kernel_of<THREADS, M, N, K, EIGHT>(zeros);
#define KERNELS(M, N, K, EIGHT) \
    KERNEL(M, N, K, 256, EIGHT) KERNEL(M, 8, 4, 128, EIGHT) KERNEL(M, 4, 8, 128, EIGHT)
    KERNELS(1, 8, 8, true) KERNELS(1, 8, 8, false)
    KERNELS(2, 16, 4, false) KERNELS(3, 16, 4, false) KERNELS(4, 16, 4, false)
    return MarlinDefault;
}

}

// Each gives what a check or CUDA said, or null.
extern "C" {

const char* marlin_version() { return GPTQMODEL_VERSION; }

// out i32 [K / 16, 2 N] of codes i32 [K / 8, N], eight of a column in a word, the first lowest.
const char* marlin_repack(const void* codes, void* out, int K, int N, void* stream)
{
    return said(stream, [&] {
        at::Tensor words(codes, at::kInt, {K / 8, N}), order(nullptr, at::kInt, {0});
        at::Tensor packed = gptq_marlin_repack(words, order, K, N, 4);
        cudaMemcpyAsync(
            out, packed.data_ptr(), packed.nbytes(), cudaMemcpyDeviceToDevice,
            at::cuda::current);
    });
}

// y [tokens, N] of x [tokens, K]; scales [K / 128, N]; zeros i32 [K / 128, N / 8], null where
// every zero point is 8; sums holds `floats`, locks an int per multiprocessor, zeros.
const char* marlin_product(
    const void* x, const void* weight, const void* scales, const void* zeros, void* sums,
    int floats, void* locks, int lock_count, void* y, int tokens, int K, int N, void* stream)
{
    return said(stream, [&] {
        int groups = K / marlin::GROUP;
        at::Tensor in(x, at::kHalf, {tokens, K}), words(weight, at::kInt, {K / 16, 2 * N});
        at::Tensor grid(scales, at::kHalf, {groups, N}), turns(locks, at::kInt, {lock_count});
        at::Tensor out(y, at::kHalf, {tokens, N}), scratch(sums, at::kFloat, {floats});
        std::optional<at::Tensor> points;
        if (zeros) points = at::Tensor(zeros, at::kInt, {groups, N / 8});
        auto type = zeros ? vllm::kU4.id() : vllm::kU4B8.id();
        gptq_marlin_gemm_fp16(
            in, out, words, {}, grid, {}, points, {}, {}, turns, type, tokens, N, K, true, false,
            true, false, scratch, {});
    });
}

}
