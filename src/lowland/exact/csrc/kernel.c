/* The order "parameters" for three-layer networks of one output, compiled.
 *
 * The arithmetic is that of terms.py and parameters.py, the readable reference that tests hold it
 * to. What it adds is that a block of samples stays in the cache from its inputs to its share of
 * the Hessian: element-wise passes over main memory cost more than the matrix products between
 * them.
 *
 * A block lays quantities out as rows over consecutive samples. With the packed pairs of rows
 *
 *     X[kk'] = x_k x_k'                        k <= k'
 *     S[jj'] = q u_j u_j' + [j = j'] r c_j     j <= j'
 *     R[jm]  = q u_j z_m  + [m = j] r phi'_j
 *
 * its share of the Hessian is three products: WW = X S^T, Wv = x R^T, vv = (q z) z^T.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { IDENTITY, SIGMOID, TANH, SOFTPLUS, GELU, SILU, LEAKY_RELU };
enum { BCE, MSE };
enum { BOTH, TRACE_ALONE, LOSS };

/* A problem as the caller describes it; the order of the fields is that of compiled.py. */
typedef struct {
    int64_t networks, samples, inputs, hidden;
    int64_t x_start, x_stop; /* trained rows of [1; x] */
    int64_t z_start, z_stop; /* trained rows of [1; z] */
    int64_t x_stride, y_stride, scale_stride; /* between networks; 0 if they share the data */
    int64_t block;   /* samples in a block, a multiple of 16 */
    int32_t activation, loss, mode;
    int32_t pad;
    double negative_slope, scale;
} Problem;

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
