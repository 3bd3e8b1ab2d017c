// What the official OpenAI SDK for Node does against a node, as JSON for the test that runs it.
//
// Arguments: where the SDK is, the base URL, a key, the chat model, the embeddings model.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [sdks, baseURL, apiKey, chat, embeddings] = process.argv.slice(2);
const require = createRequire(`${sdks}/`);
const { OpenAI, toFile } = require("openai");
const { version } = JSON.parse(readFileSync(`${sdks}/node_modules/openai/package.json`));
const said = { version };
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 120_000 });
const messages = [
  { role: "user", content: "What is the capital of France? Answer in one word." },
];
const ask = { model: chat, messages, max_tokens: 12, temperature: 0, seed: 7 };

function near(one, other) {
  let [dot, a, b] = [0, 0, 0];
  one.forEach((x, at) => {
    dot += x * other[at];
    a += x * x;
    b += other[at] * other[at];
  });
  return dot / Math.sqrt(a * b);
}

// Models.
said.models = [];
for await (const model of client.models.list()) said.models.push(model.id);
said.models.sort();
const model = await client.models.retrieve(chat);
said.model = { id: model.id, object: model.object, owned_by: model.owned_by };

// Chat.
const { data: whole, response, request_id } = await client.chat.completions
  .create(ask)
  .withResponse();
said.chat = {
  text: whole.choices[0].message.content,
  role: whole.choices[0].message.role,
  finish: whole.choices[0].finish_reason,
  model: whole.model,
  prompt: whole.usage.prompt_tokens,
  completion: whole.usage.completion_tokens,
  total: whole.usage.total_tokens,
  cost: whole.usage.cost,
  request_id,
  node: response.headers.get("x-leasehold-node"),
};

// When there is time.
const flex = await client.chat.completions.create({ ...ask, service_tier: "flex" });
said.flex = {
  text: flex.choices[0].message.content,
  tier: flex.service_tier,
  cost: flex.usage.cost,
};

// A stream.
said.stream = { text: "", chunks: 0, finish: null };
const options = { include_usage: true };
const stream = await client.chat.completions.create({
  ...ask,
  stream: true,
  stream_options: options,
});
for await (const chunk of stream) {
  said.stream.chunks += 1;
  if (chunk.usage) {
    said.stream.completion = chunk.usage.completion_tokens;
    said.stream.cost = chunk.usage.cost;
  }
  for (const choice of chunk.choices) {
    said.stream.text += choice.delta.content ?? "";
    said.stream.finish = choice.finish_reason ?? said.stream.finish;
  }
}

// The older endpoint.
const old = await client.completions.create({
  model: chat,
  prompt: "Once upon a time",
  max_tokens: 5,
  temperature: 0,
});
said.completion = { text: old.choices[0].text, tokens: old.usage.completion_tokens };

// Probabilities.
const likely = await client.chat.completions.create({ ...ask, logprobs: true, top_logprobs: 3 });
const token = likely.choices[0].logprobs.content[0];
said.logprobs = { token: token.token, logprob: token.logprob, top: token.top_logprobs.length };

// Embeddings: the SDK asks for base64 where nothing is said.
const input = [
  "A cat sits on the mat.",
  "A kitten rests on a rug.",
  "The stock market fell sharply.",
];
const packed = await client.embeddings.create({ model: embeddings, input });
const plain = await client.embeddings.create({
  model: embeddings,
  input,
  encoding_format: "float",
});
const vectors = packed.data.map((item) => item.embedding);
const apart = vectors.flatMap((vector, nth) =>
  vector.map((x, at) => Math.abs(x - plain.data[nth].embedding[at])),
);
said.embeddings = {
  length: vectors.map((vector) => vector.length),
  order: packed.data.map((item) => item.index),
  near: near(vectors[0], vectors[1]),
  far: near(vectors[0], vectors[2]),
  encodings: Math.max(...apart),
  prompt: packed.usage.prompt_tokens,
};

// Errors, by the class that is thrown.
said.errors = {};
async function fails(name, call) {
  try {
    await call();
    said.errors[name] = { class: null };
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    said.errors[name] = {
      class: error.constructor.name,
      status: error.status,
      code: error.code,
      param: error.param,
      type: error.type,
    };
  }
}
const stranger = new OpenAI({ baseURL, apiKey: "lh-none", maxRetries: 0 });
await fails("key", () => stranger.models.list());
await fails("model", () => client.chat.completions.create({ ...ask, model: "gpt-9" }));
await fails("parameter", () => client.chat.completions.create({ ...ask, temperature: 9 }));
await fails("unknown", () => client.chat.completions.create({ ...ask, temprature: 1 }));
const tool = { type: "function", function: { name: "f", parameters: { type: "object" } } };
await fails("tools", () => client.chat.completions.create({ ...ask, tools: [tool] }));
const long = [{ role: "user", content: "word ".repeat(40_000) }];
await fails("context", () => client.chat.completions.create({ ...ask, messages: long }));

// A batch: a file of requests in, one of answers and one of errors out.
const lines = Object.entries({ one: {}, two: { max_tokens: 4 }, three: { model: "gpt-9" } }).map(
  ([custom_id, more]) =>
    JSON.stringify({
      custom_id,
      method: "POST",
      url: "/v1/chat/completions",
      body: { ...ask, ...more },
    }),
);
const file = await client.files.create({
  file: await toFile(Buffer.from(lines.join("\n")), "requests.jsonl"),
  purpose: "batch",
});
let batch = await client.batches.create({
  input_file_id: file.id,
  endpoint: "/v1/chat/completions",
  completion_window: "24h",
});
const until = Date.now() + 120_000;
while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
  if (Date.now() > until) throw new Error(JSON.stringify(batch));
  await new Promise((resolve) => setTimeout(resolve, 100));
  batch = await client.batches.retrieve(batch.id);
}
async function results(id) {
  const text = await (await client.files.content(id)).text();
  const read = text.trim().split("\n").map((line) => JSON.parse(line));
  return read.map(({ custom_id, response }) => [custom_id, response]);
}
const { total, completed, failed } = batch.request_counts;
const listed = [];
for await (const one of client.batches.list()) listed.push(one.id);
const answers = await results(batch.output_file_id);
const each = (read) =>
  Object.fromEntries(answers.map(([name, answer]) => [name, read(answer.body)]));
said.batch = {
  status: batch.status,
  counts: [total, completed, failed],
  texts: each((body) => body.choices[0].message.content),
  costs: each((body) => body.usage.cost),
  refused: Object.fromEntries(
    (await results(batch.error_file_id)).map(([name, answer]) => [
      name,
      [answer.status_code, answer.body.error.code],
    ]),
  ),
  listed: listed.includes(batch.id),
  deleted: (await client.files.delete(file.id)).deleted,
};

// One who breaks off a stream, and goes on with something else.
const endless = {
  ...ask,
  max_tokens: 1_500,
  messages: [
    { role: "user", content: "Write a very long story about the sea and everything in it." },
  ],
};
const broken = await client.chat.completions.create({ ...endless, stream: true });
said.cancelled = { taken: 0 };
for await (const _ of broken) {
  said.cancelled.taken += 1;
  if (said.cancelled.taken === 4) broken.controller.abort();
}

// Several at once, and one that is cancelled by a signal.
const several = await Promise.all(
  Array.from({ length: 4 }, () => client.chat.completions.create({ ...ask, max_tokens: 4 })),
);
const texts = [...new Set(several.map((answer) => answer.choices[0].message.content))];
const aborting = new AbortController();
setTimeout(() => aborting.abort(), 500);
let cancelled = false;
try {
  await client.chat.completions.create(endless, { signal: aborting.signal });
} catch (error) {
  cancelled = error instanceof OpenAI.APIUserAbortError;
}
said.asynchronous = { texts, cancelled };
console.log(JSON.stringify(said));
