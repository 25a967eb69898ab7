// The answer, and which pixels mattered to it.

const MOST_BARS = 12;  // of more classes the most probable are shown

function buildBars() {
    const {net} = state, longest = Math.max(1, ...net.classes.map((name) => name.length));
    state.bars = net.classes.slice(0, MOST_BARS).map(() => {
        const [name, bar, share, distance] = ["class", "bar", "share", "share muted"].map((kind) =>
            element(kind === "bar" ? "div" : "span", {class: kind}));
        const node = element("div", {class: "bar-row"}, name, element("div", {class: "track"}, bar), share,
            ...(net.kind === "distances" ? [distance] : []));
        return {node, name, bar, share, distance};
    });
    find("bars").replaceChildren(...state.bars.map(({node}) => node));
    find("bars").style.setProperty("--name", `${Math.min(longest, 14) + 1}ch`);
    find("bars").classList.toggle("with-distances", net.kind === "distances");
}

// Returns the answer as a sentence.
function showAnswer({best, probabilities, none}, output) {
    const {net, blank} = state, names = net.classes;
    if (!names.length) {
        return "";
    }
    const order = names.length <= MOST_BARS ? names.map((_, k) => k)
        : Array.from(names.keys()).sort((a, b) => probabilities[b] - probabilities[a]);
    state.bars.forEach(({node, name, bar, share, distance}, n) => {
        const k = order[n];
        setText(name, names[k]);
        name.title = names[k];
        bar.style.transform = `scaleX(${blank ? 0 : probabilities[k].toFixed(4)})`;
        setText(share, blank ? "" : percent(probabilities[k]));
        setText(distance, blank ? "" : number(output.data[k]));
        node.classList.toggle("best", !blank && k === best);
    });
    const verdict = find("verdict");
    if (blank) {
        const text = net.digits ? "Draw a digit." : "Draw something.";
        verdict.replaceChildren(element("span", {class: "muted"}, text));
        return text;
    }
    const label = state.example ? state.example.label : null, share = percent(probabilities[best]);
    const text = none ? `no digit; most like ${names[best]}` : share;
    const note = label === null ? "" : label === best && !none ? `right: it is ${names[label]}`
        : `${none ? "refused" : "wrong"}: it is ${names[label]}`;
    const size = names[best].length > 2 ? "digit word" : "digit";
    verdict.replaceChildren(element("strong", {class: size}, none ? "?" : names[best]), element("span", {}, text,
        ...(note ? [element("br"), element("span", {class: label === best ? "muted" : "wrong"}, note)] : [])));
    return `${none ? "" : `${names[best]}, `}${text}. ${note}`;
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
    const [predicted, second] = figure("gradient, summed in squares");
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

const SLOW = 20;  // milliseconds of a forward pass

let occlusion = 0;  // identifies the computation that runs

// Cover one square after the other, some at a time so that the page stays responsive.
function startOcclusion() {
    const mine = occlusion, {net, layers} = state;
    if (state.blank || !net.classes.length) {
        return;
    }
    if (state.laps[1] > SLOW) {
        setText(state.saliency.note, "Blue speaks for the answer, orange against it. To cover squares as a check would "
            + "take too long with this network.");
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
        const [small, large] = [dimmed, measured].map((values) => correlation(values, predicted));
        state.saliency.note.textContent = "Blue speaks for the answer, orange against it. " + (Number.isFinite(small)
            ? `The check: squares of ${PATCH} \u00d7 ${PATCH} pixels, ${100 * DIM} % darker, change the score as the `
                + `gradient says (correlation ${number(small)}); covered, which is no small change, ${number(large)}.`
            : "No square matters.");
    };
    work();
}
