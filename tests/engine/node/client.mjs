// The openai package for node against a running server: each endpoint as a body and as a stream.
// Prints {endpoint: [generated body, replayed stream, replayed body]} as JSON.
import OpenAI from "openai";

const client = new OpenAI({ maxRetries: 0, timeout: 240_000 });
const question = "What is the capital of Germany?";
const shared = { model: process.env.MODEL, temperature: 0 };

const apis = {
  chat: {
    create: (body, options) => client.chat.completions.create(body, options),
    body: { ...shared, messages: [{ role: "user", content: question }], max_tokens: 33 },
    text: (answer) => answer.choices[0].message.content,
    piece: (event) => event.choices[0]?.delta.content,
  },
  completions: {
    create: (body, options) => client.completions.create(body, options),
    body: { ...shared, prompt: "The capital of Germany is", max_tokens: 9 },
    text: (answer) => answer.choices[0].text,
    piece: (event) => event.choices[0]?.text,
  },
  responses: {
    create: (body, options) => client.responses.create(body, options),
    body: { ...shared, input: question, max_output_tokens: 33, store: false },
    text: (answer) => answer.output_text,
    piece: (event) => (event.type === "response.output_text.delta" ? event.delta : ""),
  },
};

async function ask(api, stream, headers) {
  const { data, response } = await api.create({ ...api.body, stream }, { headers }).withResponse();
  const cache = response.headers.get("x-cache");
  if (!stream) return { cache, text: api.text(data), chunks: 1 };
  const pieces = [];
  for await (const event of data) pieces.push(api.piece(event) ?? "");
  return { cache, text: pieces.join(""), chunks: pieces.length };
}

const replies = {};
for (const [name, api] of Object.entries(apis)) {
  replies[name] = [
    await ask(api, false, { "Cache-Control": "no-cache" }),
    await ask(api, true, {}),
    await ask(api, false, {}),
  ];
}
console.log(JSON.stringify(replies));
