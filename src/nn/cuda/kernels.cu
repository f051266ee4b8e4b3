// The kernels of the fused operations. Compiled once for each type of storage, which STORAGE names: 0 is float, 1 is
// bf16, 2 is f16. Arithmetic is in float, sums run in a fixed order: equal inputs give equal bits.
//
// A "row" is what lies adjacent in the last dimension. Kernels that work on rows have threads (lanes, rows of a
// block): a warp for each row where it is short, a whole block where it is long.

typedef long long index_t;

#if STORAGE == 0
typedef float stored;
__device__ __forceinline__ float widen(stored v) { return v; }
__device__ __forceinline__ stored narrow(float v) { return v; }
#elif STORAGE == 1
struct stored { unsigned short bits; };
__device__ __forceinline__ float widen(stored v) { return __uint_as_float((unsigned)v.bits << 16); }
__device__ __forceinline__ stored narrow(float v) {
    unsigned bits = __float_as_uint(v);
    stored s;
    s.bits = v != v ? 0x7fff : (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    return s;
}
#else
struct stored { unsigned short bits; };
__device__ __forceinline__ float widen(stored v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
}
__device__ __forceinline__ stored narrow(float v) {
    stored s;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(s.bits) : "f"(v));
    return s;
}
#endif

#if STORAGE != 0
__device__ __forceinline__ float widen(float v) { return v; }
#endif

#define HIDDEN __int_as_float(0xff800000)
#define NOTHING __int_as_float(0x7fffffff)

// Every index below `count`, spread over the grid.
#define EACH(i, count) \
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < (count); i += gridDim.x * blockDim.x)

// The row of this thread; every lane of a row leaves together.
#define ROW(row, rows) \
    unsigned row = blockIdx.x * blockDim.y + threadIdx.y; \
    if (row >= (rows)) return

// Columns of a row, spread over its lanes.
#define LANES(j, width) for (int j = threadIdx.x; j < (width); j += blockDim.x)

struct Sum {
    static __device__ __forceinline__ float none() { return 0.f; }
    static __device__ __forceinline__ float both(float a, float b) { return a + b; }
};
struct Highest {
    static __device__ __forceinline__ float none() { return HIDDEN; }
    static __device__ __forceinline__ float both(float a, float b) { return fmaxf(a, b); }
};

// What the lanes of a row have together; each of them gets it.
template <typename How> __device__ float together(float v) {
    for (int o = 16; o > 0; o >>= 1) v = How::both(v, __shfl_xor_sync(0xffffffffu, v, o));
    if (blockDim.x <= 32) return v;
    __shared__ float parts[32];
    int lane = threadIdx.x & 31, warps = (blockDim.x + 31) >> 5;
    __syncthreads();
    if (lane == 0) parts[threadIdx.x >> 5] = v;
    __syncthreads();
    v = lane < warps ? parts[lane] : How::none();
    for (int o = 16; o > 0; o >>= 1) v = How::both(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}

// Where row (i0, i1, i2) of a tensor with these strides begins.
__device__ __forceinline__ index_t begin(
    unsigned row, unsigned n1, unsigned n2, index_t s0, index_t s1, index_t s2
) {
    unsigned i2 = row % n2, rest = row / n2;
    return rest / n1 * s0 + rest % n1 * s1 + i2 * s2;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// The activations: 0 SiLU, 1 GELU by tanh, 2 GELU, 3 x·sigmoid(1.702x).
__device__ __forceinline__ void activate_both(int kind, float x, float& value, float& slope) {
    if (kind == 2) {
        float p = normcdff(x);
        value = x * p;
        slope = p + x * 0.3989422804f * expf(-0.5f * x * x);
    } else if (kind == 1) {
        float s = sigmoid(1.5957691216f * x * (1.f + 0.044715f * x * x));
        value = x * s;
        slope = s + x * s * (1.f - s) * 1.5957691216f * (1.f + 0.134145f * x * x);
    } else {
        float factor = kind == 3 ? 1.702f : 1.f;
        float s = sigmoid(factor * x);
        value = x * s;
        slope = s + factor * x * s * (1.f - s);
    }
}

// ---- norms -------------------------------------------------------------------------------------------------------

extern "C" __global__ void norm_forward(
    stored* y, float* moments, const stored* x, const stored* weight, const stored* bias, unsigned rows, int width,
    float eps, int centred, int n1, int n2, index_t s0, index_t s1, index_t s2
) {
    ROW(row, rows);
    x += begin(row, n1, n2, s0, s1, s2);
    y += (index_t)row * width;
    float mean = 0.f, squares = 0.f;
    if (centred) {
        LANES(j, width) mean += widen(x[j]);
        mean = together<Sum>(mean) / width;
    }
    LANES(j, width) {
        float v = widen(x[j]) - mean;
        squares += v * v;
    }
    float inverse = rsqrtf(together<Sum>(squares) / width + eps);
    if (threadIdx.x == 0) {
        moments[2 * row] = mean;
        moments[2 * row + 1] = inverse;
    }
    LANES(j, width) {
        float v = (widen(x[j]) - mean) * inverse;
        if (weight) v *= widen(weight[j]);
        if (bias) v += widen(bias[j]);
        y[j] = narrow(v);
    }
}

// With x̂ the normalised row and h = g · weight: dx = (h − [mean(h)] − x̂ · mean(h · x̂)) / deviation.
extern "C" __global__ void norm_backward(
    stored* dx, const stored* g, const stored* x, const stored* weight, const float* moments, unsigned rows, int width,
    int centred, int n1, int n2, index_t s0, index_t s1, index_t s2
) {
    ROW(row, rows);
    x += begin(row, n1, n2, s0, s1, s2);
    g += (index_t)row * width;
    dx += (index_t)row * width;
    float mean = moments[2 * row], inverse = moments[2 * row + 1], first = 0.f, second = 0.f;
    LANES(j, width) {
        float h = widen(g[j]) * (weight ? widen(weight[j]) : 1.f);
        first += h;
        second += h * (widen(x[j]) - mean) * inverse;
    }
    first = centred ? together<Sum>(first) / width : 0.f;
    second = together<Sum>(second) / width;
    LANES(j, width) {
        float h = widen(g[j]) * (weight ? widen(weight[j]) : 1.f);
        dx[j] = narrow((h - first - (widen(x[j]) - mean) * inverse * second) * inverse);
    }
}

// Adds up what the rows of a block (32 columns, blockDim.y rows) have for each column; row 0 gets it.
__device__ float down(float v, float (*parts)[33]) {
    __syncthreads();
    parts[threadIdx.y][threadIdx.x] = v;
    __syncthreads();
    if (threadIdx.y) return 0.f;
    float sum = 0.f;
    for (int i = 0; i < blockDim.y; i++) sum += parts[i][threadIdx.x];
    return sum;
}

// dweight = Σ g·x̂ and dbias = Σ g over the rows, for each column.
extern "C" __global__ void norm_parameters(
    stored* dweight, stored* dbias, const stored* g, const stored* x, const float* moments, unsigned rows, int width,
    int n1, int n2, index_t s0, index_t s1, index_t s2
) {
    __shared__ float parts[32][33];
    int j = blockIdx.x * 32 + threadIdx.x;
    float scaled = 0.f, plain = 0.f;
    if (j < width) {
#pragma unroll 4
        for (unsigned row = threadIdx.y; row < rows; row += blockDim.y) {
            float v = widen(g[(index_t)row * width + j]);
            float normal = widen(x[begin(row, n1, n2, s0, s1, s2) + j]) - moments[2 * row];
            scaled += v * normal * moments[2 * row + 1];
            plain += v;
        }
    }
    scaled = down(scaled, parts);
    plain = down(plain, parts);
    if (threadIdx.y || j >= width) return;
    if (dweight) dweight[j] = narrow(scaled);
    if (dbias) dbias[j] = narrow(plain);
}

// A block for each group of x (b, groups, channels, inner).
extern "C" __global__ void group_norm_forward(
    stored* y, float* moments, const stored* x, const stored* weight, const stored* bias, int groups, int channels,
    int inner, float eps, int silu
) {
    unsigned length = channels * inner, group = blockIdx.x;
    int first = group % groups * channels;
    x += (index_t)group * length;
    y += (index_t)group * length;
    float mean = 0.f, squares = 0.f;
    for (unsigned i = threadIdx.x; i < length; i += blockDim.x) mean += widen(x[i]);
    mean = together<Sum>(mean) / length;
    for (unsigned i = threadIdx.x; i < length; i += blockDim.x) {
        float v = widen(x[i]) - mean;
        squares += v * v;
    }
    float inverse = rsqrtf(together<Sum>(squares) / length + eps);
    if (threadIdx.x == 0) {
        moments[2 * group] = mean;
        moments[2 * group + 1] = inverse;
    }
    for (unsigned i = threadIdx.x; i < length; i += blockDim.x) {
        int c = first + i / inner;
        float v = (widen(x[i]) - mean) * inverse * widen(weight[c]) + widen(bias[c]);
        y[i] = narrow(silu ? v * sigmoid(v) : v);
    }
}

// The gradient of a group norm's result before SiLU.
__device__ __forceinline__ float before_silu(float g, float normal, float weight, float bias, int silu) {
    if (!silu) return g;
    float value, slope;
    activate_both(0, normal * weight + bias, value, slope);
    return g * slope;
}

extern "C" __global__ void group_norm_backward(
    stored* dx, const stored* g, const stored* x, const stored* weight, const stored* bias, const float* moments,
    int groups, int channels, int inner, int silu
) {
    unsigned length = channels * inner, group = blockIdx.x;
    int start = group % groups * channels;
    float mean = moments[2 * group], inverse = moments[2 * group + 1], first = 0.f, second = 0.f;
    x += (index_t)group * length;
    g += (index_t)group * length;
    dx += (index_t)group * length;
    for (unsigned i = threadIdx.x; i < length; i += blockDim.x) {
        int c = start + i / inner;
        float normal = (widen(x[i]) - mean) * inverse, w = widen(weight[c]);
        float h = before_silu(widen(g[i]), normal, w, widen(bias[c]), silu) * w;
        first += h;
        second += h * normal;
    }
    first = together<Sum>(first) / length;
    second = together<Sum>(second) / length;
    for (unsigned i = threadIdx.x; i < length; i += blockDim.x) {
        int c = start + i / inner;
        float normal = (widen(x[i]) - mean) * inverse, w = widen(weight[c]);
        float h = before_silu(widen(g[i]), normal, w, widen(bias[c]), silu) * w;
        dx[i] = narrow((h - first - normal * second) * inverse);
    }
}

// A block for each channel.
extern "C" __global__ void group_norm_parameters(
    stored* dweight, stored* dbias, const stored* g, const stored* x, const stored* weight, const stored* bias,
    const float* moments, int b, int groups, int channels, int inner, int silu
) {
    int c = blockIdx.x;
    float scaled = 0.f, plain = 0.f, w = widen(weight[c]), shift = widen(bias[c]);
    for (int image = 0; image < b; image++) {
        index_t group = (index_t)image * groups + c / channels;
        index_t start = ((index_t)image * groups * channels + c) * inner;
        float mean = moments[2 * group], inverse = moments[2 * group + 1];
        for (int i = threadIdx.x; i < inner; i += blockDim.x) {
            float normal = (widen(x[start + i]) - mean) * inverse;
            float v = before_silu(widen(g[start + i]), normal, w, shift, silu);
            scaled += v * normal;
            plain += v;
        }
    }
    scaled = together<Sum>(scaled);
    plain = together<Sum>(plain);
    if (threadIdx.x) return;
    if (dweight) dweight[c] = narrow(scaled);
    if (dbias) dbias[c] = narrow(plain);
}

// ---- rotary embedding --------------------------------------------------------------------------------------------

// y (b, h, n, d) of x with strides; sign −1 turns back.
extern "C" __global__ void rope(
    stored* y, const stored* x, const float* cosines, const float* sines, unsigned pairs, int h, int n, int half,
    float sign, int adjacent, index_t s0, index_t s1, index_t s2
) {
    EACH(i, pairs) {
        unsigned k = i % (unsigned)half, row = i / half, position = row % n;
        const stored* from = x + begin(row, h, n, s0, s1, s2);
        stored* to = y + (index_t)row * 2 * half;
        int one = adjacent ? 2 * k : k, two = adjacent ? 2 * k + 1 : k + half;
        float c = cosines[(index_t)position * half + k], s = sign * sines[(index_t)position * half + k];
        float a = widen(from[one]), b = widen(from[two]);
        to[one] = narrow(a * c - b * s);
        to[two] = narrow(b * c + a * s);
    }
}

// ---- softmax -----------------------------------------------------------------------------------------------------

extern "C" __global__ void softmax_forward(stored* y, const stored* x, unsigned rows, int width) {
    ROW(row, rows);
    x += (index_t)row * width;
    y += (index_t)row * width;
    float highest = HIDDEN, sum = 0.f;
    LANES(j, width) highest = fmaxf(highest, widen(x[j]));
    highest = together<Highest>(highest);
    LANES(j, width) sum += expf(widen(x[j]) - highest);
    float inverse = 1.f / together<Sum>(sum);
    LANES(j, width) y[j] = narrow(expf(widen(x[j]) - highest) * inverse);
}

// dx = y ∘ (g − Σ g·y); g is float for attention, else of the storage's type.
template <typename G> __device__ void softmax_slopes(stored* dx, const stored* y, const G* g, int width) {
    float sum = 0.f;
    LANES(j, width) sum += widen(y[j]) * widen(g[j]);
    sum = together<Sum>(sum);
    LANES(j, width) dx[j] = narrow(widen(y[j]) * (widen(g[j]) - sum));
}

extern "C" __global__ void softmax_backward(stored* dx, const stored* y, const stored* g, unsigned rows, int width) {
    ROW(row, rows);
    softmax_slopes(dx + (index_t)row * width, y + (index_t)row * width, g + (index_t)row * width, width);
}

// Probabilities p of scores (b, h, n, m) in rows `stride` apart, which may lie where p does. `causal`: query i sees key
// j ≤ i + m − n. The mask, of floats if `wide`, is added; with `causal` it leaves every query its own key.
extern "C" __global__ void attend_forward(
    stored* p, const float* scores, const void* mask, unsigned rows, int h, int n, int m, int stride, int causal,
    int wide, index_t m0, index_t m1, index_t m2
) {
    ROW(row, rows);
    unsigned head = row / n;
    int i = row % n, seen = causal ? i + 1 + m - n : m;
    index_t at = head / h * m0 + head % h * m1 + i * m2;
    scores += (index_t)row * stride;
    p += (index_t)row * stride;
    float highest = HIDDEN, sum = 0.f;
#define SCORE(j) \
    (scores[j] + (!mask || (causal && j == seen - 1) ? 0.f \
                  : wide ? ((const float*)mask)[at + j] : widen(((const stored*)mask)[at + j])))
    LANES(j, seen) highest = fmaxf(highest, SCORE(j));
    highest = together<Highest>(highest);
    LANES(j, seen) sum += expf(SCORE(j) - highest);
    float inverse = 1.f / together<Sum>(sum);
    LANES(j, m) p[j] = narrow(j < seen ? expf(SCORE(j) - highest) * inverse : 0.f);
}

// The gradient of the scores, scale and mask included, of that of the probabilities.
extern "C" __global__ void attend_backward(
    stored* ds, const stored* p, const float* dp, unsigned rows, int m, int stride
) {
    ROW(row, rows);
    index_t at = (index_t)row * stride;
    softmax_slopes(ds + at, p + at, dp + at, m);
}

// Attention without a graph for few queries: a block for each row of y (b, h, n, d). Shared memory holds the query, m
// scores and blockDim.x partial sums.
extern "C" __global__ void attend_rows(
    stored* y, const stored* q, const stored* k, const stored* v, const void* mask, int h, int n, int m, int d,
    float scale, int causal, int wide, index_t q0, index_t q1, index_t q2, index_t k0, index_t k1, index_t k2,
    index_t v0, index_t v1, index_t v2, index_t m0, index_t m1, index_t m2
) {
    extern __shared__ float shared[];
    float *query = shared, *scores = query + d, *parts = scores + m;
    index_t row = blockIdx.x;
    unsigned head = blockIdx.x / n, b = head / h, own = head % h;
    int i = blockIdx.x % n, seen = causal ? i + 1 + m - n : m;
    index_t at = b * m0 + own * m1 + i * m2;
    q += b * q0 + own * q1 + i * q2;
    k += b * k0 + own * k1;
    v += b * v0 + own * v1;
    LANES(c, d) query[c] = widen(q[c]);
    __syncthreads();
    int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    float highest = HIDDEN;
    // Each warp takes four keys at a time, so that their loads are under way together.
    for (int j = (threadIdx.x >> 5) * 4; j < seen; j += warps * 4) {
        float sums[4] = {0.f, 0.f, 0.f, 0.f};
        for (int c = lane; c < d; c += 32) {
#pragma unroll
            for (int u = 0; u < 4; u++)
                if (j + u < seen) sums[u] += query[c] * widen(k[(index_t)(j + u) * k2 + c]);
        }
#pragma unroll
        for (int u = 0; u < 4; u++) {
            float sum = sums[u];
            for (int o = 16; o > 0; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
            sum *= scale;
            if (j + u >= seen) continue;
            if (mask && !(causal && j + u == seen - 1))
                sum += wide ? ((const float*)mask)[at + j + u] : widen(((const stored*)mask)[at + j + u]);
            if (lane == 0) scores[j + u] = sum;
            highest = fmaxf(highest, sum);
        }
    }
    highest = together<Highest>(highest);
    __syncthreads();
    float sum = 0.f;
    LANES(j, seen) {
        float e = expf(scores[j] - highest);
        scores[j] = e;
        sum += e;
    }
    float inverse = 1.f / together<Sum>(sum);
    __syncthreads();
    // Threads share the columns out; where there are more threads than columns, several take every so many-th key.
    int shares = blockDim.x / d > 0 ? blockDim.x / d : 1, share = threadIdx.x / d;
    for (int c = shares > 1 ? threadIdx.x % d : threadIdx.x; c < d; c += shares > 1 ? d : blockDim.x) {
        float out = 0.f;
        if (shares == 1 || share < shares)
            for (int j = shares > 1 ? share : 0; j < seen; j += shares)
                out += scores[j] * widen(v[(index_t)j * v2 + c]);
        if (shares == 1) y[row * d + c] = narrow(out * inverse);
        else parts[threadIdx.x] = out;
    }
    if (shares == 1) return;
    __syncthreads();
    LANES(c, d) {
        float out = 0.f;
        for (int s = 0; s < shares; s++) out += parts[s * d + c];
        y[row * d + c] = narrow(out * inverse);
    }
}

// ---- activations -------------------------------------------------------------------------------------------------

extern "C" __global__ void activate(stored* y, const stored* x, unsigned count, int kind) {
    EACH(i, count) {
        float value, slope;
        activate_both(kind, widen(x[i]), value, slope);
        y[i] = narrow(value);
    }
}

extern "C" __global__ void activate_backward(stored* dx, const stored* x, const stored* g, unsigned count, int kind) {
    EACH(i, count) {
        float value, slope;
        activate_both(kind, widen(x[i]), value, slope);
        dx[i] = narrow(widen(g[i]) * slope);
    }
}

extern "C" __global__ void gated(stored* y, const stored* gate, const stored* up, unsigned count, int kind) {
    EACH(i, count) {
        float value, slope;
        activate_both(kind, widen(gate[i]), value, slope);
        y[i] = narrow(value * widen(up[i]));
    }
}

extern "C" __global__ void gated_backward(
    stored* dgate, stored* dup, const stored* gate, const stored* up, const stored* g, unsigned count, int kind
) {
    EACH(i, count) {
        float value, slope, v = widen(g[i]);
        activate_both(kind, widen(gate[i]), value, slope);
        if (dgate) dgate[i] = narrow(v * widen(up[i]) * slope);
        if (dup) dup[i] = narrow(v * value);
    }
}

// ---- cross-entropy and tables ------------------------------------------------------------------------------------

// A target that is no column gives no number.
extern "C" __global__ void cross_entropy_forward(
    float* loss, float* log_sums, const stored* x, const unsigned* targets, unsigned rows, int width
) {
    ROW(row, rows);
    x += (index_t)row * width;
    float highest = HIDDEN, sum = 0.f;
    LANES(j, width) highest = fmaxf(highest, widen(x[j]));
    highest = together<Highest>(highest);
    LANES(j, width) sum += expf(widen(x[j]) - highest);
    sum = highest + logf(together<Sum>(sum));
    if (threadIdx.x) return;
    unsigned target = targets[row];
    log_sums[row] = sum;
    loss[row] = target < width ? sum - widen(x[target]) : NOTHING;
}

extern "C" __global__ void cross_entropy_backward(
    stored* dx, const stored* x, const float* log_sums, const float* g, const unsigned* targets, unsigned rows,
    int width
) {
    ROW(row, rows);
    x += (index_t)row * width;
    dx += (index_t)row * width;
    float log_sum = log_sums[row], slope = g[row];
    int target = targets[row];
    LANES(j, width) dx[j] = narrow(slope * (expf(widen(x[j]) - log_sum) - (j == target ? 1.f : 0.f)));
}

// Rows `ids` of a table (count, width); one that it does not have gives no numbers.
extern "C" __global__ void gather(
    stored* y, const stored* table, const unsigned* ids, unsigned elements, int count, int width
) {
    EACH(i, elements) {
        unsigned id = ids[i / width];
        y[i] = id < count ? table[(index_t)id * width + i % width] : narrow(NOTHING);
    }
}

// dtable (count, width), zero before, of g (n, width): a block for each id, of which the first of equal ones adds up all,
// in order. Rows that the table does not have are left out.
extern "C" __global__ void gather_backward(
    stored* dtable, const stored* g, const unsigned* ids, int n, int count, int width
) {
    int first = blockIdx.x;
    unsigned id = ids[first];
    if (id >= count) return;
    bool earlier = false;
    LANES(i, first) earlier |= ids[i] == id;
    if (__syncthreads_or(earlier)) return;
    LANES(j, width) {
        float sum = 0.f;
        for (int i = first; i < n; i++)
            if (ids[i] == id) sum += widen(g[(index_t)i * width + j]);
        dtable[(index_t)id * width + j] = narrow(sum);
    }
}

// ---- sequences and vectors ---------------------------------------------------------------------------------------

// y = x · (1 + scale) + shift, x (b, n, c); the vectors' rows lie apart by their strides. shift may be missing.
extern "C" __global__ void modulate(
    stored* y, const stored* x, const stored* shift, const stored* scale, unsigned count, int n, int c,
    index_t shift_stride, index_t scale_stride
) {
    EACH(i, count) {
        unsigned j = i % c, image = i / c / n;
        float v = widen(x[i]) * (1.f + widen(scale[image * scale_stride + j]));
        y[i] = narrow(shift ? v + widen(shift[image * shift_stride + j]) : v);
    }
}

// out = x + gate · y; x may be missing.
extern "C" __global__ void gate_residual(
    stored* out, const stored* x, const stored* gate, const stored* y, unsigned count, int n, int c, index_t stride
) {
    EACH(i, count) {
        float v = widen(gate[(index_t)(i / c / n) * stride + i % c]) * widen(y[i]);
        out[i] = narrow(x ? widen(x[i]) + v : v);
    }
}

// plain = Σ g and scaled = Σ g·x over the n rows of each of b images, x and g (b, n, c): (b, c) each.
extern "C" __global__ void column_sums(
    stored* plain, stored* scaled, const stored* g, const stored* x, int n, int c
) {
    __shared__ float parts[32][33];
    int j = blockIdx.x * 32 + threadIdx.x;
    index_t start = (index_t)blockIdx.y * n * c;
    float sum = 0.f, product = 0.f;
    if (j < c) {
#pragma unroll 4
        for (int i = threadIdx.y; i < n; i += blockDim.y) {
            index_t at = start + (index_t)i * c + j;
            float v = widen(g[at]);
            sum += v;
            if (scaled) product += v * widen(x[at]);
        }
    }
    sum = down(sum, parts);
    product = down(product, parts);
    if (threadIdx.y || j >= c) return;
    if (plain) plain[(index_t)blockIdx.y * c + j] = narrow(sum);
    if (scaled) scaled[(index_t)blockIdx.y * c + j] = narrow(product);
}

// Number `i` of the sequence that `seed` begins, 32 random bits (the mixing steps of MurmurHash3's finaliser and
// SplitMix64).
__device__ __forceinline__ unsigned random_bits(unsigned long long seed, index_t i) {
    unsigned long long z = seed + (unsigned long long)(i + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (unsigned)((z ^ (z >> 31)) >> 32);
}

// x times factor, or zero where the random number is below the threshold; plus `onto` where there is one.
extern "C" __global__ void dropout(
    stored* y, const stored* x, const stored* onto, unsigned count, index_t seed, unsigned threshold, float factor
) {
    EACH(i, count) {
        float v = random_bits(seed, i) < threshold ? 0.f : widen(x[i]) * factor;
        y[i] = narrow(onto ? widen(onto[i]) + v : v);
    }
}

// Normally distributed numbers (Box and Muller 1958).
extern "C" __global__ void normal(stored* y, unsigned count, index_t seed, float deviation) {
    EACH(i, count) {
        float one = (random_bits(seed, 2 * (index_t)i) + 1.f) * 2.3283064e-10f;
        float two = random_bits(seed, 2 * (index_t)i + 1) * 2.3283064e-10f;
        y[i] = narrow(deviation * sqrtf(-2.f * logf(fminf(one, 1.f))) * cospif(2.f * two));
    }
}

// y (planes, 2h, 2w) of x (planes, h, w).
extern "C" __global__ void upsample(stored* y, const stored* x, unsigned count, int h, int w) {
    EACH(i, count) {
        unsigned column = i % (2 * w), line = i / (2 * w) % (2 * h), plane = i / (2 * w) / (2 * h);
        y[i] = x[(plane * h + line / 2) * w + column / 2];
    }
}

extern "C" __global__ void upsample_backward(stored* dx, const stored* g, unsigned count, int h, int w) {
    EACH(i, count) {
        const stored* at = g + (index_t)(i / w) * 4 * w + i % w * 2;
        dx[i] = narrow(widen(at[0]) + widen(at[1]) + widen(at[2 * w]) + widen(at[2 * w + 1]));
    }
}

// ---- sums, parts and joins ---------------------------------------------------------------------------------------

// sum = x + y; sum may be x.
extern "C" __global__ void add(stored* sum, const stored* x, const stored* y, unsigned count) {
    EACH(i, count) sum[i] = narrow(widen(x[i]) + widen(y[i]));
}

// y (rows, width) += bias (width).
extern "C" __global__ void add_bias(stored* y, const stored* bias, unsigned count, int width) {
    EACH(i, count) y[i] = narrow(widen(y[i]) + widen(bias[i % width]));
}

extern "C" __global__ void from_float(stored* y, const float* x, unsigned count) {
    EACH(i, count) y[i] = narrow(x[i]);
}

extern "C" __global__ void to_float(float* y, const stored* x, unsigned count) {
    EACH(i, count) y[i] = widen(x[i]);
}

// Two of them at once: the factors of an adapter.
extern "C" __global__ void from_floats(stored* y, const float* one, const float* two, unsigned first, unsigned count) {
    EACH(i, count) y[i] = narrow(i < first ? one[i] : two[i - first]);
}

// to[t0 …] = or += from[f0 …], both of dimensions (…, n1, n2, n3) with strides of their own.
extern "C" __global__ void transfer(
    stored* to, const stored* from, unsigned count, unsigned n1, unsigned n2, unsigned n3, int adds, index_t t0,
    index_t t1, index_t t2, index_t t3, index_t f0, index_t f1, index_t f2, index_t f3
) {
    EACH(i, count) {
        unsigned i3 = i % n3, rest = i / n3, i2 = rest % n2;
        rest /= n2;
        unsigned i1 = rest % n1, i0 = rest / n1;
        stored* at = to + i0 * t0 + i1 * t1 + i2 * t2 + i3 * t3;
        stored v = from[i0 * f0 + i1 * f1 + i2 * f2 + i3 * f3];
        *at = adds ? narrow(widen(*at) + widen(v)) : v;
    }
}

// ---- optimizer ---------------------------------------------------------------------------------------------------

#if STORAGE == 0
// One trained tensor: its weights, gradient and moments, their number, and whether it decays.
struct Trained {
    float *weights;
    const float* gradient;
    float *first, *second;
    index_t count, decays;
};

// AdamW of tensor blockIdx.y.
extern "C" __global__ void adamw(
    const Trained* table, float clip, float decay, float step_size, float correction, float epsilon, float beta1,
    float beta2, float rest1, float rest2
) {
    Trained t = table[blockIdx.y];
    float kept = t.decays ? decay : 1.f;
    EACH(i, t.count) {
        float g = t.gradient[i] * clip;
        float first = beta1 * t.first[i] + rest1 * g, second = beta2 * t.second[i] + rest2 * g * g;
        t.first[i] = first;
        t.second[i] = second;
        t.weights[i] = t.weights[i] * kept - step_size * first / (sqrtf(second) / correction + epsilon);
    }
}

__device__ double together_wide(double v) {
    __shared__ double parts[32];
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    int lane = threadIdx.x & 31;
    if (lane == 0) parts[threadIdx.x >> 5] = v;
    __syncthreads();
    v = lane < (blockDim.x >> 5) ? parts[lane] : 0.;
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

// The squares of the gradients of tensor blockIdx.y, a part for each block.
extern "C" __global__ void squares(double* parts, const Trained* table) {
    Trained t = table[blockIdx.y];
    double sum = 0.;
    EACH(i, t.count) sum += (double)t.gradient[i] * t.gradient[i];
    sum = together_wide(sum);
    if (threadIdx.x == 0) parts[blockIdx.y * (index_t)gridDim.x + blockIdx.x] = sum;
}

// The sum of `count` numbers, by one block.
extern "C" __global__ void total(double* sum, const double* parts, unsigned count) {
    double v = 0.;
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x) v += parts[i];
    v = together_wide(v);
    if (threadIdx.x == 0) *sum = v;
}
#endif
