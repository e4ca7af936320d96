"""A thin typed face over the C kernel. It assumes what ``kimera_stream.kernels`` has checked: dtypes, shapes, contiguity.

No arithmetic here; the GIL is released around every call that reads rows.
"""

from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "kimera.h" nogil:
    ctypedef struct km_segment:
        const uint8_t *codes
        const uint8_t *grades
        const float *exact
        const uint32_t *text
        const uint64_t *keys
        const uint64_t *layers
        const uint32_t *record
        const uint64_t *pool
        int64_t base
        int64_t rows
        int apart

    ctypedef struct km_query:
        const float *vector
        const int8_t *codes
        const uint8_t *graded
        const uint64_t *record
        float step
        int32_t bias
        uint32_t text
        uint64_t keys
        uint64_t subject
        uint64_t layers
        int64_t exclude

    ctypedef struct km_weights:
        float min_related
        float threshold
        float flag
        float layer
        float l1
        float margin

    ctypedef struct km_hit:
        float fused
        float cosine
        int32_t opposed
        int64_t slot

    ctypedef struct km_isa:
        const char *name
        uint64_t (*read)(const uint8_t *data, size_t size) noexcept nogil

    ctypedef struct km_pool:
        pass

    ctypedef struct km_scan:
        const km_isa *isa
        km_pool *pool
        const km_segment *segments
        int64_t segment_count
        const uint64_t *live
        int64_t dim
        int64_t stride
        const km_query *queries
        int64_t query_count
        km_weights weights
        int64_t k

    int km_variant_count()
    const km_isa *km_variant(int index)
    float km_steps[256]
    void km_init_steps()
    int km_finite(const float *numbers, int64_t count)
    float km_quantize_row(const float *row, int64_t dim, int64_t stride, uint8_t *codes, uint8_t *grade)
    float km_quantize_query(const float *row, int64_t dim, int64_t stride, int8_t *codes, float *step, int32_t *bias)
    void km_grade_query(const float *row, int64_t dim, int64_t stride, uint8_t *graded)
    km_pool *km_pool_new(int threads)
    void km_pool_free(km_pool *pool)
    int km_pool_threads(const km_pool *pool)
    int km_scan_run(const km_scan *scan, km_hit *hits, int64_t *counts)
    void km_rescore(const km_scan *scan, km_hit *hits, int64_t *counts)
    ctypedef struct km_sieve:
        int64_t dims
        int64_t cells
        const int8_t *centres
        const float *spread
        const uint8_t *kinds
        const int64_t *starts
        const int8_t *codes
        const uint8_t *rest
        const uint32_t *slots

    ctypedef struct km_short:
        const int8_t *codes
        float step
        float rest

    int km_sieve_run(const km_scan *scan, const km_sieve *sieve, const km_short *shorts, float row_slack,
                     float cell_slack, km_hit *hits, int64_t *counts, int64_t *read)
    int km_pair_head(const km_isa *isa, const float *query, const float *rows, int64_t n, int64_t dim,
                     const float *extra, int64_t extras, const float *w1, const float *b1, const float *w2, float b2,
                     int64_t hidden, float *out)
    int64_t km_match(const km_isa *isa, const float *query, const float *rows, int64_t n, int64_t dim,
                     const float *thresholds, int64_t *indices, float *cosines)
    int km_text_signature(const char *text, int64_t n, uint32_t *signature)

    ctypedef struct km_text:
        const void *data
        int64_t length
        int kind

    int km_text_overlaps(const km_text *texts, int64_t n, const uint32_t *ignored, int64_t slots, float *out)

cdef extern from "Python.h":
    bint PyUnicode_IS_ASCII(object text)
    int PyUnicode_KIND(object text)
    void *PyUnicode_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL


km_init_steps()


def variants():
    return tuple(km_variant(i).name.decode() for i in range(km_variant_count()))


def steps():
    return [km_steps[i] for i in range(256)]


def quantize(const float[:, ::1] vectors, uint8_t[:, ::1] codes, uint8_t[::1] grades, float[::1] lost):
    cdef int64_t i, n = vectors.shape[0], dim = vectors.shape[1], stride = codes.shape[1]
    with nogil:
        for i in range(n):
            lost[i] = km_quantize_row(&vectors[i, 0], dim, stride, &codes[i, 0], &grades[i])


def write_row(const float[::1] vector, uint8_t[:, ::1] codes, uint8_t[::1] grades, float[:, ::1] exact, int64_t row):
    cdef int64_t j, dim = vector.shape[0]
    if not km_finite(&vector[0], dim):
        raise ValueError("vector: expected finite numbers")
    if exact is not None:
        for j in range(dim):
            exact[row, j] = vector[j]
    if codes is None:
        return 0.0
    return km_quantize_row(&vector[0], dim, codes.shape[1], &codes[row, 0], &grades[row])


def write_rows(const float[:, ::1] vectors, uint8_t[:, ::1] codes, uint8_t[::1] grades, float[:, ::1] exact, int64_t row):
    cdef int64_t i, n = vectors.shape[0], dim = vectors.shape[1]
    cdef float lost, most = 0
    cdef bint finite
    if n == 0:
        return 0.0
    with nogil:
        finite = km_finite(&vectors[0, 0], n * dim)
    if not finite:
        raise ValueError("vectors: expected finite numbers")
    with nogil:
        if exact is not None:
            memcpy(&exact[row, 0], &vectors[0, 0], n * dim * sizeof(float))
        if codes is not None:
            for i in range(n):
                lost = km_quantize_row(&vectors[i, 0], dim, codes.shape[1], &codes[row + i, 0], &grades[row + i])
                most = lost if lost > most else most
    return most


def text_signatures(list texts, uint32_t[::1] out):
    """Fills in what is plain; returns the places of the texts that are not."""
    cdef Py_ssize_t i, size
    cdef const char *data
    left = []
    for i in range(len(texts)):
        text = texts[i]
        if text is None:
            out[i] = 0
        elif not isinstance(text, str):
            raise TypeError(f"texts: expected strings, got {type(text).__name__}")
        elif PyUnicode_IS_ASCII(text):
            data = PyUnicode_AsUTF8AndSize(text, &size)
            if not km_text_signature(data, size, &out[i]):
                left.append(i)
        else:
            left.append(i)
    return left


def text_overlaps(list texts, const uint32_t[::1] ignored, float[::1] out):
    """Of the first text with each of the others; out has room for those."""
    cdef Py_ssize_t i, n = len(texts)
    cdef int failed
    cdef km_text *read = <km_text *>malloc(n * sizeof(km_text))
    if read == NULL:
        raise MemoryError
    try:
        for i in range(n):
            text = texts[i]
            if not isinstance(text, str):
                raise TypeError(f"texts: expected strings, got {type(text).__name__}")
            read[i].data = PyUnicode_DATA(text)
            read[i].length = PyUnicode_GET_LENGTH(text)
            read[i].kind = PyUnicode_KIND(text)
        # The GIL is kept: this takes less time than a thread takes to get it back.
        failed = km_text_overlaps(read, n, &ignored[0], ignored.shape[0], &out[0]) if n > 1 else 0
    finally:
        free(read)
    if failed:
        raise MemoryError


cdef class View:
    """Pointers into the arrays of segments, which it keeps alive."""

    cdef km_segment *segments
    cdef int64_t count
    cdef readonly object owners

    def __cinit__(self, segments):
        cdef int64_t i
        cdef km_segment *s
        cdef const uint8_t[:, ::1] codes
        cdef const uint8_t[::1] grades
        cdef const float[:, ::1] exact
        cdef const uint32_t[::1] text, record
        cdef const uint64_t[::1] keys, layers, pool
        self.owners = tuple((x.codes, x.grades, x.exact, x.text, x.keys, x.layers, x.record, x.pool) for x in segments)
        self.count = len(segments)
        self.segments = <km_segment *>calloc(self.count + 1, sizeof(km_segment))
        if self.segments == NULL:
            raise MemoryError
        for i in range(self.count):
            source = segments[i]
            s = &self.segments[i]
            s.base = source.base
            s.rows = source.rows
            if s.rows == 0:
                continue
            if source.codes is not None:
                codes = source.codes
                grades = source.grades
                s.codes = &codes[0, 0]
                s.grades = &grades[0]
            if source.exact is not None:
                exact = source.exact
                s.exact = &exact[0, 0]
            if source.text is not None:
                text = source.text
                s.text = &text[0]
            if source.keys is not None:
                keys = source.keys
                layers = source.layers
                record = source.record
                pool = source.pool
                s.keys = &keys[0]
                s.layers = &layers[0]
                s.record = &record[0]
                s.pool = &pool[0]

    def __dealloc__(self):
        free(self.segments)


cdef class Backend:
    """One variant of the kernel and its threads."""

    cdef const km_isa *isa
    cdef km_pool *pool

    def __cinit__(self, str variant, int threads):
        cdef int i
        for i in range(km_variant_count()):
            if variant is None or km_variant(i).name.decode() == variant:
                self.isa = km_variant(i)
                break
        if self.isa == NULL:
            raise ValueError(f"variant: this machine runs {', '.join(variants())}; got {variant!r}")
        self.pool = km_pool_new(threads)
        if self.pool == NULL:
            raise MemoryError

    def __dealloc__(self):
        with nogil:
            km_pool_free(self.pool)

    @property
    def variant(self):
        return self.isa.name.decode()

    @property
    def threads(self):
        return km_pool_threads(self.pool)

    def scan(
        self,
        View view,
        const uint64_t[::1] live,
        const float[:, ::1] vectors,
        const uint8_t[::1] has_vector,
        const uint32_t[::1] text,
        const uint64_t[::1] keys,
        const uint64_t[::1] subjects,
        const uint64_t[::1] layers,
        const int64_t[::1] record,
        const uint64_t[::1] pool,
        const int64_t[::1] exclude,
        weights,
        int64_t stride,
        float margin,
        bint rescore,
        const uint8_t[::1] select,
        int64_t[:, ::1] slots,
        float[:, ::1] fused,
        float[:, ::1] cosine,
        int32_t[:, ::1] opposed,
        int64_t[::1] counts,
    ):
        """Returns the largest norm that quantising a query lost."""
        cdef int64_t i, j, m = slots.shape[0], k = slots.shape[1], dim = vectors.shape[1]
        cdef km_scan scan
        cdef km_query *queries = <km_query *>calloc(m + 1, sizeof(km_query))
        # A query is read against every row: one that straddles cache lines costs a tenth of the speed.
        cdef int8_t *codes = <int8_t *>aligned_alloc(64, m * stride + 64)
        cdef km_hit *hits = <km_hit *>malloc((m * k + 1) * sizeof(km_hit))
        cdef uint8_t *graded = NULL
        cdef km_segment *chosen = NULL
        cdef int64_t s
        cdef bint selective = select is not None
        cdef bint wants_l1 = weights.l1 != 0
        cdef int failed = 0
        cdef float lost = 0, worst = 0
        if wants_l1:
            graded = <uint8_t *>aligned_alloc(64, m * 256 * stride + 64)
        if selective:
            chosen = <km_segment *>malloc((view.count + 1) * sizeof(km_segment))
        if (
            queries == NULL or codes == NULL or hits == NULL or (wants_l1 and graded == NULL)
            or (selective and chosen == NULL)
        ):
            free(chosen)
            free(queries)
            free(codes)
            free(hits)
            free(graded)
            raise MemoryError
        scan.weights.min_related = weights.min_related
        scan.weights.threshold = weights.threshold
        scan.weights.flag = weights.flag
        scan.weights.layer = weights.layer
        scan.weights.l1 = weights.l1
        with nogil:
            for i in range(m):
                queries[i].text = text[i]
                queries[i].keys = keys[i]
                queries[i].subject = subjects[i]
                queries[i].layers = layers[i]
                queries[i].exclude = exclude[i]
                if record[i] >= 0:
                    queries[i].record = &pool[record[i]]
                if has_vector[i]:
                    queries[i].vector = &vectors[i, 0]
                    queries[i].codes = codes + i * stride
                    lost = km_quantize_query(
                        &vectors[i, 0], dim, stride, codes + i * stride, &queries[i].step, &queries[i].bias
                    )
                    worst = max(worst, lost)
                    if wants_l1:
                        queries[i].graded = graded + i * 256 * stride
                        km_grade_query(&vectors[i, 0], dim, stride, graded + i * 256 * stride)
            scan.isa = self.isa
            scan.pool = self.pool
            scan.segments = view.segments
            scan.segment_count = view.count
            if selective:
                scan.segments = chosen
                scan.segment_count = 0
                for s in range(view.count):
                    if select[s] != 0:
                        chosen[scan.segment_count] = view.segments[s]
                        chosen[scan.segment_count].apart = select[s] == 2
                        scan.segment_count += 1
            scan.live = &live[0] if live.shape[0] > 0 else NULL
            scan.dim = dim
            scan.stride = stride
            scan.queries = queries
            scan.query_count = m
            scan.k = k
            scan.weights.margin = margin + 1.01 * worst if margin > 0 else 0
            failed = km_scan_run(&scan, hits, &counts[0]) if m > 0 and k > 0 else 0
            if not failed:
                if rescore and m > 0 and k > 0:
                    km_rescore(&scan, hits, &counts[0])
                for i in range(m):
                    for j in range(counts[i]):
                        slots[i, j] = hits[i * k + j].slot
                        fused[i, j] = hits[i * k + j].fused
                        cosine[i, j] = hits[i * k + j].cosine
                        opposed[i, j] = hits[i * k + j].opposed
            free(chosen)
            free(queries)
            free(codes)
            free(hits)
            free(graded)
        if failed:
            raise MemoryError
        return worst

    def sift(
        self,
        View view,
        const uint64_t[::1] live,
        const float[:, ::1] vectors,
        const uint8_t[::1] has_vector,
        const uint32_t[::1] text,
        const int64_t[::1] exclude,
        const int8_t[:, ::1] short_codes,
        const float[::1] short_steps,
        const float[::1] short_rest,
        const int8_t[:, :, :, ::1] centres,
        const float[::1] spread,
        const uint8_t[::1] kinds,
        const int64_t[::1] starts,
        const int8_t[:, :, :, ::1] codes,
        const uint8_t[::1] rest,
        const uint32_t[::1] row_slots,
        weights,
        int64_t stride,
        float margin,
        float row_slack,
        float cell_slack,
        bint rescore,
        int64_t[:, ::1] slots,
        float[:, ::1] fused,
        float[:, ::1] cosine,
        int64_t[::1] counts,
        int64_t[::1] read,
    ):
        cdef int64_t i, j, m = slots.shape[0], k = slots.shape[1], dim = vectors.shape[1]
        cdef km_scan scan
        cdef km_sieve sieve
        cdef km_query *queries = NULL
        cdef km_short *shorts = NULL
        cdef int8_t *full = NULL
        cdef km_hit *hits = NULL
        cdef float worst = 0
        cdef int failed = -1
        if m == 0 or starts[spread.shape[0]] == 0:
            return
        scan.weights.min_related = weights.min_related
        scan.weights.threshold = weights.threshold
        scan.weights.flag = weights.flag
        scan.weights.layer = 0
        scan.weights.l1 = 0
        sieve.dims = short_codes.shape[1]
        sieve.cells = spread.shape[0]
        sieve.centres = &centres[0, 0, 0, 0]
        sieve.spread = &spread[0]
        sieve.kinds = &kinds[0]
        sieve.starts = &starts[0]
        sieve.codes = &codes[0, 0, 0, 0]
        sieve.rest = &rest[0]
        sieve.slots = &row_slots[0]
        with nogil:
            queries = <km_query *>calloc(m, sizeof(km_query))
            shorts = <km_short *>calloc(m, sizeof(km_short))
            full = <int8_t *>aligned_alloc(64, m * stride)
            hits = <km_hit *>malloc(m * k * sizeof(km_hit))
            if queries != NULL and shorts != NULL and full != NULL and hits != NULL:
                for i in range(m):
                    queries[i].text = text[i]
                    queries[i].exclude = exclude[i]
                    shorts[i].codes = &short_codes[i, 0]
                    shorts[i].step = short_steps[i]
                    shorts[i].rest = short_rest[i]
                    if has_vector[i]:
                        queries[i].vector = &vectors[i, 0]
                        queries[i].codes = full + i * stride
                        worst = max(worst, km_quantize_query(
                            &vectors[i, 0], dim, stride, full + i * stride, &queries[i].step, &queries[i].bias
                        ))
                scan.isa = self.isa
                scan.pool = self.pool
                scan.segments = view.segments
                scan.segment_count = view.count
                scan.live = &live[0]
                scan.dim = dim
                scan.stride = stride
                scan.queries = queries
                scan.query_count = m
                scan.k = k
                scan.weights.margin = margin + 1.01 * worst if margin > 0 else 0
                failed = km_sieve_run(&scan, &sieve, shorts, row_slack, cell_slack, hits, &counts[0], &read[0])
                if not failed:
                    if rescore:
                        km_rescore(&scan, hits, &counts[0])
                    for i in range(m):
                        for j in range(counts[i]):
                            slots[i, j] = hits[i * k + j].slot
                            fused[i, j] = hits[i * k + j].fused
                            cosine[i, j] = hits[i * k + j].cosine
            free(queries)
            free(shorts)
            free(full)
            free(hits)
        if failed:
            raise MemoryError

    def pair_head(
        self,
        const float[::1] query,
        const float[:, ::1] rows,
        const float[:, ::1] extra,
        const float[:, ::1] w1,
        const float[::1] b1,
        const float[::1] w2,
        float b2,
        float[::1] out,
    ):
        cdef int64_t n = rows.shape[0], dim = rows.shape[1], extras = extra.shape[1], hidden = w1.shape[0]
        cdef const float *more = &extra[0, 0] if extras > 0 and n > 0 else NULL
        cdef int failed
        if n == 0:
            return
        with nogil:
            failed = km_pair_head(
                self.isa, &query[0], &rows[0, 0], n, dim, more, extras, &w1[0, 0], &b1[0], &w2[0], b2, hidden, &out[0]
            )
        if failed:
            raise MemoryError

    def match(
        self,
        const float[::1] vector,
        const float[:, ::1] rows,
        const float[::1] thresholds,
        int64_t[::1] indices,
        float[::1] cosines,
    ):
        cdef int64_t n = rows.shape[0], found
        if n == 0:
            return 0
        with nogil:
            found = km_match(
                self.isa, &vector[0], &rows[0, 0], n, rows.shape[1], &thresholds[0], &indices[0], &cosines[0]
            )
        return found


def read_all(const uint8_t[::1] data):
    """The sum of a buffer read once: the yardstick of the benchmarks."""
    cdef uint64_t total
    with nogil:
        total = km_variant(0).read(&data[0], data.shape[0])
    return total
