/* The pair head and the standing queries. */
#include "kimera.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/*
 * Two layers over the pairs (query, row i): features |q - r|, q * r and the extras; relu(w1 f + b1); w2 h + b2.
 * w1 is hidden x (2 dim + extras). Returns -1 out of memory.
 */
int km_pair_head(const km_isa *isa, const float *query, const float *rows, int64_t n, int64_t dim, const float *extra,
                 int64_t extras, const float *w1, const float *b1, const float *w2, float b2, int64_t hidden,
                 float *out)
{
    const int64_t features = 2 * dim + extras;
    float *buffer = malloc((size_t)(features + hidden) * sizeof *buffer);
    if (buffer == NULL)
        return -1;
    float *feature = buffer, *unit = buffer + features;
    for (int64_t i = 0; i < n; i++) {
        const float *row = rows + i * dim;
        for (int64_t j = 0; j < dim; j++) {
            feature[j] = fabsf(query[j] - row[j]);
            feature[dim + j] = query[j] * row[j];
        }
        if (extras > 0)
            memcpy(feature + 2 * dim, extra + i * extras, (size_t)extras * sizeof *extra);
        isa->dots_f32(feature, w1, hidden, features, unit);
        float sum = b2;
        for (int64_t j = 0; j < hidden; j++) {
            float u = unit[j] + b1[j];
            sum += w2[j] * (u > 0 ? u : 0);
        }
        out[i] = sum;
    }
    free(buffer);
    return 0;
}

int64_t km_match(const km_isa *isa, const float *query, const float *rows, int64_t n, int64_t dim,
                 const float *thresholds, int64_t *indices, float *cosines)
{
    float dots[KM_BLOCK];
    int64_t found = 0;
    for (int64_t i = 0; i < n; i += KM_BLOCK) {
        int64_t count = n - i < KM_BLOCK ? n - i : KM_BLOCK;
        isa->dots_f32(query, rows + i * dim, count, dim, dots);
        for (int64_t j = 0; j < count; j++)
            if (dots[j] >= thresholds[i + j]) {
                indices[found] = i + j;
                cosines[found++] = dots[j];
            }
    }
    return found;
}
