/* Compares every variant that this machine can run with the scalar one. For machines where Python is not at hand, such as an
 * emulated one. Prints the variants checked; returns 1 at the first difference. */
#include "kimera.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state = 88172645463325252u;
static uint64_t next(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}
static float real(void) { return (float)((double)(next() >> 11) / 4503599627370496.0 - 1.0); }

#define FAIL(...) do { printf(__VA_ARGS__); printf("\n"); return 1; } while (0)

static int check(const km_isa *isa, int64_t dim, int64_t n)
{
    const km_isa *plain = &km_isa_scalar;
    int64_t stride = (dim + KM_ALIGN - 1) / KM_ALIGN * KM_ALIGN;
    float *q = malloc(dim * 4), *rows = malloc(n * dim * 4 + 4), *packed = malloc(2 * KM_LANES * dim * 4);
    float out[2][64], l1[2][64], multi[2][64 * KM_MULTI];
    int8_t *codes = malloc(stride), *packed8 = malloc(2 * KM_LANES * stride);
    uint8_t *bytes = malloc(n * stride + 64), *graded = malloc(256 * stride), grades[64];
    int32_t dots[2][64], sad[2][64], many[2][64 * KM_MULTI];
    for (int64_t i = 0; i < dim; i++) q[i] = real();
    for (int64_t i = 0; i < n * dim; i++) rows[i] = real();
    for (int64_t i = 0; i < 2 * KM_LANES * dim; i++) packed[i] = real();
    for (int64_t i = 0; i < stride; i++) codes[i] = (int8_t)((int)(next() % 255) - 127);
    for (int64_t i = 0; i < 2 * KM_LANES * stride; i++) packed8[i] = (int8_t)((int)(next() % 255) - 127);
    for (int64_t i = 0; i < n * stride; i++) bytes[i] = (uint8_t)(1 + next() % 255);
    for (int64_t i = 0; i < 256 * stride; i++) graded[i] = (uint8_t)(1 + next() % 255);
    for (int i = 0; i < 64; i++) grades[i] = (uint8_t)next();
    if (next() % 4 == 0) { /* extremes: the sums that would overflow 16 bits */
        memset(bytes, 255, n * stride);
        memset(codes, 127, stride);
        memset(packed8, -127, 2 * KM_LANES * stride);
    }
    const km_isa *both[2] = {plain, isa};
    for (int v = 0; v < 2; v++) {
        memset(multi[v], 0, sizeof multi[v]);
        memset(many[v], 0, sizeof many[v]);
        both[v]->dots_f32(q, rows, n, dim, out[v]);
        both[v]->dots_u8(codes, bytes, n, stride, dots[v]);
        for (int64_t i = 0; i < n; i++)
            if (v && (fabsf(out[0][i] - out[1][i]) > 1e-3f || dots[0][i] != dots[1][i]))
                FAIL("%s dots: dim %ld n %ld row %ld", isa->name, (long)dim, (long)n, (long)i);
        both[v]->dots_l1_f32(q, rows, n, dim, out[v], l1[v]);
        both[v]->dots_l1_u8(codes, graded, grades, bytes, n, stride, dots[v], sad[v]);
        for (int groups = 1; groups <= 2; groups++) {
            both[v]->multi_u8(packed8, groups, bytes, n, stride, many[v]);
            both[v]->multi_f32(packed, groups, rows, n, dim, multi[v]);
            for (int64_t i = 0; v && i < n; i++)
                for (int j = 0; j < groups * KM_LANES; j++) {
                    int64_t at = i * KM_MULTI + j;
                    if (groups == 2 && (many[0][at] != many[1][at] || fabsf(multi[0][at] - multi[1][at]) > 1e-3f))
                        FAIL("%s multi: dim %ld n %ld", isa->name, (long)dim, (long)n);
                }
        }
    }
    for (int64_t i = 0; i < n; i++)
        if (fabsf(out[0][i] - out[1][i]) > 1e-3f || fabsf(l1[0][i] - l1[1][i]) > 1e-2f || dots[0][i] != dots[1][i] ||
            sad[0][i] != sad[1][i])
            FAIL("%s l1: dim %ld n %ld row %ld", isa->name, (long)dim, (long)n, (long)i);
    uint32_t text[64], texts[KM_MULTI], rel[2], pass[2];
    uint64_t words[64];
    float floors[KM_MULTI], least[KM_MULTI], fused[2][64], cosine[2][KM_MULTI], steps[KM_MULTI];
    int32_t bias[KM_MULTI];
    for (int i = 0; i < 64; i++) {
        text[i] = (uint32_t)(next() & 0xc0000003u);
        words[i] = next() & next() & next();
        out[0][i] = real();
    }
    for (int j = 0; j < KM_MULTI; j++) {
        texts[j] = (uint32_t)(next() & 0xc0000003u);
        floors[j] = real();
        least[j] = 0.0f;
        bias[j] = (int32_t)(next() % 1000);
        steps[j] = real();
    }
    km_weights weights = {0.1f, -INFINITY, 0.5f, 0.125f, 0.25f, 0.01f};
    for (int with = 0; with < 4; with++) {
        km_masks a = plain->admit(out[0], with & 1 ? text : NULL, with & 2 ? l1[0] : NULL, n, text[5], &weights, 0.4f, fused[0]);
        km_masks b = isa->admit(out[0], with & 1 ? text : NULL, with & 2 ? l1[0] : NULL, n, text[5], &weights, 0.4f, fused[1]);
        if (a.related != b.related || a.passing != b.passing)
            FAIL("%s admit: n %ld", isa->name, (long)n);
    }
    if (plain->overlap(words, n, words[7] | 5) != isa->overlap(words, n, words[7] | 5))
        FAIL("%s overlap: n %ld", isa->name, (long)n);
    for (int i = 0; i < 64; i++)
        words[i] &= UINT64_C(3) << 60 | 0xff;
    for (uint64_t subject = 0; subject < 4; subject++)
        if (plain->same(words, n, subject << 60) != isa->same(words, n, subject << 60))
            FAIL("%s same: n %ld", isa->name, (long)n);
    for (int lanes = KM_LANES; lanes <= KM_MULTI; lanes += KM_LANES) {
        for (int v = 0; v < 2; v++) {
            both[v]->admit_multi(out[0], lanes, text[3], texts, least, floors, 0.5f, &rel[v], &pass[v]);
            both[v]->unbias(many[0], bias, steps, 0.01f, lanes, cosine[v]);
        }
        if (rel[0] != rel[1] || pass[0] != pass[1])
            FAIL("%s admit_multi", isa->name);
        for (int j = 0; j < lanes; j++)
            if (fabsf(cosine[0][j] - cosine[1][j]) > 1e-4f * fabsf(cosine[0][j]))
                FAIL("%s unbias", isa->name);
    }
    int64_t dims = (dim + 3) / 4 * 4, groups = 1 + n / KM_LANES;
    int8_t *small = malloc(dims), *lanes = malloc(groups * KM_LANES * dims);
    int32_t found[2][80];
    uint8_t rest[64];
    for (int64_t i = 0; i < dims; i++) small[i] = (int8_t)((int)(next() % 255) - 127);
    for (int64_t i = 0; i < groups * KM_LANES * dims; i++) lanes[i] = (int8_t)((int)(next() % 255) - 127);
    if (next() % 4 == 0) {
        memset(small, -127, dims);
        memset(lanes, next() % 2 ? 127 : -127, groups * KM_LANES * dims);
    }
    for (int v = 0; v < 2; v++)
        both[v]->lanes_i8(small, lanes, groups, dims, found[v]);
    if (memcmp(found[0], found[1], groups * KM_LANES * sizeof found[0][0]) != 0)
        FAIL("%s lanes: dims %ld groups %ld", isa->name, (long)dims, (long)groups);
    for (int i = 0; i < 64; i++) {
        rest[i] = (uint8_t)next();
        found[0][i] = (int32_t)(next() % 4096) - 2048;
    }
    if (plain->sift(found[0], rest, n, 0.25f, 0.5f, 64.0f) != isa->sift(found[0], rest, n, 0.25f, 0.5f, 64.0f))
        FAIL("%s sift: n %ld", isa->name, (long)n);
    free(small), free(lanes);
    free(q), free(rows), free(packed), free(codes), free(packed8), free(bytes), free(graded);
    return 0;
}

int main(void)
{
    km_init_steps();
    for (int v = 0; v < km_variant_count(); v++) {
        for (int64_t dim = 1; dim <= 400; dim += dim < 70 ? 1 : 37)
            for (int64_t n = 1; n <= 64; n += n < 10 ? 1 : 18)
                if (check(km_variant(v), dim, n))
                    return 1;
        printf("%s\n", km_variant(v)->name);
    }
    return 0;
}
