/*
 * A post-norm transformer of the BERT family, on the CPU, for statements: many short sequences of different lengths.
 *
 *     sequences ──runs of whole sequences, about a hundred tokens──> one thread carries a run through all layers
 *
 * The tokens of a run lie behind each other without padding; only attention looks at sequences. Projections multiply
 * 16-bit integers (`pmaddwd`: two products a lane and instruction, twice what float32 does): rows are quantised to about
 * 12 bits as they come, weights to 11 bits once, both with a step of their own per row, so that a projection is off by
 * about 0.2 % of what it adds up, eight times less than with 8 bits. Sums fit 32 bits by construction: see xf_pack.
 *
 * The arithmetic is written once (transformer_body.h) and compiled per instruction set.
 */
#ifndef KIMERA_TRANSFORMER_H
#define KIMERA_TRANSFORMER_H

#include <stddef.h>
#include <stdint.h>

#define XF_PANEL 32      /* columns of a panel of weights: a multiple of every variant's tile */
#define XF_ROWS 6        /* rows of a tile; buffers of rows are padded to it */
#define XF_WEIGHT 2047   /* largest quantised weight */
#define XF_ROW_MOST 8191 /* largest quantised element of a row, where sums allow it */
#define XF_RUN 96        /* tokens of a run: its activations stay in the second-level cache */
#define XF_TABLES 4      /* tables of embeddings that are added up */

typedef struct {
    int64_t in, out;   /* in even, out a multiple of XF_PANEL */
    int16_t *weights;  /* [out / XF_PANEL][in / 2][XF_PANEL][2] */
    float *steps;      /* out */
    float *bias;       /* out */
    float limit;       /* largest quantised element of a row: no sum can leave 32 bits */
} xf_linear;

typedef struct {
    xf_linear attend, output, widen, narrow; /* attend: query, key and value behind each other */
    float *attention_norm, *output_norm;     /* weight, then bias: 2 * width each */
} xf_layer;

typedef struct {
    int64_t width, heads, inner, layers;
    float epsilon;
    float *norm;                     /* of the embeddings: weight, then bias */
    const float *tables[XF_TABLES];  /* rows of `width`; not owned */
    xf_layer *layer;
} xf_model;

typedef struct {
    int64_t tokens;
    float *state, *projected, *context, *inner;
    int16_t *rows;
    float *steps;
    float *scores, *keys; /* of attention */
} xf_scratch;

typedef struct {
    const char *name;
    int (*supported)(void);
    /* One run: ids is [XF_TABLES][total], from token `first`; starts has count + 1 entries, absolute. Leaves the state
     * of the tokens in scratch->state. */
    void (*run)(const xf_model *model, xf_scratch *scratch, const int32_t *ids, int64_t total, const int64_t *starts,
                int64_t count);
    /* out = rows x weights + bias, for tests: rows float32 (n, in) */
    void (*project)(const xf_linear *linear, const float *rows, int64_t n, int gelu, float *out, xf_scratch *scratch);
} xf_isa;

extern const xf_isa xf_isa_avx2;
extern const xf_isa xf_isa_avx512;

int xf_variant_count(void);
const xf_isa *xf_variant(int index); /* best first; only those this machine can run; none on other processors */

xf_model *xf_model_new(int64_t width, int64_t heads, int64_t inner, int64_t layers, float epsilon);
void xf_model_free(xf_model *model);
/* Quantises weights (out, in) of one projection. Returns 0, or -1 out of memory. */
int xf_pack(xf_linear *linear, const float *weights, const float *bias, int64_t out, int64_t in);

xf_scratch *xf_scratch_new(const xf_model *model, int64_t tokens, int64_t longest);
void xf_scratch_free(xf_scratch *scratch);

/* Mean over the tokens of each sequence, and (where `first` is not NULL) the state of its first token: (count, width). */
int xf_forward(const xf_model *model, const xf_isa *isa, void *pool, int threads, const int32_t *ids, int64_t total,
               const int64_t *starts, int64_t count, float *mean, float *first);

#endif
