// node chromium.mjs URL ITEMS: opens the page in Chromium, and prints the caption of each image with its prompt.
import { readFileSync } from "node:fs";

const [url, items] = process.argv.slice(2);
const { chromium } = (await import(`${process.env.EVLGEN_NODE_MODULES}/playwright-core/index.js`)).default;
const names = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"];
names.push("disable-component-update", "disable-sync", "use-fake-device-for-media-stream", "use-fake-ui-for-media-stream");
const args = names.map((name) => `--${name}`);
const browser = await chromium.launch({ executablePath: process.env.EVLGEN_CHROMIUM, args });
const page = await browser.newPage();
const messages = [], requests = [];
page.on("console", (message) => messages.push(message.text()));
page.on("pageerror", (error) => messages.push(String(error)));
page.context().on("request", (request) => requests.push(request.url()));
const done = () => page.waitForFunction(() => /^[\d.]+ s$|failed|cannot/.test(document.querySelector("#status").textContent), null, { timeout: Number(process.env.PAGE_TIMEOUT ?? 300000) });
const read = async (id) => page.textContent(`#${id}`);
const result = { captions: [] };
try {
  await page.goto(url);
  await page.waitForFunction(() => document.querySelector("#status").textContent);
  result.offer = await read("status");
  for (const { image, prompt } of JSON.parse(readFileSync(items))) {
    await page.evaluate(() => (document.querySelector("#status").textContent = "waiting"));
    if (image === "camera") {
      await page.click("#camera");
      await page.waitForFunction(() => document.querySelector("#camera").textContent !== "Camera");
      await page.click("#camera");
    } else {
      await page.evaluate((text) => (document.querySelector("#prompt").value = text), prompt ?? "");
      await page.setInputFiles("#file", image);
    }
    await done();
    result.captions.push({ text: await read("caption"), status: await read("status") });
  }
  result.cached = await page.evaluate(async () => Object.fromEntries(await Promise.all((await caches.keys()).map(async (key) => [key, (await (await caches.open(key)).keys()).length]))));
} catch (error) {
  result.error = `${error} ${await read("status")}`;
}
await browser.close();
console.log(JSON.stringify({ ...result, messages, requests }));
