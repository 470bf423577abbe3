/* A few activations times a packed matrix, and packed rows back to numbers; see ../layout.py for what is packed how.

   Codes are taken in blocks of 8 * LANES: a word of 8 codes in each lane (32, 16 or 8 bits, for codes of 4, 2 or 1 bits). The
   activations are brought into that order once a call, so that a shift of all words gives the next LANES weights.

   exact   A code is looked up in the 16 sums of scales of its group and part, in a register, and multiplied with the float32
           activation. Tables of 4 or 2 entries are repeated, so that the bits of the next code do not matter.
   int8    Activations are rounded to 8 bits, a scale a group. A code is looked up in each row of the basis, minus its lowest
           value; sums of products are integers, and what was subtracted is put back once a row.

   The lines between the two rulers are all that differs between instruction sets. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define MAX_PARTS 3
#define MAX_BASIS 4

typedef struct {
    int32_t bits, rows;               /* of a code; of the basis */
    int32_t lowest[MAX_BASIS];
    float basis[MAX_BASIS][16];       /* repeated to 16 codes */
    uint8_t above[MAX_BASIS][16];     /* basis - lowest */
} Part;

typedef struct {
    int64_t in_features, group_size, groups, row_bytes, num_scales, num_parts;
    Part part[MAX_PARTS];
} Layout;

typedef struct {
    const Layout *layout;
    const uint8_t *weight; /* (rows, row_bytes) */
    const uint16_t *scale; /* float16 (rows, groups, num_scales) */
    int64_t rows;
} Matrix;

INLINE float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023, bits;
    float value;
    if (exponent == 0) {
        value = mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float from_bfloat(uint16_t bfloat) {
    uint32_t bits = (uint32_t)bfloat << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t to_bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* ====================================================================================================================== */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

#include <immintrin.h>
#define LANES 16
#define ROWS 4
typedef __m512 Floats;
typedef __m512i Words;  /* unsigned, one in a lane */
typedef __m512i Bytes;  /* 4 * LANES of them */
typedef __m512 Table;

INLINE Floats zeros(void) { return _mm512_setzero_ps(); }
INLINE Floats load(const float *x) { return _mm512_loadu_ps(x); }
INLINE Floats all(float x) { return _mm512_set1_ps(x); }
INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float sum(Floats x) { return _mm512_reduce_add_ps(x); }
INLINE void halves_to_floats(const uint16_t *half, float *x) {
    _mm512_storeu_ps(x, _mm512_cvtph_ps(_mm256_loadu_si256((const void *)half)));
}
/* LANES * bits bytes in the low end of a register, or as many as there are, and zeros */
INLINE __m512i some_bytes(const uint8_t *code, int bits, int64_t bytes) {
    if (bytes < LANES * bits) return _mm512_maskz_loadu_epi8((1ull << bytes) - 1, code);
    if (bits == 4) return _mm512_loadu_si512(code);
    if (bits == 2) return _mm512_castsi256_si512(_mm256_loadu_si256((const void *)code));
    return _mm512_castsi128_si512(_mm_loadu_si128((const void *)code));
}
INLINE Words load_words(const uint8_t *code, int bits, int64_t bytes) {
    __m512i packed = some_bytes(code, bits, bytes);
    if (bits == 4) return packed;
    if (bits == 2) return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(packed));
    return _mm512_cvtepu8_epi32(_mm512_castsi512_si128(packed));
}
INLINE Table weighted(const float basis[][16], const float *scale, int rows) {
    Table table = multiply(load(basis[0]), all(scale[0]));
    for (int k = 1; k < rows; k++) table = multiply_add(load(basis[k]), all(scale[k]), table);
    return table;
}
INLINE Floats look_up(Table table, Words code, int shift, int bits) {
    (void)bits;
    return _mm512_permutexvar_ps(_mm512_srli_epi32(code, shift), table);
}
INLINE Bytes load_bytes(const uint8_t *code, int bits, int64_t bytes) {
    __m512i packed = some_bytes(code, bits, bytes);
    if (bits == 4) return packed;
    if (bits == 2)
        return _mm512_srlv_epi64(_mm512_broadcast_i64x4(_mm512_castsi512_si256(packed)),
                                 _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
    return _mm512_srlv_epi64(_mm512_broadcast_i32x4(_mm512_castsi512_si128(packed)),
                             _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6));
}
INLINE Bytes code_bytes(Bytes code, int shift, int bits) {
    return _mm512_and_si512(_mm512_srli_epi64(code, shift), _mm512_set1_epi8((1 << bits) - 1));
}
INLINE Bytes load_table(const uint8_t *table) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table)); }
INLINE Bytes load_activations(const int8_t *x) { return _mm512_loadu_si512(x); }
INLINE Bytes no_bytes(void) { return _mm512_setzero_si512(); }
INLINE Bytes dot(Bytes sums, Bytes table, Bytes code, Bytes x) {
    return _mm512_dpbusd_epi32(sums, _mm512_shuffle_epi8(table, code), x);
}
INLINE Floats integers(Bytes sums) { return _mm512_cvtepi32_ps(sums); }
/* LANES bytes of codes, shifted: LANES neighbouring weights */
INLINE Floats neighbours(Table table, const uint8_t *code, int shift, int bits) {
    (void)bits;
    return look_up(table, _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)code)), shift, bits);
}
INLINE void store(float *x, Floats value) { _mm512_storeu_ps(x, value); }

/* Codes to bfloat16, through a table of bfloat16: 2 * LANES at a time. */
#define EXPANDS_TO_BFLOAT 1
INLINE void expand_bfloat(Table table, const uint8_t *code, int shift, int64_t count, uint16_t *out) {
    __m512i bits = _mm512_castps_si512(table), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __m512i entries = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    for (int64_t j = 0; j < count; j += 32) {
        __mmask32 some = count - j < 32 ? (1u << (count - j)) - 1 : ~0u;
        __m512i index = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(some, code + j));
        _mm512_mask_storeu_epi16(out + j, some, _mm512_permutexvar_epi16(_mm512_srli_epi16(index, shift), entries));
    }
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>
#define LANES 8
#define ROWS 2
typedef __m256 Floats;
typedef __m256i Words;
typedef __m256i Bytes;
typedef struct { __m256 low, high; } Table;

INLINE Floats zeros(void) { return _mm256_setzero_ps(); }
INLINE Floats load(const float *x) { return _mm256_loadu_ps(x); }
INLINE Floats all(float x) { return _mm256_set1_ps(x); }
INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float sum(Floats x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE void halves_to_floats(const uint16_t *half, float *x) {
    _mm256_storeu_ps(x, _mm256_cvtph_ps(_mm_loadu_si128((const void *)half)));
}
INLINE __m256i some_bytes(const uint8_t *code, int64_t wanted, int64_t bytes) {
    uint8_t copy[32] = {0};
    if (bytes < wanted) {
        memcpy(copy, code, bytes);
        code = copy;
    }
    if (wanted == 32) return _mm256_loadu_si256((const void *)code);
    if (wanted == 16) return _mm256_castsi128_si256(_mm_loadu_si128((const void *)code));
    return _mm256_castsi128_si256(_mm_loadl_epi64((const void *)code));
}
INLINE Words load_words(const uint8_t *code, int bits, int64_t bytes) {
    __m256i packed = some_bytes(code, LANES * bits, bytes);
    if (bits == 4) return packed;
    if (bits == 2) return _mm256_cvtepu16_epi32(_mm256_castsi256_si128(packed));
    return _mm256_cvtepu8_epi32(_mm256_castsi256_si128(packed));
}
INLINE Table weighted(const float basis[][16], const float *scale, int rows) {
    Table table = {multiply(load(basis[0]), all(scale[0])), multiply(load(basis[0] + 8), all(scale[0]))};
    for (int k = 1; k < rows; k++) {
        table.low = multiply_add(load(basis[k]), all(scale[k]), table.low);
        table.high = multiply_add(load(basis[k] + 8), all(scale[k]), table.high);
    }
    return table;
}
INLINE Floats look_up(Table table, Words code, int shift, int bits) {
    Words index = _mm256_srli_epi32(code, shift);
    __m256 low = _mm256_permutevar8x32_ps(table.low, index);
    if (bits < 4) return low;
    /* the fourth bit of the code, where the blend looks for a sign */
    __m256i sign = _mm256_slli_epi32(index, 28);
    return _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(table.high, index), _mm256_castsi256_ps(sign));
}
INLINE Bytes load_bytes(const uint8_t *code, int bits, int64_t bytes) {
    __m256i packed = some_bytes(code, LANES * bits, bytes);
    if (bits == 4) return packed;
    if (bits == 2) return _mm256_srlv_epi64(_mm256_permute4x64_epi64(packed, 0x44), _mm256_setr_epi64x(0, 0, 4, 4));
    return _mm256_srlv_epi64(_mm256_permute4x64_epi64(packed, 0), _mm256_setr_epi64x(0, 2, 4, 6));
}
INLINE Bytes code_bytes(Bytes code, int shift, int bits) {
    return _mm256_and_si256(_mm256_srli_epi64(code, shift), _mm256_set1_epi8((1 << bits) - 1));
}
INLINE Bytes load_table(const uint8_t *table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table));
}
INLINE Bytes load_activations(const int8_t *x) { return _mm256_loadu_si256((const void *)x); }
INLINE Bytes no_bytes(void) { return _mm256_setzero_si256(); }
INLINE Bytes dot(Bytes sums, Bytes table, Bytes code, Bytes x) {
    /* at most 2 * 126 * 127, which fits 16 bits */
    __m256i pairs = _mm256_maddubs_epi16(_mm256_shuffle_epi8(table, code), x);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE Floats integers(Bytes sums) { return _mm256_cvtepi32_ps(sums); }
INLINE Floats neighbours(Table table, const uint8_t *code, int shift, int bits) {
    return look_up(table, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)code)), shift, bits);
}
INLINE void store(float *x, Floats value) { _mm256_storeu_ps(x, value); }

#else

#define LANES 8
#define ROWS 1
typedef struct { float lane[LANES]; } Floats;
typedef struct { uint32_t lane[LANES]; } Words;
typedef union { uint8_t byte[4 * LANES]; int8_t activation[4 * LANES]; int32_t lane[LANES]; } Bytes;
typedef struct { float entry[16]; } Table;
#define EACH(i, count) for (int i = 0; i < (count); i++)

INLINE Floats zeros(void) { return (Floats){{0}}; }
INLINE Floats load(const float *x) { Floats value; EACH(i, LANES) value.lane[i] = x[i]; return value; }
INLINE Floats all(float x) { Floats value; EACH(i, LANES) value.lane[i] = x; return value; }
INLINE Floats multiply(Floats a, Floats b) { EACH(i, LANES) a.lane[i] *= b.lane[i]; return a; }
INLINE Floats add(Floats a, Floats b) { EACH(i, LANES) a.lane[i] += b.lane[i]; return a; }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { EACH(i, LANES) c.lane[i] += a.lane[i] * b.lane[i]; return c; }
INLINE float sum(Floats x) {
    for (int half = LANES / 2; half; half /= 2) EACH(i, half) x.lane[i] += x.lane[i + half];
    return x.lane[0];
}
INLINE void halves_to_floats(const uint16_t *half, float *x) { EACH(i, LANES) x[i] = from_half(half[i]); }
INLINE Words load_words(const uint8_t *code, int bits, int64_t bytes) {
    Words words = {{0}};
    EACH(i, LANES * bits) if (i < bytes) words.lane[i / bits] |= (uint32_t)code[i] << i % bits * 8;
    return words;
}
INLINE Table weighted(const float basis[][16], const float *scale, int rows) {
    Table table = {{0}};
    for (int k = 0; k < rows; k++) EACH(i, 16) table.entry[i] += basis[k][i] * scale[k];
    return table;
}
INLINE Floats look_up(Table table, Words code, int shift, int bits) {
    Floats value;
    (void)bits;
    EACH(i, LANES) value.lane[i] = table.entry[code.lane[i] >> shift & 15];
    return value;
}
INLINE Bytes load_bytes(const uint8_t *code, int bits, int64_t bytes) {
    Bytes packed;
    int width = LANES * bits;
    EACH(i, 4 * LANES) packed.byte[i] = i % width < bytes ? code[i % width] >> i / width * 2 * bits : 0;
    return packed;
}
INLINE Bytes code_bytes(Bytes code, int shift, int bits) {
    EACH(i, 4 * LANES) code.byte[i] = code.byte[i] >> shift & ((1 << bits) - 1);
    return code;
}
INLINE Bytes load_table(const uint8_t *table) { Bytes copy = {{0}}; memcpy(copy.byte, table, 16); return copy; }
INLINE Bytes load_activations(const int8_t *x) { Bytes copy; memcpy(copy.byte, x, sizeof copy); return copy; }
INLINE Bytes no_bytes(void) { return (Bytes){{0}}; }
INLINE Bytes dot(Bytes sums, Bytes table, Bytes code, Bytes x) {
    EACH(i, 4 * LANES) sums.lane[i / 4] += table.byte[code.byte[i]] * x.activation[i];
    return sums;
}
INLINE Floats integers(Bytes sums) { Floats value; EACH(i, LANES) value.lane[i] = sums.lane[i]; return value; }
INLINE Floats neighbours(Table table, const uint8_t *code, int shift, int bits) {
    Floats value;
    (void)bits;
    EACH(i, LANES) value.lane[i] = table.entry[code[i] >> shift & 15];
    return value;
}
INLINE void store(float *x, Floats value) { memcpy(x, value.lane, sizeof value); }

#endif
/* ====================================================================================================================== */

#ifndef EXPANDS_TO_BFLOAT
#define EXPANDS_TO_BFLOAT 0
INLINE void expand_bfloat(Table table, const uint8_t *code, int shift, int64_t count, uint16_t *out) {
    (void)table, (void)code, (void)shift, (void)count, (void)out;
}
#endif

#define BLOCK (8 * LANES) /* codes */
#define AHEAD 8192        /* bytes: several rows are read at a time, which the processor's own prefetching does not follow */

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t part_bytes(int64_t length, int bits) { return ceil_div(length * bits, 8); }
INLINE int64_t padded_size(int64_t length) { return ceil_div(length, BLOCK) * BLOCK; }

/* ------------------------------------------------------------------ activations in the order of the codes */

typedef struct {
    float *values[5];     /* (m, padded) for codes of 4, 2, 1 bits; null where there is no such part */
    int8_t *rounded[5];
    float *step;          /* (m, groups): what an integer is worth */
    float *correction;    /* (m, groups * num_scales, padded to LANES): for what was subtracted from the basis */
    int64_t padded, scales;
} Activations;

/* `out` (padded_size(length)): the activations of a group, as its codes come out of their words; zero where there is no code.
   Shift number `turn` of the word in `lane` is a code of byte `byte`, and of the weight `place`. */
INLINE void order_exact(const float *x, int64_t length, const int bits, float *out) {
    int64_t bytes = part_bytes(length, bits);
    for (int64_t block = 0; block * BLOCK < length; block++)
        for (int turn = 0; turn < 8; turn++) {
            int64_t byte = block * LANES * bits + turn * bits / 8, skip = turn * bits % 8 / bits * bytes;
            for (int lane = 0; lane < LANES; lane++, byte += bits)
                *out++ = byte < bytes && byte + skip < length ? x[byte + skip] : 0;
        }
}

/* The same for bytes of codes: as many neighbouring bytes as there are codes of 4 bits in half a block; of 2 bits, half as many,
   twice, shifted. */
INLINE void order_int8(const int8_t *x, int64_t length, const int bits, int8_t *out) {
    int64_t bytes = part_bytes(length, bits), width = LANES * bits;
    for (int64_t block = 0; block * BLOCK < length; block++)
        for (int turn = 0; turn < 2; turn++)
            for (int copy = 0; copy < 4 / bits; copy++) {
                int64_t byte = block * width, skip = (2 * copy + turn) * bytes;
                for (int64_t i = 0; i < width; i++, byte++)
                    *out++ = byte < bytes && byte + skip < length ? x[byte + skip] : 0;
            }
}

static void order_group(const Layout *layout, const float *x, int64_t length, int64_t m, int64_t g, int int8, int8_t *rounded,
                        Activations *to) {
    int64_t at = m * to->padded + g * padded_size(layout->group_size);
    if (!int8) {
        if (to->values[4]) order_exact(x, length, 4, to->values[4] + at);
        if (to->values[2]) order_exact(x, length, 2, to->values[2] + at);
        if (to->values[1]) order_exact(x, length, 1, to->values[1] + at);
        return;
    }
    float largest = 0;
    for (int64_t j = 0; j < length; j++) largest = fabsf(x[j]) > largest ? fabsf(x[j]) : largest;
    for (int64_t j = 0; j < length; j++) largest = x[j] == x[j] ? largest : NAN;
    float inverse = largest > 1e-30f && largest < INFINITY ? 127 / largest : 0;
    int32_t total = 0;
    for (int64_t j = 0; j < length; j++) total += rounded[j] = inverse ? (int8_t)rintf(x[j] * inverse) : 0;
    to->step[m * layout->groups + g] = largest / 127;
    if (to->rounded[4]) order_int8(rounded, length, 4, to->rounded[4] + at);
    if (to->rounded[2]) order_int8(rounded, length, 2, to->rounded[2] + at);
    if (to->rounded[1]) order_int8(rounded, length, 1, to->rounded[1] + at);
    int64_t s = g * layout->num_scales;
    for (int p = 0; p < layout->num_parts; p++)
        for (int k = 0; k < layout->part[p].rows; k++)
            to->correction[m * to->scales + s++] = largest / 127 * total * layout->part[p].lowest[k];
}

static int order_activations(const Layout *layout, const void *input, int64_t m, int bfloat, int int8, Activations *to) {
    int64_t n = layout->in_features, full = n / layout->group_size, rest = n % layout->group_size;
    to->padded = full * padded_size(layout->group_size) + padded_size(rest);
    to->scales = ceil_div(layout->groups * layout->num_scales, LANES) * LANES;
    float *x = malloc(n * sizeof *x);
    int8_t *rounded = malloc(layout->group_size);
    int failed = !x || !rounded;
    for (int p = 0; p < layout->num_parts; p++) {
        int bits = layout->part[p].bits;
        if (int8 && !to->rounded[bits]) failed |= !(to->rounded[bits] = malloc(m * to->padded));
        if (!int8 && !to->values[bits]) failed |= !(to->values[bits] = malloc(m * to->padded * sizeof(float)));
    }
    if (int8) {
        failed |= !(to->step = malloc(m * layout->groups * sizeof(float)));
        failed |= !(to->correction = calloc(m * to->scales, sizeof(float)));
    }
    for (int64_t i = 0; i < m && !failed; i++) {
        for (int64_t j = 0; j < n; j++)
            x[j] = bfloat ? from_bfloat(((const uint16_t *)input)[i * n + j]) : ((const float *)input)[i * n + j];
        for (int64_t g = 0; g < layout->groups; g++)
            order_group(layout, x + g * layout->group_size, g < full ? layout->group_size : rest, i, g, int8, rounded, to);
    }
    free(x);
    free(rounded);
    return failed;
}

static void release(Activations *x) {
    for (int bits = 0; bits < 5; bits++) free(x->values[bits]), free(x->rounded[bits]);
    free(x->step);
    free(x->correction);
}

/* ------------------------------------------------------------------ R rows of the matrix times M activations */

INLINE void load_scales(const uint16_t *half, int64_t count, float *out) {
    uint16_t rest[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) halves_to_floats(half + i, out + i);
    memcpy(rest, half + i, (count - i) * sizeof *half);
    halves_to_floats(rest, out + i);
}

INLINE void exact_part(const Part *part, const int bits, const int R, const int M, const uint8_t *const *code, int64_t at,
                       int64_t length, const float *const *scale, int64_t s, const float *x, int64_t padded,
                       Floats total[][4][2]) {
    const int chains = R * M > 4 ? 1 : 2; /* of additions that wait for each other */
    int64_t bytes = part_bytes(length, bits);
    Table table[4];
    Words word[4];
    for (int r = 0; r < R; r++) table[r] = weighted(part->basis, scale[r] + s, part->rows);
    for (int64_t first = 0; first < bytes; first += LANES * bits, x += BLOCK) {
        for (int r = 0; r < R; r++) {
            word[r] = load_words(code[r] + at + first, bits, bytes - first);
            __builtin_prefetch(code[r] + at + first + AHEAD);
        }
#pragma GCC unroll 8
        for (int turn = 0; turn < 8; turn++)
            for (int r = 0; r < R; r++) {
                Floats value = look_up(table[r], word[r], turn * bits, bits);
                for (int m = 0; m < M; m++)
                    total[r][m][turn % chains] =
                        multiply_add(value, load(x + m * padded + turn * LANES), total[r][m][turn % chains]);
            }
    }
}

INLINE void exact_rows(const Matrix *matrix, const Activations *input, int64_t row, int64_t first_m, const int R, const int M,
                       const float *const *scale, float *output, int64_t stride) {
    const Layout *layout = matrix->layout;
    const uint8_t *code[4];
    Floats total[4][4][2];
    for (int r = 0; r < R; r++) {
        code[r] = matrix->weight + (row + r) * layout->row_bytes;
        for (int m = 0; m < M; m++) total[r][m][0] = total[r][m][1] = zeros();
    }
    int64_t at = 0, s = 0, place = first_m * input->padded;
    for (int64_t g = 0; g < layout->groups; g++) {
        int64_t left = layout->in_features - g * layout->group_size;
        int64_t length = left < layout->group_size ? left : layout->group_size;
        for (int p = 0; p < layout->num_parts; p++) {
            const Part *part = layout->part + p;
            const float *x = input->values[part->bits] + place;
#define PART(bits) exact_part(part, bits, R, M, code, at, length, scale, s, x, input->padded, total)
            if (part->bits == 4) PART(4);
            else if (part->bits == 2) PART(2);
            else PART(1);
#undef PART
            at += part_bytes(length, part->bits), s += part->rows;
        }
        place += padded_size(layout->group_size);
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) output[m * stride + r] = sum(add(total[r][m][0], total[r][m][1]));
}

INLINE void int8_part(const Part *part, const int bits, const int rows, const int R, const uint8_t *const *code, int64_t at,
                      int64_t length, const float *const *scale, int64_t s, const int8_t *x, Floats *group) {
    int64_t bytes = part_bytes(length, bits);
    Bytes sums[4][MAX_BASIS], table[MAX_BASIS];
    for (int k = 0; k < rows; k++) table[k] = load_table(part->above[k]);
    for (int r = 0; r < R; r++)
        for (int k = 0; k < rows; k++) sums[r][k] = no_bytes();
    for (int64_t first = 0; first < bytes; first += LANES * bits, x += BLOCK)
        for (int r = 0; r < R; r++) {
            Bytes packed = load_bytes(code[r] + at + first, bits, bytes - first);
            __builtin_prefetch(code[r] + at + first + AHEAD);
#pragma GCC unroll 2
            for (int turn = 0; turn < 2; turn++) {
                Bytes index = code_bytes(packed, turn * bits, bits), activations = load_activations(x + turn * 4 * LANES);
                for (int k = 0; k < rows; k++) sums[r][k] = dot(sums[r][k], table[k], index, activations);
            }
        }
    for (int r = 0; r < R; r++)
        for (int k = 0; k < rows; k++) group[r] = multiply_add(integers(sums[r][k]), all(scale[r][s + k]), group[r]);
}

INLINE void int8_rows(const Matrix *matrix, const Activations *input, int64_t row, int64_t m, const int R, const int M,
                      const float *const *scale, float *output, int64_t stride) {
    (void)M, (void)stride; /* 1: several at a time were not faster than one after the other */
    const Layout *layout = matrix->layout;
    const uint8_t *code[4];
    Floats total[4];
    for (int r = 0; r < R; r++) {
        code[r] = matrix->weight + (row + r) * layout->row_bytes;
        total[r] = zeros();
        for (int64_t i = 0; i < input->scales; i += LANES)
            total[r] = multiply_add(load(scale[r] + i), load(input->correction + m * input->scales + i), total[r]);
    }
    int64_t at = 0, s = 0, place = m * input->padded;
    for (int64_t g = 0; g < layout->groups; g++) {
        int64_t left = layout->in_features - g * layout->group_size;
        int64_t length = left < layout->group_size ? left : layout->group_size;
        Floats group[4];
        for (int r = 0; r < R; r++) group[r] = zeros();
        for (int p = 0; p < layout->num_parts; p++) {
            const Part *part = layout->part + p;
            const int8_t *x = input->rounded[part->bits] + place;
#define PART(bits, rows) int8_part(part, bits, rows, R, code, at, length, scale, s, x, group)
            if (part->bits == 4 && part->rows == 2) PART(4, 2);
            else if (part->bits == 4 && part->rows == 1) PART(4, 1);
            else if (part->bits == 4) PART(4, part->rows);
            else if (part->bits == 2 && part->rows == 1) PART(2, 1);
            else if (part->bits == 2) PART(2, part->rows);
            else PART(1, part->rows);
#undef PART
            at += part_bytes(length, part->bits), s += part->rows;
        }
        for (int r = 0; r < R; r++)
            total[r] = multiply_add(group[r], all(input->step[m * layout->groups + g]), total[r]);
        place += padded_size(layout->group_size);
    }
    for (int r = 0; r < R; r++) output[r] = sum(total[r]);
}

/* What is built: one or ROWS rows, one or four activations. */
typedef void Tile(const Matrix *, const Activations *, int64_t, int64_t, const float *const *, float *, int64_t);
#define TILE(name, kind, R, M)                                                                                           \
    static void name(const Matrix *matrix, const Activations *input, int64_t row, int64_t m, const float *const *scale,  \
                     float *output, int64_t stride) {                                                                    \
        kind##_rows(matrix, input, row, m, R, M, scale, output, stride);                                                 \
    }
TILE(exact_one_one, exact, 1, 1)
TILE(exact_one_four, exact, 1, 4)
TILE(int8_one, int8, 1, 1)
#if ROWS > 1
TILE(exact_rows_one, exact, ROWS, 1)
TILE(exact_rows_four, exact, ROWS, 4)
TILE(int8_rows_one, int8, ROWS, 1)
#else
#define exact_rows_one exact_one_one
#define exact_rows_four exact_one_four
#define int8_rows_one int8_one
#endif
static Tile *const exact_tiles[2][2] = {{exact_one_one, exact_one_four}, {exact_rows_one, exact_rows_four}};
static Tile *const int8_tiles[2] = {int8_one, int8_rows_one};

/* Two scales of which one is always three times the other are one, of the code 3 c_0 + c_1: half the work for the integer kernel.
   Returns whether all pairs are such, and the second ones. */
INLINE int untie(const float *restrict scale, int64_t pairs, float *restrict second) {
    int different = 0;
    for (int64_t i = 0; i < pairs; i++) {
        second[i] = scale[2 * i + 1];
        different |= scale[2 * i] != 3 * second[i];
    }
    return !different;
}

static void tie_layout(const Layout *layout, Layout *tied) {
    *tied = *layout;
    tied->num_scales = tied->part[0].rows = 1;
    for (int c = 0; c < 16; c++) tied->part[0].above[0][c] = 3 * layout->part[0].above[0][c] + layout->part[0].above[1][c];
}

static int tie_activations(const Activations *x, int64_t m, int64_t groups, Activations *tied) {
    *tied = *x;
    tied->scales = ceil_div(groups, LANES) * LANES;
    if (!(tied->correction = calloc(m * tied->scales, sizeof(float)))) return 1;
    for (int64_t i = 0; i < m; i++)
        for (int64_t g = 0; g < groups; g++) {
            const float *pair = x->correction + i * x->scales + 2 * g;
            tied->correction[i * tied->scales + g] = 3 * pair[0] + pair[1];
        }
    return 0;
}

/* `output` (m, rows) = `input` (m, in_features) times the matrix, both float32 or bfloat16. Returns 0, or 1 without memory. */
int hf_rb_gemv(const Layout *layout, const uint8_t *weight, const uint16_t *scales, int64_t rows, const void *input, int64_t m,
               int bfloat, int int8, int threads, void *output) {
    Layout tied_layout;
    Matrix matrix = {layout, weight, scales, rows}, tied_matrix = {&tied_layout, weight, scales, rows};
    Activations x, tied_x;
    memset(&x, 0, sizeof x);
    int failed = order_activations(layout, input, m, bfloat, int8, &x);
    int pairs = int8 && !failed && layout->num_parts == 1 && layout->num_scales == 2;
    if (pairs) {
        tie_layout(layout, &tied_layout);
        failed = tie_activations(&x, m, layout->groups, &tied_x);
    }
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        /* float32 scales of a tile, and the second ones of its pairs; the integer kernel reads whole vectors */
        int64_t of_row = layout->groups * layout->num_scales, of_tile = ROWS * of_row + 2 * LANES;
        float *buffer = failed ? 0 : calloc(2 * of_tile, sizeof *buffer), result[4 * ROWS];
        failed |= !buffer;
#pragma omp for
        for (int64_t tile = 0; tile < ceil_div(rows, ROWS); tile++) {
            int64_t row = tile * ROWS, count = rows - row < ROWS ? rows - row : ROWS;
            const float *scale[ROWS];
            if (failed) continue;
            for (int64_t i = 0; i < count * of_row; i += 32) __builtin_prefetch(scales + (row + 2 * ROWS) * of_row + i);
            load_scales(scales + row * of_row, count * of_row, buffer);
            float *second = buffer + of_tile;
            int tied = pairs && untie(buffer, count * layout->groups, second);
            for (int64_t r = 0; r < count; r++) scale[r] = tied ? second + r * layout->groups : buffer + r * of_row;
            for (int64_t i = 0; i < m;) {
                int64_t some = m - i >= 4 && !int8 ? 4 : 1, whole = count == ROWS;
                Tile *kernel = int8 ? int8_tiles[whole] : exact_tiles[whole][some == 4];
                for (int64_t r = 0; r < (whole ? 1 : count); r++)
                    kernel(tied ? &tied_matrix : &matrix, tied ? &tied_x : &x, row + r, i, scale + r, result + r, ROWS);
                for (int64_t j = 0; j < some; j++, i++)
                    for (int64_t r = 0; r < count; r++) {
                        int64_t place = i * rows + row + r;
                        if (bfloat) ((uint16_t *)output)[place] = to_bfloat(result[j * ROWS + r]);
                        else ((float *)output)[place] = result[j * ROWS + r];
                    }
            }
        }
        free(buffer);
    }
    if (pairs) free(tied_x.correction);
    release(&x);
    return failed;
}

/* ------------------------------------------------------------------ rows as numbers */

INLINE void expand_part(const Part *part, const int bits, const uint8_t *code, int64_t length, const float *scale, int first,
                        float *out) {
    int64_t bytes = part_bytes(length, bits);
    Table table = weighted(part->basis, scale, part->rows);
    for (int shift = 0; shift < 8; shift += bits, out += bytes, length -= bytes) {
        int64_t count = length < bytes ? length : bytes, j = 0;
        for (; j + LANES <= count; j += LANES) {
            Floats value = neighbours(table, code + j, shift, bits);
            store(out + j, first ? value : add(load(out + j), value));
        }
        if (j < count) {
            uint8_t rest[LANES] = {0};
            float value[LANES];
            memcpy(rest, code + j, count - j);
            store(value, neighbours(table, rest, shift, bits));
            for (int64_t i = j; i < count; i++) out[i] = first ? value[i - j] : out[i] + value[i - j];
        }
    }
}

/* A group in bfloat16, of a layout with one part. */
INLINE void expand_group(const Part *part, const uint8_t *code, int64_t length, const float *scale, uint16_t *out) {
    int64_t bytes = part_bytes(length, part->bits);
    Table table = weighted(part->basis, scale, part->rows);
    for (int shift = 0; shift < 8 && length > 0; shift += part->bits, out += bytes, length -= bytes)
        expand_bfloat(table, code, shift, length < bytes ? length : bytes, out);
}

/* The matrix `(rows, in_features)` in float32 or bfloat16. Returns 0, or 1 without memory. */
int hf_rb_expand(const Layout *layout, const uint8_t *weight, const uint16_t *scales, int64_t rows, int bfloat, int threads,
                 void *output) {
    int direct = bfloat && layout->num_parts == 1 && EXPANDS_TO_BFLOAT, failed = 0;
    int64_t of_row = layout->groups * layout->num_scales;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        float *buffer = malloc((layout->group_size + of_row + LANES) * sizeof *buffer);
        failed |= !buffer;
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            if (failed) continue;
            const uint8_t *code = weight + row * layout->row_bytes;
            float *scale = buffer + layout->group_size;
            load_scales(scales + row * of_row, of_row, scale);
            for (int64_t g = 0; g < layout->groups; g++) {
                int64_t start = g * layout->group_size, left = layout->in_features - start;
                int64_t length = left < layout->group_size ? left : layout->group_size;
                int64_t place = row * layout->in_features + start;
                uint16_t *rounded = (uint16_t *)output + place;
                float *out = bfloat ? buffer : (float *)output + place;
                for (int p = 0; p < layout->num_parts; p++) {
                    const Part *part = layout->part + p;
                    if (direct) expand_group(part, code, length, scale, rounded);
                    else if (part->bits == 4) expand_part(part, 4, code, length, scale, p == 0, out);
                    else if (part->bits == 2) expand_part(part, 2, code, length, scale, p == 0, out);
                    else expand_part(part, 1, code, length, scale, p == 0, out);
                    code += part_bytes(length, part->bits), scale += part->rows;
                }
                if (bfloat && !direct)
                    for (int64_t j = 0; j < length; j++) rounded[j] = to_bfloat(out[j]);
            }
        }
        free(buffer);
    }
    return failed;
}
