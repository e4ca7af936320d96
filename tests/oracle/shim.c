/* What a disk and a clock may do to a process, switched on and off from outside: preloaded, reads a mapped file.
 *
 *   delay     milliseconds that fsync and fdatasync take longer, looked at while they last; -1: they do nothing
 *   full      writes that would make a file below `folder` differ fail with ENOSPC, the first of them after half of it
 *   readonly  whatever would change something below `folder` fails with EROFS, as after a file system was remounted under a process
 *   eio       fsync and fdatasync fail with EIO
 *   jump      milliseconds by which the time of day differs (the monotonic clock never does)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
    volatile int32_t delay;
    volatile int32_t full;
    volatile int32_t eio;
    volatile int32_t refused; /* written by us: how many calls have been made to fail */
    volatile int64_t jump;
    volatile int32_t delayed; /* written by us: how many syncs have been held up */
    volatile int32_t halves;  /* written by us: writes torn in half */
    volatile int32_t readonly;
    int32_t spare;
    char folder[4096];
};

static struct control *control;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static __typeof__(&clock_gettime) real_clock_gettime;
static __typeof__(&gettimeofday) real_gettimeofday;
static __typeof__(&write) real_write;
static __typeof__(&fsync) real_fsync;
static __typeof__(&fdatasync) real_fdatasync;
static __typeof__(&pwrite64) real_pwrite64;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("ORACLE_SHIM");
    real_clock_gettime = REAL(clock_gettime);
    real_gettimeofday = REAL(gettimeofday);
    real_write = REAL(write);
    real_fsync = REAL(fsync);
    real_fdatasync = REAL(fdatasync);
    real_pwrite64 = REAL(pwrite64);
    if (path == NULL)
        return;
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0)
        return;
    void *mapped = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (mapped != MAP_FAILED)
        control = mapped;
}

static int below(const char *path) {
    return path != NULL && strncmp(path, control->folder, strlen(control->folder)) == 0;
}

/* Whether the disk is full, or read-only, for this file. */
static int full(int file) {
    char name[64], path[PATH_MAX];
    if (control == NULL || (!control->full && !control->readonly))
        return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    int saved = errno;
    ssize_t length = readlink(name, path, sizeof path - 1);
    errno = saved;
    if (length <= 0)
        return 0;
    path[length] = 0;
    return below(path);
}

static ssize_t refuse(void) {
    __sync_fetch_and_add(&control->refused, 1);
    errno = control->readonly ? EROFS : ENOSPC;
    return -1;
}

/* Whether nothing may be changed at this path. */
static int frozen(const char *path) { return control != NULL && control->readonly && below(path); }

/* The first write after the disk filled up still finds room for half of it. */
static size_t room(size_t count) {
    if (count > 1 && __sync_bool_compare_and_swap(&control->full, 1, 2)) {
        __sync_fetch_and_add(&control->halves, 1);
        return count / 2;
    }
    return 0;
}

ssize_t write(int file, const void *data, size_t count) {
    if (full(file)) {
        size_t some = room(count);
        return some ? real_write(file, data, some) : refuse();
    }
    return real_write(file, data, count);
}

ssize_t pwrite64(int file, const void *data, size_t count, off64_t at) {
    if (full(file)) {
        size_t some = room(count);
        return some ? real_pwrite64(file, data, some, at) : refuse();
    }
    return real_pwrite64(file, data, count, at);
}

ssize_t pwrite(int file, const void *data, size_t count, off_t at) { return pwrite64(file, data, count, at); }

ssize_t pwritev(int file, const struct iovec *parts, int count, off_t at) {
    return full(file) ? refuse() : REAL(pwritev)(file, parts, count, at);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    return full(file) ? refuse() : REAL(writev)(file, parts, count);
}

int ftruncate64(int file, off64_t length) {
    if (full(file) && (control->readonly || lseek64(file, 0, SEEK_END) < length))
        return (int)refuse();
    return REAL(ftruncate64)(file, length);
}

int ftruncate(int file, off_t length) { return ftruncate64(file, length); }

int posix_fallocate(int file, off_t at, off_t length) {
    if (full(file)) {
        refuse();
        return errno;
    }
    return REAL(posix_fallocate)(file, at, length);
}

int fallocate(int file, int mode, off_t at, off_t length) {
    return full(file) ? (int)refuse() : REAL(fallocate)(file, mode, at, length);
}

#define OPEN(name, before, ...)                                                                                         \
    int name(before const char *path, int flags, ...) {                                                                \
        mode_t mode = 0;                                                                                               \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                                           \
            va_list rest;                                                                                              \
            va_start(rest, flags);                                                                                     \
            mode = va_arg(rest, mode_t);                                                                               \
            va_end(rest);                                                                                              \
        }                                                                                                              \
        if (frozen(path) && ((flags & O_ACCMODE) != O_RDONLY || ((flags & O_CREAT) && access(path, F_OK) != 0)))       \
            return (int)refuse();                                                                                      \
        return REAL(name)(__VA_ARGS__ path, flags, mode);                                                              \
    }
#define OF folder,
#define NOTHING
OPEN(open, NOTHING, NOTHING)
OPEN(open64, NOTHING, NOTHING)
#define FOLDER int folder,
OPEN(openat, FOLDER, OF)
OPEN(openat64, FOLDER, OF)

int unlink(const char *path) { return frozen(path) ? (int)refuse() : REAL(unlink)(path); }

int rename(const char *from, const char *to) {
    return frozen(from) || frozen(to) ? (int)refuse() : REAL(rename)(from, to);
}

int mkdir(const char *path, mode_t mode) { return frozen(path) ? (int)refuse() : REAL(mkdir)(path, mode); }

static int disturbed(void) {
    if (control == NULL)
        return 0;
    if (control->delay > 0) {
        struct timespec step = {0, 5000000L};
        __sync_fetch_and_add(&control->delayed, 1);
        for (int32_t slept = 0; slept < control->delay; slept += 5)
            nanosleep(&step, NULL);
    }
    if (control->eio > 0) {
        __sync_fetch_and_add(&control->refused, 1);
        errno = EIO;
        return -1;
    }
    return 0;
}

static int left_out(void) { return control != NULL && control->delay < 0; }

int fsync(int file) { return disturbed() ? -1 : left_out() ? 0 : real_fsync(file); }

int fdatasync(int file) { return disturbed() ? -1 : left_out() ? 0 : real_fdatasync(file); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (real_clock_gettime == NULL)
        real_clock_gettime = REAL(clock_gettime);
    int result = real_clock_gettime(clock, now);
    if (result == 0 && control != NULL && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t jump = control->jump;
        int64_t nanos = now->tv_nsec + (jump % 1000) * 1000000;
        now->tv_sec += jump / 1000;
        if (nanos >= 1000000000) {
            nanos -= 1000000000;
            now->tv_sec += 1;
        } else if (nanos < 0) {
            nanos += 1000000000;
            now->tv_sec -= 1;
        }
        now->tv_nsec = nanos;
    }
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    if (real_gettimeofday == NULL)
        real_gettimeofday = REAL(gettimeofday);
    if (now == NULL)
        return real_gettimeofday(now, zone);
    if (clock_gettime(CLOCK_REALTIME, &exact) != 0)
        return -1;
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (out != NULL)
        *out = exact.tv_sec;
    return exact.tv_sec;
}
