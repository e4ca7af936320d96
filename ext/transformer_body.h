/*
 * The arithmetic of a transformer, once per instruction set. Before including it define
 *
 *     XF_LANES   float32 lanes of a vector
 *     xf_tile    int32_t sums[XF_ROWS][2 * XF_LANES] of XF_ROWS quantised rows, `in` apart, by as many columns of a panel
 *
 * Everything else is written with the compiler's vectors.
 */
#include "transformer.h"
#include <math.h>
#include <string.h>

typedef float xf_vec __attribute__((vector_size(4 * XF_LANES)));
typedef int32_t xf_int __attribute__((vector_size(4 * XF_LANES)));
typedef float xf_vec_at __attribute__((vector_size(4 * XF_LANES), aligned(4), may_alias));
typedef int16_t xf_short_at __attribute__((vector_size(2 * XF_LANES), aligned(2), may_alias));
#define XF_TILE (2 * XF_LANES) /* columns of a tile */

static inline xf_vec xf_all(float value) { return value - (xf_vec){0}; }

static inline xf_vec xf_at(const float *p) { return *(const xf_vec_at *)p; }

static inline void xf_put(float *p, xf_vec v) { *(xf_vec_at *)p = v; }

static inline float xf_sum(xf_vec v)
{
    float sum = 0;
    for (int i = 0; i < XF_LANES; i++)
        sum += v[i];
    return sum;
}

static inline xf_vec xf_pick(xf_int mask, xf_vec yes, xf_vec no)
{
    return (xf_vec)((mask & (xf_int)yes) | (~mask & (xf_int)no));
}

static inline xf_vec xf_larger(xf_vec a, xf_vec b) { return xf_pick(a > b, a, b); }

static inline float xf_most(const float *values, int64_t n)
{
    xf_vec largest = xf_at(values);
    for (int64_t j = XF_LANES; j < n; j += XF_LANES)
        largest = xf_larger(xf_at(values + j), largest);
    float most = largest[0];
    for (int l = 1; l < XF_LANES; l++)
        most = largest[l] > most ? largest[l] : most;
    return most;
}

/* e to the x, relative error about 1e-7; x at most 0 here, and below -87 it is 0 for all purposes. */
static inline xf_vec xf_exp(xf_vec x)
{
    x = xf_larger(x, xf_all(-87.0f));
    xf_vec scaled = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
    xf_vec whole = scaled - 12582912.0f;
    xf_vec rest = x - whole * 0.693145752f - whole * 1.42860677e-6f;
    xf_vec power = xf_all(1.0f / 720);
    power = power * rest + 1.0f / 120;
    power = power * rest + 1.0f / 24;
    power = power * rest + 1.0f / 6;
    power = power * rest + 0.5f;
    power = power * rest + 1.0f;
    power = power * rest + 1.0f;
    xf_int exponent = ((xf_int)scaled - 0x4b400000) << 23;
    return (xf_vec)((xf_int)power + exponent);
}

/* x * Phi(x) by Abramowitz and Stegun 7.1.26: off by less than 1e-6. */
static inline xf_vec xf_gelu(xf_vec x)
{
    xf_int sign = (xf_int)x & (int32_t)0x80000000;
    xf_vec z = (xf_vec)((xf_int)x & 0x7fffffff) * 0.70710678f;
    xf_vec t = 1.0f / (z * 0.3275911f + 1.0f);
    xf_vec tail = t * 1.061405429f - 1.453152027f;
    tail = tail * t + 1.421413741f;
    tail = tail * t - 0.284496736f;
    tail = tail * t + 0.254829592f;
    xf_vec error = 1.0f - tail * t * xf_exp(-z * z);
    return x * 0.5f * (1.0f + (xf_vec)((xf_int)error | sign));
}

/* rows of float32 -> 16 bits with a step per row; the rows up to the next full tile become 0 */
static void xf_quantize(const float *from, int64_t n, int64_t dim, float limit, int16_t *rows, float *steps)
{
    for (int64_t i = 0; i < n; i++) {
        const float *row = from + i * dim;
        xf_vec largest = xf_all(0);
        for (int64_t j = 0; j < dim; j += XF_LANES) {
            xf_vec v = (xf_vec)((xf_int)xf_at(row + j) & 0x7fffffff);
            largest = xf_larger(v, largest);
        }
        float most = 0;
        for (int l = 0; l < XF_LANES; l++)
            most = largest[l] > most ? largest[l] : most;
        float inverse = most > 0 ? limit / most : 0;
        steps[i] = most > 0 ? most / limit : 0;
        int16_t *to = rows + i * dim;
        for (int64_t j = 0; j < dim; j += XF_LANES) {
            xf_int whole = (xf_int)(xf_at(row + j) * inverse + 12582912.0f) - 0x4b400000;
            *(xf_short_at *)(to + j) = __builtin_convertvector(whole, xf_short_at);
        }
    }
    int64_t padded = (n + XF_ROWS - 1) / XF_ROWS * XF_ROWS;
    memset(rows + n * dim, 0, (size_t)((padded - n) * dim) * sizeof *rows);
    for (int64_t i = n; i < padded; i++)
        steps[i] = 0;
}

/* out (n, linear->out) = rows x weights + bias; `gelu`: its gelu; `add`: added to what out holds */
static void xf_apply(const xf_linear *linear, const float *from, int64_t n, int gelu, int add, float *out,
                     xf_scratch *scratch)
{
    const int64_t in = linear->in, width = linear->out;
    xf_quantize(from, n, in, linear->limit, scratch->rows, scratch->steps);
    for (int64_t column = 0; column < width; column += XF_TILE) {
        const int64_t inside = column % XF_PANEL;
        const int16_t *panel = linear->weights + (column - inside) * in + 2 * inside;
        for (int64_t first = 0; first < n; first += XF_ROWS) {
            int32_t sums[XF_ROWS * XF_TILE] __attribute__((aligned(64)));
            xf_tile(scratch->rows + first * in, panel, in, sums);
            const int64_t count = n - first < XF_ROWS ? n - first : XF_ROWS;
            for (int64_t i = 0; i < count; i++)
                for (int half = 0; half < 2; half++) {
                    const int64_t at = column + half * XF_LANES;
                    xf_vec value = __builtin_convertvector(*(const xf_int *)(sums + i * XF_TILE + half * XF_LANES), xf_vec);
                    value = value * (xf_at(linear->steps + at) * scratch->steps[first + i]) + xf_at(linear->bias + at);
                    if (gelu)
                        value = xf_gelu(value);
                    float *to = out + (first + i) * width + at;
                    if (add)
                        value += xf_at(to);
                    xf_put(to, value);
                }
        }
    }
}

static void xf_normalize(float *rows, int64_t n, int64_t width, const float *norm, float epsilon)
{
    for (int64_t i = 0; i < n; i++) {
        float *row = rows + i * width;
        xf_vec sum = xf_all(0), squares = xf_all(0);
        for (int64_t j = 0; j < width; j += XF_LANES)
            sum += xf_at(row + j);
        const float mean = xf_sum(sum) / (float)width;
        for (int64_t j = 0; j < width; j += XF_LANES) {
            xf_vec v = xf_at(row + j) - mean;
            squares += v * v;
        }
        const float scale = 1.0f / sqrtf(xf_sum(squares) / (float)width + epsilon);
        for (int64_t j = 0; j < width; j += XF_LANES)
            xf_put(row + j, (xf_at(row + j) - mean) * scale * xf_at(norm + j) + xf_at(norm + width + j));
    }
}

/* One sequence: projected is (length, 3 * width), queries, keys and values; context (length, width). */
static void xf_attend(const xf_model *model, const float *projected, int64_t length, float *context, xf_scratch *scratch)
{
    const int64_t width = model->width, stride = 3 * width, dim = width / model->heads;
    const int64_t padded = (length + XF_LANES - 1) / XF_LANES * XF_LANES;
    const float scale = 1.0f / sqrtf((float)dim);
    float *keys = scratch->keys, *scores = scratch->scores;
    for (int64_t head = 0; head < model->heads; head++) {
        const float *query = projected + head * dim, *key = query + width, *value = key + width;
        for (int64_t d = 0; d < dim; d++) { /* keys on their side: [dim][padded] */
            for (int64_t j = 0; j < length; j++)
                keys[d * padded + j] = key[j * stride + d];
            for (int64_t j = length; j < padded; j++)
                keys[d * padded + j] = 0;
        }
        for (int64_t i = 0; i < length; i++) {
            for (int64_t j = 0; j < padded; j += XF_LANES) {
                const float *q = query + i * stride, *k = keys + j;
                xf_vec a = xf_all(0), b = a, c = a, d = a; /* four chains of sums hide each other's latency */
                for (int64_t e = 0; e < dim; e += 4, k += 4 * padded) {
                    a += q[e] * xf_at(k);
                    b += q[e + 1] * xf_at(k + padded);
                    c += q[e + 2] * xf_at(k + 2 * padded);
                    d += q[e + 3] * xf_at(k + 3 * padded);
                }
                xf_put(scores + j, ((a + b) + (c + d)) * scale);
            }
            for (int64_t j = length; j < padded; j++)
                scores[j] = -1e30f;
            const float largest = xf_most(scores, padded);
            xf_vec total = xf_all(0);
            for (int64_t j = 0; j < padded; j += XF_LANES) {
                xf_vec power = xf_exp(xf_at(scores + j) - largest);
                xf_put(scores + j, power);
                total += power;
            }
            const float share = 1.0f / xf_sum(total);
            for (int64_t d = 0; d < dim; d += 2 * XF_LANES) {
                xf_vec a = xf_all(0), b = a, a2 = a, b2 = a;
                int64_t j = 0;
                for (; j + 2 <= length; j += 2) {
                    const float *v = value + j * stride + d;
                    a += scores[j] * xf_at(v);
                    b += scores[j] * xf_at(v + XF_LANES);
                    a2 += scores[j + 1] * xf_at(v + stride);
                    b2 += scores[j + 1] * xf_at(v + stride + XF_LANES);
                }
                if (j < length) {
                    a += scores[j] * xf_at(value + j * stride + d);
                    b += scores[j] * xf_at(value + j * stride + d + XF_LANES);
                }
                xf_put(context + i * width + head * dim + d, (a + a2) * share);
                xf_put(context + i * width + head * dim + d + XF_LANES, (b + b2) * share);
            }
        }
    }
}

static void body_run(const xf_model *model, xf_scratch *scratch, const int32_t *ids, int64_t total,
                     const int64_t *starts, int64_t count)
{
    const int64_t width = model->width, first = starts[0], n = starts[count] - first;
    float *state = scratch->state;
    for (int64_t i = 0; i < n; i++) {
        float *row = state + i * width;
        for (int64_t j = 0; j < width; j += XF_LANES) {
            xf_vec sum = xf_all(0);
            for (int t = 0; t < XF_TABLES; t++)
                if (model->tables[t] != NULL)
                    sum += xf_at(model->tables[t] + (int64_t)ids[t * total + first + i] * width + j);
            xf_put(row + j, sum);
        }
    }
    xf_normalize(state, n, width, model->norm, model->epsilon);
    for (int64_t l = 0; l < model->layers; l++) {
        const xf_layer *layer = &model->layer[l];
        xf_apply(&layer->attend, state, n, 0, 0, scratch->projected, scratch);
        for (int64_t s = 0; s < count; s++)
            xf_attend(model, scratch->projected + (starts[s] - first) * 3 * width, starts[s + 1] - starts[s],
                      scratch->context + (starts[s] - first) * width, scratch);
        xf_apply(&layer->output, scratch->context, n, 0, 1, state, scratch);
        xf_normalize(state, n, width, layer->attention_norm, model->epsilon);
        xf_apply(&layer->widen, state, n, 1, 0, scratch->inner, scratch);
        xf_apply(&layer->narrow, scratch->inner, n, 0, 1, state, scratch);
        xf_normalize(state, n, width, layer->output_norm, model->epsilon);
    }
}

static void body_project(const xf_linear *linear, const float *rows, int64_t n, int gelu, float *out,
                         xf_scratch *scratch)
{
    xf_apply(linear, rows, n, gelu, 0, out, scratch);
}
