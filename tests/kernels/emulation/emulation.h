// Runs CUDA kernels on the CPU, to test their logic without a GPU: the threads of a block are
// threads of the operating system, its barriers are barriers, its shared memory is shared. Blocks
// run one after the other.
//
// What it cannot show: a GPU's memory consistency (what only a weaker order of stores breaks), warps
// that run in lockstep or diverge, copies by hardware, registers, and any time.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;
using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline uint4 __ldcs(const uint4* from) { return *from; }
inline void __stcs(uint4* to, uint4 value) { *to = value; }

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

// To the nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

struct __half {
  _Float16 value;
};

inline float __half2float(__half value) { return static_cast<float>(value.value); }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }

namespace emulation {

class Barrier {
 public:
  explicit Barrier(int threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{32};
  uint32_t words[32];
};

struct Block {
  explicit Block(int threads) : barrier(threads) {
    for (int warp = 0; warp < threads / 32; ++warp) warps.push_back(std::make_unique<Warp>());
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local Block* block = nullptr;

// Threads of a block at most: kernels must be right for any number of warps, and two processor
// cores are slow at switching between a thousand.
inline int most_threads() {
  const char* const set = std::getenv("EMULATED_THREADS");
  return set ? std::atoi(set) : 64;
}

}  // namespace emulation

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { emulation::block->barrier.wait(); }

inline emulation::Warp& emulated_warp() { return *emulation::block->warps[threadIdx.x / 32]; }

inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int distance) {
  emulation::Warp& warp = emulated_warp();
  const int lane = threadIdx.x % 32;
  warp.words[lane] = value;
  warp.barrier.wait();
  const uint32_t other = warp.words[lane ^ distance];
  warp.barrier.wait();
  return other;
}

namespace megatron_rw {

inline float fast_exp(float value) { return std::exp(value); }

template <typename... Parameters>
void start(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t,
           std::type_identity_t<Parameters>... arguments) {
  // As CUDA would refuse it.
  if (threads <= 0 || threads > 1024 || threads % 32 || grid.x == 0 || grid.x > 0x7fffffffu ||
      grid.y == 0 || grid.y > 65535 || grid.z != 1) {
    throw std::runtime_error("a kernel did not start: invalid configuration");
  }
  // Shared memory is static.
  static std::mutex one_kernel;
  const std::lock_guard<std::mutex> lock(one_kernel);
  threads = min(threads, emulation::most_threads());
  emulation::Block block(threads);
  const auto run = [&](unsigned thread) {
    emulation::block = &block;
    threadIdx = dim3(thread);
    blockDim = dim3(threads);
    gridDim = grid;
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y);
        kernel(arguments...);
        block.barrier.wait();
      }
    }
  };
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) pool.emplace_back(run, thread);
  for (std::thread& thread : pool) thread.join();
}

}  // namespace megatron_rw
