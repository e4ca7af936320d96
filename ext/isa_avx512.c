/*
 * AVX-512 with BW, DQ, VL and VNNI (Ice Lake, Zen 4 and later): `vpdpbusd` multiplies 64 pairs of bytes an instruction and
 * `vpsadbw` adds 64 absolute differences.
 */
#if defined(__x86_64__) || defined(__i386__)
#include "body.h"
#include <immintrin.h>

static int supported(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

/*
 * Rows are read in the order of memory, one after the other. A plain dot product in float32 leaves the prefetching to the
 * hardware: four rows at a time, or prefetches at any distance, gained nothing or lost up to 30 %. Where more is computed
 * per line, fewer rows fit into the window of instructions under way, and a prefetch this far ahead gains 4 to 9 %.
 */
#define AHEAD 4096

static inline void ahead(const void *at) { _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0); }

static void dots_f32(const float *query, const float *rows, int64_t n, int64_t dim, float *out)
{
    const int64_t whole = dim & ~(int64_t)63;
    for (int64_t i = 0; i < n; i++) {
        const float *row = rows + i * dim;
        __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
        int64_t j = 0;
        for (; j < whole; j += 64) {
            a = _mm512_fmadd_ps(_mm512_loadu_ps(query + j), _mm512_loadu_ps(row + j), a);
            b = _mm512_fmadd_ps(_mm512_loadu_ps(query + j + 16), _mm512_loadu_ps(row + j + 16), b);
            c = _mm512_fmadd_ps(_mm512_loadu_ps(query + j + 32), _mm512_loadu_ps(row + j + 32), c);
            d = _mm512_fmadd_ps(_mm512_loadu_ps(query + j + 48), _mm512_loadu_ps(row + j + 48), d);
        }
        for (; j < dim; j += 16) {
            __mmask16 m = dim - j >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << (dim - j)) - 1);
            a = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m, query + j), _mm512_maskz_loadu_ps(m, row + j), a);
        }
        out[i] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));
    }
}

static void dots_l1_f32(const float *query, const float *rows, int64_t n, int64_t dim, float *out, float *l1)
{
    const int64_t whole = dim & ~(int64_t)31;
    for (int64_t i = 0; i < n; i++) {
        const float *row = rows + i * dim;
        __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
        int64_t j = 0;
        for (; j < whole; j += 32) {
            ahead(row + j);
            ahead(row + j + 16);
            __m512 q0 = _mm512_loadu_ps(query + j), r0 = _mm512_loadu_ps(row + j);
            __m512 q1 = _mm512_loadu_ps(query + j + 16), r1 = _mm512_loadu_ps(row + j + 16);
            a = _mm512_fmadd_ps(q0, r0, a);
            b = _mm512_fmadd_ps(q1, r1, b);
            c = _mm512_add_ps(c, _mm512_abs_ps(_mm512_sub_ps(q0, r0)));
            d = _mm512_add_ps(d, _mm512_abs_ps(_mm512_sub_ps(q1, r1)));
        }
        for (; j < dim; j += 16) {
            __mmask16 m = dim - j >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << (dim - j)) - 1);
            __m512 q = _mm512_maskz_loadu_ps(m, query + j), r = _mm512_maskz_loadu_ps(m, row + j);
            a = _mm512_fmadd_ps(q, r, a);
            c = _mm512_add_ps(c, _mm512_abs_ps(_mm512_sub_ps(q, r)));
        }
        out[i] = _mm512_reduce_add_ps(_mm512_add_ps(a, b));
        l1[i] = _mm512_reduce_add_ps(_mm512_add_ps(c, d));
    }
}

/* Sums of the lanes of four registers, in order. */
static inline __m128i sums4(__m512i a, __m512i b, __m512i c, __m512i d)
{
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

static inline __m512i row_u8(const int8_t *query, const uint8_t *row, int64_t stride)
{
    __m512i a = _mm512_setzero_si512(), b = a;
    int64_t j = 0;
    for (; j + 128 <= stride; j += 128) {
        ahead(row + j);
        ahead(row + j + 64);
        a = _mm512_dpbusd_epi32(a, _mm512_loadu_si512(row + j), _mm512_loadu_si512(query + j));
        b = _mm512_dpbusd_epi32(b, _mm512_loadu_si512(row + j + 64), _mm512_loadu_si512(query + j + 64));
    }
    if (j < stride)
        a = _mm512_dpbusd_epi32(a, _mm512_loadu_si512(row + j), _mm512_loadu_si512(query + j));
    return _mm512_add_epi32(a, b);
}

static void dots_u8(const int8_t *query, const uint8_t *rows, int64_t n, int64_t stride, int32_t *out)
{
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const uint8_t *row = rows + i * stride;
        __m512i a = row_u8(query, row, stride), b = row_u8(query, row + stride, stride);
        __m512i c = row_u8(query, row + 2 * stride, stride), d = row_u8(query, row + 3 * stride, stride);
        _mm_storeu_si128((__m128i *)(out + i), sums4(a, b, c, d));
    }
    for (; i < n; i++)
        out[i] = _mm512_reduce_add_epi32(row_u8(query, rows + i * stride, stride));
}

/* Both sums of a row that is read once. The differences add up in 64-bit lanes whose upper halves stay zero: as 32-bit
 * lanes they add up all the same. */
static inline __m512i row_both(const int8_t *query, const uint8_t *own, const uint8_t *row, int64_t stride, __m512i *sad)
{
    __m512i a = _mm512_setzero_si512(), c = a;
    for (int64_t j = 0; j < stride; j += 64) {
        __m512i r = _mm512_loadu_si512(row + j);
        ahead(row + j);
        a = _mm512_dpbusd_epi32(a, r, _mm512_loadu_si512(query + j));
        c = _mm512_add_epi64(c, _mm512_sad_epu8(r, _mm512_loadu_si512(own + j)));
    }
    *sad = c;
    return a;
}

static void dots_l1_u8(const int8_t *query, const uint8_t *graded, const uint8_t *grades, const uint8_t *rows,
                       int64_t n, int64_t stride, int32_t *out, int32_t *sad)
{
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        __m512i a[4], c[4];
#pragma GCC unroll 4
        for (int l = 0; l < 4; l++)
            a[l] = row_both(query, graded + (int64_t)grades[i + l] * stride, rows + (i + l) * stride, stride, &c[l]);
        _mm_storeu_si128((__m128i *)(out + i), sums4(a[0], a[1], a[2], a[3]));
        _mm_storeu_si128((__m128i *)(sad + i), sums4(c[0], c[1], c[2], c[3]));
    }
    for (; i < n; i++) {
        __m512i c, a = row_both(query, graded + (int64_t)grades[i] * stride, rows + i * stride, stride, &c);
        out[i] = _mm512_reduce_add_epi32(a);
        sad[i] = _mm512_reduce_add_epi32(c);
    }
}

static inline __m512i word(const uint8_t *at)
{
    int32_t value;
    __builtin_memcpy(&value, at, 4);
    return _mm512_set1_epi32(value);
}

#define TILE 8 /* rows held in registers against 16 or 32 queries */

static inline void tile_u8(const int8_t *query, int64_t other, const uint8_t *row, int64_t stride, int32_t *out)
{
    __m512i a[TILE], b[TILE];
    for (int l = 0; l < TILE; l++)
        a[l] = b[l] = _mm512_setzero_si512();
    for (int64_t j = 0; j < stride; j += 4) {
        __m512i q0 = _mm512_loadu_si512(query + j * KM_LANES), q1 = _mm512_loadu_si512(query + other + j * KM_LANES);
#pragma GCC unroll 8
        for (int l = 0; l < TILE; l++) {
            __m512i r = word(row + l * stride + j);
            a[l] = _mm512_dpbusd_epi32(a[l], r, q0);
            b[l] = _mm512_dpbusd_epi32(b[l], r, q1);
        }
    }
    for (int l = 0; l < TILE; l++) {
        _mm512_storeu_si512(out + l * KM_MULTI, a[l]);
        _mm512_storeu_si512(out + l * KM_MULTI + KM_LANES, b[l]);
    }
}

static void multi_u8(const int8_t *packed, int groups, const uint8_t *rows, int64_t n, int64_t stride, int32_t *out)
{
    const int64_t group = stride * KM_LANES;
    int64_t i = 0;
    if (groups == 2)
        for (; i + TILE <= n; i += TILE)
            tile_u8(packed, group, rows + i * stride, stride, out + i * KM_MULTI);
    for (; i < n; i++)
        for (int g = 0; g < groups; g++) {
            const int8_t *query = packed + g * group;
            __m512i a = _mm512_setzero_si512();
            for (int64_t j = 0; j < stride; j += 4)
                a = _mm512_dpbusd_epi32(a, word(rows + i * stride + j), _mm512_loadu_si512(query + j * KM_LANES));
            _mm512_storeu_si512(out + i * KM_MULTI + g * KM_LANES, a);
        }
}

static void multi_f32(const float *packed, int groups, const float *rows, int64_t n, int64_t dim, float *out)
{
    for (int g = 0; g < groups; g++) {
        const float *query = packed + (int64_t)g * dim * KM_LANES;
        int64_t i = 0;
        for (; i + TILE <= n; i += TILE) {
            const float *row = rows + i * dim;
            __m512 a[TILE];
            for (int l = 0; l < TILE; l++)
                a[l] = _mm512_setzero_ps();
            for (int64_t j = 0; j < dim; j++) {
                __m512 q = _mm512_loadu_ps(query + j * KM_LANES);
#pragma GCC unroll 8
                for (int l = 0; l < TILE; l++)
                    a[l] = _mm512_fmadd_ps(_mm512_set1_ps(row[l * dim + j]), q, a[l]);
            }
            for (int l = 0; l < TILE; l++)
                _mm512_storeu_ps(out + (i + l) * KM_MULTI + g * KM_LANES, a[l]);
        }
        for (; i < n; i++) {
            __m512 a = _mm512_setzero_ps();
            for (int64_t j = 0; j < dim; j++)
                a = _mm512_fmadd_ps(_mm512_set1_ps(rows[i * dim + j]), _mm512_loadu_ps(query + j * KM_LANES), a);
            _mm512_storeu_ps(out + i * KM_MULTI + g * KM_LANES, a);
        }
    }
}

/* flag * km_level of one text with 16 others. */
static inline __m512 lifts16(__m512i a, __m512i b, float flag)
{
    const __m512i numbers = _mm512_set1_epi32((int)KM_NUMBERS), named = _mm512_set1_epi32((int)KM_NAMED);
    __mmask16 both = _mm512_movepi32_mask(_mm512_and_si512(a, b));
    __m512i unlike = _mm512_xor_si512(a, b);
    __mmask16 negated = _mm512_test_epi32_mask(unlike, _mm512_set1_epi32((int)KM_NEGATED));
    __mmask16 unequal = _mm512_test_epi32_mask(unlike, numbers);
    __mmask16 present = _mm512_test_epi32_mask(a, numbers) & _mm512_test_epi32_mask(b, numbers);
    __mmask16 differs = both & (negated | (unequal & present));
    __mmask16 same = both & _mm512_testn_epi32_mask(unlike, named) & _mm512_test_epi32_mask(a, named);
    __m512 lift = _mm512_maskz_mov_ps(differs, _mm512_set1_ps(flag));
    lift = _mm512_mask_mov_ps(lift, same, _mm512_set1_ps(flag * KM_SAME));
    return _mm512_mask_mov_ps(lift, same & differs, _mm512_set1_ps(flag * (KM_SAME + 1.0f)));
}

static void admit_multi(const float *cosine, int lanes, uint32_t row_text, const uint32_t *query_text,
                        const float *min_related, const float *floors, float flag, uint32_t *related,
                        uint32_t *passing)
{
    uint32_t rel = 0, pass = 0;
    const __m512i text = _mm512_set1_epi32((int)row_text);
    for (int j = 0; j < lanes; j += KM_LANES) {
        __m512 c = _mm512_loadu_ps(cosine + j);
        __mmask16 r = _mm512_cmp_ps_mask(c, _mm512_loadu_ps(min_related + j), _CMP_GE_OQ);
        if (r == 0)
            continue;
        c = _mm512_add_ps(c, lifts16(text, _mm512_loadu_si512(query_text + j), flag));
        __mmask16 p = _mm512_mask_cmp_ps_mask(r, c, _mm512_loadu_ps(floors + j), _CMP_GE_OQ);
        rel |= (uint32_t)r << j;
        pass |= (uint32_t)p << j;
    }
    *related = rel;
    *passing = pass;
}

static uint64_t overlap(const uint64_t *words, int64_t n, uint64_t mask)
{
    const __m512i m = _mm512_set1_epi64((long long)mask);
    uint64_t bits = 0;
    for (int64_t i = 0; i < n; i += 8) {
        __mmask8 in = n - i >= 8 ? (__mmask8)0xff : (__mmask8)((1u << (n - i)) - 1);
        bits |= (uint64_t)_mm512_test_epi64_mask(_mm512_maskz_loadu_epi64(in, words + i), m) << i;
    }
    return bits;
}

static uint64_t same(const uint64_t *words, int64_t n, uint64_t subject)
{
    const __m512i m = _mm512_set1_epi64((long long)KM_SUBJECT), s = _mm512_set1_epi64((long long)subject);
    uint64_t bits = 0;
    for (int64_t i = 0; i < n; i += 8) {
        __mmask8 in = n - i >= 8 ? (__mmask8)0xff : (__mmask8)((1u << (n - i)) - 1);
        __m512i w = _mm512_and_si512(_mm512_maskz_loadu_epi64(in, words + i), m);
        bits |= (uint64_t)_mm512_mask_cmpeq_epi64_mask(in, w, s) << i;
    }
    return bits;
}

/* The query is biased to bytes without a sign; 128 times the sum of a row is taken off again. */
static void lanes_i8(const int8_t *query, const int8_t *packed, int64_t groups, int64_t dims, int32_t *out)
{
    const __m512i bias = _mm512_set1_epi8((char)0x80);
    for (int64_t g = 0; g < groups; g++) {
        const int8_t *rows = packed + g * dims * KM_LANES;
        __m512i dots = _mm512_setzero_si512(), sums = dots;
        for (int64_t j = 0; j < dims; j += 4, rows += 4 * KM_LANES) {
            int32_t word;
            __builtin_memcpy(&word, query + j, 4);
            const __m512i r = _mm512_loadu_si512(rows);
            dots = _mm512_dpbusd_epi32(dots, _mm512_xor_si512(_mm512_set1_epi32(word), bias), r);
            sums = _mm512_dpbusd_epi32(sums, bias, r);
        }
        _mm512_storeu_si512(out + g * KM_LANES, _mm512_sub_epi32(dots, sums));
    }
}

const km_isa km_isa_avx512 = {
    "avx512", supported, dots_f32, dots_l1_f32, dots_u8, dots_l1_u8, multi_u8, multi_f32,
    body_admit, admit_multi, body_unbias, overlap, same, lanes_i8, body_sift, body_read,
};
#endif
