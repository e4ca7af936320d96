/*
 * Packed records of the log to WebSocket frames: checksum verified, event object put together, header before it, all joined.
 * The form of a record is that of core/vault/entries.py; kernels/framing.py has the definition in Python.
 */
#include "framing.h"
#include <string.h>

#define RECORD 0x1e
#define FIELD 0x1f
#define DIGITS 20

static uint32_t tables[8][256];

void km_init_crc(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++)
            c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1;
        tables[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int t = 1; t < 8; t++)
            tables[t][i] = tables[0][tables[t - 1][i] & 0xff] ^ tables[t - 1][i] >> 8;
}

/* CRC-32 as zlib has it, eight bytes a step. */
static uint32_t crc_of(const uint8_t *data, int64_t size)
{
    uint32_t crc = 0xffffffffu;
    for (; size >= 8; size -= 8, data += 8) {
        crc ^= (uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24;
        crc = tables[7][crc & 0xff] ^ tables[6][crc >> 8 & 0xff] ^ tables[5][crc >> 16 & 0xff] ^ tables[4][crc >> 24] ^
              tables[3][data[4]] ^ tables[2][data[5]] ^ tables[1][data[6]] ^ tables[0][data[7]];
    }
    while (size--)
        crc = tables[0][(crc ^ *data++) & 0xff] ^ crc >> 8;
    return ~crc;
}

/* 0, and the value 0, where the field is not a decimal number of at most 20 digits that fits. */
static int number_of(const uint8_t *field, int64_t size, uint64_t *value)
{
    uint64_t found = 0;
    *value = 0;
    if (size < 1 || size > DIGITS)
        return 0;
    for (int64_t i = 0; i < size; i++) {
        if (field[i] < '0' || field[i] > '9')
            return 0;
        uint64_t digit = (uint64_t)(field[i] - '0');
        if (found > (UINT64_MAX - digit) / 10)
            return 0;
        found = found * 10 + digit;
    }
    *value = found;
    return 1;
}

typedef struct {
    const uint8_t *offset, *type, *ts, *data;
    int64_t offset_size, type_size, ts_size, data_size;
    uint64_t number;
} record;

/* Takes one record apart. Returns what is wrong with it, KM_WHOLE for nothing. */
static int record_of(const uint8_t *at, const uint8_t *end, record *r)
{
    uint64_t checksum = 0;
    const uint8_t *fields[6];
    r->number = 0;
    fields[0] = at;
    const uint8_t *body = memchr(at, FIELD, (size_t)(end - at));
    if (body == NULL)
        return KM_DAMAGED;
    int missing = body - at == 1 && *at == '-';
    int has_checksum = number_of(at, body - at, &checksum);
    body++;
    const uint8_t *next = memchr(body, FIELD, (size_t)(end - body));
    number_of(body, (next == NULL ? end : next) - body, &r->number);
    if (missing)
        return KM_MISSING;
    if (!has_checksum || checksum != crc_of(body, end - body))
        return KM_DAMAGED;
    fields[1] = body;
    for (int i = 2; i < 6; i++) {
        const uint8_t *stop = memchr(fields[i - 1], FIELD, (size_t)(end - fields[i - 1]));
        if (stop == NULL)
            return KM_DAMAGED;
        fields[i] = stop + 1;
    }
    r->offset = fields[1], r->offset_size = fields[2] - 1 - fields[1];
    r->type = fields[2], r->type_size = fields[3] - 1 - fields[2];
    r->ts = fields[3], r->ts_size = fields[4] - 1 - fields[3];
    r->data = fields[5], r->data_size = end - fields[5];
    return KM_WHOLE;
}

static uint8_t *put(uint8_t *out, const void *data, int64_t size)
{
    memcpy(out, data, (size_t)size);
    return out + size;
}

#define TYPE ",\"type\":\""
#define TS "\",\"ts\":"
#define DATA ",\"data\":"
#define FIXED ((int64_t)(sizeof(TYPE) + sizeof(TS) + sizeof(DATA) - 3 + 1))

int64_t km_frame_bound(const uint8_t *packed, int64_t size, int64_t head_size)
{
    int64_t records = 1;
    const uint8_t *end = packed + size;
    for (const uint8_t *at = packed; (at = memchr(at, RECORD, (size_t)(end - at))) != NULL; at++)
        records++;
    return size + records * (10 + head_size + FIXED);
}

int km_frame_records(const uint8_t *packed, int64_t size, const uint8_t *head, int64_t head_size, uint8_t *out,
                     km_framed *framed)
{
    const uint8_t *at = packed, *end = packed + size;
    uint8_t *start = out;
    framed->count = 0;
    framed->first = framed->last = 0;
    for (;;) {
        const uint8_t *stop = memchr(at, RECORD, (size_t)(end - at));
        record r;
        int state = record_of(at, stop == NULL ? end : stop, &r);
        if (state != KM_WHOLE) {
            framed->last = r.number;
            return state;
        }
        int64_t payload = head_size + r.offset_size + r.type_size + r.ts_size + r.data_size + FIXED;
        *out++ = 0x81;
        if (payload < 126)
            *out++ = (uint8_t)payload;
        else if (payload < 1 << 16) {
            *out++ = 126;
            *out++ = (uint8_t)(payload >> 8);
            *out++ = (uint8_t)payload;
        } else {
            *out++ = 127;
            for (int shift = 56; shift >= 0; shift -= 8)
                *out++ = (uint8_t)((uint64_t)payload >> shift);
        }
        out = put(out, head, head_size);
        out = put(out, r.offset, r.offset_size);
        out = put(out, TYPE, sizeof(TYPE) - 1);
        out = put(out, r.type, r.type_size);
        out = put(out, TS, sizeof(TS) - 1);
        out = put(out, r.ts, r.ts_size);
        out = put(out, DATA, sizeof(DATA) - 1);
        out = put(out, r.data, r.data_size);
        *out++ = '}';
        if (framed->count++ == 0)
            framed->first = r.number;
        framed->last = r.number;
        if (stop == NULL)
            break;
        at = stop + 1;
    }
    framed->size = out - start;
    return KM_WHOLE;
}
