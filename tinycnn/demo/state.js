// What the page shows, which all of its parts read.

const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);

const PAD = 280;  // longer side of the drawing, in the units of the strokes
const PEN = 20;  // width of a stroke
const INK = 56;  // pixels of a side of the picture that is prepared for the network: enough for 28, and soon done
const QUIET = 120;  // milliseconds without a change before slow things are computed

const state = {
    net: null,
    layers: null,  // of the chosen epoch
    strokes: [],  // [[x, y], ...] each, in units
    example: null,  // {pixels, label} instead of strokes
    past: [],  // earlier {strokes, example}, for undo
    pen: null,  // what draws: the id of a pointer, "keyboard", or null
    trained: true,  // whether the weights are those of the last epoch
    laps: null,  // milliseconds of the parts of an update
    pixels: null,  // what the network gets, 0 ... 255
    blank: true,
    activations: null, gradients: null, best: 0,
    showGradients: false,
    selected: null,  // {stage, unit}
    pinned: false,  // the selection does not follow the mouse
    channel: null,  // whose numbers the inspector shows
    stages: [],  // see buildStages
    bars: [],  // of the answer: see buildBars
    saliency: null,  // canvases: see buildSaliency
};
