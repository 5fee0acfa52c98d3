// Copies of experts, where a load balancer (EPLB) keeps several: from which one a step reads an expert, and the physical
// ids that follow. sere_ray/rules/replicas.py is the reference and must give the same integers.
//
// In place of vLLM's launch (`_eplb_map_and_record_i32_kernel`), so there is none more. What that one does beside
// choosing, this one does as well: it counts rows for the balancer. One block; its first warp chooses.
#include "rule.cuh"

namespace {

constexpr int COPIES = 8;                          // of an expert, that are looked at
constexpr int MAX_RANKS = 256, PASSES = 2;
constexpr unsigned HASH = 2654435769u;             // vLLM's: 2^32 over the golden ratio

struct Balancer {                                  // vLLM's tensors of the layer; it may change them between two steps
  const long long* copies;                         // [E][most_copies]: physical ids, then -1
  int most_copies;
  const long long* num_copies;                     // [E]
  int per_rank;                                    // physical experts of a rank
  int num_physical;
  int* load;                                       // [num_physical]: rows so far; added to
  const bool* records;                             // [1]: whether it counts now
  const int* num_unpadded;                         // [1]: rows that are no padding; null = all
};

struct Choice {
  int read_by[MAX_RANKS];                          // experts that a rank reads so far
  unsigned char num_copies[STRIDE];                // that are looked at; 0 = nobody reads the expert
  unsigned char rank[STRIDE][COPIES];
  signed char place[STRIDE];                       // of the copy that is read; -1 = none
};

__device__ __forceinline__ void load_copies(Choice& choice, const Balancer& balancer, const unsigned char* read) {
#pragma unroll 1
  for (int rank = threadIdx.x; rank < MAX_RANKS; rank += THREADS) choice.read_by[rank] = 0;
  __syncthreads();
#pragma unroll 1
  for (int v = threadIdx.x; v < STRIDE; v += THREADS) {
    const int count = v < E && read[v] ? min((int)balancer.num_copies[v], COPIES) : 0;
    choice.num_copies[v] = count;
    choice.place[v] = count == 1 ? 0 : -1;
#pragma unroll 1
    for (int copy = 0; copy < count; ++copy) {
      choice.rank[v][copy] = balancer.copies[v * balancer.most_copies + copy] / balancer.per_rank;
    }
    if (count == 1) atomicAdd(&choice.read_by[choice.rank[v][0]], 1);
  }
  __syncthreads();
}

// An expert goes to the copy whose rank reads the fewest without it; of equal ones its own stays, else the first. A
// lane has a copy.
__device__ __forceinline__ void place(Choice& choice, int v) {
  const int lane = threadIdx.x % 32, copy = min(lane, COPIES - 1), own = choice.place[v];
  const bool is_copy = lane < choice.num_copies[v], is_own = is_copy && lane == own;
  const int rank = is_copy ? choice.rank[v][copy] : 0;
  const int worth = 2 * (choice.read_by[rank] - is_own) + !is_own;
  const int best = __reduce_min_sync(ALL_LANES, is_copy ? worth * 32 + lane : 0x7fffffff) % 32;
  if (is_own) choice.read_by[rank] -= 1;
  __syncwarp();
  if (lane == best) choice.read_by[rank] += 1, choice.place[v] = lane;
  __syncwarp();
}

// By one warp.
__device__ __forceinline__ void choose_copies(Choice& choice) {
#pragma unroll 1
  for (int pass = 0; pass < PASSES; ++pass) {
#pragma unroll 1
    for (int first = 0; first < E; first += 32) {
      unsigned several = __ballot_sync(ALL_LANES, choice.num_copies[first + threadIdx.x % 32] > 1);
#pragma unroll 1
      for (; several; several &= several - 1) place(choice, first + __ffs(several) - 1);
    }
  }
}

}  // namespace

// physical, [num_rows][K]: written, -1 where ids names no expert. read, [E]: whether a row of any rank names the expert.
// One that nobody is said to name is mapped as vLLM does it, by a hash of the row: all of them in a step of which
// nothing is known.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
map_to_copies(const Id* ids, Id* physical, int num_rows, const unsigned char* read, const long long* copies,
              int most_copies, const long long* num_copies, int per_rank, int num_physical, int* load,
              const bool* records, const int* num_unpadded) {
  const Balancer balancer = {copies, most_copies, num_copies, per_rank, num_physical, load, records, num_unpadded};
  __shared__ Choice choice;
  wait_for_earlier_kernels();
  let_next_kernel_start();
  load_copies(choice, balancer, read);
  if (threadIdx.x < 32) choose_copies(choice);
  __syncthreads();
  const int counted = *records ? (num_unpadded ? min(*num_unpadded, num_rows) : num_rows) : 0;
#pragma unroll 1
  for (int index = threadIdx.x; index < num_rows * K; index += THREADS) {
    const Id id = ids[index];
    const int row = index / K;
    Id found = -1;
    if (id >= 0 && id < E) {
      int place = choice.place[id];
      if (place < 0) place = unsigned(row) * HASH % unsigned(max((int)balancer.num_copies[id], 1));
      found = balancer.copies[id * balancer.most_copies + place];
    }
    physical[index] = found;
    if (row < counted && found >= 0 && found < balancer.num_physical) atomicAdd(&balancer.load[found], 1);
  }
}
