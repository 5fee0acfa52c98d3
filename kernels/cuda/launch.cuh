// What a launch reads and shares: settings, rows, slots, and what learned masks leave of them. No framework header:
// sere_ray/kernel/compiler.py compiles the .cu files beside this one at run time, with these constants:
//   E        experts of the layer, at most 1,024
//   K        slots of a row, at most 32
//   THREADS  threads of the block, a multiple of 32
//   ID64     1 = topk_ids is int64, 0 = int32
//   MAX_ROWS most rows of a kernel that sorts
//   MASKS    1 = learned masks may come before the rule: of reroute.cu and route.cu
//
// Everything that may change between two steps (settings, row kinds) is read from device memory,
// so a captured CUDA graph follows it. Nothing here allocates or waits for the host.
#pragma once

#if ID64
typedef long long Id;
#else
typedef int Id;
#endif

namespace {

constexpr int PADDING = 0, REROUTABLE = 1, EXACT = 2;  // row kinds
constexpr int KIND_BITS = 2, KIND_MASK = 3;        // of a byte of row_kind; above them the row's discount
constexpr int WEIGHT_UNIT = 32;                    // weight of a row without one
constexpr int OFF = 0, OBSERVE = 1;                // modes; 2 = on
constexpr int SERE = 0, MARGIN = 1, SPARE = 2;     // rules. See margin.cuh and spare.cuh
constexpr int ANY_DEMAND = 0x7fffffff;             // of Settings::most: nobody knows what is too much
constexpr int ALL_KEPT = 0, FIRST_KEPT = 2;        // of Settings::masks; 1 = a row may lose its first choice, too
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr unsigned ALL_SLOTS = ALL_LANES >> (32 - K);  // the lanes of a row that hold its slots

__device__ constexpr int ceil_pow2(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

constexpr int WARPS = THREADS / 32;
constexpr int GROUP = ceil_pow2(K);                // lanes of a row; K of them hold a slot
constexpr int PER_LANE = ceil_pow2((E + 31) / 32); // experts of a lane: lane * PER_LANE + j
constexpr int STRIDE = 32 * PER_LANE;              // E, padded
constexpr int NOT_LEFT = K;                        // slot order of an expert that only masked slots name
constexpr int PER_WARP = (E + WARPS - 1) / WARPS;  // experts a warp finds stand-ins for: warp + i * WARPS

#if E <= 256
typedef unsigned char Expert;
#else
typedef unsigned short Expert;
#endif
constexpr int NEAR = E > 512 ? 0 : E > 256 ? 32 : STRIDE < 128 ? STRIDE : 128;  // neighbours in shared memory

struct __align__(16) Settings {                    // of one layer, written by the host between two steps
  int mode;
  int rule;
  int select_top_k;                                // S, 1..K; K = the identity
  int min_primary_experts;                         // m, 0..E
  int has_threshold;
  float threshold;                                 // rho
  int tau;                                         // of margin and spare, as is what follows: in units of demand
  int runners_up;
  float beta, fill;                                // of margin alone
  int merges;                                      // step 7: slots that repeat an expert of their row become -1
  signed char protect;                             // whether every row keeps its first choice
  signed char guard;                               // whether a step that gives up more than `most` stays exact
  signed char balances;                            // of margin: tau is of the busiest rank, see kept.cuh
  signed char masks;                               // what learned masks do: see below
  float lead, share;                               // what demand is made of; they add up to 1
  float limit;                                     // of spare: most that a stand-in may leave over
  int most;                                        // of margin and spare: the most demand that calibration gave up
};

struct __align__(16) Step {                        // written by the host before every step
  int num_rows;                                    // rows beyond it are padding
  int num_reroutable;                              // 0: nothing to do in this step
  int counter_row;                                 // decode-only and mixed steps are counted apart
  int own_begin, own_end;                          // rows whose slots are counted; others are other ranks'
  int unused[3];
};

// What a launch can know before the earlier kernel is done: all that no kernel writes.
struct Start {
  Settings settings;
  Step step;
  bool has_work;
};

struct Slot {
  Id id;
  float weight;
  int kind;
  bool valid;
  int discount = 0;                                // of a draft's demand, in parts of WEIGHT_UNIT
  bool masked = false;                             // by a learned mask: then it is not valid, and id is the gate's
};

struct Shared {
  union {
    __align__(16) Expert near[NEAR ? E : 1][NEAR ? NEAR : 1];  // the starts of Arguments::neighbours; after that:
    struct {                                       // of a slot
      unsigned short place[MAX_ROWS * K];          // among those of its expert
      unsigned short expert[MAX_ROWS * K];         // of margin: which that is; E = none
    };
  };
  union {
    int lowest_order[STRIDE];                      // best slot order any row gives the expert, NOT_LEFT and above = none
    int fate[STRIDE];                              // of spare, as is factor: see there
  };
  float factor[STRIDE];                            // of the weight of a slot that goes to a stand-in
  union {
    int target[STRIDE];                            // where a slot that names the expert goes
    int demand[STRIDE];                            // of margin and spare
  };
  union {
    int is_read[STRIDE];                           // is it read after the rule
    int wanted[STRIDE];                            // of demand: from all blocks, see wanted_of()
  };
  int is_beyond;                                   // of spare: what guard() has found
};

struct StandInOf {
  float loss, scale;                               // what it leaves over, and the factor that fits best
};

struct Arguments {
  const Id* ids;                                 // [num_rows][K]
  Id* new_ids;                                   // may be ids: every slot is read before it is written
  float* weights;                                  // [num_rows][K]; but for sere changed in place
  int num_rows;
  const Expert* neighbours;                        // [E][STRIDE]: of each expert all, most similar first
  const float* similarity;                         // [E][E], read only under a threshold
  const Expert* stand_ins;                         // [E][STRIDE]: of each expert all, what leaves the least over first
  const StandInOf* stand_in_of;                    // [E][STRIDE], in that order. Both are read by spare alone
  const Settings* settings;
  const Step* step;
  const signed char* row_kind;                     // [num_rows], see KIND_BITS
  unsigned long long* counters;                    // six of this layer, with MASKS seven; of the other counter row
  int counter_stride;                              // this many further on
#if MASKS
  const void* mask_logits;                         // [num_rows][E]: an expert whose number is below 0 is masked
  int mask_bytes;                                  // 4 = float32, 2 = bfloat16
#endif
};

// Before this returns, nothing that an earlier kernel of the stream writes may be touched.
// Inputs of the rule that no kernel writes are fetched before it, while the earlier one still runs.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel of the stream may be launched, if it waits for this one to end before it reads.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ Slot load_slot(const Arguments& a, const Step& step, int row, int slot) {
  Slot s = {-1, 0.0f, PADDING, false};
  if (row < a.num_rows && slot < K) {
    s.id = a.ids[row * K + slot];
    s.weight = a.weights[row * K + slot];
    const int kind = a.row_kind[row];              // not only where row < num_rows: both loads at once
    s.kind = row < step.num_rows ? kind & KIND_MASK : PADDING;
    s.discount = kind >> KIND_BITS;
    s.valid = s.id >= 0 && s.id < E;
  }
  return s;
}

__device__ __forceinline__ float to_float(unsigned short bits) { return __uint_as_float(unsigned(bits) << 16); }
__device__ __forceinline__ float to_float(float value) { return value; }

// Whether masks are in force. Otherwise every slot is left.
__device__ __forceinline__ bool has_masks(const Start& start) {
  return MASKS && start.has_work && start.settings.masks != ALL_KEPT;
}

#if MASKS
__device__ __forceinline__ bool is_masked(const Arguments& a, int row, int expert) {
  const int at = row * E + expert;
  return !((a.mask_bytes == 4 ? static_cast<const float*>(a.mask_logits)[at]
                              : to_float(static_cast<const unsigned short*>(a.mask_logits)[at])) >= 0);
}

// Of a row's slots, by its lanes, which are neighbours, the first of largest weight.
__device__ __forceinline__ int first_choice(const Slot& s, int slot) {
  const float weight = slot < K ? s.weight : __int_as_float(0xff800000);  // less than any
  float most = weight;
#pragma unroll
  for (int mask = GROUP / 2; mask > 0; mask /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, mask, GROUP));
  return __ffs(__ballot_sync(ALL_LANES, weight == most) >> threadIdx.x % 32 / GROUP * GROUP) - 1;
}
#endif

// The same, a masked slot not valid any more; sere_ray/masks/slots.py is the reference. All lanes of a row are here. A
// row that no rule may change keeps its slots.
__device__ __forceinline__ Slot load_left(const Arguments& a, const Start& start, int row, int slot) {
  Slot s = load_slot(a, start.step, row, slot);
#if MASKS
  if (!has_masks(start)) return s;
  const unsigned changeable = __ballot_sync(ALL_LANES, s.valid && s.kind == REROUTABLE);
  const bool changes = (changeable >> threadIdx.x % 32 / GROUP * GROUP & ALL_SLOTS) == ALL_SLOTS;
  const bool stays = start.settings.masks == FIRST_KEPT && first_choice(s, slot) == slot;
  s.masked = changes && slot < K && !stays && is_masked(a, row, int(s.id));
  s.valid &= !s.masked;
#endif
  return s;
}

}  // namespace
