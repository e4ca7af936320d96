/* Load client of bench/fanout.py: N WebSocket subscribers in one epoll loop, each checked for order, gaps and repeats.
 *
 *   fanout_client PORT N FILTERS HELLO
 *
 * HELLO is sent as a masked text frame after each handshake, "%d" replaced by the subscriber's number modulo FILTERS; empty:
 * nothing is sent. Prints "ready" once every handshake is done and every HELLO answered. Events are text frames that start
 * with {"op":"event" and hold "offset":N and "t":NANOSECONDS (CLOCK_MONOTONIC). With FILTERS > 1 subscriber i expects exactly
 * the offsets with offset % FILTERS == i % FILTERS. On stdin "reset F" expects offset F next, "until L" ends the run once every
 * subscriber has seen its last offset <= L, and a line of JSON says what was counted.
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

#define BUCKETS 4000 /* of 50 us: latencies up to 0.2 s, the last one takes the rest */

typedef struct {
    int fd, state; /* 0 connecting, 1 handshake, 2 waits for the reply, 3 subscribed, 4 gone */
    uint64_t next; /* the offset expected next */
    size_t have, cap;
    uint8_t *buf;
} peer;

static int count, filters, epfd, ready, finished, told;
static const char *hello;
static peer *peers;
static uint64_t deliveries, bytes, wrong, lost, until, first_ns, last_ns;
static uint32_t histogram[BUCKETS];
static uint64_t latency_max;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t aligned(uint64_t offset, int i) {
    uint64_t want = (uint64_t)(i % filters);
    while (offset % (uint64_t)filters != want) offset++;
    return offset;
}

static void send_hello(peer *p, int i) {
    char text[2048];
    uint8_t frame[2100];
    int n = snprintf(text, sizeof text, hello, i % filters);
    size_t at = 0;
    frame[at++] = 0x81;
    if (n < 126) frame[at++] = 0x80 | (uint8_t)n;
    else {
        frame[at++] = 0x80 | 126;
        frame[at++] = (uint8_t)(n >> 8);
        frame[at++] = (uint8_t)n;
    }
    memset(frame + at, 0, 4); /* a mask of zeros is a mask */
    at += 4;
    memcpy(frame + at, text, (size_t)n);
    if (send(p->fd, frame, at + (size_t)n, MSG_NOSIGNAL) < 0) die("send hello");
}

static void on_ready(peer *p) {
    p->state = 3;
    if (++ready == count) {
        printf("ready\n");
        fflush(stdout);
    }
}

static uint64_t number_after(const uint8_t *text, size_t n, const char *key, size_t key_n) {
    const uint8_t *at = memmem(text, n, key, key_n);
    uint64_t value = 0;
    if (!at) return UINT64_MAX;
    for (at += key_n; at < text + n && *at >= '0' && *at <= '9'; at++) value = value * 10 + (uint64_t)(*at - '0');
    return value;
}

static void on_message(peer *p, int i, const uint8_t *text, size_t n, uint64_t now) {
    if (n < 14 || memcmp(text, "{\"op\":\"event\"", 13) != 0) {
        if (p->state == 2) on_ready(p);
        return;
    }
    uint64_t offset = number_after(text, n < 120 ? n : 120, "\"offset\":", 9);
    uint64_t step = (uint64_t)filters;
    if (offset != p->next) {
        if (wrong++ < 5) fprintf(stderr, "subscriber %d expected %lu, got %lu\n", i, p->next, offset);
        if (offset > p->next) lost += (offset - p->next) / step;
    }
    if (until && p->next <= until && offset + step > until) finished++;
    p->next = offset + step;
    if (!first_ns) first_ns = now;
    last_ns = now;
    deliveries++;
    bytes += n;
    uint64_t t = number_after(text, n, "\"t\":", 4);
    if (t != UINT64_MAX) {
        uint64_t late = now > t ? now - t : 0, bucket = late / 50000;
        histogram[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
        if (late > latency_max) latency_max = late;
    }
}

static void gone(peer *p, int i) {
    if (p->state == 4) return;
    if (told++ < 5) fprintf(stderr, "subscriber %d was disconnected\n", i);
    if (p->state < 3) exit(1); /* never ready: nothing can be measured */
    p->state = 4;
    close(p->fd);
    wrong++;
}

static void on_bytes(peer *p, int i) {
    if (p->state == 4) return;
    for (int round = 0; round < 4; round++) {
        if (p->cap - p->have < 65536) {
            p->cap = p->have + 131072;
            p->buf = realloc(p->buf, p->cap);
        }
        ssize_t got = recv(p->fd, p->buf + p->have, p->cap - p->have, 0);
        if (got < 0) {
            if (errno == EAGAIN) return;
            gone(p, i);
            return;
        }
        if (got == 0) {
            gone(p, i);
            return;
        }
        size_t room = p->cap - p->have;
        p->have += (size_t)got;
        size_t at = 0;
        if (p->state == 1) {
            uint8_t *end = memmem(p->buf, p->have, "\r\n\r\n", 4);
            if (!end) continue;
            if (memcmp(p->buf, "HTTP/1.1 101", 12) != 0) {
                fprintf(stderr, "handshake refused: %.60s\n", p->buf);
                exit(1);
            }
            at = (size_t)(end - p->buf) + 4;
            if (*hello) {
                p->state = 2;
                send_hello(p, i);
            } else on_ready(p);
        }
        uint64_t now = now_ns();
        while (p->have - at >= 2) {
            size_t size = p->buf[at + 1] & 127, head = 2;
            if (size == 126) {
                if (p->have - at < 4) break;
                size = (size_t)p->buf[at + 2] << 8 | p->buf[at + 3];
                head = 4;
            } else if (size == 127) {
                if (p->have - at < 10) break;
                size = 0;
                for (int b = 2; b < 10; b++) size = size << 8 | p->buf[at + (size_t)b];
                head = 10;
            }
            if (p->have - at < head + size) break;
            uint8_t opcode = p->buf[at] & 15;
            if (opcode == 1) on_message(p, i, p->buf + at + head, size, now);
            else if (opcode == 8) {
                if (told < 5) fprintf(stderr, "subscriber %d was closed with %d\n", i, size >= 2 ? p->buf[at + head] << 8 | p->buf[at + head + 1] : 0);
                gone(p, i);
                return;
            } else if (opcode == 9) {
                uint8_t pong[131] = {0x8a, (uint8_t)(0x80 | size), 0, 0, 0, 0};
                memcpy(pong + 6, p->buf + at + head, size < 125 ? size : 125);
                if (send(p->fd, pong, 6 + size, MSG_NOSIGNAL) < 0) gone(p, i);
            }
            at += head + size;
        }
        memmove(p->buf, p->buf + at, p->have - at);
        p->have -= at;
        if ((size_t)got < room) return;
    }
}

static void start(int i, int port) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    inet_pton(AF_INET, i < 25000 ? "127.0.0.1" : "127.0.0.2", &to.sin_addr);
    peer *p = &peers[i];
    p->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (p->fd < 0) die("socket");
    int one = 1;
    setsockopt(p->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(p->fd, (struct sockaddr *)&to, sizeof to) < 0 && errno != EINPROGRESS) die("connect");
    struct epoll_event ev = {.events = EPOLLIN | EPOLLOUT, .data.u32 = (uint32_t)i};
    epoll_ctl(epfd, EPOLL_CTL_ADD, p->fd, &ev);
}

static double quantile(double q) {
    uint64_t total = 0, seen = 0;
    for (int i = 0; i < BUCKETS; i++) total += histogram[i];
    for (int i = 0; i < BUCKETS; i++) {
        seen += histogram[i];
        if (seen >= q * (double)total && seen) return (i + 0.5) * 0.05;
    }
    return 0;
}

static void report(uint64_t begun) {
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    printf("{\"deliveries\":%lu,\"bytes\":%lu,\"wrong\":%lu,\"lost\":%lu,\"seconds\":%.6f,\"from_reset\":%.6f,\"p50_ms\":%.3f,\"p99_ms\":%.3f,"
           "\"max_ms\":%.3f,\"cpu\":%.3f}\n",
           deliveries, bytes, wrong, lost, (double)(last_ns - first_ns) / 1e9, (double)(last_ns - begun) / 1e9, quantile(0.5), quantile(0.99),
           (double)latency_max / 1e6, (double)use.ru_utime.tv_sec + (double)use.ru_stime.tv_sec + (double)(use.ru_utime.tv_usec + use.ru_stime.tv_usec) / 1e6);
    fflush(stdout);
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    int port = atoi(argv[1]);
    count = atoi(argv[2]);
    filters = atoi(argv[3]);
    hello = argv[4];
    peers = calloc((size_t)count, sizeof *peers);
    epfd = epoll_create1(0);
    struct epoll_event in = {.events = EPOLLIN, .data.u32 = UINT32_MAX}, events[512];
    epoll_ctl(epfd, EPOLL_CTL_ADD, 0, &in);
    int started = 0;
    uint64_t begun = now_ns();
    fcntl(0, F_SETFL, fcntl(0, F_GETFL) | O_NONBLOCK);
    char line[256];
    size_t line_n = 0;
    for (;;) {
        while (started < count && started - ready < 128) start(started++, port);
        int n = epoll_wait(epfd, events, 512, 1000);
        for (int e = 0; e < n; e++) {
            if (events[e].data.u32 == UINT32_MAX) {
                ssize_t got = read(0, line + line_n, sizeof line - 1 - line_n);
                if (got == 0) return 0;
                if (got < 0) continue;
                line_n += (size_t)got;
                line[line_n] = 0;
                char *end;
                while ((end = strchr(line, '\n'))) {
                    *end = 0;
                    uint64_t value = strtoull(strchr(line, ' ') ? strchr(line, ' ') : "0", NULL, 10);
                    if (strncmp(line, "reset", 5) == 0) {
                        deliveries = bytes = wrong = lost = until = first_ns = last_ns = latency_max = 0;
                        finished = 0;
                        memset(histogram, 0, sizeof histogram);
                        begun = now_ns();
                        for (int i = 0; i < count; i++) peers[i].next = aligned(value, i);
                        printf("reset\n");
                        fflush(stdout);
                    } else if (strncmp(line, "until", 5) == 0) {
                        until = value;
                        finished = 0;
                        for (int i = 0; i < count; i++)
                            if (peers[i].next > until || peers[i].state == 4) finished++;
                    }
                    line_n -= (size_t)(end + 1 - line);
                    memmove(line, end + 1, line_n + 1);
                }
                continue;
            }
            int i = (int)events[e].data.u32;
            peer *p = &peers[i];
            if (p->state == 0 && events[e].events & EPOLLOUT) {
                char request[256];
                int size = snprintf(request, sizeof request,
                                    "GET /v1/stream?i=%d HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                                    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n", i);
                if (send(p->fd, request, (size_t)size, MSG_NOSIGNAL) < 0) die("handshake");
                p->state = 1;
                struct epoll_event ev = {.events = EPOLLIN, .data.u32 = (uint32_t)i};
                epoll_ctl(epfd, EPOLL_CTL_MOD, p->fd, &ev);
            }
            if (events[e].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) on_bytes(p, i);
        }
        if (until && finished >= count) {
            report(begun);
            until = 0;
        }
    }
}
