/* The inner loops of grids.py, dsq.py and gptq.py, on float32 blocks `(length, rows)`: the columns of a group one after the
   other. See there for the methods.

   Sixteen rows are worked on together, one in each lane of a vector: plain loops that every compiler turns into vector
   instructions. Rows only meet in sums over a column, and these are added in a fixed order, so that the number of threads changes
   nothing. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define MAX_PLANES 3
#define MAX_LEVELS 8
#define INLINE static inline __attribute__((always_inline))
#define EACH_LANE for (int lane = 0; lane < LANES; lane++)

/* Rows `first` and following as a tile `(length, LANES)`; lanes without a row are zero. */
static void load(const float *block, int64_t length, int64_t rows, int64_t first, float *tile) {
    int count = rows - first < LANES ? rows - first : LANES;
    memset(tile, 0, length * LANES * sizeof(float));
    for (int64_t j = 0; j < length; j++) memcpy(tile + j * LANES, block + j * rows + first, count * sizeof(float));
}

static void store(const float *tile, int64_t length, int64_t rows, int64_t first, float *block) {
    int count = rows - first < LANES ? rows - first : LANES;
    for (int64_t j = 0; j < length; j++) memcpy(block + j * rows + first, tile + j * LANES, count * sizeof(float));
}

/* To the nearest integer, halves to even, for numbers that are small and not negative. */
INLINE float nearest_integer(float x) {
    return (x + 8388608.0f) - 8388608.0f;
}

/* To the nearest float16 number, halves to even, for numbers that are not negative and in range. */
INLINE float nearest_half(float x) {
    uint32_t bits;
    float normal, subnormal = (x + 0.75f) - 0.75f; /* multiples of 2^-24 */
    memcpy(&bits, &x, 4);
    bits = (bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fffu;
    memcpy(&normal, &bits, 4);
    return x < 6.103515625e-5f ? subnormal : normal;
}

/* ------------------------------------------------------------------ affine grids */

/* x^2.4 for x >= 0, to a relative 4e-7: with x = m 2^e, x^0.4 is m^0.4 2^(0.4 e). */
INLINE float power(float x) {
    int32_t bits, whole;
    float m, scale;
    memcpy(&bits, &x, 4);
    float exponent = 0.4f * ((bits >> 23) - 127);
    bits = (bits & 0x7fffff) | 0x3f800000;
    memcpy(&m, &bits, 4);
    whole = (int32_t)(exponent + 128) - 128; /* rounds down */
    float f = exponent - whole;
    bits = (whole + 127) << 23;
    memcpy(&scale, &bits, 4);
    float root = -0.0028159364592283964f;
    root = root * m + 0.030596554279327393f;
    root = root * m - 0.14401689171791077f;
    root = root * m + 0.3879770338535309f;
    root = root * m - 0.683196485042572f;
    root = root * m + 1.0424219369888306f;
    root = root * m + 0.3690339922904968f;
    float two = 0.0018762329127639532f;
    two = two * f + 0.00899258442223072f;
    two = two * f + 0.05582360550761223f;
    two = two * f + 0.24015453457832336f;
    two = two * f + 0.6931529641151428f;
    two = two * f + 0.9999999403953552f;
    return x * x * (root * two * scale);
}

INLINE float encode(float x, float lowest, float inverse, float last) {
    float code = (x - lowest) * inverse;
    code = code < 0 ? 0 : code;
    return nearest_integer(code > last ? last : code);
}

static void search_clip(const float *tile, int64_t length, float last, int shares, float *best_step, float *best_zero) {
    float low[LANES] = {0}, high[LANES] = {0}, best[LANES];
    for (int64_t j = 0; j < length; j++)
        EACH_LANE {
            float x = tile[j * LANES + lane];
            low[lane] = x < low[lane] ? x : low[lane];
            high[lane] = x > high[lane] ? x : high[lane];
        }
    EACH_LANE best[lane] = INFINITY;
    for (int i = 0; i < shares; i++) {
        float share = 1 - i / 100.0f, step[LANES], zero[LANES], lowest[LANES], inverse[LANES], error[LANES] = {0};
        EACH_LANE {
            step[lane] = nearest_half((share * high[lane] - share * low[lane]) / last);
            float offset = step[lane] > 0 ? -(share * low[lane]) / step[lane] : 0;
            zero[lane] = nearest_integer(offset > last ? last : offset);
            lowest[lane] = -nearest_half(step[lane] * zero[lane]);
            inverse[lane] = step[lane] > 0 ? 1 / step[lane] : 0;
        }
        for (int64_t j = 0; j < length; j++)
            EACH_LANE {
                float x = tile[j * LANES + lane];
                float code = encode(x, lowest[lane], inverse[lane], last);
                error[lane] += power(fabsf(code * step[lane] + lowest[lane] - x));
            }
        EACH_LANE {
            int better = error[lane] < best[lane];
            best[lane] = better ? error[lane] : best[lane];
            best_step[lane] = better ? step[lane] : best_step[lane];
            best_zero[lane] = better ? zero[lane] : best_zero[lane];
        }
    }
}

/* Steps and zero points `(rows)`, both as float32. */
int hf_rb_fit_grids(const float *block, int64_t length, int64_t rows, int last, int shares, int threads, float *step,
                    float *zero) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *tile = malloc(length * LANES * sizeof(float));
        if (!tile) failed |= 1;
#pragma omp for
        for (int64_t first = 0; first < rows; first += LANES) {
            float steps[LANES] = {0}, zeros[LANES] = {0};
            if (failed) continue;
            load(block, length, rows, first, tile);
            search_clip(tile, length, last, shares, steps, zeros);
            store(steps, 1, rows, first, step);
            store(zeros, 1, rows, first, zero);
        }
        free(tile);
    }
    return failed;
}

/* ------------------------------------------------------------------ dual scales

   `weighted` is the column scale times the column's weight in the error, and `norm` the sum of both products. */

/* Starts as `_start` of dsq.py does. */
static void first_signs(const float *tile, int64_t length, int planes, const float *column, const float *weighted,
                        float norm, float *signs, float scale[][LANES], float *rest) {
    memcpy(rest, tile, length * LANES * sizeof(float));
    for (int k = 0; k < planes; k++, signs += length * LANES) {
        float sum[LANES] = {0};
        for (int64_t j = 0; j < length; j++)
            EACH_LANE {
                float x = rest[j * LANES + lane];
                signs[j * LANES + lane] = x >= 0 ? 1 : -1;
                sum[lane] += fabsf(x) * weighted[j];
            }
        EACH_LANE scale[k][lane] = sum[lane] / norm;
        for (int64_t j = 0; j < length; j++)
            EACH_LANE rest[j * LANES + lane] -= scale[k][lane] * column[j] * signs[j * LANES + lane];
    }
}

/* The signs of the nearest levels. */
INLINE void nearest_signs(const float *tile, int64_t length, const int planes, const float *column,
                          float scale[][LANES], float *signs) {
    const int levels = 1 << planes;
    float value[MAX_LEVELS][LANES], middle[MAX_LEVELS][LANES];
    int32_t code[MAX_LEVELS][LANES];
    for (int c = 0; c < levels; c++)
        EACH_LANE {
            value[c][lane] = (c & 1) ? scale[0][lane] : -scale[0][lane];
            for (int k = 1; k < planes; k++) value[c][lane] += (c >> k & 1) ? scale[k][lane] : -scale[k][lane];
            code[c][lane] = c;
        }
    for (int end = levels - 1; end; end--)
        for (int c = 0; c < end; c++)
            EACH_LANE {
                float a = value[c][lane], b = value[c + 1][lane];
                int32_t x = code[c][lane], y = code[c + 1][lane];
                int swap = a > b;
                value[c][lane] = swap ? b : a, value[c + 1][lane] = swap ? a : b;
                code[c][lane] = swap ? y : x, code[c + 1][lane] = swap ? x : y;
            }
    for (int c = 1; c < levels; c++) EACH_LANE middle[c][lane] = (value[c][lane] + value[c - 1][lane]) / 2;
    for (int64_t j = 0; j < length; j++) {
        int32_t found[LANES];
        EACH_LANE found[lane] = code[0][lane];
        for (int c = 1; c < levels; c++)
            EACH_LANE found[lane] = tile[j * LANES + lane] / column[j] >= middle[c][lane] ? code[c][lane] : found[lane];
        for (int k = 0; k < planes; k++)
            EACH_LANE signs[(k * length + j) * LANES + lane] = (found[lane] >> k & 1) ? 1 : -1;
    }
}

/* Cholesky; planes that are nearly dependent keep their scales. */
static void solve_row(int planes, double matrix[][MAX_PLANES], const double *target, double smallest, float scale[][LANES],
                      int lane) {
    double lower[MAX_PLANES][MAX_PLANES] = {{0}}, x[MAX_PLANES];
    for (int k = 0; k < planes; k++)
        for (int l = 0; l <= k; l++) {
            double sum = matrix[k][l];
            for (int i = 0; i < l; i++) sum -= lower[k][i] * lower[l][i];
            if (k == l && !(sum > smallest * smallest)) return;
            lower[k][l] = k == l ? sqrt(sum) : sum / lower[l][l];
        }
    for (int k = 0; k < planes; k++) {
        x[k] = target[k];
        for (int i = 0; i < k; i++) x[k] -= lower[k][i] * x[i];
        x[k] /= lower[k][k];
    }
    for (int k = planes - 1; k >= 0; k--) {
        for (int i = k + 1; i < planes; i++) x[k] -= lower[i][k] * x[i];
        x[k] /= lower[k][k];
        scale[k][lane] = x[k];
    }
}

INLINE void fit_rows(const float *tile, int64_t length, const int planes, const float *column, const float *weighted, float norm,
                     double smallest, const float *signs, float scale[][LANES]) {
    float target[MAX_PLANES][LANES] = {{0}}, products[MAX_PLANES][MAX_PLANES][LANES] = {{{0}}};
    for (int64_t j = 0; j < length; j++) {
        const float c = weighted[j], square = column[j] * c;
        for (int k = 0; k < planes; k++) {
            const float *sign = signs + (k * length + j) * LANES;
            EACH_LANE target[k][lane] += tile[j * LANES + lane] * c * sign[lane];
            for (int l = 0; l < k; l++) {
                const float *other = signs + (l * length + j) * LANES;
                EACH_LANE products[k][l][lane] += square * sign[lane] * other[lane];
            }
        }
    }
    EACH_LANE {
        double matrix[MAX_PLANES][MAX_PLANES], right[MAX_PLANES];
        for (int k = 0; k < planes; k++) {
            right[k] = target[k][lane] / (double)norm, matrix[k][k] = 1;
            for (int l = 0; l < k; l++) matrix[k][l] = products[k][l][lane] / (double)norm;
        }
        solve_row(planes, matrix, right, smallest, scale, lane);
    }
}

/* What a tile adds to the normal equations of the columns. */
static void add_columns(const float *tile, int64_t length, int planes, const float *signs, float scale[][LANES],
                        double *sums) {
    for (int64_t j = 0; j < length; j++) {
        float total[LANES] = {0};
        double above = 0, below = 0;
        for (int k = 0; k < planes; k++)
            EACH_LANE total[lane] += scale[k][lane] * signs[(k * length + j) * LANES + lane];
        EACH_LANE above += (double)(tile[j * LANES + lane] * total[lane]), below += (double)(total[lane] * total[lane]);
        sums[2 * j] = above, sums[2 * j + 1] = below;
    }
}

static void round_of_tile(const float *tile, int64_t length, int planes, int first_round, const float *column,
                          const float *weighted, float norm, double smallest, float *signs, float *rest,
                          float scale[][LANES], double *sums) {
    if (first_round) first_signs(tile, length, planes, column, weighted, norm, signs, scale, rest);
    else if (planes == 1) nearest_signs(tile, length, 1, column, scale, signs);
    else if (planes == 2) nearest_signs(tile, length, 2, column, scale, signs);
    else nearest_signs(tile, length, 3, column, scale, signs);
    if (planes == 1) fit_rows(tile, length, 1, column, weighted, norm, smallest, signs, scale);
    else if (planes == 2) fit_rows(tile, length, 2, column, weighted, norm, smallest, signs, scale);
    else fit_rows(tile, length, 3, column, weighted, norm, smallest, signs, scale);
    add_columns(tile, length, planes, signs, scale, sums);
    /* A negative scale stands for the opposite signs, which the next round finds again. */
    for (int k = 0; k < planes; k++) EACH_LANE scale[k][lane] = fabsf(scale[k][lane]);
}

/* Row scales `(planes, rows)`; `columns` `(length)` holds the first column scales and gets the last. `weights` `(length)` are
   those of the columns in the error, or null. */
int hf_rb_fit_dual(const float *block, int64_t length, int64_t rows, int planes, int rounds, const float *weights,
                   double smallest_factor, float smallest_column, int threads, float *scales, float *columns) {
    int64_t tiles = (rows + LANES - 1) / LANES;
    double *sums = malloc(tiles * 2 * length * sizeof(double));
    float *weighted = malloc(length * sizeof(float));
    int failed = !sums || !weighted;
    for (int round = 0; round < rounds && !failed; round++) {
        float norm = 0;
        for (int64_t j = 0; j < length; j++) weighted[j] = weights ? columns[j] * weights[j] : columns[j];
        for (int64_t j = 0; j < length; j++) norm += columns[j] * weighted[j];
#pragma omp parallel num_threads(threads) reduction(| : failed)
        {
            float *tile = malloc((2 + planes) * length * LANES * sizeof(float));
            float *rest = tile + length * LANES, *signs = rest + length * LANES;
            if (!tile) failed |= 1;
#pragma omp for
            for (int64_t i = 0; i < tiles; i++) {
                float scale[MAX_PLANES][LANES] = {{0}};
                if (failed) continue;
                load(block, length, rows, i * LANES, tile);
                if (round) load(scales, planes, rows, i * LANES, scale[0]);
                round_of_tile(tile, length, planes, !round, columns, weighted, norm, smallest_factor, signs, rest, scale,
                              sums + i * 2 * length);
                store(scale[0], planes, rows, i * LANES, scales);
            }
            free(tile);
        }
        for (int64_t j = 0; j < length && !failed; j++) {
            double above = 0, below = 0;
            for (int64_t i = 0; i < tiles; i++) above += sums[(i * length + j) * 2], below += sums[(i * length + j) * 2 + 1];
            float column = below > 0 ? fabs(above / below) : 0;
            columns[j] = column > smallest_column ? column : smallest_column;
        }
    }
    free(weighted);
    free(sums);
    return failed;
}

/* ------------------------------------------------------------------ columns, one by one */

/* What a column is rounded to: affine grids (`step`, `lowest`, `inverse` `(rows)`) if `levels` is 0, else sorted `value` and
   `code` `(levels, rows)`, the `middle` `(levels - 1, rows)` between them, and the column scales `column` `(length)`. */
typedef struct {
    int64_t levels;
    float last;
    const float *step, *lowest, *inverse, *value, *code, *middle, *column;
} Rounding;

/* How a tile's rows are rounded, LANES apart. */
typedef struct {
    float step[LANES], lowest[LANES], inverse[LANES];
    float value[MAX_LEVELS][LANES], code[MAX_LEVELS][LANES], middle[MAX_LEVELS][LANES];
} Rows;

static void load_rounding(const Rounding *rounding, int64_t rows, int64_t first, Rows *local) {
    if (rounding->levels) {
        load(rounding->value, rounding->levels, rows, first, local->value[0]);
        load(rounding->code, rounding->levels, rows, first, local->code[0]);
        load(rounding->middle, rounding->levels - 1, rows, first, local->middle[1]);
    } else {
        load(rounding->step, 1, rows, first, local->step);
        load(rounding->lowest, 1, rows, first, local->lowest);
        load(rounding->inverse, 1, rows, first, local->inverse);
    }
}

INLINE void round_column(const Rounding *rounding, const Rows *local, int64_t j, const float *x, float *code, float *value) {
    if (!rounding->levels) {
        EACH_LANE {
            code[lane] = encode(x[lane], local->lowest[lane], local->inverse[lane], rounding->last);
            value[lane] = code[lane] * local->step[lane] + local->lowest[lane];
        }
        return;
    }
    EACH_LANE code[lane] = local->code[0][lane], value[lane] = local->value[0][lane];
    for (int64_t c = 1; c < rounding->levels; c++)
        EACH_LANE {
            int above = x[lane] / rounding->column[j] >= local->middle[c][lane];
            code[lane] = above ? local->code[c][lane] : code[lane];
            value[lane] = above ? local->value[c][lane] : value[lane];
        }
    EACH_LANE value[lane] *= rounding->column[j];
}

/* Rounds the columns of `block` in turn and lets those that follow make up for it. `factor` and `residual` (or null) are
   `(length, length)`. On return `block` holds every column as it was when its turn came. */
int hf_rb_round_columns(float *block, int64_t length, int64_t rows, const Rounding *rounding, const float *factor,
                        const float *residual, int threads, uint8_t *codes, float *errors) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *tile = malloc(2 * length * LANES * sizeof(float)), *error = tile + length * LANES;
        if (!tile) failed |= 1;
#pragma omp for
        for (int64_t first = 0; first < rows; first += LANES) {
            int count = rows - first < LANES ? rows - first : LANES;
            Rows local;
            if (failed) continue;
            load(block, length, rows, first, tile);
            memset(&local, 0, sizeof local);
            load_rounding(rounding, rows, first, &local);
            for (int64_t j = 0; j < length; j++) {
                float x[LANES], e[LANES], code[LANES], value[LANES];
                memcpy(x, tile + j * LANES, sizeof x);
                round_column(rounding, &local, j, x, code, value);
                EACH_LANE error[j * LANES + lane] = e[lane] = (x[lane] - value[lane]) / factor[j * length + j];
                for (int lane = 0; lane < count; lane++) codes[j * rows + first + lane] = code[lane];
                for (int64_t i = j + 1; i < length; i++) {
                    float u = factor[j * length + i];
                    EACH_LANE tile[i * LANES + lane] -= u * e[lane];
                }
                for (int64_t i = j + 1; residual && i < length; i++) {
                    float p = residual[j * length + i];
                    EACH_LANE tile[i * LANES + lane] += p * x[lane];
                }
            }
            store(tile, length, rows, first, block);
            store(error, length, rows, first, errors);
        }
        free(tile);
    }
    return failed;
}
