// What agents ask for, by OpenAI's client for Node and the AI SDK: parsed answers and calls.
// Arguments: base URL, key, model. Writes what was heard as one JSON object.

const OpenAI = require("openai").default;
const { zodFunction, zodResponseFormat } = require("openai/helpers/zod");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { generateObject, generateText, streamText, tool } = require("ai");
const { z } = require("zod");

const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "How warm is it?" }];
const limits = { max_tokens: 400, seed: 7 };
const Weather = z.object({
  city: z.enum(["Rome", "Oslo"]),
  level: z.number().int().min(0).max(99),
  notes: z.array(z.string().max(4)).max(2),
});

async function openai() {
  const response_format = zodResponseFormat(Weather, "weather");
  const tools = [zodFunction({ name: "weather", parameters: Weather })];
  const parsed = await client.chat.completions.parse({ model, messages, response_format, ...limits });
  const asked = { model, messages, tools, tool_choice: "required", ...limits };
  const called = await client.chat.completions.parse(asked);
  const streamed = await client.chat.completions.stream({ ...asked, stream: true }).finalMessage();
  return {
    parsed: parsed.choices[0].message.parsed,
    called: called.choices[0].message.tool_calls.map((each) => each.function.parsed_arguments),
    streamed: streamed.tool_calls.map((each) => JSON.parse(each.function.arguments)),
  };
}

async function aiSdk() {
  const provider = createOpenAICompatible({
    name: "local", baseURL, apiKey, supportsStructuredOutputs: true,
  });
  const settings = { model: provider(model), prompt: "How warm is it?", maxOutputTokens: 400, seed: 7 };
  const tools = { weather: tool({ inputSchema: Weather, execute: async ({ level }) => level + 1 }) };
  const { object } = await generateObject({ ...settings, schema: Weather });
  const asked = { ...settings, tools, toolChoice: "required" };
  const called = await generateText(asked);
  const streamed = streamText(asked);
  return {
    object,
    called: called.toolCalls.map((each) => each.input),
    results: called.toolResults.map((each) => each.output),
    streamed: (await streamed.toolCalls).map((each) => each.input),
    reason: called.finishReason,
  };
}

async function main() {
  process.stdout.write(JSON.stringify({ openai: await openai(), sdk: await aiSdk() }));
}

main();
