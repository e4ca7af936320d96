/*
 * The walk over the segments. Runs of rows are handed to the threads by a counter; a run is short enough to stay in the
 * second-level cache, so that with more queries than one pass takes the rows are read from memory once all the same.
 */
#include "kimera.h"
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define RUN (16 * KM_BLOCK)
#define MULTI_FROM 3 /* fewer queries than this are faster one by one */

typedef struct {
    const int8_t *codes;  /* packed for multi_u8 */
    const float *vectors; /* packed for multi_f32 */
    float steps[KM_MULTI], related_codes[KM_MULTI], related_exact[KM_MULTI];
    int32_t bias[KM_MULTI];
    uint32_t text[KM_MULTI];
    uint64_t keys[KM_MULTI], subjects[KM_MULTI];
    uint64_t any_keys;
    uint32_t bare; /* queries without a vector, bit by bit */
    int groups;
    int64_t first, count;
} pass;

typedef struct {
    const km_scan *scan;
    const int64_t *starts; /* number of the first run of each segment */
    int64_t runs;
    km_heap *heaps; /* worker x query */
    const pass *passes;
    int64_t pass_count;
    atomic_int_fast64_t next;
} job;

static inline float floor_of(const km_heap *heap, float threshold)
{
    return heap->size < heap->k ? threshold : heap->hits[0].fused > threshold ? heap->hits[0].fused : threshold;
}

static inline float lift(int opposed) { return (float)(opposed < 63 ? opposed : 63) / 64.0f; }

/* One row that may matter: the symbolic rules, the layers, and then the heap. `fused` lacks both so far. */
static void consider(const km_scan *scan, const km_query *query, const km_segment *segment, int64_t row, float cosine,
                     float fused, int has_vectors, int related, int passing, int overlaps, km_heap *heap)
{
    const km_weights *weights = &scan->weights;
    km_hit hit = {fused, cosine, 0, segment->base + row, 1};
    if (hit.slot == query->exclude)
        return;
    if (overlaps) {
        uint64_t word = segment->keys[row];
        int anonymous = query->subject == 0 || (word >> KM_KEY_BITS) == 0;
        int alike = query->subject != 0 && (word & KM_SUBJECT) == query->subject;
        if (alike || (anonymous && (related || !has_vectors))) {
            int same;
            int opposed = km_opposed(query->record, segment->pool + segment->record[row], &same);
            if (opposed > 0 && (same || related)) {
                hit.opposed = opposed;
                hit.conditional = !same;
                hit.fused = (related ? fused : cosine) + KM_SYMBOLIC + lift(opposed);
                passing = 1;
            } else if (opposed > 0 && !has_vectors) {
                hit.opposed = opposed; /* nothing says whether they are related: last in line */
                hit.conditional = 0;
                hit.fused = lift(opposed) - 1.0f;
                passing = 1;
            }
        }
    }
    if (!passing)
        return;
    if (weights->layer != 0.0f && related && segment->layers != NULL && query->record != NULL &&
        segment->layers[row] != 0 && query->layers != 0) {
        float conflict = 1.0f;
        if (segment->layers[row] & query->layers)
            conflict = km_layer_conflict(query->record, segment->pool + segment->record[row]);
        hit.fused += weights->layer * conflict;
    }
    if (hit.fused >= weights->threshold)
        km_heap_push(heap, hit);
}

float km_flag_of(const km_scan *scan, const km_segment *segment, int64_t row, uint32_t text)
{
    if (segment->text == NULL)
        return 0.0f;
    return scan->weights.flag * km_level(segment->text[row], text);
}

static void block_single(const km_scan *scan, const km_query *query, const km_segment *segment, int64_t row, int64_t n,
                         uint64_t live, int only_opposed, km_heap *heap)
{
    const km_isa *isa = scan->isa;
    float cosine[KM_BLOCK], fused[KM_BLOCK], l1[KM_BLOCK];
    int32_t acc[KM_BLOCK], sad[KM_BLOCK];
    km_masks masks = {0, 0};
    const int has_vectors = query->vector != NULL && (segment->codes != NULL || segment->exact != NULL);
    if (has_vectors) {
        km_weights weights = scan->weights;
        const float *difference = weights.l1 != 0.0f ? l1 : NULL;
        const float unit = 0.5f / sqrtf((float)scan->dim);
        if (segment->codes != NULL) {
            const uint8_t *rows = segment->codes + row * scan->stride, *grades = segment->grades + row;
            if (difference == NULL || query->graded == NULL) {
                isa->dots_u8(query->codes, rows, n, scan->stride, acc);
            } else {
                isa->dots_l1_u8(query->codes, query->graded, grades, rows, n, scan->stride, acc, sad);
                for (int64_t i = 0; i < n; i++)
                    l1[i] = (float)sad[i] * km_steps[grades[i]] * unit;
            }
            for (int64_t i = 0; i < n; i++)
                cosine[i] = (float)(acc[i] - query->bias) * (km_steps[grades[i]] * query->step);
        } else {
            const float *rows = segment->exact + row * scan->dim;
            weights.margin = 0.0f;
            if (difference == NULL) {
                isa->dots_f32(query->vector, rows, n, scan->dim, cosine);
            } else {
                isa->dots_l1_f32(query->vector, rows, n, scan->dim, cosine, l1);
                for (int64_t i = 0; i < n; i++)
                    l1[i] *= unit;
            }
        }
        masks = isa->admit(cosine, segment->text == NULL ? NULL : segment->text + row, difference, n, query->text,
                           &weights, floor_of(heap, weights.threshold), fused);
    }
    if (only_opposed)
        masks.passing = 0;
    uint64_t overlaps = 0;
    if (query->keys != 0 && segment->keys != NULL)
        overlaps = isa->overlap(segment->keys + row, n, query->keys) & live;
    if (overlaps != 0 && has_vectors) /* what is neither related nor perhaps about the same subject is out */
        overlaps &= masks.related | (query->subject ? isa->same(segment->keys + row, n, query->subject) : 0);
    for (uint64_t todo = (masks.passing & live) | overlaps; todo != 0; todo &= todo - 1) {
        int i = __builtin_ctzll(todo);
        consider(scan, query, segment, row + i, has_vectors ? cosine[i] : 0.0f, has_vectors ? fused[i] : 0.0f,
                 has_vectors, (int)(masks.related >> i & 1), (int)(masks.passing >> i & 1), (int)(overlaps >> i & 1),
                 heap);
    }
}

/* A block of which only oppositions count: the vectors of the other rows are not read. */
static void block_apart(const km_scan *scan, const km_query *query, const km_segment *segment, int64_t row, int64_t n,
                        uint64_t live, km_heap *heap)
{
    if (query->keys == 0 || segment->keys == NULL)
        return;
    uint64_t overlaps = scan->isa->overlap(segment->keys + row, n, query->keys) & live;
    for (; overlaps != 0; overlaps &= overlaps - 1)
        block_single(scan, query, segment, row + __builtin_ctzll(overlaps), 1, 1, 1, heap);
}

static void block_multi(const km_scan *scan, const pass *p, const km_segment *segment, int64_t row, int64_t n,
                        uint64_t live, km_heap *heaps)
{
    const km_isa *isa = scan->isa;
    union {
        int32_t acc[KM_BLOCK * KM_MULTI];
        float dots[KM_BLOCK * KM_MULTI];
    } out;
    float lanes[KM_MULTI], floors[KM_MULTI];
    const int width = p->groups * KM_LANES;
    const int coded = segment->codes != NULL, has_vectors = coded || segment->exact != NULL;
    const float *minimum = coded ? p->related_codes : p->related_exact;
    uint64_t overlaps = 0;
    if (p->any_keys != 0 && segment->keys != NULL)
        overlaps = isa->overlap(segment->keys + row, n, p->any_keys) & live;
    if (coded)
        isa->multi_u8(p->codes, p->groups, segment->codes + row * scan->stride, n, scan->stride, out.acc);
    else if (has_vectors)
        isa->multi_f32(p->vectors, p->groups, segment->exact + row * scan->dim, n, scan->dim, out.dots);
    else if (overlaps == 0)
        return;
    for (int j = 0; j < width; j++)
        floors[j] = j < p->count ? floor_of(&heaps[p->first + j], scan->weights.threshold) - scan->weights.layer
                                 : INFINITY;
    for (uint64_t rest = live; rest != 0; rest &= rest - 1) {
        int i = __builtin_ctzll(rest);
        const float *cosine = out.dots + i * KM_MULTI;
        uint32_t related = 0, passing = 0;
        if (has_vectors) {
            if (coded) {
                isa->unbias(out.acc + i * KM_MULTI, p->bias, p->steps, km_steps[segment->grades[row + i]], width,
                            lanes);
                cosine = lanes;
            }
            isa->admit_multi(cosine, width, segment->text == NULL ? 0 : segment->text[row + i], p->text, minimum,
                             floors, scan->weights.flag, &related, &passing);
        }
        uint32_t symbolic = 0;
        if (overlaps >> i & 1) {
            uint64_t word = segment->keys[row + i];
            uint32_t open = has_vectors ? related | p->bare : UINT32_MAX;
            symbolic = (uint32_t)isa->overlap(p->keys, width, word);
            if (symbolic & ~open)
                symbolic &= open | (uint32_t)isa->same(p->subjects, width, word & KM_SUBJECT);
        }
        for (uint32_t todo = passing | symbolic; todo != 0; todo &= todo - 1) {
            int j = __builtin_ctz(todo);
            const km_query *query = &scan->queries[p->first + j];
            int has = has_vectors && query->vector != NULL;
            float c = has ? cosine[j] : 0.0f;
            consider(scan, query, segment, row + i, c, c + (has ? km_flag_of(scan, segment, row + i, query->text) : 0.0f),
                     has, (int)(related >> j & 1), (int)(passing >> j & 1), (int)(symbolic >> j & 1),
                     &heaps[p->first + j]);
        }
    }
}

static void work(void *context, int worker)
{
    job *j = context;
    const km_scan *scan = j->scan;
    km_heap *heaps = j->heaps + (int64_t)worker * scan->query_count;
    int64_t s = 0, run;
    while ((run = atomic_fetch_add(&j->next, 1)) < j->runs) {
        while (run >= j->starts[s + 1])
            s++;
        const km_segment *segment = &scan->segments[s];
        int64_t from = (run - j->starts[s]) * RUN;
        int64_t to = from + RUN < segment->rows ? from + RUN : segment->rows;
        const uint64_t *live = scan->live + (segment->base + from) / KM_BLOCK;
        for (int64_t p = 0; p < (j->pass_count > 0 ? j->pass_count : scan->query_count); p++)
            for (int64_t row = from; row < to; row += KM_BLOCK) {
                int64_t n = to - row < KM_BLOCK ? to - row : KM_BLOCK;
                uint64_t word = live[(row - from) / KM_BLOCK];
                if (n < KM_BLOCK)
                    word &= (UINT64_C(1) << n) - 1;
                if (word == 0)
                    continue;
                if (segment->apart)
                    for (int64_t q = 0; q < (j->pass_count > 0 ? j->passes[p].count : 1); q++) {
                        int64_t at = j->pass_count > 0 ? j->passes[p].first + q : p;
                        block_apart(scan, &scan->queries[at], segment, row, n, word, &heaps[at]);
                    }
                else if (j->pass_count > 0)
                    block_multi(scan, &j->passes[p], segment, row, n, word, heaps);
                else
                    block_single(scan, &scan->queries[p], segment, row, n, word, 0, &heaps[p]);
            }
    }
}

static void pack(const km_scan *scan, pass *p, int8_t *codes, float *vectors)
{
    p->codes = codes;
    p->vectors = vectors;
    for (int j = 0; j < KM_MULTI; j++) {
        int group = j / KM_LANES, lane = j % KM_LANES;
        p->steps[j] = 0.0f;
        p->bias[j] = 0;
        p->text[j] = 0;
        p->keys[j] = p->subjects[j] = 0;
        p->related_codes[j] = p->related_exact[j] = INFINITY; /* no vector, or no query: related to nothing */
        if (j >= p->count)
            continue;
        const km_query *query = &scan->queries[p->first + j];
        p->text[j] = query->text;
        p->keys[j] = query->keys;
        p->subjects[j] = query->subject;
        p->any_keys |= query->keys;
        if (query->vector == NULL) {
            p->bare |= UINT32_C(1) << j;
            continue;
        }
        p->related_exact[j] = scan->weights.min_related;
        p->related_codes[j] = scan->weights.min_related - scan->weights.margin;
        if (codes != NULL && query->codes != NULL) {
            p->steps[j] = query->step;
            p->bias[j] = query->bias;
            for (int64_t d = 0; d < scan->stride; d += 4)
                memcpy(codes + ((group * scan->stride + d) * KM_LANES) + 4 * lane, query->codes + d, 4);
        }
        if (vectors != NULL)
            for (int64_t d = 0; d < scan->dim; d++)
                vectors[(group * scan->dim + d) * KM_LANES + lane] = query->vector[d];
    }
}

int km_scan_run(const km_scan *scan, km_hit *hits, int64_t *counts)
{
    const int64_t queries = scan->query_count;
    const int multi = queries >= MULTI_FROM && scan->weights.l1 == 0.0f;
    const int64_t pass_count = multi ? (queries + KM_MULTI - 1) / KM_MULTI : 0;
    int workers = km_pool_threads(scan->pool), failed = -1, coded = 0, floats = 0;
    int64_t runs = 0;
    int64_t *starts = malloc((size_t)(scan->segment_count + 1) * sizeof *starts);
    km_heap *heaps = NULL;
    km_hit *kept = NULL;
    pass *passes = NULL;
    int8_t *codes = NULL;
    float *vectors = NULL;
    if (starts == NULL)
        goto out;
    for (int64_t s = 0; s < scan->segment_count; s++) {
        starts[s] = runs;
        runs += (scan->segments[s].rows + RUN - 1) / RUN;
        coded |= scan->segments[s].codes != NULL;
        floats |= scan->segments[s].codes == NULL && scan->segments[s].exact != NULL;
    }
    starts[scan->segment_count] = runs;
    if (runs < 2 || runs * queries < 4)
        workers = 1; /* waking a thread costs more than this scan */
    if (runs < workers)
        workers = (int)runs;
    if (workers < 1)
        workers = 1;
    heaps = calloc((size_t)(workers * queries + 1), sizeof *heaps);
    kept = malloc((size_t)(workers * queries * scan->k + 1) * sizeof *kept);
    passes = calloc((size_t)pass_count + 1, sizeof *passes);
    const size_t groups = (size_t)pass_count * 2;
    if (multi && coded)
        codes = aligned_alloc(KM_ALIGN, groups * KM_LANES * (size_t)scan->stride);
    if (multi && floats)
        vectors = aligned_alloc(KM_ALIGN, groups * KM_LANES * (size_t)scan->dim * sizeof *vectors);
    if (heaps == NULL || kept == NULL || passes == NULL || (multi && coded && codes == NULL) ||
        (multi && floats && vectors == NULL))
        goto out;
    if (codes != NULL)
        memset(codes, 0, groups * KM_LANES * (size_t)scan->stride);
    if (vectors != NULL)
        memset(vectors, 0, groups * KM_LANES * (size_t)scan->dim * sizeof *vectors);
    for (int64_t i = 0; i < workers * queries; i++) {
        heaps[i].hits = kept + i * scan->k;
        heaps[i].k = scan->k;
    }
    for (int64_t p = 0; p < pass_count; p++) {
        passes[p].first = p * KM_MULTI;
        passes[p].count = queries - p * KM_MULTI < KM_MULTI ? queries - p * KM_MULTI : KM_MULTI;
        passes[p].groups = passes[p].count > KM_LANES ? 2 : 1;
        pack(scan, &passes[p], codes == NULL ? NULL : codes + (size_t)p * KM_MULTI * (size_t)scan->stride,
             vectors == NULL ? NULL : vectors + (size_t)p * KM_MULTI * (size_t)scan->dim);
    }
    job j = {scan, starts, runs, heaps, passes, pass_count, 0};
    if (scan->k > 0 && queries > 0)
        km_pool_run(scan->pool, work, &j, workers);
    for (int64_t q = 0; q < queries; q++) {
        km_heap best = {hits + q * scan->k, 0, scan->k};
        for (int w = 0; w < workers; w++) {
            const km_heap *own = &heaps[w * queries + q];
            for (int64_t i = 0; i < own->size; i++)
                km_heap_push(&best, own->hits[i]);
        }
        km_heap_sort(&best);
        counts[q] = best.size;
    }
    failed = 0;
out:
    free(vectors);
    free(codes);
    free(passes);
    free(kept);
    free(heaps);
    free(starts);
    return failed;
}

const km_segment *km_segment_of(const km_scan *scan, int64_t slot)
{
    int64_t low = 0, high = scan->segment_count - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (scan->segments[middle].base <= slot)
            low = middle;
        else
            high = middle - 1;
    }
    return &scan->segments[low];
}

void km_rescore(const km_scan *scan, km_hit *hits, int64_t *counts)
{
    for (int64_t q = 0; q < scan->query_count; q++) {
        const km_query *query = &scan->queries[q];
        km_heap kept = {hits + q * scan->k, 0, scan->k};
        for (int64_t i = 0; i < counts[q]; i++) {
            km_hit hit = hits[q * scan->k + i];
            const km_segment *segment = km_segment_of(scan, hit.slot);
            if (query->vector != NULL && segment->codes != NULL && segment->exact != NULL) {
                float exact;
                scan->isa->dots_f32(query->vector, segment->exact + (hit.slot - segment->base) * scan->dim, 1,
                                    scan->dim, &exact);
                hit.fused += exact - hit.cosine;
                hit.cosine = exact;
                if (hit.conditional && exact < scan->weights.min_related)
                    continue;
            }
            if (hit.fused >= scan->weights.threshold)
                kept.hits[kept.size++] = hit;
        }
        km_heap_sort(&kept);
        counts[q] = kept.size;
    }
}
