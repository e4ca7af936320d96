/* Packed records of the log to joined WebSocket frames; see framing.c. */
#ifndef KIMERA_FRAMING_H
#define KIMERA_FRAMING_H

#include <stdint.h>

#define KM_WHOLE 0
#define KM_DAMAGED 1
#define KM_MISSING 2

typedef struct {
    int64_t size;   /* bytes written */
    int64_t count;  /* frames */
    uint64_t first; /* offset of the first record */
    uint64_t last;  /* of the last; of the one that is not whole, 0 where even that cannot be told */
} km_framed;

void km_init_crc(void);
/* Bytes that the frames of these records take at most. */
int64_t km_frame_bound(const uint8_t *packed, int64_t size, int64_t head_size);
/* One text frame per record, each payload starting with `head`. `out` has room for km_frame_bound bytes. */
int km_frame_records(const uint8_t *packed, int64_t size, const uint8_t *head, int64_t head_size, uint8_t *out,
                     km_framed *framed);

#endif
