// Products of rows with a layer's weight, in int8 or float32. A row's numbers depend on that row alone.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vectors.h"

constexpr int BLOCK = 2 * LANES;    // outputs of int8 codes that are packed together
constexpr int KEYS = 4;             // of one head, that are multiplied together
constexpr int CODE_ROWS = LANES / 2;
constexpr int UNIT = 24;            // outputs of a float weight that are handed to a thread: a multiple of all tiles
constexpr int TILE = LANES / 4;     // most vectors of rows in a tile: 64 rows with AVX-512, 16 with AVX2

struct Linear {
    const void* weight;    // float [O I], or int8 codes [O / BLOCK, I / 4, BLOCK, 4], padded with zeros
    const float* scales;   // [O], padded to BLOCK; null for a float weight
    const int32_t* zeros;  // [O], padded: 128 times the sum of an output's codes
    const float* bias;     // [O], or null
    int32_t outputs, inputs;
};

// Rows as a product takes them.
struct Inputs {
    const float* floats;
    std::vector<float> columns;  // [I, stride]: rows side by side, padded with zeros
    std::vector<uint8_t> codes;  // x / s * 127.5 + 128, s a row's largest magnitude
    std::vector<float> scales;   // s / 127.5
    int stride;
};

// Few rows take half vectors: with AVX-512 those are faster where only some lanes are used.
static int width_of(int rows) { return rows <= LANES / 2 ? LANES / 2 : LANES; }

static int multiple(int number, int of) { return (number + of - 1) / of * of; }

static void stand(Inputs& inputs, int rows, int size) {
    inputs.stride = multiple(rows, width_of(rows));
    inputs.columns.assign(size_t(size) * inputs.stride, 0.0f);
    for (int first = 0; first < size; first += LANES)
        for (int row = 0; row < rows; ++row)
            for (int i = first; i < std::min(first + LANES, size); ++i)
                inputs.columns[size_t(i) * inputs.stride + row] = inputs.floats[size_t(row) * size + i];
}

// Codes a unit of x / s: as in fbgemm, just below the 127.5 that it stands for, so that -1 and 1 are 127 steps from 0.
constexpr float STEPS = 127.49999f;

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

// Rows in tiles of R, then of R / 2, down to single ones; the tile's size is a constant to `go`.
template <int R, class Go>
static void in_tiles(int row, int rows, Go go) {
    for (; row + R <= rows; row += R) go(std::integral_constant<int, R>{}, row);
    if constexpr (R > 1) in_tiles<R / 2>(row, rows, go);
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
    const int first = block * BLOCK, count = std::min(BLOCK, linear.outputs - first);
    const int8_t* weight = static_cast<const int8_t*>(linear.weight) + size_t(block) * BLOCK * in.stride;
    in_tiles<CODE_ROWS>(0, rows, [&](auto tile, int row) {
        constexpr int R = decltype(tile)::value;
        int32_t sums[R * BLOCK];
        code_sums<R>(&in.codes[size_t(row) * in.stride], in.stride, weight, in.stride / 4, sums);
        for (int r = 0; r < R; ++r) {
            float* target = out + size_t(row + r) * width + first;
            for (int o = 0; o < count; ++o) {
                const float scale = linear.scales[first + o] * in.scales[row + r];
                float value = float(sums[r * BLOCK + o] - linear.zeros[first + o]) * scale;
                if (linear.bias) value += linear.bias[first + o];
                target[o] = adds ? target[o] + value : value;
            }
        }
    });
}

// Products of a row and C keys.
template <int C>
static void key_sums(const float* x, const float* keys, int size, float* sums) {
    Floats found[C] = {};
    int i = 0;
    for (; i + LANES <= size; i += LANES) {
        const Floats inputs = load(x + i);
        for (int key = 0; key < C; ++key) found[key] = fused(inputs, load(keys + size_t(key) * size + i), found[key]);
    }
    for (int key = 0; key < C; ++key) {
        sums[key] = total(found[key]);
        for (int rest = i; rest < size; ++rest) sums[key] += x[rest] * keys[size_t(key) * size + rest];
    }
}

// Products of V vectors of rows and C outputs: a lane is a row and adds up its inputs in their order, so that its sum
// does not depend on what the other lanes, vectors and outputs are. The weight is read as it lies, a number at a time.
template <class Vector, int V, int C>
static void column_sums(const float* x, int stride, const float* weight, int size, float* sums) {
    constexpr int W = sizeof(Vector) / 4;
    Vector found[C][V] = {};
    for (int i = 0; i < size; ++i, x += stride) {
        Vector inputs[V];
        for (int v = 0; v < V; ++v) inputs[v] = load_as<Vector>(x + v * W);
        for (int c = 0; c < C; ++c) {
            const Vector factor = weight[size_t(c) * size + i] - Vector{};
            for (int v = 0; v < V; ++v) found[c][v] = fused(inputs[v], factor, found[c][v]);
        }
    }
    std::memcpy(sums, found, sizeof found);
}

// Outputs [first, first + count) for the rows of one tile of V vectors.
template <class Vector, int V>
static void write_tile(const Linear& linear, const Inputs& in, int row, int rows, float* out, int width, int first,
                       int count, bool adds) {
    constexpr int C = V == 4 ? 6 : 8, W = V * sizeof(Vector) / 4;
    float sums[C * W];
    for (int end = first + count, taken; first < end; first += taken) {
        const float* weight = static_cast<const float*>(linear.weight) + size_t(first) * linear.inputs;
        taken = end - first >= C ? C : 1;
        if (taken == C) column_sums<Vector, V, C>(&in.columns[row], in.stride, weight, linear.inputs, sums);
        else column_sums<Vector, V, 1>(&in.columns[row], in.stride, weight, linear.inputs, sums);
        for (int r = 0; r < std::min(W, rows - row); ++r)
            for (int o = 0; o < taken; ++o) {
                float& target = out[size_t(row + r) * width + first + o];
                const float value = sums[o * W + r] + (linear.bias ? linear.bias[first + o] : 0.0f);
                target = adds ? target + value : value;
            }
    }
}

template <class Vector>
static void write_floats(const Linear& linear, const Inputs& in, int rows, float* out, int width, int first, int count,
                         bool adds) {
    constexpr int W = sizeof(Vector) / 4;
    in_tiles<TILE>(0, in.stride / W, [&](auto tile, int vector) {
        write_tile<Vector, decltype(tile)::value>(linear, in, vector * W, rows, out, width, first, count, adds);
    });
}

// One thread's outputs [first, last) of a product; threads share out whole blocks.
struct Part { int first, last; };

static Part part_of(int blocks, int thread, int threads) {
    return {int(int64_t(blocks) * thread / threads), int(int64_t(blocks) * (thread + 1) / threads)};
}

// Rows in the form that a layer takes.
static void prepare(const Linear& linear, Inputs& inputs, const float* floats, int rows) {
    inputs.floats = floats;
    if (linear.scales) quantise(inputs, rows, linear.inputs);
    else stand(inputs, rows, linear.inputs);
}

// y [rows, width] = or += x W^T, the outputs of this thread.
static Part multiply(const Linear& linear, const Inputs& inputs, int rows, float* out, int width, bool adds, int thread,
                     int threads) {
    const int unit = linear.scales ? BLOCK : UNIT;
    const Part part = part_of((linear.outputs + unit - 1) / unit, thread, threads);
    for (int block = part.first; block < part.last; ++block) {
        const int first = block * unit, count = std::min(unit, linear.outputs - first);
        if (linear.scales) write_codes(linear, inputs, rows, out, width, block, adds);
        else if (width_of(rows) < LANES) write_floats<Half>(linear, inputs, rows, out, width, first, count, adds);
        else write_floats<Floats>(linear, inputs, rows, out, width, first, count, adds);
    }
    return {part.first * unit, std::min(part.last * unit, linear.outputs)};
}
