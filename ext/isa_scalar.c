/* The variant every machine can run, and the model of the others. */
#include "body.h"
#include <math.h>

static int supported(void) { return 1; }

static void dots_f32(const float *query, const float *rows, int64_t n, int64_t dim, float *out)
{
    for (int64_t i = 0; i < n; i++) {
        const float *row = rows + i * dim;
        float sum[8] = {0};
        int64_t j = 0;
        for (; j + 8 <= dim; j += 8)
            for (int l = 0; l < 8; l++)
                sum[l] += query[j + l] * row[j + l];
        for (; j < dim; j++)
            sum[0] += query[j] * row[j];
        out[i] = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
    }
}

static void dots_l1_f32(const float *query, const float *rows, int64_t n, int64_t dim, float *out, float *l1)
{
    dots_f32(query, rows, n, dim, out);
    for (int64_t i = 0; i < n; i++) {
        const float *row = rows + i * dim;
        float sum = 0;
        for (int64_t j = 0; j < dim; j++)
            sum += fabsf(query[j] - row[j]);
        l1[i] = sum;
    }
}

static void dots_u8(const int8_t *query, const uint8_t *rows, int64_t n, int64_t stride, int32_t *out)
{
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *row = rows + i * stride;
        int32_t sum = 0;
        for (int64_t j = 0; j < stride; j++)
            sum += (int32_t)query[j] * (int32_t)row[j];
        out[i] = sum;
    }
}

static void dots_l1_u8(const int8_t *query, const uint8_t *graded, const uint8_t *grades, const uint8_t *rows,
                       int64_t n, int64_t stride, int32_t *out, int32_t *sad)
{
    dots_u8(query, rows, n, stride, out);
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *row = rows + i * stride, *own = graded + (int64_t)grades[i] * stride;
        int32_t sum = 0;
        for (int64_t j = 0; j < stride; j++) {
            int32_t d = (int32_t)own[j] - (int32_t)row[j];
            sum += d < 0 ? -d : d;
        }
        sad[i] = sum;
    }
}

static void multi_u8(const int8_t *packed, int groups, const uint8_t *rows, int64_t n, int64_t stride, int32_t *out)
{
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *row = rows + i * stride;
        for (int g = 0; g < groups; g++) {
            const int8_t *query = packed + (int64_t)g * stride * KM_LANES;
            int32_t acc[KM_LANES] = {0};
            for (int64_t j = 0; j < stride; j += 4, query += 4 * KM_LANES)
                for (int l = 0; l < KM_LANES; l++)
                    for (int b = 0; b < 4; b++)
                        acc[l] += (int32_t)query[4 * l + b] * (int32_t)row[j + b];
            for (int l = 0; l < KM_LANES; l++)
                out[i * KM_MULTI + g * KM_LANES + l] = acc[l];
        }
    }
}

static void multi_f32(const float *packed, int groups, const float *rows, int64_t n, int64_t dim, float *out)
{
    for (int64_t i = 0; i < n; i++) {
        const float *row = rows + i * dim;
        for (int g = 0; g < groups; g++) {
            const float *query = packed + (int64_t)g * dim * KM_LANES;
            float acc[KM_LANES] = {0};
            for (int64_t j = 0; j < dim; j++, query += KM_LANES)
                for (int l = 0; l < KM_LANES; l++)
                    acc[l] += query[l] * row[j];
            for (int l = 0; l < KM_LANES; l++)
                out[i * KM_MULTI + g * KM_LANES + l] = acc[l];
        }
    }
}

static void lanes_i8(const int8_t *query, const int8_t *packed, int64_t groups, int64_t dims, int32_t *out)
{
    for (int64_t g = 0; g < groups; g++) {
        int32_t acc[KM_LANES] = {0};
        for (int64_t j = 0; j < dims; j += 4, packed += 4 * KM_LANES)
            for (int l = 0; l < KM_LANES; l++)
                for (int b = 0; b < 4; b++)
                    acc[l] += (int32_t)query[j + b] * (int32_t)packed[4 * l + b];
        for (int l = 0; l < KM_LANES; l++)
            out[g * KM_LANES + l] = acc[l];
    }
}

const km_isa km_isa_scalar = {
    "scalar", supported, dots_f32, dots_l1_f32, dots_u8, dots_l1_u8, multi_u8, multi_f32,
    body_admit, body_admit_multi, body_unbias, body_overlap, body_same, lanes_i8, body_sift, body_read,
};
