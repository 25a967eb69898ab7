// Drawing: colours, tensors on canvases, curves.

// A custom property of the style sheet as [red, green, blue].
function color(name) {
    const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
}

let palette = null;  // colours of the current theme, read once
const LEVELS = 255;  // colours of each sign
const ramp = new Uint32Array(2 * LEVELS + 1);  // the pixel of -1 ... 1, four bytes each
const rampBytes = new Uint8ClampedArray(ramp.buffer);

function readPalette() {
    palette = {zero: color("--zero"), positive: color("--positive"), negative: color("--negative"),
        ink: color("--ink"), paper: color("--paper"), accent: color("--accent")};
    for (let n = -LEVELS; n <= LEVELS; n++) {
        const end = n < 0 ? palette.negative : palette.positive, part = Math.abs(n) / LEVELS;
        rampBytes.set([...palette.zero.map((zero, k) => zero + (end[k] - zero) * part), 255], 4 * (n + LEVELS));
    }
}

// The index in `ramp` of a value in -1 ... 1.
function level(value) {
    return Math.round(LEVELS * Math.min(Math.max(value, -1), 1)) + LEVELS;
}

// The colour of a value in -1 ... 1, for a style.
function cssColor(value) {
    return `rgb(${rampBytes.subarray(4 * level(value), 4 * level(value) + 3).join()})`;
}

// Give a canvas a size in CSS pixels; returns its context, scaled so that one unit is one CSS pixel.
function sizeCanvas(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1;
    const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== w || canvas.height !== h) {
        canvas.width = w;
        canvas.height = h;
        canvas.style.width = `${width}px`;
        canvas.style.height = `${height}px`;
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.imageSmoothingEnabled = false;
    return context;
}

const scratch = document.createElement("canvas");

// Numbers (rows, columns) as pixels on a canvas that is not shown, one pixel each; more canvases make it faster.
function toPixels(values, rows, columns, scale, canvas = scratch) {
    if (canvas.width !== columns || canvas.height !== rows) {
        canvas.width = columns;
        canvas.height = rows;
    }
    const image = new ImageData(columns, rows), pixels = new Uint32Array(image.data.buffer), factor = 1 / scale;
    for (let n = 0; n < rows * columns; n++) {
        pixels[n] = ramp[level(n < values.length ? values[n] * factor : 0)];
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
}

// Draw numbers (rows, columns), one colour each, on a canvas, with `cell` CSS pixels a number.
function drawGrid(canvas, values, rows, columns, scale, cell) {
    const context = sizeCanvas(canvas, columns * cell, rows * cell);
    context.drawImage(toPixels(values, rows, columns, scale), 0, 0, columns * cell, rows * cell);
}

// A new canvas with one grid of numbers; `label` for screen readers.
function gridCanvas(values, rows, columns, scale, cell, label) {
    const canvas = element("canvas", {role: "img", "aria-label": label});
    drawGrid(canvas, values, rows, columns, scale, cell);
    return canvas;
}

// A rectangle that stands out on any colour.
function outline(context, x, y, width, height) {
    for (const [style, line] of [["#ffffff", 4], [`rgb(${palette.accent.join()})`, 2]]) {
        context.strokeStyle = style;
        context.lineWidth = line;
        context.strokeRect(x, y, width, height);
    }
}

// The upper left corner of map c.
function corner({perRow, W, H, cell, gap}, c) {
    return [(c % perRow) * (W * cell + gap), Math.floor(c / perRow) * (H * cell + gap)];
}

// Draw maps (count, H, W) in rows; returns the context.
function drawMaps(canvas, values, {count, H, W, cell, gap, perRow}, scale, pixels = scratch) {
    const [across, down] = [perRow, Math.ceil(count / perRow)];
    const context = sizeCanvas(canvas, across * (W * cell + gap) - gap, down * (H * cell + gap) - gap);
    context.clearRect(0, 0, canvas.width, canvas.height);
    toPixels(values, count * H, W, scale, pixels);
    for (let c = 0; c < count; c++) {
        context.drawImage(pixels, 0, c * H, W, H, ...corner({perRow, W, H, cell, gap}, c), W * cell, H * cell);
    }
    return context;
}

// A picture (C, H, W) of 0 ... 255 on a canvas that is not shown: white on black as ink on paper if it is `inked`.
function pictureCanvas(pixels, [C, H, W], inked) {
    const image = new ImageData(W, H);
    for (let n = 0; n < H * W; n++) {
        for (let k = 0; k < 3; k++) {
            const part = pixels[n] / 255;
            image.data[4 * n + k] = inked ? palette.paper[k] + (palette.ink[k] - palette.paper[k]) * part
                : pixels[(C === 3 ? k * H * W : 0) + n];
        }
        image.data[4 * n + 3] = 255;
    }
    scratch.width = W;
    scratch.height = H;
    scratch.getContext("2d").putImageData(image, 0, 0);
    return scratch;
}

// The picture on a canvas whose longer side has `size` CSS pixels; returns the pixels of one of the picture's.
function drawPicture(canvas, pixels, shape, size, inked) {
    const [, H, W] = shape, cell = size / Math.max(H, W), context = sizeCanvas(canvas, W * cell, H * cell);
    context.imageSmoothingEnabled = cell < 1;
    context.drawImage(pictureCanvas(pixels, shape, inked), 0, 0, W * cell, H * cell);
    return cell;
}

// The largest absolute value of numbers, at least 1e-6: the scale of their colours.
function scaleOf(values) {
    let most = 1e-6;
    for (let n = 0; n < values.length; n++) {
        const size = Math.abs(values[n]);
        most = size > most ? size : most;
    }
    return most;
}

// An element with attributes and children (elements or texts).
function element(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
        if (name.startsWith("on")) {
            node.addEventListener(name.slice(2), value);
        } else {
            node.setAttribute(name, value);
        }
    }
    node.append(...children);
    return node;
}

function svg(tag, attributes = {}, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
    node.append(...children);
    return node;
}

// Change a text, if it is another one: the browser need not lay out the page then.
function setText(node, text) {
    if (node.textContent !== text) {
        node.textContent = text;
    }
}

// A number with three significant digits, with a real minus sign.
function number(value) {
    const size = Math.abs(value);
    const text = size === 0 ? "0" : size >= 1000 || size < 0.001 ? size.toExponential(1) : size.toPrecision(3);
    return (value < 0 ? "\u2212" : "") + text;
}

// A number in a narrow cell.
function brief(value) {
    return value.toFixed(Math.abs(value) < 1 ? 3 : 2).replace("-", "\u2212");
}

// Curves over the epochs: lines is [{name, values}]; values start at epoch 1.  A title says what is drawn.
function chart(title, lines, format) {
    const [width, height, left, bottom] = [360, 200, 44, 26];
    const values = lines.flatMap((line) => line.values).filter(Number.isFinite);
    const low = Math.min(...values), high = Math.max(...values), span = high - low || 1;
    const count = Math.max(...lines.map((line) => line.values.length));
    const x = (n) => left + (count > 1 ? (n / (count - 1)) * (width - left - 10) : (width - left) / 2);
    const y = (v) => 10 + ((high - v) / span) * (height - bottom - 20);
    const picture = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title, class: "chart"});
    for (const part of [0, 0.5, 1]) {
        const value = low + span * part;
        picture.append(
            svg("line", {x1: left, x2: width - 10, y1: y(value), y2: y(value), class: "rule"}),
            svg("text", {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, format(value)));
    }
    for (const n of new Set([0, Math.floor((count - 1) / 2), count - 1])) {
        const text = n === 0 ? "epoch 1" : String(n + 1);
        picture.append(svg("text", {x: x(n), y: height - 6, "text-anchor": "middle"}, text));
    }
    lines.forEach((line, k) => {
        const points = line.values.map((v, n) => `${x(n).toFixed(1)},${y(v).toFixed(1)}`).join(" ");
        picture.append(svg("polyline", {points, class: `line line-${k}`}));
        const end = line.values.length - 1;
        picture.append(svg("circle", {cx: x(end), cy: y(line.values[end]), r: 3, class: `dot line-${k}`}));
    });
    const legend = lines.map((line, k) =>
        element("span", {class: `legend line-${k}`}, `${line.name} ${format(line.values[line.values.length - 1])}`));
    return element("figure", {}, element("figcaption", {}, title, " ", ...legend), picture);
}
