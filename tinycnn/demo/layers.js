// The layers of tinycnn in evaluation mode for one image: forward, and backward to the input.
//
// A tensor is {shape: [C, H, W] or [F], data: Float32Array}, row by row.  A layer has its type, the settings of its
// constructor, the shape of its output and its arrays: {type: "Linear", output_shape: [10], weight: tensor,
// bias: tensor or null, ...}, see describe in _layers.py.  forward(layer, x) returns the output y.
// backward(layer, dy, x, y) returns the gradient of x from dy, the gradient of y.  Sums are in double precision.

function zeros(shape) {
    return {shape, data: new Float32Array(shape.reduce((a, b) => a * b, 1))};
}

function reshape(x, shape) {
    return {shape, data: x.data};
}

// --- convolutions ----------------------------------------------------------------------------------------------------
// x: (C, H, W)   y: (O, OH, OW)   Entry (u, v) of the window of y[i, j] is the pixel in row i*sh + u*dh - ph and
// column j*sw + v*dw - pw; pixels outside of the image are zero.

// The pairs of a layer with windows.  Padding is [top, left]: the output's shape implies the other sides.
function geometry(layer) {
    return {
        kernel: layer.kernel_size,
        stride: layer.stride || (layer.type === "Subsample" ? layer.kernel_size : [1, 1]),
        padding: layer.padding || [0, 0],
        dilation: layer.dilation || [1, 1],
    };
}

function windowOf(layer) {
    const windowed = ["Conv2d", "MappedConv2d", "AvgPool2d", "MaxPool2d", "Subsample"];
    return windowed.includes(layer.type) ? geometry(layer) : null;
}

// The first k <= count with start + k*step >= limit.  Limits of 0 and of an axis' size give the range of k inside.
function firstAt(limit, start, step, count) {
    return Math.min(count, Math.max(0, Math.ceil((limit - start) / step)));
}

// Where the entries of a window are inside the image: for the outputs with i0 <= i < i1 and j0 <= j < j1, entry k of the
// kernel reads the pixel (i*sh + top, j*sw + left).
function tapsOf({kernel: [KH, KW], stride: [sh, sw], padding, dilation}, H, W, OH, OW) {
    const taps = [];
    for (let k = 0; k < KH * KW; k++) {
        const top = Math.floor(k / KW) * dilation[0] - padding[0], left = (k % KW) * dilation[1] - padding[1];
        taps.push({
            k, top, left,
            i0: firstAt(0, top, sh, OH), i1: firstAt(H, top, sh, OH),
            j0: firstAt(0, left, sw, OW), j1: firstAt(W, left, sw, OW),
        });
    }
    return taps;
}

// sums += one plane convolved with one kernel.
// sums: (OH, OW) doubles   x: (H, W), from xStart on   w: (KH, KW), from wStart on
function addConvolved(sums, OW, x, xStart, W, w, wStart, taps, [sh, sw]) {
    for (const {k, top, left, i0, i1, j0, j1} of taps) {
        const tap = w[wStart + k];
        for (let i = i0; i < i1; i++) {
            const end = i * OW + j1;
            let q = xStart + (i * sh + top) * W + j0 * sw + left;
            for (let p = i * OW + j0; p < end; p++) {
                sums[p] += tap * x[q];
                q += sw;
            }
        }
    }
}

// The transpose of addConvolved: sums += the gradient of the plane.
// sums: (H, W) doubles   dy: (OH, OW), from yStart on
function addTransposed(sums, W, dy, yStart, OW, w, wStart, taps, [sh, sw]) {
    for (const {k, top, left, i0, i1, j0, j1} of taps) {
        const tap = w[wStart + k];
        for (let i = i0; i < i1; i++) {
            const end = yStart + i * OW + j1;
            let q = (i * sh + top) * W + j0 * sw + left;
            for (let p = yStart + i * OW + j0; p < end; p++) {
                sums[q] += tap * dy[p];
                q += sw;
            }
        }
    }
}

// y[o] = bias[o] + sum of the x[c] of its group convolved with weight[o, c].   weight: (O, C/groups, KH, KW)
function convolve(x, shape, weight, bias, groups, window) {
    const [C, H, W] = x.shape, [O, OH, OW] = shape, inputs = C / groups, size = window.kernel[0] * window.kernel[1];
    const y = zeros(shape), sums = new Float64Array(OH * OW), taps = tapsOf(window, H, W, OH, OW);
    for (let o = 0; o < O; o++) {
        const first = Math.floor(o / (O / groups)) * inputs;
        sums.fill(bias ? bias.data[o] : 0);
        for (let c = 0; c < inputs; c++) {
            const plane = (first + c) * H * W, w = (o * inputs + c) * size;
            addConvolved(sums, OW, x.data, plane, W, weight.data, w, taps, window.stride);
        }
        y.data.set(sums, o * OH * OW);
    }
    return y;
}

// The transpose of convolve: from dy, of shape (O, OH, OW), to `shape`, (C, H, W).   bias: of the transposed layer
function transpose(dy, shape, weight, bias, groups, window) {
    const [C, H, W] = shape, [O, OH, OW] = dy.shape, inputs = C / groups, size = window.kernel[0] * window.kernel[1];
    const dx = zeros(shape), sums = new Float64Array(H * W), outputs = O / groups;
    const taps = tapsOf(window, H, W, OH, OW);
    for (let c = 0; c < C; c++) {
        const first = Math.floor(c / inputs) * outputs;
        sums.fill(bias ? bias.data[c] : 0);
        for (let o = first; o < first + outputs; o++) {
            const w = (o * inputs + c % inputs) * size;
            addTransposed(sums, W, dy.data, o * OH * OW, OW, weight.data, w, taps, window.stride);
        }
        dx.data.set(sums, c * H * W);
    }
    return dx;
}

const Conv2d = {
    forward: (layer, x) => convolve(x, layer.output_shape, layer.weight, layer.bias, layer.groups, geometry(layer)),
    backward: (layer, dy, x) => transpose(dy, x.shape, layer.weight, null, layer.groups, geometry(layer)),
};

// weight: (C, O/groups, KH, KW), that of the convolution whose transpose this is
const ConvTranspose2d = {
    forward: (layer, x) => transpose(x, layer.output_shape, layer.weight, layer.bias, layer.groups, geometry(layer)),
    backward: (layer, dy, x) => convolve(dy, x.shape, layer.weight, null, layer.groups, geometry(layer)),
};

// connections: (C, O), 1 where an output map reads an input map   weight: (pairs, KH, KW), by output, then by input
const MappedConv2d = {
    forward(layer, x) {
        const [C, H, W] = x.shape, [O, OH, OW] = layer.output_shape, window = geometry(layer);
        const y = zeros(layer.output_shape), sums = new Float64Array(OH * OW), taps = tapsOf(window, H, W, OH, OW);
        let w = 0;
        for (let o = 0; o < O; o++) {
            sums.fill(layer.bias.data[o]);
            for (let c = 0; c < C; c++) {
                if (layer.connections[c][o]) {
                    addConvolved(sums, OW, x.data, c * H * W, W, layer.weight.data, w, taps, window.stride);
                    w += window.kernel[0] * window.kernel[1];
                }
            }
            y.data.set(sums, o * OH * OW);
        }
        return y;
    },
    backward(layer, dy, x) {
        const [C, H, W] = x.shape, [O, OH, OW] = dy.shape, window = geometry(layer);
        const sums = new Float64Array(C * H * W), taps = tapsOf(window, H, W, OH, OW);
        let w = 0;
        for (let o = 0; o < O; o++) {
            for (let c = 0; c < C; c++) {
                if (layer.connections[c][o]) {
                    const plane = sums.subarray(c * H * W, (c + 1) * H * W);
                    addTransposed(plane, W, dy.data, o * OH * OW, OW, layer.weight.data, w, taps, window.stride);
                    w += window.kernel[0] * window.kernel[1];
                }
            }
        }
        return {shape: x.shape, data: new Float32Array(sums)};
    },
};

// --- linear layers and distances -------------------------------------------------------------------------------------
// x: (F,)   y: (O,)   weight: (O, F)

const Linear = {
    forward(layer, x) {
        const [O] = layer.output_shape, F = x.data.length, w = layer.weight.data, source = x.data;
        const y = zeros(layer.output_shape);
        for (let o = 0; o < O; o++) {
            let sum = layer.bias ? layer.bias.data[o] : 0;
            for (let f = 0, k = o * F; f < F; f++, k++) {
                sum += w[k] * source[f];
            }
            y.data[o] = sum;
        }
        return y;
    },
    backward(layer, dy, x) {
        const [O] = dy.shape, F = x.data.length, w = layer.weight.data;
        const sums = new Float64Array(F);
        for (let o = 0; o < O; o++) {
            const g = dy.data[o];
            for (let f = 0, k = o * F; f < F; f++, k++) {
                sums[f] += g * w[k];
            }
        }
        return {shape: x.shape, data: new Float32Array(sums)};
    },
};

// y[o] = |x - weight[o]|^2
const EuclideanRBF = {
    forward(layer, x) {
        const [O] = layer.output_shape, F = x.data.length, w = layer.weight.data, y = zeros(layer.output_shape);
        for (let o = 0; o < O; o++) {
            let sum = 0;
            for (let f = 0; f < F; f++) {
                sum += (x.data[f] - w[o * F + f]) ** 2;
            }
            y.data[o] = sum;
        }
        return y;
    },
    backward(layer, dy, x) {
        const [O] = dy.shape, F = x.data.length, w = layer.weight.data, dx = zeros(x.shape);
        for (let f = 0; f < F; f++) {
            let sum = 0;
            for (let o = 0; o < O; o++) {
                sum += 2 * dy.data[o] * (x.data[f] - w[o * F + f]);
            }
            dx.data[f] = sum;
        }
        return dx;
    },
};

// y[o] = exp(-|x - weight[o]|^2 / 2)
const GaussianRBF = {
    forward(layer, x) {
        const distances = EuclideanRBF.forward(layer, x);
        return {shape: distances.shape, data: distances.data.map((d) => Math.exp(-d / 2))};
    },
    backward(layer, dy, x, y) {
        const gradient = dy.data.map((g, o) => -g * y.data[o] / 2);
        return EuclideanRBF.backward(layer, {shape: dy.shape, data: gradient}, x);
    },
};

// --- pooling, other sizes and shapes ---------------------------------------------------------------------------------

// Calls visit(p, h0, h1, w0, w1, count) for every number y[p] of AvgPool2d, with the rows and columns of its window in
// the image, and the count by which their sum is divided.
function forMeans(layer, x, visit) {
    const [C, H, W] = x.shape, [, OH, OW] = layer.output_shape, {kernel, stride, padding} = geometry(layer);
    const counted = layer.count_include_pad ? padding : [0, 0];
    let p = 0;
    for (let c = 0; c < C; c++) {
        for (let i = 0; i < OH; i++) {
            const h = i * stride[0] - padding[0];
            const h0 = Math.max(0, h), h1 = Math.min(H, h + kernel[0]);
            const rows = Math.min(H + counted[0], h + kernel[0]) - Math.max(-counted[0], h);
            for (let j = 0; j < OW; j++, p++) {
                const w = j * stride[1] - padding[1];
                const columns = Math.min(W + counted[1], w + kernel[1]) - Math.max(-counted[1], w);
                const count = layer.divisor_override || rows * columns;
                visit(p, c * H + h0, c * H + h1, Math.max(0, w), Math.min(W, w + kernel[1]), count);
            }
        }
    }
}

// The same for AdaptiveAvgPool2d: rows floor(i*H / OH) to ceil((i + 1)*H / OH) - 1.
function forSharedMeans(layer, x, visit) {
    const [C, H, W] = x.shape, [, OH, OW] = layer.output_shape;
    let p = 0;
    for (let c = 0; c < C; c++) {
        for (let i = 0; i < OH; i++) {
            const h0 = Math.floor(i * H / OH), h1 = Math.ceil((i + 1) * H / OH);
            for (let j = 0; j < OW; j++, p++) {
                const w0 = Math.floor(j * W / OW), w1 = Math.ceil((j + 1) * W / OW);
                visit(p, c * H + h0, c * H + h1, w0, w1, (h1 - h0) * (w1 - w0));
            }
        }
    }
}

// y[p] = mean of a window; forWindows is one of the two above.
function meanPooling(forWindows) {
    return {
        forward(layer, x) {
            const y = zeros(layer.output_shape), W = x.shape[2], source = x.data;
            forWindows(layer, x, (p, h0, h1, w0, w1, count) => {
                let sum = 0;
                for (let h = h0; h < h1; h++) {
                    for (let k = h * W + w0; k < h * W + w1; k++) {
                        sum += source[k];
                    }
                }
                y.data[p] = sum / count;
            });
            return y;
        },
        backward(layer, dy, x) {
            const sums = new Float64Array(x.data.length), W = x.shape[2];
            forWindows(layer, x, (p, h0, h1, w0, w1, count) => {
                const g = dy.data[p] / count;
                for (let h = h0; h < h1; h++) {
                    for (let k = h * W + w0; k < h * W + w1; k++) {
                        sums[k] += g;
                    }
                }
            });
            return {shape: x.shape, data: new Float32Array(sums)};
        },
    };
}

// The index in x of the largest number of each window, the first of equal ones, or NaN; -1 if all is padding.
function largest(layer, x) {
    const [C, H, W] = x.shape, [, OH, OW] = layer.output_shape, source = x.data;
    const {kernel: [KH, KW], stride: [sh, sw], padding: [ph, pw], dilation: [dh, dw]} = geometry(layer);
    const indices = new Int32Array(C * OH * OW);
    let p = 0;
    for (let c = 0; c < C; c++) {
        for (let i = 0; i < OH; i++) {
            for (let j = 0; j < OW; j++, p++) {
                let best = -Infinity, index = -1;
                for (let u = 0; u < KH; u++) {
                    const h = i * sh + u * dh - ph;
                    if (h < 0 || h >= H) {
                        continue;
                    }
                    for (let v = 0; v < KW; v++) {
                        const w = j * sw + v * dw - pw, k = (c * H + h) * W + w;
                        if (w >= 0 && w < W && (index < 0 || source[k] > best || source[k] !== source[k])) {
                            best = source[k];
                            index = k;
                        }
                    }
                }
                indices[p] = index;
            }
        }
    }
    return indices;
}

const MaxPool2d = {
    forward(layer, x) {
        const y = zeros(layer.output_shape);
        largest(layer, x).forEach((k, p) => {
            y.data[p] = k < 0 ? -Infinity : x.data[k];
        });
        return y;
    },
    backward(layer, dy, x) {
        const sums = new Float64Array(x.data.length);
        largest(layer, x).forEach((k, p) => {
            if (k >= 0) {
                sums[k] += dy.data[p];
            }
        });
        return {shape: x.shape, data: new Float32Array(sums)};
    },
};

// y = weight[c] * (sum, or mean, of each window) + bias[c]; windows lie side by side.
const Subsample = {
    forward(layer, x) {
        const y = meanPooling(forMeans).forward(layer, x), [C, OH, OW] = y.shape;
        const count = layer.pool === "sum" ? layer.kernel_size[0] * layer.kernel_size[1] : 1;
        for (let p = 0; p < y.data.length; p++) {
            const c = Math.floor(p / (OH * OW));
            y.data[p] = layer.weight.data[c] * count * y.data[p] + layer.bias.data[c];
        }
        return y;
    },
    backward(layer, dy, x) {
        const [C, OH, OW] = dy.shape, scaled = zeros(dy.shape);
        const count = layer.pool === "sum" ? layer.kernel_size[0] * layer.kernel_size[1] : 1;
        for (let p = 0; p < dy.data.length; p++) {
            scaled.data[p] = layer.weight.data[Math.floor(p / (OH * OW))] * count * dy.data[p];
        }
        return meanPooling(forMeans).backward(layer, scaled, x);
    },
};

// Calls visit(p, k) for every number y[p] that is a copy of x[k]: of Upsample.
function forCopies(layer, x, visit) {
    const [C, H, W] = x.shape, [, OH, OW] = layer.output_shape;
    for (let c = 0; c < C; c++) {
        for (let i = 0; i < OH; i++) {
            for (let j = 0; j < OW; j++) {
                const h = Math.floor(i * H / OH), w = Math.floor(j * W / OW);
                visit((c * OH + i) * OW + j, (c * H + h) * W + w);
            }
        }
    }
}

// The same for ZeroPad2d.  Negative padding crops.
function forInside(layer, x, visit) {
    const [C, H, W] = x.shape, [, OH, OW] = layer.output_shape, [left, , top] = layer.padding;
    for (let c = 0; c < C; c++) {
        for (let h = Math.max(0, -top); h < Math.min(H, OH - top); h++) {
            for (let w = Math.max(0, -left); w < Math.min(W, OW - left); w++) {
                visit((c * OH + h + top) * OW + w + left, (c * H + h) * W + w);
            }
        }
    }
}

// y[p] = x[k], other numbers of y are zero; forPairs is one of the two above.
function copying(forPairs) {
    return {
        forward(layer, x) {
            const y = zeros(layer.output_shape);
            forPairs(layer, x, (p, k) => {
                y.data[p] = x.data[k];
            });
            return y;
        },
        backward(layer, dy, x) {
            const sums = new Float64Array(x.data.length);
            forPairs(layer, x, (p, k) => {
                sums[k] += dy.data[p];
            });
            return {shape: x.shape, data: new Float32Array(sums)};
        },
    };
}

// Layers that do not change the numbers: they and their gradients share one array.
const Identity = {
    forward: (layer, x) => reshape(x, layer.output_shape),
    backward: (layer, dy, x) => reshape(dy, x.shape),
};

// --- norms -----------------------------------------------------------------------------------------------------------
// xhat = (x - mean) / sqrt(var + eps),  y = xhat * weight + bias.  Mean and biased variance are those of a set of
// numbers that lie side by side; of BatchNorm they are the running ones, and constants.

// size: numbers in a set.  Number k of the image has the parameter floor(k / repeat) % parameters.
function normOf(layer, x) {
    const C = x.shape[0], n = x.data.length;
    if (layer.type === "LayerNorm") {
        const size = layer.normalized_shape.reduce((a, b) => a * b, 1);
        return {size, repeat: 1, parameters: size};
    }
    return {size: n / (layer.num_groups || C), repeat: n / C, parameters: C};
}

// [mean, 1 / sqrt(var + eps)] of set s.
function statistics(layer, x, s, size) {
    if (layer.running_mean) {
        return [layer.running_mean.data[s], 1 / Math.sqrt(layer.running_var.data[s] + layer.eps)];
    }
    let mean = 0, variance = 0;
    for (let k = s * size; k < (s + 1) * size; k++) {
        mean += x.data[k] / size;
    }
    for (let k = s * size; k < (s + 1) * size; k++) {
        variance += (x.data[k] - mean) ** 2 / size;
    }
    return [mean, 1 / Math.sqrt(variance + layer.eps)];
}

const Norm = {
    forward(layer, x) {
        const y = zeros(x.shape), {size, repeat, parameters} = normOf(layer, x);
        for (let s = 0; s * size < x.data.length; s++) {
            const [mean, rstd] = statistics(layer, x, s, size);
            for (let k = s * size; k < (s + 1) * size; k++) {
                const c = Math.floor(k / repeat) % parameters;
                const weight = layer.weight ? layer.weight.data[c] : 1, bias = layer.bias ? layer.bias.data[c] : 0;
                y.data[k] = (x.data[k] - mean) * rstd * weight + bias;
            }
        }
        return y;
    },
    // dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * weight; rstd * g if the statistics are constants
    backward(layer, dy, x) {
        const dx = zeros(x.shape), {size, repeat, parameters} = normOf(layer, x);
        const weightOf = (k) => layer.weight ? layer.weight.data[Math.floor(k / repeat) % parameters] : 1;
        const g = dy.data.map((d, k) => d * weightOf(k));
        for (let s = 0; s * size < x.data.length; s++) {
            const [mean, rstd] = statistics(layer, x, s, size);
            let meanG = 0, meanGXhat = 0;
            for (let k = s * size; k < (s + 1) * size && !layer.running_mean; k++) {
                meanG += g[k] / size;
                meanGXhat += g[k] * (x.data[k] - mean) * rstd / size;
            }
            for (let k = s * size; k < (s + 1) * size; k++) {
                dx.data[k] = rstd * (g[k] - meanG - (x.data[k] - mean) * rstd * meanGXhat);
            }
        }
        return dx;
    },
};

// --- activations -----------------------------------------------------------------------------------------------------

// y = value(x, layer) and dx = dy * derivative(x, y, layer) for every number.
function activation(value, derivative) {
    return {
        forward(layer, x) {
            const y = zeros(x.shape), source = x.data, target = y.data;
            for (let k = 0; k < source.length; k++) {
                target[k] = value(source[k], layer);
            }
            return y;
        },
        backward(layer, dy, x, y) {
            const dx = zeros(x.shape);
            for (let k = 0; k < dx.data.length; k++) {
                dx.data[k] = dy.data[k] * derivative(x.data[k], y.data[k], layer);
            }
            return dx;
        },
    };
}

function sigmoid(x) {
    return 1 / (1 + Math.exp(-x));
}

// P(Z <= x) for a standard normal Z: erfc(z) / 2 = t G(t) exp(-z^2) / 2 with z = |x| / sqrt(2) and t = 1 / (1 + z/2).
// The coefficients are those of tinycnn/scalars.py.
function normalCdf(x) {
    const coefficients = [
        0.0431954450905323, -0.23473365604877472, 0.49369508028030396, -0.45497414469718933, 0.13217715919017792,
        -0.05921141058206558, 0.09346245229244232, 0.1753159761428833, 0.2468845695257187, 0.28209376335144043,
        0.282094806432724,
    ];
    const z = Math.abs(x) * Math.SQRT1_2, t = 1 / (1 + z / 2);
    const tail = t * coefficients.reduce((sum, g) => sum * t + g, 0) * Math.exp(-z * z) / 2;
    return x > 0 ? 1 - tail : tail;
}

const GELU_SLOPE = 2 * Math.sqrt(2 / Math.PI), GELU_CUBE = 0.044715;

// The factor of x in GELU(x).
function geluFactor(x, layer) {
    return layer.approximate === "tanh" ? sigmoid(GELU_SLOPE * (x + GELU_CUBE * x ** 3)) : normalCdf(x);
}

function geluDerivative(x, y, layer) {
    const factor = geluFactor(x, layer);
    if (layer.approximate === "tanh") {
        return factor + x * factor * (1 - factor) * GELU_SLOPE * (1 + 3 * GELU_CUBE * x * x);
    }
    return factor + x * Math.exp(-x * x / 2) / Math.sqrt(2 * Math.PI);
}

function softplus(x, {beta, threshold}) {
    const z = beta * x;
    return z > threshold ? x : (Math.max(z, 0) + Math.log1p(Math.exp(-Math.abs(z)))) / beta;
}

// y = exp(x) / sum(exp(x))
const Softmax = {
    forward(layer, x) {
        const top = Math.max(...x.data), y = {shape: x.shape, data: x.data.map((v) => Math.exp(v - top))};
        const sum = y.data.reduce((a, b) => a + b, 0);
        y.data.forEach((v, k) => {
            y.data[k] = v / sum;
        });
        return y;
    },
    backward(layer, dy, x, y) {
        const total = dy.data.reduce((sum, g, k) => sum + g * y.data[k], 0);
        return {shape: x.shape, data: y.data.map((v, k) => v * (dy.data[k] - total))};
    },
};

// y = x - log(sum(exp(x)))
const LogSoftmax = {
    forward(layer, x) {
        const top = Math.max(...x.data);
        const log = top + Math.log(x.data.reduce((sum, v) => sum + Math.exp(v - top), 0));
        return {shape: x.shape, data: x.data.map((v) => v - log)};
    },
    backward(layer, dy, x, y) {
        const total = dy.data.reduce((a, b) => a + b, 0);
        return {shape: x.shape, data: dy.data.map((g, k) => g - Math.exp(y.data[k]) * total)};
    },
};

// --- chains ----------------------------------------------------------------------------------------------------------

// y = layers(x) + projection(x); no projection is the identity.
const Residual = {
    forward(layer, x) {
        const main = forward(layer.layers, x).pop(), shortcut = forward(layer.projection, x).pop();
        return {shape: main.shape, data: main.data.map((v, k) => v + shortcut.data[k])};
    },
    backward(layer, dy, x) {
        const main = backward(layer.layers, forward(layer.layers, x), dy)[0];
        const shortcut = backward(layer.projection, forward(layer.projection, x), dy)[0];
        return {shape: x.shape, data: main.data.map((g, k) => g + shortcut.data[k])};
    },
};

const LAYERS = {
    AdaptiveAvgPool2d: meanPooling(forSharedMeans),
    AvgPool2d: meanPooling(forMeans),
    BatchNorm1d: Norm,
    BatchNorm2d: Norm,
    Conv2d,
    ConvTranspose2d,
    Dropout: Identity,
    Dropout2d: Identity,
    ELU: activation((x, {alpha}) => x > 0 ? x : alpha * Math.expm1(x), (x, y, {alpha}) => y <= 0 ? y + alpha : 1),
    EuclideanRBF,
    Flatten: Identity,
    GELU: activation((x, layer) => x * geluFactor(x, layer), geluDerivative),
    GaussianRBF,
    GroupNorm: Norm,
    Hardtanh: activation(
        (x, {min_val, max_val}) => Math.min(Math.max(x, min_val), max_val),
        (x, y, {min_val, max_val}) => x <= min_val || x >= max_val ? 0 : 1,
    ),
    LayerNorm: Norm,
    LeakyReLU: activation(
        (x, layer) => x <= 0 ? layer.negative_slope * x : x, (x, y, layer) => x <= 0 ? layer.negative_slope : 1,
    ),
    Linear,
    LogSoftmax,
    MappedConv2d,
    MaxPool2d,
    ReLU6: activation((x) => Math.min(Math.max(x, 0), 6), (x) => x <= 0 || x >= 6 ? 0 : 1),
    ReLU: activation((x) => Math.max(x, 0), (x) => x <= 0 ? 0 : 1),
    Residual,
    ScaledTanh: activation((x, {A, S}) => A * Math.tanh(S * x), (x, y, {A, S}) => S * (A - y * y / A)),
    SiLU: activation((x) => x * sigmoid(x), (x) => sigmoid(x) * (1 + x * (1 - sigmoid(x)))),
    Sigmoid: activation(sigmoid, (x, y) => y * (1 - y)),
    Softmax,
    Softplus: activation(softplus, (x, y, {beta, threshold}) => beta * x > threshold ? 1 : sigmoid(beta * x)),
    Subsample,
    Tanh: activation(Math.tanh, (x, y) => 1 - y * y),
    Unflatten: Identity,
    Upsample: copying(forCopies),
    ZeroPad2d: copying(forInside),
};

// The input and every output of a chain: [x, y0, y1, ...].
function forward(layers, x) {
    const activations = [x];
    for (const layer of layers) {
        activations.push(LAYERS[layer.type].forward(layer, activations[activations.length - 1]));
    }
    return activations;
}

// The gradient of each of the activations, from dy, that of the last one.
function backward(layers, activations, dy) {
    const gradients = [dy];
    for (let n = layers.length - 1; n >= 0; n--) {
        gradients.unshift(LAYERS[layers[n].type].backward(layers[n], gradients[0], activations[n], activations[n + 1]));
    }
    return gradients;
}

// Layers from the descriptions of _layers.py.   arrays: name -> tensor
function buildLayers(descriptions, arrays) {
    return descriptions.map((description) => {
        const layer = {...description};
        for (const name of ["weight", "bias", "running_mean", "running_var"]) {
            if (layer[name]) {
                layer[name] = arrays[layer[name]];
            }
        }
        if (layer.type === "Residual") {
            layer.layers = buildLayers(layer.layers, arrays);
            layer.projection = buildLayers(layer.projection, arrays);
        }
        return layer;
    });
}
