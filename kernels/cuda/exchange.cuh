// A byte an expert from every rank to every rank, inside a launch, through memory that peers can write (NVLink or
// PCIe). See sere_ray/kernel/peers.py.
//
// Each rank has an inbox, [2][num_ranks][WORDS]: where each rank writes to it. A word holds four bytes and the number
// of the exchange, is written at once and needs no fence: whoever sees the number sees the bytes. Inboxes alternate
// between two halves: a rank writes into a half again only when every peer has sent its next word, so after that peer's
// earlier launch, which read the half, has ended.
#pragma once
#include "rule.cuh"

namespace {

typedef unsigned long long Word;
constexpr int WORDS = STRIDE / 4;                  // of a rank
constexpr int NOBODY = 255;                        // names the expert

struct Exchange {
  Word* const* inboxes;                            // [num_ranks], of every rank, as this one reaches them
  unsigned* number;                                // of the last exchange; all ranks count alike
  int rank, num_ranks;
  long long patience;                              // nanoseconds until a rank that sends nothing ends the kernel
};

__device__ __forceinline__ void send(Word* to, Word word) {
#ifdef __CUDA_ARCH__
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
#else
  __atomic_store_n(to, word, __ATOMIC_RELAXED);
#endif
}

__device__ __forceinline__ Word receive(const Word* from) {
#ifdef __CUDA_ARCH__
  Word word;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  return word;
#else
  return __atomic_load_n(from, __ATOMIC_RELAXED);
#endif
}

__device__ __forceinline__ long long now_ns() {
#ifdef __CUDA_ARCH__
  long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
#else
  return globaltimer_on_cpu();
#endif
}

// The minimum over ranks of shared.lowest_order; the block's threads have to have met before, and meet at the end.
__device__ __forceinline__ void lowest_of_all_ranks(Shared& shared, const Exchange& e) {
  const unsigned number = *e.number + 1;
  const int half = number % 2 * e.num_ranks, others = (e.num_ranks - 1) * WORDS;
#pragma unroll 1
  for (int i = threadIdx.x; i < others; i += THREADS) {
    const int peer = (e.rank + 1 + i / WORDS) % e.num_ranks, word = i % WORDS;
    unsigned bytes = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int order = shared.lowest_order[word * 4 + j];
      bytes |= unsigned(order < K ? order : NOBODY) << 8 * j;
    }
    send(e.inboxes[peer] + (half + e.rank) * WORDS + word, Word(number) << 32 | bytes);
  }
  __syncthreads();                                 // all is sent as it was, then changed

  const long long start = now_ns();
#pragma unroll 1
  for (int i = threadIdx.x; i < others; i += THREADS) {
    const int peer = (e.rank + 1 + i / WORDS) % e.num_ranks, word = i % WORDS;
    const Word* from = e.inboxes[e.rank] + (half + peer) * WORDS + word;
    Word found = receive(from);
    while (unsigned(found >> 32) != number) {
      if (now_ns() - start > e.patience) __trap();
      found = receive(from);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int order = int(found >> 8 * j) & 255;
      if (order < K) atomicMin(&shared.lowest_order[word * 4 + j], order);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) *e.number = number;
}

}  // namespace

#define EXCHANGE_PARAMETERS void *const *inboxes, unsigned *number, int rank, int num_ranks_there, long long patience
#define EXCHANGE_ARGUMENTS {reinterpret_cast<Word* const*>(inboxes), number, rank, num_ranks_there, patience}
