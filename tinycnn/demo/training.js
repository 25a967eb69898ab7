// How a network was trained: curves, the confusion matrix, its mistakes, and the first filters epoch by epoch.

function buildTraining(net, choose) {
    const parts = [];
    if (net.history) {
        const {train_loss, val_loss, train_accuracy, val_accuracy} = net.history;
        const error = (accuracies) => accuracies.map((a) => 100 * (1 - a));
        parts.push(element("div", {class: "charts"},
            chart("Loss", [{name: "training", values: train_loss}, {name: net.heldOut, values: val_loss}],
                (v) => v.toPrecision(3)),
            chart("Error in %", [{name: "training", values: error(train_accuracy)},
                {name: net.heldOut, values: error(val_accuracy)}], (v) => v.toFixed(2))));
    }
    if (net.filters.length > 1) {
        parts.push(filterSlider(net));
    }
    if (net.confusion) {
        parts.push(confusionTable(net, choose));
    }
    find("training").hidden = parts.length === 0;
    find("training-parts").replaceChildren(...parts);
}

// The filters of the first convolution at the end of each epoch, with a slider.
function filterSlider(net) {
    const canvas = element("canvas", {role: "img", "aria-label": "filters of the first convolution"});
    const output = element("output"), last = net.filters.length - 1;
    const slider = element("input", {type: "range", min: "0", max: String(last), step: "1", "aria-label": "epoch"});
    slider.value = String(last);
    const filters = net.filters.map(({epoch, array}) => ({epoch, array: decodeArray(array)}));
    const scale = Math.max(...filters.map(({array}) => scaleOf(array.data)));
    const show = () => {
        const {epoch, array} = filters[Number(slider.value)], [O, C, KH, KW] = array.shape;
        const cell = Math.max(4, Math.round(50 / KW)), gap = 8, width = find("training").clientWidth || 600;
        const perRow = Math.max(1, Math.min(O * C, Math.floor(width / (KW * cell + gap))));
        drawMaps(canvas, array.data, {count: O * C, H: KH, W: KW, cell, gap, perRow}, scale);
        output.textContent = epochText(epoch);
        slider.setAttribute("aria-valuetext", epochText(epoch));
    };
    slider.addEventListener("input", show);
    requestAnimationFrame(show);
    return element("figure", {}, element("figcaption", {}, "Filters of the first convolution"),
        element("div", {class: "row"}, slider, output), canvas);
}

// Rows: what the image shows.  Columns: the answers.  A click shows the mistakes of a cell.
function confusionTable(net, choose) {
    const most = Math.max(1, ...net.confusion.flatMap((row, i) => row.filter((_, j) => i !== j)));
    const gallery = element("div", {class: "thumbs"});
    const title = element("p", {class: "small"});
    const show = (i, j) => {
        const chosen = net.mistakes.filter((m) => i === undefined || (m.label === i && m.predicted === j));
        const total = i === undefined ? net.confusion.flatMap((row, a) => row.filter((_, b) => a !== b))
            .reduce((a, b) => a + b, 0) : net.confusion[i][j];
        title.textContent = (i === undefined ? `All ${total} mistakes` : `${net.classes[i]} taken for ${net.classes[j]}: ${total}`)
            + (chosen.length < total ? `, ${chosen.length} of them here` : "") + ". A click shows one to the network.";
        gallery.replaceChildren(...chosen.map((example) => exampleButton(net, example, (e) => {
            choose(e);
            find("drawing").scrollIntoView({block: "start"});
        })));
    };
    const table = element("table", {class: "confusion"});
    const head = table.createTHead().insertRow();
    head.append(element("td"), ...net.classes.map((name) => element("th", {scope: "col"}, name)));
    const body = table.createTBody();
    net.confusion.forEach((row, i) => {
        const line = body.insertRow();
        line.append(element("th", {scope: "row"}, net.classes[i]));
        row.forEach((count, j) => {
            const cell = line.insertCell();
            if (i === j) {
                cell.className = "right";
                cell.append(String(count));
            } else if (count && !net.mistakes.some((m) => m.label === i && m.predicted === j)) {
                cell.append(String(count));
            } else if (count) {
                const button = element("button", {type: "button",
                    "aria-label": `${count} of ${net.classes[i]} taken for ${net.classes[j]}`}, String(count));
                button.addEventListener("click", () => show(i, j));
                button.style.setProperty("--share", String(count / most));
                cell.append(button);
            }
        });
    });
    show();
    const all = element("button", {type: "button", onclick: () => show()}, "Show all mistakes");
    return element("div", {}, element("h3", {}, "Confusion matrix"),
        element("p", {class: "small muted"}, "Rows: what the test image shows. Columns: the answer. A click on a number shows its images."),
        element("div", {class: "scroll"}, table), all, title, gallery);
}
