/*
 * AVX2 and FMA. There is no 8-bit dot instruction here, and `maddubs` saturates when it adds two products of full
 * range; with the row's sign moved onto the query both factors are at most 127 and the sum of two fits 16 bits.
 */
#if defined(__x86_64__) || defined(__i386__)
#include "body.h"
#include <immintrin.h>

static int supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static inline float sum8(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

static inline int32_t sum8i(__m256i v)
{
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

static void dots_f32(const float *query, const float *rows, int64_t n, int64_t dim, float *out)
{
    for (int64_t i = 0; i < n; i++) {
        const float *row = rows + i * dim;
        __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
        int64_t j = 0;
        for (; j + 32 <= dim; j += 32) {
            a = _mm256_fmadd_ps(_mm256_loadu_ps(query + j), _mm256_loadu_ps(row + j), a);
            b = _mm256_fmadd_ps(_mm256_loadu_ps(query + j + 8), _mm256_loadu_ps(row + j + 8), b);
            c = _mm256_fmadd_ps(_mm256_loadu_ps(query + j + 16), _mm256_loadu_ps(row + j + 16), c);
            d = _mm256_fmadd_ps(_mm256_loadu_ps(query + j + 24), _mm256_loadu_ps(row + j + 24), d);
        }
        for (; j + 8 <= dim; j += 8)
            a = _mm256_fmadd_ps(_mm256_loadu_ps(query + j), _mm256_loadu_ps(row + j), a);
        float sum = sum8(_mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));
        for (; j < dim; j++)
            sum += query[j] * row[j];
        out[i] = sum;
    }
}

static void dots_l1_f32(const float *query, const float *rows, int64_t n, int64_t dim, float *out, float *l1)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int64_t i = 0; i < n; i++) {
        const float *row = rows + i * dim;
        __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
        int64_t j = 0;
        for (; j + 16 <= dim; j += 16) {
            __m256 q0 = _mm256_loadu_ps(query + j), r0 = _mm256_loadu_ps(row + j);
            __m256 q1 = _mm256_loadu_ps(query + j + 8), r1 = _mm256_loadu_ps(row + j + 8);
            a = _mm256_fmadd_ps(q0, r0, a);
            b = _mm256_fmadd_ps(q1, r1, b);
            c = _mm256_add_ps(c, _mm256_andnot_ps(sign, _mm256_sub_ps(q0, r0)));
            d = _mm256_add_ps(d, _mm256_andnot_ps(sign, _mm256_sub_ps(q1, r1)));
        }
        float sum = sum8(_mm256_add_ps(a, b)), difference = sum8(_mm256_add_ps(c, d));
        for (; j < dim; j++) {
            sum += query[j] * row[j];
            difference += __builtin_fabsf(query[j] - row[j]);
        }
        out[i] = sum;
        l1[i] = difference;
    }
}

/* Rows are biased by 128; `query * row` over biased rows is `query * (row - 128)` plus 128 * sum(query). */
static inline __m256i dot32(__m256i acc, __m256i query, __m256i row, __m256i bias, __m256i ones)
{
    __m256i r = _mm256_xor_si256(row, bias);
    __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(r), _mm256_sign_epi8(query, r));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(products, ones));
}

static inline int32_t sum_codes(const int8_t *query, int64_t stride)
{
    int32_t sum = 0;
    for (int64_t j = 0; j < stride; j++)
        sum += query[j];
    return sum;
}

static void dots_u8(const int8_t *query, const uint8_t *rows, int64_t n, int64_t stride, int32_t *out)
{
    const __m256i bias = _mm256_set1_epi8((char)0x80), ones = _mm256_set1_epi16(1);
    const int32_t offset = 128 * sum_codes(query, stride);
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *row = rows + i * stride;
        __m256i a = _mm256_setzero_si256(), b = a;
        for (int64_t j = 0; j < stride; j += 64) {
            a = dot32(a, _mm256_loadu_si256((const __m256i *)(query + j)),
                      _mm256_loadu_si256((const __m256i *)(row + j)), bias, ones);
            b = dot32(b, _mm256_loadu_si256((const __m256i *)(query + j + 32)),
                      _mm256_loadu_si256((const __m256i *)(row + j + 32)), bias, ones);
        }
        out[i] = sum8i(_mm256_add_epi32(a, b)) + offset;
    }
}

static void dots_l1_u8(const int8_t *query, const uint8_t *graded, const uint8_t *grades, const uint8_t *rows,
                       int64_t n, int64_t stride, int32_t *out, int32_t *sad)
{
    dots_u8(query, rows, n, stride, out);
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *row = rows + i * stride, *own = graded + (int64_t)grades[i] * stride;
        __m256i a = _mm256_setzero_si256();
        for (int64_t j = 0; j < stride; j += 32)
            a = _mm256_add_epi64(a, _mm256_sad_epu8(_mm256_loadu_si256((const __m256i *)(own + j)),
                                                    _mm256_loadu_si256((const __m256i *)(row + j))));
        sad[i] = sum8i(a);
    }
}

static void multi_u8(const int8_t *packed, int groups, const uint8_t *rows, int64_t n, int64_t stride, int32_t *out)
{
    const __m256i bias = _mm256_set1_epi8((char)0x80), ones = _mm256_set1_epi16(1);
    for (int g = 0; g < groups; g++) {
        const int8_t *query = packed + (int64_t)g * stride * KM_LANES;
        __m256i low = _mm256_setzero_si256(), high = low; /* 128 * sum(query) per lane, to add back */
        const __m256i full = _mm256_set1_epi8(64);
        for (int64_t j = 0; j < stride; j += 4) {
            const __m256i *q = (const __m256i *)(query + j * KM_LANES);
            low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_maddubs_epi16(full, _mm256_loadu_si256(q)), ones));
            high = _mm256_add_epi32(high,
                                    _mm256_madd_epi16(_mm256_maddubs_epi16(full, _mm256_loadu_si256(q + 1)), ones));
        }
        low = _mm256_slli_epi32(low, 1);
        high = _mm256_slli_epi32(high, 1);
        int64_t i = 0;
        for (; i + 2 <= n; i += 2) {
            const uint8_t *r0 = rows + i * stride, *r1 = r0 + stride;
            __m256i a0 = low, a1 = high, b0 = low, b1 = high;
            for (int64_t j = 0; j < stride; j += 4) {
                int32_t w0, w1;
                __builtin_memcpy(&w0, r0 + j, 4);
                __builtin_memcpy(&w1, r1 + j, 4);
                __m256i q0 = _mm256_loadu_si256((const __m256i *)(query + j * KM_LANES));
                __m256i q1 = _mm256_loadu_si256((const __m256i *)(query + j * KM_LANES + 32));
                __m256i x = _mm256_set1_epi32(w0), y = _mm256_set1_epi32(w1);
                a0 = dot32(a0, q0, x, bias, ones);
                a1 = dot32(a1, q1, x, bias, ones);
                b0 = dot32(b0, q0, y, bias, ones);
                b1 = dot32(b1, q1, y, bias, ones);
            }
            __m256i *to = (__m256i *)(out + i * KM_MULTI + g * KM_LANES);
            _mm256_storeu_si256(to, a0);
            _mm256_storeu_si256(to + 1, a1);
            to = (__m256i *)(out + (i + 1) * KM_MULTI + g * KM_LANES);
            _mm256_storeu_si256(to, b0);
            _mm256_storeu_si256(to + 1, b1);
        }
        for (; i < n; i++) {
            const uint8_t *row = rows + i * stride;
            __m256i a0 = low, a1 = high;
            for (int64_t j = 0; j < stride; j += 4) {
                int32_t word;
                __builtin_memcpy(&word, row + j, 4);
                __m256i x = _mm256_set1_epi32(word);
                a0 = dot32(a0, _mm256_loadu_si256((const __m256i *)(query + j * KM_LANES)), x, bias, ones);
                a1 = dot32(a1, _mm256_loadu_si256((const __m256i *)(query + j * KM_LANES + 32)), x, bias, ones);
            }
            __m256i *to = (__m256i *)(out + i * KM_MULTI + g * KM_LANES);
            _mm256_storeu_si256(to, a0);
            _mm256_storeu_si256(to + 1, a1);
        }
    }
}

static void multi_f32(const float *packed, int groups, const float *rows, int64_t n, int64_t dim, float *out)
{
    for (int g = 0; g < groups; g++) {
        const float *query = packed + (int64_t)g * dim * KM_LANES;
        int64_t i = 0;
        for (; i < n; i += 4) {
            /* the last rows of a ragged block are done again rather than one by one */
            int64_t at = n >= 4 && i + 4 > n ? n - 4 : i;
            int64_t count = n - at < 4 ? n - at : 4;
            const float *r[4];
            for (int l = 0; l < 4; l++)
                r[l] = rows + (at + (l < count ? l : 0)) * dim;
            __m256 acc[4][2];
            for (int l = 0; l < 4; l++)
                acc[l][0] = acc[l][1] = _mm256_setzero_ps();
            for (int64_t j = 0; j < dim; j++) {
                __m256 q0 = _mm256_loadu_ps(query + j * KM_LANES), q1 = _mm256_loadu_ps(query + j * KM_LANES + 8);
                for (int l = 0; l < 4; l++) {
                    __m256 x = _mm256_broadcast_ss(r[l] + j);
                    acc[l][0] = _mm256_fmadd_ps(q0, x, acc[l][0]);
                    acc[l][1] = _mm256_fmadd_ps(q1, x, acc[l][1]);
                }
            }
            for (int64_t l = 0; l < count; l++) {
                _mm256_storeu_ps(out + (at + l) * KM_MULTI + g * KM_LANES, acc[l][0]);
                _mm256_storeu_ps(out + (at + l) * KM_MULTI + g * KM_LANES + 8, acc[l][1]);
            }
        }
    }
}

/* Both factors are at most 127, so `maddubs` cannot saturate; the query's sign goes onto the rows. */
static void lanes_i8(const int8_t *query, const int8_t *packed, int64_t groups, int64_t dims, int32_t *out)
{
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t g = 0; g < groups; g++) {
        const int8_t *rows = packed + g * dims * KM_LANES;
        __m256i a = _mm256_setzero_si256(), b = a;
        for (int64_t j = 0; j < dims; j += 4, rows += 4 * KM_LANES) {
            int32_t word;
            __builtin_memcpy(&word, query + j, 4);
            const __m256i q = _mm256_set1_epi32(word), size = _mm256_abs_epi8(q);
            const __m256i r0 = _mm256_loadu_si256((const __m256i *)rows);
            const __m256i r1 = _mm256_loadu_si256((const __m256i *)(rows + 32));
            a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(r0, q)), ones));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(r1, q)), ones));
        }
        _mm256_storeu_si256((__m256i *)(out + g * KM_LANES), a);
        _mm256_storeu_si256((__m256i *)(out + g * KM_LANES + 8), b);
    }
}

const km_isa km_isa_avx2 = {
    "avx2", supported, dots_f32, dots_l1_f32, dots_u8, dots_l1_u8, multi_u8, multi_f32,
    body_admit, body_admit_multi, body_unbias, body_overlap, body_same, lanes_i8, body_sift, body_read,
};
#endif
