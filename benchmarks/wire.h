/* The part of RFC 6455 that the load generator and the floor share: whole frames, no extensions. */
#ifndef WIRE_H
#define WIRE_H

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEXT = 1, CLOSE = 8, PING = 9, PONG = 10 };

/* The example of RFC 6455, 1.3: every client sends this key, so the answer is a constant. */
#define WS_KEY "dGhlIHNhbXBsZSBub25jZQ=="
#define WS_ACCEPT "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="

struct frame {
    unsigned op;
    uint8_t *data;
    size_t size;
};

static inline void die(const char *what)
{
    fprintf(stderr, "%s%s%s\n", what, errno ? ": " : "", errno ? strerror(errno) : "");
    exit(1);
}

static inline void apply_mask(uint8_t *data, size_t size, const uint8_t key[4])
{
    for (size_t i = 0; i < size; i++)
        data[i] ^= key[i & 3];
}

/* Read one frame, unmask it in place and return the bytes it took, or 0 when it is not all there. */
static inline size_t read_frame(uint8_t *in, size_t have, struct frame *frame)
{
    size_t head = 2, size;

    if (have < 2)
        return 0;
    size = in[1] & 127;
    if (size == 126) {
        head = 4;
        size = have < 4 ? 0 : (size_t)in[2] << 8 | in[3];
    } else if (size == 127) {
        errno = 0;
        die("a frame is too large");
    }
    head += in[1] & 128 ? 4 : 0;
    if (have < head + size)
        return 0;
    *frame = (struct frame){in[0] & 15, in + head, size};
    if (in[1] & 128)
        apply_mask(in + head, size, in + head - 4);
    return head + size;
}

/* Write one frame, masked when there is a key, and return its length (`size` plus 8 at most). */
static inline size_t write_frame(uint8_t *out, unsigned op, const void *data, size_t size, const uint8_t *key)
{
    size_t head = 2;

    out[0] = 128 | op;
    out[1] = key ? 128 : 0;
    if (size < 126) {
        out[1] |= size;
    } else {
        out[1] |= 126;
        out[2] = size >> 8;
        out[3] = size & 255;
        head = 4;
    }
    if (key) {
        memcpy(out + head, key, 4);
        head += 4;
    }
    memcpy(out + head, data, size);
    if (key)
        apply_mask(out + head, size, key);
    return head + size;
}

/* Return the bytes of an HTTP head with its blank line, or 0 when it is not all there. */
static inline size_t read_head(const uint8_t *in, size_t have)
{
    const uint8_t *end = memmem(in, have, "\r\n\r\n", 4);

    return end ? (size_t)(end - in) + 4 : 0;
}

#endif
