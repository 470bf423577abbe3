/* The solver of solver.py, on one group of weights at a time; see there for the method.

   It takes the steps of the torch code in the same order and in the same precision (float32 weights, float64 sums, no fused
   multiply-adds). Groups do not touch each other, so the number of threads changes nothing.

   Sixteen groups are sorted together, one in each lane of a vector, by a network of comparisons that does not depend on the
   data: plain loops that every compiler turns into vector instructions. What follows is done group by group. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define MAX_PLANES 3
#define MAX_CODES 27 /* combinations of trits */
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    int32_t planes, starts, tied, max_iter, relative;
    int32_t paper_start;                  /* before the `starts`: all trits sign(w) */
    double start[4][MAX_PLANES];          /* shares of the largest sum of scales */
    double direction[MAX_PLANES];         /* of tied scales */
    double reach, tol, ridge_init, ridge_max, kappa_threshold;
} Options;

/* Sorted weights and their prefix sums, `LANES` apart; the sums of |w| and of w^2. */
typedef struct {
    const float *sorted;
    const double *prefix;
    int64_t length;
    double total, squares;
} Group;

/* ------------------------------------------------------------------ sorting */

/* Not inlined: the compiler needs `restrict` to see that the two do not overlap. */
static __attribute__((noinline)) void exchange(float *restrict a, float *restrict b, int64_t count) {
    for (int64_t i = 0; i < count * LANES; i++) {
        float low = a[i] < b[i] ? a[i] : b[i];
        float high = a[i] < b[i] ? b[i] : a[i];
        a[i] = low, b[i] = high;
    }
}

/* Batcher's merge exchange (Knuth, volume 3, 5.2.2 M), for any length: i and i + d change places where i & p = r. */
static void sort_lanes(float *x, int64_t length) {
    int64_t top = 1;
    while (2 * top < length) top *= 2;
    for (int64_t p = top; p > 0; p /= 2) {
        int64_t q = top, r = 0, d = p;
        for (;;) {
            for (int64_t i = r; i + d < length; i += 2 * p) {
                int64_t count = length - d - i < p ? length - d - i : p;
                exchange(x + i * LANES, x + (i + d) * LANES, count);
            }
            if (q == p) break;
            d = q - p, q /= 2, r = p;
        }
    }
}

static void sum_lanes(const float *restrict x, int64_t length, double *restrict prefix, double *restrict total,
                      double *restrict squares) {
    for (int lane = 0; lane < LANES; lane++) prefix[lane] = total[lane] = squares[lane] = 0;
    for (int64_t i = 0; i < length; i++)
        for (int lane = 0; lane < LANES; lane++) {
            double value = x[i * LANES + lane];
            prefix[(i + 1) * LANES + lane] = prefix[i * LANES + lane] + value;
            total[lane] += fabs(value);
            squares[lane] += value * value;
        }
}

/* ------------------------------------------------------------------ step 2: the nearest sums of scales */

/* The trit of a plane in a combination, which are numbered in lexicographic order. */
INLINE int trit(int code, int plane, int planes) {
    static const int power[] = {1, 3, 9};
    return code / power[planes - 1 - plane] % 3 - 1;
}

INLINE double below(double x) {
    int64_t bits;
    if (x == 0) return -4.9406564584124654e-324;
    memcpy(&bits, &x, 8);
    bits += x > 0 ? -1 : 1;
    memcpy(&x, &bits, 8);
    return x;
}

INLINE float belowf(float x) {
    int32_t bits;
    if (x == 0) return -1.40129846e-45f;
    memcpy(&bits, &x, 4);
    bits += x > 0 ? -1 : 1;
    memcpy(&x, &bits, 4);
    return x;
}

/* Cuts the line between the sums of scales: a weight with exactly m cuts below it takes code[m]. `order` is that of the last
   call, which is nearly that of this one. */
INLINE void intervals(const double *scale, const int planes, const int codes, int *order, float *cut, int *code) {
    double level[MAX_CODES], sorted[MAX_CODES];
    for (int c = 0; c < codes; c++) {
        level[c] = trit(c, 0, planes) * scale[0];
        for (int k = 1; k < planes; k++) level[c] += trit(c, k, planes) * scale[k];
    }
    for (int i = 0; i < codes; i++) {
        int moving = order[i], j = i;
        double value = level[moving];
        for (; j && (sorted[j - 1] > value || (sorted[j - 1] == value && order[j - 1] > moving)); j--)
            sorted[j] = sorted[j - 1], order[j] = order[j - 1];
        sorted[j] = value, order[j] = moving;
    }
    code[0] = order[0];
    for (int i = 1; i < codes; i++) {
        /* Combinations that coincide are one, the first. */
        code[i] = sorted[i] == sorted[i - 1] ? code[i - 1] : order[i];
        /* A weight in the middle goes to the lexicographically first of the two. */
        double middle = (sorted[i] + sorted[i - 1]) / 2;
        double limit = code[i - 1] < code[i] ? middle : below(middle);
        float rounded = (float)limit;
        cut[i - 1] = rounded > limit ? belowf(rounded) : rounded;
    }
}

/* S'S and S'w of the nearest trits, from how many weights take a combination and what they sum to. */
INLINE void sums_of(Group group, const double *scale, const int planes, const int codes, int *order,
                    double gram[MAX_PLANES][MAX_PLANES], double *target) {
    float cut[MAX_CODES];
    int code[MAX_CODES];
    int32_t end[MAX_CODES + 1];
    double count[MAX_CODES] = {0}, sum[MAX_CODES] = {0};
    intervals(scale, planes, codes, order, cut, code);

    for (int i = 0; i < codes - 1; i++) end[i + 1] = 0;
    int64_t left = group.length;
    for (; left > 1; left -= left / 2) { /* all binary searches together */
        int32_t half = left / 2;
        for (int i = 0; i < codes - 1; i++)
            end[i + 1] += group.sorted[(end[i + 1] + half - 1) * (int64_t)LANES] <= cut[i] ? half : 0;
    }
    for (int i = 0; i < codes - 1; i++) end[i + 1] += group.sorted[end[i + 1] * (int64_t)LANES] <= cut[i];
    end[0] = 0, end[codes] = group.length;
    for (int i = 0; i < codes; i++) {
        count[code[i]] += end[i + 1] - end[i];
        sum[code[i]] += group.prefix[end[i + 1] * (int64_t)LANES] - group.prefix[end[i] * (int64_t)LANES];
    }
    for (int k = 0; k < planes; k++) {
        target[k] = 0;
        for (int c = 0; c < codes; c++) target[k] += trit(c, k, planes) * sum[c];
        for (int l = 0; l <= k; l++) {
            gram[k][l] = 0;
            for (int c = 0; c < codes; c++) gram[k][l] += trit(c, k, planes) * trit(c, l, planes) * count[c];
            gram[l][k] = gram[k][l];
        }
    }
}

static void trit_sums(Group group, const double *scale, int planes, int *order, double gram[MAX_PLANES][MAX_PLANES],
                      double *target) {
    if (planes == 1) sums_of(group, scale, 1, 3, order, gram, target);
    else if (planes == 2) sums_of(group, scale, 2, 9, order, gram, target);
    else sums_of(group, scale, 3, 27, order, gram, target);
}

/* ------------------------------------------------------------------ step 1: the scales */

/* Solves (gram + ridge I) a = target through the adjugate and returns the Frobenius condition number. The ridge is kept apart:
   counts are exact integers, and 128 + 1e-8 would lose most of it. */
INLINE double solve_small(double g[MAX_PLANES][MAX_PLANES], const double *b, double ridge, const int planes, double *a) {
    if (planes == 1) {
        a[0] = b[0] / (g[0][0] + ridge);
        return 1;
    }
    if (planes == 2) {
        double determinant = (g[0][0] * g[1][1] - g[0][1] * g[0][1]) + ridge * (g[0][0] + g[1][1]) + ridge * ridge;
        a[0] = ((g[1][1] * b[0] - g[0][1] * b[1]) + ridge * b[0]) / determinant;
        a[1] = ((g[0][0] * b[1] - g[0][1] * b[0]) + ridge * b[1]) / determinant;
        double s = g[0][0] + ridge, t = g[1][1] + ridge;
        return (s * s + t * t + 2 * (g[0][1] * g[0][1])) / fabs(determinant);
    }
    double adjugate[3][3], trace = g[0][0] + g[1][1] + g[2][2], minors = 0, norm = 0, inverse_norm = 0;
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) {
            int p = (j + 1) % 3, q = (j + 2) % 3, r = (i + 1) % 3, s = (i + 2) % 3;
            adjugate[i][j] = g[p][r] * g[q][s] - g[p][s] * g[q][r];
        }
    for (int i = 0; i < 3; i++) minors += adjugate[i][i];
    double determinant = g[0][0] * adjugate[0][0] + g[0][1] * adjugate[1][0] + g[0][2] * adjugate[2][0];
    determinant = determinant + ridge * minors + ridge * ridge * trace + ridge * ridge * ridge;
    for (int i = 0; i < 3; i++) {
        double exact = 0, linear = trace * b[i];
        for (int j = 0; j < 3; j++) {
            exact += adjugate[i][j] * b[j];
            linear -= g[i][j] * b[j];
            double of_matrix = g[i][j] + (i == j ? ridge : 0);
            double of_adjugate = adjugate[i][j] + ridge * ((i == j ? trace : 0) - g[i][j]) + (i == j ? ridge * ridge : 0);
            norm += of_matrix * of_matrix, inverse_norm += of_adjugate * of_adjugate;
        }
        a[i] = (exact + ridge * linear + ridge * ridge * b[i]) / determinant;
    }
    return sqrt(norm * inverse_norm) / fabs(determinant);
}

INLINE void guarded_solve(double g[MAX_PLANES][MAX_PLANES], const double *b, double *ridge, const Options *options,
                          const int planes, double *a) {
    double kappa = solve_small(g, b, *ridge, planes, a);
    if (kappa >= options->kappa_threshold) {
        *ridge = fmin(*ridge * sqrt(kappa / options->kappa_threshold), options->ridge_max);
        solve_small(g, b, *ridge, planes, a);
    }
}

INLINE void ridge_step(double gram[MAX_PLANES][MAX_PLANES], const double *target, double *ridge, const Options *options,
                       const int planes, double *scale) {
    if (!options->tied) {
        guarded_solve(gram, target, ridge, options, planes, scale);
        return;
    }
    double along[MAX_PLANES][MAX_PLANES] = {{0}}, b = 0, a;
    for (int k = 0; k < planes; k++) {
        b += target[k] * options->direction[k];
        for (int l = 0; l < planes; l++) along[0][0] += gram[k][l] * options->direction[k] * options->direction[l];
    }
    guarded_solve(along, &b, ridge, options, 1, &a);
    for (int k = 0; k < planes; k++) scale[k] = a * options->direction[k];
}

/* ------------------------------------------------------------------ one group */

INLINE double norm_of(const double *a, const double *b, int planes) {
    double squares = 0;
    for (int k = 0; k < planes; k++) squares += (a[k] - b[k]) * (a[k] - b[k]);
    return sqrt(squares);
}

/* Alternates the two steps from where `scale`, `gram` and `target` stand. */
INLINE void alternate(Group group, const Options *options, const int planes, int *order, double gram[MAX_PLANES][MAX_PLANES],
                      double *target, double *scale) {
    static const double zero[MAX_PLANES] = {0};
    double ridge = options->ridge_init, next[MAX_PLANES];
    for (int step = 0; step < options->max_iter; step++) {
        ridge_step(gram, target, &ridge, options, planes, next);
        double moved = norm_of(next, scale, planes);
        memcpy(scale, next, sizeof next);
        double limit = options->relative ? options->tol * norm_of(next, zero, planes) : options->tol;
        if (!(moved >= limit && moved > 0)) break;
        if (step + 1 < options->max_iter) trit_sums(group, scale, planes, order, gram, target);
    }
}

INLINE void fit_group(Group group, const Options *options, const int planes, double *best) {
    int order[MAX_CODES];
    double gram[MAX_PLANES][MAX_PLANES], target[MAX_PLANES], best_loss = 0;
    for (int c = 0; c < MAX_CODES; c++) order[c] = c;
    int runs = options->paper_start + options->starts;
    for (int run = 0; run < runs; run++) {
        double scale[MAX_PLANES] = {1, 1, 1};
        if (run < options->paper_start) {
            for (int k = 0; k < planes; k++) {
                target[k] = group.total;
                for (int l = 0; l < planes; l++) gram[k][l] = group.length;
            }
        } else {
            double largest = fmax(-group.sorted[0], group.sorted[(group.length - 1) * LANES]);
            double top = fmin(options->reach * sqrt(group.squares / group.length), largest);
            for (int k = 0; k < planes; k++) /* in float32, so that sums that should coincide do */
                scale[k] = (float)(options->start[run - options->paper_start][k] * top);
            trit_sums(group, scale, planes, order, gram, target);
        }
        alternate(group, options, planes, order, gram, target, scale);
        double loss = 0;
        if (runs > 1) {
            trit_sums(group, scale, planes, order, gram, target);
            for (int k = 0; k < planes; k++) {
                loss -= 2 * scale[k] * target[k];
                for (int l = 0; l < planes; l++) loss += scale[k] * scale[l] * gram[k][l];
            }
        }
        /* Two starts that end in one place differ by rounding. */
        if (loss < best_loss - 1e-12 * group.squares || run == 0) {
            best_loss = loss;
            memcpy(best, scale, sizeof scale);
        }
    }
    for (int k = 0; k < planes; k++) best[k] = fabs(best[k]);
    for (int k = 1; k < planes; k++) /* descending */
        for (int l = k; l && best[l - 1] < best[l]; l--) {
            double swap = best[l];
            best[l] = best[l - 1], best[l - 1] = swap;
        }
}

/* ------------------------------------------------------------------ the two functions */

static int load_lanes(const float *weight, int64_t columns, int64_t start, int64_t groups, int64_t length, int64_t first,
                      int64_t count, float *x) {
    uint32_t bad = 0;
    for (int lane = 0; lane < LANES; lane++) {
        int64_t index = first + (lane < count ? lane : count - 1);
        const float *source = weight + index / groups * columns + start + index % groups * length;
        for (int64_t i = 0; i < length; i++) {
            uint32_t bits;
            memcpy(&bits, source + i, 4);
            bad |= (bits & 0x7f800000u) == 0x7f800000u;
            x[i * LANES + lane] = source[i];
        }
    }
    return bad;
}

/* Canonical scales `(rows, groups, planes)` of weights `(rows, columns)`. Returns 0; 1 if a weight is not finite, 2 without
   memory. */
int hf_rb_fit(const float *weight, int64_t rows, int64_t columns, int64_t group_size, const Options *options, int threads,
              double *scales) {
    int64_t full = columns / group_size, all = (columns + group_size - 1) / group_size, longest = full ? group_size : columns;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *sorted = aligned_alloc(64, longest * LANES * sizeof(float));
        double *prefix = aligned_alloc(64, (longest + 1) * LANES * sizeof(double)), absolute[LANES], squares[LANES];
        if (!sorted || !prefix) failed |= 2;
        for (int tail = 0; tail < 2; tail++) {
            int64_t start = tail ? full * group_size : 0, groups = tail ? 1 : full;
            int64_t length = tail ? columns - start : group_size;
            int64_t total = length ? rows * groups : 0;
#pragma omp for schedule(dynamic, 16) nowait
            for (int64_t first = 0; first < total; first += LANES) {
                int64_t count = total - first < LANES ? total - first : LANES;
                if (failed) continue;
                if (load_lanes(weight, columns, start, groups, length, first, count, sorted)) {
                    failed |= 1;
                    continue;
                }
                sort_lanes(sorted, length);
                sum_lanes(sorted, length, prefix, absolute, squares);
                for (int64_t lane = 0; lane < count; lane++) {
                    int64_t index = first + lane, place = index / groups * all + (tail ? full : index % groups);
                    Group group = {sorted + lane, prefix + lane, length, absolute[lane], squares[lane]};
                    double scale[MAX_PLANES] = {0};
                    if (options->planes == 1) fit_group(group, options, 1, scale);
                    else if (options->planes == 2) fit_group(group, options, 2, scale);
                    else fit_group(group, options, 3, scale);
                    memcpy(scales + place * options->planes, scale, options->planes * sizeof(double));
                }
            }
        }
        free(sorted);
        free(prefix);
    }
    return failed & 2 ? 2 : failed;
}

/* Nearest combinations of a group, as their numbers in lexicographic order; a plane without a scale has zero trits. Adds to the
   squared error and to the squared norm. */
INLINE void encode_group(const float *x, int64_t length, const float *scale, const int planes, const int codes,
                         uint8_t *code_of, double *error, double *norm) {
    double wide[MAX_PLANES], errors[8] = {0}, norms[8] = {0};
    int order[MAX_CODES], code[MAX_CODES];
    float cut[MAX_CODES], value[MAX_CODES];
    uint8_t stored[MAX_CODES];
    for (int c = 0; c < codes; c++) order[c] = c;
    for (int k = 0; k < planes; k++) wide[k] = scale[k];
    intervals(wide, planes, codes, order, cut, code);
    for (int i = 0; i < codes; i++) {
        stored[i] = 0, value[i] = 0;
        for (int k = 0; k < planes; k++) {
            int digit = scale[k] != 0 ? trit(code[i], k, planes) : 0;
            stored[i] = 3 * stored[i] + digit + 1;
            value[i] += digit * scale[k];
        }
    }
    for (int64_t first = 0; first < length; first += LANES) {
        int32_t cuts_below[LANES] = {0};
        int count = length - first < LANES ? length - first : LANES;
        float lane[LANES] = {0};
        memcpy(lane, x + first, count * sizeof(float));
        for (int i = 0; i < codes - 1; i++)
            for (int j = 0; j < LANES; j++) cuts_below[j] += lane[j] > cut[i];
        for (int j = 0; j < count; j++) {
            float change = value[cuts_below[j]] - lane[j];
            code_of[first + j] = stored[cuts_below[j]];
            errors[j % 8] += (double)change * change;
            norms[j % 8] += (double)lane[j] * lane[j];
        }
    }
    for (int j = 0; j < 8; j++) *error += errors[j], *norm += norms[j];
}

/* One part of `bits` bits a code: byte j holds the codes j, j + bytes, j + 2 bytes, ... */
static void pack_part(const uint8_t *code, int64_t length, int bits, uint8_t padding, uint8_t *packed) {
    int64_t bytes = (length * bits + 7) / 8;
    memset(packed, 0, bytes);
    for (int shift = 0; shift < 8; shift += bits, code += bytes, length -= bytes)
        for (int64_t j = 0; j < bytes; j++) packed[j] |= (j < length ? code[j] : padding) << shift;
}

/* The best trits for given `scales` `(rows, groups, planes)`: in the kernel's layout in `packed` `(rows, row_bytes)`, or as int8
   in `trits` `(planes, rows, columns)`, whichever is not null. `error` and `norm` `(rows)`: squared, in double precision. */
int hf_rb_encode(const float *weight, int64_t rows, int64_t columns, int64_t group_size, int planes, const float *scales,
                 int threads, int64_t row_bytes, uint8_t *packed, int8_t *trits, double *error, double *norm) {
    int64_t groups = (columns + group_size - 1) / group_size, longest = group_size < columns ? group_size : columns;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        uint8_t *code = malloc(3 * longest), *nibble = code + longest, *crumb = nibble + longest;
        if (!code) failed |= 2;
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            uint8_t *out = packed ? packed + row * row_bytes : 0;
            error[row] = norm[row] = 0;
            if (failed) continue;
            for (int64_t g = 0; g < groups; g++) {
                int64_t start = g * group_size, length = columns - start < group_size ? columns - start : group_size;
                const float *x = weight + row * columns + start, *scale = scales + (row * groups + g) * planes;
                if (planes == 1) encode_group(x, length, scale, 1, 3, code, error + row, norm + row);
                else if (planes == 2) encode_group(x, length, scale, 2, 9, code, error + row, norm + row);
                else encode_group(x, length, scale, 3, 27, code, error + row, norm + row);
                if (packed && planes == 3)
                    for (int64_t j = 0; j < length; j++) nibble[j] = code[j] / 3, crumb[j] = code[j] % 3;
                if (packed && planes > 1) {
                    pack_part(planes == 3 ? nibble : code, length, 4, 4, out);
                    out += (length + 1) / 2;
                }
                if (packed && planes != 2) {
                    pack_part(planes == 3 ? crumb : code, length, 2, 1, out);
                    out += (length + 3) / 4;
                }
                if (trits)
                    for (int k = 0; k < planes; k++)
                        for (int64_t j = 0; j < length; j++)
                            trits[(k * rows + row) * columns + start + j] = trit(code[j], k, planes);
            }
        }
        free(code);
    }
    return failed;
}
