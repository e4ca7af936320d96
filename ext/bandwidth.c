/* The yardstick: how fast one thread can read, with nothing to compute. */
#include "kimera.h"
#include <string.h>

typedef uint64_t lanes __attribute__((vector_size(64), aligned(1), may_alias));

uint64_t km_read_all(const uint8_t *data, size_t bytes)
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
