// The drawing: strokes of a pen, with mouse, finger or keyboard, and the picture that the network gets.

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
