// Sums of products of bfloat16 matrices for a CPU that multiplies bfloat16 (AVX-512): C = X W + Y V, and the thin
// C = X^T W of an adapter's gradient, a sum over all tokens.
//
// Sources: panels of the right factor packed as they are multiplied, as in GotoBLAS (Goto & van de Geijn 2008, ACM
// TOMS 34(3)). A panel is packed when it is needed and thrown away, so weights lie in memory once, and either way round.
// Sums stay in registers until they are rounded: those of one product from its first pair to its last, then those of
// the other, in this order whatever the number of threads. The thin product reads W once, where it lies: a stretch of
// lines at a time, so that what is read in small pieces has come into the cache in large ones.
//
// It does not know layers or tensors: engine/native.py checks what it is given. Of X W + Y V a left factor's rows are
// read in pairs; where the length is odd, what lies behind the last number of a row must be a number.

#include <vector>

#include "lanes.h"

#if LANES == 512

#include <omp.h>

namespace {

constexpr long TILE = 16;  // columns of a tile

struct Factors {
    const bf16* x;       // (rows, depth), `x_row` apart
    const bf16* w;       // (depth, columns), or where `across` its transpose; lines lie `w_line` apart
    int64_t x_row, w_line, depth, across;
};

struct Job {
    Factors factors[2];
    int64_t count, rows, columns;
    bf16* out;  // (rows, columns)
};

struct Thin {
    const bf16 *x, *w;   // (depth, rows) and (depth, columns); lines lie `x_line` and `w_line` apart
    int64_t x_line, w_line, depth, rows, columns;
    float* out;          // (rows, columns)
};

constexpr long STRETCH = 64;  // pairs of lines that a thin product goes through at a time ...
constexpr long BAND = 64;     // ... of so many columns

// Sixteen numbers of one line, each beside the one below it; zeros without a line below.
inline __m512i beside(const bf16* line, const bf16* below, __mmask16 some) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, line));
    const __m512i odd = below ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, below)) : _mm512_setzero_si512();
    return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}

// Columns first ... first + 16 of W as (pairs, 16, 2), zeros behind its edges.
void pack(const Factors& of, long first, long columns, bf16* to) {
    const long width = columns - first < TILE ? columns - first : TILE;
    const __mmask16 some = __mmask16((1u << width) - 1);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i apart = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(of.w_line * 2)));
    long p = 0;
    for (; of.across && width == TILE && 2 * (p + TILE) <= of.depth; p += TILE, to += 2 * TILE * TILE) {
        Lanes row[TILE];  // pairs are words like any other
        for (long i = 0; i < TILE; ++i) row[i] = load((const float*)(of.w + (first + i) * of.w_line + 2 * p));
        transpose(row);
        for (long i = 0; i < TILE; ++i) store((float*)(to + 2 * TILE * i), row[i]);
    }
    for (; 2 * p < of.depth; ++p, to += 2 * TILE) {
        __m512i pairs;
        const bool odd = 2 * p + 1 >= of.depth;
        if (of.across) {
            const bf16* at = of.w + first * of.w_line + 2 * p;
            if (odd) {  // the number behind the last is not ours
                alignas(64) int32_t one[TILE] = {};
                for (long i = 0; i < width; ++i) one[i] = at[i * of.w_line];
                pairs = _mm512_load_si512(one);
            } else pairs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), some, apart, at, 1);
        } else {
            const bf16* at = of.w + 2 * p * of.w_line + first;
            pairs = beside(at, odd ? nullptr : at + of.w_line, some);
        }
        _mm512_storeu_si512(to, pairs);
    }
}

// One or two tiles of columns, one behind the other.
bf16* packed(const Factors& of, long column, long columns, long tiles, std::vector<bf16>& room) {
    const long apart = (of.depth + 1) / 2 * 2 * TILE;
    room.resize(tiles * apart + 32);
    bf16* to = (bf16*)((uintptr_t(room.data()) + 63) & ~uintptr_t(63));
    for (long i = 0; i < tiles; ++i) pack(of, column + i * TILE, columns, to + i * apart);
    return to;
}

// Up to ROWS rows and two tiles of columns; the rows after them are asked for on the way.
template <int TILES, int COUNT>
inline void block(const Job& job, bf16* const* panel, long row, long column) {
    Lanes sum[TILES][COUNT];
#pragma GCC unroll 2
    for (int i = 0; i < TILES; ++i)
#pragma GCC unroll 12
        for (int r = 0; r < COUNT; ++r) sum[i][r] = zero();
    for (long f = 0; f < job.count; ++f) {
        const Factors& of = job.factors[f];
        const long pairs = (of.depth + 1) / 2, one = of.x_row * long(sizeof(bf16)), three = 3 * one;
        const char* at[3];
        for (int i = 0; i < 3; ++i) at[i] = (const char*)(of.x + (row + 4 * i) * of.x_row);
        for (long p = 0; p < pairs; ++p) {
            if (p % 16 == 0)
#pragma GCC unroll 12
                for (int r = 0; r < COUNT; ++r)
                    _mm_prefetch(at[r / 4] + 4 * p + (r % 4 == 3 ? three : (r % 4) * one) + 12 * one, _MM_HINT_T0);
            Line line[TILES];
#pragma GCC unroll 2
            for (int i = 0; i < TILES; ++i) line[i] = line_of(panel[f] + (i * pairs + p) * 2 * TILE, 0);
#pragma GCC unroll 12
            for (int r = 0; r < COUNT; ++r) {
                const Pair in = pair_of((const bf16*)(at[r / 4] + 4 * p + (r % 4 == 3 ? three : (r % 4) * one)), 0);
#pragma GCC unroll 2
                for (int i = 0; i < TILES; ++i) sum[i][r] = dot(sum[i][r], line[i], in);
            }
        }
    }
    bf16* out = job.out + row * job.columns + column;
#pragma GCC unroll 2
    for (int i = 0; i < TILES; ++i) {
        const long left = job.columns - column - i * TILE;
#pragma GCC unroll 12
        for (int r = 0; r < COUNT; ++r) {
            bf16* to = out + r * job.columns + i * TILE;
            if (left < TILE) put(left, to, sum[i][r]);
            else put(to, sum[i][r]);
        }
    }
}

// Tiles of columns for rows first ... last.
template <int TILES>
void unit(const Job& job, long column, long first, long last, std::vector<bf16>* rooms) {
    bf16* panel[2];
    for (long f = 0; f < job.count; ++f) panel[f] = packed(job.factors[f], column, job.columns, TILES, rooms[f]);
    long row = first;
    for (; row + ROWS <= last; row += ROWS) block<TILES, ROWS>(job, panel, row, column);
    if (row + 8 <= last) block<TILES, 8>(job, panel, row, column), row += 8;
    if (row + 4 <= last) block<TILES, 4>(job, panel, row, column), row += 4;
    if (row + 2 <= last) block<TILES, 2>(job, panel, row, column), row += 2;
    if (row < last) block<TILES, 1>(job, panel, row, column);
}

// Sixteen columns for sixteen rows and the lines of one stretch, onto what is there. AHEAD: the next stretch of the
// band is asked for on the way.
template <bool AHEAD>
inline void onto(const Thin& job, const bf16* left, long row, long column, long from, long until) {
    const long rows = job.rows - row < TILE ? job.rows - row : TILE;
    const __mmask16 some = first(job.columns - column);
    float* out = job.out + row * job.columns + column;
    Lanes sum[TILE];
#pragma GCC unroll 16
    for (int r = 0; r < TILE; ++r)
        sum[r] = from && r < rows ? _mm512_maskz_loadu_ps(some, out + r * job.columns) : zero();
    for (long p = from; p < until; ++p) {
        const bf16* line = job.w + 2 * p * job.w_line + column;
        for (long i = 0; AHEAD && i < BAND; i += 32)
            for (long below = 0; below < 2; ++below)
                _mm_prefetch((const char*)(line + (2 * STRETCH + below) * job.w_line + i), _MM_HINT_T1);
        const Line pairs = (Line)beside(line, 2 * p + 1 < job.depth ? line + job.w_line : nullptr, some);
#pragma GCC unroll 16
        for (int r = 0; r < TILE; ++r) sum[r] = dot(sum[r], pairs, pair_of(left + 2 * (p * TILE + r), 0));
    }
#pragma GCC unroll 16
    for (int r = 0; r < TILE; ++r)
        if (r < rows) _mm512_mask_storeu_ps(out + r * job.columns, some, sum[r]);
}

}  // namespace

extern "C" {

long products_has() { return 1; }

void products_total(const Job* job) {
    const long units = (job->columns + 2 * TILE - 1) / (2 * TILE);
    const long wanted = (4 * omp_get_max_threads() + units - 1) / units;  // pieces of the rows, where columns are few
    const long most = (job->rows + 8 * ROWS - 1) / (8 * ROWS), pieces = wanted < most ? wanted : most;
    const long each = ((job->rows + pieces - 1) / pieces + ROWS - 1) / ROWS * ROWS;
#pragma omp parallel
    {
        std::vector<bf16> rooms[2];
#pragma omp for schedule(dynamic)
        for (long number = 0; number < units * pieces; ++number) {
            const long first = number % pieces * each, last = first + each < job->rows ? first + each : job->rows;
            const long column = number / pieces * 2 * TILE;
            if (first >= last) continue;
            if (job->columns - column > TILE) unit<2>(*job, column, first, last, rooms);
            else unit<1>(*job, column, first, last, rooms);
        }
    }
}

void products_thin(const Thin* job) {
    const long pairs = (job->depth + 1) / 2, groups = (job->rows + TILE - 1) / TILE;
    std::vector<bf16> room(groups * pairs * 2 * TILE + 32);  // X as (groups of 16, pairs, 16, 2)
    bf16* left = (bf16*)((uintptr_t(room.data()) + 63) & ~uintptr_t(63));
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long p = 0; p < pairs; ++p)
            for (long g = 0; g < groups; ++g) {
                const bf16* line = job->x + 2 * p * job->x_line + g * TILE;
                const bf16* below = 2 * p + 1 < job->depth ? line + job->x_line : nullptr;
                _mm512_store_si512(left + (g * pairs + p) * 2 * TILE, beside(line, below, first(job->rows - g * TILE)));
            }
#pragma omp for schedule(dynamic)
        for (long start = 0; start < job->columns; start += BAND) {
            const long end = start + BAND < job->columns ? start + BAND : job->columns;
            for (long from = 0; from < pairs; from += STRETCH) {
                const long until = from + STRETCH < pairs ? from + STRETCH : pairs;
                for (long g = 0; g < groups; ++g)
                    for (long column = start; column < end; column += TILE)
                        if (g || column > start) onto<false>(*job, left + g * pairs * 2 * TILE, g * TILE, column, from, until);
                        else onto<true>(*job, left, 0, column, from, until);
            }
        }
    }
}
}

#else
extern "C" long products_has() { return 0; }
#endif
