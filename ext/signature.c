/*
 * Signatures of texts: whether there is text, the parity of its negations, and a hash of the set of its numbers, as
 * kernels/texts.py defines them. Only what is plain is done here: ASCII, and numbers that a double holds exactly before the
 * decimal point is moved. The rest is left to Python, which knows all letters and digits there are.
 */
#include "kimera.h"
#include <math.h>
#include <string.h>

#define TEXT 0x80000000u
#define NEGATED 0x40000000u
#define NUMBERS 0x3fffffffu
#define MOST_NUMBERS 32
#define EXACT 1000000000000000ll /* below it an integer and its quotient by a power of ten are rounded once at most */
#define MODULUS ((1ull << 61) - 1)
#define NEGATION (-1)

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
                    negated ^= (text[at - 1] | 0x20) == 'n' ? NEGATED : 0;
                    at += 2;
                    continue;
                }
            }
            if (length > 9)
                continue;
            for (const word *w = words_of(lower[0]); w->word; w++)
                if (strlen(w->word) == (size_t)length && memcmp(w->word, lower, (size_t)length) == 0) {
                    if (w->value == NEGATION)
                        negated ^= NEGATED;
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
    mixed &= NUMBERS;
    *signature = TEXT | negated | (count ? (mixed ? mixed : 1) : 0);
    return 1;
}
