/* What is not arithmetic: models, their packing, scratch memory, and runs handed out to threads. */
#include "transformer.h"
#include "kimera.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const xf_isa *const variants[] = {
#if defined(__x86_64__)
    &xf_isa_avx512,
    &xf_isa_avx2,
#endif
    NULL,
};

const xf_isa *xf_variant(int index)
{
    for (int i = 0; variants[i] != NULL; i++)
        if (variants[i]->supported() && index-- == 0)
            return variants[i];
    return NULL;
}

int xf_variant_count(void)
{
    int count = 0;
    while (xf_variant(count) != NULL)
        count++;
    return count;
}

static void *aligned(size_t bytes)
{
    return aligned_alloc(64, (bytes + 64) / 64 * 64); /* C11: a multiple of the alignment */
}

int xf_pack(xf_linear *linear, const float *weights, const float *bias, int64_t out, int64_t in)
{
    linear->in = in;
    linear->out = out;
    linear->weights = aligned((size_t)(out * in) * sizeof *linear->weights);
    linear->steps = aligned((size_t)out * sizeof *linear->steps);
    linear->bias = aligned((size_t)out * sizeof *linear->bias);
    if (linear->weights == NULL || linear->steps == NULL || linear->bias == NULL)
        return -1;
    memcpy(linear->bias, bias, (size_t)out * sizeof *bias);
    int64_t heaviest = 1; /* sum of the sizes of a column's weights */
    for (int64_t o = 0; o < out; o++) {
        const float *row = weights + o * in;
        float most = 0;
        for (int64_t i = 0; i < in; i++)
            most = fabsf(row[i]) > most ? fabsf(row[i]) : most;
        linear->steps[o] = most / XF_WEIGHT;
        const float inverse = most > 0 ? XF_WEIGHT / most : 0;
        int16_t *panel = linear->weights + (o - o % XF_PANEL) * in + 2 * (o % XF_PANEL);
        int64_t weight = 0;
        for (int64_t i = 0; i < in; i++) {
            const long quantised = lrintf(row[i] * inverse);
            weight += labs(quantised);
            panel[i / 2 * 2 * XF_PANEL + i % 2] = (int16_t)quantised;
        }
        heaviest = weight > heaviest ? weight : heaviest;
    }
    const int64_t limit = (INT32_MAX - 1) / heaviest - 1; /* a quantised element may round up by one */
    linear->limit = (float)(limit > XF_ROW_MOST ? XF_ROW_MOST : limit);
    return 0;
}

static void release(xf_linear *linear)
{
    free(linear->weights);
    free(linear->steps);
    free(linear->bias);
}

xf_model *xf_model_new(int64_t width, int64_t heads, int64_t inner, int64_t layers, float epsilon)
{
    xf_model *model = calloc(1, sizeof *model);
    if (model == NULL)
        return NULL;
    *model = (xf_model){.width = width, .heads = heads, .inner = inner, .layers = layers, .epsilon = epsilon};
    model->norm = aligned((size_t)(2 * width) * sizeof(float));
    model->layer = calloc((size_t)layers, sizeof *model->layer);
    int failed = model->norm == NULL || model->layer == NULL;
    for (int64_t l = 0; l < layers && !failed; l++) {
        model->layer[l].attention_norm = aligned((size_t)(2 * width) * sizeof(float));
        model->layer[l].output_norm = aligned((size_t)(2 * width) * sizeof(float));
        failed = model->layer[l].attention_norm == NULL || model->layer[l].output_norm == NULL;
    }
    if (!failed)
        return model;
    xf_model_free(model);
    return NULL;
}

void xf_model_free(xf_model *model)
{
    if (model == NULL)
        return;
    for (int64_t l = 0; model->layer != NULL && l < model->layers; l++) {
        xf_layer *layer = &model->layer[l];
        release(&layer->attend);
        release(&layer->output);
        release(&layer->widen);
        release(&layer->narrow);
        free(layer->attention_norm);
        free(layer->output_norm);
    }
    free(model->layer);
    free(model->norm);
    free(model);
}

xf_scratch *xf_scratch_new(const xf_model *model, int64_t tokens, int64_t longest)
{
    xf_scratch *scratch = calloc(1, sizeof *scratch);
    if (scratch == NULL)
        return NULL;
    const size_t rows = (size_t)((tokens + XF_ROWS - 1) / XF_ROWS * XF_ROWS), width = (size_t)model->width;
    const size_t padded = (size_t)(longest + 15) / 16 * 16;
    const size_t widest = (size_t)(model->inner > model->width ? model->inner : model->width);
    scratch->tokens = tokens;
    scratch->state = aligned(rows * width * sizeof(float));
    scratch->projected = aligned(rows * 3 * width * sizeof(float));
    scratch->context = aligned(rows * width * sizeof(float));
    scratch->inner = aligned(rows * widest * sizeof(float));
    scratch->rows = aligned(rows * widest * sizeof(int16_t));
    scratch->steps = aligned(rows * sizeof(float));
    scratch->scores = aligned(padded * sizeof(float));
    scratch->keys = aligned(padded * width / (size_t)model->heads * sizeof(float));
    if (scratch->state != NULL && scratch->projected != NULL && scratch->context != NULL && scratch->inner != NULL &&
        scratch->rows != NULL && scratch->steps != NULL && scratch->scores != NULL && scratch->keys != NULL)
        return scratch;
    xf_scratch_free(scratch);
    return NULL;
}

void xf_scratch_free(xf_scratch *scratch)
{
    if (scratch == NULL)
        return;
    free(scratch->state);
    free(scratch->projected);
    free(scratch->context);
    free(scratch->inner);
    free(scratch->rows);
    free(scratch->steps);
    free(scratch->scores);
    free(scratch->keys);
    free(scratch);
}

typedef struct {
    const xf_model *model;
    const xf_isa *isa;
    const int32_t *ids;
    int64_t total;
    const int64_t *starts;
    const int64_t *runs; /* first sequence of each run; run_count + 1 entries */
    int64_t run_count, next;
    int64_t tokens, longest;
    float *mean, *first;
    int failed;
} forward;

static void work(void *context, int worker)
{
    (void)worker;
    forward *all = context;
    const int64_t width = all->model->width;
    xf_scratch *scratch = NULL;
    for (;;) {
        const int64_t run = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED);
        if (run >= all->run_count)
            break;
        if (scratch == NULL && (scratch = xf_scratch_new(all->model, all->tokens, all->longest)) == NULL) {
            __atomic_store_n(&all->failed, 1, __ATOMIC_RELAXED);
            break;
        }
        const int64_t *starts = all->starts + all->runs[run];
        const int64_t count = all->runs[run + 1] - all->runs[run];
        all->isa->run(all->model, scratch, all->ids, all->total, starts, count);
        for (int64_t s = 0; s < count; s++) {
            const float *rows = scratch->state + (starts[s] - starts[0]) * width;
            const int64_t length = starts[s + 1] - starts[s], number = all->runs[run] + s;
            float *mean = all->mean + number * width;
            memset(mean, 0, (size_t)width * sizeof *mean);
            for (int64_t i = 0; i < length; i++)
                for (int64_t j = 0; j < width; j++)
                    mean[j] += rows[i * width + j];
            for (int64_t j = 0; j < width; j++)
                mean[j] /= (float)length;
            if (all->first != NULL)
                memcpy(all->first + number * width, rows, (size_t)width * sizeof *rows);
        }
    }
    xf_scratch_free(scratch);
}

int xf_forward(const xf_model *model, const xf_isa *isa, void *pool, int threads, const int32_t *ids, int64_t total,
               const int64_t *starts, int64_t count, float *mean, float *first)
{
    if (count == 0)
        return 0;
    int64_t *runs = malloc((size_t)(count + 1) * sizeof *runs);
    if (runs == NULL)
        return -1;
    /* Few tokens for many threads: shorter runs, so that each thread has some. */
    int64_t most = total / (threads > 0 ? threads : 1) + 1;
    most = most < XF_RUN ? most : XF_RUN;
    forward all = {.model = model, .isa = isa, .ids = ids, .total = total, .starts = starts, .runs = runs,
                   .mean = mean, .first = first};
    for (int64_t s = 0; s < count;) {
        const int64_t begin = s;
        runs[all.run_count++] = s;
        do {
            const int64_t length = starts[s + 1] - starts[s];
            all.longest = length > all.longest ? length : all.longest;
            s++;
        } while (s < count && starts[s + 1] - starts[begin] <= most);
        const int64_t tokens = starts[s] - starts[begin];
        all.tokens = tokens > all.tokens ? tokens : all.tokens;
    }
    runs[all.run_count] = count;
    km_pool_run(pool, work, &all, threads);
    free(runs);
    return all.failed ? -1 : 0;
}
