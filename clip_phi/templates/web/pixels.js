// An image resized and cropped as Pillow and transformers do it: a canvas resamples in another way.

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const FILTERS = {
    1: [3, (x) => (x < 3 ? sinc(x) * sinc(x / 3) : 0)], // Lanczos
    2: [1, (x) => Math.max(0, 1 - x)], // bilinear
    3: [2, (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0)], // bicubic
};

// For each output pixel: its first input pixel, and weights as integers of 22 bits (Pillow's Resample.c).
function weightsOf(from, to, resample) {
    const scale = from / to;
    if (resample === 0) return Array.from({ length: to }, (_, i) => [Math.trunc((i + 0.5) * scale), [2 ** 22]]);
    const [support, filter] = FILTERS[resample];
    const stretch = Math.max(1, scale);
    return Array.from({ length: to }, (_, place) => {
        const center = (place + 0.5) * scale;
        const first = Math.max(0, Math.trunc(center - support * stretch + 0.5));
        const end = Math.min(from, Math.trunc(center + support * stretch + 0.5));
        const weights = [];
        for (let x = first; x < end; x++) weights.push(filter(Math.abs(x - center + 0.5) / stretch));
        const sum = weights.reduce((a, b) => a + b, 0);
        return [first, weights.map((weight) => Math.round((weight / sum) * 2 ** 22))];
    });
}

// Lines of `from` pixels become lines of `to`. Pixels of a line are `step` apart; lines begin `lineIn`, `lineOut` apart.
function resizeLines(pixels, lines, from, to, step, lineIn, lineOut, resample) {
    if (from === to) return pixels;
    const out = new Uint8ClampedArray(lines * to * 4);
    weightsOf(from, to, resample).forEach(([first, weights], place) => {
        for (let line = 0; line < lines; line++) {
            for (let channel = 0; channel < 3; channel++) {
                let sum = 2 ** 21;
                let at = (line * lineIn + first * step) * 4 + channel;
                for (const weight of weights) {
                    sum += pixels[at] * weight;
                    at += 4 * step;
                }
                out[(line * lineOut + place * step) * 4 + channel] = Math.floor(sum / 2 ** 22);
            }
        }
    });
    return out;
}

// image: an ImageBitmap; config: preprocessor_config.json. Returns {data, width, height}, RGBA; alpha means nothing.
export function preparePixels(image, config) {
    let { width, height } = image;
    const context = new OffscreenCanvas(width, height).getContext("2d");
    context.fillStyle = "white"; // behind transparent pixels
    context.fillRect(0, 0, width, height);
    context.drawImage(image, 0, 0);
    let data = context.getImageData(0, 0, width, height).data;
    if (config.do_resize) {
        const short = config.size.shortest_edge;
        const resized = (side) => Math.trunc((short * side) / Math.min(image.width, image.height));
        const to = short ? { width: resized(width), height: resized(height) } : config.size;
        data = resizeLines(data, height, width, to.width, 1, width, to.width, config.resample);
        data = resizeLines(data, to.width, height, to.height, to.width, 1, 1, config.resample);
        ({ width, height } = to);
    }
    if (!config.do_center_crop) return { data, width, height };
    const crop = config.crop_size;
    const [left, top] = [Math.floor((width - crop.width) / 2), Math.floor((height - crop.height) / 2)];
    const out = new Uint8ClampedArray(crop.width * crop.height * 4); // black around a smaller image
    for (let y = Math.max(0, -top); y < Math.min(crop.height, height - top); y++) {
        for (let x = Math.max(0, -left); x < Math.min(crop.width, width - left); x++) {
            const from = ((y + top) * width + x + left) * 4;
            out.set(data.subarray(from, from + 4), (y * crop.width + x) * 4);
        }
    }
    return { data: out, width: crop.width, height: crop.height };
}
