// A drawn digit prepared as MNIST was made: prepare of tinycnn/digits.py for a grey picture, with the same steps, names
// and constants.  Only the sums are organised differently, for speed: a page calls it at every move of the pen.
//
// A picture is {h, w, data: Float32Array}, row by row.  Functions that end with Rows work along the rows and return the
// transposed result: called twice, they have worked along both axes.  Loops over all pixels call no functions.

const WORKING_SIZE = 800; // pixels; longer pictures are averaged down first
const COARSE_SIZE = 128; // of the grid on which the background is estimated
const OPENING = 0.34; // of the longer side: ink is narrower, shadows are wider
const NOISE_FACTOR = 4.5; // ink is this many standard deviations of the noise above the background
const MIN_CONTRAST = 10; // grey levels of 255
const LEVEL = 0.4; // of the strength of the ink: the outline of a stroke
const MIN_MASS = 0.05, MIN_EXTENT = 0.25; // of the largest component; smaller ones are specks
const SCALE = 4; // strokes are measured on a grid that is finer than the result by this factor
const MIN_STROKE = 1.5; // pixels; thinner strokes are thickened to this width

// The one digit in a picture as (size, size), white (255) on black (0), like MNIST's; null if there is no ink.
// grey: height * width numbers, 0 ... 255
function prepareDigit(grey, height, width, size) {
    const ink = findInk(averageBlocks(grey, height, width)), digit = ink && keepParts(ink);
    return digit && normalizeDigit(digit, size);
}

function makePicture(h, w) {
    return {h, w, data: new Float32Array(h * w)};
}

// NumPy's rounding: halves to even numbers.
function roundEven(x) {
    const floor = Math.floor(x);
    return x - floor === 0.5 ? floor + floor % 2 : Math.round(x);
}

// --- the ink ---------------------------------------------------------------------------------------------------------

// Means of blocks of pixels, so that the longer side has at most WORKING_SIZE.
function averageBlocks(grey, height, width) {
    const block = Math.ceil(Math.max(height, width) / WORKING_SIZE);
    if (block === 1) {
        return {h: height, w: width, data: new Float32Array(grey)};
    }
    const means = makePicture(Math.ceil(height / block), Math.ceil(width / block));
    for (let i = 0, p = 0; i < means.h; i++) {
        const bottom = Math.min(height, (i + 1) * block);
        for (let j = 0; j < means.w; j++, p++) {
            const right = Math.min(width, (j + 1) * block);
            let sum = 0;
            for (let y = i * block; y < bottom; y++) {
                for (let x = j * block; x < right; x++) {
                    sum += grey[y * width + x];
                }
            }
            means.data[p] = sum / ((bottom - i * block) * (right - j * block));
        }
    }
    return means;
}

// The ink, 0 ... 1; null if there is none.
function findInk(grey) {
    const {h, w} = grey, strokes = subtractBackground(grey);
    const level = Math.max(NOISE_FACTOR * noiseOf(strokes), MIN_CONTRAST);
    const squares = makePicture(h, w), inks = [];
    for (let p = 0; p < h * w; p++) {
        const ink = strokes.data[p];
        if (ink > level) {
            squares.data[p] = ink * ink;
            inks.push(ink);
        } else {
            strokes.data[p] = 0;
        }
    }
    if (!inks.length) {
        return null;
    }
    // Ink in a shadow has less contrast: its strength is a local mean, weighted by the ink itself.
    const typical = quantile(inks, 0.8);
    const [m, n] = coarseShape(h, w);
    const smooth = (picture) => smoothRows(smoothRows(picture, n, w / 4), m, h / 4);
    const weight = smooth(strokes), power = smooth(squares);
    const prior = 0.05 * largestOf(weight.data);
    for (let p = 0; p < m * n; p++) {
        power.data[p] = (power.data[p] + prior * typical) / (weight.data[p] + prior);
    }
    const strength = resample(power, h, w).data;
    for (let p = 0; p < h * w; p++) {
        if (strokes.data[p] > 0) {
            strokes.data[p] = Math.min(1, strokes.data[p] / Math.max(strength[p], 0.4 * typical));
        }
    }
    return strokes;
}

function largestOf(numbers) {
    let largest = -Infinity;
    for (let p = 0; p < numbers.length; p++) {
        largest = numbers[p] > largest ? numbers[p] : largest;
    }
    return largest;
}

function coarseShape(h, w) {
    return [h, w].map((n) => Math.max(1, roundEven(n * Math.min(1, COARSE_SIZE / Math.max(h, w)))));
}

// The height of the ink above the background, in grey levels: positive where there is ink, about 0 elsewhere.  It
// replaces the grey levels.
function subtractBackground(grey) {
    const {h, w} = grey, [m, n] = coarseShape(h, w);
    const coarse = resample(grey, m, n), plane = planeOf(coarse), flat = subtract(coarse, plane);

    // Ink covers less than half of the surroundings: it lies on one side of the local median.
    const median = localMedian(flat);
    for (let p = 0; p < m * n; p++) {
        median.data[p] += plane.data[p];
    }
    const difference = addResampled({h, w, data: grey.data.slice()}, median, -1).data;
    let cubes = 0;
    for (let p = 0; p < h * w; p++) {
        cubes += difference[p] * difference[p] * difference[p];
    }
    const sign = cubes < 0 ? -1 : 1;
    for (let p = 0; p < m * n; p++) {
        flat.data[p] *= sign;
    }

    const width = Math.max(3, roundEven(OPENING * Math.max(m, n)) | 1);
    const opened = sliding(sliding(flat, width, -1), width, 1);
    const noise = subtract(flat, opened), background = makePicture(m, n);
    const limit = 0.25 * largestOf(noise.data) + 1e-3; // ink is higher
    for (let p = 0; p < m * n; p++) {
        background.data[p] = noise.data[p] < limit ? 1 : 0;
        noise.data[p] *= background.data[p];
    }
    // The minimum lies below the mean of the background's noise: corrected by this mean.
    const radius = OPENING * Math.max(m, n) / 2;
    const smooth = (picture) => smoothRows(smoothRows(picture, n, radius), m, radius).data;
    const weight = smooth(background), offset = smooth(noise);
    for (let p = 0; p < m * n; p++) {
        opened.data[p] += offset[p] / Math.max(weight[p], 1e-6) + sign * plane.data[p];
    }
    for (let p = 0; p < h * w; p++) {
        grey.data[p] *= sign;
    }
    return addResampled(grey, opened, -1);
}

function subtract(a, b) {
    const difference = makePicture(a.h, a.w);
    for (let p = 0; p < difference.data.length; p++) {
        difference.data[p] = a.data[p] - b.data[p];
    }
    return difference;
}

// The plane with the smallest sum of distances to a picture: most of a shadow's gradient.
function planeOf({h, w, data}) {
    const plane = makePicture(h, w), x = Float64Array.from({length: w}, (_, j) => w > 1 ? 2 * j / (w - 1) - 1 : -1);
    let a = 0, b = 0, c = 0; // the plane is a + b*y + c*x
    for (let pass = 0, change = 1; pass < 12 && change > 1e-3; pass++) { // grey levels: the rest does not matter
        // Least squares, each point weighted by 1 / distance from the last plane.
        const sums = new Float64Array(9); // of the weights times 1, y, yy, x, xy, xx, v, vy, vx
        for (let i = 0; i < h; i++) {
            const y = h > 1 ? 2 * i / (h - 1) - 1 : -1, start = a + b * y;
            let s = 0, sx = 0, sxx = 0, sv = 0, svx = 0;
            for (let j = 0; j < w; j++) {
                const v = data[i * w + j];
                const weight = pass ? 1 / (Math.abs(v - start - c * x[j]) + 1) : 1, wx = weight * x[j];
                s += weight;
                sx += wx;
                sxx += wx * x[j];
                sv += weight * v;
                svx += wx * v;
            }
            [s, s * y, s * y * y, sx, sx * y, sxx, sv, sv * y, svx].forEach((term, k) => {
                sums[k] += term;
            });
        }
        const [s, sy, syy, sx, sxy, sxx, sv, svy, svx] = sums;
        const [A, B, C] = solve([[s, sy, sx, sv], [sy, syy, sxy, svy], [sx, sxy, sxx, svx]]);
        change = Math.max(Math.abs(A - a), Math.abs(B - b), Math.abs(C - c));
        a = A;
        b = B;
        c = C;
    }
    for (let i = 0; i < h; i++) {
        const start = a + b * (h > 1 ? 2 * i / (h - 1) - 1 : -1);
        for (let j = 0; j < w; j++) {
            plane.data[i * w + j] = start + c * x[j];
        }
    }
    return plane;
}

// The solution of linear equations, each [coefficients..., right side].  Unknowns that are not determined are 0.
function solve(equations) {
    const n = equations.length, used = [], tiny = 1e-12 * equations[0][0];
    for (let k = 0; k < n; k++) {
        const pivot = equations.find((row) => !used.includes(row) && Math.abs(row[k]) > tiny);
        used.push(pivot);
        for (const row of pivot ? equations.filter((other) => other !== pivot) : []) {
            const factor = row[k] / pivot[k];
            for (let j = k; j <= n; j++) {
                row[j] -= factor * pivot[j];
            }
        }
    }
    return used.map((row, k) => row ? row[n] / row[k] : 0);
}

// Medians over windows of 0.8 times the longer side, on a grid of at most 24 pixels, at the size of the picture.
function localMedian(picture) {
    const h = Math.min(picture.h, 24), w = Math.min(picture.w, 24), half = Math.floor(0.4 * Math.max(h, w));
    const grid = resample(picture, h, w), medians = makePicture(h, w);
    // The numbers' ranks are counted in a histogram.  From one window to the next, one column leaves and one enters.
    const sorted = grid.data.map((v) => v).sort(), order = Array.from(grid.data.keys());
    order.sort((p, q) => grid.data[p] - grid.data[q]);
    const ranks = new Int32Array(h * w);
    order.forEach((p, rank) => {
        ranks[p] = rank;
    });
    const middle = ((2 * half + 1) ** 2 - 1) / 2;
    for (let i = 0; i < h; i++) {
        const counts = new Int32Array(h * w);
        let rank = 0, below = 0; // numbers in the window with a lower rank
        const count = (column, change) => {
            const j = Math.min(w - 1, Math.max(0, column)); // outside, the edge is repeated
            for (let u = i - half; u <= i + half; u++) {
                const r = ranks[Math.min(h - 1, Math.max(0, u)) * w + j];
                counts[r] += change;
                below += r < rank ? change : 0;
            }
        };
        for (let column = -half; column < half; column++) {
            count(column, 1);
        }
        for (let j = 0; j < w; j++) {
            count(j + half, 1);
            while (below > middle) {
                rank--;
                below -= counts[rank];
            }
            while (below + counts[rank] <= middle) {
                below += counts[rank];
                rank++;
            }
            medians.data[i * w + j] = sorted[rank];
            count(j - half, -1);
        }
    }
    return resample(medians, picture.h, picture.w);
}

// Standard deviation of the background, from the pixels below it: there is no ink among them.  0 for less noise than
// MIN_CONTRAST exceeds anyway.
function noiseOf({data}) {
    const limit = MIN_CONTRAST / NOISE_FACTOR / 1.4826;
    let below = 0, far = 0;
    for (let p = 0; p < data.length; p++) { // without a branch, which would be a random one
        below += Number(data[p] < 0);
        far += Number(data[p] < -limit);
    }
    if (far === 0 || 2 * far <= below - 2) { // the median is at most the limit
        return 0;
    }
    const numbers = new Float32Array(below + 1); // one more, for the last number that is not taken
    for (let p = 0, k = 0; p < data.length; p++) {
        numbers[k] = -data[p];
        k += Number(data[p] < 0);
    }
    return 1.4826 * quantile(numbers.subarray(0, below), 0.5);
}

// NumPy's quantile, which interpolates between two numbers.  Reorders the numbers.
function quantile(numbers, q) {
    const position = q * (numbers.length - 1), k = Math.floor(position);
    let low = 0, high = numbers.length - 1;
    while (low < high) { // Hoare's selection: smaller numbers to the left of number k, larger ones to the right
        const pivot = numbers[(low + high) >> 1];
        let i = low, j = high;
        while (i <= j) {
            while (numbers[i] < pivot) {
                i++;
            }
            while (numbers[j] > pivot) {
                j--;
            }
            if (i <= j) {
                const moved = numbers[i];
                numbers[i++] = numbers[j];
                numbers[j--] = moved;
            }
        }
        low = k >= i ? i : low;
        high = k <= j ? j : high;
        if (k < i && k > j) {
            break;
        }
    }
    let next = Infinity;
    for (let i = k + 1; i < numbers.length; i++) {
        next = Math.min(next, numbers[i]);
    }
    return position > k ? numbers[k] + (next - numbers[k]) * (position - k) : numbers[k];
}

// --- components ------------------------------------------------------------------------------------------------------

// Connected components of the ink: runs of pixels {row, start, end, mass, part} in rows, and the parts that they form,
// {mass (sum of the ink), top, bottom, left, right}.
function components({h, w, data}) {
    const reach = Math.max(1, roundEven(0.006 * Math.max(h, w))); // gaps of this many pixels are bridged
    const mask = new Uint8Array(h * w), runs = [];
    for (let i = 0; i < h; i++) {
        for (let j = 0; j < w; j++) {
            const start = j;
            while (j < w && data[i * w + j] > LEVEL) {
                j++;
            }
            for (let u = Math.max(0, i - reach); j > start && u <= Math.min(h - 1, i + reach); u++) {
                mask.fill(1, u * w + Math.max(0, start - reach), u * w + Math.min(w, j + reach));
            }
        }
    }
    const root = (run) => {
        while (run.parent !== run) {
            run = run.parent = run.parent.parent;
        }
        return run;
    };
    for (let i = 0, above = 0; i < h; i++) { // runs[above], ... are those of the row above
        const first = runs.length;
        for (let j = 0; j < w; j++) {
            const start = j;
            let mass = 0;
            while (j < w && mask[i * w + j]) {
                mass += data[i * w + j];
                j++;
            }
            if (j > start) {
                const run = {row: i, start, end: j, mass};
                run.parent = run;
                for (let k = above; k < first; k++) {
                    if (runs[k].start < j && runs[k].end > start) {
                        root(runs[k]).parent = root(run);
                    }
                }
                runs.push(run);
            }
        }
        above = first;
    }
    for (const run of runs) {
        const top = root(run);
        top.part = top.part || {mass: 0, top: h, bottom: 0, left: w, right: 0};
        run.part = top.part;
        run.part.mass += run.mass;
        run.part.top = Math.min(run.part.top, run.row);
        run.part.bottom = Math.max(run.part.bottom, run.row + 1);
        run.part.left = Math.min(run.part.left, run.start);
        run.part.right = Math.max(run.part.right, run.end);
    }
    return {runs, parts: [...new Set(runs.map((run) => run.part))]};
}

// The ink of the parts of digits: no specks, and no shadows at the edge of the picture if there is enough ink inside.
// null if only specks are left.
function keepParts(ink) {
    const {h, w} = ink, {runs, parts} = components(ink), side = Math.max(h, w), digit = makePicture(h, w);
    const heaviest = Math.max(0, ...parts.map((part) => part.mass));
    let kept = parts.filter((part) => part.mass >= MIN_MASS * heaviest);
    const inside = kept.filter(({top, bottom, left, right}) => top > 0 && left > 0 && bottom < h && right < w);
    if (Math.max(0, ...inside.map((part) => part.mass)) >= 0.3 * heaviest) {
        kept = inside;
    }
    const extent = ({top, bottom, left, right}) => Math.max(bottom - top, right - left);
    const largest = Math.max(0, ...kept.map(extent));
    if (largest < Math.min(8, side / 4) || largest < 0.03 * side) {
        return null;
    }
    kept = new Set(kept.filter((part) => extent(part) >= MIN_EXTENT * largest));
    for (const {row, start, end, part} of runs) {
        if (kept.has(part)) {
            digit.data.set(ink.data.subarray(row * w + start, row * w + end), row * w + start);
        }
    }
    return digit;
}

// --- the normal form -------------------------------------------------------------------------------------------------

// Ink, 0 ... 1, of one digit as (size, size): in its box, with its centre of mass in the middle.
function normalizeDigit(ink, size) {
    const box = roundEven(size * 20 / 28);
    let fine = fit(ink, box * SCALE);
    const darkest = largestOf(fine.data);
    // Strokes thinner than a pixel are diluted.
    const typical = quantile(fine.data.filter((v) => v > 0.1 * darkest), 0.8);
    fine.data = fine.data.map((v) => Math.min(1, Math.max(0, 2 * (v / typical - 0.5) + 0.5)));
    const radius = (SCALE * MIN_STROKE - strokeWidth(fine)) / 2;
    fine = fit(radius > 0.5 ? dilate(fine, radius) : fine, box * SCALE);

    const h = Math.ceil(fine.h / SCALE), w = Math.ceil(fine.w / SCALE), small = new Float64Array(h * w);
    const top = Math.floor((h * SCALE - fine.h) / 2), left = Math.floor((w * SCALE - fine.w) / 2);
    for (let i = 0; i < fine.h; i++) {
        for (let j = 0; j < fine.w; j++) {
            small[Math.floor((i + top) / SCALE) * w + Math.floor((j + left) / SCALE)] += fine.data[i * fine.w + j];
        }
    }
    const peak = largestOf(small), result = new Uint8Array(size * size);
    let mass = 0, massY = 0, massX = 0;
    small.forEach((v, p) => {
        small[p] = roundEven(255 * v / peak);
        mass += small[p];
        massY += small[p] * Math.floor(p / w);
        massX += small[p] * (p % w);
    });
    const start = (center, n) => Math.min(Math.max(Math.floor(size / 2 - center + 0.5), 0), size - n);
    const y = start(massY / mass, h), x = start(massX / mass, w);
    for (let i = 0; i < h; i++) {
        result.set(small.subarray(i * w, (i + 1) * w), (y + i) * size + x);
    }
    return result;
}

// The box of the ink, scaled so that its longer side has `size` pixels.
function fit({h, w, data}, size) {
    let top = h, bottom = 0, left = w, right = 0;
    for (let i = 0, p = 0; i < h; i++) {
        for (let j = 0; j < w; j++, p++) {
            if (data[p] > LEVEL) {
                top = Math.min(top, i);
                bottom = i + 1;
                left = Math.min(left, j);
                right = Math.max(right, j + 1);
            }
        }
    }
    const box = makePicture(bottom - top, right - left), longer = Math.max(box.h, box.w);
    const scaled = (n) => Math.max(1, roundEven(n * size / longer));
    for (let i = 0; i < box.h; i++) {
        box.data.set(data.subarray((top + i) * w + left, (top + i) * w + right), i * box.w);
    }
    return resample(box, scaled(box.h), scaled(box.w));
}

function pad({h, w, data}, border) {
    const padded = makePicture(h + 2 * border, w + 2 * border);
    for (let i = 0; i < h; i++) {
        padded.data.set(data.subarray(i * w, (i + 1) * w), (i + border) * padded.w + border);
    }
    return padded;
}

// Mean width of the strokes in pixels: twice the area over the length of the outline, which is the sum of the slopes
// of the ink.
function strokeWidth(ink) {
    const {h, w, data} = pad(ink, 1);
    let area = 0, outline = 0;
    for (let i = 0, p = 0; i < h; i++) {
        const up = i > 0 ? w : 0, down = i < h - 1 ? w : 0; // one-sided differences at the border, as np.gradient's
        for (let j = 0; j < w; j++, p++) {
            const left = j > 0 ? 1 : 0, right = j < w - 1 ? 1 : 0;
            const y = (data[p + down] - data[p - up]) / (up && down ? 2 : 1);
            const x = (data[p + right] - data[p - left]) / (left && right ? 2 : 1);
            area += data[p];
            outline += Math.sqrt(y * y + x * x);
        }
    }
    return 2 * area / outline;
}

// Largest value within `radius` pixels, on a picture that is larger by the radius.
function dilate(picture, radius) {
    const r = Math.floor(radius), {h, w, data} = pad(picture, r), result = makePicture(h, w), offsets = [];
    for (let y = -r; y <= r; y++) {
        for (let x = -r; x <= r; x++) {
            if (Math.hypot(y, x) <= radius) {
                offsets.push(y * w + x);
            }
        }
    }
    for (let i = r; i < h - r; i++) {
        for (let p = i * w + r; p < (i + 1) * w - r; p++) {
            for (let k = 0; data[p] > 0 && k < offsets.length; k++) {
                result.data[p + offsets[k]] = Math.max(result.data[p + offsets[k]], data[p]);
            }
        }
    }
    return result;
}

// --- filters ---------------------------------------------------------------------------------------------------------

// Resampled with triangles: linear interpolation where the result is larger, weighted means where it is smaller.
function resample(picture, h, w) {
    return addResampled(makePicture(h, w), picture, 1);
}

// result += factor * the picture, resampled to the size of the result
function addResampled(result, {h, w, data}, factor) {
    const rows = makeFilter(h, result.h), columns = makeFilter(w, result.w), {taps, firsts, weights} = rows;
    const width = result.w, wide = new Float64Array(h * width);
    for (let i = 0; i < h; i++) {
        filterRow(wide, i * width, data, i * w, columns);
    }
    for (let i = 0; i < result.h; i++) {
        for (let t = 0; t < taps; t += 2) { // two rows at a time
            const next = Math.min(t + 1, taps - 1), f = factor * weights[i * taps + t];
            const g = next > t ? factor * weights[i * taps + next] : 0;
            addRows(result.data, i * width, wide, (firsts[i] + t) * width, (firsts[i] + next) * width, width, f, g);
        }
    }
    return result;
}

// to[p...] = from[q...], resampled
function filterRow(to, p, from, q, {taps, firsts, weights}) {
    const length = firsts.length;
    if (taps === 2) { // interpolation
        for (let j = 0; j < length; j++) {
            const first = q + firsts[j];
            to[p + j] = weights[2 * j] * from[first] + weights[2 * j + 1] * from[first + 1];
        }
        return;
    }
    for (let j = 0; j < length; j++) {
        const first = q + firsts[j];
        let sum = 0;
        for (let t = 0; t < taps; t++) {
            sum += weights[j * taps + t] * from[first + t];
        }
        to[p + j] = sum;
    }
}

// to[p...] += f * from[first...] + g * from[second...]
function addRows(to, p, from, first, second, length, f, g) {
    for (let j = 0; j < length; j++) {
        to[p + j] += f * from[first + j] + g * from[second + j];
    }
}

// The filter from n pixels to m: number i is the sum of weights[i * taps + t] times pixel firsts[i] + t.
function makeFilter(n, m) {
    const radius = Math.max(n / m, 1), taps = Math.min(n, Math.ceil(2 * radius));
    const firsts = new Int32Array(m), weights = new Float64Array(m * taps);
    for (let i = 0; i < m; i++) {
        const center = (i + 0.5) * (n / m) - 0.5;
        const first = firsts[i] = Math.min(n - taps, Math.max(0, Math.floor(center - radius) + 1));
        let sum = 0;
        for (let t = 0; t < taps; t++) {
            sum += weights[i * taps + t] = Math.max(0, 1 - Math.abs(center - first - t) / radius);
        }
        for (let t = 0; t < taps; t++) {
            weights[i * taps + t] /= sum;
        }
    }
    return {taps, firsts, weights};
}

// Rows of n pixels resampled to m with triangles that are wide, of at least `least` pixels, and transposed: (m, h).
// With the ramps R(z) = sum of (z - k) * x[k] over k < z, a triangle is R(center + radius) - 2 R(center) +
// R(center - radius), and a ramp is z * sum of x[k] - sum of k * x[k].
function smoothRows({h, w: n, data}, m, least) {
    const radius = Math.max(least, n / m, 1), result = makePicture(m, h);
    const sums = new Float64Array(n + 1), moments = new Float64Array(n + 1), scales = new Float64Array(m);
    const centers = Float64Array.from({length: m}, (_, i) => (i + 0.5) * (n / m) - 0.5);
    const [starts, middles, ends] = [-radius, 0, radius].map((shift) =>
        Int32Array.from(centers, (center) => Math.min(n, Math.max(0, Math.ceil(center + shift)))));
    for (let row = -1; row < h; row++) { // first a row of ones, for the sums of the weights
        let sum = 0, moment = 0;
        for (let k = 0; k < n; k++) {
            const x = row < 0 ? 1 : data[row * n + k];
            sums[k + 1] = sum += x;
            moments[k + 1] = moment += k * x;
        }
        for (let i = 0; i < m && sum > 0; i++) { // of a row of zeros all are zero
            const center = centers[i], start = starts[i], middle = middles[i], end = ends[i];
            const last = (center + radius) * sums[end] - moments[end];
            const first = (center - radius) * sums[start] - moments[start];
            const triangle = first - 2 * (center * sums[middle] - moments[middle]) + last;
            if (row < 0) {
                scales[i] = 1 / triangle;
            } else {
                result.data[i * h + row] = scales[i] * triangle;
            }
        }
    }
    return result;
}

// Smallest (sign -1) or largest (1) values over windows of width x width pixels; outside, the edge is repeated.
function sliding(picture, width, sign) {
    return slidingRows(slidingRows(picture, width, sign), width, sign);
}

// In blocks of `width` pixels, the largest number up to each pixel and from it on: a window has parts of two blocks
// (van Herk 1992, Gil and Werman 1993).
function slidingRows({h, w, data}, width, sign) {
    const before = width >> 1, length = w + width - 1, result = makePicture(w, h);
    const upTo = new Float32Array(length), from = new Float32Array(length);
    for (let row = 0; row < h; row++) {
        for (let k = 0; k < length; k++) {
            upTo[k] = from[k] = sign * data[row * w + Math.min(w - 1, Math.max(0, k - before))];
        }
        for (let start = 0; start < length; start += width) {
            const end = Math.min(length, start + width);
            for (let k = start + 1; k < end; k++) {
                upTo[k] = upTo[k - 1] > upTo[k] ? upTo[k - 1] : upTo[k];
            }
            for (let k = end - 2; k >= start; k--) {
                from[k] = from[k + 1] > from[k] ? from[k + 1] : from[k];
            }
        }
        for (let k = 0; k < w; k++) {
            result.data[k * h + row] = sign * (from[k] > upTo[k + width - 1] ? from[k] : upTo[k + width - 1]);
        }
    }
    return result;
}
