/*
 * Arm NEON (AArch64). Signed dots by widening multiplies, which every such machine has; where the compiler may assume
 * the dot-product extension (armv8.2-a+dotprod) four products an element come from one instruction.
 */
#if defined(__aarch64__)
#include "body.h"
#include <arm_neon.h>

static int supported(void) { return 1; }

static void dots_f32(const float *query, const float *rows, int64_t n, int64_t dim, float *out)
{
    for (int64_t i = 0; i < n; i++) {
        const float *row = rows + i * dim;
        float32x4_t a = vdupq_n_f32(0), b = a, c = a, d = a;
        int64_t j = 0;
        for (; j + 16 <= dim; j += 16) {
            a = vfmaq_f32(a, vld1q_f32(query + j), vld1q_f32(row + j));
            b = vfmaq_f32(b, vld1q_f32(query + j + 4), vld1q_f32(row + j + 4));
            c = vfmaq_f32(c, vld1q_f32(query + j + 8), vld1q_f32(row + j + 8));
            d = vfmaq_f32(d, vld1q_f32(query + j + 12), vld1q_f32(row + j + 12));
        }
        float sum = vaddvq_f32(vaddq_f32(vaddq_f32(a, b), vaddq_f32(c, d)));
        for (; j < dim; j++)
            sum += query[j] * row[j];
        out[i] = sum;
    }
}

static void dots_l1_f32(const float *query, const float *rows, int64_t n, int64_t dim, float *out, float *l1)
{
    for (int64_t i = 0; i < n; i++) {
        const float *row = rows + i * dim;
        float32x4_t a = vdupq_n_f32(0), c = a;
        int64_t j = 0;
        for (; j + 4 <= dim; j += 4) {
            float32x4_t q = vld1q_f32(query + j), r = vld1q_f32(row + j);
            a = vfmaq_f32(a, q, r);
            c = vaddq_f32(c, vabdq_f32(q, r));
        }
        float sum = vaddvq_f32(a), difference = vaddvq_f32(c);
        for (; j < dim; j++) {
            sum += query[j] * row[j];
            difference += __builtin_fabsf(query[j] - row[j]);
        }
        out[i] = sum;
        l1[i] = difference;
    }
}

static inline int32x4_t dot16(int32x4_t acc, int8x16_t query, int8x16_t row)
{
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, query, row);
#else
    /* lanes of the result are the sums of groups of four, as the instruction would give them */
    int16x8_t low = vmull_s8(vget_low_s8(query), vget_low_s8(row));
    int16x8_t high = vmull_s8(vget_high_s8(query), vget_high_s8(row));
    int32x4_t pairs = vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
    return vaddq_s32(acc, pairs);
#endif
}

static inline int8x16_t unbias16(const uint8_t *row)
{
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(row), vdupq_n_u8(0x80)));
}

static int32_t sum_codes(const int8_t *query, int64_t stride)
{
    int32x4_t sum = vdupq_n_s32(0);
    for (int64_t j = 0; j < stride; j += 16)
        sum = vpadalq_s16(sum, vpaddlq_s8(vld1q_s8(query + j)));
    return vaddvq_s32(sum);
}

static void dots_u8(const int8_t *query, const uint8_t *rows, int64_t n, int64_t stride, int32_t *out)
{
    const int32_t offset = 128 * sum_codes(query, stride);
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *row = rows + i * stride;
        int32x4_t a = vdupq_n_s32(0), b = a;
        for (int64_t j = 0; j < stride; j += 32) {
            a = dot16(a, vld1q_s8(query + j), unbias16(row + j));
            b = dot16(b, vld1q_s8(query + j + 16), unbias16(row + j + 16));
        }
        out[i] = vaddvq_s32(vaddq_s32(a, b)) + offset;
    }
}

static void dots_l1_u8(const int8_t *query, const uint8_t *graded, const uint8_t *grades, const uint8_t *rows,
                       int64_t n, int64_t stride, int32_t *out, int32_t *sad)
{
    dots_u8(query, rows, n, stride, out);
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *row = rows + i * stride, *own = graded + (int64_t)grades[i] * stride;
        uint32x4_t a = vdupq_n_u32(0);
        for (int64_t j = 0; j < stride; j += 16)
            a = vpadalq_u16(a, vpaddlq_u8(vabdq_u8(vld1q_u8(own + j), vld1q_u8(row + j))));
        sad[i] = (int32_t)vaddvq_u32(a);
    }
}

static void multi_u8(const int8_t *packed, int groups, const uint8_t *rows, int64_t n, int64_t stride, int32_t *out)
{
    for (int g = 0; g < groups; g++) {
        const int8_t *query = packed + (int64_t)g * stride * KM_LANES;
        int32x4_t base[4]; /* 128 * sum(query) per lane, to add back */
        for (int v = 0; v < 4; v++) {
            base[v] = vdupq_n_s32(0);
            for (int64_t j = 0; j < stride; j += 4)
                base[v] = dot16(base[v], vdupq_n_s8(64), vld1q_s8(query + j * KM_LANES + 16 * v));
            base[v] = vshlq_n_s32(base[v], 1);
        }
        for (int64_t i = 0; i < n; i++) {
            const uint8_t *row = rows + i * stride;
            int32x4_t a[4] = {base[0], base[1], base[2], base[3]};
            for (int64_t j = 0; j < stride; j += 4) {
                uint32_t value;
                __builtin_memcpy(&value, row + j, 4);
                int8x16_t r = vreinterpretq_s8_u32(vdupq_n_u32(value ^ 0x80808080u));
                for (int v = 0; v < 4; v++)
                    a[v] = dot16(a[v], vld1q_s8(query + j * KM_LANES + 16 * v), r);
            }
            for (int v = 0; v < 4; v++)
                vst1q_s32(out + i * KM_MULTI + g * KM_LANES + 4 * v, a[v]);
        }
    }
}

static void multi_f32(const float *packed, int groups, const float *rows, int64_t n, int64_t dim, float *out)
{
    for (int g = 0; g < groups; g++)
        for (int64_t i = 0; i < n; i++) {
            const float *row = rows + i * dim, *query = packed + (int64_t)g * dim * KM_LANES;
            float32x4_t a[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
            for (int64_t j = 0; j < dim; j++, query += KM_LANES)
                for (int v = 0; v < 4; v++)
                    a[v] = vfmaq_n_f32(a[v], vld1q_f32(query + 4 * v), row[j]);
            for (int v = 0; v < 4; v++)
                vst1q_f32(out + i * KM_MULTI + g * KM_LANES + 4 * v, a[v]);
        }
}

static void lanes_i8(const int8_t *query, const int8_t *packed, int64_t groups, int64_t dims, int32_t *out)
{
    for (int64_t g = 0; g < groups; g++) {
        const int8_t *rows = packed + g * dims * KM_LANES;
        int32x4_t a[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
        for (int64_t j = 0; j < dims; j += 4, rows += 4 * KM_LANES) {
            int32_t word;
            __builtin_memcpy(&word, query + j, 4);
            const int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(word));
            for (int v = 0; v < 4; v++)
                a[v] = dot16(a[v], q, vld1q_s8(rows + 16 * v));
        }
        for (int v = 0; v < 4; v++)
            vst1q_s32(out + g * KM_LANES + 4 * v, a[v]);
    }
}

const km_isa km_isa_neon = {
    "neon", supported, dots_f32, dots_l1_f32, dots_u8, dots_l1_u8, multi_u8, multi_f32,
    body_admit, body_admit_multi, body_unbias, body_overlap, body_same, lanes_i8, body_sift, body_read,
};
#endif
