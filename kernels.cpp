// y = x W^T for a few rows of x on a CPU: every weight is read once, at the speed of memory.
//
// A library's product of few rows leaves a third of the bandwidth unused: the processor's prefetcher does not follow it.
// Here a thread walks over blocks of weight rows and asks for the next block while it works on this one. Fused
// multiply-add in fp32 serves fp32, and bf16 while the product is bound by memory (up to 4 rows); beyond that bf16 needs
// the matrix unit of newer Intel processors (AMX). kernels.py builds this file for the processor it runs on.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t wide_vec __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_vec __attribute__((vector_size(2 * LANES)));

constexpr int FMA_ROWS_BF16 = 4;       // more rows of bf16 are bound by arithmetic
constexpr int FMA_ROWS_FP32 = 32;      // up to here faster than the library's product,
constexpr int FMA_ROWS_IN_CACHE = 2;   // or to here, where the weights fit a core's own cache:
constexpr int64_t IN_CACHE = 1 << 18;  // weights
constexpr int BLOCK = 4;               // weight rows at a time: as many streams as memory needs
constexpr int64_t WORK = 1 << 16;      // multiply-adds that are worth waking a thread for

inline vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline vec load(const at::BFloat16* p) {  // bf16 is the upper half of fp32
    half_vec half;
    std::memcpy(&half, p, sizeof half);
    wide_vec wide = __builtin_convertvector(half, wide_vec) << 16;
    vec v;
    std::memcpy(&v, &wide, sizeof v);
    return v;
}

inline float sum(vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// y[g, n] for BLOCK weight rows n and G rows of x; fetches the weights `ahead` elements on.
template <int G, typename W>
inline void fma_block(const W* w, const float* x, W* y, int64_t N, int64_t K, int64_t ahead) {
    vec acc[BLOCK][G] = {};
    for (int64_t k = 0; k < K; k += LANES) {
        vec xs[G];
        for (int g = 0; g < G; g++) xs[g] = load(x + g * K + k);
        for (int r = 0; r < BLOCK; r++) {
            if (ahead) __builtin_prefetch(w + r * K + k + ahead);
            vec row = load(w + r * K + k);
            for (int g = 0; g < G; g++) acc[r][g] += row * xs[g];
        }
    }
    for (int g = 0; g < G; g++)
        for (int r = 0; r < BLOCK; r++) y[g * N + r] = sum(acc[r][g]);
}

template <typename W>
void fma_linear(const W* w, const float* x, W* y, int64_t T, int64_t N, int64_t K) {
    at::parallel_for(0, N / BLOCK, std::max<int64_t>(1, WORK / (BLOCK * K * T)), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin * BLOCK; n < end * BLOCK; n += BLOCK) {
            int64_t t = 0, ahead = BLOCK * K;  // only the first pass over the block comes from memory
            for (; t + 4 <= T; t += 4, ahead = 0) fma_block<4>(w + n * K, x + t * K, y + t * N + n, N, K, ahead);
            if (T - t == 3) fma_block<3>(w + n * K, x + t * K, y + t * N + n, N, K, ahead);
            if (T - t == 2) fma_block<2>(w + n * K, x + t * K, y + t * N + n, N, K, ahead);
            if (T - t == 1) fma_block<1>(w + n * K, x + t * K, y + t * N + n, N, K, ahead);
        }
    });
}

#if HAS_AMX
// A tile is 16 rows of 64 bytes. A: 16 weight rows x 32, as they lie in memory; B: 32 x 16 rows of x, in pairs of k;
// C: 16 weight rows x 16 rows of x in fp32.
struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool may_use_amx() {  // the kernel grants the tile registers on request
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted;
}

// x (T, K) as B tiles [K / 32][TILES][16 pairs of k][16 rows of x][2], zeros beyond T.
template <int TILES>
std::vector<at::BFloat16> pack_rows(const at::BFloat16* x, int64_t T, int64_t K) {
    std::vector<at::BFloat16> packed(K * 16 * TILES);
    auto to = reinterpret_cast<uint32_t*>(packed.data());
    auto from = reinterpret_cast<const uint32_t*>(x);
    at::parallel_for(0, K / 32, std::max<int64_t>(1, 4096 / T), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; block++)
            for (int64_t t = 0; t < T; t++)
                for (int64_t pair = 0; pair < 16; pair++)
                    to[((block * TILES + t / 16) * 16 + pair) * 16 + t % 16] = from[t * K / 2 + block * 16 + pair];
    });
    return packed;
}

// c[tile][16 weight rows][16 rows of x] for 16 weight rows.
template <int TILES>
inline void amx_block(const at::BFloat16* w, const at::BFloat16* x, float* c, int64_t K) {
    _tile_zero(0);
    if constexpr (TILES > 1) _tile_zero(1);
    if constexpr (TILES > 2) _tile_zero(2);
    if constexpr (TILES > 3) _tile_zero(3);
    for (int64_t k = 0; k < K; k += 32, x += 512 * TILES) {
        for (int r = 0; r < 16; r++) _mm_prefetch((const char*)(w + (16 + r) * K + k), _MM_HINT_T1);
        _tile_loadd(4, w + k, K * 2);
        _tile_loadd(5, x, 64);
        _tile_dpbf16ps(0, 4, 5);
        // (tile numbers must be literals)
        if constexpr (TILES > 1) { _tile_loadd(6, x + 512, 64); _tile_dpbf16ps(1, 4, 6); }
        if constexpr (TILES > 2) { _tile_loadd(5, x + 1024, 64); _tile_dpbf16ps(2, 4, 5); }
        if constexpr (TILES > 3) { _tile_loadd(6, x + 1536, 64); _tile_dpbf16ps(3, 4, 6); }
    }
    _tile_stored(0, c, 64);
    if constexpr (TILES > 1) _tile_stored(1, c + 256, 64);
    if constexpr (TILES > 2) _tile_stored(2, c + 512, 64);
    if constexpr (TILES > 3) _tile_stored(3, c + 768, 64);
}

template <int TILES>
void amx_linear(const at::BFloat16* w, const at::BFloat16* x, at::BFloat16* y, int64_t T, int64_t N, int64_t K) {
    auto packed = pack_rows<TILES>(x, T, K);
    at::parallel_for(0, N / 16, std::max<int64_t>(1, WORK / (16 * K)), [&](int64_t begin, int64_t end) {
        TileConfig config;
        _tile_loadconfig(&config);
        alignas(64) float c[TILES * 256];
        for (int64_t n = begin * 16; n < end * 16; n += 16) {
            amx_block<TILES>(w + n * K, packed.data(), c, K);
            for (int64_t t = 0; t < T; t++)
                for (int r = 0; r < 16; r++) y[t * N + n + r] = c[t / 16 * 256 + r * 16 + t % 16];
        }
        _tile_release();
    });
}
#else
bool may_use_amx() { return false; }
#endif

// The most rows of x that `linear` takes of a product with N x K weights of this type; 0: leave it to the library.
int64_t most_rows(at::ScalarType dtype, int64_t N, int64_t K) {
    if (dtype == at::kBFloat16 && N % 16 == 0 && K % 32 == 0 && may_use_amx()) return 64;
    if (N % BLOCK || K % LANES) return 0;
    if (dtype == at::kFloat) return N * K > IN_CACHE ? FMA_ROWS_FP32 : FMA_ROWS_IN_CACHE;
    return dtype == at::kBFloat16 ? FMA_ROWS_BF16 : 0;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight) {
    const int64_t N = weight.size(0), K = weight.size(1), T = x.numel() / K;
    TORCH_CHECK(x.size(-1) == K && x.scalar_type() == weight.scalar_type() && weight.is_contiguous(),
                "linear: x and weight must have the same type and K, and the weight must be contiguous");
    TORCH_CHECK(T > 0 && T <= most_rows(weight.scalar_type(), N, K), "linear: ", T, " rows of ", N, " x ", K, " are not for it");
    auto shape = x.sizes().vec();
    shape.back() = N;
    at::Tensor y = at::empty(shape, x.options()), rows = x.contiguous();
    if (weight.scalar_type() == at::kFloat) {
        fma_linear(weight.const_data_ptr<float>(), rows.const_data_ptr<float>(), y.data_ptr<float>(), T, N, K);
        return y;
    }
    auto w = weight.const_data_ptr<at::BFloat16>();
    auto out = y.data_ptr<at::BFloat16>();
    if (T <= FMA_ROWS_BF16 && K % LANES == 0) {
        at::Tensor wide = rows.to(at::kFloat);
        fma_linear(w, wide.const_data_ptr<float>(), out, T, N, K);
        return y;
    }
#if HAS_AMX
    auto in = rows.const_data_ptr<at::BFloat16>();
    if (T <= 16) amx_linear<1>(w, in, out, T, N, K);
    else if (T <= 32) amx_linear<2>(w, in, out, T, N, K);
    else if (T <= 48) amx_linear<3>(w, in, out, T, N, K);
    else amx_linear<4>(w, in, out, T, N, K);
#endif
    return y;
}

}  // namespace

TORCH_LIBRARY(judge_fast, library) {
    library.def("linear(Tensor x, Tensor weight) -> Tensor", {at::Tag::pt2_compliant_tag});
    library.def("most_rows(ScalarType dtype, int N, int K) -> int");
    library.impl("most_rows", &most_rows);
}

TORCH_LIBRARY_IMPL(judge_fast, CPU, library) { library.impl("linear", &linear); }
