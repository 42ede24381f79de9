// The page, and the worker that runs its model. Only these addresses lead elsewhere. Copies beside the page do as well.
const LIBRARY = "https://cdn.jsdelivr.net/npm/@huggingface/transformers@4.3.2/dist/transformers.min.js";
const RUNTIME = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.31.0-dev.20260914-8d85527a0/dist/";

let loading; // the worker's model: undefined before it is asked for, and after a failure
self.document ? startPage() : startWorker();

async function startPage() {
  const [drop, file, camera, video, canvas, prompt, caption, status, progress] = document.querySelectorAll("[id]");
  const paper = canvas.getContext("2d", { willReadFrequently: true });
  const worker = new Worker(import.meta.url, { type: "module" });
  worker.onmessage = ({ data }) => {
    progress.hidden = !data.total;
    if (data.total) Object.assign(progress, { max: data.total, value: data.loaded });
    status.textContent = data.status ?? status.textContent;
    caption.textContent = data.isNew ? "" : caption.textContent + (data.text ?? "");
  };
  const { download } = await (await fetch("config.json", { cache: "no-cache" })).json();
  download.gpu = Boolean(await navigator.gpu?.requestAdapter().catch(() => null));
  download.megabytes += download.gpu ? 28 : 15; // the library
  status.textContent = `The first image downloads ${Math.ceil(download.megabytes)} MB. The browser keeps them.`;

  // `source` is a bitmap or a video. White paper lies under what is transparent, as in training.
  const show = (source, width, height) => {
    Object.assign(canvas, { width, height, hidden: false });
    paper.fillStyle = "white";
    paper.fillRect(0, 0, width, height);
    paper.drawImage(source, 0, 0);
    ask();
  };
  const ask = () => {
    const { width, height, hidden } = canvas;
    if (hidden) return;
    const pixels = paper.getImageData(0, 0, width, height).data;
    worker.postMessage({ download, pixels, width, height, prompt: prompt.value.trim() }, [pixels.buffer]);
  };
  const open = async ([blob]) => {
    if (!blob) return;
    try {
      const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" }); // turned as its EXIF says
      show(bitmap, bitmap.width, bitmap.height);
    } catch (error) {
      status.textContent = `This image cannot be read: ${error.message}`;
    }
  };
  prompt.onchange = ask;
  file.onchange = () => open(file.files);
  file.onclick = () => (file.value = ""); // so that the same file can be chosen again
  drop.ondragover = drop.ondrop = (event) => {
    event.preventDefault();
    open(event.dataTransfer.files); // none until the drop
  };
  camera.onclick = async () => {
    try {
      if (video.hidden) {
        video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
        await video.play();
      } else {
        show(video, video.videoWidth, video.videoHeight);
        video.srcObject.getTracks().forEach((track) => track.stop());
      }
      video.hidden = !video.hidden;
      camera.textContent = video.hidden ? "Camera" : "Take the picture";
    } catch (error) {
      status.textContent = `The camera cannot be used: ${error.message}`;
    }
  };
}

function startWorker() {
  let queue = Promise.resolve();
  const answer = async (data) => describe(await (loading ??= loadModel(data.download)), data);
  self.onmessage = ({ data }) => {
    queue = queue.then(() => answer(data)).catch((error) => {
      loading = undefined;
      self.postMessage({ status: `It failed: ${error.message ?? error}` });
    });
  };
}

async function loadModel({ version, megabytes, gpu }) {
  const library = await import(LIBRARY);
  const { AutoModelForImageTextToText, AutoProcessor, env } = library;
  for (const key of await self.caches?.keys() ?? []) {
    if (key.startsWith("evlgen-") && key !== version) await caches.delete(key); // of a model that was here before
  }
  // All names lead to the folder of this page.
  Object.assign(env, { cacheKey: version, remoteHost: new URL(".", import.meta.url).href, remotePathTemplate: "." });
  let loaded = 0; // the library's own progress asks for each file twice
  env.fetch = async (...request) => {
    const response = await fetch(...request);
    const count = (chunk, stream) => {
      loaded += chunk.length;
      if (loading) self.postMessage({ status: "Loading …", loaded, total: megabytes * 1e6 });
      stream.enqueue(chunk);
    };
    return new Response(response.body?.pipeThrough(new TransformStream({ transform: count })), response);
  };
  const [mjs, wasm] = ["mjs", "wasm"].map((kind) => `${RUNTIME}ort-wasm-simd-threaded${gpu ? ".asyncify" : ""}.${kind}`);
  env.backends.onnx.wasm.wasmPaths = { mjs, wasm };
  const processor = await AutoProcessor.from_pretrained("model");
  const load = (device) => AutoModelForImageTextToText.from_pretrained("model", { device });
  return { library, processor, model: await (gpu ? load("webgpu").catch(() => load("wasm")) : load("wasm")) };
}

async function describe({ library, processor, model }, { pixels, width, height, prompt }) {
  const content = [{ type: "image" }, ...(prompt ? [{ type: "text", text: prompt }] : [])];
  const text = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  const start = performance.now();
  self.postMessage({ status: "Looking …", isNew: true });
  const inputs = await processor(new library.RawImage(pixels, width, height, 4), text);
  const callback_function = (text) => self.postMessage({ text });
  const streamer = new library.TextStreamer(processor.tokenizer, { skip_prompt: true, callback_function });
  await model.generate({ ...inputs, streamer });
  self.postMessage({ status: `${((performance.now() - start) / 1000).toFixed(1)} s` });
}
