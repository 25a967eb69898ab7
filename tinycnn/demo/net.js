// A network of the page: its arrays, its input, its answer, and which pixels mattered to it.

// Bytes of a base64 text.
function decodeBase64(text) {
    return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

// The number of an IEEE half-precision float, given its 16 bits.
function halfToNumber(bits) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    if (exponent === 31) {
        return fraction ? NaN : sign * Infinity;
    }
    return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
}

// The tensor of {shape, dtype, scale, data}.  dtype: float32, float16, or int8, whose numbers are multiples of scale.
function decodeArray({shape, dtype, scale, data}) {
    const bytes = decodeBase64(data);
    if (dtype === "int8") {
        return {shape, data: Float32Array.from(new Int8Array(bytes.buffer), (n) => n * scale)};
    }
    if (dtype === "float16") {
        return {shape, data: Float32Array.from(new Uint16Array(bytes.buffer), halfToNumber)};
    }
    return {shape, data: new Float32Array(bytes.buffer)};
}

function decodeArrays(arrays) {
    return Object.fromEntries(Object.entries(arrays).map(([name, array]) => [name, decodeArray(array)]));
}

// The layers of a network after so many epochs of training: a snapshot's, or the trained ones (null).
function layersOf(net, snapshot) {
    return buildLayers(net.layers, decodeArrays({...net.arrays, ...(snapshot && snapshot.arrays)}));
}

// A picture's pixels of 0 ... 255 as the network's input: resized, with a border of black, and normalised.
function toInput(net, pixels) {
    const [channels, height, width] = net.input;
    const inner = [channels, height - 2 * net.padding, width - 2 * net.padding];
    const resized = net.resize ? resize(pixels, net.picture, inner) : pixels;
    const data = new Float32Array(channels * height * width);
    for (let c = 0; c < channels; c++) {
        const mean = net.mean[c % net.mean.length], std = net.std[c % net.std.length];
        data.fill((0 - mean) / std, c * height * width, (c + 1) * height * width);
        for (let i = 0; i < inner[1]; i++) {
            for (let j = 0; j < inner[2]; j++) {
                const pixel = resized[(c * inner[1] + i) * inner[2] + j] / 255;
                data[(c * height + i + net.padding) * width + j + net.padding] = (pixel - mean) / std;
            }
        }
    }
    return {shape: net.input, data};
}

// Bilinear interpolation between pixel centres, edges repeated, rounded: (C, H, W) to (C, OH, OW).
function resize(pixels, [C, H, W], [, OH, OW]) {
    const result = new Float32Array(C * OH * OW);
    const clip = (n, size) => Math.min(Math.max(n, 0), size - 1);
    for (let c = 0; c < C; c++) {
        for (let i = 0; i < OH; i++) {
            for (let j = 0; j < OW; j++) {
                const y = ((i + 0.5) * H) / OH - 0.5, x = ((j + 0.5) * W) / OW - 0.5;
                const top = Math.floor(y), left = Math.floor(x);
                let sum = 0;
                for (const [row, a] of [[top, top + 1 - y], [top + 1, y - top]]) {
                    for (const [column, b] of [[left, left + 1 - x], [left + 1, x - left]]) {
                        sum += a * b * pixels[(c * H + clip(row, H)) * W + clip(column, W)];
                    }
                }
                result[(c * OH + i) * OW + j] = Math.floor(sum + 0.5);
            }
        }
    }
    return result;
}

// Means of blocks of block x block pixels, as (H, W).
function shrink(pixels, H, W, block) {
    const result = new Uint8Array(H * W);
    for (let i = 0; i < H; i++) {
        for (let j = 0; j < W; j++) {
            let sum = 0;
            for (let y = i * block; y < (i + 1) * block; y++) {
                for (let x = j * block; x < (j + 1) * block; x++) {
                    sum += pixels[y * W * block + x];
                }
            }
            result[i * W + j] = Math.round(sum / block ** 2);
        }
    }
    return result;
}

// Scores whose maximum is the answer: the outputs, or minus the outputs if these are distances.
function scores(net, output) {
    return net.kind === "distances" ? output.data.map((d) => -d) : output.data;
}

// {best, probabilities, none}: the class, the calibrated probabilities, and whether the picture is none of the classes.
function answer(net, output) {
    const z = scores(net, output);
    const largest = z.reduce((a, b) => Math.max(a, b));
    const powers = Array.from(z, (s) => Math.exp((s - largest) / net.temperature));
    const sum = powers.reduce((a, b) => a + b);
    if (net.layers[net.layers.length - 1].type === "Softmax") {
        return {best: z.indexOf(largest), probabilities: Array.from(z), none: false};
    }
    const energy = largest + Math.log(z.reduce((a, s) => a + Math.exp(s - largest), 0));
    const none = net.rejectBelow !== null && energy < net.rejectBelow;
    return {best: z.indexOf(largest), probabilities: powers.map((p) => p / sum), none};
}

// Gradients of a class's score with respect to the input and every layer's output.
function scoreGradients(net, layers, activations, target) {
    const output = activations[activations.length - 1];
    const dy = {shape: output.shape, data: new Float32Array(output.data.length)};
    dy.data[target] = net.kind === "distances" ? -1 : 1;
    return backward(layers, activations, dy);
}

const PATCH = 4, STEP = 2;  // pixels: side of the squares that are covered, and distance between them
const DIM = 0.02;  // share by which squares are dimmed, as a small change

// The rows and columns of the squares that `occlusion` covers.
function patchGrid([, height, width]) {
    return [height, width].map((size) => Math.floor(Math.max(0, size - PATCH) / STEP) + 1);
}

// How much the score falls if the square of a grid cell gets darker by a share (1: black): first measured, then
// predicted by the gradient.
function coverPatch(net, layers, x, gradient, target, score, cell, share) {
    const [channels, height, width] = x.shape;
    const columns = patchGrid(x.shape)[1];
    const top = Math.floor(cell / columns) * STEP, left = (cell % columns) * STEP;
    const covered = {shape: x.shape, data: x.data.slice()};
    let predicted = 0, changed = false;
    for (let c = 0; c < channels; c++) {
        const black = Math.fround(-net.mean[c % net.mean.length] / net.std[c % net.std.length]);
        for (let i = top; i < Math.min(top + PATCH, height); i++) {
            for (let j = left; j < Math.min(left + PATCH, width); j++) {
                const at = (c * height + i) * width + j;
                predicted += share * gradient.data[at] * (x.data[at] - black);
                changed = changed || x.data[at] !== black;
                covered.data[at] += share * (black - x.data[at]);
            }
        }
    }
    if (!changed) {
        return [0, 0];
    }
    const activations = forward(layers, covered);
    return [score - scores(net, activations[activations.length - 1])[target], predicted];
}

// Pearson's correlation of two lists of numbers; NaN if one does not vary.
function correlation(a, b) {
    const mean = (v) => v.reduce((s, n) => s + n, 0) / v.length;
    const [ma, mb] = [mean(a), mean(b)];
    let ab = 0, aa = 0, bb = 0;
    for (let n = 0; n < a.length; n++) {
        ab += (a[n] - ma) * (b[n] - mb);
        aa += (a[n] - ma) ** 2;
        bb += (b[n] - mb) ** 2;
    }
    return ab / Math.sqrt(aa * bb);
}

// Rows and columns [top, left, bottom, right] of a layer's input that its output's box depends on; null: all.
function inputBox(layer, box, shape) {
    const window = windowOf(layer);
    if (box === null || (window === null && !SAME_PLACE.has(layer.type))) {
        return null;
    }
    if (window === null) {
        return box;
    }
    const {kernel, stride, padding, dilation} = window;
    const [top, left] = [0, 1].map((a) => Math.max(0, box[a] * stride[a] - padding[a]));
    const [bottom, right] = [0, 1].map((a) =>
        Math.min(shape[1 + a] - 1, box[2 + a] * stride[a] - padding[a] + (kernel[a] - 1) * dilation[a]));
    return [top, left, bottom, right];
}

// Layers of maps whose output at a place depends on that place of the input only.
const SAME_PLACE = new Set([
    "BatchNorm2d", "Dropout", "Dropout2d", "Tanh", "ScaledTanh", "Sigmoid", "ReLU", "LeakyReLU", "ELU", "GELU", "SiLU",
    "Softplus", "Hardtanh", "ReLU6",
]);
