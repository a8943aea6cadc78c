// Decoding single tokens: all layers of a step in one call, for texts behind keys and values of their own.
//
// A row's numbers depend on that row and on its keys alone: int8 products are exact, and every float sum has one order,
// whatever the number of rows and threads. `build.py` compiles this file, `decode.py` fills its structures.
#include <cmath>
#include <cstring>
#include <vector>

#include <omp.h>

#include "products.h"

struct Layer {
    const float *attention_norm, *query_norm, *key_norm, *attention_out_norm, *mlp_norm, *mlp_out_norm;
    Linear query, key, value, output, gate, up, down;
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

// Keys and values [L N_kv P H].
struct States {
    float *keys, *values;
    int64_t room;  // P
};

struct Row {
    States before;     // what is seen of the text up to `start`, which others may share
    States own;        // from there on
    int64_t start;
    int64_t position;  // of the token; it sees the keys before it and its own
};

// Keys and values of one head that lie behind one another.
struct Run {
    const float *keys, *values;
    int count;
};

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

// out = factor weights V for W vectors of columns at a time, from column j on. Returns the first column that is left.
template <int W>
static int mix(const float* weights, const Run (&runs)[2], int size, float factor, int j, float* out) {
    for (; j + W * LANES <= size; j += W * LANES) {
        Floats found[W] = {};
        const float* weight = weights;
        for (const Run& run : runs)
            for (int i = 0; i < run.count; ++i, ++weight)
                for (int w = 0; w < W; ++w)
                    found[w] = fused(splat(*weight), load(run.values + size_t(i) * size + j + w * LANES), found[w]);
        for (int w = 0; w < W; ++w) store(out + j + w * LANES, found[w] * splat(factor));
    }
    return j;
}

// softmax(scale q K^T) V of one head
static void attend(const float* query, const Run (&runs)[2], int size, float scale, std::vector<float>& weights,
                   float* out) {
    weights.assign(multiple(runs[0].count + runs[1].count, LANES), -INFINITY);
    float* product = weights.data();
    for (const Run& run : runs) {
        int i = 0;
        for (; i + KEYS <= run.count; i += KEYS) key_sums<KEYS>(query, run.keys + size_t(i) * size, size, product + i);
        for (; i < run.count; ++i) key_sums<1>(query, run.keys + size_t(i) * size, size, product + i);
        product += run.count;
    }
    Floats peaks = splat(-INFINITY);
    for (size_t i = 0; i < weights.size(); i += LANES) {
        const Floats scaled = load(&weights[i]) * splat(scale);
        store(&weights[i], scaled);
        peaks = larger(peaks, scaled);
    }
    const float peak = largest(peaks);
    Floats sums{};
    for (size_t i = 0; i < weights.size(); i += LANES) {
        const Floats share = exponential(load(&weights[i]) - splat(peak));  // behind the last 1e-38, which adds nothing
        store(&weights[i], share);
        sums += share;
    }
    const float factor = 1.0f / total(sums);
    int j = mix<4>(weights.data(), runs, size, factor, 0, out);
    j = mix<1>(weights.data(), runs, size, factor, j, out);
    for (; j < size; ++j) {
        float sum = 0;
        const float* weight = weights.data();
        for (const Run& run : runs)
            for (int i = 0; i < run.count; ++i, ++weight) sum += *weight * run.values[size_t(i) * size + j];
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
            take_normed(inputs, normed, layer.attention_norm, layer.query);
            float* out = qkv.data();
            for (const Linear* linear : {&layer.query, &layer.key, &layer.value}) {
                multiply(*linear, inputs, count, out, (model.heads + 2 * model.key_heads) * model.head_size, false,
                         thread, threads);
                out += linear->outputs;
            }
#pragma omp barrier
            place(layer, number, thread, threads);
#pragma omp barrier
            look(layer, number, weights, thread, threads);
#pragma omp barrier
            prepare(layer.output, inputs, attended.data(), count);
            add(layer.output, layer.attention_out_norm, inputs, thread, threads);
            take_normed(inputs, normed, layer.mlp_norm, layer.gate);
            const Part part = multiply(layer.gate, inputs, count, gate.data(), model.inner, false, thread, threads);
            multiply(layer.up, inputs, count, up.data(), model.inner, false, thread, threads);
            for (int row = 0; row < count; ++row)
                gated(&gate[size_t(row) * model.inner], &up[size_t(row) * model.inner], part, model.is_gelu);
#pragma omp barrier
            prepare(layer.down, inputs, gate.data(), count);
            add(layer.down, layer.mlp_out_norm, inputs, thread, threads);
        }
        for (int row = thread; row < count; row += threads)
            normalise(state(row), model.norm, model.epsilon, model.size, state(row));
    }

    float* state(int row) const { return x + size_t(row) * model.size; }

    // Every thread makes its own: that takes less than waiting for another's.
    void take_normed(Inputs& inputs, std::vector<float>& normed, const float* weight, const Linear& linear) const {
        for (int row = 0; row < count; ++row)
            normalise(state(row), weight, model.epsilon, model.size, &normed[size_t(row) * model.size]);
        prepare(linear, inputs, normed.data(), count);
    }

    // x += the product, behind a norm of its own where there is one; all threads are through when it returns.
    void add(const Linear& linear, const float* norm, Inputs& inputs, int thread, int threads) {
        multiply(linear, inputs, count, norm ? result.data() : x, model.size, !norm, thread, threads);
#pragma omp barrier
        if (!norm) return;
        for (int row = thread; row < count; row += threads) {
            float* one = &result[size_t(row) * model.size];
            normalise(one, norm, model.epsilon, model.size, one);
            for (int i = 0; i < model.size; ++i) state(row)[i] += one[i];
        }
#pragma omp barrier
    }

    // Where the keys or values of a head begin.
    size_t head_at(const States& states, int number, int head) const {
        return (size_t(number) * model.key_heads + head) * states.room * model.head_size;
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
            const size_t at = head_at(row.own, number, (head - model.heads) % model.key_heads);
            float* place = (head < turned ? row.own.keys : row.own.values) + at;
            std::memcpy(place + size_t(row.position - row.start) * size, states, 4 * size);
        }
    }

    // Head by head, so that what several rows or the heads of a group see is in the processor's cache.
    void look(const Layer& layer, int number, std::vector<float>& weights, int thread, int threads) {
        const int size = model.head_size, groups = model.heads / model.key_heads;
        const int all = model.heads + 2 * model.key_heads;
        const Part part = part_of(count * model.heads, thread, threads);
        for (int item = part.first; item < part.last; ++item) {
            const int index = item / groups % count, key_head = item / groups / count;
            const int head = key_head * groups + item % groups;
            const Row& row = rows[index];
            const int64_t seen = row.position + 1;
            const int64_t low = layer.window && seen > layer.window ? seen - layer.window : 0;
            const Run runs[2] = {part_of_text(row.before, number, key_head, low, row.start),
                                 part_of_text(row.own, number, key_head, std::max(low - row.start, int64_t(0)),
                                              seen - row.start)};
            attend(&qkv[(size_t(index) * all + head) * size], runs, size, layer.scale, weights,
                   &attended[(size_t(index) * model.heads + head) * size]);
        }
    }

    Run part_of_text(const States& states, int number, int head, int64_t low, int64_t high) const {
        if (low >= high) return {nullptr, nullptr, 0};
        const size_t at = head_at(states, number, head) + size_t(low) * model.head_size;
        return {states.keys + at, states.values + at, int(high - low)};
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
    prepare(*linear, inputs, x, rows);
#pragma omp parallel num_threads(threads)
    multiply(*linear, inputs, rows, y, linear->outputs, false, omp_get_thread_num(), omp_get_num_threads());
}

// Outputs that codes are packed by.
extern "C" int limbeck_block() { return BLOCK; }
