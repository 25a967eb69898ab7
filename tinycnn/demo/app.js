// The page: what is drawn goes through the network, and every part of the page shows what came of it.

const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);

const PAD = 280;  // side of the drawing, in the units of the strokes
const PEN = 20;  // width of a stroke
const INK = 84;  // pixels of a side of the picture that is prepared for the network: enough for 28, and soon done
const QUIET = 120;  // milliseconds without a change before slow things are computed

const state = {
    net: null,
    layers: null,  // of the chosen epoch
    epoch: 0,  // index of the slider
    strokes: [],  // [[x, y], ...] each
    example: null,  // {pixels, label} instead of strokes
    laps: null,  // milliseconds of the parts of an update
    pixels: null, shape: null,  // what the network gets, 0 ... 255
    blank: true,
    activations: null, gradients: null, best: 0,
    showGradients: false,
    selected: null,  // {stage, unit}
    pinned: false,  // the selection does not follow the mouse
    channel: null,  // whose numbers the inspector shows
    stages: [],
};

// --- the drawing ------------------------------------------------------------------------------------------------------

const shownInk = find("pad").getContext("2d");
const ink = element("canvas", {width: INK, height: INK}).getContext("2d", {willReadFrequently: true});

function drawStrokes() {
    for (const [context, size] of [[shownInk, find("pad").width], [ink, INK]]) {
        context.setTransform(size / PAD, 0, 0, size / PAD, 0, 0);
        context.clearRect(0, 0, PAD, PAD);
        context.lineCap = context.lineJoin = "round";
        context.lineWidth = PEN;
        context.strokeStyle = `rgb(${palette.ink.join()})`;
        for (const stroke of state.strokes) {
            context.beginPath();
            context.moveTo(...stroke[0]);
            stroke.slice(1).forEach((point) => context.lineTo(...point));
            if (stroke.length === 1) {
                context.lineTo(...stroke[0]);  // a dot
            }
            context.stroke();
        }
    }
    find("hint").hidden = state.strokes.length > 0;
}

// Sets pixels, shape and blank from the strokes or the example.
function takePicture() {
    const {net} = state, [channels, height, width] = net.picture;
    state.shape = net.picture;
    if (state.example) {
        state.pixels = state.example.pixels;
        state.blank = false;
        return;
    }
    state.blank = state.strokes.length === 0;
    let grey = new Uint8Array(height * width);
    if (!state.blank) {
        const pixels = ink.getImageData(0, 0, INK, INK).data;
        const opacity = new Uint8Array(INK * INK);
        for (let n = 0; n < INK * INK; n++) {
            opacity[n] = pixels[4 * n + 3];
        }
        const prepared = net.digits && find("prepare").checked
            ? prepareDigit(opacity.map((a) => 255 - a), INK, INK, height) : shrink(opacity, INK, INK, height, width);
        state.blank = prepared === null;
        grey = prepared || grey;
    }
    state.pixels = new Uint8Array(channels * height * width);
    for (let c = 0; c < channels; c++) {
        state.pixels.set(grey, c * height * width);
    }
}

function penPosition(event) {
    const box = find("pad").getBoundingClientRect();
    return [((event.clientX - box.left) * PAD) / box.width, ((event.clientY - box.top) * PAD) / box.height];
}

function startStroke(point) {
    state.example = null;
    state.strokes.push([point]);
    requestUpdate();
}

function extendStroke(points) {
    state.strokes[state.strokes.length - 1].push(...points);
    requestUpdate();
}

function listenToPen() {
    const canvas = find("pad");
    let drawing = false;
    canvas.addEventListener("pointerdown", (event) => {
        if (event.button === 0) {
            canvas.setPointerCapture(event.pointerId);
            drawing = true;
            startStroke(penPosition(event));
        }
    });
    canvas.addEventListener("pointermove", (event) => {
        if (drawing) {
            const events = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
            extendStroke((events.length ? events : [event]).map(penPosition));
        }
    });
    for (const type of ["pointerup", "pointercancel"]) {
        canvas.addEventListener(type, () => {
            drawing = false;
        });
    }
    listenToKeys(canvas);
}

// Drawing with the keyboard: arrows move the pen, the space bar puts it down or lifts it.
function listenToKeys(canvas) {
    const step = 14;
    const moves = {ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step]};
    let [x, y, down] = [PAD / 2, PAD / 4, false];
    const pen = element("span", {class: "pen", "aria-hidden": "true"});
    canvas.after(pen);
    const place = () => {
        pen.style.left = `${(100 * x) / PAD}%`;
        pen.style.top = `${(100 * y) / PAD}%`;
        pen.classList.toggle("down", down);
    };
    canvas.addEventListener("keydown", (event) => {
        if (event.key === " ") {
            down = !down;
            if (down) {
                startStroke([x, y]);
            }
        } else if (event.key in moves) {
            x = Math.min(Math.max(x + moves[event.key][0], 0), PAD);
            y = Math.min(Math.max(y + moves[event.key][1], 0), PAD);
            if (down) {
                extendStroke([[x, y]]);
            }
        } else {
            return;
        }
        event.preventDefault();
        place();
    });
    canvas.addEventListener("blur", () => {
        down = false;
        place();
    });
    place();
}

function clearDrawing() {
    state.strokes = [];
    state.example = null;
    requestUpdate();
}

function undo() {
    if (state.example) {
        state.example = null;
    } else {
        state.strokes.pop();
    }
    requestUpdate();
}

function showExample(example) {
    state.strokes = [];
    state.example = example;
    requestUpdate();
}

// --- stages: a layer, with the activations after it -------------------------------------------------------------------

const WITHOUT_EFFECT = new Set(["Flatten", "Unflatten", "Dropout", "Dropout2d"]);
const JOINED = new Set([...SAME_PLACE, ...WITHOUT_EFFECT, "BatchNorm1d"]);

// [{first, last, shown}]: indices of layers; the output of layer `shown` is what the stage draws.
function groupLayers(layers) {
    const stages = [];
    layers.forEach((layer, k) => {
        const stage = stages[stages.length - 1];
        if (stage && JOINED.has(layer.type)) {
            stage.last = k;
            stage.shown = WITHOUT_EFFECT.has(layer.type) ? stage.shown : k;
        } else {
            stages.push({first: k, last: k, shown: k});
        }
    });
    return stages;
}

function shapeText(shape) {
    return shape.join(" \u00d7 ");
}

// The length, at most `most`, of rows of equal length for so many things.
function evenly(count, most) {
    return Math.ceil(count / Math.ceil(count / most));
}

// Places of the maps of a shape on a canvas of at most `width` CSS pixels.
function arrange(shape, width, columns) {
    if (shape.length === 3 && shape[1] * shape[2] > 1) {
        const [C, H, W] = shape, gap = 6;
        const cell = Math.max(1, Math.min(8, Math.round((C === 1 ? 84 : 58) / W)));
        const perRow = evenly(C, Math.max(1, Math.floor((width + gap) / (W * cell + gap))));
        return {count: C, H, W, cell, gap, perRow, width: perRow * (W * cell + gap) - gap,
            height: Math.ceil(C / perRow) * (H * cell + gap) - gap};
    }
    const F = shape.reduce((a, b) => a * b, 1), cell = columns ? 9 : F <= 20 ? 22 : 10;
    const W = columns || evenly(F, Math.floor(width / cell)), H = Math.ceil(F / W);
    return {count: 1, H, W, cell, gap: 0, perRow: 1, width: W * cell, height: H * cell, length: F};
}

function buildStages() {
    const list = find("stage-list");
    list.replaceChildren();
    state.stages = groupLayers(state.net.layers).map((stage) => ({...stage}));
    state.selected = null;
    release();
    state.stages.forEach((stage, s) => {
        const chips = [];
        for (let k = stage.first; k <= stage.last; k++) {
            const chip = element("button", {type: "button", class: "chip", title: state.net.texts[k]},
                state.net.layers[k].type);
            chip.addEventListener("click", () => {
                stage.shown = k;
                placeStages();
                requestUpdate();
            });
            chips.push(chip);
        }
        Object.assign(stage, {chips, size: element("span", {class: "muted small"}),
            range: element("span", {class: "muted small range"})});
        stage.canvas = element("canvas", {tabindex: "0", role: "img"});
        stage.pixels = element("canvas");
        stage.node = element("div", {class: "stage"},
            element("div", {class: "row stage-head"}, ...chips, stage.size, stage.range), stage.canvas);
        if (isBitmapStage(stage)) {
            buildBitmaps(stage);
        }
        list.append(stage.node);
        listenToStage(stage, s);
    });
}

// Whether the stage is distances to bitmaps of 7 x 12, as in LeCun et al. 1998.
function isBitmapStage(stage) {
    const layer = state.net.layers[stage.first];
    return layer.type === "EuclideanRBF" && layer.output_shape[0] === state.net.classes.length
        && state.net.arrays[layer.weight].shape[1] === 84;
}

// The code of F6 and the stylised digits, each with its distance.
function buildBitmaps(stage) {
    const centres = state.layers[stage.first].weight;
    stage.code = element("canvas", {role: "img", "aria-label": "the code, 7 x 12"});
    stage.distances = [];
    const digits = state.net.classes.map((name, k) => {
        const bitmap = centres.data.subarray(84 * k, 84 * (k + 1));
        const distance = element("span", {class: "small"});
        const button = element("button", {type: "button", class: "thumb", "aria-label": `bitmap of ${name}`},
            gridCanvas(bitmap, 12, 7, 1, 4, ""), distance);
        button.addEventListener("click", () => select(stage, [k], true));
        stage.distances.push({button, distance});
        return button;
    });
    stage.node.append(element("div", {class: "bitmaps"},
        labelled("code", stage.code),
        element("div", {class: "thumbs"}, ...digits)));
}

function drawBitmaps(stage) {
    const code = state.activations[stage.first], output = state.activations[stage.first + 1];
    drawGrid(stage.code, code.data, 12, 7, scaleOf(code.data), 5);
    stage.distances.forEach(({button, distance}, k) => {
        setText(distance, number(output.data[k]));
        button.classList.toggle("best", k === state.best && !state.blank);
    });
}

// Arrange what the stages show in the width that there is, and say what it is.
function placeStages() {
    const width = find("stage-list").clientWidth;
    for (const stage of state.stages) {
        const shape = state.net.layers[stage.shown].output_shape, next = state.net.layers[stage.last + 1];
        const columns = next && next.type === "EuclideanRBF" && shape.length === 1 && shape[0] === 84 ? 7 : 0;
        stage.places = arrange(shape, width, columns);
        stage.size.textContent = shapeText(shape);
        stage.canvas.setAttribute("aria-label",
            `${stage.chips.map((chip) => chip.textContent).join(", ")}: ${shapeText(shape)} numbers`);
        stage.chips.forEach((chip, n) =>
            chip.setAttribute("aria-pressed", String(stage.first + n === stage.shown)));
    }
}

function drawStage(stage) {
    const {data} = (state.showGradients ? state.gradients : state.activations)[stage.shown + 1];
    const scale = scaleOf(data), context = drawMaps(stage.canvas, data, stage.places, scale, stage.pixels);
    setText(stage.range, `\u00b1 ${number(scale)}`);
    if (stage.code) {
        drawBitmaps(stage);
    }
    drawMarks(stage, context);
}

// Outline the selected unit, or what it depends on.
function drawMarks(stage, context) {
    const box = boxIn(stage);
    if (!box) {
        return;
    }
    const {count, cell, H, W} = stage.places;
    context.strokeStyle = `rgb(${palette.accent.join()})`;
    context.lineWidth = 2;
    const [top, left, bottom, right] = box.rows || [0, 0, H - 1, W - 1];
    for (let c = 0; c < count; c++) {
        if (box.map === undefined || box.map === c) {
            const [x, y] = corner(stage.places, c);
            context.strokeRect(x + left * cell, y + top * cell, (right - left + 1) * cell, (bottom - top + 1) * cell);
        }
    }
}

// {map, rows: [top, left, bottom, right]} of the selected unit in its own stage, or of what it reads in an earlier one;
// stage null: the input.  null: nothing to outline
function boxIn(stage) {
    const {selected} = state;
    if (!selected || state.stages.indexOf(stage) > state.stages.indexOf(selected.stage)) {
        return null;
    }
    const {unit} = selected;
    if (stage === selected.stage) {
        if (!stage.places.length) {
            return {map: unit[0], rows: [unit[1], unit[2], unit[1], unit[2]]};
        }
        const [row, column] = [Math.floor(unit[0] / stage.places.W), unit[0] % stage.places.W];
        return {map: 0, rows: [row, column, row, column]};
    }
    if (unit.length !== 3) {
        return null;  // it depends on everything
    }
    let rows = [unit[1], unit[2], unit[1], unit[2]];
    for (let k = selected.stage.shown; k > (stage ? stage.shown : -1); k--) {
        rows = inputBox(state.net.layers[k], rows, state.activations[k].shape);
    }
    return rows && {rows};
}

// --- one unit ---------------------------------------------------------------------------------------------------------

function unitAt(stage, event) {
    const box = stage.canvas.getBoundingClientRect(), {count, perRow, W, H, cell, gap, length} = stage.places;
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const [column, row] = [Math.floor(x / (W * cell + gap)), Math.floor(y / (H * cell + gap))];
    const j = Math.floor((x - column * (W * cell + gap)) / cell), i = Math.floor((y - row * (H * cell + gap)) / cell);
    const c = row * perRow + column;
    if (column >= perRow || c >= count || i >= H || j >= W || i < 0 || j < 0) {
        return null;
    }
    if (length) {
        const n = i * W + j;
        return n >= length ? null : state.activations[stage.shown + 1].shape.length === 3 ? [n, 0, 0] : [n];
    }
    return [c, i, j];
}

function listenToStage(stage) {
    stage.canvas.addEventListener("pointermove", (event) => {
        const unit = unitAt(stage, event);
        if (unit && !state.pinned && event.pointerType === "mouse") {
            select(stage, unit, false);
        }
    });
    stage.canvas.addEventListener("click", (event) => {
        const unit = unitAt(stage, event);
        const same = state.pinned && state.selected.stage === stage && String(state.selected.unit) === String(unit);
        if (unit) {
            select(stage, unit, !same);
        }
    });
    stage.canvas.addEventListener("keydown", (event) => moveSelection(stage, event));
}

// Arrow keys move the selected unit; Page Up and Page Down change the map.
function moveSelection(stage, event) {
    const shape = state.activations[stage.shown + 1].shape;
    const moves = shape.length === 3
        ? {ArrowLeft: [0, 0, -1], ArrowRight: [0, 0, 1], ArrowUp: [0, -1, 0], ArrowDown: [0, 1, 0],
            PageUp: [-1, 0, 0], PageDown: [1, 0, 0], Enter: [0, 0, 0]}
        : {ArrowLeft: [-1], ArrowRight: [1], ArrowUp: [-stage.places.W], ArrowDown: [stage.places.W], Enter: [0]};
    const move = moves[event.key];
    if (move) {
        event.preventDefault();
        const start = state.selected && state.selected.stage === stage ? state.selected.unit
            : shape.map((size) => Math.floor((size - 1) / 2));
        select(stage, start.map((n, axis) => Math.min(Math.max(n + move[axis], 0), shape[axis] - 1)), true);
    }
}

function select(stage, unit, pinned) {
    state.selected = {stage, unit};
    state.pinned = pinned;
    find("inspector").classList.toggle("held", pinned);
    state.stages.forEach(drawStage);
    drawSeen();
    explainSelected();
}

// Let the selection follow the mouse again.
function release() {
    state.pinned = false;
    find("inspector").classList.remove("held");
}

// The shape of the maps that a Flatten before layer k has made a vector; null without one.
function shapeBeforeFlatten(k) {
    while (k > 0 && WITHOUT_EFFECT.has(state.net.layers[k - 1].type)) {
        k--;
        if (state.net.layers[k].type === "Flatten") {
            const shape = state.activations[k].shape;
            return shape.length === 3 ? shape : null;
        }
    }
    return null;
}

function explainSelected() {
    const box = find("unit"), {selected} = state;
    if (!selected) {
        box.replaceChildren(element("p", {class: "muted"},
            "Point at a map, or tap it: here is the arithmetic of that very unit. A click holds it."));
        return;
    }
    const {stage, unit} = selected, parts = [];
    const place = unit.length === 3 ? `map ${unit[0]}, row ${unit[1]}, column ${unit[2]}` : `unit ${unit[0]}`;
    parts.push(element("p", {}, element("strong", {}, state.net.layers[stage.first].type), `, ${place}`));
    for (let k = stage.first; k <= stage.last; k++) {
        const layer = state.layers[k], [x, y] = [state.activations[k], state.activations[k + 1]];
        if (!WITHOUT_EFFECT.has(layer.type) && y.shape.length === unit.length) {
            parts.push(...explainUnit(layer, x, y, unit, shapeBeforeFlatten(k), state.channel, (channel) => {
                state.channel = channel;
                explainSelected();
            }));
        }
    }
    if (!state.blank && state.net.classes.length) {
        goBack();
        const gradient = state.gradients[stage.shown + 1];
        parts.push(element("p", {class: "small muted"},
            `If this output grows by 1, the score of ${state.net.classes[state.best]} changes by about `
            + `${number(valueAt(gradient, unit))} (its gradient).`));
    }
    box.replaceChildren(...parts);
}

// --- the answer -------------------------------------------------------------------------------------------------------

function buildBars() {
    const {net} = state;
    state.bars = net.classes.map((name) => {
        const bar = element("div", {class: "bar"}), share = element("span", {class: "share"});
        const distance = element("span", {class: "share muted"});
        const node = element("div", {class: "bar-row"}, element("span", {class: "class"}, name),
            element("div", {class: "track"}, bar), share, ...(net.kind === "distances" ? [distance] : []));
        return {node, bar, share, distance};
    });
    find("bars").replaceChildren(...state.bars.map(({node}) => node));
    find("bars").classList.toggle("with-distances", net.kind === "distances");
}

function showAnswer({best, probabilities, none}, output) {
    const {net, blank} = state;
    if (!net.classes.length) {
        return;
    }
    state.bars.forEach(({node, bar, share, distance}, k) => {
        bar.style.transform = `scaleX(${blank ? 0 : probabilities[k].toFixed(4)})`;
        setText(share, blank ? "" : percent(probabilities[k]));
        setText(distance, blank ? "" : number(output.data[k]));
        node.classList.toggle("best", !blank && k === best);
    });
    const verdict = find("verdict");
    if (blank) {
        verdict.replaceChildren(element("span", {class: "muted"}, net.digits ? "Draw a digit." : "Draw something."));
        return;
    }
    const label = state.example && state.example.label !== null ? net.classes[state.example.label] : null;
    const wrong = label !== null && label !== net.classes[best];
    verdict.replaceChildren(element("strong", {class: "digit"}, none ? "?" : net.classes[best]), element("span", {},
        none ? `no digit, most like ${net.classes[best]}` : percent(probabilities[best]),
        ...(label === null ? [] : [element("br"), element("span", {class: wrong ? "wrong" : "muted"},
            wrong ? `wrong: it is ${label}` : `right: it is ${label}`)])));
}

function percent(share) {
    return share > 0.9995 ? "100 %" : `${(100 * share).toFixed(share < 0.0995 ? 2 : 1)} %`;
}

// --- which pixels mattered --------------------------------------------------------------------------------------------

function buildSaliency() {
    const figure = (title) => {
        const canvas = element("canvas", {role: "img", "aria-label": title});
        return [canvas, labelled(title, canvas)];
    };
    const [gradient, first] = figure("gradient");
    const [predicted, second] = figure("gradient, by squares");
    const [measured, third] = figure("squares covered");
    state.saliency = {gradient, predicted, measured, note: element("p", {class: "small muted"})};
    find("saliency").replaceChildren(element("div", {class: "thumbs wide"}, first, second, third), state.saliency.note);
    const [, H, W] = state.net.input;
    drawGrid(gradient, new Float32Array(H * W), H, W, 1, 96 / W);
    clearOcclusion();
}

function drawSaliency() {
    const [C, H, W] = state.net.input, gradient = state.gradients[0].data;
    const sum = new Float32Array(H * W);
    for (let n = 0; n < C * H * W; n++) {
        sum[n % (H * W)] += gradient[n];
    }
    const values = state.blank ? sum.fill(0) : sum;
    drawGrid(state.saliency.gradient, values, H, W, scaleOf(values), 96 / W);
}

function clearOcclusion() {
    const [rows, columns] = patchGrid(state.net.input), none = new Float32Array(rows * columns);
    for (const canvas of [state.saliency.predicted, state.saliency.measured]) {
        drawGrid(canvas, none, rows, columns, 1, 96 / columns);
    }
    state.saliency.note.textContent = "Blue speaks for the answer, orange against it. The check: squares of "
        + `${PATCH} \u00d7 ${PATCH} pixels are covered, one after the other.`;
}

let occlusion = 0;  // identifies the computation that runs

// Cover one square after the other, some at a time so that the page stays responsive.
function startOcclusion() {
    const mine = occlusion, {net, layers} = state;
    if (state.blank) {
        return;
    }
    const x = state.activations[0], gradient = state.gradients[0], target = state.best;
    const score = scores(net, state.activations[state.activations.length - 1])[target];
    const [rows, columns] = patchGrid(net.input);
    const [measured, predicted, dimmed] = [0, 1, 2].map(() => new Float32Array(rows * columns));
    let cell = 0;
    const work = () => {
        if (mine !== occlusion) {
            return;
        }
        const stop = performance.now() + 8;
        while (cell < rows * columns && performance.now() < stop) {
            const run = (share) => coverPatch(net, layers, x, gradient, target, score, cell, share);
            [measured[cell], predicted[cell]] = run(1);
            dimmed[cell] = run(DIM)[0];
            cell++;
        }
        if (cell < rows * columns) {
            setTimeout(work);
            return;
        }
        for (const [canvas, values] of [[state.saliency.predicted, predicted], [state.saliency.measured, measured]]) {
            drawGrid(canvas, values, rows, columns, scaleOf(values), 96 / columns);
        }
        const [small, large] = [dimmed, measured].map((values) => correlation(values, predicted).toFixed(2));
        state.saliency.note.textContent = "Blue speaks for the answer, orange against it. The check: squares of "
            + `${PATCH} \u00d7 ${PATCH} pixels, ${100 * DIM} % darker, change the score as the gradient says `
            + `(correlation ${small}); covered, which is no small change, ${large}.`;
    };
    work();
}

// --- updates ----------------------------------------------------------------------------------------------------------

let requested = false;
let quiet = 0;

// Compute and draw everything before the next frame.
function requestUpdate() {
    if (!requested) {
        requested = true;
        requestAnimationFrame(update);
    }
}

function update() {
    requested = false;
    const times = [performance.now()];
    const lap = () => times.push(performance.now());
    drawStrokes();
    takePicture();
    lap();
    state.activations = forward(state.layers, toInput(state.net, state.pixels, state.shape));
    const output = state.activations[state.activations.length - 1];
    const result = answer(state.net, output);
    state.best = result.best;
    state.gradients = null;
    lap();
    if (state.showGradients) {
        goBack();
    }
    lap();
    drawSeen();
    showAnswer(result, output);
    state.stages.forEach(drawStage);
    lap();
    state.laps = times.slice(1).map((time, n) => time - times[n]);
    occlusion++;
    clearTimeout(quiet);
    quiet = setTimeout(finishUpdate, QUIET);
}

function goBack() {
    state.gradients = state.gradients || scoreGradients(state.net, state.layers, state.activations, state.best);
}

// What can wait until the pen rests.
function finishUpdate() {
    const start = performance.now();
    goBack();
    const parts = ["picture", "forward", "backward", "drawing"], [picture, forwards, , drawing] = state.laps;
    const times = [picture, forwards, performance.now() - start, drawing];
    setText(find("timing"), parts.map((part, n) => `${part} ${times[n].toFixed(1)} ms`).join(", "));
    drawSaliency();
    explainSelected();
    clearOcclusion();
    startOcclusion();
}

// The browser compiles functions that were called some times: the first stroke need not wait for that.
function warmUp(rounds = 12) {
    const {net, layers} = state, [, height, width] = net.picture, opacity = new Uint8Array(INK * INK).fill(255);
    for (let n = 12; n < 72; n++) {
        opacity.fill(0, n * INK + 38, n * INK + 45);
    }
    const grey = net.digits ? prepareDigit(opacity, INK, INK, height) : shrink(opacity, INK, INK, height, width);
    const pixels = new Uint8Array(net.picture[0] * height * width);
    pixels.set(grey);
    scoreGradients(net, layers, forward(layers, toInput(net, pixels, net.picture)), 0);
    if (rounds > 1) {
        setTimeout(warmUp, 0, rounds - 1);
    }
}

function drawSeen() {
    const canvas = find("seen");
    drawPicture(canvas, state.pixels, state.shape, 84);
    const box = state.selected && boxIn(null);
    if (box) {
        const cell = 84 / state.shape[2], {padding} = state.net, context = canvas.getContext("2d");
        const [top, left, bottom, right] = box.rows.map((n) => n - padding);
        context.strokeStyle = `rgb(${palette.accent.join()})`;
        context.lineWidth = 2;
        context.strokeRect(left * cell, top * cell, (right - left + 1) * cell, (bottom - top + 1) * cell);
    }
}

// --- networks, examples, epochs ---------------------------------------------------------------------------------------

function chooseNet(index) {
    const net = data.nets[index], keeps = state.net && String(state.net.picture) === String(net.picture);
    state.net = net;
    if (!keeps) {
        state.example = null;
    }
    find("about").textContent = net.about;
    Array.from(find("nets").children).forEach((button, n) =>
        button.setAttribute("aria-pressed", String(n === index)));
    find("nets").hidden = data.nets.length < 2;
    find("drawing-title").textContent = net.digits ? "Draw a digit" : "Draw";
    for (const id of ["answer", "why", "show-gradients", "show-values"]) {
        find(id).hidden = net.classes.length === 0;  // the outputs are maps, say
    }
    if (!net.classes.length) {
        state.showGradients = false;
    }
    find("prepare-box").hidden = !net.digits;
    find("prepare-note").textContent = net.digits
        ? "scaled to a box of 20 \u00d7 20 pixels, centred by its mass, as MNIST's digits were" : "";
    const last = net.snapshots.length;
    find("epochs").hidden = last === 0;
    find("epoch").max = String(last);
    find("epoch").value = String(last);
    chooseEpoch(last);
    buildStages();
    placeStages();
    buildBars();
    buildSaliency();
    buildExamples();
    buildTraining(net, showExample);
    explainSelected();
    requestUpdate();
}

function chooseEpoch(index) {
    const {net} = state, snapshot = net.snapshots[index] || null;
    state.layers = layersOf(net, snapshot);
    const epoch = snapshot ? snapshot.epoch : net.epochs;
    find("epoch-text").textContent = epoch === 0 ? "before training" : `after ${epoch} epoch${epoch === 1 ? "" : "s"}`;
}

function exampleButton(net, example, choose) {
    const canvas = element("canvas", {"aria-hidden": "true"});
    drawPicture(canvas, example.pixels, net.picture, 40);
    const wrong = example.predicted !== undefined && example.predicted !== example.label;
    const name = `${net.classes[example.label]}${wrong ? `, taken for ${net.classes[example.predicted]}` : ""}`;
    return element("button", {type: "button", class: "thumb", "aria-label": `example: ${name}`, title: name,
        onclick: () => choose(example)}, canvas, ...(wrong ? [element("span", {class: "small"},
        `${net.classes[example.label]} \u2192 ${net.classes[example.predicted]}`)] : []));
}

function buildExamples() {
    const {net} = state, box = find("examples");
    box.replaceChildren();
    for (const [title, examples] of [[net.examplesTitle, net.examples], ["It gets these wrong", net.mistakes.slice(0, 10)]]) {
        if (examples.length) {
            box.append(element("p", {class: "small"}, title), element("div", {class: "thumbs"},
                ...examples.map((example) => exampleButton(net, example, showExample))));
        }
    }
}

// Redraws everything in the colours of the theme.
function changeTheme() {
    readPalette();
    chooseNet(data.nets.indexOf(state.net));
}

function start() {
    readPalette();
    for (const net of data.nets) {
        for (const example of [...net.examples, ...net.mistakes]) {
            example.pixels = decodeBase64(example.pixels);
        }
    }
    find("nets").append(...data.nets.map((net, n) =>
        element("button", {type: "button", "aria-pressed": "false", onclick: () => chooseNet(n)}, net.title)));
    find("clear").addEventListener("click", clearDrawing);
    find("undo").addEventListener("click", undo);
    find("close").addEventListener("click", release);
    find("prepare").addEventListener("change", requestUpdate);
    find("epoch").addEventListener("input", () => {
        chooseEpoch(Number(find("epoch").value));
        requestUpdate();
    });
    for (const [id, shows] of [["show-values", false], ["show-gradients", true]]) {
        find(id).addEventListener("click", () => {
            state.showGradients = shows;
            find("show-values").setAttribute("aria-pressed", String(!shows));
            find("show-gradients").setAttribute("aria-pressed", String(shows));
            requestUpdate();
        });
    }
    document.addEventListener("keydown", (event) => {
        if (event.key === "Escape") {
            release();
        } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
            event.preventDefault();
            undo();
        }
    });
    listenToPen();
    chooseNet(0);
    setTimeout(warmUp);
    window.addEventListener("resize", () => {
        placeStages();
        requestUpdate();
    });
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changeTheme);
    if (data.start === "training" && !find("training").hidden) {
        find("training").scrollIntoView();
    }
}

start();
