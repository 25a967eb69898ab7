// The arithmetic of one unit: its inputs, its weights, and how its number comes about.

// The numbers of channel c under the window of the output at (i, j): {values, inside}, kh * kw each; 0 outside.
function patchUnder(x, c, {kernel: [KH, KW], stride, padding, dilation}, i, j) {
    const [, H, W] = x.shape;
    const values = new Float32Array(KH * KW), inside = new Uint8Array(KH * KW);
    for (let u = 0; u < KH; u++) {
        for (let v = 0; v < KW; v++) {
            const row = i * stride[0] - padding[0] + u * dilation[0];
            const column = j * stride[1] - padding[1] + v * dilation[1];
            if (row >= 0 && row < H && column >= 0 && column < W) {
                values[u * KW + v] = x.data[(c * H + row) * W + column];
                inside[u * KW + v] = 1;
            }
        }
    }
    return {values, inside};
}

// [{channel, weights}] that map o of a convolution reads: its input channels and their kernels.
function kernelsOf(layer, o, channels) {
    const size = layer.kernel_size[0] * layer.kernel_size[1];
    const slice = (n) => layer.weight.data.subarray(n * size, (n + 1) * size);
    if (layer.type === "MappedConv2d") {  // weights are ordered by output, then by input
        const pairs = [];
        for (let output = 0, index = 0; output <= o; output++) {
            for (let channel = 0; channel < channels; channel++) {
                if (layer.connections[channel][output]) {
                    if (output === o) {
                        pairs.push({channel, weights: slice(index)});
                    }
                    index++;
                }
            }
        }
        return pairs;
    }
    const [outputs, each] = layer.weight.shape;
    const first = Math.floor(o / (outputs / layer.groups)) * each;
    return Array.from({length: each}, (_, n) => ({channel: first + n, weights: slice(o * each + n)}));
}

// A table of kh x kw cells with the text of `lines(n)`, coloured by values[n].
function cellTable(rows, columns, values, scale, lines) {
    const table = element("table", {class: "cells"});
    for (let i = 0; i < rows; i++) {
        const row = table.insertRow();
        for (let j = 0; j < columns; j++) {
            const n = i * columns + j, cell = row.insertCell();
            cell.style.background = cssColor(values[n] / scale);
            cell.style.color = Math.abs(values[n] / scale) > 0.7 ? "var(--on-color)" : "var(--text)";
            lines(n).forEach((line) => cell.append(element("div", {}, line)));
        }
    }
    return table;
}

// A convolution: for each channel the inputs times the weights; the numbers of the channel that is chosen.
function explainConvolution(layer, x, y, [o, i, j], chosen, choose) {
    const [KH, KW] = layer.kernel_size, window = windowOf(layer);
    const terms = kernelsOf(layer, o, x.shape[0]).map(({channel, weights}) => {
        const {values, inside} = patchUnder(x, channel, window, i, j);
        const products = values.map((value, n) => value * weights[n]);
        return {channel, weights, values, inside, products, sum: products.reduce((a, b) => a + b, 0)};
    });
    const scale = scaleOf(terms.flatMap((term) => Array.from(term.products)));
    const shown = terms.find((term) => term.channel === chosen) || terms[0];
    const parts = [];
    if (terms.length > 1) {
        parts.push(element("p", {class: "small"}, "Inputs times weights, summed, of every map that this unit reads:"));
        parts.push(element("div", {class: "thumbs"}, ...terms.map((term) => element("button", {
            type: "button", class: "thumb", "aria-pressed": String(term === shown),
            "aria-label": `map ${term.channel}, sum ${number(term.sum)}`, onclick: () => choose(term.channel),
        }, gridCanvas(term.products, KH, KW, scale, Math.max(3, Math.round(30 / KW)), ""),
        element("span", {}, number(term.sum))))));
    }
    const cell = Math.max(4, Math.round(60 / KW));
    const picture = (title, values, most) => labelled(title, gridCanvas(values, KH, KW, most, cell, title));
    parts.push(element("div", {class: "thumbs wide"},
        picture(terms.length > 1 ? `input, map ${shown.channel}` : "input", shown.values, scaleOf(x.data)),
        picture("weights", shown.weights, scaleOf(layer.weight.data)), picture("products", shown.products, scale)));
    if (KW <= 5) {
        parts.push(cellTable(KH, KW, shown.products, scale, (n) =>
            [shown.inside[n] ? brief(shown.values[n]) : "border 0", `\u00d7 ${brief(shown.weights[n])}`]));
    }
    const bias = layer.bias ? layer.bias.data[o] : 0;
    const sums = terms.length === 1 ? number(terms[0].sum)
        : `${number(terms.reduce((a, term) => a + term.sum, 0))} (of ${terms.length} maps)`;
    parts.push(equation(`${sums} + bias ${number(bias)} =`, valueAt(y, [o, i, j])));
    return parts;
}

// A pooling: the numbers under the window.
function explainPooling(layer, x, y, [c, i, j]) {
    const window = windowOf(layer), [KH, KW] = window.kernel;
    const {values, inside} = patchUnder(x, c, window, i, j);
    const result = valueAt(y, [c, i, j]);
    const table = cellTable(KH, KW, values, scaleOf(values), (n) => [inside[n] ? number(values[n]) : "\u2013"]);
    const sum = values.reduce((a, b) => a + b, 0);
    if (layer.type === "MaxPool2d") {
        return [table, equation("the largest =", result)];
    }
    if (layer.type === "Subsample") {
        const scale = layer.pool === "mean" ? KH * KW : 1, [w, b] = [layer.weight.data[c], layer.bias.data[c]];
        return [table, equation(
            `${layer.pool} ${number(sum / scale)} \u00d7 coefficient ${number(w)} + bias ${number(b)} =`, result)];
    }
    const count = layer.divisor_override || (layer.count_include_pad ? KH * KW : inside.reduce((a, b) => a + b, 0));
    return [table, equation(`sum ${number(sum)} / ${count} =`, result)];
}

// A linear layer: contributions weight * input in the places of the maps before it.
function explainLinear(layer, x, y, [f], mapShape) {
    const F = x.data.length, weights = layer.weight.data.subarray(f * F, (f + 1) * F);
    const products = x.data.map((value, n) => value * weights[n]);
    const [C, H, W] = mapShape || [1, 1, F], scale = scaleOf(products);
    const pictures = mapShape
        ? Array.from({length: C}, (_, c) => gridCanvas(
            products.subarray(c * H * W, (c + 1) * H * W), H, W, scale, Math.max(2, Math.round(34 / W)),
            `contributions of map ${c}`))
        : [gridCanvas(products, Math.ceil(F / 20), 20, scale, 12, "contributions of the inputs")];
    const order = Array.from(products.keys()).sort((a, b) => Math.abs(products[b]) - Math.abs(products[a])).slice(0, 4);
    const name = (n) => mapShape
        ? `map ${Math.floor(n / (H * W))}, ${Math.floor((n % (H * W)) / W)}, ${n % W}` : `unit ${n}`;
    const list = order.map((n) => element("li", {},
        `${name(n)}: ${number(x.data[n])} \u00d7 ${number(weights[n])} = ${number(products[n])}`));
    return [
        element("p", {class: "small"}, `${F} inputs times weights${mapShape ? ", in the places of the maps" : ""}:`),
        element("div", {class: "thumbs"}, ...pictures),
        element("p", {class: "small"}, "The largest:"), element("ol", {class: "small"}, ...list),
        equation(`sum ${number(products.reduce((a, b) => a + b, 0))} + bias ${number(layer.bias ? layer.bias.data[f] : 0)} =`,
            y.data[f]),
    ];
}

// A distance to a centre: the code, the centre and the squared differences, 7 x 12 if they are bitmaps.
function explainDistance(layer, x, y, [k]) {
    const F = x.data.length, centre = layer.weight.data.subarray(k * F, (k + 1) * F);
    const squares = x.data.map((value, n) => (value - centre[n]) ** 2);
    const columns = F === 84 ? 7 : Math.min(F, 20), rows = Math.ceil(F / columns);
    const grid = (title, values, scale) => labelled(title, gridCanvas(values, rows, columns, scale, 11, title));
    const sum = squares.reduce((a, b) => a + b, 0);
    return [
        element("div", {class: "thumbs"}, grid("code", x.data, scaleOf(x.data)), grid("centre", centre, scaleOf(centre)),
            grid("squared difference", squares, scaleOf(squares))),
        equation(layer.type === "GaussianRBF" ? `exp(\u2212${number(sum)} / 2) =` : `sum of the ${F} squares =`, y.data[k]),
    ];
}

// A canvas with its title below.
function labelled(title, canvas) {
    return element("figure", {}, canvas, element("figcaption", {class: "below"}, title));
}

// What the layers do whose arithmetic is not written out.
const SUMMARIES = {
    AdaptiveAvgPool2d: "the mean of its window",
    ConvTranspose2d: "the sum of the inputs times weights that reach it",
    GroupNorm: "less the mean of its group, over the standard deviation, times weight, plus bias",
    LayerNorm: "less the mean of its row, over the standard deviation, times weight, plus bias",
    LogSoftmax: "less the logarithm of the sum of the exponentials of all",
    Softmax: "its exponential, over the sum of those of all",
    Upsample: "a copy of the nearest input",
    ZeroPad2d: "a copy, or zero in the border",
};

// The layers' output plus the input, or plus its projection.
function explainResidual(layer, x, y, unit) {
    const [main, shortcut] = [layer.layers, layer.projection].map((layers) => forward(layers, x).pop());
    const name = layer.projection.length ? "the projection" : "the input";
    return [equation(`its layers ${number(valueAt(main, unit))} + ${name} ${number(valueAt(shortcut, unit))} =`,
        valueAt(y, unit))];
}

function explainBatchNorm(layer, x, y, unit) {
    if (!layer.running_mean) {
        return [equation("less its mean, over the standard deviation, times weight, plus bias =", valueAt(y, unit))];
    }
    const c = unit[0], of = (tensor, missing) => number(tensor ? tensor.data[c] : missing);
    const deviation = number(Math.sqrt(layer.running_var.data[c] + layer.eps));
    return [equation(`(${number(valueAt(x, unit))} \u2212 mean ${of(layer.running_mean)}) / deviation ${deviation} `
        + `\u00d7 ${of(layer.weight, 1)} + ${of(layer.bias, 0)} =`, valueAt(y, unit))];
}

function equation(text, result) {
    return element("p", {class: "equation"}, `${text} `, element("strong", {}, number(result)));
}

function valueAt(tensor, unit) {
    const [, H, W] = tensor.shape;
    return tensor.data[unit.length === 1 ? unit[0] : (unit[0] * H + unit[1]) * W + unit[2]];
}

// What layer k does for a unit of its output, as elements.  before: shape of the maps that a Flatten made x from
function explainUnit(layer, x, y, unit, before, chosen, choose) {
    switch (layer.type) {
    case "Conv2d":
    case "MappedConv2d":
        return explainConvolution(layer, x, y, unit, chosen, choose);
    case "AvgPool2d":
    case "MaxPool2d":
    case "Subsample":
        return explainPooling(layer, x, y, unit);
    case "Linear":
        return explainLinear(layer, x, y, unit, before);
    case "EuclideanRBF":
    case "GaussianRBF":
        return explainDistance(layer, x, y, unit);
    case "Residual":
        return explainResidual(layer, x, y, unit);
    case "BatchNorm1d":
    case "BatchNorm2d":
        return explainBatchNorm(layer, x, y, unit);
    default:
        return layer.type in SUMMARIES ? [equation(`${SUMMARIES[layer.type]} =`, valueAt(y, unit))]
            : [equation(`${layer.type}: ${number(valueAt(x, unit))} becomes`, valueAt(y, unit))];
    }
}
