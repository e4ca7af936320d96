/* AVX-512 with VNNI: sixteen lanes, and the two products of a lane are added up in the same instruction. */
#if defined(__x86_64__)
#include "transformer.h"
#include <immintrin.h>

#define XF_LANES 16

static inline __m512i pair(const int16_t *at)
{
    int32_t both;
    __builtin_memcpy(&both, at, sizeof both);
    return _mm512_set1_epi32(both);
}

static void xf_tile(const int16_t *rows, const int16_t *panel, int64_t in, int32_t *sums)
{
    __m512i low[XF_ROWS], high[XF_ROWS];
    for (int i = 0; i < XF_ROWS; i++)
        low[i] = high[i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < in; k += 2, panel += 2 * XF_PANEL) {
        const __m512i w0 = _mm512_loadu_si512(panel), w1 = _mm512_loadu_si512(panel + 32);
        for (int i = 0; i < XF_ROWS; i++) {
            const __m512i x = pair(rows + i * in + k);
            low[i] = _mm512_dpwssd_epi32(low[i], x, w0);
            high[i] = _mm512_dpwssd_epi32(high[i], x, w1);
        }
    }
    for (int i = 0; i < XF_ROWS; i++) {
        _mm512_store_si512(sums + i * 32, low[i]);
        _mm512_store_si512(sums + i * 32 + 16, high[i]);
    }
}

#include "transformer_body.h"

static int supported(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

const xf_isa xf_isa_avx512 = {"avx512", supported, body_run, body_project};
#endif
