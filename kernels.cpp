// y = x W^T for a few rows of x on a CPU: every weight is read once, at the speed of memory.
//
// A library's product of few rows leaves a third of the bandwidth unused: the processor's prefetcher does not follow it.
// Here a thread walks over blocks of weight rows and asks for the next block while it works on this one. Weights of any
// format become fp32 in registers. Fused multiply-add in fp32 serves few rows, which are bound by memory; for more rows
// of bf16 the matrix unit of newer Intel processors (AMX) is needed. kernels.py builds this file for the processor it
// runs on, and says what is in a quantised weight.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
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
typedef int8_t byte_vec __attribute__((vector_size(LANES)));
typedef uint8_t ubyte_vec __attribute__((vector_size(LANES)));

constexpr int FMA_ROWS_BF16 = 4;       // more rows of bf16 are bound by arithmetic
constexpr int FMA_ROWS_FP32 = 32;      // up to here faster than the library's product,
constexpr int FMA_ROWS_IN_CACHE = 2;   // or to here, where the weights fit a core's own cache:
constexpr int64_t IN_CACHE = 1 << 18;  // weights
constexpr int AMX_ROWS = 64;
constexpr int BLOCK = 4;               // weight rows at a time: as many streams as memory needs
constexpr int64_t WORK = 1 << 16;      // multiply-adds that are worth waking a thread for
constexpr int64_t LINE = 64;           // bytes that memory gives at once

template <typename To, typename From>
inline To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <typename V>
inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// LANES bytes as 32-bit numbers
inline wide_vec widen(const uint8_t* p) {
#if defined(__AVX512F__)  // which compilers do not find by themselves
    return (wide_vec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#else
    return __builtin_convertvector(load<ubyte_vec>(p), wide_vec);
#endif
}

// LANES signed bytes as fp32
inline vec widen(const int8_t* p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
    return __builtin_convertvector(load<byte_vec>(p), vec);
#endif
}

inline float sum(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

// ---- What weights may be made of. row(n).span(k): SPAN weights of row n from k on, given LANES at a time in fp32; row(n).at(k):
// where a weight lies, PER_LINE of them in a line of memory; scale(n): of the whole row.

template <typename T, typename Span>
struct PlainRow {
    const T* p;
    const T* at(int64_t k) const { return p + k; }
    Span span(int64_t k) const { return {p + k}; }
};

struct Fp32 {
    const float* w;
    int64_t K;
    static constexpr int SPAN = LANES, PER_LINE = LINE / 4;
    struct Span {
        const float* p;
        vec get(int i) const { return load<vec>(p + i); }
    };
    using Row = PlainRow<float, Span>;
    Row row(int64_t n) const { return {w + n * K}; }
    float scale(int64_t) const { return 1; }
};

struct Bf16 {
    const at::BFloat16* w;
    int64_t K;
    static constexpr int SPAN = LANES, PER_LINE = LINE / 2;
    struct Span {
        const at::BFloat16* p;
        vec get(int i) const {  // the upper half of fp32
            return bits<vec>(__builtin_convertvector(load<half_vec>(p + i), wide_vec) << 16);
        }
    };
    using Row = PlainRow<at::BFloat16, Span>;
    Row row(int64_t n) const { return {w + n * K}; }
    float scale(int64_t) const { return 1; }
};

struct Int8 {
    const int8_t* w;
    const float* scales;
    int64_t K;
    static constexpr int SPAN = 32, PER_LINE = LINE;
    struct Span {
        const int8_t* p;
        vec get(int i) const { return widen(p + i); }
    };
    using Row = PlainRow<int8_t, Span>;
    Row row(int64_t n) const { return {w + n * K}; }
    float scale(int64_t n) const { return scales[n]; }
};

struct Fp8 {  // e4m3
    const uint8_t* w;
    const float* scales;
    int64_t K;
    static constexpr int SPAN = 32, PER_LINE = LINE;
    struct Span {
        const uint8_t* p;
        vec get(int i) const {
#if defined(__AVX512F__)  // moved to the places of fp16 its exponent is 8 too small, which `scale` makes up for
            __m256i b = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(p + i))), 8);
            return (vec)_mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(b, 1), _mm256_set1_epi16(short(0xbfff))));
#else  // moved to those of fp32, 120
            wide_vec b = widen(p + i);
            return bits<vec>((b & 0x80) << 24 | (b & 0x7f) << 20) * 0x1p112f;
#endif
        }
    };
    using Row = PlainRow<uint8_t, Span>;
    Row row(int64_t n) const { return {w + n * K}; }
    float scale(int64_t n) const { return scales[n] * 0x1p8f; }
};

struct Int4 {  // of each 32 weights the first 16 lie in the lower, the others in the upper halves of 16 bytes
    const uint8_t* w;
    const uint32_t* pairs;  // (N, K >> shift), shift: log2 of the group: bf16 scale (lower half) and offset
    int64_t K, shift;       // a weight is q * scale + offset
    static constexpr int SPAN = 32, PER_LINE = 2 * LINE;
#if defined(__AVX512F__)
    struct Span {
        wide_vec q;
        vec table;  // the 16 values; a look-up heeds the lowest 4 bits of q alone
        vec get(int i) const { return (vec)_mm512_permutexvar_ps((__m512i)(q >> (i ? 4 : 0)), (__m512)table); }
    };
    static Span make(const uint8_t* p, vec scale, vec offset) {
        return {widen(p), vec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * scale + offset};
    }
#else
    struct Span {
        const uint8_t* p;
        vec scale, offset;
        vec get(int i) const {
            return __builtin_convertvector((widen(p + i % 16) >> (i < 16 ? 0 : 4)) & 15, vec) * scale + offset;
        }
    };
    static Span make(const uint8_t* p, vec scale, vec offset) { return {p, scale, offset}; }
#endif
    struct Row {
        const uint8_t* p;
        const uint32_t* pairs;
        int64_t shift;
        const uint8_t* at(int64_t k) const { return p + (k >> 1); }
        Span span(int64_t k) const {
#if defined(__AVX512F__)  // the broadcast in memory's port, not in the one that looks up
            const __m512i pair = _mm512_set1_epi32(int(pairs[k >> shift]));
            return make(at(k), (vec)_mm512_slli_epi32(pair, 16), (vec)_mm512_and_si512(pair, _mm512_set1_epi32(0xffff0000)));
#else
            const wide_vec pair = wide_vec{} + pairs[k >> shift];
            return make(at(k), bits<vec>(pair << 16), bits<vec>(pair & 0xffff0000u));
#endif
        }
    };
    Row row(int64_t n) const { return {w + n * (K >> 1), pairs + n * (K >> shift), shift}; }
    float scale(int64_t) const { return 1; }
};

// ---- Fused multiply-add in fp32

// Weight rows between those that are worked on, `block` of them at a time, and those that are fetched: for narrow weights
// more, so that the bytes on their way are as many.
template <typename Format>
constexpr int64_t ahead(int block) {
    return block * std::max(1, Format::PER_LINE / 32);
}

template <typename Row>
inline void fetch(const Row& row, int64_t k) {
    __builtin_prefetch(row.at(k));
}

inline void fetch(const Int4::Row& row, int64_t k) {  // its scales lie elsewhere
    __builtin_prefetch(row.at(k));
    if ((k >> row.shift) % (LINE / 4) == 0) __builtin_prefetch(row.pairs + (k >> row.shift));
}

// y[g, n + r] for BLOCK weight rows and G rows of x; `first`: they come from memory, so that the next ones are fetched.
template <int G, typename Format, typename Out>
inline void fma_block(const Format& w, int64_t n, const float* x, Out* y, int64_t stride, bool first) {
    vec acc[BLOCK][G] = {};
    typename Format::Row rows[BLOCK], next[BLOCK];
    for (int r = 0; r < BLOCK; r++) rows[r] = w.row(n + r), next[r] = w.row(n + ahead<Format>(BLOCK) + r);
    for (int64_t k = 0; k < w.K; k += Format::SPAN) {
        typename Format::Span spans[BLOCK];
        for (int r = 0; r < BLOCK; r++) {
            if (first && k % Format::PER_LINE == 0) fetch(next[r], k);
            spans[r] = rows[r].span(k);
        }
#pragma GCC unroll 8
        for (int i = 0; i < Format::SPAN; i += LANES)
            for (int g = 0; g < G; g++) {
                vec xs = load<vec>(x + g * w.K + k + i);
                for (int r = 0; r < BLOCK; r++) acc[r][g] += spans[r].get(i) * xs;
            }
    }
    for (int g = 0; g < G; g++)
        for (int r = 0; r < BLOCK; r++) y[g * stride + n + r] = sum(acc[r][g]) * w.scale(n + r);
}

template <typename Format, typename Out>
void fma_linear(const Format& w, const float* x, Out* y, int64_t T, int64_t N) {
    at::parallel_for(0, N / BLOCK, std::max<int64_t>(1, WORK / (BLOCK * w.K * T)), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin * BLOCK; n < end * BLOCK; n += BLOCK) {
            int64_t t = 0;
            for (; t + 4 <= T; t += 4) fma_block<4>(w, n, x + t * w.K, y + t * N, N, t == 0);
            if (T - t == 3) fma_block<3>(w, n, x + t * w.K, y + t * N, N, t == 0);
            if (T - t == 2) fma_block<2>(w, n, x + t * w.K, y + t * N, N, t == 0);
            if (T - t == 1) fma_block<1>(w, n, x + t * w.K, y + t * N, N, t == 0);
        }
    });
}

#if HAS_AMX
// ---- AMX. A tile is 16 rows of 64 bytes. A: 16 weight rows x 32; B: 32 x 16 rows of x, in pairs of k; C: 16 weight
// rows x 16 rows of x in fp32. bf16 weights are tiles as they lie in memory, others become bf16 on the way.
struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool may_use_amx() {  // the operating system grants the tile registers on request
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

// 16 weight rows from k to k + 31 into tile 4.
inline void load_weight_tile(const Bf16& w, const Bf16::Row* rows, int64_t k) { _tile_loadd(4, rows[0].at(k), w.K * 2); }

template <typename Format>
inline void load_weight_tile(const Format&, const typename Format::Row* rows, int64_t k) {
    alignas(64) __m512i tile[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {
        auto span = rows[r].span(k);
        tile[r] = (__m512i)_mm512_cvtne2ps_pbh((__m512)span.get(16), (__m512)span.get(0));
    }
    asm volatile("" ::: "memory");  // the compiler does not know that the next line reads `tile`
    _tile_loadd(4, tile, 64);
}

// c[tile][16 weight rows][16 rows of x] for 16 weight rows. (Tile numbers must be literals.)
template <int TILES, typename Format>
inline void amx_block(const Format& w, int64_t n, const at::BFloat16* x, float* c) {
    _tile_zero(0);
    if constexpr (TILES > 1) _tile_zero(1);
    if constexpr (TILES > 2) _tile_zero(2);
    if constexpr (TILES > 3) _tile_zero(3);
    typename Format::Row rows[16], next[16];
    for (int r = 0; r < 16; r++) rows[r] = w.row(n + r), next[r] = w.row(n + ahead<Format>(16) + r);
    for (int64_t k = 0; k < w.K; k += 32, x += 512 * TILES) {
        if (k % Format::PER_LINE == 0)
            for (int r = 0; r < 16; r++) fetch(next[r], k);
        load_weight_tile(w, rows, k);
        _tile_loadd(5, x, 64);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (TILES > 1) {
            _tile_loadd(6, x + 512, 64);
            _tile_dpbf16ps(1, 4, 6);
        }
        if constexpr (TILES > 2) {
            _tile_loadd(5, x + 1024, 64);
            _tile_dpbf16ps(2, 4, 5);
        }
        if constexpr (TILES > 3) {
            _tile_loadd(6, x + 1536, 64);
            _tile_dpbf16ps(3, 4, 6);
        }
    }
    _tile_stored(0, c, 64);
    if constexpr (TILES > 1) _tile_stored(1, c + 256, 64);
    if constexpr (TILES > 2) _tile_stored(2, c + 512, 64);
    if constexpr (TILES > 3) _tile_stored(3, c + 768, 64);
}

// c as `amx_block` leaves it -> y[t, n to n + 15].
template <typename Format>
inline void store_transposed(const Format& w, int64_t n, const float* c, at::BFloat16* y, int64_t T, int64_t N) {
    const __m512i column = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(16));
    vec scales;
    for (int r = 0; r < 16; r++) scales[r] = w.scale(n + r);
    for (int64_t t = 0; t < T; t++) {
        vec values = (vec)_mm512_i32gather_ps(column, c + t / 16 * 256 + t % 16, 4) * scales;
        _mm256_storeu_si256((__m256i*)(y + t * N + n), (__m256i)_mm512_cvtneps_pbh((__m512)values));
    }
}

template <int TILES, typename Format>
void amx_tiles(const Format& w, const at::BFloat16* x, at::BFloat16* y, int64_t T, int64_t N) {
    auto packed = pack_rows<TILES>(x, T, w.K);
    at::parallel_for(0, N / 16, std::max<int64_t>(1, WORK / (16 * w.K)), [&](int64_t begin, int64_t end) {
        TileConfig config;
        _tile_loadconfig(&config);
        alignas(64) float c[TILES * 256];
        for (int64_t n = begin * 16; n < end * 16; n += 16) {
            amx_block<TILES>(w, n, packed.data(), c);
            store_transposed(w, n, c, y, T, N);
        }
        _tile_release();
    });
}

template <typename Format>
void amx_linear(const Format& w, const at::BFloat16* x, at::BFloat16* y, int64_t T, int64_t N) {
    if (T <= 16) amx_tiles<1>(w, x, y, T, N);
    else if (T <= 32) amx_tiles<2>(w, x, y, T, N);
    else if (T <= 48) amx_tiles<3>(w, x, y, T, N);
    else amx_tiles<4>(w, x, y, T, N);
}
#else
bool may_use_amx() { return false; }

template <typename Format>
void amx_linear(const Format&, const at::BFloat16*, at::BFloat16*, int64_t, int64_t) {}
#endif

// ---- Operators

// x (T, K) times weights of any format into y (T, N); T is one that suits (most_rows).
template <typename Format>
void few_rows(const Format& w, const at::Tensor& x, at::Tensor& y, int64_t T, int64_t N) {
    if (x.scalar_type() == at::kFloat) {
        fma_linear(w, x.const_data_ptr<float>(), y.data_ptr<float>(), T, N);
    } else if (T <= FMA_ROWS_BF16) {
        at::Tensor wide = x.to(at::kFloat);
        fma_linear(w, wide.const_data_ptr<float>(), y.data_ptr<at::BFloat16>(), T, N);
    } else {
        amx_linear(w, x.const_data_ptr<at::BFloat16>(), y.data_ptr<at::BFloat16>(), T, N);
    }
}

// The most rows of x that `linear` takes of a product with N x K weights of this type; 0: leave it to the library.
int64_t most_rows(at::ScalarType dtype, int64_t N, int64_t K) {
    if (dtype == at::kBFloat16 && N % 16 == 0 && K % 32 == 0 && may_use_amx()) return AMX_ROWS;
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
    if (weight.scalar_type() == at::kFloat) few_rows(Fp32{weight.const_data_ptr<float>(), K}, rows, y, T, N);
    else few_rows(Bf16{weight.const_data_ptr<at::BFloat16>(), K}, rows, y, T, N);
    return y;
}

// Weight rows [begin, begin + out.size(0)) as they are meant, in out's type.
template <typename Format>
void dequantize(const Format& w, int64_t begin, at::Tensor& out) {
    const bool wide = out.scalar_type() == at::kFloat;
    float* floats = wide ? out.data_ptr<float>() : nullptr;
    at::BFloat16* halves = wide ? nullptr : out.data_ptr<at::BFloat16>();
    at::parallel_for(0, out.size(0), std::max<int64_t>(1, WORK / w.K), [&](int64_t from, int64_t to) {
        for (int64_t r = from; r < to; r++)
            for (int64_t k = 0; k < w.K; k += Format::SPAN) {
                auto span = w.row(begin + r).span(k);
                for (int i = 0; i < Format::SPAN; i += LANES) {
                    vec v = span.get(i) * w.scale(begin + r);
                    for (int lane = 0; lane < LANES; lane++)
                        if (wide) floats[r * w.K + k + i + lane] = v[lane];
                        else halves[r * w.K + k + i + lane] = v[lane];
                }
            }
    });
}

// Many rows of x: parts of the weight, small enough for the cache, are dequantised and given to the library.
template <typename Format>
void many_rows(const Format& w, const at::Tensor& x, at::Tensor& y, int64_t N) {
    const int64_t step = std::min(N, std::max<int64_t>(64, (1 << 20) / w.K / 16 * 16));
    at::Tensor part = at::empty({step, w.K}, x.options());
    for (int64_t n = 0; n < N; n += step) {
        at::Tensor some = part.narrow(0, 0, std::min(step, N - n));
        dequantize(w, n, some);
        y.narrow(1, n, some.size(0)).copy_(at::linear(x, some));
    }
}

// Calls `action` with the format of a quantised weight of K columns.
template <typename Action>
void with_format(const at::Tensor& weight, const at::Tensor& scales, int64_t K, Action action) {
    if (weight.scalar_type() == at::kChar) {
        action(Int8{weight.const_data_ptr<int8_t>(), scales.const_data_ptr<float>(), K});
    } else if (weight.scalar_type() == at::kFloat8_e4m3fn) {
        action(Fp8{static_cast<const uint8_t*>(weight.const_data_ptr()), scales.const_data_ptr<float>(), K});
    } else {
        auto pairs = reinterpret_cast<const uint32_t*>(scales.const_data_ptr<at::BFloat16>());
        action(Int4{weight.const_data_ptr<uint8_t>(), pairs, K, std::bit_width(uint64_t(K / scales.size(1))) - 1});
    }
}

// x (..., k) times a quantised weight (N, K) -> (..., n): its columns from k on and its rows from n on are padding.
at::Tensor linear_quantized(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales, int64_t n) {
    const bool int4 = weight.scalar_type() == at::kByte;
    const int64_t N = weight.size(0), K = weight.size(1) * (int4 ? 2 : 1), k = x.size(-1), T = x.numel() / k;
    TORCH_CHECK(k <= K && n <= N && N % 16 == 0 && K % 32 == 0 && scales.size(0) == N, "linear_quantized: a weight of ", N, " x ",
                K, " does not fit ", n, " x ", k, ", or is not padded to multiples of 16 x 32");
    TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "linear_quantized: x must be fp32 or bf16");
    at::Tensor rows = x.reshape({T, k}).contiguous();
    if (k < K) {
        at::Tensor padded = at::zeros({T, K}, x.options());
        padded.narrow(1, 0, k).copy_(rows);
        rows = padded;
    }
    at::Tensor y = at::empty({T, N}, x.options());
    const int64_t few = x.scalar_type() == at::kFloat ? FMA_ROWS_FP32 : may_use_amx() ? AMX_ROWS : FMA_ROWS_BF16;
    with_format(weight, scales, K, [&](auto format) {
        if (T <= few) few_rows(format, rows, y, T, N);
        else many_rows(format, rows, y, N);
    });
    auto shape = x.sizes().vec();
    shape.back() = n;
    return (n < N ? y.narrow(1, 0, n).contiguous() : y).view(shape);
}

}  // namespace

TORCH_LIBRARY(judge_fast, library) {
    library.def("linear(Tensor x, Tensor weight) -> Tensor", {at::Tag::pt2_compliant_tag});
    library.def("linear_quantized(Tensor x, Tensor weight, Tensor scales, int n) -> Tensor",
                {at::Tag::pt2_compliant_tag});
    library.def("most_rows(ScalarType dtype, int N, int K) -> int");
    library.impl("most_rows", &most_rows);
}

TORCH_LIBRARY_IMPL(judge_fast, CPU, library) {
    library.impl("linear", &linear);
    library.impl("linear_quantized", &linear_quantized);
}
