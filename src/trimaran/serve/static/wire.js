// The server's side of the page: one question out, a stream of chunks back. Nothing here touches the document.

export class Failure extends Error {
  /** What went wrong in words for a person. status: of the HTTP answer, 0 without one. retry: seconds to wait. */
  constructor(message, { status = 0, retry = null, cause } = {}) {
    super(message, { cause });
    this.name = "Failure";
    this.status = status;
    this.retry = retry;
  }
}

/** The `data` of every server-sent event of a byte stream, however the network cut it. */
export async function* events(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await piece(reader);
      if (done) return; // an event without its blank line is no event
      rest += value;
      const lines = rest.split(/\r\n|\n|\r(?!$)/); // a carriage return at the very end may be half of a line end
      rest = lines.pop();
      for (const line of lines) {
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // already cancelled when the reader was stopped
  }
}

async function piece(reader) {
  try {
    return await reader.read();
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Failure("The connection broke.");
  }
}

/** Chunks of a streamed answer. Throws Failure, or AbortError when `signal` stops it. */
export async function* ask(path, request, key, signal) {
  const answer = await send(path, key, { method: "POST", body: JSON.stringify(request), signal });
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk.error) throw new Failure(chunk.error.message ?? "The server broke the answer off.");
    yield chunk;
  }
  throw new Failure("The connection ended before the answer did.");
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch (problem) {
    throw new Failure("The server sent a piece that is no JSON.", { cause: problem });
  }
}

/** The models that the server offers, as /v1/models describes them. */
export async function models(key) {
  const answer = await send("v1/models", key, {});
  return (await answer.json()).data;
}

async function send(path, key, options) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Failure("The server cannot be reached.");
  }
  if (answer.ok) return answer;
  const retry = Number.parseInt(answer.headers.get("Retry-After"), 10);
  throw new Failure(await reason(answer), { status: answer.status, retry: Number.isNaN(retry) ? null : retry });
}

/** What an error answer says: OpenAI's JSON form, or its status where it is of another kind. */
async function reason(answer) {
  const text = await answer.text();
  try {
    const said = JSON.parse(text).error?.message;
    if (typeof said === "string" && said) return said;
  } catch (problem) {
    if (!(problem instanceof SyntaxError)) throw problem; // not JSON: a proxy's page, say
  }
  return `The server answered ${answer.status} ${answer.statusText}`.trim() + ".";
}
