// Attention of documents over what they follow and themselves, and its gradients: scores never leave the cache.
//
// Sources: FlashAttention-2 (Dao 2023, arXiv 2307.08691): scores are computed again on the way back from the
// logarithm of their sum. A row of scores is whole when its softmax is taken, as it fits a CPU's cache. Rotary
// positions (Su et al. 2021, arXiv 2104.09864) are turned on the way in and turned back on the way out. A number's
// rounding is that of the tensors, sums are float32, each in one order whatever the number of threads.
//
// Work comes in units: documents that follow the same path, or a stretch of a long one. A unit lays out its path's keys
// once. Keys that several units see get their gradients from each unit's own sums, added up in the order of the units.
// Tensors are (tokens, heads, width); queries of one key head lie side by side, token by token, head by head.
//
// It does not know tensors: engine/flash.py checks what it is given, and says which documents make a unit.

#include "lanes.h"

#ifndef NUMBER
#define NUMBER float
#endif

#ifdef LANES

#include <cmath>
#include <type_traits>
#include <vector>

namespace {

struct Job {
    const void *q, *k, *v;          // (tokens, heads or key heads, width), rows so far apart as the counts say
    const void *cosine, *sine;      // (tokens, turned), or null where nothing is to turn
    void* out;                      // (tokens, heads, width)
    float* total;                   // (tokens, heads): logarithm of the sum of a query's powers
    const void* grad;               // of `out`
    void *q_grad, *k_grad, *v_grad; // without gaps
    float* sums;                    // (key heads, slots, 2, width): what units send to keys and values
    const int64_t* units;           // (count, 6): first and end of path and of pieces, tokens of the path, first slot
    const int64_t* path;            // (…, 2): first token, tokens
    const int64_t* pieces;          // (…, 4): first key, first query, queries, first slot
    const int64_t* documents;       // (…, 4): first token, tokens, first and end of what is owed to it
    const int64_t* owed;            // (…, 2): first slot, keys
    int64_t q_row, k_row, v_row, turned, tokens, heads, kv_heads, width;
    int64_t window;                 // keys that a query sees at most; 0: all
    int64_t count, document_count, slots;
    double scale;
};

template <class N> constexpr long PER = 4 / long(sizeof(N));  // numbers of a word, which is what a product takes at once
constexpr long LINE = 16;      // words of a line
constexpr long QUERIES = 64;   // rows of queries whose weights are gathered before they are sent to keys
constexpr long KEYS = 512;     // keys at once on the way back
constexpr long ROW = KEYS + 32;  // of slopes: written a transposed tile at a time
constexpr float ALL = 1e30f;

inline long up(long x, long to) { return (x + to - 1) / to * to; }

template <class N>
struct Space {  // memory that grows and is kept
    std::vector<N> held;
    N* of(long count) {
        if (long(held.size()) < count + 64) held.resize(count + 64);
        return (N*)((uintptr_t(held.data()) + 63) & ~uintptr_t(63));
    }
};

// ---- products ------------------------------------------------------------------------------------------------

struct Out {  // where sums go: (rows, tiles of 16), so many numbers apart
    float* at;
    long row, tile;
};

// Sums of COUNT rows of x, `stride` numbers apart, with TILES tiles of (words, 16), `apart`; ADD: to what is there.
template <bool ADD, int TILES, int COUNT, class N>
inline void sums(const N* w, long apart, const N* x, long stride, long words, const Out& out) {
    Lanes sum[TILES][COUNT];
#pragma GCC unroll 2
    for (int i = 0; i < TILES; ++i)
#pragma GCC unroll 12
        for (int r = 0; r < COUNT; ++r) sum[i][r] = zero();
    const char* at[3];
    for (int i = 0; i < 3; ++i) at[i] = (const char*)(x + 4 * i * stride);
    const long one = stride * long(sizeof(N)), three = 3 * one;
    for (long p = 0; p < words; ++p) {
        decltype(line_of(w, 0)) line[TILES];
#pragma GCC unroll 2
        for (int i = 0; i < TILES; ++i) line[i] = line_of(w + i * apart + p * LINE * PER<N>, 0);
#pragma GCC unroll 12
        for (int r = 0; r < COUNT; ++r) {
            const auto in = pair_of((const N*)(at[r / 4] + 4 * p + (r % 4 == 3 ? three : (r % 4) * one)), 0);
#pragma GCC unroll 2
            for (int i = 0; i < TILES; ++i) sum[i][r] = dot(sum[i][r], line[i], in);
        }
    }
#pragma GCC unroll 2
    for (int i = 0; i < TILES; ++i)
#pragma GCC unroll 12
        for (int r = 0; r < COUNT; ++r) {
            float* to = out.at + r * out.row + i * out.tile;
            store(to, ADD ? plus(load(to), sum[i][r]) : sum[i][r]);
        }
}

template <bool ADD, int TILES, class N>
void some(const N* w, long apart, const N* x, long stride, long rows, long words, Out out) {
    while (rows > 0) {
        long taken = 1;
        if (rows >= ROWS) sums<ADD, TILES, ROWS>(w, apart, x, stride, words, out), taken = ROWS;
        else if (ROWS > 8 && rows >= 8) sums<ADD, TILES, 8>(w, apart, x, stride, words, out), taken = 8;
        else if (rows >= 4) sums<ADD, TILES, 4>(w, apart, x, stride, words, out), taken = 4;
        else if (rows >= 2) sums<ADD, TILES, 2>(w, apart, x, stride, words, out), taken = 2;
        else sums<ADD, TILES, 1>(w, apart, x, stride, words, out);
        rows -= taken, out.at += taken * out.row, x += taken * stride;
    }
}

template <bool ADD, class N>
void product(const N* w, long apart, long tiles, const N* x, long stride, long rows, long words, const Out& out) {
    for (long first = 0; first < rows; first += ROWS) {
        const long count = rows - first < ROWS ? rows - first : ROWS;
        for (long tile = 0; tile < tiles; tile += ABREAST) {
            const Out to{out.at + first * out.row + tile * out.tile, out.row, out.tile};
            if (tiles - tile >= ABREAST) some<ADD, ABREAST>(w + tile * apart, apart, x + first * stride, stride, count, words, to);
            else some<ADD, 1>(w + tile * apart, apart, x + first * stride, stride, count, words, to);
        }
    }
}

// ---- layouts -------------------------------------------------------------------------------------------------

// Sixteen rows of `words` words, of which `count` are there, as (words, 16).
template <class N>
void across(const N* x, long stride, long count, long words, N* to) {
    for (long w = 0; w < words; w += LINE) {
        const long some = words - w < LINE ? words - w : LINE;
        Lanes row[16];
        for (long r = 0; r < 16; ++r) {
            float part[LINE] = {};
            if (r >= count) row[r] = zero();
            else if (some == LINE) row[r] = load((const float*)(x + r * stride + w * PER<N>));
            else std::memcpy(part, x + r * stride + w * PER<N>, 4 * some), row[r] = load(part);
        }
        transpose(row);
        for (long i = 0; i < some; ++i) store((float*)(to + (w + i) * LINE * PER<N>), row[i]);
    }
}

// One or two rows of 16 numbers as a line of words.
inline Lanes joined(const float* x, const float*) { return load(x); }
#if LANES == 512
inline Lanes joined(const bf16* x, const bf16* next) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)next));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

// Rows of `width` numbers, an even number of them, as tiles of (rows / PER, 16), `apart`.
template <class N>
void along(const N* x, long stride, long rows, long width, N* to, long apart) {
    for (long p = 0; p < rows; p += PER<N>)
        for (long e = 0; e < width; e += 16)
            store((float*)(to + e / 16 * apart + p * 16), joined(x + p * stride + e, x + (p + PER<N> - 1) * stride + e));
}

template <class N>
inline void keep(N* to, Lanes x) {
    if constexpr (std::is_same_v<N, float>) store(to, x);
    else put(to, x);
}
template <class N>
inline void keep(long count, N* to, Lanes x) {
    if (count >= 16) return keep(to, x);
    N some[16];
    keep(some, x);
    std::memcpy(to, some, sizeof(N) * count);
}
template <class N>
inline Lanes take(long count, const N* x) {
    if (count >= 16) return wide(x);
    N some[16] = {};
    std::memcpy(some, x, sizeof(N) * count);
    return wide(some);
}

// A row turned by its token's angles, or turned back (sign -1).
template <class N, class X>
inline void turn(const Job& job, const X* in, long token, float sign, N* to) {
    long rest = 0;
    if (job.cosine) {
        const long half = job.turned / 2;
        const N *c = (const N*)job.cosine + token * job.turned, *s = (const N*)job.sine + token * job.turned;
        const N *first = sign > 0 ? s : s + half, *second = sign > 0 ? s + half : s;
        for (long i = 0; i < half; i += 16) {
            const long n = half - i;
            const Lanes low = take(n, in + i), high = take(n, in + half + i), signs = all(sign);
            const Lanes crossed = times(signs, times(high, take(n, first + i)));
            const Lanes across = times(signs, times(low, take(n, second + i)));
            keep(n, to + i, minus(times(low, take(n, c + i)), crossed));
            keep(n, to + half + i, plus(times(high, take(n, c + half + i)), across));
        }
        rest = job.turned;
    }
    for (; rest < job.width; rest += 16) keep(job.width - rest, to + rest, take(job.width - rest, in + rest));
}

template <class N>
struct Rooms {
    Space<N> rows, keys, values, queries, weights, q_across, g_across, q_along, g_along, p_turned, d_turned, slopes, lines;
    Space<float> scores, places, totals, deltas, gradient;
};

template <class N>
Rooms<N>& rooms() {
    static thread_local Rooms<N> kept;
    return kept;
}

struct Unit {
    const int64_t* at;
    long path() const { return at[0]; }
    long path_end() const { return at[1]; }
    long piece() const { return at[2]; }
    long piece_end() const { return at[3]; }
    long before() const { return at[4]; }
    long slot() const { return at[5]; }
};

struct Piece {
    const int64_t* at;
    long key() const { return at[0]; }
    long query() const { return at[1]; }
    long count() const { return at[2]; }
    long slot() const { return at[3]; }
    long place() const { return query() - key(); }  // of the first query
    long keys() const { return place() + count(); }
};

// Keys and values `skip` … `skip + count` of token ranges, turned, with zeros up to a multiple of `to`.
template <class N>
long laid(const Job& job, const int64_t* ranges, long ranges_count, long head, long skip, long count, long to, N* keys, N* values) {
    const long width = job.width;
    long at = 0;
    for (long r = 0; r < ranges_count && at < count; ++r) {
        const long first = ranges[2 * r], tokens = ranges[2 * r + 1];
        for (long t = skip < tokens ? skip : tokens; t < tokens && at < count; ++t, ++at) {
            turn(job, (const N*)job.k + (first + t) * job.k_row + head * width, first + t, 1.0f, keys + at * width);
            std::memcpy(values + at * width, (const N*)job.v + (first + t) * job.v_row + head * width, sizeof(N) * width);
        }
        skip = skip > tokens ? skip - tokens : 0;
    }
    const long padded = up(at, to);
    std::memset(keys + at * width, 0, sizeof(N) * (padded - at) * width);
    std::memset(values + at * width, 0, sizeof(N) * (padded - at) * width);
    return padded;
}

// ---- the way there -------------------------------------------------------------------------------------------

template <class N>
void forward(const Job& job, const Unit& unit, long head) {
    Rooms<N>& room = rooms<N>();
    const long width = job.width, words = width / PER<N>, group = job.heads / job.kv_heads;
    const long before = unit.before(), own = up(before, 16);
    const float scale = float(job.scale);
    long longest = 0;
    for (long p = unit.piece(); p < unit.piece_end(); ++p) {
        const long keys = Piece{job.pieces + 4 * p}.keys();
        if (keys > longest) longest = keys;
    }
    const long slots = own + up(longest, 16), most = own > up(longest, 16) ? own : up(longest, 16);
    N *keys = room.keys.of(slots * width), *values = room.values.of(slots * width);
    N *some = room.rows.of(2 * most * width), *more = some + most * width;
    N *queries = room.queries.of(ROWS * width), *weights = room.weights.of(ROWS * slots);
    float *scores = room.scores.of(ROWS * slots), *mixed = room.gradient.of(ROWS * width);

    const auto lay = [&](const int64_t* ranges, long count, long tokens, long slot) {
        const long padded = laid(job, ranges, count, head, 0, tokens, 16, some, more);
        for (long i = 0; i < padded; i += 16) across(some + i * width, width, 16, words, keys + (slot + i) * width);
        along(more, width, padded, width, values + slot * 16, slots * 16);
    };
    lay(job.path + 2 * unit.path(), unit.path_end() - unit.path(), before, 0);
    for (long p = unit.piece(); p < unit.piece_end(); ++p) {
        const Piece piece{job.pieces + 4 * p};
        const int64_t range[2] = {piece.key(), piece.keys()};
        lay(range, 1, piece.keys(), own);
        for (long first = 0; first < piece.count() * group; first += ROWS) {
            const long rest = piece.count() * group - first, rows = rest < ROWS ? rest : ROWS;
            const auto token = [&](long r) { return piece.query() + (first + r) / group; };
            const auto place = [&](long r) { return piece.place() + (first + r) / group; };
            const auto row_of = [&](long r) { return token(r) * job.heads + head * group + (first + r) % group; };
            const auto lowest = [&](long r) {  // slot of the first key that is seen
                const long low = job.window ? before + place(r) - job.window + 1 : 0;
                return low <= 0 ? 0 : (low < before ? low : own + low - before);
            };
            for (long r = 0; r < rows; ++r) {
                const long of = token(r) * job.q_row + (head * group + (first + r) % group) * width;
                turn(job, (const N*)job.q + of, token(r), 1.0f, queries + r * width);
            }
            const long begin = lowest(0) / 16 * 16, end = up(own + place(rows - 1) + 1, 16);
            product<false>(keys + begin * width, 16 * width, (end - begin) / 16, queries, width, rows, words,
                           Out{scores + begin, slots, 16});
            float share[ROWS];
            for (long r = 0; r < rows; ++r) {
                float* score = scores + r * slots;
                N* weight = weights + r * slots;
                const long hidden[3][2] = {{begin, lowest(r)}, {before, own}, {own + place(r) + 1, end}};
                for (const auto& span : hidden)
                    for (long s = span[0] > begin ? span[0] : begin; s < span[1]; ++s) score[s] = -__builtin_inff();
                Lanes top = load(score + begin);
                for (long s = begin + 16; s < end; s += 16) top = larger(top, load(score + s));
                const float highest = largest_of(top) * scale;
                Lanes sum = zero();
                for (long s = begin; s < end; s += 16) {
                    const Lanes power_of = power(fused_less(load(score + s), all(scale), all(highest)));
                    sum = plus(sum, power_of);
                    keep(weight + s, power_of);
                }
                for (const auto& span : hidden)
                    for (long s = span[0] > begin ? span[0] : begin; s < span[1]; ++s) weight[s] = 0;
                const float all_of = sum_of(sum);
                share[r] = 1.0f / all_of;
                job.total[row_of(r)] = highest + std::log(all_of);
            }
            product<false>(values + begin * 16, slots * 16, width / 16, weights + begin, slots, rows,
                           (end - begin) / PER<N>, Out{mixed, width, 16});
            for (long r = 0; r < rows; ++r)
                for (long e = 0; e < width; e += 16)
                    keep((N*)job.out + row_of(r) * width + e, times(load(mixed + r * width + e), all(share[r])));
        }
    }
}

// ---- the way back --------------------------------------------------------------------------------------------

template <class N>
struct Back {  // a unit's queries, in tiles of 16 rows that no two pieces share, and what they look at
    const Job& job;
    long head, width, words, lanes;                  // lanes: rows with what fills their tiles up
    N *q_across, *g_across, *q_along, *g_along;      // queries and gradients, either way round
    float *places, *totals, *deltas, *gradient;      // by row; gradient: (lanes, width)
    float* sums;                                     // (slots, 2, width)

    // Rows first … last look at keys of these ranges, of which the first is `index` of their document.
    void look(const int64_t* ranges, long count, long keys, long index, float* to, long first, long last) {
        Rooms<N>& room = rooms<N>();
        N *key = room.keys.of(KEYS * width), *value = room.values.of(KEYS * width), *lines = room.lines.of(KEYS * width);
        N *p = room.p_turned.of(KEYS * QUERIES), *d = room.d_turned.of(KEYS * QUERIES), *slopes = room.slopes.of(ROW * QUERIES);
        for (long skip = 0; skip < keys; skip += KEYS) {
            const long here = keys - skip < KEYS ? keys - skip : KEYS;
            along(key, width, laid(job, ranges, count, head, skip, here, 2, key, value), width, lines, KEYS * 16);
            for (long row = first; row < last; row += QUERIES)
                block(key, value, lines, p, d, slopes, here, index + skip, to + skip * 2 * width, row,
                      last - row < QUERIES ? last - row : QUERIES);
        }
    }

    void block(const N* key, const N* value, const N* lines, N* p, N* d, N* slopes, long here, long index, float* to,
               long row, long rows) {
        const float scale = float(job.scale), far = job.window ? float(job.window) : ALL;
        const auto seen = [&](long from, long count) {  // keys that any, and that all of these rows see
            float low = ALL, high = -ALL;
            bool full = true;
            for (long r = from; r < from + count; ++r) {
                if (places[r] < -ALL / 2) { full = false; continue; }
                low = places[r] < low ? places[r] : low, high = places[r] > high ? places[r] : high;
            }
            const float begin = low - far + 1 - float(index), end = high + 1 - float(index);
            struct { long begin, end; bool full; float low, high; } found{
                begin > 0 ? long(begin) : 0, end < float(here) ? long(end) : here, full, low, high};
            return found;
        };
        const auto mine = seen(row, rows);
        const long low = mine.begin / 2 * 2, high = up(mine.end, 2);
        if (mine.end <= mine.begin) return;
        alignas(64) float scores[2 * ROWS * 16], against[2 * ROWS * 16];
        for (long tile = 0; tile < rows; tile += ABREAST * 16) {
            const long tiles = rows - tile < ABREAST * 16 ? (rows - tile) / 16 : ABREAST;
            const auto of = seen(row + tile, tiles * 16);
            const long from = of.begin / 2 * 2 > low ? of.begin / 2 * 2 : low, until = of.end > from ? of.end : from;
            const auto blank = [&](long begin, long end) {
                for (long k = begin; k < end; ++k) {
                    std::memset(p + k * QUERIES + tile, 0, sizeof(N) * tiles * 16);
                    std::memset(d + k * QUERIES + tile, 0, sizeof(N) * tiles * 16);
                }
            };
            blank(low, from), blank(until, high);
            for (long k = from; k < until; k += ROWS) {
                const long count = until - k < ROWS ? until - k : ROWS;
                const float first = float(index + k), last = float(index + k + count - 1);
                const bool whole = of.full && of.low >= last && of.high < first + far;
                product<false>(q_across + (row + tile) * width, 16 * width, tiles, key + k * width, width, count, words,
                               Out{scores, 16, ROWS * 16});
                product<false>(g_across + (row + tile) * width, 16 * width, tiles, value + k * width, width, count, words,
                               Out{against, 16, ROWS * 16});
                for (long i = 0; i < tiles; ++i) {
                    const long at = row + tile + i * 16;
                    const Lanes total = load(totals + at), place = load(places + at), delta = load(deltas + at);
                    for (long r = 0; r < count; ++r) {
                        const long sum = (i * ROWS + r) * 16, to = (k + r) * QUERIES + tile + i * 16;
                        Lanes weight = power(fused_less(load(scores + sum), all(scale), total));
                        if (!whole) weight = either(within(place, all(first + r), all(first + r + far)), weight, zero());
                        keep(p + to, weight);
                        keep(d + to, times(times(minus(load(against + sum), delta), weight), all(scale)));
                    }
                }
            }
        }
        const long sent = (high < here ? high : here) - low;
        product<true>(g_along + row * 16, lanes * 16, width / 16, p + low * QUERIES, QUERIES, sent, rows / PER<N>,
                      Out{to + (low * 2 + 1) * width, 2 * width, 16});
        product<true>(q_along + row * 16, lanes * 16, width / 16, d + low * QUERIES, QUERIES, sent, rows / PER<N>,
                      Out{to + low * 2 * width, 2 * width, 16});
        for (long r = 0; r < rows; r += 16)
            for (long k = low; k < high; k += 16 * PER<N>) {
                Lanes word[16];
                const long some = (high - k) / PER<N> < 16 ? (high - k) / PER<N> : 16;
                for (long i = 0; i < 16; ++i) {
                    const N* at = d + (k + i * PER<N>) * QUERIES + r;
                    word[i] = i < some ? joined(at, at + (PER<N> - 1) * QUERIES) : zero();
                }
                transpose(word);
                for (long i = 0; i < 16; ++i) store((float*)(slopes + (r + i) * ROW + k), word[i]);
            }
        product<true>(lines + low * 16, KEYS * 16, width / 16, slopes + low, ROW, rows, (high - low) / PER<N>,
                      Out{gradient + row * width, width, 16});
    }
};

template <class N>
void backward(const Job& job, const Unit& unit, long head) {
    Rooms<N>& room = rooms<N>();
    const long width = job.width, words = width / PER<N>, group = job.heads / job.kv_heads;
    long lanes = 0, end = unit.slot() + unit.before();
    for (long p = unit.piece(); p < unit.piece_end(); ++p) {
        const Piece piece{job.pieces + 4 * p};
        lanes += up(piece.count() * group, 16), end = piece.slot() + piece.keys();
    }
    float* sums = job.sums + head * job.slots * 2 * width;
    std::memset(sums + unit.slot() * 2 * width, 0, sizeof(float) * (end - unit.slot()) * 2 * width);
    Back<N> back{job, head, width, words, lanes,
                 room.q_across.of(lanes * width), room.g_across.of(lanes * width),
                 room.q_along.of(lanes * width), room.g_along.of(lanes * width),
                 room.places.of(lanes), room.totals.of(lanes), room.deltas.of(lanes), room.gradient.of(lanes * width), sums};
    std::memset(back.gradient, 0, sizeof(float) * lanes * width);
    N *queries = room.queries.of(16 * width), *grads = room.weights.of(16 * width);
    const auto row_of = [&](const Piece& piece, long r) {
        return (piece.query() + r / group) * job.heads + head * group + r % group;
    };
    for (long p = unit.piece(), lane = 0; p < unit.piece_end(); ++p) {
        const Piece piece{job.pieces + 4 * p};
        for (long first = 0; first < piece.count() * group; first += 16, lane += 16) {
            const long rest = piece.count() * group - first, rows = rest < 16 ? rest : 16;
            std::memset(queries, 0, sizeof(N) * 16 * width), std::memset(grads, 0, sizeof(N) * 16 * width);
            for (long r = 0; r < 16; ++r) {
                back.places[lane + r] = -ALL, back.totals[lane + r] = 0.0f, back.deltas[lane + r] = 0.0f;
                if (r >= rows) continue;
                const long row = row_of(piece, first + r), token = row / job.heads;
                turn(job, (const N*)job.q + token * job.q_row + row % job.heads * width, token, 1.0f, queries + r * width);
                std::memcpy(grads + r * width, (const N*)job.grad + row * width, sizeof(N) * width);
                Lanes sum = zero();
                for (long e = 0; e < width; e += 16)
                    sum = fused(wide(grads + r * width + e), wide((const N*)job.out + row * width + e), sum);
                back.places[lane + r] = float(piece.place() + (first + r) / group);
                back.totals[lane + r] = job.total[row], back.deltas[lane + r] = sum_of(sum);
            }
            across(queries, width, 16, words, back.q_across + lane * width);
            across(grads, width, 16, words, back.g_across + lane * width);
            along(queries, width, 16, width, back.q_along + lane * 16, lanes * 16);
            along(grads, width, 16, width, back.g_along + lane * 16, lanes * 16);
        }
    }
    const long path = unit.path_end() - unit.path();
    back.look(job.path + 2 * unit.path(), path, unit.before(), -unit.before(), sums + unit.slot() * 2 * width, 0, lanes);
    for (long p = unit.piece(), lane = 0; p < unit.piece_end(); ++p) {
        const Piece piece{job.pieces + 4 * p};
        const int64_t range[2] = {piece.key(), piece.keys()};
        const long more = up(piece.count() * group, 16);
        back.look(range, 1, piece.keys(), 0, sums + piece.slot() * 2 * width, lane, lane + more);
        for (long r = 0; r < piece.count() * group; ++r) {
            const long row = row_of(piece, r);
            turn(job, back.gradient + (lane + r) * width, row / job.heads, -1.0f, (N*)job.q_grad + row * width);
        }
        lane += more;
    }
}

// What units owe to the keys of one document, added up, turned back.
template <class N>
void settled(const Job& job, const int64_t* document, long head) {
    const long width = job.width;
    std::vector<float> sum(2 * width);
    for (long t = 0; t < document[1]; ++t) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (long o = document[2]; o < document[3]; ++o) {
            const int64_t* owed = job.owed + 2 * o;
            if (t >= owed[1]) continue;
            const float* more = job.sums + (head * job.slots + owed[0] + t) * 2 * width;
            for (long e = 0; e < 2 * width; e += 16) store(&sum[e], plus(load(&sum[e]), load(more + e)));
        }
        const long token = document[0] + t, to = (token * job.kv_heads + head) * width;
        turn(job, sum.data(), token, -1.0f, (N*)job.k_grad + to);
        for (long e = 0; e < width; e += 16) keep((N*)job.v_grad + to + e, load(&sum[width + e]));
    }
}

template <class N>
void there(const Job& job) {
#pragma omp parallel for schedule(dynamic)
    for (long n = 0; n < job.count * job.kv_heads; ++n)
        forward<N>(job, Unit{job.units + 6 * (n / job.kv_heads)}, n % job.kv_heads);
}

template <class N>
void back(const Job& job) {
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (long n = 0; n < job.count * job.kv_heads; ++n)
            backward<N>(job, Unit{job.units + 6 * (n / job.kv_heads)}, n % job.kv_heads);
#pragma omp for schedule(dynamic)
        for (long n = 0; n < job.document_count * job.kv_heads; ++n)
            settled<N>(job, job.documents + 4 * (n / job.kv_heads), n % job.kv_heads);
    }
}

}  // namespace

extern "C" {
void flash_there(const Job* job) { there<NUMBER>(*job); }
void flash_back(const Job* job) { back<NUMBER>(*job); }
long flash_has() { return 1; }
}

#else
extern "C" long flash_has() { return 0; }
#endif
