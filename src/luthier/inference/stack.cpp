// All layers of a Llama-like decoder in one call: the tokens of a step go in, their last hidden states come out, and
// their keys and values are in the cache. Weights are bfloat16, sums float32, and what a layer hands on is rounded where
// transformers rounds it.
//
// Sources: paged attention (Kwon et al. 2023, arXiv 2309.06180); rotary positions (Su et al. 2021, arXiv 2104.09864);
// RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467); products and threads as in tiles.h.
//
// It does not know tensors, requests or which block is whose: inference/stack.py lays everything out.

#include "tiles.h"

#ifdef LANES

#include <omp.h>

#include <utility>

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

template <class To>
inline void norm(const Passed* x, const bf16* weight, To* y, long width, float eps) {
    Lanes sum = zero();
    for (long e = 0; e < width; e += TILE) sum = fused(wide(x + e), wide(x + e), sum);
    const Lanes scale = all(1.0f / __builtin_sqrtf(sum_of(sum) / float(width) + eps));
    for (long e = 0; e < width; e += TILE) put(y + e, times(times(wide(x + e), scale), wide(weight + e)));
}

inline void turn(Passed* x, const bf16* cosine, const bf16* sine, long turned) {  // rotary positions
    const long half = turned / 2;
    for (long i = 0; i < half; i += TILE) {
        const long some = half - i;
        const Lanes low = wide(some, x + i), high = wide(some, x + half + i);
        const Lanes back = times(high, wide(some, sine + i)), forth = times(low, wide(some, sine + half + i));
        put(some, x + i, fused_less(low, wide(some, cosine + i), back));
        put(some, x + half + i, fused(high, wide(some, cosine + half + i), forth));
    }
}

// A token's queries and keys turned; its keys and values into their place. What lies behind the last token of a
// sequence in its block is multiplied by zero, so it must be a number: whoever opens a block clears it.
inline void keep(const Stack& stack, const Layer& layer, const Step& step, long token, Passed* qkv) {
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
        const Passed *key = qkv + (stack.heads + kv) * head, *value = key + stack.kv_heads * head;
        bf16* keys = layer.keys + (block * stack.kv_heads + kv) * head * TILE + 2 * at;
        for (long e = 0; e < head; e += 2) keys[e * TILE] = kept(key[e]), keys[e * TILE + 1] = kept(key[e + 1]);
        bf16* values = layer.values + (block * stack.kv_heads + kv) * head * TILE;
        bf16* line = values + (at / 2) * 2 * head + at % 2;
        for (long e = 0; e < head; ++e) line[2 * e] = kept(value[e]);
        if (last && (before || at == 0)) {
            if (at % 2 == 0)
                for (long e = 0; e < head; ++e) line[2 * e + 1] = 0;
            std::memset(values + (at / 2 + 1) * 2 * head, 0, sizeof(bf16) * 2 * head * (TILE / 2 - 1 - at / 2));
        }
    }
}

struct Strip { long token, row, rows; };  // up to ROWS (token, head) rows of one sequence, from its `token` on

struct Scratch {
    std::vector<float> scores;
    std::vector<Passed> asked, shares;
    std::vector<const bf16*> values;
};

// The mean of values under shares: COLUMNS tiles of 16 features for COUNT rows.
template <int COLUMNS, int COUNT>
inline void mix(const bf16* const* blocks, long count, long head, const Passed* shares, long stride, const float* whole, Passed* const* to) {
    Lanes sum[COLUMNS][COUNT];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c)
#pragma GCC unroll 6
        for (int r = 0; r < COUNT; ++r) sum[c][r] = zero();
    for (long b = 0; b < count; ++b)
        for (long p = 0; p < TILE / 2; ++p)
#pragma GCC unroll 2
            for (int turn = 0; turn < TURNS; ++turn) {
                Line value[COLUMNS];
#pragma GCC unroll 4
                for (int c = 0; c < COLUMNS; ++c) value[c] = line_of(blocks[b] + p * 2 * head + c * 2 * TILE, turn);
#pragma GCC unroll 6
                for (int r = 0; r < COUNT; ++r) {
                    const Pair in = pair_of(shares + r * stride + b * TILE + 2 * p, turn);
#pragma GCC unroll 4
                    for (int c = 0; c < COLUMNS; ++c) sum[c][r] = dot(sum[c][r], value[c], in);
                }
            }
#pragma GCC unroll 6
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) put(to[r] + c * TILE, times(sum[c][r], all(whole[r])));
}

template <int COLUMNS>
inline void mixed(const bf16* const* blocks, long count, long head, const Passed* shares, long stride, const float* whole, Passed* const* to, long rows) {
    for (long r = 0; r < rows;) {
        const Passed* in = shares + r * stride;
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
inline float soften(float* scores, Passed* shares, long start, long count, long low, long high, float scale) {
    alignas(64) static const float lanes[TILE] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Lanes from = all(float(low)), until = all(float(high)), never = all(-__builtin_inff());
    const auto seen = [&](long k) { return within(plus(load(lanes), all(float(start + k))), from, until); };
    Lanes top = never;
    for (long k = 0; k < count; k += TILE) top = larger(top, either(seen(k), load(scores + k), never));
    const Lanes largest = all(largest_of(top)), factor = all(scale);
    Lanes sum = zero();
    for (long k = 0; k < count; k += TILE) {
        const Lanes share = either(seen(k), power(times(minus(load(scores + k), largest), factor)), zero());
        sum = plus(sum, share);
        put(shares + k, share);
    }
    return 1.0f / sum_of(sum);
}

void attend(const Stack& stack, const Layer& layer, const Step& step, const Strip& strip, long kv, const Passed* qkv, long stride, Passed* out, long apart, Scratch& own) {
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
    for (long r = 0; r < rows; ++r) std::memcpy(own.asked.data() + r * head, qkv + token(r) * stride + feature(r), sizeof(Passed) * head);
    alignas(64) float found[ROWS * TILE];
    for (long b = 0; b < count; ++b) {
        const bf16* keys = layer.keys + (table[start + b] * stack.kv_heads + kv) * head * TILE;
        some<1>(keys, 0, own.asked.data(), head, rows, head / 2, found);
        for (long r = 0; r < rows; ++r) store(scores + r * wide + b * TILE, load(found + r * TILE));
    }
    float whole[ROWS];
    Passed* to[ROWS];
    for (long r = 0; r < rows; ++r) {
        const long seen = step.positions[token(r)] + 1;
        whole[r] = soften(scores + r * wide, own.shares.data() + r * wide, start * TILE, wide, low(r), seen, layer.scale);
        to[r] = out + token(r) * apart + feature(r);
    }
    auto& values = own.values;
    values.resize(count);
    for (long b = 0; b < count; ++b) values[b] = layer.values + (table[start + b] * stack.kv_heads + kv) * head * TILE;
    long c = 0;
    for (; c + FEATURES * TILE <= head; c += FEATURES * TILE) {
        mixed<FEATURES>(values.data(), count, head, own.shares.data(), wide, whole, to, rows);
        for (auto& value : values) value += 2 * FEATURES * TILE;
        for (long r = 0; r < rows; ++r) to[r] += FEATURES * TILE;
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
    std::vector<Passed> space;
    Passed *x, *y, *qkv, *heard, *lit, *z;
    long x_row, qkv_row, heard_row, lit_row;

    void open(const Stack& stack, long tokens) {
        const long extra = 32;
        x_row = stack.width + extra, qkv_row = (stack.heads + 2 * stack.kv_heads) * stack.head + extra;
        heard_row = stack.heads * stack.head + extra, lit_row = stack.hidden + extra;
        space.resize(tokens * (2 * x_row + qkv_row + heard_row + lit_row + stack.low));
        Passed* at = space.data();
        for (auto [to, row] : {std::pair<Passed**, long>{&x, x_row}, {&y, x_row}, {&qkv, qkv_row}, {&heard, heard_row}, {&lit, lit_row}, {&z, stack.low}})
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
        const auto reads = [&](const Passed* x, long row) { return Rows{x, row, step.tokens, step.slots, at.z, low}; };
        const auto lowered = [&](const Linear& linear, const Rows& in) {
            if (step.slots) shrink(team, linear, pieces, most, in, at.z);
        };
        const auto add = [&](const Linear& linear, const Rows& in) {  // to the hidden states
            lowered(linear, in);
            team.share(pairs_of(linear), [&](long unit) {
                product(linear, 2 * unit, in, [&](long token, Lanes first, Lanes second) {
                    Passed* to = at.x + token * at.x_row + 2 * unit * TILE;
                    put(to, plus(rounded(first), wide(to)));
                    if (2 * unit + 1 < linear.tiles) put(to + TILE, plus(rounded(second), wide(to + TILE)));
                });
            });
        };
        team.share(step.tokens, [&](long t) {
            pass(stack.embed + step.ids[t] * stack.width, at.x + t * at.x_row, stack.width);
            norm(at.x + t * at.x_row, stack.layers[0].norm, at.y + t * at.x_row, stack.width, stack.eps);
        });
        for (long number = 0; number < stack.depth; ++number) {
            const Layer& layer = stack.layers[number];
            const Rows before = reads(at.y, at.x_row), between = reads(at.heard, at.heard_row), behind = reads(at.lit, at.lit_row);
            lowered(layer.qkv, before);
            team.share(pairs_of(layer.qkv), [&](long unit) {
                product(layer.qkv, 2 * unit, before, [&](long token, Lanes first, Lanes second) {
                    Passed* to = at.qkv + token * at.qkv_row + 2 * unit * TILE;
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
                product(layer.both, 2 * unit, before, [&](long token, Lanes gate, Lanes up) {
                    const Lanes g = rounded(gate), lit = over(g, plus(all(1.0f), power(minus(zero(), g))));
                    put(at.lit + token * at.lit_row + unit * TILE, times(lit, rounded(up)));
                });
            });
            add(layer.down, behind);
            const bf16* weight = number + 1 < stack.depth ? stack.layers[number + 1].norm : stack.norm;
            team.share(step.tokens, [&](long t) {
                const Passed* x = at.x + t * at.x_row;
                if (number + 1 < stack.depth) norm(x, weight, at.y + t * at.x_row, stack.width, stack.eps);
                else norm(x, weight, out + t * stack.width, stack.width, stack.eps);
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
    std::vector<Passed> rows(tokens * head->width);
    pass(x, rows.data(), tokens * head->width);
#pragma omp parallel
    {
#pragma omp single
        team.size = omp_get_num_threads();
        team.share(pairs_of(*head), [&](long unit) {
            product(*head, 2 * unit, {rows.data(), head->width, tokens, nullptr, nullptr, 0}, [&](long token, Lanes first, Lanes second) {
                float* to = out + token * head->tiles * TILE + 2 * unit * TILE;
                store(to, first);
                if (2 * unit + 1 < head->tiles) store(to + TILE, second);
            });
        });
    }
}
}

#else
extern "C" long stack_has() { return 0; }
#endif
