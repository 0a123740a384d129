// What the CUDA sources of EXL3 and Marlin call of torch, for compiling them without it.
//
// Tensors are contiguous, on the current device, in memory that others own or in their own; checks
// throw; kernels run on `at::cuda::current`. `peer_library.py` gives it the names of torch's headers.

#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

namespace pybind11 {}

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS, CUBLAS_STATUS_NOT_INITIALIZED, CUBLAS_STATUS_ALLOC_FAILED,
    CUBLAS_STATUS_INVALID_VALUE, CUBLAS_STATUS_ARCH_MISMATCH, CUBLAS_STATUS_MAPPING_ERROR,
    CUBLAS_STATUS_EXECUTION_FAILED, CUBLAS_STATUS_INTERNAL_ERROR, CUBLAS_STATUS_NOT_SUPPORTED,
    CUBLAS_STATUS_LICENSE_ERROR
};

namespace c10 {

struct Error : std::runtime_error { using std::runtime_error::runtime_error; };

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts)
{
    std::ostringstream text;
    (text << ... << parts);
    throw Error(text.str());
}

}

#define TORCH_CHECK(condition, ...) \
    if (!(condition)) { c10::refuse(#condition " does not hold. ", ##__VA_ARGS__); }
#define TORCH_WARN(...)

namespace at {

enum class ScalarType { Byte, Short, Int, Long, Half, BFloat16, Float };
constexpr auto kByte = ScalarType::Byte, kShort = ScalarType::Short, kInt = ScalarType::Int;
constexpr auto kLong = ScalarType::Long, kHalf = ScalarType::Half, kFloat = ScalarType::Float;

inline int64_t size_of(ScalarType type)
{
    constexpr int64_t sizes[] = {1, 2, 4, 8, 2, 2, 4};
    return sizes[int(type)];
}

inline std::ostream& operator<<(std::ostream& out, ScalarType type) { return out << int(type); }

struct Half;
struct BFloat16;
struct Float8_e4m3fn;

enum DeviceType { kCUDA };

struct Device {
    bool is_cuda() const { return true; }
    bool operator==(Device) const { return true; }
};

struct TensorOptions {
    ScalarType type = kFloat;
    TensorOptions dtype(ScalarType wanted) const { return {wanted}; }
    template <class... Place> TensorOptions device(Place...) const { return *this; }
};

class Tensor {
public:
    Tensor() = default;
    Tensor(const void* data, ScalarType type, std::vector<int64_t> sizes)
        : data_(const_cast<void*>(data), [](void*) {}), type_(type), sizes_(std::move(sizes)) {}

    // Of its own memory, which an empty one has none of: a stream that is being captured allows no
    // cudaFree, of null neither.
    Tensor(ScalarType type, std::vector<int64_t> sizes) : type_(type), sizes_(std::move(sizes))
    {
        if (!nbytes()) return;
        void* data = nullptr;
        if (cudaMalloc(&data, nbytes()) != cudaSuccess) c10::refuse("no memory left");
        data_ = std::shared_ptr<void>(data, cudaFree);
    }

    void* data_ptr() const { return data_.get(); }
    template <class T> T* data_ptr() const { return (T*) data_.get(); }
    int64_t dim() const { return sizes_.size(); }
    const std::vector<int64_t>& sizes() const { return sizes_; }
    int64_t size(int64_t d) const { return sizes_.at(d < 0 ? d + dim() : d); }
    int64_t stride(int64_t d) const
    {
        d = d < 0 ? d + dim() : d;
        return std::accumulate(sizes_.begin() + d + 1, sizes_.end(), int64_t(1), std::multiplies<>());
    }
    int64_t numel() const { return sizes_.empty() ? 0 : size(0) * stride(0); }
    int64_t element_size() const { return size_of(type_); }
    int64_t nbytes() const { return numel() * element_size(); }
    ScalarType dtype() const { return type_; }
    ScalarType scalar_type() const { return type_; }
    Device device() const { return {}; }
    int get_device() const
    {
        int device = 0;
        cudaGetDevice(&device);
        return device;
    }
    bool is_cuda() const { return true; }
    bool is_contiguous() const { return true; }
    bool defined() const { return !sizes_.empty(); }
    bool is_alias_of(const Tensor&) const { return false; }
    void record_stream(cudaStream_t) const {}

private:
    std::shared_ptr<void> data_;
    ScalarType type_ = kFloat;
    std::vector<int64_t> sizes_;
};

inline Tensor empty(std::vector<int64_t> sizes, TensorOptions options = {})
{
    return Tensor(options.type, std::move(sizes));
}

inline Tensor empty_symint(std::vector<int64_t> sizes, TensorOptions options)
{
    return empty(std::move(sizes), options);
}

inline Device device_of(const Tensor&) { return {}; }

namespace cuda {

inline cudaStream_t current = nullptr;

struct Stream {
    cudaStream_t stream() const { return current; }
    operator cudaStream_t() const { return current; }
};

inline Stream getCurrentCUDAStream(int = 0) { return {}; }

struct OptionalCUDAGuard {
    template <class Place> explicit OptionalCUDAGuard(Place) {}
};

}

}

namespace c10 {

template <class T> using optional = std::optional<T>;
using SymInt = int64_t;

namespace cuda {
using at::cuda::OptionalCUDAGuard;
using CUDAGuard = OptionalCUDAGuard;
}

}

namespace torch {
using at::Tensor;
using at::TensorOptions;
using at::empty;
using at::empty_symint;
}

// Calls on a stream: what a check said, or null.
template <class Call>
const char* said(void* stream, Call call)
{
    static std::string text;
    at::cuda::current = (cudaStream_t) stream;
    try {
        call();
    } catch (const std::exception& error) {
        text = error.what();
        return text.c_str();
    }
    cudaError_t error = cudaGetLastError();
    return error ? cudaGetErrorString(error) : nullptr;
}
