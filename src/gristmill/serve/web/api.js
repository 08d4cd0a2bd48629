// The server's API, as any client uses it. The key stays in this tab: sessionStorage, and no other place.
const KEY = "gristmill.key";
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export class ApiError extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  const answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  if (!answer.ok) throw new ApiError(answer.status, (await answer.json().catch(() => ({}))).error);
  return answer;
}

export const get = async (path) => (await ask(path)).json();

// The chunks of a stream, all that have come together at once. Raises ApiError for an error within it.
export async function* stream(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const options = { stream: true, stream_options: { include_usage: true } };
  const answer = await ask(path, { method: "POST", headers, body: JSON.stringify({ ...body, ...options }), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, { message: "the connection broke in the middle of the answer" });
    const events = (held + value).split("\n\n");
    held = events.pop();
    const told = events.map((event) => event.slice("data: ".length));
    const chunks = told.filter((data) => data !== "[DONE]").map((data) => JSON.parse(data));
    const wrong = chunks.find((chunk) => chunk.error);
    yield chunks.filter((chunk) => !chunk.error);
    if (wrong) throw new ApiError(0, wrong.error);
    if (told.includes("[DONE]")) return;
  }
}

// A choice's tokens in one form, whichever endpoint they come from: text, bytes, logprob, top, experts.
export function tokensOf(choice) {
  const told = choice.logprobs;
  if (!told) return [];
  const tokens = told.content
    ? told.content.map(({ token, bytes, logprob, top_logprobs }) => ({
        text: token,
        bytes: bytes && Uint8Array.from(bytes), // null: a control token
        logprob,
        top: top_logprobs.map((other) => ({ text: other.token, logprob: other.logprob })),
      }))
    : told.tokens.map((text, n) => ({
        text,
        bytes: bytesOf(text),
        logprob: told.token_logprobs[n],
        top: Object.entries(told.top_logprobs[n] ?? {})
          .map(([text, logprob]) => ({ text, logprob }))
          .sort((a, b) => b.logprob - a.logprob),
      }));
  return tokens.map((token, n) => ({ ...token, experts: choice.experts?.[n] }));
}

// Bytes that are not a whole character are written as "bytes:\xe4\xb8".
function bytesOf(text) {
  if (!/^bytes:(\\x[0-9a-f]{2})+$/.test(text)) return new TextEncoder().encode(text);
  return Uint8Array.from(text.slice("bytes:\\x".length).split("\\x"), (digits) => parseInt(digits, 16));
}
