/*
 * Signatures of texts: whether there is text, the parity of its negations, a hash of the set of its numbers, and one of the
 * first thing that is named by a number, as kernels/texts.py defines them. Only what is plain is done here: ASCII, and numbers
 * that a double holds exactly before the decimal point is moved. The rest is left to Python, which knows all letters and digits
 * there are.
 */
#include "kimera.h"
#include <math.h>
#include <string.h>

#define MOST_NUMBERS 32
#define EXACT 1000000000000000ll /* below it an integer and its quotient by a power of ten are rounded once at most */
#define MODULUS ((1ull << 61) - 1)
#define NEGATION (-1)
#define SEED 2166136261u

typedef struct {
    const char *word;
    int value;
} word;

static const word of_b[] = {{"barely", NEGATION}, {0, 0}};
static const word of_c[] = {{"cannot", NEGATION}, {0, 0}};
static const word of_e[] = {{"eight", 8}, {"eleven", 11}, {"eighteen", 18}, {"eighty", 80}, {0, 0}};
static const word of_f[] = {{"four", 4}, {"five", 5}, {"fourteen", 14}, {"fifteen", 15}, {"forty", 40}, {"fifty", 50}, {0, 0}};
static const word of_h[] = {{"hardly", NEGATION}, {0, 0}};
static const word of_n[] = {{"no", NEGATION}, {"not", NEGATION}, {"never", NEGATION}, {"none", NEGATION},
                            {"nobody", NEGATION}, {"nothing", NEGATION}, {"nowhere", NEGATION}, {"neither", NEGATION},
                            {"nor", NEGATION}, {"nine", 9}, {"nineteen", 19}, {"ninety", 90}, {0, 0}};
static const word of_s[] = {{"six", 6}, {"seven", 7}, {"sixteen", 16}, {"seventeen", 17}, {"sixty", 60}, {"seventy", 70},
                            {"scarcely", NEGATION}, {0, 0}};
static const word of_t[] = {{"two", 2}, {"three", 3}, {"ten", 10}, {"twelve", 12}, {"thirteen", 13}, {"twenty", 20},
                            {"thirty", 30}, {0, 0}};
static const word of_w[] = {{"without", NEGATION}, {0, 0}};
static const word of_z[] = {{"zero", 0}, {0, 0}};
static const word of_none[] = {{0, 0}};

static const word *words_of(char first)
{
    switch (first) {
    case 'b': return of_b;
    case 'c': return of_c;
    case 'e': return of_e;
    case 'f': return of_f;
    case 'h': return of_h;
    case 'n': return of_n;
    case 's': return of_s;
    case 't': return of_t;
    case 'w': return of_w;
    case 'z': return of_z;
    default: return of_none;
    }
}

/* A finite number >= 0 as Python hashes a float: modulo 2^61 - 1. */
static uint64_t hash_of(double value)
{
    int exponent;
    double rest = frexp(value, &exponent);
    uint64_t hash = 0;
    while (rest != 0) {
        hash = (hash << 28 & MODULUS) | hash >> 33;
        rest *= 268435456.0;
        exponent -= 28;
        uint64_t digits = (uint64_t)rest;
        rest -= (double)digits;
        hash += digits;
        if (hash >= MODULUS)
            hash -= MODULUS;
    }
    exponent = exponent >= 0 ? exponent % 61 : 60 - (-1 - exponent) % 61;
    return (hash << exponent & MODULUS) | hash >> (61 - exponent);
}

static int is_digit(unsigned char c)
{
    return c >= '0' && c <= '9';
}

static int is_letter(unsigned char c)
{
    c |= 0x20;
    return c >= 'a' && c <= 'z';
}

/* Adds a number to the set; 0 where it is full. */
static int add(double *numbers, int *count, double value)
{
    for (int i = 0; i < *count; i++)
        if (numbers[i] == value)
            return 1;
    if (*count == MOST_NUMBERS)
        return 0;
    numbers[(*count)++] = value;
    return 1;
}

/* The number at text[*at]: digits and commas, then perhaps a point and digits. 0 where it has too many digits. */
static int number_at(const char *text, int64_t n, int64_t *at, double *value)
{
    static const double powers[] = {1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15};
    int64_t i = *at, digits = 0;
    int places = 0;
    for (; i < n && (is_digit(text[i]) || text[i] == ','); i++) {
        if (text[i] == ',')
            continue;
        digits = 10 * digits + (text[i] - '0');
        if (digits >= EXACT)
            return 0;
    }
    if (i + 1 < n && text[i] == '.' && is_digit(text[i + 1]))
        for (i++; i < n && is_digit(text[i]); i++) {
            digits = 10 * digits + (text[i] - '0');
            if (digits >= EXACT || ++places > 15)
                return 0;
        }
    *at = i;
    *value = (double)digits / powers[places];
    return 1;
}

static int is_space(unsigned char c)
{
    return c == ' ' || (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x1f); /* as str.split() splits */
}

static uint32_t mix(uint32_t hash, const char *text, int64_t from, int64_t to)
{
    for (; from < to; from++) {
        unsigned char c = (unsigned char)text[from];
        hash = (hash ^ (c >= 'A' && c <= 'Z' ? c | 0x20 : c)) * 16777619u;
    }
    return hash;
}

/* A hash in the bits of a signature that are for a name; never 0. */
static uint32_t folded(uint32_t hash)
{
    hash = (hash ^ hash >> 15) << 15 & KM_NAMED;
    return hash ? hash : 1u << 15;
}

/* Whether a word can stand before a number and make it a name: letters only, and none of those that make it an amount. */
static int introduces(const char *text, int64_t from, int64_t to)
{
    static const char *const light[] = {"a", "about", "above", "after", "an", "and", "are", "as", "at", "be", "before", "below",
                                        "between", "by", "for", "from", "had", "has", "have", "in", "is", "of", "on", "only",
                                        "or", "over", "since", "than", "the", "till", "to", "under", "until", "was", "were",
                                        "with", "within"};
    int64_t length = to - from;
    for (int64_t i = from; i < to; i++)
        if (!is_letter(text[i]))
            return 0;
    if (length == 0 || length > 7)
        return length > 7;
    char lower[8] = {0};
    for (int64_t i = 0; i < length; i++)
        lower[i] = text[from + i] | 0x20;
    for (size_t i = 0; i < sizeof light / sizeof *light; i++)
        if (strcmp(light[i], lower) == 0)
            return 0;
    return 1;
}

/* Hash of the first word of letters and digits that begins with a letter, else of the first number with the word before it. */
static uint32_t name_of(const char *text, int64_t n)
{
    uint32_t named = 0;
    int64_t before = 0, before_end = 0;
    for (int64_t at = 0; at < n;) {
        while (at < n && is_space(text[at]))
            at++;
        int64_t from = at, to;
        while (at < n && !is_space(text[at]))
            at++;
        for (to = at; from < to && !is_digit(text[from]) && !is_letter(text[from]); from++)
            ;
        for (; to > from && !is_digit(text[to - 1]) && !is_letter(text[to - 1]); to--)
            ;
        int64_t digits = 0;
        for (int64_t i = from; i < to; i++)
            digits += is_digit(text[i]);
        if (digits > 0 && is_letter(text[from]))
            return folded(mix(SEED, text, from, to));
        if (named == 0 && digits > 0 && digits == to - from && introduces(text, before, before_end))
            named = folded(mix(mix(mix(SEED, text, before, before_end), " ", 0, 1), text, from, to));
        before = from;
        before_end = to;
    }
    return named;
}

/* 0 where the text is not plain; otherwise 1 and the signature. */
int km_text_signature(const char *text, int64_t n, uint32_t *signature)
{
    double numbers[MOST_NUMBERS];
    int count = 0;
    uint32_t negated = 0;
    if (n == 0) {
        *signature = 0;
        return 1;
    }
    for (int64_t at = 0; at < n;) {
        if ((unsigned char)text[at] >= 0x80)
            return 0;
        if (is_digit(text[at])) {
            double value;
            if (!number_at(text, n, &at, &value) || !add(numbers, &count, value))
                return 0;
        } else if (is_letter(text[at])) {
            char lower[16];
            int64_t start = at;
            for (; at < n && is_letter(text[at]); at++)
                if (at - start < 16)
                    lower[at - start] = text[at] | 0x20;
            int64_t length = at - start;
            if (at < n && (unsigned char)text[at] >= 0x80)
                return 0; /* the word may go on */
            if (at + 1 < n && text[at] == '\'' && (text[at + 1] | 0x20) == 't') {
                unsigned char next = at + 2 < n ? (unsigned char)text[at + 2] : ' ';
                if (next >= 0x80)
                    return 0;
                if (!is_letter(next) && !is_digit(next) && next != '_') {
                    negated ^= (text[at - 1] | 0x20) == 'n' ? KM_NEGATED : 0;
                    at += 2;
                    continue;
                }
            }
            if (length > 9)
                continue;
            for (const word *w = words_of(lower[0]); w->word; w++)
                if (strlen(w->word) == (size_t)length && memcmp(w->word, lower, (size_t)length) == 0) {
                    if (w->value == NEGATION)
                        negated ^= KM_NEGATED;
                    else if (!add(numbers, &count, w->value))
                        return 0;
                    break;
                }
        } else
            at++;
    }
    uint32_t mixed = 0;
    for (int i = 0; i < count; i++)
        mixed += (uint32_t)(hash_of(numbers[i]) * 0x9E3779B97F4A7C15ull >> 17);
    mixed &= KM_NUMBERS;
    *signature = KM_TEXT | negated | (count ? (mixed ? mixed : 1) | name_of(text, n) : 0);
    return 1;
}
