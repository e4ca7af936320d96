/*
 * Records of symbolic and semantic states, as words:
 *
 *     head      bits 0-15 number of symbols, 16-31 number of layer keys, 32 subject, 33 moment, 34 window given
 *     [subject] [moment] [from, to]                    only where the head says so
 *     keys...   of the symbols, ascending              hash of the key
 *     values... in the order of the keys               code of the value: equal if and only if the values are
 *     layers... ascending                              hashes of the semantic keys
 */
#include "kimera.h"

#define SUBJECT (UINT64_C(1) << 32)
#define MOMENT (UINT64_C(1) << 33)
#define WINDOW (UINT64_C(1) << 34)

typedef struct {
    int64_t symbols, layer_count;
    uint64_t subject, moment;
    int64_t from, to;
    const uint64_t *keys, *values, *layers;
} record;

static inline record parse(const uint64_t *words)
{
    record r;
    uint64_t head = *words++;
    r.symbols = (int64_t)(head & 0xffff);
    r.layer_count = (int64_t)((head >> 16) & 0xffff);
    r.subject = head & SUBJECT ? *words++ : 0;
    r.moment = head & MOMENT ? *words++ : 0;
    r.from = INT64_MIN;
    r.to = INT64_MAX;
    if (head & WINDOW) {
        r.from = (int64_t)*words++;
        r.to = (int64_t)*words++;
    }
    r.keys = words;
    r.values = words + r.symbols;
    r.layers = r.values + r.symbols;
    return r;
}

/*
 * Keys that both hold with different values; 0 where different subjects, different moments or windows that do not
 * meet rule a conflict out. Two keys of one state may share a hash: such runs are compared each with each, so that a
 * collision can add an opposition (the caller looks again) but never hide one.
 */
int km_opposed(const uint64_t *query, const uint64_t *row, int *same_subject)
{
    record a = parse(query), b = parse(row);
    *same_subject = a.subject != 0 && a.subject == b.subject;
    if (a.subject != 0 && b.subject != 0 && a.subject != b.subject)
        return 0;
    if (a.moment != 0 && b.moment != 0 && a.moment != b.moment)
        return 0;
    if (a.from > b.to || b.from > a.to)
        return 0;
    int opposed = 0;
    int64_t j = 0;
    for (int64_t i = 0; i < a.symbols; i++) {
        uint64_t key = a.keys[i];
        while (j < b.symbols && b.keys[j] < key)
            j++;
        int differs = 0;
        for (int64_t l = j; l < b.symbols && b.keys[l] == key; l++)
            differs |= b.values[l] != a.values[i];
        opposed += differs;
    }
    return opposed;
}

/* Jaccard distance of the semantic keys; 0 where either has none, since there is nothing to compare. */
float km_layer_conflict(const uint64_t *query, const uint64_t *row)
{
    record a = parse(query), b = parse(row);
    if (a.layer_count == 0 || b.layer_count == 0)
        return 0.0f;
    int64_t i = 0, j = 0, common = 0;
    while (i < a.layer_count && j < b.layer_count) {
        uint64_t x = a.layers[i], y = b.layers[j];
        common += x == y;
        i += x <= y;
        j += y <= x;
    }
    return 1.0f - (float)common / (float)(a.layer_count + b.layer_count - common);
}
