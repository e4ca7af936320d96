"""The same bytes to many sockets: one pass of ``send`` without the GIL, and the transport for whatever the kernel does not take.

It bypasses a transport only while nothing is buffered in it, so the order of bytes on each connection is that of the writes. The
descriptor is the connection's own: event loops close it after they have called ``connection_lost``, which sets ``closing``.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free, malloc

cdef extern from *:
    """
    #include <sys/socket.h>
    #ifndef MSG_NOSIGNAL  /* macOS has a socket option instead, which Python's sockets have set */
    #define MSG_NOSIGNAL 0
    #endif
    """

cdef extern from "sys/socket.h" nogil:
    ssize_t c_send "send"(int fd, const void *data, size_t size, int flags)
    int MSG_NOSIGNAL
    int MSG_DONTWAIT

cdef extern from "framing.h" nogil:
    int KM_WHOLE, KM_MISSING
    ctypedef struct km_framed:
        int64_t size
        int64_t count
        uint64_t first
        uint64_t last
    void km_init_crc()
    int64_t km_frame_bound(const uint8_t *packed, int64_t size, int64_t head_size)
    int km_frame_records(const uint8_t *packed, int64_t size, const uint8_t *head, int64_t head_size, uint8_t *out,
                         km_framed *framed)


km_init_crc()


cdef class Sink:
    """What ``fan_out`` needs to know of a connection. See ``kimera_stream.kernels.egress``."""

    cdef public int fd
    cdef public bint closing
    cdef public bint dirty
    cdef public object transport

    def __init__(self, transport, int fd):
        self.transport = transport
        self.fd = fd
        self.closing = False
        self.dirty = True


cdef void send_all(const int *fds, ssize_t *sent, Py_ssize_t count, const char *data, size_t size) noexcept nogil:
    """``sent[i]``: bytes taken of connection i; -1: it failed, which its transport will find out for itself."""
    cdef Py_ssize_t i
    cdef ssize_t got
    for i in range(count):
        got = c_send(fds[i], data, size, MSG_NOSIGNAL | MSG_DONTWAIT)
        while got < 0 and errno == EINTR:
            got = c_send(fds[i], data, size, MSG_NOSIGNAL | MSG_DONTWAIT)
        if got < 0 and errno == EAGAIN:
            got = 0
        sent[i] = got


def fan_out(list handles, bytes frames):
    """Write ``frames`` to every handle; those that are not a ``Sink`` through their own ``write``."""
    cdef Py_ssize_t count = len(handles), direct = 0, i
    cdef size_t size = len(frames)
    cdef const char *data = frames
    cdef int *fds
    cdef ssize_t *sent
    cdef list straight
    cdef Sink sink
    if not count or not size:
        return
    fds = <int *> malloc(count * sizeof(int))
    sent = <ssize_t *> malloc(count * sizeof(ssize_t))
    if fds == NULL or sent == NULL:
        free(fds)
        free(sent)
        raise MemoryError
    try:
        straight = []
        for handle in handles:
            if not isinstance(handle, Sink):
                handle.write(frames)
                continue
            sink = <Sink> handle
            if sink.closing:
                continue
            if sink.dirty:
                if sink.fd < 0 or sink.transport.get_write_buffer_size() or sink.transport.is_closing():
                    handle.write(frames)
                    continue
                sink.dirty = False
            fds[direct] = sink.fd
            direct += 1
            straight.append(sink)
        with nogil:
            send_all(fds, sent, direct, data, size)
        for i in range(direct):
            # After a failure too: the transport meets the same error, and closes in its own way.
            if sent[i] < 0 or <size_t> sent[i] < size:
                sink = <Sink> straight[i]
                sink.dirty = True
                sink.transport.write(frames if sent[i] <= 0 else frames[sent[i]:])
    finally:
        free(fds)
        free(sent)


def frame_records(bytes packed, bytes head):
    """(frames, count, first, last), or (None, whether it is missing, 0, offset) for the first record that is not whole."""
    cdef int64_t size = len(packed), head_size = len(head), bound
    cdef const uint8_t *data = <const uint8_t *><const char *>packed
    cdef const uint8_t *start = <const uint8_t *><const char *>head
    cdef km_framed framed
    cdef uint8_t *out
    cdef int state
    with nogil:
        bound = km_frame_bound(data, size, head_size)
        out = <uint8_t *>malloc(bound)
    if out == NULL:
        raise MemoryError
    try:
        with nogil:
            state = km_frame_records(data, size, start, head_size, out, &framed)
        if state != KM_WHOLE:
            return None, state == KM_MISSING, 0, framed.last
        return PyBytes_FromStringAndSize(<const char *>out, framed.size), framed.count, framed.first, framed.last
    finally:
        free(out)
