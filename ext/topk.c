/* A bounded min-heap: the worst hit kept is at the root. Ties fall to the lower slot, so results do not depend on threads. */
#include "kimera.h"

static inline int worse(km_hit a, km_hit b) { return a.fused < b.fused || (a.fused == b.fused && a.slot > b.slot); }

static void sink(km_hit *hits, int64_t size, int64_t at)
{
    km_hit hit = hits[at];
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && worse(hits[child + 1], hits[child]))
            child++;
        if (!worse(hits[child], hit))
            break;
        hits[at] = hits[child];
    }
    hits[at] = hit;
}

void km_heap_push(km_heap *heap, km_hit hit)
{
    if (heap->size < heap->k) {
        int64_t at = heap->size++;
        while (at > 0 && worse(hit, heap->hits[(at - 1) / 2])) {
            heap->hits[at] = heap->hits[(at - 1) / 2];
            at = (at - 1) / 2;
        }
        heap->hits[at] = hit;
    } else if (worse(heap->hits[0], hit)) {
        heap->hits[0] = hit;
        sink(heap->hits, heap->size, 0);
    }
}

void km_heap_sort(km_heap *heap)
{
    for (int64_t i = heap->size / 2 - 1; i >= 0; i--)
        sink(heap->hits, heap->size, i);
    for (int64_t end = heap->size - 1; end > 0; end--) {
        km_hit worst = heap->hits[0];
        heap->hits[0] = heap->hits[end];
        heap->hits[end] = worst;
        sink(heap->hits, end, 0);
    }
}
