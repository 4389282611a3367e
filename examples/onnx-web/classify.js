// Labels texts with a folder of `fedspine export --format onnx`, in the browser. The folder's files
// are fetched once; texts stay in the page.
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-web/wasm";

ort.env.wasm.wasmPaths = new URL("node_modules/onnxruntime-web/dist/", document.baseURI).href;
ort.env.wasm.numThreads = 1; // more need a server that isolates the page

// what the graph reads, and where the tokenizer has it
const PARTS = {
  input_ids: "ids",
  attention_mask: "attention_mask",
  token_type_ids: "token_type_ids",
};
const FILES = ["config.json", "tokenizer.json", "tokenizer_config.json"];

/** The model in the folder at `url`: a function from a text to its label and milliseconds. */
export async function load(url) {
  const [config, tokens, settings] = await Promise.all(FILES.map((name) => json(`${url}/${name}`)));
  const tokenizer = new Tokenizer(tokens, settings);
  const session = await ort.InferenceSession.create(`${url}/model.onnx`);
  return async (text) => {
    const start = performance.now();
    const row = cut(tokenizer.encode(text), config.fedspine.max_tokens);
    const inputs = session.inputNames.map((name) => [name, tensor(row[PARTS[name]])]);
    const { logits } = await session.run(Object.fromEntries(inputs));
    const best = logits.data.indexOf(Math.max(...logits.data));
    return { label: config.id2label[best], milliseconds: performance.now() - start };
  };
}

/** The row with at most `longest` tokens; its last one stays, since it ends a text. */
function cut(row, longest) {
  const parts = { ...row, token_type_ids: row.token_type_ids ?? row.ids.map(() => 0) };
  const left = Math.min(longest, row.ids.length) - 1;
  const short = (values) => [...values.slice(0, left), values.at(-1)];
  return Object.fromEntries(Object.values(PARTS).map((part) => [part, short(parts[part])]));
}

function tensor(values) {
  return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
}

async function json(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`);
  return answer.json();
}
