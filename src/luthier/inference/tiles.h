// bfloat16 in tiles: threads that share a step, and products of its tokens with weights and adapters.
//
// Sources: weights laid out as they are multiplied, as in GotoBLAS (Goto & van de Geijn 2008, ACM TOMS 34(3)); LoRA
// (Hu et al. 2021, arXiv 2106.09685), many adapters in one product as in Punica (Chen et al. 2023, arXiv 2310.18547).
// Every sum is taken in one order whatever the number of threads and of tokens, so a token's bits do not depend on who
// shares the step. Threads take the next piece of work as they come: one that the system holds up holds up no more than
// its piece.
//
// It does not know layers, or how tensors become tiles: stack.cpp and stack.py do; nor what a CPU calls its
// instructions: lanes.h does.

#pragma once

#include "lanes.h"

#ifdef LANES

#include <sched.h>

#include <atomic>
#include <vector>

namespace {

constexpr long TILE = 16;   // outputs of a tile; keys of a block of the cache
constexpr long PIECE = 24;  // tokens of one adapter that one thread takes at a time
constexpr long AHEAD = 4096;  // bytes: weights are asked for while those before them are multiplied; a CPU's own
                              // foresight ends with a page

struct Linear {            // layers that read the same input, as one
    const void* weight;    // (tiles, width / 2, 16, 2), bfloat16, or int8 where there is a scale
    const float* scale;    // (tiles * 16), what each output's weights are multiplied by, or null
    const bf16* bias;      // (tiles * 16), or null
    const int64_t* part;   // by tile: which of the layers it belongs to
    const int64_t* a;      // by slot: A of all parts, in tiles as the weights are; 0 where there is none
    const int64_t* b;      // by slot: scaled B in tiles, (tiles, rank / 2, 16, 2)
    const int64_t* rank;   // by slot, even
    const int64_t* lows;   // by slot: tiles of A
    int64_t width, tiles;
};

// ---- threads -------------------------------------------------------------------------------------------------

struct Team {
    int size = 1;
    alignas(64) std::atomic<long> next{0};
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> round{0};

    template <class Work>
    void share(long units, Work work) {  // each unit once, by whichever thread is free; then all meet
        for (long unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) work(unit);
        const int now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived.store(0, std::memory_order_relaxed);
            next.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int tries = 0; round.load(std::memory_order_acquire) == now; ++tries)
            if (tries < 2000) _mm_pause();
            else sched_yield();  // another process has the core that we wait for
    }
};

// ---- products ------------------------------------------------------------------------------------------------

// Sums of COUNT rows of x with TILES tiles, `pairs` pairs of numbers each; tiles lie `apart` from each other.
template <int TILES, int COUNT, class W>
inline void sums(const W* w, long apart, const Passed* x, long stride, long pairs, float* out) {
    Lanes sum[TILES][COUNT];
#pragma GCC unroll 2
    for (int i = 0; i < TILES; ++i)
#pragma GCC unroll 12
        for (int r = 0; r < COUNT; ++r) sum[i][r] = zero();
    const char* at[3];
    for (int i = 0; i < 3; ++i) at[i] = (const char*)(x + 4 * i * stride);
    const long one = stride * long(sizeof(Passed)), three = 3 * one;
    for (long p = 0; p < pairs; ++p)
#pragma GCC unroll 2
        for (int turn = 0; turn < TURNS; ++turn) {
            Line row[TILES];
#pragma GCC unroll 2
            for (int i = 0; i < TILES; ++i) {
                const W* line = w + i * apart + p * 2 * TILE;
                row[i] = line_of(line, turn);
                if (!turn) _mm_prefetch((const char*)line + AHEAD, _MM_HINT_T1);
            }
#pragma GCC unroll 12
            for (int r = 0; r < COUNT; ++r) {
                const char* from = at[r / 4] + 2 * long(sizeof(Passed)) * p + (r % 4 == 3 ? three : (r % 4) * one);
                const Pair in = pair_of((const Passed*)from, turn);
#pragma GCC unroll 2
                for (int i = 0; i < TILES; ++i) sum[i][r] = dot(sum[i][r], row[i], in);
            }
        }
#pragma GCC unroll 2
    for (int i = 0; i < TILES; ++i)
#pragma GCC unroll 12
        for (int r = 0; r < COUNT; ++r) store(out + (i * ROWS + r) * TILE, sum[i][r]);
}

// Up to ROWS rows, to out[tile][row][16].
template <int TILES, class W>
inline void some(const W* w, long apart, const Passed* x, long stride, long rows, long pairs, float* out) {
    if (TILES > ABREAST && rows > 3) {
        for (int i = 0; i < TILES; ++i) some<1>(w + i * apart, 0, x, stride, rows, pairs, out + i * ROWS * TILE);
        return;
    }
    for (long r = 0; r < rows;) {
        const Passed* in = x + r * stride;
        float* to = out + r * TILE;
        switch (rows - r) {
            case 12: sums<TILES, 12>(w, apart, in, stride, pairs, to), r += 12; break;
            case 11: case 10: case 9: case 8: sums<TILES, 8>(w, apart, in, stride, pairs, to), r += 8; break;
            case 7: case 6: sums<TILES, 6>(w, apart, in, stride, pairs, to), r += 6; break;
            case 5: case 4: sums<TILES, 4>(w, apart, in, stride, pairs, to), r += 4; break;
            case 3: sums<TILES, 3>(w, apart, in, stride, pairs, to), r += 3; break;
            case 2: sums<TILES, 2>(w, apart, in, stride, pairs, to), r += 2; break;
            default: sums<TILES, 1>(w, apart, in, stride, pairs, to), r += 1;
        }
    }
}

struct Rows {  // what a product reads: x by token, and what A made of it
    const Passed* x;
    long stride, tokens;
    const int64_t* slots;  // null: no adapter in this step
    const Passed* z;
    long low;
};

template <class W>
inline void some(long tiles, const W* w, long apart, const Passed* x, long stride, long rows, long pairs, float* out) {
    if (tiles == 2) some<2>(w, apart, x, stride, rows, pairs, out);
    else some<1>(w, apart, x, stride, rows, pairs, out);
}

// Two tiles for all tokens; `done(token, first, second)` takes sums of 16 outputs each.
template <class Done>
inline void product(const Linear& linear, long tile, const Rows& in, Done done) {
    alignas(64) float out[2 * ROWS * TILE];
    const long apart = linear.width * TILE, pairs = linear.width / 2, tiles = linear.tiles - tile > 1 ? 2 : 1;
    for (long t = 0, before = 0; in.slots && t < in.tokens; before = in.slots[t++]) {
        const long slot = in.slots[t], bytes = linear.rank[slot] * tiles * TILE * long(sizeof(bf16));
        if (slot == before || !linear.b[slot]) continue;  // else its B is asked for before it is needed
        const char* b = (const char*)((const bf16*)linear.b[slot] + tile * linear.rank[slot] * TILE);
        for (long at = 0; at < bytes; at += 64) _mm_prefetch(b + at, _MM_HINT_T1);
    }
    for (long first = 0; first < in.tokens; first += ROWS) {
        const long rows = in.tokens - first < ROWS ? in.tokens - first : ROWS;
        const Passed* x = in.x + first * in.stride;
        if (linear.scale) some(tiles, (const int8_t*)linear.weight + tile * apart, apart, x, in.stride, rows, pairs, out);
        else some(tiles, (const bf16*)linear.weight + tile * apart, apart, x, in.stride, rows, pairs, out);
        for (long r = 0; r < rows; ++r) {
            const long slot = in.slots ? in.slots[first + r] : 0;
            const bf16* b = in.slots ? (const bf16*)linear.b[slot] : nullptr;
            Lanes sum[2];
            for (long i = 0; i < tiles; ++i) {
                sum[i] = load(out + (i * ROWS + r) * TILE);
                if (linear.scale) sum[i] = times(sum[i], load(linear.scale + (tile + i) * TILE));
                if (b) {
                    const long rank = linear.rank[slot];
                    const Passed* z = in.z + (first + r) * in.low + linear.part[tile + i] * rank;
                    const bf16* up = b + (tile + i) * rank * TILE;
                    for (long p = 0; p < rank / 2; ++p)
                        for (int turn = 0; turn < TURNS; ++turn)
                            sum[i] = dot(sum[i], line_of(up + 2 * p * TILE, turn), pair_of(z + 2 * p, turn));
                }
                if (linear.bias) sum[i] = plus(sum[i], wide(linear.bias + (tile + i) * TILE));
            }
            done(first + r, sum[0], sum[1]);
        }
    }
}

inline long pairs_of(const Linear& linear) { return (linear.tiles + 1) / 2; }

struct Piece { long first, count, slot; };  // neighbouring tokens under one adapter

inline void shrink(Team& team, const Linear& linear, const std::vector<Piece>& pieces, long most, const Rows& in, Passed* z) {
    team.share(long(pieces.size()) * most, [&](long unit) {
        const Piece& piece = pieces[unit / most];
        const bf16* a = (const bf16*)linear.a[piece.slot];
        const long tile = unit % most;
        if (!a || tile >= linear.lows[piece.slot]) return;
        alignas(64) float out[ROWS * TILE];
        for (long first = 0; first < piece.count; first += ROWS) {
            const long rows = piece.count - first < ROWS ? piece.count - first : ROWS, token = piece.first + first;
            some<1>(a + tile * linear.width * TILE, 0, in.x + token * in.stride, in.stride, rows, linear.width / 2, out);
            for (long r = 0; r < rows; ++r) put(z + (token + r) * in.low + tile * TILE, load(out + r * TILE));
        }
    });
}

}  // namespace

#endif
