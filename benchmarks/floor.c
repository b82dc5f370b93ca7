/*
 * The floor: the least work a server can do on this wire. It accepts the upgrade, joins each client,
 * sends an echo back and a broadcast to all, one send() per client for what arrived together.
 * Its figures say what the kernel and the load generator can carry.
 *
 *     floor PORT
 */
#define _GNU_SOURCE
#include "wire.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_FD 65536
#define BUFFER (64 << 10)

static const char ANSWER[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                             "Sec-WebSocket-Accept: " WS_ACCEPT "\r\n\r\n";
static const char OPEN[] = "0{\"sid\":\"floor\",\"upgrades\":[],\"pingInterval\":25000,\"pingTimeout\":20000,"
                           "\"maxPayload\":1000000}";
static const char JOINED[] = "40{\"sid\":\"floor\"}";

static int poller, members[MAX_FD], member_count, place[MAX_FD];
static enum { CLOSED, ASKING, JOINING, MEMBER } stage[MAX_FD];

static void transmit(int fd, const void *data, size_t size)
{
    if (send(fd, data, size, MSG_NOSIGNAL) != (ssize_t)size && errno != EPIPE && errno != ECONNRESET)
        die("send");
}

static void transmit_text(int fd, const char *text)
{
    uint8_t out[512];

    transmit(fd, out, write_frame(out, TEXT, text, strlen(text), NULL));
}

static void join(int fd)
{
    stage[fd] = MEMBER;
    place[fd] = member_count;
    members[member_count++] = fd;
    transmit_text(fd, JOINED);
}

static void leave(int fd)
{
    if (stage[fd] == MEMBER) {
        members[place[fd]] = members[--member_count];
        place[members[place[fd]]] = place[fd];
    }
    stage[fd] = CLOSED;
    close(fd);
}

static size_t answer_upgrade(int fd, uint8_t *in, size_t have)
{
    size_t used = read_head(in, have);

    if (used) {
        stage[fd] = JOINING;
        transmit(fd, ANSWER, sizeof ANSWER - 1);
        transmit_text(fd, OPEN);
    }
    return used;
}

/* Read what one client sent; no client here sends more at a time than the buffer holds. */
static void receive(int fd)
{
    static uint8_t in[BUFFER], echo[BUFFER], broadcast[BUFFER];
    size_t used, at = 0, echo_size = 0, broadcast_size = 0;
    ssize_t have = recv(fd, in, sizeof in, 0);
    struct frame frame;

    if (have <= 0) {
        leave(fd);
        return;
    }
    if (stage[fd] == ASKING)
        at = answer_upgrade(fd, in, have);
    for (; stage[fd] != ASKING && (used = read_frame(in + at, have - at, &frame)); at += used) {
        if (frame.size < 2 || frame.op != TEXT)
            continue;
        if (frame.data[1] == '0')
            join(fd);
        else if (frame.size > 4 && frame.data[4] == 'b')
            broadcast_size += write_frame(broadcast + broadcast_size, TEXT, frame.data, frame.size, NULL);
        else
            echo_size += write_frame(echo + echo_size, TEXT, frame.data, frame.size, NULL);
    }
    if (echo_size)
        transmit(fd, echo, echo_size);
    for (int i = 0; broadcast_size && i < member_count; i++)
        transmit(members[i], broadcast, broadcast_size);
}

static void watch(int fd)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};

    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event))
        die("epoll_ctl");
}

static void accept_all(int listener)
{
    int on = 1;

    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
        if (fd >= MAX_FD)
            die("too many clients");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        stage[fd] = ASKING;
        watch(fd);
    }
}

static int listen_on(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000001), .sin_port = htons(port)};
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1024))
        die("listen");
    return listener;
}

int main(int argc, char **argv)
{
    struct epoll_event events[1024];
    int listener = listen_on(argc > 1 ? atoi(argv[1]) : 0);

    poller = epoll_create1(0);
    watch(listener);
    for (;;) {
        int ready = epoll_wait(poller, events, 1024, -1);

        for (int i = 0; i < ready; i++) {
            if (events[i].data.fd == listener)
                accept_all(listener);
            else
                receive(events[i].data.fd);
        }
    }
}
