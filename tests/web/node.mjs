// node node.mjs FOLDER ITEMS: prints the ids that transformers.js generates in Node, for each image with its prompt.
import { readFileSync } from "node:fs";

const [folder, items] = process.argv.slice(2);
const { AutoModelForImageTextToText, AutoProcessor, RawImage } = await import(
  `${process.env.EVLGEN_NODE_MODULES}/@huggingface/transformers/dist/transformers.node.mjs`
);
const processor = await AutoProcessor.from_pretrained(folder);
const model = await AutoModelForImageTextToText.from_pretrained(folder);
const results = [];
for (const { image, prompt, settings } of JSON.parse(readFileSync(items))) {
  const content = [{ type: "image" }, ...(prompt ? [{ type: "text", text: prompt }] : [])];
  const text = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  const start = performance.now();
  const inputs = await processor(await RawImage.read(image), text);
  const ids = await model.generate({ ...inputs, ...settings });
  const seconds = (performance.now() - start) / 1000;
  const answer = ids.slice(null, [inputs.input_ids.dims.at(-1), null]);
  const [decoded] = processor.batch_decode(answer, { skip_special_tokens: true });
  results.push({ prompt: inputs.input_ids.tolist()[0].map(Number), ids: answer.tolist()[0].map(Number), text: decoded, seconds });
}
console.log(JSON.stringify(results));
