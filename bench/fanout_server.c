/* The limit of bench/fanout.py: a single-threaded epoll server that writes pre-framed bytes and does nothing else.
 *
 * Prints its port. On stdin "push B SECONDS RATE OFFSET FILTERS": B events a tick, as fast as back-pressure allows (RATE 0) or
 * RATE events a second. A tick goes to everyone before the next begins, and no event is ever dropped. With FILTERS > 1 subscriber i
 * gets the events with offset % FILTERS == i % FILTERS. Answers {"events","seconds","cpu","last"}.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define MAX_PEERS 20000
#define MAX_FILTERS 64

static int listener, epfd, count, fds[MAX_PEERS];
static const char accepted[] =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static double cpu(void) {
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    return (double)use.ru_utime.tv_sec + (double)use.ru_stime.tv_sec + (double)(use.ru_utime.tv_usec + use.ru_stime.tv_usec) / 1e6;
}

static void serve(int timeout) {
    struct epoll_event events[256];
    int n = epoll_wait(epfd, events, 256, timeout);
    for (int e = 0; e < n; e++) {
        int fd = events[e].data.fd;
        if (fd == listener) {
            for (;;) {
                int fresh = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
                if (fresh < 0) break;
                int one = 1;
                setsockopt(fresh, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                struct epoll_event ev = {.events = EPOLLIN, .data.fd = fresh};
                epoll_ctl(epfd, EPOLL_CTL_ADD, fresh, &ev);
            }
        } else if (fd != 0) {
            char buf[4096];
            ssize_t got = recv(fd, buf, sizeof buf, 0);
            if (got <= 0) {
                if (got == 0 || errno != EAGAIN) close(fd);
            } else if (memmem(buf, (size_t)got, "\r\n\r\n", 4)) {
                char *number = memmem(buf, (size_t)got, "?i=", 3);
                int i = number ? atoi(number + 3) : count;
                if (i < MAX_PEERS && send(fd, accepted, sizeof accepted - 1, MSG_NOSIGNAL) > 0) {
                    fds[i] = fd;
                    count++;
                }
            }
        }
    }
}

static void write_all(int fd, const uint8_t *data, size_t n) {
    while (n) {
        ssize_t sent = send(fd, data, n, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno != EAGAIN) return;
            struct epoll_event ev = {.events = EPOLLOUT, .data.fd = fd}, got;
            int waiter = epoll_create1(0);
            epoll_ctl(waiter, EPOLL_CTL_ADD, fd, &ev);
            epoll_wait(waiter, &got, 1, 1000);
            close(waiter);
        } else {
            data += sent;
            n -= (size_t)sent;
        }
    }
}

static size_t event(uint8_t *out, uint64_t offset, int size) {
    char text[1024];
    int n = snprintf(text, sizeof text,
                     "{\"op\":\"event\",\"channel\":\"geoids\",\"epoch\":\"bench\",\"offset\":%lu,\"type\":\"geoid.created\",\"ts\":1700000000000,"
                     "\"data\":{\"t\":%lu,\"pad\":\"",
                     offset, now_ns());
    while (n < size - 3) text[n++] = 'x';
    memcpy(text + n, "\"}}", 3);
    n += 3;
    out[0] = 0x81;
    if (n < 126) {
        out[1] = (uint8_t)n;
        memcpy(out + 2, text, (size_t)n);
        return 2 + (size_t)n;
    }
    out[1] = 126;
    out[2] = (uint8_t)(n >> 8);
    out[3] = (uint8_t)n;
    memcpy(out + 4, text, (size_t)n);
    return 4 + (size_t)n;
}

static void push(int batch, double seconds, double rate, uint64_t offset, int filters) {
    static uint8_t data[MAX_FILTERS][1 << 16];
    size_t sizes[MAX_FILTERS];
    uint64_t begun = now_ns(), events = 0;
    double used = cpu();
    while ((double)(now_ns() - begun) / 1e9 < seconds) {
        if (rate > 0) {
            double due = (double)events / rate, at = (double)(now_ns() - begun) / 1e9;
            if (due > at) {
                struct timespec nap = {.tv_nsec = (long)((due - at) * 1e9)};
                nanosleep(&nap, NULL);
            }
        }
        memset(sizes, 0, sizeof sizes);
        for (int b = 0; b < batch; b++) {
            int which = (int)(offset % (uint64_t)filters);
            sizes[which] += event(data[which] + sizes[which], offset++, 200);
        }
        events += (uint64_t)batch;
        for (int i = 0; i < count; i++)
            if (sizes[i % filters]) write_all(fds[i], data[i % filters], sizes[i % filters]);
    }
    printf("{\"events\":%lu,\"seconds\":%.6f,\"cpu\":%.6f,\"last\":%lu}\n", events, (double)(now_ns() - begun) / 1e9, cpu() - used, offset - 1);
    fflush(stdout);
}

int main(void) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_ANY)};
    socklen_t size = sizeof at;
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (bind(listener, (struct sockaddr *)&at, size) < 0 || listen(listener, 4096) < 0) return 1;
    getsockname(listener, (struct sockaddr *)&at, &size);
    printf("%d\n", ntohs(at.sin_port));
    fflush(stdout);
    epfd = epoll_create1(0);
    struct epoll_event ev = {.events = EPOLLIN, .data.fd = listener}, in = {.events = EPOLLIN, .data.fd = 0};
    epoll_ctl(epfd, EPOLL_CTL_ADD, listener, &ev);
    epoll_ctl(epfd, EPOLL_CTL_ADD, 0, &in);
    fcntl(0, F_SETFL, fcntl(0, F_GETFL) | O_NONBLOCK);
    char line[256];
    for (;;) {
        serve(100);
        ssize_t got = read(0, line, sizeof line - 1);
        if (got == 0) return 0;
        if (got > 0) {
            int batch, filters;
            double seconds, rate;
            uint64_t offset;
            line[got] = 0;
            if (sscanf(line, "push %d %lf %lf %lu %d", &batch, &seconds, &rate, &offset, &filters) == 5)
                push(batch, seconds, rate, offset, filters);
        }
    }
}
