"""The same bytes to many sockets: one pass of ``send`` without the GIL, and the transport for whatever the kernel does not take.

It bypasses a transport only while nothing is buffered in it and it is not closing, so the order of bytes on each connection is
that of the writes. The descriptor cannot have been reused: a transport that has let go of it is closing, which is asked for in
the same breath, with no turn of the event loop in between.
"""

from libc.errno cimport EAGAIN, EINTR, errno
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
    """Write ``frames`` to every handle.

    A handle with ``fd`` >= 0 has a ``transport``; the others are written to through their ``write``.
    """
    cdef Py_ssize_t count = len(handles), direct = 0, i
    cdef size_t size = len(frames)
    cdef const char *data = frames
    cdef int *fds
    cdef ssize_t *sent
    cdef list straight
    cdef object handle, transport
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
            fd = handle.fd
            if fd >= 0 and not handle.closing:
                transport = handle.transport
                if not transport.get_write_buffer_size() and not transport.is_closing():
                    fds[direct] = fd
                    direct += 1
                    straight.append(transport)
                    continue
            handle.write(frames)
        with nogil:
            send_all(fds, sent, direct, data, size)
        for i in range(direct):
            if sent[i] < 0:
                # Writing through the transport makes it meet the same error and close in its own way.
                straight[i].write(frames)
            elif <size_t> sent[i] < size:
                straight[i].write(frames[sent[i]:])
    finally:
        free(fds)
        free(sent)
