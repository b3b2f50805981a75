// What grows answers on a CPU: products of few tokens with many weights, adapters' included, and attention over
// pages of a cache. bfloat16 in, float32 sums, one rounding at the end.
//
// Sources: LoRA (Hu et al. 2021, arXiv 2106.09685), many adapters in one product as in Punica (Chen et al. 2023,
// arXiv 2310.18547); paged attention (Kwon et al. 2023, arXiv 2309.06180). Each weight is read once for all tokens
// of a step. A product of few tokens is bound by memory, so weights stay as they lie: nothing is packed.
// A sum is taken in one order whatever the number of threads and tokens, so a row's bits do not depend on who
// shares the step.
//
// It does not know tensors or requests: inference/decode.py checks shapes, kinds and that memory is contiguous.

#include <vector>

#include "lanes.h"

namespace {

constexpr long TILE = 16;    // outputs that one thread works on at a time
constexpr long TOKENS = 64;  // tokens whose sums of a tile are held at once

#ifdef LANES

constexpr int SIDE = LANES == 512 ? 4 : 2;  // rows of weights, and tokens, whose sums are held in registers at once

// The sums of W rows of weights with X tokens, over `width` numbers (a multiple of 32), to sums[x * TILE + w].
template <int W, int X>
inline void block(const bf16* weights, const bf16* tokens, long width, float* sums) {
    Lanes sum[W][X];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w)
#pragma GCC unroll 4
        for (int x = 0; x < X; ++x) sum[w][x] = zero();
    for (long e = 0; e < width; e += 32)
#pragma GCC unroll 2
        for (int turn = 0; turn < TURNS; ++turn) {
            Line in[X];
#pragma GCC unroll 4
            for (int x = 0; x < X; ++x) in[x] = line_of(tokens + x * width + e, turn);
#pragma GCC unroll 4
            for (int w = 0; w < W; ++w) {
                const Line row = line_of(weights + w * width + e, turn);
#pragma GCC unroll 4
                for (int x = 0; x < X; ++x) sum[w][x] = dot(sum[w][x], row, in[x]);
            }
        }
    for (int x = 0; x < X; ++x)
        for (int w = 0; w < W; ++w) sums[x * TILE + w] = sum_of(sum[w][x]);
}

template <int W>
inline void rows(const bf16* weights, const bf16* tokens, long count, long width, float* sums) {
    constexpr int PART = W < SIDE ? W : SIDE;
    long x = 0;
    for (; x + SIDE <= count; x += SIDE)
        for (int i = 0; i < W; i += PART)
            block<PART, SIDE>(weights + i * width, tokens + x * width, width, sums + x * TILE + i);
    switch (count - x) {
        case 3: block<W, 3>(weights, tokens + x * width, width, sums + x * TILE); break;
        case 2: block<W, 2>(weights, tokens + x * width, width, sums + x * TILE); break;
        case 1: block<W, 1>(weights, tokens + x * width, width, sums + x * TILE); break;
        default: break;
    }
}

struct Adapters {           // of one group of linear layers that read the same input
    const int64_t *a, *b;   // by slot: A of all parts (parts * rank, width), scaled B transposed (rank, outs); or 0
    const int64_t* ranks;   // by slot
    const int64_t* slots;   // by token; null where no token has an adapter
    const int64_t* ends;    // where each part's outputs end
    long parts, widest;     // and the most rows that an A has
};

template <class Out>
void product(const bf16* x, const bf16* w, const bf16* bias, Out* y, long tokens, long width, long outs,
             const Adapters& own, float* low) {
#pragma omp parallel
    {
        if (own.slots) {
#pragma omp for schedule(dynamic)
            for (long t = 0; t < tokens; ++t) {
                const long slot = own.slots[t];
                const bf16* a = (const bf16*)own.a[slot];
                if (!a) continue;
                const long count = own.parts * own.ranks[slot];
                float sums[TILE];
                for (long r = 0; r < count; r += 4) {
                    const long some = count - r < 4 ? count - r : 4;
                    if (some == 4) block<4, 1>(a + r * width, x + t * width, width, sums);
                    else for (long i = 0; i < some; ++i) block<1, 1>(a + (r + i) * width, x + t * width, width, sums + i);
                    std::memcpy(low + t * own.widest + r, sums, sizeof(float) * some);
                }
            }
        }
        float sums[TOKENS * TILE];
#pragma omp for schedule(static)
        for (long o = 0; o < outs; o += TILE) {
            const long some = outs - o < TILE ? outs - o : TILE;
            long part = 0;
            while (own.slots && own.ends[part] <= o) ++part;
            for (long first = 0; first < tokens; first += TOKENS) {
                const long count = tokens - first < TOKENS ? tokens - first : TOKENS;
                const bf16* in = x + first * width;
                long i = 0;
                for (; i + 4 <= some; i += 4) rows<4>(w + (o + i) * width, in, count, width, sums + i);
                for (; i < some; ++i) rows<1>(w + (o + i) * width, in, count, width, sums + i);
                for (long t = 0; t < count; ++t) {
                    float* sum = sums + t * TILE;
                    const long slot = own.slots ? own.slots[first + t] : 0;
                    const bf16* b = own.slots ? (const bf16*)own.b[slot] : nullptr;
                    if (b) {
                        const long rank = own.ranks[slot];
                        const float* z = low + (first + t) * own.widest + part * rank;
                        for (long r = 0; r < rank; ++r)
                            for (long j = 0; j < some; ++j) sum[j] += z[r] * wide(b[r * outs + o + j]);
                    }
                    Out* to = y + (first + t) * outs + o;
                    for (long j = 0; j < some; ++j) put(to[j], bias ? sum[j] + wide(bias[o + j]) : sum[j]);
                }
            }
        }
    }
}

#endif

constexpr long BLOCK = 16;  // tokens of a block of the cache

#ifdef LANES

// One query head: scores with the keys at `places`, and the mean of their values under given shares.
template <int W, class N>
inline float scores(const float* q, const N* keys, const int32_t* places, long count, long step, float* out) {
    Lanes asked[W];
    for (int i = 0; i < W; ++i) asked[i] = load(q + 16 * i);
    float top = -__builtin_inff();
    for (long k = 0; k < count; ++k) {
        const N* key = keys + places[k] * step;
        Lanes sum = times(asked[0], wide(key));
        for (int i = 1; i < W; ++i) sum = fused(asked[i], wide(key + 16 * i), sum);
        out[k] = sum_of(sum);
        top = out[k] > top ? out[k] : top;
    }
    return top;
}

template <int W, class N>
inline void mix(const float* shares, const N* values, const int32_t* places, long count, long step, float whole, N* out) {
    Lanes sum[W];
    for (int i = 0; i < W; ++i) sum[i] = zero();
    for (long k = 0; k < count; ++k) {
        const Lanes share = all(shares[k]);
        const N* value = values + places[k] * step;
        for (int i = 0; i < W; ++i) sum[i] = fused(share, wide(value + 16 * i), sum[i]);
    }
    float mixed[16];
    for (int i = 0; i < W; ++i) {
        store(mixed, times(sum[i], all(whole)));
        for (int e = 0; e < 16; ++e) put(out[16 * i + e], mixed[e]);
    }
}

#endif

template <class N>
float scores_of(long width, const float* q, const N* keys, const int32_t* places, long count, long step, float* out) {
#ifdef LANES
    if (width == 64) return scores<4>(q, keys, places, count, step, out);
    if (width == 128) return scores<8>(q, keys, places, count, step, out);
    if (width == 96) return scores<6>(q, keys, places, count, step, out);
    if (width == 256) return scores<16>(q, keys, places, count, step, out);
#endif
    float top = -__builtin_inff();
    for (long k = 0; k < count; ++k) {
        const N* key = keys + places[k] * step;
        float score = 0.0f;
#pragma omp simd reduction(+ : score)
        for (long e = 0; e < width; ++e) score += q[e] * wide(key[e]);
        out[k] = score;
        top = score > top ? score : top;
    }
    return top;
}

template <class N>
void mix_of(long width, const float* shares, const N* values, const int32_t* places, long count, long step, float whole,
            N* out) {
#ifdef LANES
    if (width == 64) return mix<4>(shares, values, places, count, step, whole, out);
    if (width == 128) return mix<8>(shares, values, places, count, step, whole, out);
    if (width == 96) return mix<6>(shares, values, places, count, step, whole, out);
    if (width == 256) return mix<16>(shares, values, places, count, step, whole, out);
#endif
    std::vector<float> mixed(width, 0.0f);
    for (long k = 0; k < count; ++k) {
        const N* value = values + places[k] * step;
#pragma omp simd
        for (long e = 0; e < width; ++e) mixed[e] += shares[k] * wide(value[e]);
    }
    for (long e = 0; e < width; ++e) put(out[e], mixed[e] * whole);
}

// Each token's query heads over the first `lengths[token]` places of its sequence, which lie in the blocks that the
// table's line of that sequence names. Queries (tokens, heads, width), keys and values (places, kv heads, width).
template <class N>
void attend(const N* q, const N* keys, const N* values, const int32_t* table, const int64_t* lines,
            const int64_t* lengths, N* out, long tokens, long heads, long kv_heads, long width, long stride,
            long window, float scale) {
    const long group = heads / kv_heads, step = kv_heads * width;
#pragma omp parallel
    {
        std::vector<float> shares, asked(width);
        std::vector<int32_t> places;
#pragma omp for collapse(2) schedule(dynamic)
        for (long kv = 0; kv < kv_heads; ++kv) {
            for (long token = 0; token < tokens; ++token) {
                const long length = lengths[token], low = window && length > window ? length - window : 0;
                const long seen = length - low;
                const int32_t* line = table + lines[token] * stride;
                if ((long)shares.size() < seen) shares.resize(2 * seen), places.resize(2 * seen);
                for (long k = 0; k < seen; ++k)
                    places[k] = line[(low + k) / BLOCK] * int32_t(BLOCK) + int32_t((low + k) % BLOCK);
                for (long head = kv * group; head < (kv + 1) * group; ++head) {
                    const N* query = q + (token * heads + head) * width;
                    for (long e = 0; e < width; ++e) asked[e] = wide(query[e]) * scale;
                    float* share = shares.data();
                    const float top = scores_of(width, asked.data(), keys + kv * width, places.data(), seen, step, share);
                    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                    for (long k = 0; k < seen; ++k) sum += share[k] = power(share[k] - top);
                    mix_of(width, share, values + kv * width, places.data(), seen, step, 1.0f / sum,
                           out + (token * heads + head) * width);
                }
            }
        }
    }
}

// The first of the largest numbers of each row.
void largest(const float* x, int64_t* out, long rows, long width) {
#pragma omp parallel for schedule(dynamic)
    for (long row = 0; row < rows; ++row) {
        const float* at = x + row * width;
        float top = -__builtin_inff();
#pragma omp simd reduction(max : top)
        for (long v = 0; v < width; ++v) top = at[v] > top ? at[v] : top;
        long first = 0;
        while (first < width - 1 && !(at[first] >= top)) ++first;
        out[row] = first;
    }
}

}  // namespace

extern "C" {

long has_product() {
#ifdef LANES
    return 1;
#else
    return 0;
#endif
}

#ifdef LANES
#define PRODUCT(name, Out)                                                                                       \
    void name(void* x, void* w, void* bias, void* y, long tokens, long width, long outs, int64_t* a, int64_t* b, \
              int64_t* ranks, int64_t* slots, int64_t* ends, long parts, long widest, float* low) {              \
        product<Out>((bf16*)x, (bf16*)w, (bf16*)bias, (Out*)y, tokens, width, outs,                              \
                     {a, b, ranks, slots, ends, parts, widest}, low);                                            \
    }
PRODUCT(product_bfloat16, bf16)
PRODUCT(product_float32, float)
#endif

#define ATTEND(name, N)                                                                                          \
    void name(void* q, void* k, void* v, int32_t* table, int64_t* lines, int64_t* lengths, void* out,            \
              long tokens, long heads, long kv_heads, long width, long stride, long window, float scale) {       \
        attend<N>((N*)q, (N*)k, (N*)v, table, lines, lengths, (N*)out, tokens, heads, kv_heads, width, stride,   \
                  window, scale);                                                                                \
    }
ATTEND(attend_bfloat16, bf16)
ATTEND(attend_float32, float)

void largest_float32(float* x, int64_t* out, long rows, long width) { largest(x, out, rows, width); }
}
