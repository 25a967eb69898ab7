// The drawing: strokes of a pen, with mouse, finger or keyboard, and the picture that the network gets.

const SMALL = 170;  // units; smaller drawings are enlarged before they are prepared: the pen would fill their loops

const shownInk = find("pad").getContext("2d");
const ink = element("canvas").getContext("2d", {willReadFrequently: true});

// Size of the drawing in units: the longer side of the network's picture has PAD.
function padSize([, H, W]) {
    return [(PAD * W) / Math.max(H, W), (PAD * H) / Math.max(H, W)];
}

// Draw the strokes with `scale` pixels a unit, moved so that the unit (x, y) is at the origin.
function drawStrokes(context, scale, x, y, width) {
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, context.canvas.width, context.canvas.height);
    context.setTransform(scale, 0, 0, scale, -scale * x, -scale * y);
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = width;
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

// Show the strokes, or the example, on the pad.
function drawPad() {
    const canvas = find("pad"), {example, net} = state;
    drawStrokes(shownInk, canvas.width / padSize(net.picture)[0], 0, 0, PEN);
    if (example) {
        shownInk.setTransform(1, 0, 0, 1, 0, 0);
        shownInk.imageSmoothingEnabled = false;
        shownInk.drawImage(pictureCanvas(example.pixels, net.picture, net.digits), 0, 0, canvas.width, canvas.height);
    }
    find("hint").hidden = state.strokes.length > 0 || example !== null;
}

// The opacity of the ink, 0 ... 255, on (H, W) pixels.
function readInk(H, W) {
    const pixels = ink.getImageData(0, 0, W, H).data, opacity = new Uint8Array(H * W);
    for (let n = 0; n < H * W; n++) {
        opacity[n] = pixels[4 * n + 3];
    }
    return opacity;
}

function sizeInk(H, W) {
    if (ink.canvas.width !== W || ink.canvas.height !== H) {
        ink.canvas.width = W;
        ink.canvas.height = H;
    }
}

// The drawing as the network's training images were prepared, (size, size); null if there is too little ink.
function preparedDrawing(size) {
    const points = state.strokes.flat();
    const [[left, right], [top, bottom]] = [0, 1].map((axis) => {
        const values = points.map((point) => point[axis]);
        return [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
    });
    const extent = Math.max(right - left, bottom - top), scale = extent > 0 && extent < SMALL ? SMALL / extent : 1;
    const corner = scale === 1 ? [0, 0] : [left + right, top + bottom].map((sum) => sum / 2 - PAD / 2 / scale);
    sizeInk(INK, INK);
    drawStrokes(ink, (scale * INK) / PAD, ...corner, PEN / scale);
    return prepareDigit(readInk(INK, INK).map((a) => 255 - a), INK, INK, size);
}

// The drawing as it is, (H, W).
function plainDrawing(H, W) {
    const fine = Math.max(1, Math.round(INK / Math.max(H, W)));  // pixels of the drawing for one of the network's
    sizeInk(H * fine, W * fine);
    drawStrokes(ink, (Math.max(H, W) * fine) / PAD, 0, 0, PEN);
    return shrink(readInk(H * fine, W * fine), H, W, fine);
}

// Sets pixels and blank from the strokes or the example.
function takePicture() {
    const {net} = state, [channels, height, width] = net.picture;
    if (state.example) {
        state.pixels = state.example.pixels;
        state.blank = false;
        return;
    }
    let grey = null;
    if (state.strokes.length) {
        grey = net.digits && find("prepare").checked ? preparedDrawing(height) : plainDrawing(height, width);
    }
    state.blank = grey === null;
    state.pixels = new Uint8Array(channels * height * width);
    for (let c = 0; c < channels && grey; c++) {
        state.pixels.set(grey, c * height * width);
    }
}

// Keep what is drawn, for undo.
function remember() {
    state.past.push({strokes: state.strokes, example: state.example});
}

function startStroke(point) {
    remember();
    state.strokes = state.example ? [[point]] : [...state.strokes, [point]];
    state.example = null;
    requestUpdate();
}

function extendStroke(points) {
    state.strokes[state.strokes.length - 1].push(...points);
    requestUpdate();
}

function clearDrawing() {
    remember();
    Object.assign(state, {strokes: [], example: null, pen: null});
    requestUpdate();
}

function undo() {
    Object.assign(state, state.past.pop() || {strokes: [], example: null}, {pen: null});
    requestUpdate();
}

function showExample(example) {
    remember();
    Object.assign(state, {example, pen: null});
    requestUpdate();
}

function penPosition(event) {
    const box = find("pad").getBoundingClientRect(), [width, height] = padSize(state.net.picture);
    return [((event.clientX - box.left) * width) / box.width, ((event.clientY - box.top) * height) / box.height];
}

function listenToPen() {
    const canvas = find("pad");
    canvas.addEventListener("pointerdown", (event) => {
        if (event.button === 0 && state.pen === null) {  // a second finger does not draw
            canvas.setPointerCapture(event.pointerId);
            state.pen = event.pointerId;
            startStroke(penPosition(event));
        }
    });
    canvas.addEventListener("pointermove", (event) => {
        if (event.pointerId === state.pen) {
            const events = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
            extendStroke((events.length ? events : [event]).map(penPosition));
        }
    });
    for (const type of ["pointerup", "pointercancel", "lostpointercapture"]) {
        canvas.addEventListener(type, (event) => {
            if (event.pointerId === state.pen) {
                state.pen = null;
            }
        });
    }
    listenToKeys(canvas);
}

// Drawing with the keyboard: arrows move the pen, the space bar puts it down or lifts it.
function listenToKeys(canvas) {
    const step = 14;
    const moves = {ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step]};
    let [x, y] = [PAD / 2, PAD / 4];
    const pen = element("span", {class: "pen", "aria-hidden": "true"});
    canvas.after(pen);
    const place = () => {
        const [width, height] = state.net ? padSize(state.net.picture) : [PAD, PAD];
        [x, y] = [Math.min(Math.max(x, 0), width), Math.min(Math.max(y, 0), height)];
        pen.style.left = `${(100 * x) / width}%`;
        pen.style.top = `${(100 * y) / height}%`;
        pen.classList.toggle("down", state.pen === "keyboard");
    };
    canvas.addEventListener("keydown", (event) => {
        if (event.key === " ") {
            state.pen = state.pen === "keyboard" ? null : "keyboard";
            if (state.pen) {
                startStroke([x, y]);
            }
        } else if (event.key in moves) {
            x += moves[event.key][0];
            y += moves[event.key][1];
            place();
            if (state.pen === "keyboard") {
                extendStroke([[x, y]]);
            }
        } else {
            return;
        }
        event.preventDefault();
        place();
    });
    canvas.addEventListener("blur", () => {
        state.pen = null;
        place();
    });
    place();
}
