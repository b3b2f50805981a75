// Sums of products of bfloat16 matrices, C = X W + Y V, and attention's, for a CPU that multiplies bfloat16 (AVX-512).
//
// Sources: panels of the right factor packed as they are multiplied, as in GotoBLAS (Goto & van de Geijn 2008, ACM
// TOMS 34(3)); registers as in tiles.h. A panel is packed when it is needed and thrown away, so weights
// lie in memory once, and either way round. Sums are float32 in one order, whatever the number of threads: each of the
// two products from its first pair to its last, then one and the other.
//
// It does not know layers or tensors: engine/native.py checks what it is given. A left factor's rows are read in pairs;
// where the length is odd, what lies behind the last number of a row must be a number.

#include "tiles.h"

#if LANES == 512

#include <omp.h>

namespace {

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

// Columns first ... first + 16 of W as (pairs, 16, 2), zeros behind its edges.
void pack(const Factors& of, long first, long columns, bf16* to) {
    const long width = columns - first < TILE ? columns - first : TILE;
    const __mmask16 some = __mmask16((1u << width) - 1);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i apart = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(of.w_line * 2)));
    for (long p = 0; 2 * p < of.depth; ++p, to += 2 * TILE) {
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
            const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, at));
            const __m512i next = odd ? _mm512_setzero_si512() : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, at + of.w_line));
            pairs = _mm512_or_si512(even, _mm512_slli_epi32(next, 16));
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

// Two tiles of columns for rows first ... last.
void unit(const Job& job, long column, long first, long last, std::vector<bf16>* rooms) {
    const long tiles = job.columns - column > TILE ? 2 : 1;
    const bf16* panel[2];
    for (long f = 0; f < job.count; ++f) panel[f] = packed(job.factors[f], column, job.columns, tiles, rooms[f]);
    alignas(64) float sum[2][2 * ROWS * TILE];
    for (long row = first; row < last; row += ROWS) {
        const long rows = last - row < ROWS ? last - row : ROWS;
        for (long f = 0; f < job.count; ++f) {
            const Factors& of = job.factors[f];
            const long pairs = (of.depth + 1) / 2;
            some(tiles, panel[f], pairs * 2 * TILE, of.x + row * of.x_row, of.x_row, rows, pairs, sum[f]);
        }
        for (long i = 0; i < tiles; ++i) {
            const long left = job.columns - column - i * TILE;
            for (long r = 0; r < rows; ++r) {
                __m512 all = _mm512_load_ps(sum[0] + (i * ROWS + r) * TILE);
                if (job.count == 2) all = _mm512_add_ps(all, _mm512_load_ps(sum[1] + (i * ROWS + r) * TILE));
                put(left, job.out + (row + r) * job.columns + column + i * TILE, all);
            }
        }
    }
}

// ---- attention ---------------------------------------------------------------------------------------------

struct Causal {  // `count` matrices like the first, `x_apart`, `w_apart` apart
    Factors first;
    int64_t x_apart, w_apart, count, rows, columns;
    int64_t round, before;  // rows are rounds of queries, of which the first sees one key more than `before`
    bf16* out;

    long reach(long row, long rows) const {  // how many keys the last sighted of these rows sees
        const long from = row % round;
        return before + (from + rows < round ? from + rows : round);
    }
};

// Rows, 12 at most, with zeros behind an odd number of them.
inline const bf16* even(const bf16* x, long stride, long rows, long depth, std::vector<bf16>& room) {
    room.assign(rows * (depth + 1), 0);
    for (long r = 0; r < rows; ++r) std::memcpy(room.data() + r * (depth + 1), x + r * stride, depth * sizeof(bf16));
    return room.data();
}

// X W for rows first ... last of matrix n and two tiles of columns. What no row sees is left out: where columns are
// keys, tiles behind the last (nothing is written there); where the sum runs over keys, those behind the last.
template <bool DEEP>
void attended(const Causal& job, long n, long column, long first, long last, std::vector<bf16>* rooms) {
    Factors of = job.first;
    of.x += n * job.x_apart, of.w += n * job.w_apart;
    const long tiles = job.columns - column > TILE ? 2 : 1, pairs = (of.depth + 1) / 2;
    const bf16* panel = packed(of, column, job.columns, tiles, rooms[0]);
    bf16* out = job.out + n * job.rows * job.columns;
    alignas(64) float sum[2 * ROWS * TILE];
    for (long row = first; row < last; row += ROWS) {
        const long rows = last - row < ROWS ? last - row : ROWS, reach = job.reach(row, rows);
        if (!DEEP && column >= reach) continue;
        const long deep = DEEP && (reach + 1) / 2 < pairs ? (reach + 1) / 2 : pairs;
        const bool odd = 2 * deep > of.depth;
        const bf16* x = of.x + row * of.x_row;
        if (odd) x = even(x, of.x_row, rows, of.depth, rooms[1]);
        some(tiles, panel, pairs * 2 * TILE, x, odd ? of.depth + 1 : of.x_row, rows, deep, sum);
        for (long i = 0; i < tiles; ++i) {
            const long left = job.columns - column - i * TILE;
            for (long r = 0; r < rows; ++r)
                put(left, out + (row + r) * job.columns + column + i * TILE,
                    _mm512_load_ps(sum + (i * ROWS + r) * TILE));
        }
    }
}

// W^T X for two tiles of keys of matrix n, given X^T as (columns, depth): what each key is sent by those who see it.
void gathered(const Causal& job, const bf16* turned, long stride, long n, long key, std::vector<bf16>* rooms) {
    const long keys = job.rows, width = job.columns, depth = job.first.depth, tiles = keys - key > TILE ? 2 : 1;
    const long blind = key > job.before ? key - job.before : 0;  // rows of a round that do not see the first of them
    std::vector<float> total(width * 2 * TILE);
    alignas(64) float sum[2 * ROWS * TILE];
    for (long begin = 0; begin < depth; begin += job.round) {
        Factors of = job.first;
        of.w += n * job.w_apart + (begin + blind) * of.w_line, of.depth = job.round - blind;
        const long pairs = (of.depth + 1) / 2;
        const bf16* panel = packed(of, key, keys, tiles, rooms[0]);
        for (long c = 0; c < width; c += ROWS) {
            const long rows = width - c < ROWS ? width - c : ROWS;
            some(tiles, panel, pairs * 2 * TILE, turned + c * stride + begin + blind, stride, rows, pairs, sum);
            for (long i = 0; i < tiles; ++i)
                for (long r = 0; r < rows; ++r) {
                    float* to = total.data() + (c + r) * 2 * TILE + i * TILE;
                    const __m512 more = _mm512_load_ps(sum + (i * ROWS + r) * TILE);
                    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), more));
                }
        }
    }
    const __m512i apart = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32(2 * TILE));
    for (long k = 0; k < 2 * TILE && key + k < keys; ++k)
        for (long c = 0; c < width; c += TILE)
            put(job.out + (n * keys + key + k) * width + c,
                _mm512_i32gather_ps(apart, total.data() + c * 2 * TILE + k, 4));
}

template <bool DEEP>
void attend(const Causal& job) {
    const long units = (job.columns + 2 * TILE - 1) / (2 * TILE), pieces = (job.rows + 32 * ROWS - 1) / (32 * ROWS);
#pragma omp parallel
    {
        std::vector<bf16> rooms[2];
#pragma omp for schedule(dynamic)
        for (long number = 0; number < job.count * units * pieces; ++number) {
            const long first = number % pieces * 32 * ROWS, last = first + 32 * ROWS;
            const long n = number / pieces / units, column = number / pieces % units * 2 * TILE;
            attended<DEEP>(job, n, column, first, last < job.rows ? last : job.rows, rooms);
        }
    }
}

}  // namespace

extern "C" {

void products_against(const Causal* job) { attend<false>(*job); }
void products_mixed(const Causal* job) { attend<true>(*job); }

void products_collected(const Causal* job) {
    const long depth = job->first.depth, width = job->columns, stride = depth + 2;
    const long units = (job->rows + 2 * TILE - 1) / (2 * TILE);
    std::vector<bf16> turned(job->count * width * stride);
#pragma omp parallel
    {
        std::vector<bf16> rooms[1];
#pragma omp for schedule(dynamic)
        for (long part = 0; part < job->count * (width / TILE); ++part) {
            const long n = part / (width / TILE), c = part % (width / TILE) * TILE;
            const bf16* x = job->first.x + n * job->x_apart + c;
            bf16* to = turned.data() + (n * width + c) * stride;
            for (long d = 0; d < depth; ++d)
                for (long i = 0; i < TILE; ++i) to[i * stride + d] = x[d * job->first.x_row + i];
        }
#pragma omp for schedule(dynamic)
        for (long number = 0; number < job->count * units; ++number) {
            const long n = number / units;
            gathered(*job, turned.data() + n * width * stride, stride, n, number % units * 2 * TILE, rooms);
        }
    }
}

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
            if (first < last) unit(*job, number / pieces * 2 * TILE, first, last, rooms);
        }
    }
}
}

#else
extern "C" long products_has() { return 0; }
#endif
