// What every client is asked to do, as in checks.py.

export const [url, model] = process.argv.slice(2);
export const tokens = 24;
export const question = "What is the weather in Rome?";
export const messages = [{ role: "user", content: question }];
export const person = {
  type: "object",
  properties: { name: { type: "string", enum: ["Ada", "Bob"] }, age: { type: "integer", minimum: 10, maximum: 99 } },
  required: ["name", "age"],
  additionalProperties: false,
};
export const weather = {
  type: "object",
  properties: { city: { type: "string", enum: ["Rome", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};
export const tool = {
  type: "function",
  function: { name: "get_weather", description: "Weather of a city", parameters: weather },
};

export function expect(good, what) {
  if (!good) throw new Error(`unexpected: ${JSON.stringify(what)}`);
}

export function checkPerson(value) {
  expect(["Ada", "Bob"].includes(value.name) && value.age >= 10 && value.age <= 99, value);
}

export function checkCall(name, given) {
  const args = typeof given === "string" ? JSON.parse(given) : given;
  expect(name === "get_weather" && ["Rome", "Oslo"].includes(args.city), { name, args });
}

export async function run(checks) {
  const results = {};
  for (const name of ["chat", "stream", "structured", "tools", "logprobs"]) {
    try {
      results[name] = (await checks[name]()) === null ? "-" : "ok";
    } catch (error) {
      results[name] = `${error.name}: ${String(error.message).replace(/\s+/g, " ").slice(0, 300)}`;
    }
  }
  console.log("\n" + JSON.stringify(results));
}
