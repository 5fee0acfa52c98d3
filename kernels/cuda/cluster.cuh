// The blocks of a launch as one thread-block cluster, where it was launched as one (compute capability 9.0 and newer).
// Elsewhere a launch is one block, and the same code runs in it.
#pragma once

namespace {

constexpr int MAX_BLOCKS = 8;                      // of a cluster, on every GPU that has clusters

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900

__device__ __forceinline__ int own_block() { return 0; }
__device__ __forceinline__ int num_blocks() { return 1; }
template <class T> __device__ __forceinline__ T& of_block(T& shared, int) { return shared; }
__device__ __forceinline__ void wait_for_all_blocks() { __syncthreads(); }
template <bool SHOWS> __device__ __forceinline__ void announce() {}
__device__ __forceinline__ void wait_for_announced() {}

#else

__device__ __forceinline__ int own_block() { return __clusterRelativeBlockRank(); }
__device__ __forceinline__ int num_blocks() { return __clusterSizeInBlocks(); }

// A block's own instance of something in shared memory. Not before all blocks have begun, nor after one may have ended:
// see the barriers.
template <class T> __device__ __forceinline__ T& of_block(T& shared, int block) {
  return *static_cast<T*>(__cluster_map_shared_rank(&shared, block));
}

// A barrier of all threads of all blocks. What they wrote before is seen behind it, in device memory, too.
__device__ __forceinline__ void wait_for_all_blocks() {
  if (num_blocks() == 1) {
    __syncthreads();
  } else {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  }
}

// The same in two halves, where there are other blocks, of which one must not end while others use its shared memory. A
// thread announces that it is done with theirs; SHOWS: what it wrote before is seen by who has waited.
template <bool SHOWS> __device__ __forceinline__ void announce() {
  if (num_blocks() == 1) return;
  if (SHOWS) __cluster_barrier_arrive();
  else __cluster_barrier_arrive_relaxed();
}
__device__ __forceinline__ void wait_for_announced() {
  if (num_blocks() > 1) __cluster_barrier_wait();
}

#endif

}  // namespace
