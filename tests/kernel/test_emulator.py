"""The emulator itself: what a kernel's tests rely on it to compute and to catch."""

import numpy as np
import pytest
import torch

from . import emulator
from .emulator import KernelError, compile_for_cpu, launch

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")

SOURCE = r"""
constexpr unsigned FULL = 0xffffffff;

template <int N> __device__ __forceinline__ int sum_of_warps(int value) {
    __shared__ int partial[N];
    for (int by = 16; by > 0; by /= 2) value += __shfl_down_sync(FULL, value, by);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    int sum = 0;
    for (int warp = 0; warp < N; warp++) sum += partial[warp];
    __syncthreads();
    return sum;
}

extern "C" __global__ void __launch_bounds__(32 * (WARPS))
    block_sum(const int* __restrict__ in, int* __restrict__ out, int scale) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    const int first = sum_of_warps<WARPS>(__ldg(in + at));
    const int second = sum_of_warps<WARPS>(in[at] * scale);
    if (threadIdx.x == 0) reinterpret_cast<int2*>(out)[blockIdx.x] = make_int2(first, second);
}

extern "C" __global__ void shuffles(const float* in, float* out, int width) {
    const float value = in[threadIdx.x];
    out[threadIdx.x] = __shfl_sync(FULL, value, 3, width);
    out[32 + threadIdx.x] = __shfl_up_sync(FULL, value, 2, width);
    out[64 + threadIdx.x] = __shfl_down_sync(FULL, value, 2, width);
    out[96 + threadIdx.x] = __shfl_xor_sync(FULL, value, 5, width);
}

extern "C" __global__ void votes(const int* in, unsigned* out) {
    const int value = in[threadIdx.x];
    unsigned* mine = out + 7 * threadIdx.x;
    mine[0] = __ballot_sync(FULL, value > 1);
    mine[1] = __any_sync(FULL, value > 1) + 2 * __any_sync(FULL, value > 9);
    mine[2] = __all_sync(FULL, value > 1) + 2 * __all_sync(FULL, value > -9);
    mine[3] = __reduce_min_sync(FULL, value);
    mine[4] = __reduce_max_sync(FULL, unsigned(value));
    mine[5] = __reduce_add_sync(FULL, value);
    mine[6] = __match_any_sync(FULL, value);
}

extern "C" __global__ void rounds(const int* until, int* out) {
    int round = 0;
    while (__syncthreads_or(round < until[threadIdx.x])) ++round;
    out[blockIdx.x * blockDim.x + threadIdx.x] = round;
}

extern "C" __global__ void bits(unsigned* out) {
    out[0] = __popc(0xf0f0u);
    out[1] = __ffs(0) * 100 + __ffs(0x50);
    out[2] = __clz(0) * 100 + __clz(1);
    out[3] = min(3, -4) + max(5u, 7);
}

extern "C" __global__ void atomics(int* least, unsigned* most, unsigned long long* sum,
                                   unsigned* seen, int* last_block) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    atomicMin(least, -at);
    atomicMax(most, at);
    atomicAdd(sum, 1ull << 40);
    atomicOr(seen, 1u << threadIdx.x);
    if (threadIdx.x == 0 && atomicAdd(last_block, 1) == gridDim.x - 1) *last_block = -1;
}

extern "C" __global__ void neighbour(int* out, int with_barrier) {
    __shared__ int shared[64];
    shared[threadIdx.x] = threadIdx.x;
    if (with_barrier) __syncthreads();
    out[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}

extern "C" __global__ void last_writer(int* out) { *out = threadIdx.x; }

extern "C" __global__ void leftover(int* out) {
    __shared__ int shared[2];
    out[blockIdx.x] = shared[0];
    shared[0] = 1;
}

extern "C" __global__ void cluster_sum(int* out, int how) {
    __shared__ int shared[32];
    const int rank = __clusterRelativeBlockRank();
    shared[threadIdx.x] = blockIdx.x * 32 + threadIdx.x;
    int* first = static_cast<int*>(__cluster_map_shared_rank(shared, how == 1 ? 9 : 0));
    if (how == 2 && rank == 1) return;
    if (how != 3) { __cluster_barrier_arrive(); __cluster_barrier_wait(); }
    if (rank) atomicAdd(&first[threadIdx.x], shared[threadIdx.x]);
    if (how == 4 && rank == 1) __cluster_barrier_wait();
    else if (how != 5) __cluster_barrier_wait();
    out[blockIdx.x * 32 + threadIdx.x] = how == 5 ? first[threadIdx.x] : shared[threadIdx.x];
    if (how == 6) __cluster_map_shared_rank(out, 0);
}

extern "C" __global__ void diverge(int* out, int how) {
    if (how == 0 && threadIdx.x >= 32) return;
    if (how == 1 && threadIdx.x == 5) __syncthreads();
    if (how == 2 && threadIdx.x < 32) __syncthreads();
    if (how == 3) __syncwarp(0xff);
    if (how == 4 && threadIdx.x == 5) __trap();
    if (how == 5 && threadIdx.x % 2) __shfl_sync(FULL, 1, 0);
    __syncwarp();
    __syncthreads();
    out[threadIdx.x] = 1;
}

extern "C" __global__ void sanitized(int* out, int index, int shift) {
    __shared__ int shared[8];
    shared[index] = 1;
    *out = 1 << shift;
}

extern "C" __global__ void half_warps_exit(int* out) {
    if (threadIdx.x % 32 >= 16) return;
    out[threadIdx.x] = __reduce_add_sync(FULL, 1);
}

extern "C" __global__ void waits(int* out, int times) {
    __shared__ int shared[1024];
    for (int i = 0; i < times; i++) {
        shared[threadIdx.x] = i;
        __syncthreads();
        out[threadIdx.x] += __reduce_max_sync(FULL, shared[threadIdx.x]);
    }
}
"""
SEEDS = range(4)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulator") / "kernels.cu"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module", params=["own switch", "ucontext"])
def library(request, source):
    """Both ways to change between fibers, as only one of them runs on this architecture."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "ucontext":
            patch.setattr(emulator, "FLAGS", (*emulator.FLAGS, "-DCUDA_ON_CPU_UCONTEXT"))
        return compile_for_cpu(source, {"WARPS": 3}, source.parent)


@pytest.mark.parametrize("seed", SEEDS)
def test_block_sum_with_barriers(library, seed):
    values = torch.arange(4 * 96, dtype=torch.int32)
    out = torch.zeros(4, 2, dtype=torch.int32)
    launch(library, "block_sum", values, out, -3, threads=96, blocks=4, seed=seed)
    sums = values.view(4, 96).sum(dim=1)
    assert out.tolist() == torch.stack((sums, -3 * sums), dim=1).tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_of_a_cluster_share(library, seed):
    """Each has shared memory of its own; the first one's collects that of the others."""
    out = torch.zeros(2, 4, 32, dtype=torch.int32)
    launch(library, "cluster_sum", out, 0, threads=32, blocks=2, cluster=4, seed=seed)
    own = torch.arange(2 * 4 * 32, dtype=torch.int32).view(2, 4, 32)
    assert torch.equal(out[:, 0], own.sum(dim=1).int())
    assert torch.equal(out[:, 1:], own[:, 1:])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (1, "no such block in the cluster"),
        (2, "divergence"),  # a block has ended
        (4, "divergence"),  # blocks wait at different places
        (6, "not an own address in shared memory"),
    ],
)
def test_wrong_use_of_a_cluster_is_reported(library, how, message):
    with pytest.raises(KernelError, match=message):
        launch(library, "cluster_sum", torch.zeros(64).int(), how, threads=32, cluster=2)


@pytest.mark.parametrize("how", [3, 5])  # a block has not begun; it may have ended
def test_a_missing_barrier_of_a_cluster_shows(library, how):
    found = set()
    for seed in range(8):
        out = torch.zeros(4 * 32, dtype=torch.int32)
        launch(library, "cluster_sum", out, how, threads=32, cluster=4, seed=seed)
        found.add(tuple(out.tolist()))
    assert len(found) > 1


@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("seed", SEEDS)
def test_shuffles(library, width, seed):
    values = np.random.default_rng(0).random(32, dtype=np.float32)
    out = np.zeros((4, 32), dtype=np.float32)
    launch(library, "shuffles", values, out, width, threads=32, seed=seed)
    lane = np.arange(32)
    place, first = lane % width, lane - lane % width
    sources = (
        first + 3,
        np.where(place >= 2, lane - 2, lane),
        np.where(place + 2 < width, lane + 2, lane),
        lane ^ 5,
    )
    np.testing.assert_array_equal(out, values[np.stack(sources)])


@pytest.mark.parametrize("seed", SEEDS)
def test_votes_and_reductions(library, seed):
    values = np.random.default_rng(0).integers(-3, 4, 64).astype(np.int32)
    out = np.zeros((64, 7), dtype=np.uint32)
    launch(library, "votes", values, out, threads=64, seed=seed)
    for thread, row in enumerate(out):
        warp = values[thread // 32 * 32 :][:32]
        assert row.tolist() == [
            sum(1 << lane for lane in range(32) if warp[lane] > 1),
            1,
            2,
            warp.min().astype(np.uint32),
            warp.astype(np.uint32).max(),
            warp.sum().astype(np.uint32),
            sum(1 << lane for lane in range(32) if warp[lane] == values[thread]),
        ]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rounds_of_a_block_end_with_its_last_thread(library, seed):
    until = torch.zeros(64, dtype=torch.int32)
    until[37], until[5] = 4, 2
    out = torch.full((2, 64), -1, dtype=torch.int32)
    launch(library, "rounds", until, out, threads=64, blocks=2, seed=seed)
    assert (out == 4).all()


def test_bits(library):
    out = np.zeros(4, dtype=np.uint32)
    launch(library, "bits", out, threads=1)
    assert out.tolist() == [8, 5, 3231, 3]


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics(library, seed):
    least, last_block = np.zeros(1, np.int32), np.zeros(1, np.int32)
    most, seen = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    total = np.zeros(1, np.uint64)
    arrays = (least, most, total, seen, last_block)
    launch(library, "atomics", *arrays, threads=20, blocks=3, seed=seed)
    assert [int(array[0]) for array in arrays] == [-59, 59, 60 << 40, (1 << 20) - 1, -1]


def test_missing_barrier_shows(library):
    """A thread either reads what nobody has written yet or depends on the order."""
    right = np.roll(np.arange(64), -1)
    out = np.zeros(64, dtype=np.int32)
    for seed in SEEDS:
        launch(library, "neighbour", out, True, threads=64, seed=seed)
        np.testing.assert_array_equal(out, right)
        launch(library, "neighbour", out, False, threads=64, seed=seed)
        assert (out != right).any()


def test_race_depends_on_the_seed_and_on_nothing_else(library):
    def results():
        out = np.zeros(len(SEEDS), dtype=np.int32)
        for seed in SEEDS:
            launch(library, "last_writer", out[seed:], threads=64, seed=seed)
        return out.tolist()

    assert len(set(results())) > 1
    assert results() == results()
    assert results()[0] == 63, "seed 0 is the natural order"


def test_shared_memory_is_poisoned(library):
    out = np.zeros(2, dtype=np.uint32)
    for _ in range(2):
        launch(library, "leftover", out, threads=1, blocks=2)
        assert out.tolist() == [0xA5A5A5A5, 0xA5A5A5A5]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (0, ["divergence", "__syncthreads", "the kernel's end"]),
        (1, ["divergence", "thread 5 at __syncthreads", "__syncwarp"]),
        (2, ["divergence", "thread 32 at __syncthreads"]),
        (3, ["mask that is not full"]),
        (4, ["thread 5 of block 0", "__trap"]),
        (5, ["divergence", "__shfl_sync", "__syncwarp"]),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_divergence_is_an_error(library, how, words, seed, has_words):
    out = np.zeros(64, dtype=np.int32)
    with pytest.raises(KernelError) as error:
        launch(library, "diverge", out, how, threads=64, seed=seed)
    has_words(str(error.value), "diverge:", "line", *words)
    assert not out.any()
    launch(library, "diverge", out, -1, threads=64, seed=seed)
    assert out.all(), "an error leaves nothing behind"


def test_undefined_behaviour_is_an_error(library):
    out = np.zeros(1, dtype=np.int32)
    launch(library, "sanitized", out, 7, 31, threads=1)
    with pytest.raises(KernelError, match="index out of bounds in line"):
        launch(library, "sanitized", out, 8, 31, threads=1)
    with pytest.raises(KernelError, match="shift out of range in line"):
        launch(library, "sanitized", out, 7, 32, threads=1)


def test_lanes_that_ended_take_no_part(library):
    out = np.zeros(64, dtype=np.int32)
    launch(library, "half_warps_exit", out, threads=64)
    assert out.reshape(4, 16).tolist() == [[16] * 16, [0] * 16] * 2


def test_most_threads_and_many_waits(library):
    out = np.zeros(1024, dtype=np.int32)
    launch(library, "waits", out, 100, threads=1024, seed=1)
    assert set(out) == {sum(range(100))}


def test_wrong_launches_are_refused(library):
    array = np.zeros((2, 2), dtype=np.int32)
    with pytest.raises(KernelError, match="arguments are P, the kernel takes Pq"):
        launch(library, "waits", array, threads=1)
    with pytest.raises(KernelError, match="arguments are Pd, the kernel takes Pq"):
        launch(library, "waits", array, 1.0, threads=1)
    with pytest.raises(KernelError, match="1025 threads"):
        launch(library, "waits", array, 1, threads=1025)
    with pytest.raises(ValueError, match="contiguous"):
        launch(library, "waits", array[:, 0], 1, threads=1)
    with pytest.raises(ValueError, match="contiguous"):
        launch(library, "waits", torch.from_numpy(array).T, 1, threads=1)


def test_compiles_once_for_the_same_macros(source, tmp_path):
    for warps in (1, 2, 1):
        library = compile_for_cpu(source, {"WARPS": warps}, tmp_path)
        values = np.ones(32 * warps, dtype=np.int32)
        out = np.zeros(2, dtype=np.int32)
        launch(library, "block_sum", values, out, 2, threads=32 * warps)
        assert out.tolist() == [32 * warps, 64 * warps]
    assert len(list(tmp_path.iterdir())) == 2


def test_compiler_error_names_the_line(tmp_path):
    broken = tmp_path / "broken.cu"
    broken.write_text("\nthis is no code\n")
    with pytest.raises(KernelError, match=r"broken\.cu:2"):
        compile_for_cpu(broken, {}, tmp_path)
