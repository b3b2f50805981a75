// The elementwise formulas of engine/kernels.py as single passes over memory, for bfloat16 and float32 on a CPU.
//
// Sources: as in engine/kernels.py; the exponential as in numbers.h. Sums are float32. Every row is one thread's work
// from end to end, so the bits do not depend on the number of threads; they do depend on the CPU that this is compiled
// for.
// Attention scores hold, for each query, keys `low` ... `high`; what lies outside is never read, and written as 0.
//
// It does not know tensors: engine/native.py checks shapes, kinds and that memory is contiguous.

#include <vector>

#include "numbers.h"

namespace {

template <class N>
void norm(const N* x, const N* weight, N* y, float* scales, long rows, long width, float eps, float shift) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; ++t) {
        const N* in = x + t * width;
        N* out = y + t * width;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long e = 0; e < width; ++e) sum += wide(in[e]) * wide(in[e]);
        const float scale = 1.0f / __builtin_sqrtf(sum / float(width) + eps);
        scales[t] = scale;
#pragma omp simd
        for (long e = 0; e < width; ++e) put(out[e], wide(in[e]) * scale * (wide(weight[e]) + shift));
    }
}

template <class N>
void norm_backward(const N* grad, const N* x, const N* weight, const float* scales, N* out, long rows,
                   long width, float shift) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; ++t) {
        const N* slope = grad + t * width;
        const N* in = x + t * width;
        N* to = out + t * width;
        const float scale = scales[t];
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long e = 0; e < width; ++e) sum += wide(slope[e]) * (wide(weight[e]) + shift) * wide(in[e]) * scale;
        const float mean = sum / float(width);
#pragma omp simd
        for (long e = 0; e < width; ++e)
            put(to[e], (wide(slope[e]) * (wide(weight[e]) + shift) - wide(in[e]) * scale * mean) * scale);
    }
}

template <class N>
void silu(const N* both, N* out, long rows, long width) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; ++t) {
        const N *gate = both + 2 * t * width, *up = gate + width;
        N* to = out + t * width;
#pragma omp simd
        for (long f = 0; f < width; ++f) put(to[f], wide(gate[f]) / (1.0f + power(-wide(gate[f]))) * wide(up[f]));
    }
}

template <class N>
void silu_backward(const N* grad, const N* both, N* hidden, N* out, long rows, long width) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; ++t) {
        const N *slope = grad + t * width, *gate = both + 2 * t * width, *up = gate + width;
        N *lit = hidden + t * width, *to_gate = out + 2 * t * width, *to_up = to_gate + width;
#pragma omp simd
        for (long f = 0; f < width; ++f) {
            const float g = wide(gate[f]), share = 1.0f / (1.0f + power(-g));
            put(lit[f], g * share * wide(up[f]));
            put(to_gate[f], wide(slope[f]) * wide(up[f]) * share * (1.0f + g * (1.0f - share)));
            put(to_up[f], wide(slope[f]) * g * share);
        }
    }
}

struct Span { long low, high; };  // keys that a query sees: low <= key < high

inline Span seen(long row, long length, long before, long window) {
    const long place = before + row % length;
    return {window && place >= window ? place - window + 1 : 0, place + 1};
}

template <class N>
void soften(N* scores, long rows, long length, long reach, long before, long window, float scale) {
#pragma omp parallel
    {
        std::vector<float> powers(reach);
        float* power_of = powers.data();
#pragma omp for schedule(static)
        for (long row = 0; row < rows; ++row) {
            N* at = scores + row * reach;
            const Span span = seen(row, length, before, window);
            float top = -__builtin_inff(), sum = 0.0f;
#pragma omp simd reduction(max : top)
            for (long k = span.low; k < span.high; ++k) top = wide(at[k]) > top ? wide(at[k]) : top;
#pragma omp simd reduction(+ : sum)
            for (long k = span.low; k < span.high; ++k) sum += power_of[k] = power((wide(at[k]) - top) * scale);
            const float share = 1.0f / sum;
#pragma omp simd
            for (long k = span.low; k < span.high; ++k) put(at[k], power_of[k] * share);
            std::memset(at, 0, sizeof(N) * span.low);
            std::memset(at + span.high, 0, sizeof(N) * (reach - span.high));
        }
    }
}

template <class N>
void soften_backward(N* grad, const N* weights, long rows, long length, long reach, long before, long window,
                     float scale) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; ++row) {
        N* at = grad + row * reach;
        const N* weight = weights + row * reach;
        const Span span = seen(row, length, before, window);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long k = span.low; k < span.high; ++k) sum += wide(at[k]) * wide(weight[k]);
#pragma omp simd
        for (long k = span.low; k < span.high; ++k) put(at[k], (wide(at[k]) - sum) * wide(weight[k]) * scale);
        std::memset(at, 0, sizeof(N) * span.low);
        std::memset(at + span.high, 0, sizeof(N) * (reach - span.high));
    }
}

template <class N>
void turn(const N* x, const N* cosine, const N* sine, N* out, long tokens, long heads, long width, long turned,
          long stride, float sign) {
    const long half = turned / 2;
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; ++t) {
        const N *c = cosine + t * turned, *s = sine + t * turned;
        for (long h = 0; h < heads; ++h) {
            const N* in = x + t * stride + h * width;
            N* to = out + (t * heads + h) * width;
            // The way back transposes the rotation: each feature takes the other half's sine.
#pragma omp simd
            for (long i = 0; i < half; ++i) {
                const float low = wide(in[i]), high = wide(in[half + i]);
                const float first = wide(sign > 0 ? s[i] : s[half + i]);
                const float second = wide(sign > 0 ? s[half + i] : s[i]);
                put(to[i], low * wide(c[i]) - sign * high * first);
                put(to[half + i], high * wide(c[half + i]) + sign * low * second);
            }
            std::memcpy(to + turned, in + turned, sizeof(N) * (width - turned));
        }
    }
}

template <class N>
void settle(N* logits, const int64_t* targets, float* logps, bool* right, long rows, long width, long wanted) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; ++row) {
        N* at = logits + row * width;
        float top = -__builtin_inff(), sum = 0.0f;
#pragma omp simd reduction(max : top)
        for (long v = 0; v < width; ++v) top = wide(at[v]) > top ? wide(at[v]) : top;
#pragma omp simd reduction(+ : sum)
        for (long v = 0; v < width; ++v) sum += power(wide(at[v]) - top);
        const float chosen = power(wide(at[targets[row]]) - top) / sum, share = -1.0f / sum;
        long ahead = 0;  // of equally likely tokens the first is meant
        if (wide(at[targets[row]]) == top)
            for (long v = 0; v < targets[row]; ++v) ahead += wide(at[v]) == top;
        right[row] = wide(at[targets[row]]) == top && !ahead;
        logps[row] = wide(at[targets[row]]) - top - __builtin_logf(sum);
        if (!wanted) continue;
#pragma omp simd
        for (long v = 0; v < width; ++v) put(at[v], power(wide(at[v]) - top) * share);
        put(at[targets[row]], 1.0f - chosen);
    }
}

}  // namespace

#define BOTH(name, parameters, arguments)                       \
    extern "C" void name##_bfloat16 parameters { using N = bf16; name<N> arguments; } \
    extern "C" void name##_float32 parameters { using N = float; name<N> arguments; }
#define IN(x) (const N*)x
#define OUT(x) (N*)x

BOTH(norm, (void* x, void* w, void* y, float* s, long t, long e, float eps, float shift),
     (IN(x), IN(w), OUT(y), s, t, e, eps, shift))
BOTH(norm_backward, (void* g, void* x, void* w, float* s, void* y, long t, long e, float shift),
     (IN(g), IN(x), IN(w), s, OUT(y), t, e, shift))
BOTH(silu, (void* x, void* y, long t, long f), (IN(x), OUT(y), t, f))
BOTH(silu_backward, (void* g, void* x, void* h, void* y, long t, long f), (IN(g), IN(x), OUT(h), OUT(y), t, f))
BOTH(soften, (void* x, long n, long l, long r, long before, long window, float scale),
     (OUT(x), n, l, r, before, window, scale))
BOTH(soften_backward, (void* g, void* w, long n, long l, long r, long before, long window, float scale),
     (OUT(g), IN(w), n, l, r, before, window, scale))
BOTH(turn, (void* x, void* c, void* s, void* y, long t, long h, long e, long r, long stride, float sign),
     (IN(x), IN(c), IN(s), OUT(y), t, h, e, r, stride, sign))
BOTH(settle, (void* x, int64_t* targets, float* logps, bool* right, long n, long v, long wanted),
     (OUT(x), targets, logps, right, n, v, wanted))
