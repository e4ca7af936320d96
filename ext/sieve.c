/*
 * Which rows are worth reading. The first principal axes of a row, in 8 bits, and the norm of all the others bound its
 * cosine with a query from above: what the axes give, plus the product of the two remaining norms. Statements use little of
 * that allowance, so a measured share of it (`row_slack`) lets through almost every row that belongs to the result, and few
 * others. Rows lie in cells of like rows and like kinds of text; the same bound on a cell's centre says which cells to open.
 *
 *     query ──> bounds of all cells ──best first──> short codes of a cell ──few rows──> full codes ──> heap
 *                      └── below the floor: not opened          └── below the floor: not read
 */
#include "kimera.h"
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define BUCKETS 256
#define GROUPS (KM_BLOCK / KM_LANES)
#define AHEAD 16 /* rows asked of memory before the first of them is read */
#define FIRST_ROWS 4096    /* rows of the best cells, opened first */
#define MOST_TOGETHER 32  /* queries */
#define KINDS 6           /* of texts; the last one is that of no row */
#define DONE (-INFINITY)

typedef struct {
    const km_segment *segment;
    int64_t row;
} place;

/* One query on its way through the cells. */
typedef struct {
    const km_query *query;
    const km_short *brief;
    km_heap heap;
    float *bounds; /* dots with the centres; DONE once a cell was opened */
    float lift[KINDS];
    place places[AHEAD];
    int waiting;
    int64_t read;
} seeker;

typedef struct {
    const km_scan *scan;
    const km_sieve *sieve;
    const km_short *shorts;
    float row_slack, cell_slack;
    km_hit *hits;
    int64_t *counts, *read;
    int64_t share; /* queries that go through the cells together */
    seeker *seekers;
    float *bounds;  /* query x cells */
    int32_t *order; /* worker x cells */
    atomic_int_fast64_t next;
} job;

/* The highest level that rows of a kind of text may have: 0 has no text, else 1 + (1 if negated) + (2 if there are numbers). */
static float most_level(uint8_t kind, uint32_t text)
{
    if (kind == 0 || kind > 4 || !(text & KM_TEXT))
        return 0.0f;
    if (((kind - 1) & 2) && (text & KM_NAMED))
        return KM_SAME + 1.0f; /* its numbers may differ as well */
    return ((kind - 1) & 1) != (int)((text & KM_NEGATED) != 0) || (((kind - 1) & 2) && (text & KM_NUMBERS)) ? 1.0f : 0.0f;
}

static float floor_of(const km_heap *heap, float threshold)
{
    return heap->size < heap->k || heap->hits[0].fused < threshold ? threshold : heap->hits[0].fused;
}

/* Cells by descending fused score of their centres, by counting in buckets: close enough to the order to fill the heap well. */
static void sort_cells(const float *bounds, const float *lift, const uint8_t *kinds, int64_t cells, int32_t *order)
{
    int32_t counts[BUCKETS + 1] = {0};
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t c = cells - 1; c >= 0; c--) {
            float place = (2.0f - bounds[c] - lift[kinds[c]]) * (BUCKETS / 4.0f);
            int bucket = place < 0 ? 0 : place >= BUCKETS - 1 ? BUCKETS - 1 : (int)place;
            if (pass == 0)
                counts[bucket + 1]++;
            else
                order[counts[bucket]++] = (int32_t)c;
        }
        for (int b = 0; pass == 0 && b < BUCKETS; b++)
            counts[b + 1] += counts[b];
    }
}

static void read_rows(const km_scan *scan, seeker *s)
{
    const km_weights *weights = &scan->weights;
    const km_query *query = s->query;
    for (int i = 0; i < s->waiting; i++) {
        const km_segment *segment = s->places[i].segment;
        int64_t row = s->places[i].row;
        float cosine, minimum = weights->min_related;
        if (segment->codes != NULL) {
            int32_t dot;
            scan->isa->dots_u8(query->codes, segment->codes + row * scan->stride, 1, scan->stride, &dot);
            cosine = (float)(dot - query->bias) * (km_steps[segment->grades[row]] * query->step);
            minimum -= weights->margin;
        } else {
            scan->isa->dots_f32(query->vector, segment->exact + row * scan->dim, 1, scan->dim, &cosine);
        }
        km_hit hit = {cosine, cosine, 0, segment->base + row, 1};
        hit.fused += km_flag_of(scan, segment, row, query->text);
        if (cosine >= minimum && hit.fused >= weights->threshold && hit.slot != query->exclude)
            km_heap_push(&s->heap, hit);
    }
    s->read += s->waiting;
    s->waiting = 0;
}

/* The least cosine that still matters in a cell. */
static float bar_of(const km_scan *scan, const seeker *s, float lift)
{
    float bar = floor_of(&s->heap, scan->weights.threshold) - lift;
    float related = scan->weights.min_related - scan->weights.margin;
    return bar > related ? bar : related;
}

/* A row that is closer also agrees more in what the codes leave out, so the slack grows with what is asked for. */
static float scale_of(float bar) { return bar > KM_SLACK_OF ? bar / KM_SLACK_OF : 1.0f; }

static void open_cell(const job *j, seeker *s, int64_t c)
{
    const km_scan *scan = j->scan;
    const km_sieve *sieve = j->sieve;
    const float lift = s->lift[sieve->kinds[c]];
    const int64_t stride = sieve->dims * KM_LANES;
    int32_t dots[KM_BLOCK];
    float bar = bar_of(scan, s, lift);
    if (!(s->bounds[c] + j->cell_slack * scale_of(bar) * sieve->spread[c] >= bar))
        return;
    s->bounds[c] = DONE;
    for (int64_t g = sieve->starts[c]; g < sieve->starts[c + 1]; g += GROUPS) {
        const int64_t groups = sieve->starts[c + 1] - g < GROUPS ? sieve->starts[c + 1] - g : GROUPS;
        const int64_t first = g * KM_LANES;
        scan->isa->lanes_i8(s->brief->codes, sieve->codes + g * stride, groups, sieve->dims, dots);
        bar = bar_of(scan, s, lift);
        uint64_t over = scan->isa->sift(dots, sieve->rest + first, groups * KM_LANES, s->brief->step,
                                        j->row_slack * scale_of(bar) * s->brief->rest / 255.0f, bar);
        for (; over != 0; over &= over - 1) {
            const uint32_t slot = sieve->slots[first + __builtin_ctzll(over)];
            if (slot == KM_UNUSED || !(scan->live[slot / 64] >> (slot % 64) & 1))
                continue;
            const km_segment *segment = km_segment_of(scan, slot);
            const int64_t row = slot - segment->base;
            if (row >= segment->rows || (segment->codes == NULL && segment->exact == NULL))
                continue;
            if (segment->codes != NULL)
                for (int64_t b = 0; b < scan->stride; b += 64)
                    __builtin_prefetch(segment->codes + row * scan->stride + b);
            s->places[s->waiting++] = (place){segment, row};
            if (s->waiting == AHEAD)
                read_rows(scan, s);
        }
    }
}

/* The dots with all centres; then the best of them, so that the heap knows early what it takes to get in. */
static void start(const job *j, seeker *s, int32_t *order)
{
    const km_scan *scan = j->scan;
    const km_sieve *sieve = j->sieve;
    const int64_t stride = sieve->dims * KM_LANES;
    int32_t dots[KM_BLOCK];
    for (int kind = 0; kind < KINDS; kind++)
        s->lift[kind] = scan->weights.flag * most_level((uint8_t)kind, s->query->text);
    for (int64_t c = 0; c < sieve->cells; c += KM_BLOCK) {
        int64_t n = sieve->cells - c < KM_BLOCK ? sieve->cells - c : KM_BLOCK;
        scan->isa->lanes_i8(s->brief->codes, sieve->centres + c / KM_LANES * stride, n / KM_LANES, sieve->dims, dots);
        for (int64_t i = 0; i < n; i++)
            s->bounds[c + i] = (float)dots[i] * s->brief->step;
    }
    sort_cells(s->bounds, s->lift, sieve->kinds, sieve->cells, order);
    for (int64_t o = 0, rows = 0; o < sieve->cells && rows < FIRST_ROWS; o++) {
        rows += (sieve->starts[order[o] + 1] - sieve->starts[order[o]]) * KM_LANES;
        open_cell(j, s, order[o]);
    }
    read_rows(scan, s);
}

static void work(void *context, int worker)
{
    job *j = context;
    const km_scan *scan = j->scan;
    const int64_t cells = j->sieve->cells;
    int64_t from;
    while ((from = atomic_fetch_add(&j->next, j->share)) < scan->query_count) {
        const int64_t to = from + j->share < scan->query_count ? from + j->share : scan->query_count;
        for (int64_t q = from; q < to; q++)
            if (scan->queries[q].vector != NULL)
                start(j, &j->seekers[q], j->order + worker * cells);
        for (int64_t c = 0; c < cells; c++) /* the codes of a cell stay in the cache for all queries */
            for (int64_t q = from; q < to; q++)
                if (scan->queries[q].vector != NULL)
                    open_cell(j, &j->seekers[q], c);
        for (int64_t q = from; q < to; q++) {
            read_rows(scan, &j->seekers[q]);
            km_heap_sort(&j->seekers[q].heap);
            j->counts[q] = j->seekers[q].heap.size;
            j->read[q] = j->seekers[q].read;
        }
    }
}

int km_sieve_run(const km_scan *scan, const km_sieve *sieve, const km_short *shorts, float row_slack, float cell_slack,
                 km_hit *hits, int64_t *counts, int64_t *read)
{
    const int64_t queries = scan->query_count;
    int workers = km_pool_threads(scan->pool);
    if (workers > queries)
        workers = (int)queries;
    if (workers < 1)
        workers = 1;
    job j = {scan, sieve, shorts, row_slack, cell_slack, hits, counts, read, 1, NULL, NULL, NULL, 0};
    j.share = (queries + workers - 1) / workers;
    if (j.share > MOST_TOGETHER)
        j.share = MOST_TOGETHER;
    j.seekers = calloc((size_t)queries + 1, sizeof *j.seekers);
    j.bounds = malloc((size_t)(queries * sieve->cells + 1) * sizeof *j.bounds);
    j.order = malloc((size_t)(workers * sieve->cells + 1) * sizeof *j.order);
    int failed = j.seekers == NULL || j.bounds == NULL || j.order == NULL ? -1 : 0;
    if (!failed) {
        for (int64_t q = 0; q < queries; q++) {
            j.seekers[q].query = &scan->queries[q];
            j.seekers[q].brief = &shorts[q];
            j.seekers[q].heap = (km_heap){hits + q * scan->k, 0, scan->k};
            j.seekers[q].bounds = j.bounds + q * sieve->cells;
        }
        km_pool_run(scan->pool, work, &j, workers);
    }
    free(j.seekers);
    free(j.bounds);
    free(j.order);
    return failed;
}
