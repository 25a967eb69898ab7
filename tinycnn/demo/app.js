// The page: what is drawn goes through the network, and every part of the page shows what came of it.

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
    drawPad();
    takePicture();
    lap();
    state.activations = forward(state.layers, toInput(state.net, state.pixels));
    const output = state.activations[state.activations.length - 1];
    const result = answer(state.net, output);
    result.none = result.none && state.trained;  // the threshold is that of the trained network
    state.best = result.best;
    state.gradients = null;
    lap();
    if (state.showGradients) {
        goBack();
    }
    lap();
    drawSeen();
    state.sentence = showAnswer(result, output);
    find("unit").classList.add("stale");
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
    setText(find("announcement"), state.sentence);
    drawSaliency();
    find("unit").classList.remove("stale");
    explainSelected();
    clearOcclusion();
    startOcclusion();
}

// The browser compiles functions that were called some times: the first stroke need not wait for that.
function warmUp(rounds = 12) {
    const start = performance.now();
    const {net, layers} = state, [channels, height, width] = net.picture;
    const pixels = new Uint8Array(channels * height * width);
    if (net.digits) {
        const grey = new Uint8Array(INK * INK).fill(255);
        for (let n = 8; n < 48; n++) {
            grey.fill(0, n * INK + 25, n * INK + 30);
        }
        pixels.set(prepareDigit(grey, INK, INK, height));
    }
    scoreGradients(net, layers, forward(layers, toInput(net, pixels)), 0);
    if (rounds > 1 && performance.now() - start < SLOW) {
        setTimeout(warmUp, 0, rounds - 1);
    }
}

function drawSeen() {
    const canvas = find("seen"), cell = drawPicture(canvas, state.pixels, state.net.picture, 84, state.net.digits);
    const box = state.selected && boxIn(null);
    if (box) {
        const [top, left, bottom, right] = box.rows.map((n) => n - state.net.padding);
        outline(canvas.getContext("2d"), left * cell, top * cell, (right - left + 1) * cell, (bottom - top + 1) * cell);
    }
}

function chooseNet(index) {
    const net = data.nets[index], keeps = state.net && String(state.net.picture) === String(net.picture);
    state.net = net;
    if (!keeps) {
        Object.assign(state, {example: null, strokes: [], past: [], pen: null});
        const [width, height] = padSize(net.picture);
        Object.assign(find("pad"), {width: 2 * width, height: 2 * height});
        find("pad").style.aspectRatio = `${width} / ${height}`;
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
        ? "scaled to a box of 20 \u00d7 20 pixels, centred by its mass, as MNIST's digits were"
        : "as it is drawn";
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
    state.trained = snapshot === null;
    const text = epochText(snapshot ? snapshot.epoch : net.epochs);
    find("epoch-text").textContent = text;
    find("epoch").setAttribute("aria-valuetext", text);
}

function epochText(epoch) {
    return epoch === 0 ? "before training" : `after ${epoch} epoch${epoch === 1 ? "" : "s"}`;
}

function exampleButton(net, example, choose) {
    const canvas = element("canvas", {"aria-hidden": "true"});
    drawPicture(canvas, example.pixels, net.picture, 40, net.digits);
    const wrong = example.predicted !== example.label;
    const name = `${net.classes[example.label]}${wrong ? `, taken for ${net.classes[example.predicted]}` : ""}`;
    return element("button", {type: "button", class: "thumb", "aria-label": `example: ${name}`, title: name,
        onclick: () => choose(example)}, canvas, ...(wrong ? [element("span", {class: "caption"},
        `${net.classes[example.label]} \u2192 ${net.classes[example.predicted]}`)] : []));
}

function buildExamples() {
    const {net} = state, box = find("examples");
    box.replaceChildren();
    find("examples-box").hidden = net.examples.length + net.mistakes.length === 0;
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
    document.body.classList.remove("loading");
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
