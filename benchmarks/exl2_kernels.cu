// ExLlamaV2's reconstruction and product of one linear as C functions, for `exl2_kernels.py`.
//
// Compiled with the sources of its wheel, which are included, not copied. What is defined here of
// its own functions is never reached by an EXL2 product: kernels with routing weights, GPTQ's, and
// the quantized cache.

#include <cstdlib>

#include "q_gemm.cu"
#include "cache.cuh"

fp_gemm_half_q_half_kernel pick_gemm_half_q_half_kernel(
    int tokens, int widths, bool routed, bool multiplied, int block)
{
    auto found = pick_gemm_half_q_half_kernel_1a(tokens, widths, routed, multiplied, block);
    if (found) return found;
    return pick_gemm_half_q_half_kernel_1b(tokens, widths, routed, multiplied, block);
}

fp_gemm_half_q_half_gptq_kernel pick_gemm_half_q_half_gptq_kernel(int, bool, bool) { abort(); }

void array_fp16_to_q_kv_cuda(
    cudaStream_t, const half*, unsigned char*, half*, const half*, unsigned char*, half*,
    int, int, int, int, int, int) { abort(); }

void array_q_to_fp16_kv_cuda(
    cudaStream_t, const unsigned char*, const half*, half*, const unsigned char*, const half*,
    half*, int, int, int, int, int, int) { abort(); }

extern "C" {

const char* exl2_version() { return EXLLAMAV2_VERSION; }

// weight [W, N] is shuffled in place; scratch holds K * N halves.
void* exl2_make(
    int device, int K, int N, int groups, void* weight, void* perm, void* scale, void* scale_max,
    void* entries, void* map, void* scratch, int most_rows, void* stream)
{
    return new QMatrix(
        (cudaStream_t) stream, device, K, N, groups, (uint32_t*) weight, (uint16_t*) perm, NULL,
        (uint32_t*) scale, (half*) scale_max, (uint16_t*) entries, (uint16_t*) map, NULL, NULL,
        NULL, NULL, (half*) scratch, most_rows);
}

void exl2_free(void* matrix) { delete (QMatrix*) matrix; }

// out [K, N]; the CUDA error, 0 for none.
int exl2_reconstruct(void* matrix, void* out, void* stream)
{
    ((QMatrix*) matrix)->reconstruct((cudaStream_t) stream, (half*) out);
    return cudaGetLastError();
}

// y [tokens, N] of x [tokens, K]; the CUDA error, 0 for none.
int exl2_product(void* matrix, const void* x, void* y, int tokens, void* cublas, void* stream)
{
    auto b = (QMatrix*) matrix;
    gemm_half_q_half_cuda(
        (cudaStream_t) stream, (cublasHandle_t) cublas, (const half*) x, b, (half*) y, tokens,
        b->width, b->height, true);
    return cudaGetLastError();
}

// Its choice of blocks for 1 to 4 tokens goes by shape alone, whatever the widths.
void exl2_forget_choices() { at_results.clear(); }

}
