/*
 * What the C files share. The arithmetic is written once per instruction set (isa_*.c, each including body.h) and
 * reached through a table of function pointers; everything that is not arithmetic (top-k, symbolic records, threads,
 * the walk over segments) is compiled once for the baseline.
 *
 *     segments ──blocks of 64 rows──> isa->dots ──> isa->admit ──few rows──> symbolic.c ──> topk.c
 *        │                                                                                   │
 *        └── pool.c hands out runs of blocks to threads; each thread has its own heaps ──────┘ merged by scan.c
 */
#ifndef KIMERA_H
#define KIMERA_H

#include <stdint.h>
#include <stddef.h>

#define KM_BLOCK 64      /* rows per block: one word of the bitmap of live rows */
#define KM_ALIGN 64      /* bytes per row of codes are a multiple of this */
#define KM_LANES 16      /* queries packed side by side */
#define KM_MULTI 32      /* queries of one pass over a block: two groups of lanes */
#define KM_KEY_BITS 48   /* of a key word: Bloom bits of the symbolic keys; above them 16 bits of the subject's hash */
#define KM_SUBJECT (UINT64_MAX << KM_KEY_BITS) /* of a key word; 0: no subject */
#define KM_SYMBOLIC 4.0f /* lifts an exact opposition above any sum of the other terms */

typedef struct {
    const uint8_t *codes;   /* biased 8-bit rows, `stride` apart; NULL: see exact */
    const uint8_t *grades;  /* quantisation step of each row, an index into km_steps */
    const float *exact;     /* float32 rows, `dim` apart; scanned where codes is NULL, used to rescore everywhere */
    const uint32_t *text;   /* text signatures, or NULL */
    const uint64_t *keys;   /* key words of the symbolic states, or NULL */
    const uint64_t *layers; /* Bloom words of the semantic keys, or NULL */
    const uint32_t *record; /* word of each row's record in pool; 0: none */
    const uint64_t *pool;   /* records */
    int64_t base;           /* slot of the first row, a multiple of KM_BLOCK */
    int64_t rows;
    int apart;              /* only oppositions count: vectors are read of rows that share a key with the query */
} km_segment;

typedef struct {
    const float *vector;       /* dim; NULL: the query has no vector and is related to nothing */
    const int8_t *codes;       /* stride, zero padded */
    const uint8_t *graded;     /* 256 x stride biased codes, one version per grade, for L1 over codes; or NULL */
    const uint64_t *record;    /* or NULL */
    float step;                /* of codes */
    int32_t bias;              /* 128 * sum(codes): undoes the rows' bias */
    uint32_t text;
    uint64_t keys;             /* key word, Bloom bits only */
    uint64_t subject;          /* key word, subject's bits only; 0: no subject */
    uint64_t layers;
    int64_t exclude;           /* slot never returned; -1: none */
} km_query;

typedef struct {
    float min_related; /* cosine from which two statements are about the same thing */
    float threshold;   /* fused score below which nothing is returned */
    float flag;        /* weight of the level of two text signatures, see km_level */
    float layer;       /* weight of the layer conflict */
    float l1;          /* weight of the L1 difference divided by 2 sqrt(dim) */
    float margin;      /* how far a cosine over codes may be off: rows are admitted down to min_related - margin */
} km_weights;

typedef struct {
    float fused;
    float cosine;
    int32_t opposed;
    int64_t slot;
    int32_t conditional; /* holds only while the cosine reaches min_related */
} km_hit;

/* Masks of one block: bit i is row i. */
typedef struct {
    uint64_t related; /* cosine reaches min_related */
    uint64_t passing; /* ... and the fused score may reach the floor */
} km_masks;

typedef struct {
    const char *name;
    int (*supported)(void);
    /* out[i] = dot(query, row i) */
    void (*dots_f32)(const float *query, const float *rows, int64_t n, int64_t dim, float *out);
    /* ... and l1[i] = sum |query - row i| */
    void (*dots_l1_f32)(const float *query, const float *rows, int64_t n, int64_t dim, float *out, float *l1);
    /* out[i] = sum query * (row i) over biased rows, the bias not undone */
    void (*dots_u8)(const int8_t *query, const uint8_t *rows, int64_t n, int64_t stride, int32_t *out);
    /* ... and sad[i] = sum |graded[grades[i]] - row i| */
    void (*dots_l1_u8)(const int8_t *query, const uint8_t *graded, const uint8_t *grades, const uint8_t *rows,
                       int64_t n, int64_t stride, int32_t *out, int32_t *sad);
    /* out[i * KM_MULTI + j] = dot(query j, row i); packed: [groups][stride / 4][KM_LANES][4] */
    void (*multi_u8)(const int8_t *packed, int groups, const uint8_t *rows, int64_t n, int64_t stride, int32_t *out);
    /* the same over float32; packed: [groups][dim][KM_LANES] */
    void (*multi_f32)(const float *packed, int groups, const float *rows, int64_t n, int64_t dim, float *out);
    /* cosine and fused score (without symbols, layers) of a block; l1 may be NULL */
    km_masks (*admit)(const float *cosine, const uint32_t *text, const float *l1, int64_t n, uint32_t query_text,
                      const km_weights *weights, float floor, float *fused);
    /* masks over the queries of a pass for one row: bit j is query j */
    void (*admit_multi)(const float *cosine, int lanes, uint32_t row_text, const uint32_t *query_text,
                        const float *min_related, const float *floors, float flag, uint32_t *related,
                        uint32_t *passing);
    /* cosine[j] = (acc[j] - bias[j]) * (step * steps[j]) */
    void (*unbias)(const int32_t *acc, const int32_t *bias, const float *steps, float step, int lanes, float *cosine);
    /* bit i: words[i] & mask */
    uint64_t (*overlap)(const uint64_t *words, int64_t n, uint64_t mask);
    /* bit i: (words[i] & KM_SUBJECT) == subject */
    uint64_t (*same)(const uint64_t *words, int64_t n, uint64_t subject);
    /* out[i] = dot(query, row i) over rows packed as the queries of multi_u8 are: [groups][dims / 4][KM_LANES][4] */
    void (*lanes_i8)(const int8_t *query, const int8_t *packed, int64_t groups, int64_t dims, int32_t *out);
    /* bit i: dots[i] * step + slack * rest[i] >= bar; n <= KM_BLOCK */
    uint64_t (*sift)(const int32_t *dots, const uint8_t *rest, int64_t n, float step, float slack, float bar);
    /* reads a buffer once and computes next to nothing: the yardstick of the benchmarks */
    uint64_t (*read)(const uint8_t *data, size_t bytes);
} km_isa;

extern const km_isa km_isa_scalar;
extern const km_isa km_isa_avx2;
extern const km_isa km_isa_avx512;
extern const km_isa km_isa_neon;

/* dispatch.c */
int km_variant_count(void);
const km_isa *km_variant(int index); /* best first; only those this machine can run */

/* quantize.c */
extern float km_steps[256];
void km_init_steps(void);
int km_grade(float largest);
int km_finite(const float *numbers, int64_t count); /* 0: a NaN or an infinity among them */
float km_quantize_row(const float *row, int64_t dim, int64_t stride, uint8_t *codes, uint8_t *grade);
float km_quantize_query(const float *row, int64_t dim, int64_t stride, int8_t *codes, float *step, int32_t *bias);
void km_grade_query(const float *row, int64_t dim, int64_t stride, uint8_t *graded);

/* signature.c */
int km_text_signature(const char *text, int64_t n, uint32_t *signature); /* 0: not plain, to be done in Python */

/* The parts of a text signature, see kernels/texts.py. A text that names something numbered has numbers. */
#define KM_TEXT 0x80000000u    /* there is text */
#define KM_NEGATED 0x40000000u /* an odd number of negations */
#define KM_NAMED 0x3fff8000u   /* hash of the first thing named by a number; 0: none */
#define KM_NUMBERS 0x00007fffu /* order-free hash of the set of numbers; 0: none */
#define KM_SAME 5.0f           /* part of the level of two texts that name the same numbered thing */

/* How much two texts are lifted: 1 where the negation parity or the numbers differ (numbers only where both have some), and
 * KM_SAME where both name the same numbered thing. */
static inline float km_level(uint32_t a, uint32_t b)
{
    uint32_t unlike = a ^ b, both = (a & b) >> 31;
    uint32_t present = (uint32_t)((a & KM_NUMBERS) != 0) & (uint32_t)((b & KM_NUMBERS) != 0);
    uint32_t differs = both & ((unlike >> 30 & 1u) | (present & (uint32_t)((unlike & KM_NUMBERS) != 0)));
    uint32_t same = both & (uint32_t)((a & KM_NAMED) != 0) & (uint32_t)((unlike & KM_NAMED) == 0);
    return (float)(int32_t)differs + KM_SAME * (float)(int32_t)same;
}

/* overlap.c */
typedef struct {
    const void *data;
    int64_t length; /* characters */
    int kind;       /* bytes of each: 1, 2 or 4 */
} km_text;
/* ignored: hashes of words without weight, in an open table of slots (a power of two), one of them 0 at least; out: n - 1.
   Returns -1 when out of memory. */
int km_text_overlaps(const km_text *texts, int64_t n, const uint32_t *ignored, int64_t slots, float *out);

/* symbolic.c */
int km_opposed(const uint64_t *query, const uint64_t *row, int *same_subject);
float km_layer_conflict(const uint64_t *query, const uint64_t *row);

/* topk.c: a min-heap of at most k hits, ordered by score then by lower slot */
typedef struct {
    km_hit *hits;
    int64_t size;
    int64_t k;
} km_heap;
void km_heap_push(km_heap *heap, km_hit hit);
void km_heap_sort(km_heap *heap); /* best first */

/* pool.c */
typedef struct km_pool km_pool;
typedef void (*km_work)(void *context, int worker);
km_pool *km_pool_new(int threads); /* NULL: out of memory */
void km_pool_free(km_pool *pool);
int km_pool_threads(const km_pool *pool);
/* Runs work on the calling thread (worker 0) and, unless the pool is busy, on its helpers; returns when all ended. */
void km_pool_run(km_pool *pool, km_work work, void *context, int workers);

/* scan.c */
typedef struct {
    const km_isa *isa;
    km_pool *pool;
    const km_segment *segments;
    int64_t segment_count;
    const uint64_t *live; /* bit per slot */
    int64_t dim;
    int64_t stride;
    const km_query *queries;
    int64_t query_count;
    km_weights weights;
    int64_t k;
} km_scan;
/* hits: query_count x k, best first; counts: query_count. Returns 0, or -1 out of memory. */
int km_scan_run(const km_scan *scan, km_hit *hits, int64_t *counts);
/* Replaces the cosines (and with them the fused scores) of hits by those of the float32 rows, drops what falls out of
 * the thresholds, and sorts again. */
void km_rescore(const km_scan *scan, km_hit *hits, int64_t *counts);

/* sieve.c: short codes of all rows in cells, from which a query picks the rows worth reading in full */
#define KM_UNUSED UINT32_MAX /* slot of a padding row */
typedef struct {
    int64_t dims;           /* of the short codes, a multiple of 4 */
    int64_t cells;          /* a multiple of KM_LANES; the last ones may be empty */
    const int8_t *centres;  /* packed */
    const float *spread;    /* of each cell: root mean square of what its centre leaves out of a row */
    const uint8_t *kinds;   /* of each cell: kind of its rows' texts, see kinds_of in kernels/sieving.py */
    const int64_t *starts;  /* cells + 1: first group of KM_LANES rows */
    const int8_t *codes;    /* packed */
    const uint8_t *rest;    /* of each row: norm of what the codes leave out, in 255ths */
    const uint32_t *slots;  /* of each row */
} km_sieve;
typedef struct {
    const int8_t *codes; /* dims */
    float step;          /* of codes */
    float rest;          /* norm of what the codes leave out */
} km_short;
/* Hits as km_scan_run gives them, without symbols, layers and L1, of rows that the bounds let through.
 * row_slack, cell_slack: how much of what the short codes leave out is allowed for, as a cosine; 1 is all of it. That is
 * where a cosine of KM_SLACK_OF or less is asked for; for a higher one in proportion. */
#define KM_SLACK_OF 0.35f
int km_sieve_run(const km_scan *scan, const km_sieve *sieve, const km_short *shorts, float row_slack, float cell_slack,
                 km_hit *hits, int64_t *counts, int64_t *read);
const km_segment *km_segment_of(const km_scan *scan, int64_t slot);
float km_flag_of(const km_scan *scan, const km_segment *segment, int64_t row, uint32_t text);

/* head.c */
int km_pair_head(const km_isa *isa, const float *query, const float *rows, int64_t n, int64_t dim, const float *extra,
                 int64_t extras, const float *w1, const float *b1, const float *w2, float b2, int64_t hidden,
                 float *out);
/* Indices and cosines of the rows whose dot reaches their own threshold; returns how many. */
int64_t km_match(const km_isa *isa, const float *query, const float *rows, int64_t n, int64_t dim,
                 const float *thresholds, int64_t *indices, float *cosines);

#endif
