// What is done row by row: the experts' GLU, the loss, routing, rotary embedding, RMS normalisation. Sums are in fp32.
#pragma once
#include "team.h"

namespace {

// h = [gate, up] of F each: weight * silu(gate) * up.
template <class T> void glu_forward(int64_t P, int64_t F, const T* h, const float* weight, T* act) {
    parallel_for(P, [&](int64_t p) {
        const T *gate = h + p * 2 * F, *up = gate + F;
        for (int64_t i = 0; i < F; i += W) {
            vf g = load_some(gate + i, F - i, 0), u = load_some(up + i, F - i, 0);
            store_some(act + p * F + i, F - i, g * sigmoid(g) * u * weight[p]);
        }
    });
}

// From the gradient of act: act again, the gradients of h and of the weight. dh may be h.
template <class T>
void glu_backward(int64_t P, int64_t F, const T* h, const float* weight, const T* grad, T* act, T* dh, float* dweight) {
    parallel_for(P, [&](int64_t p) {
        const T *gate = h + p * 2 * F, *up = gate + F;
        vf total = {};
        for (int64_t i = 0; i < F; i += W) {
            vf g = load_some(gate + i, F - i, 0), u = load_some(up + i, F - i, 0), d = load_some(grad + p * F + i, F - i, 0);
            vf s = sigmoid(g), silu = g * s, a = silu * u, dact = d * weight[p];
            total += d * a;
            store_some(act + p * F + i, F - i, a * weight[p]);
            store_some(dh + p * 2 * F + i, F - i, dact * u * (s + silu * (1.0f - s)));
            store_some(dh + p * 2 * F + F + i, F - i, dact * silu);
        }
        dweight[p] = sum(total);
    });
}

// logits [T, V] become their gradient; nll [T] the negative log-likelihoods.
template <class T> void cross_entropy(int64_t rows, int64_t V, T* logits, const int64_t* targets, float* nll) {
    parallel_for(rows, [&](int64_t t) {
        T* row = logits + t * V;
        vf most = splat(-__builtin_inff());
        for (int64_t i = 0; i < V; i += W) most = larger(most, load_some(row + i, V - i, -__builtin_inff()));
        const float highest = max(most), hit = to_float(row[targets[t]]);
        vf total = {};
        for (int64_t i = 0; i < V; i += W) total += exp(load_some(row + i, V - i, -__builtin_inff()) - highest);
        const float all = sum(total), inverse = 1.0f / all;
        for (int64_t i = 0; i < V; i += W) store_some(row + i, V - i, exp(load_some(row + i, V - i, 0) - highest) * inverse);
        nll[t] = __builtin_logf(all) + highest - hit;
        assign(row[targets[t]], __builtin_expf(hit - highest) * inverse - 1.0f);
    });
}

const int64_t FEW = 4;  // rows that are not worth waking another thread for

template <class T> void add(int64_t N, const T* a, const T* b, T* out) {
    parallel_for((N + W - 1) / W, FEW * 4096 / W, [&](int64_t v) {
        const int64_t i = v * W;
        store_some(out + i, N - i, load_some(a + i, N - i, 0) + load_some(b + i, N - i, 0));
    });
}

template <class T> void widen(int64_t N, const T* x, float* out) {
    parallel_for((N + W - 1) / W, FEW * 4096 / W, [&](int64_t v) { store_some(out + v * W, N - v * W, load_some(x + v * W, N - v * W, 0)); });
}

// logits [rows, E] -> their softmax, and of each row the K experts of the largest probability plus bias, the first of equal ones first:
// their probabilities, divided by their norm of the given power; 0 is for none, and no bias may be null.
template <class T>
void route(int64_t rows, int64_t E, int64_t K, float power, const T* logits, const float* bias, float* probs, float* weights, int64_t* ids) {
    parallel_for(rows, FEW, [&](int64_t t) {
        const T* x = logits + t * E;
        float* p = probs + t * E;
        vf most = splat(-__builtin_inff()), total = {};
        for (int64_t e = 0; e < E; e += W) most = larger(load_some(x + e, E - e, -__builtin_inff()), most);
        const float highest = max(most);
        for (int64_t e = 0; e < E; e += W) {
            const vf value = exp(load_some(x + e, E - e, -__builtin_inff()) - highest);
            total += value;
            store_some(p + e, E - e, value);
        }
        const float all = sum(total);
        for (int64_t e = 0; e < E; e += W) store_some(p + e, E - e, load_some(p + e, E - e, 0) / all);
        float last = __builtin_inff(), norm = 0;
        for (int64_t k = 0, before = -1; k < K; k++) {
            int64_t best = -1;
            float score = 0;
            for (int64_t e = 0; e < E; e++) {
                const float s = p[e] + (bias ? bias[e] : 0.0f);
                const bool left = s < last || (s == last && e > before);
                if (left && (best < 0 || s > score)) best = e, score = s;
            }
            if (best < 0) best = k;  // what is not a number has no order
            else last = score, before = best;
            ids[t * K + k] = best;
            weights[t * K + k] = p[best];
            norm += power == 1 ? p[best] : __builtin_powf(p[best], power);
        }
        if (power > 0) {
            if (power != 1) norm = __builtin_powf(norm, 1.0f / power);
            for (int64_t k = 0; k < K; k++) weights[t * K + k] /= norm;
        }
    });
}

// C numbers, each pair (c, c + C/2) turned by the angle; what lies beyond ±clip is clipped first.
template <class T> INLINE void turn(int64_t C, bool turned, const T* from, const float* cos, const float* sin, float clip, T* to) {
    const int64_t half = C / 2;
    for (int64_t i = 0; i < half; i += W) {
        vf a = load_some(from + i, half - i, 0), b = load_some(from + half + i, half - i, 0);
        a = select(a > clip, splat(clip), select(a < -clip, splat(-clip), a));
        b = select(b > clip, splat(clip), select(b < -clip, splat(-clip), b));
        if (turned) {
            vf c = load_some(cos + i, half - i, 0), s = load_some(sin + i, half - i, 0);
            vf a_turned = a * c - b * s;
            b = b * c + a * s;
            a = a_turned;
        }
        store_some(to + i, half - i, a);
        store_some(to + half + i, half - i, b);
    }
}

// D numbers times `inverse`, which is returned, times the weights.
template <class T> INLINE float normed(int64_t D, const T* x, const float* weight, float eps, T* out) {
    vf squares = {};
    for (int64_t i = 0; i < D; i += W) {
        vf value = load_some(x + i, D - i, 0);
        squares += value * value;
    }
    const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / D + eps);
    for (int64_t i = 0; i < D; i += W) {
        vf value = load_some(x + i, D - i, 0), w = load_some(weight + i, D - i, 0);
        store_some(out + i, D - i, value * inverse * w);
    }
    return inverse;
}

// x [T, N, C] by rows of `stride`: the first `turned` of N heads turn each pair (c, c + C/2) by their token's angle; what lies beyond
// ±clip is clipped first. `sin` of the other sign turns back.
template <class T>
void rotate(int64_t tokens, int64_t N, int64_t C, int64_t turned, const T* x, int64_t stride, const float* cos, const float* sin,
            float clip, T* out) {
    const int64_t half = C / 2;
    parallel_for(tokens, FEW, [&](int64_t t) {
        for (int64_t n = 0; n < N; n++)
            turn(C, n < turned, x + t * stride + n * C, cos + t * half, sin + t * half, clip, out + (t * N + n) * C);
    });
}

// The same where the first `queries` heads and the `keys` after them are normed first, each by weights [C] of its kind.
template <class T>
void rotate_normed(int64_t tokens, int64_t N, int64_t C, int64_t queries, int64_t keys, const T* x, int64_t stride, const float* q_weight,
                   const float* k_weight, float eps, const float* cos, const float* sin, T* out) {
    const int64_t half = C / 2;
    parallel_for(tokens, FEW, [&](int64_t t) {
        for (int64_t n = 0; n < N; n++) {
            const T* from = x + t * stride + n * C;
            T* to = out + (t * N + n) * C;
            if (n < queries + keys) normed(C, from, n < queries ? q_weight : k_weight, eps, to);
            turn(C, n < queries + keys, n < queries + keys ? to : from, cos + t * half, sin + t * half, __builtin_inff(), to);
        }
    });
}

// The gradient of `rotate`: turned back, and 0 where x was clipped.
template <class T>
void rotate_backward(int64_t tokens, int64_t N, int64_t C, int64_t turned, const T* x, int64_t stride, const float* cos,
                     const float* sin, float clip, const T* grad, T* dx) {
    const int64_t half = C / 2;
    parallel_for(tokens, [&](int64_t t) {
        for (int64_t n = 0; n < N; n++) {
            const T *from = x + t * stride + n * C, *g = grad + (t * N + n) * C;
            T* to = dx + (t * N + n) * C;
            for (int64_t i = 0; i < half; i += W) {
                vf a = load_some(g + i, half - i, 0), b = load_some(g + half + i, half - i, 0);
                if (n < turned) {
                    vf c = load_some(cos + t * half + i, half - i, 0), s = load_some(sin + t * half + i, half - i, 0);
                    vf a_turned = a * c + b * s;
                    b = b * c - a * s;
                    a = a_turned;
                }
                vf low = load_some(from + i, half - i, 0), high = load_some(from + half + i, half - i, 0);
                store_some(to + i, half - i, select((low > clip) | (low < -clip), vf{}, a));
                store_some(to + half + i, half - i, select((high > clip) | (high < -clip), vf{}, b));
            }
        }
    });
}

// x [N, D]: x * inverse * weight, where inverse [N] = 1 / sqrt(mean(x²) + eps) is kept.
template <class T>
void rms_norm(int64_t N, int64_t D, const T* x, const float* weight, float eps, T* out, float* inverse) {
    parallel_for(N, FEW, [&](int64_t n) { inverse[n] = normed(D, x + n * D, weight, eps, out + n * D); });
}

// dweight [parts, D] has a sum for each part of the rows, so that the order of summing does not follow the threads.
template <class T>
void rms_norm_backward(int64_t N, int64_t D, int64_t parts, const T* x, const float* weight, const float* inverse,
                       const T* grad, T* dx, float* dweight) {
    parallel_for(parts, [&](int64_t part) {
        float* sums = dweight + part * D;
        __builtin_memset(sums, 0, D * sizeof(float));
        for (int64_t n = N * part / parts; n < N * (part + 1) / parts; n++) {
            vf dots = {};
            for (int64_t i = 0; i < D; i += W) {
                vf value = load_some(x + n * D + i, D - i, 0), g = load_some(grad + n * D + i, D - i, 0);
                dots += g * value * load_some(weight + i, D - i, 0);
                store_some(sums + i, D - i, load_some(sums + i, D - i, 0) + g * value * inverse[n]);
            }
            const float along = sum(dots) * inverse[n] * inverse[n] / D;
            for (int64_t i = 0; i < D; i += W) {
                vf value = load_some(x + n * D + i, D - i, 0), g = load_some(grad + n * D + i, D - i, 0);
                vf w = load_some(weight + i, D - i, 0);
                store_some(dx + n * D + i, D - i, (g * w - value * along) * inverse[n]);
            }
        }
    });
}

}  // namespace
