// Kept experts as a warp holds them: bit j of a lane is that of the expert lane * PER_LANE + j.
#pragma once
#include "rule.cuh"

namespace {

// Of an expert that each lane names.
__device__ __forceinline__ bool is_kept(unsigned kept, int expert) {
  return __shfl_sync(ALL_LANES, kept, expert / PER_LANE) >> expert % PER_LANE & 1;
}

// Under `balance_ranks`: fills shared.demand with the demand of each expert's level, all experts that have its place in
// the order of their rank. By all threads of the block; they meet before and after.
__device__ __forceinline__ void add_up_levels(Shared& shared, const unsigned char* owner) {
  int* const of_level = shared.fate;
#pragma unroll 1
  for (int v = threadIdx.x; v < STRIDE; v += THREADS) of_level[v] = 0;
  __syncthreads();
#pragma unroll 1
  for (int v = threadIdx.x; v < E; v += THREADS) {
    const int wanted = max(shared.wanted[v], 0);
    int place = 0;
#pragma unroll 8
    for (int u = 0; u < E; ++u) {
      const int other = max(shared.wanted[u], 0);
      place += owner[u] == owner[v] && (other > wanted || (other == wanted && u < v));
    }
    shared.demand[v] = place;
    atomicAdd(&of_level[place], wanted);           // at most 255 ranks: fits
  }
  __syncthreads();
#pragma unroll 1
  for (int v = threadIdx.x; v < E; v += THREADS) shared.demand[v] = of_level[shared.demand[v]];
  __syncthreads();
}

// The floor: named experts join by demand, of equal ones the first, until so many are kept, or all that are named.
__device__ __forceinline__ unsigned fill_up(const Shared& shared, unsigned kept, int least) {
  int wanted[PER_LANE], num_named = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    wanted[j] = shared.wanted[threadIdx.x % 32 * PER_LANE + j];
    num_named += wanted[j] >= 0;
  }
  const int enough = min(least, __reduce_add_sync(ALL_LANES, num_named));
#pragma unroll 1
  for (int size = __reduce_add_sync(ALL_LANES, __popc(kept)); size < enough; ++size) {
    int best = -1, place = 0;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      if (!(kept >> j & 1) && wanted[j] > best) best = wanted[j], place = j;
    }
    const unsigned holders = __ballot_sync(ALL_LANES, best == __reduce_max_sync(ALL_LANES, best));
    if (threadIdx.x % 32 == __ffs(holders) - 1) kept |= 1u << place;
  }
  return kept;
}

// The guard: whether more demand is given up than in any step of calibration; then, if it is on, all that are named are
// kept after all.
__device__ __forceinline__ bool guard(const Shared& shared, unsigned& kept, const Settings& settings) {
  if (settings.most == ANY_DEMAND) return false;
  int given_up = 0;                                // at most E * (UNIT + 1), which fits
  unsigned named = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int wanted = shared.wanted[threadIdx.x % 32 * PER_LANE + j];
    named |= unsigned(wanted >= 0) << j;
    if (!(kept >> j & 1)) given_up += max(wanted, 0);
  }
  const bool is_beyond = __reduce_add_sync(ALL_LANES, given_up) > settings.most;
  if (is_beyond && settings.guard) kept = named;
  return is_beyond;
}

}  // namespace
