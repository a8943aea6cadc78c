// Decoding single tokens: all layers of a step in one call, for texts behind keys and values of their own.
//
// A row's numbers depend on that row and on its keys alone: int8 products are exact, and every float sum has one order,
// whatever the number of rows and threads. `native.py` compiles this file and says what its structures are.
#include <cmath>
#include <cstring>
#include <vector>

#include <omp.h>

#include "vectors.h"

constexpr int BLOCK = 2 * LANES;    // outputs of int8 codes that are packed together
constexpr int COLUMNS = 4;          // outputs of a float weight that are multiplied together
constexpr int CODE_ROWS = LANES / 2, FLOAT_ROWS = LANES / 4;

struct Linear {
    const void* weight;    // float [O I], or int8 codes [O / BLOCK, I / 4, BLOCK, 4], padded with zeros
    const float* scales;   // [O], padded to BLOCK; null for a float weight
    const int32_t* zeros;  // [O], padded: 128 times the sum of an output's codes
    const float* bias;     // [O], or null
    int32_t outputs, inputs;
};

struct Layer {
    const float *attention_norm, *query_norm, *key_norm, *attention_out_norm, *mlp_norm, *mlp_out_norm;
    Linear qkv, output, gate, up, down;
    const float *cosines, *sines;  // [positions, H / 2]
    float scale;
    int32_t window;  // 0: none
};

struct Model {
    const Layer* layers;
    const float* norm;
    float epsilon;
    int32_t depth, size, heads, key_heads, head_size, inner, is_gelu;
};

struct Row {
    float *keys, *values;  // [L N_kv P H]
    int64_t room;          // P
    int64_t position;      // of the token; it sees the keys before it and its own
};

// Rows as a product takes them.
struct Inputs {
    const float* floats;
    std::vector<uint8_t> codes;  // x / s * 127.5 + 128, s a row's largest magnitude
    std::vector<float> scales;   // s / 127.5
    int stride;
};

// Codes a unit of x / s: as in fbgemm, just below the 127.5 that it stands for, so that -1 and 1 are 127 steps from 0.
constexpr float STEPS = 127.49999f;

static int multiple(int number, int of) { return (number + of - 1) / of * of; }

static void quantise(Inputs& inputs, int rows, int size) {
    inputs.stride = multiple(size, 4);
    inputs.codes.assign(size_t(rows) * inputs.stride + LANES, 128);
    inputs.scales.resize(rows);
    for (int row = 0; row < rows; ++row) {
        const float* x = inputs.floats + size_t(row) * size;
        uint8_t* codes = &inputs.codes[size_t(row) * inputs.stride];
        Floats peaks{};
        int i = 0;
        for (; i + LANES <= size; i += LANES) peaks = larger(peaks, magnitude(load(x + i)));
        float peak = largest(peaks);
        for (; i < size; ++i) peak = std::fmax(peak, std::fabs(x[i]));
        peak = std::fmax(peak, 1.17549435e-38f);
        inputs.scales[row] = peak / 127.5f;
        for (i = 0; i + LANES <= size; i += LANES) {
            const Floats share = load(x + i) / splat(peak) * splat(STEPS);
            const Ints whole = (Ints)(share + splat(ROUNDER)) - (Ints)splat(ROUNDER) + splat(128);
            const Bytes bytes = __builtin_convertvector(whole, Bytes);
            std::memcpy(codes + i, &bytes, LANES);
        }
        for (; i < size; ++i) codes[i] = uint8_t(std::nearbyint(x[i] / peak * STEPS) + 128.0f);
    }
}

// Sums of codes for R rows and a block of outputs.
template <int R>
static void code_sums(const uint8_t* codes, int stride, const int8_t* weight, int quads, int32_t* sums) {
    Ints found[R][2] = {};
    for (int quad = 0; quad < quads; ++quad, weight += 4 * BLOCK) {
        const Ints first = load_bytes(weight), second = load_bytes(weight + 4 * LANES);
        for (int row = 0; row < R; ++row) {
            int32_t four;
            std::memcpy(&four, codes + size_t(row) * stride + 4 * quad, 4);
            found[row][0] = dots(found[row][0], splat(four), first);
            found[row][1] = dots(found[row][1], splat(four), second);
        }
    }
    std::memcpy(sums, found, sizeof found);
}

static void write_codes(const Linear& linear, const Inputs& in, int rows, float* out, int width, int block, bool adds) {
    const int quads = in.stride / 4, first = block * BLOCK, count = std::min(BLOCK, linear.outputs - first);
    const int8_t* weight = static_cast<const int8_t*>(linear.weight) + size_t(block) * BLOCK * in.stride;
    int32_t sums[CODE_ROWS * BLOCK];
    for (int row = 0; row < rows;) {
        const uint8_t* codes = &in.codes[size_t(row) * in.stride];
        const int left = rows - row;
        int done = 1;
        if (left >= CODE_ROWS) code_sums<CODE_ROWS>(codes, in.stride, weight, quads, sums), done = CODE_ROWS;
        else if (left >= 4) code_sums<4>(codes, in.stride, weight, quads, sums), done = 4;
        else if (left >= 2) code_sums<2>(codes, in.stride, weight, quads, sums), done = 2;
        else code_sums<1>(codes, in.stride, weight, quads, sums);
        for (int r = 0; r < done; ++r) {
            float* target = out + size_t(row + r) * width + first;
            for (int o = 0; o < count; ++o) {
                float value = float(sums[r * BLOCK + o] - linear.zeros[first + o]) * (linear.scales[first + o] * in.scales[row + r]);
                if (linear.bias) value += linear.bias[first + o];
                target[o] = adds ? target[o] + value : value;
            }
        }
        row += done;
    }
}

// Products of R rows and C outputs.
template <int R, int C>
static void float_sums(const float* x, const float* weight, int size, float* sums) {
    Floats found[R][C] = {};
    int i = 0;
    for (; i + LANES <= size; i += LANES) {
        Floats inputs[R];
        for (int row = 0; row < R; ++row) inputs[row] = load(x + size_t(row) * size + i);
        for (int column = 0; column < C; ++column) {
            const Floats factors = load(weight + size_t(column) * size + i);
            for (int row = 0; row < R; ++row) found[row][column] = fused(inputs[row], factors, found[row][column]);
        }
    }
    for (int row = 0; row < R; ++row)
        for (int column = 0; column < C; ++column) {
            float sum = total(found[row][column]);
            for (int rest = i; rest < size; ++rest) sum += x[size_t(row) * size + rest] * weight[size_t(column) * size + rest];
            sums[row * COLUMNS + column] = sum;
        }
}

template <int R>
static void float_columns(const float* x, const float* weight, int size, int columns, float* sums) {
    if (columns == COLUMNS) return float_sums<R, COLUMNS>(x, weight, size, sums);
    for (int column = 0; column < columns; ++column)
        float_sums<R, 1>(x, weight + size_t(column) * size, size, sums + column);
}

static void write_floats(const Linear& linear, const Inputs& in, int rows, float* out, int width, int first, bool adds) {
    const int size = linear.inputs, count = std::min(COLUMNS, linear.outputs - first);
    const float* weight = static_cast<const float*>(linear.weight) + size_t(first) * size;
    float sums[FLOAT_ROWS * COLUMNS];
    for (int row = 0; row < rows;) {
        const float* x = in.floats + size_t(row) * size;
        const int left = rows - row;
        int done = 1;
        if (left >= FLOAT_ROWS) float_columns<FLOAT_ROWS>(x, weight, size, count, sums), done = FLOAT_ROWS;
        else if (left >= 2) float_columns<2>(x, weight, size, count, sums), done = 2;
        else float_columns<1>(x, weight, size, count, sums);
        for (int r = 0; r < done; ++r)
            for (int o = 0; o < count; ++o) {
                float& target = out[size_t(row + r) * width + first + o];
                const float value = sums[r * COLUMNS + o] + (linear.bias ? linear.bias[first + o] : 0.0f);
                target = adds ? target + value : value;
            }
        row += done;
    }
}

// One thread's outputs [first, last) of a product; threads share out whole blocks.
struct Part { int first, last; };

static Part part_of(int blocks, int thread, int threads) {
    return {int(int64_t(blocks) * thread / threads), int(int64_t(blocks) * (thread + 1) / threads)};
}

// y [rows, width] = or += x W^T, the outputs of this thread. `inputs.floats` is [rows I].
static Part multiply(const Linear& linear, Inputs& inputs, int rows, float* out, int width, bool adds, int thread, int threads) {
    const int unit = linear.scales ? BLOCK : 4 * COLUMNS;
    const Part part = part_of((linear.outputs + unit - 1) / unit, thread, threads);
    for (int block = part.first; block < part.last; ++block) {
        if (linear.scales) write_codes(linear, inputs, rows, out, width, block, adds);
        else
            for (int first = block * unit; first < std::min((block + 1) * unit, linear.outputs); first += COLUMNS)
                write_floats(linear, inputs, rows, out, width, first, adds);
    }
    return {part.first * unit, std::min(part.last * unit, linear.outputs)};
}

// weight * x / sqrt(mean(x^2) + epsilon)
static void normalise(const float* x, const float* weight, float epsilon, int size, float* out) {
    Floats squares{};
    int i = 0;
    for (; i + LANES <= size; i += LANES) squares = fused(load(x + i), load(x + i), squares);
    float sum = total(squares);
    for (; i < size; ++i) sum += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(sum / float(size) + epsilon);
    for (i = 0; i < size; ++i) out[i] = x[i] * factor * weight[i];
}

static void rotate(float* x, const float* cosines, const float* sines, int half) {
    for (int i = 0; i < half; ++i) {
        const float first = x[i], second = x[half + i];
        x[i] = first * cosines[i] - second * sines[i];
        x[half + i] = second * cosines[i] + first * sines[i];
    }
}

static Floats activated(Floats x, bool is_gelu) {
    const Floats one = splat(1.0f);
    if (!is_gelu) return x / (one + exponential(-x));
    // 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
    const Floats u = splat(0.7978845608f) * (x + splat(0.044715f) * x * x * x);
    return x / (one + exponential(splat(-2.0f) * u));
}

// gate = activation(gate) * up, elements [first, last)
static void gated(float* gate, const float* up, Part part, bool is_gelu) {
    for (int i = part.first; i < part.last; i += LANES) {
        const int count = std::min(LANES, part.last - i);
        float in[LANES] = {};
        std::memcpy(in, gate + i, 4 * count);
        store(in, activated(load(in), is_gelu));
        for (int j = 0; j < count; ++j) gate[i + j] = in[j] * up[i + j];
    }
}

static float dot(const float* a, const float* b, int size) {
    Floats sums{};
    int i = 0;
    for (; i + LANES <= size; i += LANES) sums = fused(load(a + i), load(b + i), sums);
    float sum = total(sums);
    for (; i < size; ++i) sum += a[i] * b[i];
    return sum;
}

// softmax(scale q K^T) V of one head
static void attend(const float* query, const float* keys, const float* values, int count, int size, float scale,
                   std::vector<float>& weights, float* out) {
    weights.resize(multiple(count, LANES));
    float peak = -INFINITY;
    for (int i = 0; i < count; ++i) {
        weights[i] = scale * dot(query, keys + size_t(i) * size, size);
        peak = std::fmax(peak, weights[i]);
    }
    for (size_t i = count; i < weights.size(); ++i) weights[i] = -INFINITY;
    Floats sums{};
    for (size_t i = 0; i < weights.size(); i += LANES) {
        const Floats share = exponential(load(&weights[i]) - splat(peak));  // beyond `count` 1e-38, which adds nothing
        store(&weights[i], share);
        sums += share;
    }
    const float factor = 1.0f / total(sums);
    int j = 0;
    for (; j + 4 * LANES <= size; j += 4 * LANES) {
        Floats found[4] = {};
        for (int i = 0; i < count; ++i)
            for (int lane = 0; lane < 4; ++lane)
                found[lane] = fused(splat(weights[i]), load(values + size_t(i) * size + j + lane * LANES), found[lane]);
        for (int lane = 0; lane < 4; ++lane) store(out + j + lane * LANES, found[lane] * splat(factor));
    }
    for (; j < size; ++j) {
        float sum = 0;
        for (int i = 0; i < count; ++i) sum += weights[i] * values[size_t(i) * size + j];
        out[j] = sum * factor;
    }
}

namespace {

// What the threads of a step share.
struct Step {
    const Model& model;
    const Row* rows;
    int count;
    float* x;  // [count D]
    std::vector<float> qkv, attended, gate, up, result;

    Step(const Model& m, const Row* r, int n, float* states)
        : model(m), rows(r), count(n), x(states), qkv(size_t(n) * (m.heads + 2 * m.key_heads) * m.head_size),
          attended(size_t(n) * m.heads * m.head_size), gate(size_t(n) * m.inner), up(size_t(n) * m.inner),
          result(size_t(n) * m.size) {}

    void run(int thread, int threads) {
        Inputs inputs;
        std::vector<float> normed(size_t(count) * model.size), weights;
        for (int number = 0; number < model.depth; ++number) {
            const Layer& layer = model.layers[number];
            take_normed(inputs, normed, layer.attention_norm, layer.qkv);
            multiply(layer.qkv, inputs, count, qkv.data(), layer.qkv.outputs, false, thread, threads);
#pragma omp barrier
            place(layer, number, thread, threads);
#pragma omp barrier
            look(layer, number, weights, thread, threads);
#pragma omp barrier
            take(inputs, attended.data(), layer.output);
            add(layer.output, layer.attention_out_norm, inputs, thread, threads);
            take_normed(inputs, normed, layer.mlp_norm, layer.gate);
            const Part part = multiply(layer.gate, inputs, count, gate.data(), model.inner, false, thread, threads);
            multiply(layer.up, inputs, count, up.data(), model.inner, false, thread, threads);
            for (int row = 0; row < count; ++row)
                gated(&gate[size_t(row) * model.inner], &up[size_t(row) * model.inner], part, model.is_gelu);
#pragma omp barrier
            take(inputs, gate.data(), layer.down);
            add(layer.down, layer.mlp_out_norm, inputs, thread, threads);
        }
        for (int row = thread; row < count; row += threads)
            normalise(x + size_t(row) * model.size, model.norm, model.epsilon, model.size, x + size_t(row) * model.size);
    }

    void take(Inputs& inputs, const float* floats, const Linear& linear) const {
        inputs.floats = floats;
        if (linear.scales) quantise(inputs, count, linear.inputs);
    }

    // Every thread makes its own: that takes less than waiting for another's.
    void take_normed(Inputs& inputs, std::vector<float>& normed, const float* weight, const Linear& linear) const {
        for (int row = 0; row < count; ++row)
            normalise(x + size_t(row) * model.size, weight, model.epsilon, model.size, &normed[size_t(row) * model.size]);
        take(inputs, normed.data(), linear);
    }

    // x += the product, behind a norm of its own where there is one; all threads are through when it returns.
    void add(const Linear& linear, const float* norm, Inputs& inputs, int thread, int threads) {
        multiply(linear, inputs, count, norm ? result.data() : x, model.size, !norm, thread, threads);
#pragma omp barrier
        if (!norm) return;
        for (int row = thread; row < count; row += threads) {
            float* one = &result[size_t(row) * model.size];
            normalise(one, norm, model.epsilon, model.size, one);
            for (int i = 0; i < model.size; ++i) x[size_t(row) * model.size + i] += one[i];
        }
#pragma omp barrier
    }

    float* kept(float* states, const Row& row, int number, int head) const {
        return states + (size_t(number) * model.key_heads + head) * row.room * model.head_size;
    }

    // Norm and rotation of queries and keys; keys and values go where they are kept.
    void place(const Layer& layer, int number, int thread, int threads) {
        const int size = model.head_size, turned = model.heads + model.key_heads, all = turned + model.key_heads;
        const Part part = part_of(count * all, thread, threads);
        for (int item = part.first; item < part.last; ++item) {
            const Row& row = rows[item / all];
            const int head = item % all;
            float* states = &qkv[size_t(item) * size];
            const float* norm = head < model.heads ? layer.query_norm : layer.key_norm;
            if (head < turned) {
                if (norm) normalise(states, norm, model.epsilon, size, states);
                const size_t turn = size_t(row.position) * (size / 2);
                rotate(states, layer.cosines + turn, layer.sines + turn, size / 2);
            }
            if (head < model.heads) continue;
            float* place = head < turned ? kept(row.keys, row, number, head - model.heads) : kept(row.values, row, number, head - turned);
            std::memcpy(place + size_t(row.position) * size, states, 4 * size);
        }
    }

    void look(const Layer& layer, int number, std::vector<float>& weights, int thread, int threads) {
        const int size = model.head_size, groups = model.heads / model.key_heads;
        for (int item = thread; item < count * model.heads; item += threads) {
            const Row& row = rows[item / model.heads];
            const int head = item % model.heads, all = model.heads + 2 * model.key_heads;
            const int64_t seen = row.position + 1;
            const int64_t low = layer.window && seen > layer.window ? seen - layer.window : 0;
            attend(&qkv[(size_t(item / model.heads) * all + head) * size],
                   kept(row.keys, row, number, head / groups) + low * size,
                   kept(row.values, row, number, head / groups) + low * size, int(seen - low), size, layer.scale,
                   weights, &attended[size_t(item) * size]);
        }
    }
};

}  // namespace

// States [count D] behind the final norm in place of the embeddings `x`.
extern "C" void limbeck_step(const Model* model, const Row* rows, int count, float* x, int threads) {
    Step step(*model, rows, count, x);
#pragma omp parallel num_threads(threads)
    step.run(omp_get_thread_num(), omp_get_num_threads());
}

// y [rows O] of x [rows I].
extern "C" void limbeck_product(const Linear* linear, const float* x, int rows, float* y, int threads) {
    Inputs inputs;
    inputs.floats = x;
    if (linear->scales) quantise(inputs, rows, linear->inputs);
#pragma omp parallel num_threads(threads)
    multiply(*linear, inputs, rows, y, linear->outputs, false, omp_get_thread_num(), omp_get_num_threads());
}

// Outputs that codes are packed by.
extern "C" int limbeck_block() { return BLOCK; }
