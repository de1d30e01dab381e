// The server, over the same address as this page: relative paths, the key if there is one, and errors as sentences.

const base = new URL("./", document.baseURI);
const KEY = "finesteer-key";

export const address = (path) => new URL(path.replace(/^\//, ""), base).href;
export const key = () => sessionStorage.getItem(KEY) ?? "";
export const useKey = (value) => sessionStorage.setItem(KEY, value);

/** Something went wrong: `message` says what and what to do, `code` and `status` are the server's. */
export class Problem extends Error {
  constructor(message, status = 0, code = "") {
    super(message);
    Object.assign(this, { status, code });
  }
}

async function send(path, options = {}) {
  const headers = { ...(options.headers ?? {}) };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  if (options.body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(address(path), { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(`The server at ${base.host} does not answer. Is it still running? Start it again, and try once more.`);
  }
  if (response.ok) return response;
  throw await problemOf(response);
}

async function problemOf(response) {
  let said;
  try {
    said = (await response.json()).error;
  } catch {
    return new Problem(`The server answered ${response.status} without a reason.`, response.status);
  }
  return new Problem(said.message, response.status, said.code ?? "");
}

export const get = async (path) => (await send(path)).json();
export const text = async (path) => (await send(path)).text();
export const post = async (path, body, signal) =>
  (await send(path, { method: "POST", body: JSON.stringify(body), signal })).json();

/** The chunks of a streamed completion, as they come. */
export async function* stream(path, body, signal) {
  const response = await send(path, { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Problem("The answer broke off: the server went away in the middle of it.");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue; // a comment that keeps the connection open
        const data = event.slice(6);
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Problem(chunk.error.message, 200, chunk.error.code ?? "");
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    throw new Problem("The answer broke off: the server went away in the middle of it.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
