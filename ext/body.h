/*
 * The part of an instruction-set variant that the compiler vectorises well by itself. Each isa_*.c includes this after
 * its own flags are set, so that every variant gets its own code; all functions are static to that file.
 */
#include "kimera.h"

static inline km_masks body_admit(const float *restrict cosine, const uint32_t *restrict text, const float *restrict l1,
                                  int64_t n, uint32_t query_text, const km_weights *weights, float floor,
                                  float *restrict fused)
{
    uint8_t related[KM_BLOCK] = {0}, passing[KM_BLOCK] = {0};
    const float minimum = weights->min_related - weights->margin, flag = weights->flag;
    const float bar = floor - weights->layer;
    int64_t i;
    for (i = 0; i < n; i++)
        fused[i] = cosine[i];
    if (text != NULL && flag != 0.0f && (query_text & KM_TEXT))
        for (i = 0; i < n; i++)
            fused[i] += flag * km_level(query_text, text[i]);
    if (l1 != NULL)
        for (i = 0; i < n; i++)
            fused[i] += weights->l1 * l1[i];
    for (i = 0; i < n; i++) {
        related[i] = (uint8_t)(cosine[i] >= minimum);
        passing[i] = (uint8_t)((cosine[i] >= minimum) & (fused[i] >= bar));
    }
    km_masks masks = {0, 0};
    for (i = 0; i < KM_BLOCK / 8; i++) { /* eight bytes of 0/1 to eight bits */
        uint64_t r, p;
        __builtin_memcpy(&r, related + 8 * i, 8);
        __builtin_memcpy(&p, passing + 8 * i, 8);
        masks.related |= ((r * UINT64_C(0x0102040810204080)) >> 56) << (8 * i);
        masks.passing |= ((p * UINT64_C(0x0102040810204080)) >> 56) << (8 * i);
    }
    return masks;
}

static inline void body_admit_multi(const float *restrict cosine, int lanes, uint32_t row_text,
                             const uint32_t *restrict query_text, const float *restrict min_related,
                             const float *restrict floors, float flag, uint32_t *related, uint32_t *passing)
{
    uint32_t rel = 0, pass = 0;
    for (int j = 0; j < lanes; j++) {
        float fused = cosine[j] + flag * km_level(row_text, query_text[j]);
        uint32_t r = (uint32_t)(cosine[j] >= min_related[j]);
        uint32_t p = r & (uint32_t)(fused >= floors[j]);
        rel |= r << j;
        pass |= p << j;
    }
    *related = rel;
    *passing = pass;
}

static inline void body_unbias(const int32_t *restrict acc, const int32_t *restrict bias, const float *restrict steps,
                        float step, int lanes, float *restrict cosine)
{
    for (int j = 0; j < lanes; j++)
        cosine[j] = (float)(acc[j] - bias[j]) * (step * steps[j]);
}

static inline uint64_t body_overlap(const uint64_t *restrict words, int64_t n, uint64_t mask)
{
    uint64_t bits = 0;
    for (int64_t i = 0; i < n; i++)
        bits |= (uint64_t)((words[i] & mask) != 0) << i;
    return bits;
}

static inline uint64_t body_same(const uint64_t *restrict words, int64_t n, uint64_t subject)
{
    uint64_t bits = 0;
    for (int64_t i = 0; i < n; i++)
        bits |= (uint64_t)((words[i] & KM_SUBJECT) == subject) << i;
    return bits;
}

static inline uint64_t body_sift(const int32_t *restrict dots, const uint8_t *restrict rest, int64_t n, float step,
                                 float slack, float bar)
{
    uint8_t over[KM_BLOCK] = {0};
    for (int64_t i = 0; i < n; i++)
        over[i] = (uint8_t)((float)dots[i] * step + slack * (float)(int32_t)rest[i] >= bar);
    uint64_t bits = 0;
    for (int i = 0; i < KM_BLOCK / 8; i++) {
        uint64_t word;
        __builtin_memcpy(&word, over + 8 * i, 8);
        bits |= ((word * UINT64_C(0x0102040810204080)) >> 56) << (8 * i);
    }
    return bits;
}

/* The yardstick of the benchmarks: how fast one thread can read, with nothing to compute. */
typedef uint64_t lanes __attribute__((vector_size(64), aligned(1), may_alias));

static inline uint64_t body_read(const uint8_t *data, size_t bytes)
{
    lanes a = {0}, b = {0}, c = {0}, d = {0};
    size_t i = 0;
    for (; i + 256 <= bytes; i += 256) {
        a ^= *(const lanes *)(data + i);
        b ^= *(const lanes *)(data + i + 64);
        c ^= *(const lanes *)(data + i + 128);
        d ^= *(const lanes *)(data + i + 192);
    }
    a ^= b ^ c ^ d;
    uint64_t sum = 0;
    for (int l = 0; l < 8; l++)
        sum ^= a[l];
    for (; i < bytes; i++)
        sum ^= data[i];
    return sum;
}
