// Products of rows with a layer's weight, in int8 or float32. A row's numbers depend on that row alone.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

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
            for (int rest = i; rest < size; ++rest)
                sum += x[size_t(row) * size + rest] * weight[size_t(column) * size + rest];
            sums[row * COLUMNS + column] = sum;
        }
}

static void write_floats(const Linear& linear, const Inputs& in, int rows, float* out, int width, int first,
                         bool adds) {
    const int size = linear.inputs, count = std::min(COLUMNS, linear.outputs - first);
    const float* weight = static_cast<const float*>(linear.weight) + size_t(first) * size;
    in_tiles<FLOAT_ROWS>(0, rows, [&](auto tile, int row) {
        constexpr int R = decltype(tile)::value;
        const float* x = in.floats + size_t(row) * size;
        float sums[R * COLUMNS];
        if (count == COLUMNS) float_sums<R, COLUMNS>(x, weight, size, sums);
        else
            for (int o = 0; o < count; ++o) float_sums<R, 1>(x, weight + size_t(o) * size, size, sums + o);
        for (int r = 0; r < R; ++r)
            for (int o = 0; o < count; ++o) {
                float& target = out[size_t(row + r) * width + first + o];
                const float value = sums[r * COLUMNS + o] + (linear.bias ? linear.bias[first + o] : 0.0f);
                target = adds ? target + value : value;
            }
    });
}

// One thread's outputs [first, last) of a product; threads share out whole blocks.
struct Part { int first, last; };

static Part part_of(int blocks, int thread, int threads) {
    return {int(int64_t(blocks) * thread / threads), int(int64_t(blocks) * (thread + 1) / threads)};
}

// y [rows, width] = or += x W^T, the outputs of this thread. `inputs.floats` is [rows I].
static Part multiply(const Linear& linear, const Inputs& inputs, int rows, float* out, int width, bool adds, int thread,
                     int threads) {
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
