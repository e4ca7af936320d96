/*
 * How much of the words of one text others share, as kernels/texts.py defines it: words are hashed where they stand, and a set
 * of hashes per text is all that is kept of them.
 */
#include "kimera.h"
#include <stdlib.h>

#define CHARS 2000 /* of a text that are read: a word takes one at least, and is mostly followed by another character */
#define SLOTS 4096 /* of a set, 2^(32 - 20): twice as many as there may be words, so that a walk through it ends */
#define NUMBERED 2 /* weight of a word with a digit in it */

typedef struct {
    uint32_t hashes[SLOTS];
    uint32_t stamps[SLOTS]; /* a slot is taken where it holds the set's stamp: so a set is emptied by counting on */
    uint32_t stamp;
} set;

static uint32_t char_at(const km_text *text, int64_t at)
{
    switch (text->kind) {
    case 1: return ((const uint8_t *)text->data)[at];
    case 2: return ((const uint16_t *)text->data)[at];
    default: return ((const uint32_t *)text->data)[at];
    }
}

static int is_digit(uint32_t c)
{
    return c >= '0' && c <= '9';
}

static uint32_t lower(uint32_t c)
{
    int upper = (c >= 'A' && c <= 'Z') || (c >= 0xC0 && c <= 0xDE) || (c >= 0x391 && c <= 0x3A9) || (c >= 0x410 && c <= 0x42F);
    return upper ? c + 0x20 : c;
}

/* A character that is a word by itself, as in scripts that put no spaces between words. */
static int is_alone(uint32_t c)
{
    return c >= 0x2E80;
}

static int is_part(uint32_t c)
{
    return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= 0xC0 && c < 0x2000);
}

/* The slot of a hash, or the free one where it would be. */
static uint32_t place(const set *of, uint32_t hash)
{
    uint32_t slot = hash * 0x9E3779B1u >> 20;
    while (of->stamps[slot] == of->stamp && of->hashes[slot] != hash)
        slot = (slot + 1) % SLOTS;
    return slot;
}

static int holds(const uint32_t *table, uint32_t mask, uint32_t hash)
{
    uint32_t slot = hash & mask;
    for (; table[slot] != 0; slot = (slot + 1) & mask)
        if (table[slot] == hash)
            return 1;
    return 0;
}

/* Weight of all words of a text, each counted once; *shared: of those among the words of another. */
static int64_t weigh(const km_text *text, const uint32_t *ignored, uint32_t mask, set *own, const set *other, int64_t *shared)
{
    int64_t n = text->length < CHARS ? text->length : CHARS, total = 0;
    own->stamp++;
    *shared = 0;
    for (int64_t at = 0; at < n;) {
        uint32_t c = char_at(text, at), hash = 2166136261u, before = hash, last = 0;
        int64_t start = at, weight = 1;
        if (is_alone(c)) {
            hash = (hash ^ c) * 16777619u;
            at++;
        } else {
            for (; at < n && is_part(c = char_at(text, at)); at++) {
                last = lower(c);
                weight = is_digit(c) ? NUMBERED : weight;
                before = hash;
                hash = (hash ^ last) * 16777619u;
            }
            if (at == start) {
                at++;
                continue;
            }
            if (last == 's' && at - start > 3)
                hash = before;
        }
        hash = hash ? hash : 1;
        if (holds(ignored, mask, hash))
            continue;
        uint32_t slot = place(own, hash);
        if (own->stamps[slot] == own->stamp)
            continue;
        own->stamps[slot] = own->stamp;
        own->hashes[slot] = hash;
        total += weight;
        if (other != NULL && other->stamps[place(other, hash)] == other->stamp)
            *shared += weight;
    }
    return total;
}

/* out[i]: weight of the words that text i shares with the first / the smaller of both weights; 0: one has no words. */
int km_text_overlaps(const km_text *texts, int64_t n, const uint32_t *ignored, int64_t slots, float *out)
{
    set *sets = calloc(2, sizeof *sets);
    int64_t shared, whole;
    if (sets == NULL)
        return -1;
    whole = weigh(&texts[0], ignored, (uint32_t)(slots - 1), &sets[0], NULL, &shared);
    for (int64_t i = 1; i < n; i++) {
        int64_t mine = weigh(&texts[i], ignored, (uint32_t)(slots - 1), &sets[1], &sets[0], &shared);
        int64_t least = mine < whole ? mine : whole;
        out[i - 1] = least > 0 ? (float)shared / (float)least : 0.0f;
    }
    free(sets);
    return 0;
}
