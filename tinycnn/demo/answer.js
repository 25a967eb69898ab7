// The answer, and which pixels mattered to it.

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
