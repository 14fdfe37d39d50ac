/* The order "parameters" for three-layer networks of one output, compiled.
 *
 * The arithmetic is that of terms.py and by_parameters.py, the readable reference that tests hold it
 * to. What it adds is that a chunk of samples stays in the cache from its inputs to its share of
 * the Hessian: element-wise passes over main memory cost more than the matrix products between
 * them.
 *
 * A chunk lays quantities out as rows over consecutive samples. With the packed pairs of rows
 *
 *     X[kk'] = x_k x_k'                        k <= k'
 *     S[jj'] = q u_j u_j' + [j = j'] r c_j     j <= j'
 *     R[jm]  = q u_j z_m  + [m = j] r phi'_j
 *
 * its share of the Hessian is three products: WW = X S^T, Wv = x R^T, vv = (q z) z^T.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#ifndef _WIN32
#include <dlfcn.h>
#endif
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { IDENTITY, SIGMOID, TANH, SOFTPLUS, GELU, SILU, LEAKY_RELU };
enum { BCE, MSE };
enum { BOTH, TRACE_ALONE, LOSS };

/* A problem as the caller describes it; the order of the fields is that of c_backend.py. */
typedef struct {
    int64_t networks, samples, inputs, hidden;
    int64_t x_start, x_stop; /* trained rows of [1; x] */
    int64_t z_start, z_stop; /* trained rows of [1; z] */
    int64_t x_stride, y_stride, scale_stride; /* between networks; 0 if they share the data */
    int64_t chunk;   /* samples in a chunk, a multiple of 16 */
    int32_t activation, loss, mode;
    int32_t pad;
    double negative_slope, scale;
} Problem;

/* One thread's part of the work, with the order of the fields as in c_backend.py. */
typedef struct {
    Problem problem;
    const void *w, *v, *x, *y, *scale;                  /* of its first network */
    const void *packed, *trace_weight, *square_weight; /* for the gradient */
    void *out, *more;
    int64_t start, stop; /* samples */
    int64_t failed;
} Share;

typedef struct {
    void (*work)(Share *);
    Share *shares;
    int64_t count;
    int (*rank)(void), (*size)(void);
} Team;

static void take_part(void *data) {
    Team *team = data;
    for (int64_t i = team->rank(); i < team->count; i += team->size()) team->work(team->shares + i);
}

/* Work on all shares side by side, by the OpenMP threads that PyTorch has loaded and uses itself:
 * for a while after its operations they wait in a loop, and threads of our own would have to share
 * their processors. Returns 0, with nothing done, where there is no such library. */
int run_together(void (*work)(Share *), Share *shares, int64_t count) {
#ifdef _WIN32
    return 0;
#else
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    Team team = {.work = work, .shares = shares, .count = count};
    *(void **)&parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    *(void **)&team.rank = dlsym(RTLD_DEFAULT, "omp_get_thread_num");
    *(void **)&team.size = dlsym(RTLD_DEFAULT, "omp_get_num_threads");
    if (!parallel || !team.rank || !team.size) return 0;
    parallel(take_part, &team, (unsigned)count, 0);
    return 1;
#endif
}

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

/* One growing buffer a thread: a fresh one a call would pay for its pages each time. */
static _Thread_local void *arena;
static _Thread_local size_t arena_size;

static void *reserve(size_t size) {
    if (size > arena_size) {
        free(arena);
        arena_size = 0;
        arena = aligned_alloc(64, (size + 63) / 64 * 64);
        if (arena) arena_size = size;
    }
    return arena;
}

#define REAL double
#define BITS int64_t
#define NAME(name) name##_f64
#define EXP_HIGH 709.0
#define EXP_LOW -708.0
#define MAGIC 6755399441055744.0 /* 1.5 * 2^52: adding it rounds to an integer */
#define MANTISSA 52
#define BIAS 1023
#define LN2_HIGH 6.93147180369123816490e-01
#define LN2_LOW 1.90821492927058770002e-10
#define EXP_TERMS 13
#include "kernel.inc"
#undef REAL
#undef BITS
#undef NAME
#undef EXP_HIGH
#undef EXP_LOW
#undef MAGIC
#undef MANTISSA
#undef BIAS
#undef LN2_HIGH
#undef LN2_LOW
#undef EXP_TERMS

#define REAL float
#define BITS int32_t
#define NAME(name) name##_f32
#define EXP_HIGH 88.0f
#define EXP_LOW -87.0f
#define MAGIC 12582912.0f
#define MANTISSA 23
#define BIAS 127
#define LN2_HIGH 6.93145752e-1f
#define LN2_LOW 1.42860677e-6f
#define EXP_TERMS 8
#include "kernel.inc"

/* The functions are called through ctypes, which releases the interpreter's lock; the module exists
 * so that build tools and importlib know where the library lies. */
static struct PyModuleDef definition = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "_kernel"};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModule_Create(&definition); }
