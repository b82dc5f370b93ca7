/*
 * The load generator: one thread, one epoll, clients that speak WebSocket and, unless --plain,
 * Engine.IO 4 and Socket.IO 5. It never parses JSON: a message carries its number after a '#'.
 *
 *     load fanout|echo|connects|idle --port N [--port N ...] [--clients N] [--inflight N] [--seconds S] [--warmup S] [--plain] [--event NAME]
 *
 * prints one JSON object. `idle` prints {"ready": N} once all are open and ends with its standard input.
 */
#define _GNU_SOURCE
#include "wire.h"

#include <arpa/inet.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define REST 2048             /* an incomplete frame or HTTP head that waits for its remainder */
#define PAYLOAD 128           /* bytes of a message, its number included */
#define RING 256              /* broadcasts that can be outstanding */
#define SOURCES 250           /* 127.0.0.2 and up: each has ephemeral ports of its own */
#define SETTLE 300000         /* us between the last connect and the first message */
#define PATIENCE 10000000     /* us without progress that end the run */

enum stage { DIALING, UPGRADING, OPENING, JOINING, READY };

struct client {
    int fd;
    enum stage stage;
    uint64_t since;
    size_t have;
    uint8_t rest[REST];
};

struct scenario {
    const char *name;
    void (*begin)(void);
    void (*ready)(struct client *);
    void (*message)(struct client *, const uint8_t *, size_t);
    void (*turn)(void);
};

static struct {
    int ports[8], servers, clients, inflight, dialing;
    double seconds, warmup;
    bool plain;
    const char *event;
} opt = {{0}, 0, 500, 1, 50, 3, 1, false, "broadcast"};

static const uint8_t key[4] = {0x37, 0xfa, 0x21, 0x3d};
static const struct scenario *scenario;
static struct client *clients;
static int poller, dialed, open_clients;
static uint64_t now, progress, begin_at, measure_at, end_at;

/* Figures */

static uint64_t counted, histogram[64 * 64];
static double busy_before;

static uint64_t clock_us(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000 + time.tv_nsec / 1000;
}

static double cpu_seconds(void)
{
    struct rusage use;

    getrusage(RUSAGE_SELF, &use);
    return use.ru_utime.tv_sec + use.ru_stime.tv_sec + (use.ru_utime.tv_usec + use.ru_stime.tv_usec) / 1e6;
}

/* Buckets of 1 us up to 63 us, then 32 to each power of two: an error of 3 % at most. */
static unsigned bucket_of(uint64_t us)
{
    unsigned shift = us < 64 ? 0 : 58 - __builtin_clzll(us);

    return shift * 32 + (us >> shift);
}

static uint64_t value_of(unsigned bucket)
{
    unsigned shift = bucket < 64 ? 0 : bucket / 32 - 1;

    return (uint64_t)(bucket - shift * 32) << shift;
}

static void count(uint64_t since)
{
    progress = now;
    if (!measure_at || now < measure_at)
        return;
    counted++;
    histogram[bucket_of(now - since)]++;
}

static double percentile_ms(double share)
{
    uint64_t seen = 0, wanted = counted * share;

    for (unsigned bucket = 0; bucket < sizeof histogram / sizeof *histogram; bucket++)
        if ((seen += histogram[bucket]) > wanted)
            return value_of(bucket) / 1e3;
    return 0;
}

static void report(void)
{
    double seconds = (now - measure_at) / 1e6;

    printf("{\"rate\": %.1f, \"p50\": %.3f, \"p99\": %.3f, \"generator\": %.3f}\n", counted / seconds,
           percentile_ms(.50), percentile_ms(.99), (cpu_seconds() - busy_before) / seconds);
    exit(0);
}

/* Clients */

static void transmit(struct client *client, const void *data, size_t size)
{
    errno = 0;
    if (send(client->fd, data, size, MSG_NOSIGNAL) != (ssize_t)size)
        die("the server does not take what it is sent");
}

static void transmit_frame(struct client *client, unsigned op, const void *data, size_t size)
{
    uint8_t out[REST];

    transmit(client, out, write_frame(out, op, data, size, key));
}

static void watch(struct client *client, uint32_t events, int operation)
{
    struct epoll_event event = {.events = events, .data.ptr = client};

    if (epoll_ctl(poller, operation, client->fd, &event))
        die("epoll_ctl");
}

/* Clients take turns among the servers. */
static int port_of(struct client *client)
{
    return opt.ports[(client - clients) % opt.servers];
}

static void dial(struct client *client)
{
    static unsigned source;
    struct sockaddr_in from = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000002 + source++ % SOURCES)};
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000001), .sin_port = htons(port_of(client))};
    int on = 1;

    client->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(client->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    setsockopt(client->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (client->fd < 0 || bind(client->fd, (struct sockaddr *)&from, sizeof from))
        die("socket");
    if (connect(client->fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS)
        die("connect");
    client->stage = DIALING;
    client->since = now;
    client->have = 0;
    watch(client, EPOLLOUT, EPOLL_CTL_ADD);
}

static void dial_more(void)
{
    while (dialed < opt.clients && dialed - open_clients < opt.dialing)
        dial(&clients[dialed++]);
}

/* Close with a reset, so that neither side keeps the address in TIME_WAIT. */
static void hang_up(struct client *client)
{
    struct linger at_once = {1, 0};

    setsockopt(client->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(client->fd);
}

static void ask_upgrade(struct client *client)
{
    char out[512];
    int size = snprintf(out, sizeof out,
                        "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nOrigin: http://127.0.0.1:%d\r\n"
                        "Connection: Upgrade\r\nUpgrade: websocket\r\n"
                        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " WS_KEY "\r\n\r\n",
                        opt.plain ? "/ws/" : "/socket.io/?EIO=4&transport=websocket", port_of(client), port_of(client));

    transmit(client, out, size);
    client->stage = UPGRADING;
    watch(client, EPOLLIN, EPOLL_CTL_MOD);
}

static void become_ready(struct client *client)
{
    client->stage = READY;
    progress = now;
    scenario->ready(client);
}

static size_t take_head(struct client *client, const uint8_t *in, size_t have)
{
    size_t used = read_head(in, have);

    errno = 0;
    if (used && memcmp(in, "HTTP/1.1 101", 12))
        die("the server refused the upgrade");
    if (used) {
        client->stage = OPENING;
        if (opt.plain)
            become_ready(client);
    }
    return used;
}

static void take_packet(struct client *client, const uint8_t *data, size_t size)
{
    errno = 0;
    if (opt.plain) {
        scenario->message(client, data, size);
    } else if (size > 1 && data[0] == '4' && data[1] == '2') {
        scenario->message(client, data + 2, size - 2);
    } else if (data[0] == '2') {
        transmit_frame(client, TEXT, "3", 1);
    } else if (data[0] == '0' && client->stage == OPENING) {
        client->stage = JOINING;
        transmit_frame(client, TEXT, "40", 2);
    } else if (size > 1 && data[0] == '4' && data[1] == '0' && client->stage == JOINING) {
        become_ready(client);
    } else {
        die("the server sent an unexpected packet");
    }
}

static void take_frame(struct client *client, const struct frame *frame)
{
    errno = 0;
    if (frame->op == TEXT)
        take_packet(client, frame->data, frame->size);
    else if (frame->op == PING)
        transmit_frame(client, PONG, frame->data, frame->size);
    else
        die("the server closed a client");
}

static void take_bytes(struct client *client, uint8_t *in, size_t have)
{
    struct frame frame;
    size_t used;
    int fd = client->fd;

    while (have && client->fd == fd) {
        if (client->stage == UPGRADING) {
            used = take_head(client, in, have);
        } else if ((used = read_frame(in, have, &frame))) {
            take_frame(client, &frame);
        }
        if (!used)
            break;
        in += used;
        have -= used;
    }
    if (client->fd != fd)
        return;
    if (have > REST)
        die("a frame is too large");
    memcpy(client->rest, in, have);
    client->have = have;
}

static void receive(struct client *client)
{
    static uint8_t buffer[REST + (256 << 10)];
    ssize_t got;

    memcpy(buffer, client->rest, client->have);
    got = recv(client->fd, buffer + client->have, sizeof buffer - REST, 0);
    now = clock_us();
    if (got < 0 && errno == EAGAIN)
        return;
    errno = got ? errno : 0;
    if (got <= 0)
        die("a client was disconnected");
    take_bytes(client, buffer, client->have + got);
}

/* Messages */

static uint64_t first_number, last_number;

static size_t message_frame(uint8_t *out, const char *event, uint64_t number)
{
    char text[PAYLOAD + 64], data[PAYLOAD + 1];
    int size;

    memset(data, 'x', PAYLOAD);
    data[PAYLOAD] = 0;
    snprintf(data, 12, "#%010llu", (unsigned long long)number);
    data[11] = 'x';
    size = snprintf(text, sizeof text, "%s[\"%s\",\"%s\"]", opt.plain ? "" : "42", event, data);
    return write_frame(out, TEXT, text, size, key);
}

static uint64_t number_of(const uint8_t *data, size_t size)
{
    const uint8_t *mark = memchr(data, '#', size < 64 ? size : 64);
    uint64_t number = 0;

    if (!mark || size < PAYLOAD)
        die("the server sent an unexpected message");
    for (int i = 1; i <= 10; i++)
        number = number * 10 + mark[i] - '0';
    return number;
}

/* Use numbers that no earlier run has used: its last broadcasts can still be on their way. */
static void claim_numbers(int count)
{
    first_number = now / 1000 % 900000 * 10000;
    last_number = first_number + count - 1;
}

static bool is_ours(uint64_t number)
{
    return number >= first_number && number <= last_number;
}

static void set_deadlines(uint64_t start)
{
    begin_at = start;
    measure_at = start + opt.warmup * 1e6;
    end_at = measure_at + opt.seconds * 1e6;
}

static void open_and_wait(struct client *client)
{
    (void)client;
    open_clients++;
    dial_more();
    if (open_clients == opt.clients)
        set_deadlines(now + SETTLE);
}

static void ignore_message(struct client *client, const uint8_t *data, size_t size)
{
    (void)client, (void)data, (void)size;
}

static void nothing(void)
{
}

/* Fan-out: the first client sends, everybody receives, `inflight` broadcasts are outstanding. */

static struct {
    uint64_t number, sent;
    int missing;
} outstanding[RING];
static int owed;

static void fanout_begin(void)
{
    claim_numbers(0);
    owed = opt.inflight;
}

static void fanout_message(struct client *client, const uint8_t *data, size_t size)
{
    uint64_t number = number_of(data, size);

    (void)client;
    if (!is_ours(number))
        return;
    if (outstanding[number % RING].number != number || outstanding[number % RING].missing < 1)
        die("the server delivered a broadcast twice");
    count(outstanding[number % RING].sent);
    owed += !--outstanding[number % RING].missing;
}

static void fanout_turn(void)
{
    static uint8_t out[RING * (PAYLOAD + 64)];
    size_t size = 0;

    for (; owed; owed--) {
        uint64_t number = ++last_number;

        outstanding[number % RING].number = number;
        outstanding[number % RING].sent = now;
        outstanding[number % RING].missing = opt.clients;
        size += message_frame(out + size, opt.event, number);
    }
    if (size)
        transmit(&clients[0], out, size);
}

/* Echo: each client has one message on its way, numbered as the client is. */

static void echo_send(struct client *client)
{
    uint8_t out[PAYLOAD + 64];

    client->since = now;
    transmit(client, out, message_frame(out, "echo", first_number + (client - clients)));
}

static void echo_begin(void)
{
    claim_numbers(opt.clients);
    for (int i = 0; i < opt.clients; i++)
        echo_send(&clients[i]);
}

static void echo_message(struct client *client, const uint8_t *data, size_t size)
{
    uint64_t number = number_of(data, size);

    if (!is_ours(number))
        return;
    if (number != first_number + (client - clients))
        die("the server mixed up two clients");
    count(client->since);
    echo_send(client);
}

/* Connects: `clients` slots dial, join and hang up over and over. */

static void connects_ready(struct client *client)
{
    count(client->since);
    hang_up(client);
    client->fd = -1;
    dial(client);
}

/* Idle: open all, say so, answer pings until standard input ends. */

static void idle_begin(void)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};

    end_at = 0;
    epoll_ctl(poller, EPOLL_CTL_ADD, STDIN_FILENO, &event);
    printf("{\"ready\": %d}\n", open_clients);
    fflush(stdout);
}

static void idle_turn(void)
{
    progress = now;
}

static const struct scenario scenarios[] = {
    {"fanout", fanout_begin, open_and_wait, fanout_message, fanout_turn},
    {"echo", echo_begin, open_and_wait, echo_message, nothing},
    {"connects", nothing, connects_ready, ignore_message, nothing},
    {"idle", idle_begin, open_and_wait, ignore_message, idle_turn},
};

/* The loop */

static void handle(const struct epoll_event *event)
{
    struct client *client = event->data.ptr;

    if (!client)
        exit(0);
    if (client->stage == DIALING) {
        errno = 0;
        if (event->events & (EPOLLERR | EPOLLHUP))
            die("the server does not accept");
        ask_upgrade(client);
    } else {
        receive(client);
    }
}

static void check_deadlines(void)
{
    static bool measured;

    errno = 0;
    if (begin_at && now >= begin_at) {
        begin_at = 0;
        scenario->begin();
    }
    if (!measured && measure_at && now >= measure_at) {
        measured = true;
        measure_at = now;
        busy_before = cpu_seconds();
    }
    if (now > progress + PATIENCE)
        die("stalled: no message for ten seconds");
    if (end_at && now >= end_at)
        report();
}

static void loop(void)
{
    struct epoll_event events[1024];

    for (;;) {
        int ready = epoll_wait(poller, events, 1024, 20);

        now = clock_us();
        for (int i = 0; i < ready; i++)
            handle(&events[i]);
        check_deadlines();
        scenario->turn();
    }
}

static void read_options(int argc, char **argv)
{
    static const struct option known[] = {
        {"port", 1, 0, 'p'},    {"clients", 1, 0, 'c'}, {"inflight", 1, 0, 'i'}, {"seconds", 1, 0, 's'},
        {"warmup", 1, 0, 'w'}, {"plain", 0, 0, 'r'},   {"event", 1, 0, 'e'},  {0, 0, 0, 0},
    };

    for (int flag; (flag = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (flag) {
        case 'p': opt.ports[opt.servers++ % 8] = atoi(optarg); break;
        case 'c': opt.clients = atoi(optarg); break;
        case 'i': opt.inflight = atoi(optarg); break;
        case 's': opt.seconds = atof(optarg); break;
        case 'w': opt.warmup = atof(optarg); break;
        case 'r': opt.plain = true; break;
        case 'e': opt.event = optarg; break;
        default: exit(2);
        }
    }
    for (size_t i = 0; optind < argc && i < sizeof scenarios / sizeof *scenarios; i++)
        if (!strcmp(argv[optind], scenarios[i].name))
            scenario = &scenarios[i];
    errno = 0;
    if (!scenario || opt.servers < 1 || opt.servers > 8 || opt.clients < 1 || opt.inflight < 1 || opt.inflight > RING)
        die("usage: load fanout|echo|connects|idle --port N [--clients N] [--inflight N] ...");
}

int main(int argc, char **argv)
{
    read_options(argc, argv);
    clients = calloc(opt.clients, sizeof *clients);
    poller = epoll_create1(0);
    now = progress = clock_us();
    if (scenario->ready == connects_ready) {
        opt.dialing = opt.clients;
        set_deadlines(now);
    }
    dial_more();
    loop();
}
