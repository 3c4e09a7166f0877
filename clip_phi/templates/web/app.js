// The page: an image of a file or the camera, and a question, to the worker that holds the model.
import { preparePixels } from "./pixels.js";

const element = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
let processing; // preprocessor_config.json
let image; // an ImageBitmap

const show = (text) => (element("status").textContent = text);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

worker.onerror = () => show("The model cannot be loaded: lib/ lacks transformers.js, or this browser is too old.");
worker.onmessage = ({ data }) => {
    if (data.kind === "progress") {
        show(`Loading the model: ${megabytes(data.loaded)} of ${megabytes(data.total)}.`);
    } else if (data.kind === "ready") {
        processing = data.processing;
        show(`The model is ready: ${megabytes(data.size)}, ${data.dtype} weights.`);
        element("fields").disabled = false;
    } else if (data.kind === "text") {
        element("answer").textContent += data.text;
    } else if (data.kind === "done") {
        element("answer").textContent = data.text;
        element("speed").textContent = `${data.tokens} tokens, ${data.speed.toFixed(1)} tokens/s`;
        finish();
    } else {
        show(`Error: ${data.message}`);
        finish();
    }
};

function finish() {
    element("answer").ariaBusy = "false";
    element("stop").disabled = true;
    element("form").querySelector("[type=submit]").disabled = false;
}

async function choose(blob) {
    try {
        image = await createImageBitmap(blob); // upright, and in sRGB
    } catch {
        image = undefined;
        show("This file is no image that the browser can read.");
    }
    element("image").hidden = !image;
    element("image").src = image ? URL.createObjectURL(blob) : "";
}

element("file").onchange = ({ target }) => target.files[0] && choose(target.files[0]);

element("camera").onclick = async () => {
    const video = element("video");
    try {
        video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
        await video.play();
        video.hidden = element("shoot").hidden = false;
    } catch (error) {
        show(`No camera: ${error.message ?? error}. It needs a page of https or of localhost.`);
    }
};

element("shoot").onclick = async () => {
    const video = element("video");
    const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
    canvas.getContext("2d").drawImage(video, 0, 0);
    await choose(await canvas.convertToBlob());
    video.srcObject.getTracks().forEach((track) => track.stop());
    video.hidden = element("shoot").hidden = true;
};

element("stop").onclick = () => worker.postMessage({ kind: "stop" });

element("form").onsubmit = (event) => {
    event.preventDefault();
    if (!image) return show("Choose an image first.");
    element("answer").textContent = element("speed").textContent = "";
    element("answer").ariaBusy = "true";
    element("stop").disabled = false;
    element("form").querySelector("[type=submit]").disabled = true;
    const pixels = preparePixels(image, processing);
    worker.postMessage({ kind: "ask", question: element("question").value.trim(), pixels });
};
