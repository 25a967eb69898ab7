// The layers, in stages: a layer with the activations after it, and the unit that is selected.

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
    return Math.ceil(count / Math.ceil(count / Math.max(1, most)));
}

// Places of the maps of a shape on a canvas of at most `width` CSS pixels.
function arrange(shape, width, columns) {
    if (shape.length === 3 && shape[1] * shape[2] > 1) {
        const [C, H, W] = shape, gap = 6;
        const cell = Math.max(1, Math.min(8, Math.round((C === 1 ? 84 : 58) / W)));
        const perRow = evenly(C, Math.floor((width + gap) / (W * cell + gap)));
        return {count: C, H, W, cell, gap, perRow};
    }
    const F = shape.reduce((a, b) => a * b, 1), cell = columns ? 9 : F <= 20 ? 22 : 10;
    const W = columns || evenly(F, Math.floor(width / cell)), H = Math.ceil(F / W);
    return {count: 1, H, W, cell, gap: 0, perRow: 1, length: F};
}

function buildStages() {
    const list = find("stage-list");
    list.replaceChildren();
    state.stages = groupLayers(state.net.layers);
    state.selected = null;
    release();
    state.stages.forEach((stage) => {
        const chips = [];
        for (let k = stage.first; k <= stage.last; k++) {
            const chip = element("button", {type: "button", class: "chip", title: state.net.texts[k]},
                state.net.layers[k].type);
            chip.addEventListener("click", () => {
                stage.shown = k;
                if (state.selected && state.selected.stage === stage) {
                    state.selected = null;  // its shape may be another one
                    release();
                    explainSelected();
                }
                placeStages();
                requestUpdate();
            });
            chips.push(chip);
        }
        Object.assign(stage, {chips, size: element("span", {class: "muted small"}),
            range: element("span", {class: "muted small range"})});
        stage.canvas = element("canvas", {tabindex: "0", role: "application"});
        stage.pixels = element("canvas");
        stage.node = element("div", {class: "stage"},
            element("div", {class: "row stage-head"}, ...chips, stage.size, stage.range), stage.canvas);
        if (isBitmapStage(stage)) {
            buildBitmaps(stage);
        }
        list.append(stage.node);
        listenToStage(stage);
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
        setText(distance, output.data[k] < 9.995 ? output.data[k].toFixed(2) : number(output.data[k]));
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
    const {count, cell} = stage.places, [top, left, bottom, right] = box.rows;
    for (let c = 0; c < count; c++) {
        if (box.map === undefined || box.map === c) {
            const [x, y] = corner(stage.places, c);
            outline(context, x + left * cell, y + top * cell, (right - left + 1) * cell, (bottom - top + 1) * cell);
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
                box.querySelector("[aria-pressed=true]").focus();
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
