// CUDA, or what stands in for it where the kernels' logic is tested without a GPU.

#pragma once

#ifdef MEGATRON_RW_EMULATED
#include "emulation.h"
#else
#include <cuda_runtime.h>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace megatron_rw {

// e^value to about 2 ulp; what is below 2^-126 is 0.
__device__ __forceinline__ float fast_exp(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value * 1.4426950408889634f));
  return result;
}

template <typename... Parameters>
void start(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
           std::type_identity_t<Parameters>... arguments) {
  kernel<<<grid, threads, 0, stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("a kernel did not start: ") + cudaGetErrorString(error));
  }
}

}  // namespace megatron_rw
#endif
#endif
