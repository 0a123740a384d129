// Viterbi search over the states of a bitshift trellis, one sequence a block; see trellis_codes.py.
//
// State s_t is the window of L bits that ends with step t: s_t = (s_{t-1} >> B) | (new << (L - B)),
// B bits a step, V values a state. All states whose upper L - B bits are j lead to the same states,
// so only the best of them is kept: best[j] = min over o of cost[(j << B) | o]. The table of best
// costs is swizzled, since neighbouring j read 2^B words apart.
#include <cuda_runtime.h>
#include <torch/extension.h>

template <int L, int B, int V>
__global__ void viterbi(const float* __restrict__ values, const float* __restrict__ table, int steps,
                        int chunk, unsigned char* __restrict__ choices, float* __restrict__ errors) {
    constexpr int R = L - B, COUNT = 1 << R;
    extern __shared__ float memory[];
    __shared__ int chosen;
    float *now = memory, *next = memory + COUNT;
    auto place = [](int p) { return p ^ (p >> B); };
    const float* x = values + (size_t)blockIdx.x * steps * V;
    unsigned char* back = choices + (size_t)blockIdx.x * chunk * COUNT;
    float total = 0.f;
    int start = -1;
    for (int first = 0; first < steps; first += chunk) {
        for (int j = threadIdx.x; j < COUNT; j += blockDim.x)
            now[place(j)] = start < 0 || j == start ? 0.f : 1e30f;
        __syncthreads();
        for (int t = 0; t < chunk; ++t) {
            float x0 = x[(first + t) * V], x1 = V == 2 ? x[(first + t) * V + 1] : 0.f;
            for (int j = threadIdx.x; j < COUNT; j += blockDim.x) {
                float best = 1e38f;
                int kept = 0;
#pragma unroll 4
                for (int old = 0; old < 1 << B; ++old) {
                    int s = j << B | old;
                    float d0 = x0 - table[s * V], d1 = V == 2 ? x1 - table[s * V + V - 1] : 0.f;
                    float cost = d0 * d0 + d1 * d1 + now[place(s & (COUNT - 1))];
                    if (cost < best) { best = cost; kept = old; }
                }
                next[place(j)] = best;
                back[(size_t)t * COUNT + j] = kept;
            }
            __syncthreads();
            float* other = now; now = next; next = other;
        }
        if (threadIdx.x == 0) {
            float best = 1e38f;
            for (int j = 0; j < COUNT; ++j)
                if (now[place(j)] < best) { best = now[place(j)]; chosen = j; }
            total += best;
        }
        __syncthreads();
        start = chosen;
    }
    if (threadIdx.x == 0) errors[blockIdx.x] = total;
}

template <int L, int B, int V>
void launch(torch::Tensor values, torch::Tensor table, int chunk, torch::Tensor choices, torch::Tensor errors) {
    int shared = 2 * sizeof(float) << (L - B);
    cudaFuncSetAttribute(viterbi<L, B, V>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    viterbi<L, B, V><<<values.size(0), std::min(1024, 1 << (L - B)), shared>>>(
        values.data_ptr<float>(), table.data_ptr<float>(), values.size(1) / V, chunk,
        choices.data_ptr<unsigned char>(), errors.data_ptr<float>());
    TORCH_CHECK(cudaGetLastError() == cudaSuccess, "the launch failed");
}

#define CASE(l, b, v) if (L == l && B == b && V == v) return launch<l, b, v>(values, table, chunk, choices, errors);
void encode(int L, int B, int V, torch::Tensor values, torch::Tensor table, int chunk, torch::Tensor choices, torch::Tensor errors) {
    CASE(16, 2, 2) CASE(16, 4, 2) CASE(16, 6, 2) CASE(16, 8, 2)
    CASE(14, 2, 2) CASE(14, 4, 2) CASE(14, 6, 2) CASE(14, 8, 2)
    CASE(16, 2, 1) CASE(16, 3, 1) CASE(16, 4, 1) CASE(16, 5, 1) CASE(16, 6, 1) CASE(16, 7, 1) CASE(16, 8, 1)
    TORCH_CHECK(false, "no such case");
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("encode", &encode); }
