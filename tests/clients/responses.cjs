// OpenAI's own client for Node against /v1/responses: writes what it heard as one JSON object.
// Arguments: base URL, key, model.

const OpenAI = require("openai").default;

const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const asked = { model, temperature: 0, max_output_tokens: 12, store: true };

async function main() {
  const first = await client.responses.create({ ...asked, input: "hello" });
  const again = await client.responses.retrieve(first.id);
  const next = { ...asked, input: "and?", previous_response_id: first.id };
  const second = await client.responses.create(next);
  const events = [];
  for await (const event of await client.responses.create({ ...next, stream: true })) events.push(event);
  const streamed = events.at(-1).response;
  const replayed = [];
  for await (const event of await client.responses.retrieve(streamed.id, { stream: true })) {
    replayed.push(event);
  }
  const helper = client.responses.stream({ ...asked, input: "hello" });
  const helped = await helper.finalResponse();
  const items = await client.responses.inputItems.list(second.id);
  await client.responses.delete(first.id);
  const gone = await client.responses.retrieve(first.id).catch((error) => error.status);
  process.stdout.write(JSON.stringify({
    texts: [first.output_text, again.output_text, helped.output_text],
    branches: [second.output_text, events.filter((each) => each.type === "response.output_text.delta")
      .map((each) => each.delta).join("")],
    same: JSON.stringify(events) === JSON.stringify(replayed),
    kinds: events.map((each) => each.type),
    input: items.data.map((each) => each.content[0].text),
    gone,
  }));
}

main();
