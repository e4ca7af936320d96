/* Which variants this machine can run, best first. */
#include "kimera.h"

static const km_isa *const known[] = {
#if defined(__x86_64__) || defined(__i386__)
    &km_isa_avx512,
    &km_isa_avx2,
#elif defined(__aarch64__)
    &km_isa_neon,
#endif
    &km_isa_scalar,
};

int km_variant_count(void)
{
    int count = 0;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        count += known[i]->supported() != 0;
    return count;
}

const km_isa *km_variant(int index)
{
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i]->supported() && index-- == 0)
            return known[i];
    return NULL;
}
