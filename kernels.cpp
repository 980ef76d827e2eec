// y = x W^T for a few rows of x on a CPU: every weight is read once, at the speed of memory.
//
// A library's product of few rows leaves a third of the bandwidth unused: the processor's prefetcher does not follow it.
// Here a thread walks over blocks of weight rows and asks for the next block while it works on this one. Weights of any
// format become fp32 or bf16 in registers, once for all rows of x. fp32 rows are multiplied by fused multiply-add, bf16 rows
// by the processor's dot product of bf16 pairs (AVX512-BF16) or, more than a few, by its matrix unit (AMX). kernels.py
// builds this file for the processor it runs on; quantize.py says what is in a quantised weight.
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
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define HAS_DOT 1
#else
#define HAS_DOT 0
#endif
#if defined(__AVX512VBMI__) && HAS_DOT
#define HAS_TABLES 1
#else
#define HAS_TABLES 0
#endif
#if defined(__AMX_BF16__) && HAS_DOT && defined(__linux__)
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

constexpr int FMA_ROWS_BF16 = 4;           // rows of bf16 x that are worth widening where nothing multiplies bf16
constexpr int DOT_ROWS = 64;               // up to here the dot product beats the library,
constexpr int DOT_ROWS_WITH_AMX = 4;       // or to here the matrix unit,
constexpr int AMX_ROWS = 64;               // which does to here
constexpr int FMA_ROWS_FP32 = 32;          // up to here faster than the library's product,
constexpr int FMA_ROWS_IN_CACHE = 2;       // or to here, where the weights fit a core's own cache:
constexpr int64_t IN_CACHE = 1 << 18;      // weights
constexpr int BLOCK = 4;                   // weight rows at a time: as many streams as memory needs
constexpr int GROUP = LANES == 16 ? 6 : 2; // rows of x at a time: BLOCK x GROUP sums fit the registers
constexpr int PARTS = 16 / LANES;          // of a tile's 16 weight rows
constexpr int TILE_GROUP = LANES == 16 ? 20 : 4;  // rows of x at a time by tiles
constexpr int64_t WORK = 1 << 16;          // multiply-adds that are worth waking a thread for
constexpr int64_t LINE = 64;               // bytes that memory gives at once
constexpr int64_t AHEAD = 2 * BLOCK;       // weight rows between those that are worked on and those that are fetched,
constexpr int64_t FETCH = 1 << 14;         // or bytes, where a thread reads on and on

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

// LANES 16-bit words as 32-bit numbers
inline wide_vec widen(const uint16_t* p) { return __builtin_convertvector(load<half_vec>(p), wide_vec); }

inline void store(vec v, float* to) { std::memcpy(to, &v, sizeof v); }

inline void store(vec v, at::BFloat16* to) {
#if HAS_DOT
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    for (int i = 0; i < LANES; i++) to[i] = v[i];
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

// ---- Weights (N, K) as they are published, row by row.

struct Fp32 {
    const float* w;
    int64_t K;
    const float* at(int64_t n, int64_t k) const { return w + n * K + k; }
};

struct Bf16 {
    const at::BFloat16* w;
    int64_t K;
    const at::BFloat16* at(int64_t n, int64_t k) const { return w + n * K + k; }
};

// Into the second level of the cache: the first has places for far fewer lines on their way.
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// ---- Blocks of BLOCK such rows by up to GROUP rows of x, all of them read along K

// Two ways to multiply STEP weights with as many numbers of x, and to add that to LANES sums.
struct Fma {
    using X = float;
    using Weights = vec;
    static constexpr int STEP = LANES;
    static Weights get(const float* w) { return load<vec>(w); }
    static Weights get(const at::BFloat16* w) { return bits<vec>(widen((const uint16_t*)w) << 16); }  // the upper half of fp32
    static void add(vec& sums, Weights w, const X* x) { sums += w * load<vec>(x); }
};

#if HAS_DOT
struct Dot {
    using X = at::BFloat16;
    using Weights = __m512bh;
    static constexpr int STEP = 32;
    static Weights get(const at::BFloat16* w) { return (__m512bh)_mm512_loadu_si512(w); }
    static void add(vec& sums, Weights w, const X* x) {
        sums = (vec)_mm512_dpbf16_ps((__m512)sums, w, (__m512bh)_mm512_loadu_si512(x));
    }
};
#endif

// y[g, n + r] for BLOCK weight rows and G rows of x; `first`: these come from memory, so that those two blocks on are fetched.
template <typename Way, int G, typename Format, typename Out>
inline void block_group(const Format& w, int64_t n, const typename Way::X* x, Out* y, int64_t stride, bool first) {
    vec acc[BLOCK][G] = {};
    for (int64_t k = 0; k < w.K; k += Way::STEP)
        for (int r = 0; r < BLOCK; r++) {
            if (first) fetch(w.at(n + AHEAD + r, k));
            const auto weights = Way::get(w.at(n + r, k));
            for (int g = 0; g < G; g++) Way::add(acc[r][g], weights, x + g * w.K + k);
        }
    for (int g = 0; g < G; g++)
        for (int r = 0; r < BLOCK; r++) y[g * stride + n + r] = sum(acc[r][g]);
}

// Calls `action` with a constant of the value n, from 1 to `most`.
template <int most, typename Action>
inline void with_constant(int64_t n, Action action) {
    if (n == most) action(std::integral_constant<int, most>{});
    else if constexpr (most > 1) with_constant<most - 1>(n, action);
}

// Calls `action` with (first row, how many) for T rows in parts of about the same size, none above `most`.
template <int most, typename Action>
inline void in_parts(int64_t T, Action action) {
    for (int64_t t = 0, left = (T + most - 1) / most; left; left--) {
        const int64_t some = (T - t + left - 1) / left;
        with_constant<most>(some, [&](auto n) { action(t, n); });
        t += some;
    }
}

template <typename Way, typename Format, typename Out>
void block_linear(const Format& w, const typename Way::X* x, Out* y, int64_t T, int64_t N) {
    at::parallel_for(0, N / BLOCK, std::max<int64_t>(1, WORK / (BLOCK * w.K * T)), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin * BLOCK; n < end * BLOCK; n += BLOCK)
            in_parts<GROUP>(T, [&](int64_t t, auto G) { block_group<Way, G>(w, n, x + t * w.K, y + t * N, N, t == 0); });
    });
}

// ---- Tiles: 16 weight rows by pairs of columns, so that sums are of 16 rows side by side, and a pair of x is the same for all

struct Pairs {  // of 16 weight rows two neighbouring columns, in bf16, the first one in the lower half
    wide_vec part[PARTS];
};

struct Sums {  // of 16 weight rows
    vec part[PARTS];
};

// A quantised weight lies in tiles: [N / 16] blocks of 16 rows, of each block all columns, in lines of 64 bytes (quantize.py).
// decode(f, table, block, pair, w): UNIT pairs from `pair` on. Columns of one chunk, chunk() of them, have one scale a row.
// What decode gives is BIAS too large; a weight is q * scale + offset.

struct Bytes {  // a sign and 7 bits that a table gives a meaning: a line is 16 rows by 4 columns
    const uint8_t* w;
    const float* scales;
    int64_t K;
    int64_t chunk() const { return K; }
    static constexpr int UNIT = 4;
    static constexpr float BIAS = 0;
    const uint8_t* line(int64_t block, int64_t pair) const { return w + block * 16 * K + pair * 32; }
    void fetch_from(int64_t block, int64_t pair) const {
        for (int i = 0; i < UNIT / 2; i++) fetch(line(block, pair) + FETCH + i * LINE);
    }
    vec scale(int64_t block, int64_t, int part) const { return load<vec>(scales + block * 16 + part * LANES); }
    vec offset(int64_t, int64_t, int) const { return vec{}; }
};

struct Int8 : Bytes {
    static wide_vec meaning(wide_vec magnitude) { return bits<wide_vec>(__builtin_convertvector(magnitude, vec)); }
};

struct FullInt8 : Int8 {};  // with -128, which quantize.py never makes, but others: a sign without a magnitude

struct Fp8 : Bytes {  // e4m3: moved to the places of fp32 its exponent is 120 too small
    static wide_vec meaning(wide_vec magnitude) { return bits<wide_vec>(bits<vec>(magnitude << 20) * 0x1p120f); }
};

#if HAS_TABLES
// The upper halves of fp32 of what 7 bits mean: of 128 such halves the lower and the upper bytes.
template <typename Format>
struct Table {
    __m512i low[2], high[2];
    Table() {
        uint8_t bytes[2][128];
        for (uint32_t i = 0; i < 128; i++) {
            const uint32_t half = Format::meaning(wide_vec{} + i)[0] >> 16;
            bytes[0][i] = half, bytes[1][i] = half >> 8;
        }
        for (int i = 0; i < 2; i++) low[i] = _mm512_loadu_si512(bytes[0] + 64 * i), high[i] = _mm512_loadu_si512(bytes[1] + 64 * i);
    }
};

template <typename Format>
inline void decode_bytes(const Format& f, const Table<Format>& table, int64_t block, int64_t pair, Pairs* w) {
    for (int i = 0; i < Format::UNIT / 2; i++) {
        const __m512i q = _mm512_loadu_si512(f.line(block, pair) + i * LINE);  // a look-up heeds the lowest 7 bits alone
        const __m512i low = _mm512_permutex2var_epi8(table.low[0], q, table.low[1]);
        __m512i high = _mm512_permutex2var_epi8(table.high[0], q, table.high[1]);
        if constexpr (std::is_same_v<Format, FullInt8>)
            high = _mm512_mask_mov_epi8(high, _mm512_cmpeq_epi8_mask(q, _mm512_set1_epi8(char(0x80))), _mm512_set1_epi8(0x43));
        const __m512i sign = _mm512_ternarylogic_epi32(high, q, _mm512_set1_epi8(char(0x80)), 0xf8);  // high | (q & 0x80)
        w[2 * i].part[0] = (wide_vec)_mm512_unpacklo_epi8(low, sign);
        w[2 * i + 1].part[0] = (wide_vec)_mm512_unpackhi_epi8(low, sign);
    }
}
#else
template <typename Format>
struct Table {};

template <typename Format>
inline void decode_bytes(const Format& f, const Table<Format>&, int64_t block, int64_t pair, Pairs* w) {
    for (int i = 0; i < Format::UNIT; i++) {
        uint16_t both[16];  // 4 rows of these two columns, 4 of the next two, and so on
        for (int quarter = 0; quarter < 4; quarter++)
            std::memcpy(both + 4 * quarter, f.line(block, pair) + i / 2 * LINE + 16 * quarter + i % 2 * 8, 8);
        for (int part = 0; part < PARTS; part++) {
            const wide_vec q = widen(both + part * LANES);
            wide_vec first = q & 0x7f, second = q >> 8 & 0x7f;
            if constexpr (std::is_same_v<Format, FullInt8>) {
                first += wide_vec((q & 0xff) == 0x80) & 128;
                second += wide_vec((q >> 8) == 0x80) & 128;
            }
            first = Format::meaning(first) | (q & 0x80) << 24;
            second = Format::meaning(second) | (q >> 8 & 0x80) << 24;
            w[i].part[part] = first >> 16 | (second & 0xffff0000u);
        }
    }
}
#endif

inline void decode(const Int8& f, const Table<Int8>& table, int64_t block, int64_t pair, Pairs* w) { decode_bytes(f, table, block, pair, w); }
inline void decode(const FullInt8& f, const Table<FullInt8>& table, int64_t block, int64_t pair, Pairs* w) { decode_bytes(f, table, block, pair, w); }
inline void decode(const Fp8& f, const Table<Fp8>& table, int64_t block, int64_t pair, Pairs* w) { decode_bytes(f, table, block, pair, w); }

// A line is 16 words of 32 bits, one a row: columns 2 p and 2 p + 1 in bits 4 p and 4 p + 16. `groups` has scales and offsets:
// [N / 16][K / group][16], in bf16, the scale in the lower half of a word, or, WIDE, [N / 16][K / group][2][16], in fp32.
template <bool WIDE>
struct Int4 {
    const uint8_t* w;
    const uint32_t* groups;
    int64_t K, group;
    int64_t chunk() const { return group; }
    static constexpr int UNIT = 4;
    static constexpr float BIAS = 128;  // 0x4300 is 128 in bf16, and its lowest bits are worth 1
    const uint8_t* line(int64_t block, int64_t pair) const { return w + block * 8 * K + pair * 16; }
    const uint32_t* both(int64_t block, int64_t chunk, int part) const {
        return groups + (block * (K / group) + chunk) * (WIDE ? 32 : 16) + part * LANES;
    }
    void fetch_from(int64_t block, int64_t pair) const {
        fetch(line(block, pair) + FETCH);
        if (pair * 2 % group == 0) fetch((const uint8_t*)both(block, pair * 2 / group, 0) + FETCH / 4);
    }
    vec scale(int64_t block, int64_t chunk, int part) const {
        const wide_vec found = load<wide_vec>(both(block, chunk, part));
        return bits<vec>(WIDE ? found : found << 16);
    }
    vec offset(int64_t block, int64_t chunk, int part) const {
        const wide_vec found = load<wide_vec>(both(block, chunk, part) + (WIDE ? 16 : 0));
        return bits<vec>(WIDE ? found : found & 0xffff0000u);
    }
};

template <bool WIDE>
struct Table<Int4<WIDE>> {};

template <bool WIDE>
inline void decode(const Int4<WIDE>& f, const Table<Int4<WIDE>>&, int64_t block, int64_t pair, Pairs* w) {
    for (int part = 0; part < PARTS; part++) {
        const wide_vec q = load<wide_vec>(f.line(block, pair) + part * LANES * 4);
        for (int i = 0; i < Int4<WIDE>::UNIT; i++) w[i].part[part] = (q >> 4 * i & 0x000f000fu) | 0x43004300u;
    }
}

// Two ways to multiply pairs with a pair of x. What decode adds to a weight is taken away with the offset or, EXACT, at once.
struct FmaPairs {
    using X = float;
    static constexpr bool EXACT = true;
    template <typename Format>
    static void add(Sums& sums, const Pairs& w, const X* x) {
        for (int part = 0; part < PARTS; part++) {
            vec first = bits<vec>(w.part[part] << 16), second = bits<vec>(w.part[part] & 0xffff0000u);
            if (Format::BIAS != 0) first -= Format::BIAS, second -= Format::BIAS;
            sums.part[part] += first * x[0];
            sums.part[part] += second * x[1];
        }
    }
};

#if HAS_DOT
struct DotPairs {
    using X = at::BFloat16;
    static constexpr bool EXACT = false;
    template <typename Format>
    static void add(Sums& sums, const Pairs& w, const X* x) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32(load<int>(x));
        sums.part[0] = (vec)_mm512_dpbf16_ps((__m512)sums.part[0], (__m512bh)w.part[0], both);
    }
};
#endif

// x (T, K) in the order in which tiles read it: for each part of the rows [K / 2][rows][2]; and the sums of every chunk of every
// row, which offsets are multiplied with.
template <typename X>
struct PackedRows {
    std::vector<X> x;
    std::vector<float> sums;
};

template <typename X>
PackedRows<X> pack_pairs(const X* x, int64_t T, int64_t K, int64_t chunk, bool offsets) {
    PackedRows<X> packed{std::vector<X>(T * K), std::vector<float>(offsets ? T * (K / chunk) : 0)};
    in_parts<TILE_GROUP>(T, [&](int64_t begin, auto G) {
        for (int64_t t = 0; t < G; t++)
            for (int64_t k = 0; k < K; k += 2)
                for (int i = 0; i < 2; i++) packed.x[begin * K + (k / 2 * G + t) * 2 + i] = x[(begin + t) * K + k + i];
    });
    for (int64_t at = 0; at < int64_t(packed.sums.size()); at++)
        for (int64_t k = 0; k < chunk; k++) packed.sums[at] += float(x[at * chunk + k]);
    return packed;
}

// y[g, 16 block + r] for a block of 16 weight rows and G rows of x (packed).
template <typename Way, int G, typename Format, typename Out>
inline void tile_group(const Format& f, const Table<Format>& table, int64_t block, const typename Way::X* x, const float* x_sums, Out* y,
                       int64_t stride, bool first) {
    constexpr int CHAINS = G <= 2 ? 4 : G < 6 ? 2 : 1;  // sums that do not wait for one another
    const int64_t chunk = f.chunk(), chunks = f.K / chunk;
    Sums total[G] = {};
    for (int64_t c = 0; c < chunks; c++) {
        Sums acc[CHAINS][G] = {};
        for (int64_t pair = c * chunk / 2; pair < (c + 1) * chunk / 2; pair += Format::UNIT) {
            if (first) f.fetch_from(block, pair);
            Pairs w[Format::UNIT];
            decode(f, table, block, pair, w);
#pragma GCC unroll 16
            for (int i = 0; i < Format::UNIT; i++)
                for (int g = 0; g < G; g++) Way::template add<Format>(acc[i % CHAINS][g], w[i], x + ((pair + i) * G + g) * 2);
        }
        for (int part = 0; part < PARTS; part++) {
            const vec scale = f.scale(block, c, part);
            const vec offset = f.offset(block, c, part) + (Way::EXACT ? 0 : -Format::BIAS) * scale;
            for (int g = 0; g < G; g++) {
                vec whole = acc[0][g].part[part];
                for (int i = 1; i < CHAINS; i++) whole += acc[i][g].part[part];
                total[g].part[part] += whole * scale;
                if (Format::BIAS != 0) total[g].part[part] += offset * x_sums[g * chunks + c];
            }
        }
    }
    for (int g = 0; g < G; g++)
        for (int part = 0; part < PARTS; part++) store(total[g].part[part], y + g * stride + block * 16 + part * LANES);
}

template <typename Way, typename Format, typename Out>
void tile_linear(const Format& f, const typename Way::X* x, Out* y, int64_t T, int64_t N) {
    auto packed = pack_pairs(x, T, f.K, f.chunk(), Format::BIAS != 0);
    at::parallel_for(0, N / 16, std::max<int64_t>(1, WORK / (16 * f.K * T)), [&](int64_t begin, int64_t end) {
        const Table<Format> table;
        for (int64_t block = begin; block < end; block++)
            in_parts<TILE_GROUP>(T, [&](int64_t t, auto G) {
                const float* sums = packed.sums.data() + (Format::BIAS != 0 ? t * (f.K / f.chunk()) : 0);
                tile_group<Way, G>(f, table, block, packed.x.data() + t * f.K, sums, y + t * N, N, t == 0);
            });
    });
}

#if HAS_DOT
// Rows of 16 words of 32 bits become columns.
inline void transpose(__m512i* a) {
    __m512i b[16];
    for (int i = 0; i < 8; i++) b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]), b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            a[4 * i + 2 * j] = _mm512_unpacklo_epi64(b[4 * i + j], b[4 * i + j + 2]);
            a[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(b[4 * i + j], b[4 * i + j + 2]);
        }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) {
            b[8 * i + j] = _mm512_shuffle_i32x4(a[8 * i + j], a[8 * i + j + 4], 0x88);
            b[8 * i + j + 4] = _mm512_shuffle_i32x4(a[8 * i + j], a[8 * i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        a[j] = _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88);
        a[j + 8] = _mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd);
    }
}

// Pairs of a quantised weight as they are meant, rounded to bf16.
template <typename Format>
inline void finish(const Format& f, int64_t block, int64_t pair, Pairs& w) {
    const __m512i in_turn = _mm512_set_epi32(0x001f000f, 0x001e000e, 0x001d000d, 0x001c000c, 0x001b000b, 0x001a000a, 0x00190009, 0x00180008,
                                             0x00170007, 0x00160006, 0x00150005, 0x00140004, 0x00130003, 0x00120002, 0x00110001, 0x00100000);
    const int64_t chunk = pair * 2 / f.chunk();
    const vec scale = f.scale(block, chunk, 0), offset = f.offset(block, chunk, 0);
    const vec first = (bits<vec>(w.part[0] << 16) - Format::BIAS) * scale + offset;
    const vec second = (bits<vec>(w.part[0] & 0xffff0000u) - Format::BIAS) * scale + offset;
    w.part[0] = (wide_vec)_mm512_permutexvar_epi16(in_turn, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
#endif

#if HAS_AMX
// ---- AMX. A matrix register is 16 rows of 64 bytes. A: 16 rows x 32 columns; B: 32 columns x 16 rows, in pairs of columns;
// C: A's rows by B's rows in fp32. bf16 weights are A as they lie in memory, and x is B; tiles of quantised ones are B, and x is A.
struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool may_use_amx() {  // the operating system grants the registers on request
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted;
}

template <typename Format>
constexpr bool WEIGHTS_FIRST = std::is_same_v<Format, Bf16>;

template <>
struct Table<Bf16> {};

// x (T, K) in blocks [K / 32][TILES] of 16 rows x 32 columns, or (`paired`) of 16 pairs of columns x 16 rows; zeros beyond T.
template <int TILES, bool paired>
std::vector<at::BFloat16> pack_rows(const at::BFloat16* x, int64_t T, int64_t K) {
    std::vector<at::BFloat16> packed(K * 16 * TILES);
    auto to = reinterpret_cast<uint32_t*>(packed.data());
    auto from = reinterpret_cast<const uint32_t*>(x);
    at::parallel_for(0, K / 32, std::max<int64_t>(1, 4096 / T), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; block++)
            for (int64_t t = 0; t < T; t++)
                for (int64_t pair = 0; pair < 16; pair++)
                    to[(block * TILES + t / 16) * 256 + (paired ? pair * 16 + t % 16 : t % 16 * 16 + pair)] = from[t * K / 2 + block * 16 + pair];
    });
    return packed;
}

// 16 weight rows from k to k + 31 into register 4.
inline void load_weights(const Bf16& w, const Table<Bf16>&, int64_t block, int64_t k) {
    for (int r = 0; r < 16; r++) fetch(w.at(block * 16 + 32 + r, k));
    _tile_loadd(4, w.at(block * 16, k), w.K * 2);
}

template <typename Format>
inline void load_weights(const Format& f, const Table<Format>& table, int64_t block, int64_t k) {
    alignas(64) Pairs w[16];
    for (int i = 0; i < 16; i += Format::UNIT) {
        f.fetch_from(block, k / 2 + i);
        decode(f, table, block, k / 2 + i, w + i);
        if (Format::BIAS != 0)  // scales of groups do not wait until the end
            for (int j = i; j < i + Format::UNIT; j++) finish(f, block, k / 2 + j, w[j]);
    }
    asm volatile("" ::: "memory");  // the compiler does not know that the next line reads `w`
    _tile_loadd(4, w, 64);
}

// Register `number` += weights times x, or x times weights. (Numbers must be literals.)
#define AMX_STEP(number, with)                                       \
    if constexpr (TILES > number) {                                  \
        _tile_loadd(with, x + 512 * number, 64);                     \
        if constexpr (WEIGHTS_FIRST<Format>) _tile_dpbf16ps(number, 4, with); \
        else _tile_dpbf16ps(number, with, 4);                        \
    }

// c[tile][16][16] for 16 weight rows and the rows of x: which of them come first, WEIGHTS_FIRST says.
template <int TILES, typename Format>
inline void amx_block(const Format& f, const Table<Format>& table, int64_t block, const at::BFloat16* x, float* c) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < f.K; k += 32, x += 512 * TILES) {
        load_weights(f, table, block, k);
        AMX_STEP(0, 5) AMX_STEP(1, 6) AMX_STEP(2, 5) AMX_STEP(3, 6)
    }
    _tile_stored(0, c, 64);
    if constexpr (TILES > 1) _tile_stored(1, c + 256, 64);
    if constexpr (TILES > 2) _tile_stored(2, c + 512, 64);
    if constexpr (TILES > 3) _tile_stored(3, c + 768, 64);
}

// c as `amx_block` leaves it -> y[t, n to n + 15].
template <typename Format>
inline void store_block(const Format& f, int64_t block, const float* c, at::BFloat16* y, int64_t T, int64_t N) {
    for (int64_t t = 0; t < T; t++)
        if constexpr (WEIGHTS_FIRST<Format>) {
            const __m512i column = _mm512_set_epi32(240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16, 0);
            store((vec)_mm512_i32gather_ps(column, c + t / 16 * 256 + t % 16, 4), y + t * N + block * 16);
        } else {
            store(load<vec>(c + t * 16) * (Format::BIAS != 0 ? vec{} + 1 : f.scale(block, 0, 0)), y + t * N + block * 16);
        }
}

template <int TILES, typename Format>
void amx_tiles(const Format& f, const at::BFloat16* x, at::BFloat16* y, int64_t T, int64_t N) {
    auto packed = pack_rows<TILES, WEIGHTS_FIRST<Format>>(x, T, f.K);
    at::parallel_for(0, N / 16, std::max<int64_t>(1, WORK / (16 * f.K)), [&](int64_t begin, int64_t end) {
        const Table<Format> table;
        TileConfig config;
        _tile_loadconfig(&config);
        alignas(64) float c[TILES * 256];
        for (int64_t block = begin; block < end; block++) {
            amx_block<TILES>(f, table, block, packed.data(), c);
            store_block(f, block, c, y, T, N);
        }
        _tile_release();
    });
}

template <typename Format>
void amx_linear(const Format& f, const at::BFloat16* x, at::BFloat16* y, int64_t T, int64_t N) {
    with_constant<4>((T + 15) / 16, [&](auto tiles) { amx_tiles<tiles>(f, x, y, T, N); });
}
#else
bool may_use_amx() { return false; }

template <typename Format>
void amx_linear(const Format&, const at::BFloat16*, at::BFloat16*, int64_t, int64_t) {}
#endif

// ---- Operators

// Rows of bf16 x for which this processor has something better than the library's product.
int64_t rows_bf16() {
    if (may_use_amx()) return AMX_ROWS;
    return HAS_DOT ? DOT_ROWS : FMA_ROWS_BF16;
}

// The most rows of x that `linear` takes of a product with N x K weights of this type; 0: leave it to the library.
int64_t most_rows(at::ScalarType dtype, int64_t N, int64_t K) {
    if (dtype == at::kBFloat16 && N % 16 == 0 && K % 32 == 0) return rows_bf16();
    if (dtype != at::kFloat || N % BLOCK || K % LANES) return 0;
    return N * K > IN_CACHE ? FMA_ROWS_FP32 : FMA_ROWS_IN_CACHE;
}

void linear_bf16(const Bf16& w, const at::Tensor& x, at::Tensor& y, int64_t T, int64_t N) {
    auto rows = x.const_data_ptr<at::BFloat16>();
    auto out = y.data_ptr<at::BFloat16>();
    if (may_use_amx() && T > DOT_ROWS_WITH_AMX) return amx_linear(w, rows, out, T, N);
#if HAS_DOT
    block_linear<Dot>(w, rows, out, T, N);
#else
    at::Tensor wide = x.to(at::kFloat);
    block_linear<Fma>(w, wide.const_data_ptr<float>(), out, T, N);
#endif
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight) {
    const int64_t N = weight.size(0), K = weight.size(1), T = x.numel() / K;
    TORCH_CHECK(x.size(-1) == K && x.scalar_type() == weight.scalar_type() && weight.is_contiguous(),
                "linear: x and weight must have the same type and K, and the weight must be contiguous");
    TORCH_CHECK(T > 0 && T <= most_rows(weight.scalar_type(), N, K), "linear: ", T, " rows of ", N, " x ", K, " are not for it");
    auto shape = x.sizes().vec();
    shape.back() = N;
    at::Tensor y = at::empty(shape, x.options()), rows = x.contiguous();
    if (weight.scalar_type() == at::kFloat)
        block_linear<Fma>(Fp32{weight.const_data_ptr<float>(), K}, rows.const_data_ptr<float>(), y.data_ptr<float>(), T, N);
    else linear_bf16(Bf16{weight.const_data_ptr<at::BFloat16>(), K}, rows, y, T, N);
    return y;
}

template <typename Format>
void few_rows(const Format& f, const at::Tensor& x, at::Tensor& y, int64_t T, int64_t N) {
    if (x.scalar_type() == at::kFloat) return tile_linear<FmaPairs>(f, x.const_data_ptr<float>(), y.data_ptr<float>(), T, N);
    auto rows = x.const_data_ptr<at::BFloat16>();
    auto out = y.data_ptr<at::BFloat16>();
    if (may_use_amx() && T > DOT_ROWS_WITH_AMX) return amx_linear(f, rows, out, T, N);
#if HAS_DOT
    tile_linear<DotPairs>(f, rows, out, T, N);
#else
    at::Tensor wide = x.to(at::kFloat);
    tile_linear<FmaPairs>(f, wide.const_data_ptr<float>(), out, T, N);
#endif
}

// 16 weight rows as they are meant, in bf16 or fp32, into out (16, K).
template <typename Format, typename Out>
void dequantize(const Format& f, const Table<Format>& table, int64_t block, Out* out) {
    Pairs w[16];
    for (int64_t pair = 0; pair < f.K / 2; pair += 16) {
        for (int i = 0; i < 16; i += Format::UNIT) decode(f, table, block, pair + i, w + i);
#if HAS_DOT
        if constexpr (std::is_same_v<Out, at::BFloat16>) {
            __m512i rows[16];
            for (int i = 0; i < 16; i++) finish(f, block, pair + i, w[i]), rows[i] = (__m512i)w[i].part[0];
            transpose(rows);
            for (int r = 0; r < 16; r++) _mm512_storeu_si512(out + r * f.K + pair * 2, rows[r]);
            continue;
        }
#endif
        for (int i = 0; i < 16; i++)
            for (int r = 0; r < 16; r++) {
                const int64_t chunk = (pair + i) * 2 / f.chunk();
                const uint32_t both = w[i].part[r / LANES][r % LANES];
                const float scale = f.scale(block, chunk, r / LANES)[r % LANES], offset = f.offset(block, chunk, r / LANES)[r % LANES];
                out[r * f.K + (pair + i) * 2] = (bits<float>(both << 16) - Format::BIAS) * scale + offset;
                out[r * f.K + (pair + i) * 2 + 1] = (bits<float>(both & 0xffff0000u) - Format::BIAS) * scale + offset;
            }
    }
}

// Many rows of x: parts of the weight, small enough for the cache, are dequantised and given to the library.
template <typename Format>
void many_rows(const Format& f, const at::Tensor& x, at::Tensor& y, int64_t N) {
    const int64_t step = std::min(N, std::max<int64_t>(64, (1 << 20) / f.K / 16 * 16));
    at::Tensor part = at::empty({step, f.K}, x.options());
    for (int64_t n = 0; n < N; n += step) {
        at::Tensor some = part.narrow(0, 0, std::min(step, N - n));
        at::parallel_for(0, some.size(0) / 16, 1, [&](int64_t begin, int64_t end) {
            const Table<Format> table;
            for (int64_t block = begin; block < end; block++)
                if (x.scalar_type() == at::kFloat) dequantize(f, table, n / 16 + block, some.data_ptr<float>() + block * 16 * f.K);
                else dequantize(f, table, n / 16 + block, some.data_ptr<at::BFloat16>() + block * 16 * f.K);
        });
        y.narrow(1, n, some.size(0)).copy_(at::linear(x, some));
    }
}

Int8 int8(const at::Tensor& weight, const at::Tensor& scales) {
    return {{static_cast<const uint8_t*>(weight.const_data_ptr()), scales.const_data_ptr<float>(), weight.size(1)}};
}

FullInt8 full_int8(const at::Tensor& weight, const at::Tensor& scales) { return {int8(weight, scales)}; }

Fp8 fp8(const at::Tensor& weight, const at::Tensor& scales) {
    return {{static_cast<const uint8_t*>(weight.const_data_ptr()), scales.const_data_ptr<float>(), weight.size(1)}};
}

template <bool WIDE>
Int4<WIDE> int4(const at::Tensor& weight, const at::Tensor& scales) {
    using Scale = std::conditional_t<WIDE, float, at::BFloat16>;
    const int64_t K = weight.size(1) * 2;
    return {weight.const_data_ptr<uint8_t>(), reinterpret_cast<const uint32_t*>(scales.const_data_ptr<Scale>()), K, K / scales.size(1)};
}

// x (..., k) times a quantised weight (N, K) in tiles -> (..., n): its columns from k on and its rows from n on are padding.
template <auto format>
at::Tensor linear_quantized(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales, int64_t n) {
    const auto f = format(weight, scales);
    const int64_t N = weight.size(0), K = f.K, k = x.size(-1), T = x.numel() / k;
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
    const int64_t few = x.scalar_type() == at::kFloat ? FMA_ROWS_FP32 : rows_bf16();
    if (T <= few) few_rows(f, rows, y, T, N);
    else many_rows(f, rows, y, N);
    auto shape = x.sizes().vec();
    shape.back() = n;
    return (n < N ? y.narrow(1, 0, n).contiguous() : y).view(shape);
}

at::Tensor linear_int8(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales, int64_t n) {
    if (weight.scalar_type() == at::kByte) return linear_quantized<full_int8>(x, weight, scales, n);
    return linear_quantized<int8>(x, weight, scales, n);
}

at::Tensor linear_int4(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales, int64_t n) {
    if (scales.scalar_type() == at::kFloat) return linear_quantized<int4<true>>(x, weight, scales, n);
    return linear_quantized<int4<false>>(x, weight, scales, n);
}

}  // namespace

TORCH_LIBRARY(judge_fast, library) {
    library.def("linear(Tensor x, Tensor weight) -> Tensor", {at::Tag::pt2_compliant_tag});
    library.def("linear_int8(Tensor x, Tensor weight, Tensor scales, int n) -> Tensor", {at::Tag::pt2_compliant_tag});
    library.def("linear_fp8(Tensor x, Tensor weight, Tensor scales, int n) -> Tensor", {at::Tag::pt2_compliant_tag});
    library.def("linear_int4(Tensor x, Tensor weight, Tensor scales, int n) -> Tensor", {at::Tag::pt2_compliant_tag});
    library.def("most_rows(ScalarType dtype, int N, int K) -> int");
    library.impl("most_rows", &most_rows);
}

TORCH_LIBRARY_IMPL(judge_fast, CPU, library) {
    library.impl("linear", &linear);
    library.impl("linear_int8", &linear_int8);
    library.impl("linear_fp8", &linear_quantized<fp8>);
    library.impl("linear_int4", &linear_int4);
}
