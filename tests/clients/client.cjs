// OpenAI's own client for Node: asks in every way and writes what it heard as one JSON object.
// Arguments: base URL, key, model, and a JSON object of requests.

const OpenAI = require("openai").default;

const [baseURL, apiKey, model, asked] = process.argv.slice(2);
const { prompt, messages, ways } = JSON.parse(asked);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });

async function completions(way) {
  const whole = await client.completions.create({ model, prompt, ...way });
  const stream = await client.completions.create({ model, prompt, stream: true, ...way });
  let told = "";
  for await (const chunk of stream) told += chunk.choices[0].text;
  return [whole.choices[0].text, told];
}

async function chats(way) {
  const whole = await client.chat.completions.create({ model, messages, ...way });
  const stream = await client.chat.completions.create({ model, messages, stream: true, ...way });
  let told = "";
  for await (const chunk of stream) told += chunk.choices[0].delta.content ?? "";
  return [whole.choices[0].message.content, told];
}

async function failure(make) {
  try {
    await make();
  } catch (error) {
    return [error.constructor.name, error.status, error.param ?? null, error.code ?? null];
  }
  return null;
}

async function main() {
  const heard = { texts: {}, errors: {} };
  for (const [name, way] of Object.entries(ways)) {
    heard.texts[name] = { completion: await completions(way), chat: await chats(way) };
  }
  const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
  heard.errors.refused = await failure(() =>
    client.completions.create({ model, prompt, temperature: -1 }));
  heard.errors.unknown = await failure(() => client.completions.create({ model: "gpt-9", prompt }));
  heard.errors.stranger = await failure(() => stranger.models.list());
  heard.models = (await client.models.list()).data.map((each) => each.id);
  process.stdout.write(JSON.stringify(heard));
}

main();
