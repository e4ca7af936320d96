/*
 * Unit rows to 8 bits. The step of a row is one of 256 on a geometric grid (32 to the octave, so at most 2.2 % coarser
 * than the row needs): rows of the same grade are comparable byte by byte, which is what L1 over codes rests on, and
 * a grade is one byte where a float would be four.
 */
#include "kimera.h"
#include <math.h>
#include <string.h>

float km_steps[256];

void km_init_steps(void)
{
    for (int i = 0; i < 256; i++)
        km_steps[i] = (float)(exp2(-i / 32.0) / 127.0);
}

/* The finest grade that still holds `largest`. */
int km_grade(float largest)
{
    int low = 0, high = 255;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (127.0f * km_steps[middle] >= largest)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

static float largest_of(const float *row, int64_t dim)
{
    float lanes[16] = {0};
    int64_t j = 0;
    for (; j + 16 <= dim; j += 16)
        for (int l = 0; l < 16; l++) {
            float a = fabsf(row[j + l]);
            lanes[l] = a > lanes[l] ? a : lanes[l];
        }
    for (; j < dim; j++) {
        float a = fabsf(row[j]);
        lanes[0] = a > lanes[0] ? a : lanes[0];
    }
    float largest = 0;
    for (int l = 0; l < 16; l++)
        largest = lanes[l] > largest ? lanes[l] : largest;
    return largest;
}

/* Nearest integer, ties to even, clipped; adding 1.5 * 2^23 leaves it in the low mantissa bits. */
static inline int32_t code_of(float value)
{
    value = value > 127.0f ? 127.0f : value < -127.0f ? -127.0f : value;
    float shifted = value + 12582912.0f;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    return bits - 0x4b400000;
}

int km_finite(const float *numbers, int64_t count)
{
    uint32_t found = 0;
    for (int64_t j = 0; j < count; j++) {
        uint32_t bits;
        memcpy(&bits, &numbers[j], 4);
        found |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return !found;
}

/* Returns the Euclidean norm of what the codes lose, summed in lanes so that it is vectorised. Bytes beyond dim are the bias:
 * they stand for zero. */
float km_quantize_row(const float *row, int64_t dim, int64_t stride, uint8_t *codes, uint8_t *grade)
{
    int g = km_grade(largest_of(row, dim));
    float step = km_steps[g], inverse = 1.0f / step, lanes[16] = {0}, lost = 0;
    int64_t j = 0;
    for (; j + 16 <= dim; j += 16)
        for (int l = 0; l < 16; l++) {
            int32_t c = code_of(row[j + l] * inverse);
            float e = row[j + l] - (float)c * step;
            codes[j + l] = (uint8_t)(c + 128);
            lanes[l] += e * e;
        }
    for (; j < dim; j++) {
        int32_t c = code_of(row[j] * inverse);
        float e = row[j] - (float)c * step;
        codes[j] = (uint8_t)(c + 128);
        lanes[0] += e * e;
    }
    for (int l = 0; l < 16; l++)
        lost += lanes[l];
    memset(codes + dim, 128, (size_t)(stride - dim));
    *grade = (uint8_t)g;
    return sqrtf(lost);
}

float km_quantize_query(const float *row, int64_t dim, int64_t stride, int8_t *codes, float *step, int32_t *bias)
{
    float largest = largest_of(row, dim), lost = 0;
    *step = largest / 127.0f;
    float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    int32_t sum = 0;
    for (int64_t j = 0; j < dim; j++) {
        int32_t c = code_of(row[j] * inverse);
        float e = row[j] - (float)c * *step;
        codes[j] = (int8_t)c;
        sum += c;
        lost += e * e;
    }
    memset(codes + dim, 0, (size_t)(stride - dim));
    *bias = 128 * sum;
    return sqrtf(lost);
}

/* The query in every grade, clipped where a grade is too fine for it. */
void km_grade_query(const float *row, int64_t dim, int64_t stride, uint8_t *graded)
{
    for (int g = 0; g < 256; g++) {
        uint8_t *codes = graded + (int64_t)g * stride;
        float inverse = 1.0f / km_steps[g];
        for (int64_t j = 0; j < dim; j++)
            codes[j] = (uint8_t)(code_of(row[j] * inverse) + 128);
        memset(codes + dim, 128, (size_t)(stride - dim));
    }
}
