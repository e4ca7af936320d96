/* AVX2 and FMA: eight lanes, two 16-bit products each. */
#if defined(__x86_64__)
#include "transformer.h"

#define XF_LANES 8
#define XF_STRING_(x) #x
#define XF_STRING(x) XF_STRING_(x)

/* One row's pair times both halves of the panel's, added to two sums. */
#define STEP(row, low, high)                                                                                          \
    "vpbroadcastd " row ", %%ymm2\n\t"                                                                                \
    "vpmaddwd %%ymm0, %%ymm2, %%ymm3\n\t"                                                                             \
    "vpmaddwd %%ymm1, %%ymm2, %%ymm2\n\t"                                                                             \
    "vpaddd %%ymm3, %%ymm" #low ", %%ymm" #low "\n\t"                                                                 \
    "vpaddd %%ymm2, %%ymm" #high ", %%ymm" #high "\n\t"
#define ZERO(number) "vpxor %%ymm" #number ", %%ymm" #number ", %%ymm" #number "\n\t"
#define STORE(number, at) "vmovdqa %%ymm" #number ", " #at "(%[sums])\n\t"

/* Twelve sums, two vectors of weights, one pair and one product: all sixteen registers. Compilers spill some of them,
 * which costs a third of the speed, hence the assembly. */
static void xf_tile(const int16_t *rows, const int16_t *panel, int64_t in, int32_t *sums)
{
    const int16_t *lower = rows + 3 * in;
    int64_t pairs = in / 2;
    __asm__ volatile(
        ZERO(4) ZERO(5) ZERO(6) ZERO(7) ZERO(8) ZERO(9) ZERO(10) ZERO(11) ZERO(12) ZERO(13) ZERO(14) ZERO(15)
        ".p2align 5\n"
        "1:\n\t"
        "vmovdqu (%[panel]), %%ymm0\n\t"
        "vmovdqu 32(%[panel]), %%ymm1\n\t"
        STEP("(%[rows])", 4, 5)
        STEP("(%[rows],%[stride])", 6, 7)
        STEP("(%[rows],%[stride],2)", 8, 9)
        STEP("(%[lower])", 10, 11)
        STEP("(%[lower],%[stride])", 12, 13)
        STEP("(%[lower],%[stride],2)", 14, 15)
        "add $" XF_STRING(XF_PANEL) " * 4, %[panel]\n\t"
        "add $4, %[rows]\n\t"
        "add $4, %[lower]\n\t"
        "dec %[pairs]\n\t"
        "jnz 1b\n\t"
        STORE(4, 0) STORE(5, 32) STORE(6, 64) STORE(7, 96) STORE(8, 128) STORE(9, 160)
        STORE(10, 192) STORE(11, 224) STORE(12, 256) STORE(13, 288) STORE(14, 320) STORE(15, 352)
        : [rows] "+r"(rows), [lower] "+r"(lower), [panel] "+r"(panel), [pairs] "+r"(pairs)
        : [stride] "r"(2 * in), [sums] "r"(sums)
        : "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12",
          "ymm13", "ymm14", "ymm15", "memory", "cc");
}

#include "transformer_body.h"

static int supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

const xf_isa xf_isa_avx2 = {"avx2", supported, body_run, body_project};
#endif
