"""A thin typed face over the transformer in C. It assumes what ``kimera_stream.kernels.transformer`` has checked."""

from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy

cdef extern from "transformer.h" nogil:
    ctypedef struct xf_linear:
        float limit
    ctypedef struct xf_layer:
        xf_linear attend
        xf_linear output
        xf_linear widen
        xf_linear narrow
        float *attention_norm
        float *output_norm
    ctypedef struct xf_model:
        int64_t width
        int64_t heads
        int64_t inner
        int64_t layers
        float *norm
        const float *tables[4]
        xf_layer *layer
    ctypedef struct xf_isa:
        const char *name
    int xf_variant_count()
    const xf_isa *xf_variant(int index)
    xf_model *xf_model_new(int64_t width, int64_t heads, int64_t inner, int64_t layers, float epsilon)
    void xf_model_free(xf_model *model)
    int xf_pack(xf_linear *linear, const float *weights, const float *bias, int64_t out, int64_t inputs)
    int xf_forward(const xf_model *model, const xf_isa *isa, void *pool, int threads, const int32_t *ids,
                   int64_t total, const int64_t *starts, int64_t count, float *mean, float *first)

cdef extern from "kimera.h" nogil:
    ctypedef struct km_pool:
        pass
    km_pool *km_pool_new(int threads)
    void km_pool_free(km_pool *pool)


def variants():
    """Names of the instruction sets this machine can run, best first."""
    return tuple(xf_variant(i).name.decode() for i in range(xf_variant_count()))


cdef class Network:
    """A model; weights are given once, layer by layer."""

    cdef xf_model *model
    cdef const xf_isa *isa
    cdef km_pool *pool
    cdef int threads
    cdef list kept

    def __cinit__(self, int64_t width, int64_t heads, int64_t inner, int64_t layers, float epsilon, str variant, int threads):
        cdef int i
        self.isa = NULL
        for i in range(xf_variant_count()):
            if xf_variant(i).name.decode() == variant:
                self.isa = xf_variant(i)
        if self.isa == NULL:
            raise ValueError(f"variant: this machine cannot run {variant!r}")
        self.kept = []
        self.threads = threads
        self.model = xf_model_new(width, heads, inner, layers, epsilon)
        self.pool = km_pool_new(threads)
        if self.model == NULL or self.pool == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.pool != NULL:
            km_pool_free(self.pool)
        xf_model_free(self.model)

    def table(self, int number, const float[:, ::1] rows):
        """Keep a table of embeddings; its memory is not copied."""
        self.kept.append(rows)
        self.model.tables[number] = &rows[0, 0]

    def norm(self, int64_t layer, int which, const float[::1] weight, const float[::1] bias):
        """A layer norm: of the embeddings (layer -1), after attention (which 0), after the inner projection (1)."""
        cdef float *to = self.model.norm
        if layer >= 0:
            to = self.model.layer[layer].output_norm if which else self.model.layer[layer].attention_norm
        memcpy(to, &weight[0], self.model.width * sizeof(float))
        memcpy(to + self.model.width, &bias[0], self.model.width * sizeof(float))

    def linear(self, int64_t layer, int which, const float[:, ::1] weight, const float[::1] bias):
        """Pack a projection: attend (0), output, widen, narrow (3)."""
        cdef xf_layer *to = &self.model.layer[layer]
        cdef xf_linear *into = &to.attend
        cdef int failed
        if which == 1:
            into = &to.output
        elif which == 2:
            into = &to.widen
        elif which == 3:
            into = &to.narrow
        with nogil:
            failed = xf_pack(into, &weight[0, 0], &bias[0], weight.shape[0], weight.shape[1])
        if failed:
            raise MemoryError

    def forward(self, const int32_t[:, ::1] ids, const int64_t[::1] starts, float[:, ::1] mean, first):
        """Fill mean (and first, unless None), one row per sequence."""
        cdef float[:, ::1] rows
        cdef float *other = NULL
        cdef int64_t count = starts.shape[0] - 1
        cdef int failed
        if count == 0:
            return
        if first is not None:
            rows = first
            other = &rows[0, 0]
        with nogil:
            failed = xf_forward(self.model, self.isa, self.pool, self.threads, &ids[0, 0], ids.shape[1], &starts[0],
                                count, &mean[0, 0], other)
        if failed:
            raise MemoryError
