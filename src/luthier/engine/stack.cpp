// All layers of a Llama-like decoder in one call, for a CPU that multiplies bfloat16 (AVX-512): the tokens of a step go
// in, their last hidden states come out, and their keys and values are in the cache. Weights are bfloat16, sums float32,
// and what a layer hands on is rounded where transformers rounds it.
//
// Sources: paged attention (Kwon et al. 2023, arXiv 2309.06180); rotary positions (Su et al. 2021, arXiv 2104.09864);
// RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467); products and threads as in tiles.h.
//
// It does not know tensors, requests or which block is whose: engine/stack.py lays everything out.

#ifdef __AVX512BF16__

#include <omp.h>

#include <utility>

#include "tiles.h"

namespace {

struct Layer {
    const bf16 *norm, *norm_mid, *norm_q, *norm_k;  // the last two null where there are none
    Linear qkv, out, both, down;
    bf16* keys;    // (blocks, kv heads, width / 2, 16, 2)
    bf16* values;  // (blocks, kv heads, 8, width, 2)
    int64_t window;
    float scale;
};

struct Stack {
    const Layer* layers;
    const bf16 *embed, *norm, *cosine, *sine;  // the last two (positions, turned)
    int64_t depth, width, hidden, heads, kv_heads, head, turned, low;  // low: the most numbers that an A makes
    float eps;
};

struct Step {
    const int64_t *ids, *positions, *places, *slots, *lines;
    const int32_t* table;
    int64_t tokens, stride;
};

// ---- what stands between products ----------------------------------------------------------------------------

inline void norm(const bf16* x, const bf16* weight, bf16* y, long width, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (long e = 0; e < width; e += 16) sum = _mm512_fmadd_ps(wide(x + e), wide(x + e), sum);
    const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / float(width) + eps));
    for (long e = 0; e < width; e += 16) put(y + e, _mm512_mul_ps(_mm512_mul_ps(wide(x + e), scale), wide(weight + e)));
}

inline void turn(bf16* x, const bf16* cosine, const bf16* sine, long turned) {  // rotary positions
    const long half = turned / 2;
    for (long i = 0; i < half; i += 16) {
        const __mmask16 some = half - i < 16 ? __mmask16((1u << (half - i)) - 1) : __mmask16(0xffff);
        const __m512 low = wide(some, x + i), high = wide(some, x + half + i);
        const __m512 back = _mm512_mul_ps(high, wide(some, sine + i)), forth = _mm512_mul_ps(low, wide(some, sine + half + i));
        put(some, x + i, _mm512_fmsub_ps(low, wide(some, cosine + i), back));
        put(some, x + half + i, _mm512_fmadd_ps(high, wide(some, cosine + half + i), forth));
    }
}

// A token's queries and keys turned; its keys and values into their place. What lies behind the last token of a
// sequence in its block is multiplied by zero, so it must be a number: whoever opens a block clears it.
inline void keep(const Stack& stack, const Layer& layer, const Step& step, long token, bf16* qkv) {
    const long head = stack.head, block = step.places[token] / TILE, at = step.places[token] % TILE;
    const bf16 *cosine = stack.cosine + step.positions[token] * stack.turned, *sine = stack.sine + step.positions[token] * stack.turned;
    const bool before = token > 0 && step.lines[token - 1] == step.lines[token];
    const bool last = token + 1 == step.tokens || step.lines[token + 1] != step.lines[token];
    for (long h = 0; h < stack.heads + stack.kv_heads; ++h) {
        const bf16* weight = h < stack.heads ? layer.norm_q : layer.norm_k;
        if (weight) norm(qkv + h * head, weight, qkv + h * head, head, stack.eps);
        turn(qkv + h * head, cosine, sine, stack.turned);
    }
    for (long kv = 0; kv < stack.kv_heads; ++kv) {
        const bf16 *key = qkv + (stack.heads + kv) * head, *value = key + stack.kv_heads * head;
        bf16* keys = layer.keys + (block * stack.kv_heads + kv) * head * TILE + 2 * at;
        for (long e = 0; e < head; e += 2) std::memcpy(keys + e * TILE, key + e, 4);
        bf16* values = layer.values + (block * stack.kv_heads + kv) * head * TILE;
        bf16* line = values + (at / 2) * 2 * head + at % 2;
        for (long e = 0; e < head; ++e) line[2 * e] = value[e];
        if (last && (before || at == 0)) {
            if (at % 2 == 0)
                for (long e = 0; e < head; ++e) line[2 * e + 1] = 0;
            std::memset(values + (at / 2 + 1) * 2 * head, 0, sizeof(bf16) * 2 * head * (TILE / 2 - 1 - at / 2));
        }
    }
}

struct Strip { long token, row, rows; };  // up to 12 (token, head) rows of one sequence, from its `token` on

struct Scratch {
    std::vector<float> scores;
    std::vector<bf16> asked, shares;
    std::vector<const bf16*> values;
};

// The mean of values under shares: COLUMNS tiles of 16 features for COUNT rows.
template <int COLUMNS, int COUNT>
inline void mix(const bf16* const* blocks, long count, long head, const bf16* shares, long stride, const float* whole, bf16* const* to) {
    __m512 sum[COLUMNS][COUNT];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c)
#pragma GCC unroll 6
        for (int r = 0; r < COUNT; ++r) sum[c][r] = _mm512_setzero_ps();
    for (long b = 0; b < count; ++b)
        for (long p = 0; p < TILE / 2; ++p) {
            __m512bh value[COLUMNS];
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; ++c) value[c] = (__m512bh)_mm512_loadu_si512(blocks[b] + p * 2 * head + c * 2 * TILE);
#pragma GCC unroll 6
            for (int r = 0; r < COUNT; ++r) {
                int32_t pair;
                std::memcpy(&pair, shares + r * stride + b * TILE + 2 * p, 4);
                const __m512bh in = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int c = 0; c < COLUMNS; ++c) sum[c][r] = _mm512_dpbf16_ps(sum[c][r], value[c], in);
            }
        }
#pragma GCC unroll 6
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) put(to[r] + c * TILE, _mm512_mul_ps(sum[c][r], _mm512_set1_ps(whole[r])));
}

template <int COLUMNS>
inline void mixed(const bf16* const* blocks, long count, long head, const bf16* shares, long stride, const float* whole, bf16* const* to, long rows) {
    for (long r = 0; r < rows;) {
        const bf16* in = shares + r * stride;
        switch (rows - r) {
            case 5: case 4: mix<COLUMNS, 4>(blocks, count, head, in, stride, whole + r, to + r), r += 4; break;
            case 3: mix<COLUMNS, 3>(blocks, count, head, in, stride, whole + r, to + r), r += 3; break;
            case 2: mix<COLUMNS, 2>(blocks, count, head, in, stride, whole + r, to + r), r += 2; break;
            case 1: mix<COLUMNS, 1>(blocks, count, head, in, stride, whole + r, to + r), r += 1; break;
            default: mix<COLUMNS, 6>(blocks, count, head, in, stride, whole + r, to + r), r += 6;
        }
    }
}

// exp(score - largest) as bfloat16 over `count` places from `start` on, 0 outside low ... high; 1 / their sum.
inline float soften(float* scores, bf16* shares, long start, long count, long low, long high, float scale) {
    __m512 top = _mm512_set1_ps(-__builtin_inff());
    const __m512 lanes = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 from = _mm512_set1_ps(float(low)), until = _mm512_set1_ps(float(high));
    const auto seen = [&](long k) {
        const __m512 place = _mm512_add_ps(lanes, _mm512_set1_ps(float(start + k)));
        return __mmask16(_mm512_cmp_ps_mask(place, from, _CMP_GE_OQ) & _mm512_cmp_ps_mask(place, until, _CMP_LT_OQ));
    };
    for (long k = 0; k < count; k += TILE) top = _mm512_mask_max_ps(top, seen(k), top, _mm512_load_ps(scores + k));
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top)), factor = _mm512_set1_ps(scale);
    __m512 sum = _mm512_setzero_ps();
    for (long k = 0; k < count; k += TILE) {
        const __m512 gap = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(scores + k), largest), factor);
        const __m512 share = _mm512_maskz_mov_ps(seen(k), power(gap));
        sum = _mm512_add_ps(sum, share);
        put(shares + k, share);
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
}

void attend(const Stack& stack, const Layer& layer, const Step& step, const Strip& strip, long kv, const bf16* qkv, long stride, bf16* out, long apart, Scratch& own) {
    const long group = stack.heads / stack.kv_heads, head = stack.head, rows = strip.rows;
    const auto token = [&](long r) { return strip.token + (strip.row + r) / group; };
    const auto feature = [&](long r) { return (kv * group + (strip.row + r) % group) * head; };
    const auto low = [&](long r) {
        const long seen = step.positions[token(r)] + 1;
        return layer.window && seen > layer.window ? seen - layer.window : 0;
    };
    const long start = low(0) / TILE, end = step.positions[token(rows - 1)] / TILE + 1, count = end - start, wide = count * TILE;
    const int32_t* table = step.table + step.lines[strip.token] * step.stride;
    own.scores.resize(rows * wide + TILE), own.shares.resize(rows * wide), own.asked.resize(rows * head);
    float* scores = (float*)((uintptr_t(own.scores.data()) + 63) & ~uintptr_t(63));
    for (long r = 0; r < rows; ++r) std::memcpy(own.asked.data() + r * head, qkv + token(r) * stride + feature(r), sizeof(bf16) * head);
    alignas(64) float found[ROWS * TILE];
    for (long b = 0; b < count; ++b) {
        const bf16* keys = layer.keys + (table[start + b] * stack.kv_heads + kv) * head * TILE;
        some<1>(keys, 0, own.asked.data(), head, rows, head / 2, found);
        for (long r = 0; r < rows; ++r) _mm512_store_ps(scores + r * wide + b * TILE, _mm512_load_ps(found + r * TILE));
    }
    float whole[ROWS];
    bf16* to[ROWS];
    for (long r = 0; r < rows; ++r) {
        const long seen = step.positions[token(r)] + 1;
        whole[r] = soften(scores + r * wide, own.shares.data() + r * wide, start * TILE, wide, low(r), seen, layer.scale);
        to[r] = out + token(r) * apart + feature(r);
    }
    auto& values = own.values;
    values.resize(count);
    for (long b = 0; b < count; ++b) values[b] = layer.values + (table[start + b] * stack.kv_heads + kv) * head * TILE;
    long c = 0;
    for (; c + 4 * TILE <= head; c += 4 * TILE) {
        mixed<4>(values.data(), count, head, own.shares.data(), wide, whole, to, rows);
        for (auto& value : values) value += 8 * TILE;
        for (long r = 0; r < rows; ++r) to[r] += 4 * TILE;
    }
    for (; c < head; c += TILE) {
        mixed<1>(values.data(), count, head, own.shares.data(), wide, whole, to, rows);
        for (auto& value : values) value += 2 * TILE;
        for (long r = 0; r < rows; ++r) to[r] += TILE;
    }
}

// ---- the layers ----------------------------------------------------------------------------------------------

std::vector<Piece> pieces_of(const Step& step) {
    std::vector<Piece> found;
    for (long t = 0; step.slots && t < step.tokens; ++t) {
        const bool goes_on = !found.empty() && found.back().slot == step.slots[t] && found.back().count < PIECE;
        if (goes_on) ++found.back().count;
        else found.push_back({t, 1, step.slots[t]});
    }
    return found;
}

std::vector<Strip> strips_of(const Step& step, long group) {
    std::vector<Strip> found;
    for (long first = 0, last; first < step.tokens; first = last) {
        for (last = first + 1; last < step.tokens && step.lines[last] == step.lines[first];) ++last;
        const long rows = (last - first) * group;
        for (long row = 0; row < rows; row += ROWS) found.push_back({first, row, rows - row < ROWS ? rows - row : ROWS});
    }
    return found;
}

struct Room {  // what a step works in, kept from step to step; each row a little longer than it must be, so that
               // rows of a wide model do not fall on the same lines of a cache
    std::vector<bf16> all;
    bf16 *x, *y, *qkv, *heard, *lit, *z;
    long x_row, qkv_row, heard_row, lit_row;

    void open(const Stack& stack, long tokens) {
        const long extra = 32;
        x_row = stack.width + extra, qkv_row = (stack.heads + 2 * stack.kv_heads) * stack.head + extra;
        heard_row = stack.heads * stack.head + extra, lit_row = stack.hidden + extra;
        all.resize(tokens * (2 * x_row + qkv_row + heard_row + lit_row + stack.low));
        bf16* at = all.data();
        for (auto [to, row] : {std::pair<bf16**, long>{&x, x_row}, {&y, x_row}, {&qkv, qkv_row}, {&heard, heard_row}, {&lit, lit_row}, {&z, stack.low}})
            *to = at, at += tokens * row;
    }
};

void run(const Stack& stack, const Step& step, bf16* out) {
    static thread_local Room room;
    room.open(stack, step.tokens);
    const Room& at = room;
    const auto pieces = pieces_of(step);
    const auto strips = strips_of(step, stack.heads / stack.kv_heads);
    const long low = stack.low, most = low / TILE;
    Team team;
    team.size = omp_get_max_threads();
#pragma omp parallel num_threads(team.size)
    {
        Scratch own;
#pragma omp single
        team.size = omp_get_num_threads();
        const auto reads = [&](const bf16* x, long row) { return Rows{x, row, step.tokens, step.slots, at.z, low}; };
        const auto lowered = [&](const Linear& linear, const Rows& in) {
            if (step.slots) shrink(team, linear, pieces, most, in, at.z);
        };
        const auto add = [&](const Linear& linear, const Rows& in) {  // to the hidden states
            lowered(linear, in);
            team.share(pairs_of(linear), [&](long unit) {
                product(linear, 2 * unit, in, [&](long token, __m512 first, __m512 second) {
                    bf16* to = at.x + token * at.x_row + 2 * unit * TILE;
                    put(to, _mm512_add_ps(rounded(first), wide(to)));
                    if (2 * unit + 1 < linear.tiles) put(to + TILE, _mm512_add_ps(rounded(second), wide(to + TILE)));
                });
            });
        };
        team.share(step.tokens, [&](long t) {
            std::memcpy(at.x + t * at.x_row, stack.embed + step.ids[t] * stack.width, sizeof(bf16) * stack.width);
            norm(at.x + t * at.x_row, stack.layers[0].norm, at.y + t * at.x_row, stack.width, stack.eps);
        });
        for (long number = 0; number < stack.depth; ++number) {
            const Layer& layer = stack.layers[number];
            const Rows before = reads(at.y, at.x_row), between = reads(at.heard, at.heard_row), behind = reads(at.lit, at.lit_row);
            lowered(layer.qkv, before);
            team.share(pairs_of(layer.qkv), [&](long unit) {
                product(layer.qkv, 2 * unit, before, [&](long token, __m512 first, __m512 second) {
                    bf16* to = at.qkv + token * at.qkv_row + 2 * unit * TILE;
                    put(to, first);
                    if (2 * unit + 1 < layer.qkv.tiles) put(to + TILE, second);
                });
            });
            team.share(step.tokens, [&](long t) { keep(stack, layer, step, t, at.qkv + t * at.qkv_row); });
            team.share(long(strips.size()) * stack.kv_heads, [&](long unit) {
                attend(stack, layer, step, strips[unit / stack.kv_heads], unit % stack.kv_heads, at.qkv, at.qkv_row, at.heard, at.heard_row, own);
            });
            add(layer.out, between);
            team.share(step.tokens, [&](long t) { norm(at.x + t * at.x_row, layer.norm_mid, at.y + t * at.x_row, stack.width, stack.eps); });
            lowered(layer.both, before);
            team.share(pairs_of(layer.both), [&](long unit) {
                product(layer.both, 2 * unit, before, [&](long token, __m512 gate, __m512 up) {
                    const __m512 g = rounded(gate), one = _mm512_set1_ps(1.0f);
                    const __m512 lit = _mm512_div_ps(g, _mm512_add_ps(one, power(_mm512_sub_ps(_mm512_setzero_ps(), g))));
                    put(at.lit + token * at.lit_row + unit * TILE, _mm512_mul_ps(lit, rounded(up)));
                });
            });
            add(layer.down, behind);
            const bf16* weight = number + 1 < stack.depth ? stack.layers[number + 1].norm : stack.norm;
            team.share(step.tokens, [&](long t) {
                bf16* to = number + 1 < stack.depth ? at.y + t * at.x_row : out + t * stack.width;
                norm(at.x + t * at.x_row, weight, to, stack.width, stack.eps);
            });
        }
    }
}

}  // namespace

extern "C" {

long stack_has() { return 1; }

void stack_hidden(const Stack* stack, const Step* step, bf16* out) { run(*stack, *step, out); }

// Float32 logits (tokens, vocabulary) of hidden states that lie end to end.
void stack_logits(const Linear* head, const bf16* x, long tokens, float* out) {
    Team team;
#pragma omp parallel
    {
#pragma omp single
        team.size = omp_get_num_threads();
        team.share(pairs_of(*head), [&](long unit) {
            product(*head, 2 * unit, {x, head->width, tokens, nullptr, nullptr, 0}, [&](long token, __m512 first, __m512 second) {
                float* to = out + token * head->tiles * TILE + 2 * unit * TILE;
                _mm512_storeu_ps(to, first);
                if (2 * unit + 1 < head->tiles) _mm512_storeu_ps(to + TILE, second);
            });
        });
    }
}
}

#else
extern "C" long stack_has() { return 0; }
#endif
