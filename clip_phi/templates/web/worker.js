// The model in a thread of its own, so that the page shows each word as it comes.
import {
    AutoModelForImageTextToText, AutoProcessor, InterruptableStoppingCriteria, RawImage, TextStreamer, env,
} from "./lib/transformers.min.js";

const MODEL = "."; // the folder of this file
env.allowLocalModels = true;
env.allowRemoteModels = false;
// Its cache would keep the files of an earlier export under the same address.
env.useBrowserCache = env.useWasmCache = false;
const library = (ending) => new URL(`lib/ort-wasm-simd-threaded.asyncify.${ending}`, import.meta.url).href;
env.backends.onnx.wasm.wasmPaths = { mjs: library("mjs"), wasm: library("wasm") };

// Between two tokens other messages are read: WebAssembly alone would not let "stop" through.
const channel = new MessageChannel();
const pause = () =>
    new Promise((resolve) => {
        channel.port1.onmessage = resolve;
        channel.port2.postMessage(null);
    });
const stopping = new InterruptableStoppingCriteria();
let processor, model;

async function load() {
    let size = 0;
    const progress_callback = (event) => {
        if (event.status !== "progress_total") return;
        size = event.total;
        postMessage({ kind: "progress", loaded: event.loaded, total: event.total });
    };
    processor = await AutoProcessor.from_pretrained(MODEL);
    model = await AutoModelForImageTextToText.from_pretrained(MODEL, { device: "wasm", progress_callback });
    const forward = model.forward.bind(model);
    model.forward = async (inputs) => {
        await pause();
        return forward(inputs);
    };
    const dtype = model.config["transformers.js_config"].dtype;
    postMessage({ kind: "ready", processing: processor.image_processor.config, size, dtype });
}

async function ask(question, { data, width, height }) {
    stopping.reset();
    const text = question || model.config.caption_instruction;
    const content = [{ type: "image" }, ...(text ? [{ type: "text", text }] : [])];
    const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
    const { add_special_tokens, clean_up_tokenization_spaces } = processor.config; // BOS may be in the prompt already
    const inputs = await processor(new RawImage(data, width, height, 4), prompt, { add_special_tokens });
    let [tokens, first, last] = [0, 0, 0];
    const decoding = { skip_special_tokens: true, clean_up_tokenization_spaces };
    const streamer = new TextStreamer(processor.tokenizer, {
        skip_prompt: true,
        decode_kwargs: decoding,
        callback_function: (text) => postMessage({ kind: "text", text }),
        token_callback_function: () => {
            last = performance.now();
            first ||= last;
            tokens += 1;
        },
    });
    const limits = { max_new_tokens: 256, do_sample: false, stopping_criteria: stopping };
    const ids = await model.generate({ ...inputs, ...limits, streamer });
    const answer = ids.slice(null, [inputs.input_ids.dims[1], null]);
    const whole = processor.decode(answer, decoding).trim();
    postMessage({ kind: "done", text: whole, tokens, speed: tokens > 1 ? (tokens - 1) / ((last - first) / 1000) : 0 });
}

onmessage = async ({ data }) => {
    if (data.kind === "stop") return stopping.interrupt();
    try {
        await ask(data.question, data.pixels);
    } catch (error) {
        postMessage({ kind: "error", message: error.message ?? String(error) });
    }
};
load().catch((error) => postMessage({ kind: "error", message: error.message ?? String(error) }));
