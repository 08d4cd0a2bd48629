// The page: what is typed goes to the API, what comes back becomes an answer. A model's text is only ever text.
import { ApiError, get, key, stream, tokensOf } from "./api.js";
import { Answer } from "./answer.js";
import { Inspector } from "./inspect.js";
import { Server, count, time } from "./server.js";

const TOP = 8; // alternatives of each token
const EXAMPLES = {
  text: ["def fibonacci(n):", "Once upon a time", "The mill by the river"],
  chat: ["Who are you?", "Explain what a mixture of experts is."],
};
const ADVICE = {
  text: "The model goes on from where you stop. Then point at a token: what else it thought of, and which experts it asked.",
  chat: "The model answers. Then point at a token: what else it thought of, and which experts it asked.",
};
const ENDS = { stop: "ended by itself", length: "at the limit" };

const find = (id) => document.getElementById(id);
const [thread, composer, prompt] = ["thread", "composer", "prompt"].map(find);
const narrow = matchMedia("(max-width: 900px)");
const still = matchMedia("(prefers-reduced-motion: reduce)");
const inspector = new Inspector();
const server = new Server((problem) => problem.status === 401 && askForKey());
let card = null;
let messages = []; // of the conversation, as the API takes them
let running = null; // what aborts the answer on its way

const mode = () => composer.elements.mode.value;

async function start() {
  try {
    [card] = (await get("v1/models")).data;
  } catch (problem) {
    if (problem.status === 401) askForKey(key.get() && problem.message);
    else tell(problem.message);
    return;
  }
  tell("");
  document.title = `${card.id} · Gristmill`;
  find("model").textContent = card.id;
  const { experts } = card;
  const mixture = experts
    ? `${experts.experts} experts choose ${experts.per_token} in ${experts.layers} layers`
    : "a dense model";
  find("shape").textContent = `${mixture} · context of ${count(card.max_model_len)} tokens`;
  find("modes").hidden = !card.chat;
  find("key-line").hidden = !key.get();
  const last = localStorage.getItem("gristmill.mode");
  if (card.chat && last === "chat") composer.elements.mode.value = "chat";
  inspector.begin(experts);
  changeMode();
  server.begin(card.operator);
  focusPrompt();
}

function changeMode() {
  const now = mode();
  find("system-field").hidden = now !== "chat";
  prompt.placeholder = now === "chat" ? "Say something" : "The beginning of a text";
  prompt.setAttribute("aria-label", now === "chat" ? "Message" : "The beginning of a text");
  prompt.classList.toggle("code", now === "text");
  find("advice").textContent = ADVICE[now];
  find("examples").replaceChildren(
    ...EXAMPLES[now].map((text) => {
      const [item, button] = ["li", "button"].map((name) => document.createElement(name));
      button.type = "button";
      button.textContent = text;
      button.addEventListener("click", () => send(text));
      item.append(button);
      return item;
    }),
  );
}

function tell(problem) {
  find("problem").textContent = problem ?? "";
  find("problem").hidden = !problem;
}

function askForKey(problem) {
  const dialog = find("ask-key");
  find("key-problem").textContent = problem ?? "";
  find("key-problem").hidden = !problem;
  if (!dialog.open) dialog.showModal();
}

function settings() {
  const form = find("settings");
  if (!form.checkValidity()) {
    open("settings");
    form.reportValidity();
    return null;
  }
  const set = { model: card.id, return_experts: card.experts !== null };
  for (const { id, value } of form.querySelectorAll("input[type=number]")) if (value !== "") set[id] = Number(value);
  const stops = find("stops").value.split("\n").filter(Boolean);
  if (stops.length) set.stop = stops.map((text) => text.replaceAll("\\n", "\n"));
  return set;
}

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function button(text, act) {
  const made = element("button", "quiet-button", text);
  made.type = "button";
  made.addEventListener("click", () => act(made));
  return made;
}

async function send(text) {
  if (running || !card || !text) return;
  const set = settings();
  if (set === null) return;
  tell("");
  prompt.value = "";
  const isChat = mode() === "chat";
  const turn = element("article", isChat ? "turn chat" : "turn text");
  const asked = element(isChat ? "p" : "span", "asked", text);
  const root = element("span", "answer");
  const said = element("p", "said");
  said.append(...(isChat ? [root] : [asked, root]));
  const foot = element("footer", "", "");
  turn.append(...(isChat ? [asked] : []), said, foot);
  find("welcome").hidden = true;
  thread.append(turn);
  thread.scrollTop = thread.scrollHeight;

  const answer = new Answer(root, (span) => inspector.tint(span));
  const before = messages;
  let path = "v1/completions";
  if (isChat) {
    path = "v1/chat/completions";
    const system = find("system").value;
    messages = [...messages, { role: "user", content: text }];
    set.messages = [...(system ? [{ role: "system", content: system }] : []), ...messages];
    Object.assign(set, { logprobs: true, top_logprobs: TOP });
  } else {
    Object.assign(set, { prompt: text, logprobs: TOP });
  }
  let problem = null;
  try {
    await follow(answer, path, set, turn, foot);
  } catch (caught) {
    problem = caught;
  }
  if (problem?.status === 401) askForKey(problem.message);
  else if (problem && problem.name !== "AbortError")
    tell(problem instanceof ApiError ? problem.message : "the server cannot be reached");
  if (!answer.text) {
    turn.remove(); // as if it had not been sent
    messages = before;
    prompt.value ||= text;
    if (!thread.querySelector(".turn")) find("welcome").hidden = false;
    if (!problem) tell("the model ended at once, without a word");
  } else {
    if (isChat) messages = [...messages, { role: "assistant", content: answer.text }];
    foot.append(button("Copy", (made) => copy(made, isChat ? answer.text : text + answer.text, said)));
    if (!isChat) foot.append(button("Go on from here", () => goOn(text + answer.text)));
  }
  focusPrompt();
}

// Not on phones, whose keyboards would cover what has come.
function focusPrompt() {
  if (matchMedia("(pointer: fine)").matches) prompt.focus();
}

function goOn(text) {
  prompt.value = text;
  prompt.focus();
  prompt.setSelectionRange(text.length, text.length);
  prompt.scrollTop = prompt.scrollHeight;
}

// Until the answer is there, or broken off, which is raised after what has come was shown.
async function follow(answer, path, set, turn, foot) {
  running = new AbortController();
  busy(true);
  turn.setAttribute("aria-busy", "true");
  const sent = performance.now();
  let [first, last, usage, finish] = [null, null, null, null];
  try {
    for await (const chunks of stream(path, set, running.signal)) {
      const isAtEnd = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 40;
      for (const chunk of chunks) {
        usage = chunk.usage ?? usage;
        for (const choice of chunk.choices) {
          const tokens = tokensOf(choice);
          if (tokens.length) {
            last = performance.now();
            first ??= last;
          }
          answer.add(choice.text ?? choice.delta.content ?? "", tokens);
          finish = choice.finish_reason ?? finish;
        }
      }
      foot.textContent = `${count(answer.tokens.length)} tokens`;
      const newest = answer.spans.at(-1);
      if (newest && !still.matches && !thread.matches(":has(.t:hover, .t:focus)")) inspector.show(newest);
      if (isAtEnd) thread.scrollTop = thread.scrollHeight;
    }
  } finally {
    running = null;
    busy(false);
    answer.end();
    turn.removeAttribute("aria-busy");
    const number = answer.tokens.length;
    const each = number > 1 ? (last - first) / (number - 1) : null;
    const told = [`${count(number)} tokens`, finish ? ENDS[finish] : "stopped"];
    if (first !== null) {
      server.answered(first - sent, each, usage);
      told.push(`${time(first - sent)} to the first`);
      if (each !== null) told.push(`${time(each)} each`);
    }
    foot.replaceChildren(element("span", "", told.join(" · ")));
    find("status").textContent = `The answer is there: ${told[0]}, ${told[1]}.`;
    if (!inspector.span && answer.spans.length) inspector.show(answer.spans.at(-1));
  }
}

function busy(is) {
  find("stop").hidden = !is;
  find("send").hidden = is;
  find("new").disabled = is;
  for (const choice of composer.elements.mode) choice.disabled = is;
  if (is) find("status").textContent = "The model writes.";
}

async function copy(made, text, said) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {
    getSelection().selectAllChildren(said); // without TLS there is no other way
    document.execCommand("copy");
  }
  made.textContent = "Copied";
  setTimeout(() => (made.textContent = "Copy"), 1500);
}

function begin() {
  messages = [];
  for (const turn of thread.querySelectorAll(".turn")) turn.remove();
  find("welcome").hidden = false;
  inspector.clear();
  tell("");
  focusPrompt();
}

// Tabs of the insight; on a narrow screen the one that is open closes when it is pressed again.
const tabs = [...document.querySelectorAll("[role=tab]")];
function open(name, isPressed = false) {
  const tab = find(`tab-${name}`);
  const closes = isPressed && narrow.matches && tab.ariaSelected === "true" && document.body.classList.contains("open");
  document.body.classList.toggle("open", !closes);
  for (const other of tabs) {
    other.ariaSelected = String(other === tab);
    other.tabIndex = other === tab ? 0 : -1;
    find(other.getAttribute("aria-controls")).hidden = other !== tab;
  }
}
for (const tab of tabs) {
  tab.addEventListener("click", () => open(tab.id.slice("tab-".length), true));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    open(next.id.slice("tab-".length));
    next.focus();
  });
}

// Tokens: pointed at, pressed, or reached by keys.
const tokenAt = (event) => event.target.closest?.(".t");
thread.addEventListener("pointerover", (event) => tokenAt(event) && inspector.show(tokenAt(event)));
thread.addEventListener("click", (event) => tokenAt(event) && getSelection().isCollapsed && open("token"));
thread.addEventListener("focusin", (event) => {
  const span = tokenAt(event);
  if (!span) return;
  for (const other of span.answer.spans) other.tabIndex = other === span ? 0 : -1;
  span.setAttribute("aria-describedby", "summary");
  inspector.show(span);
  if (!narrow.matches) open("token");
});
thread.addEventListener("keydown", (event) => {
  const span = tokenAt(event);
  if (!span) return;
  const { spans } = span.answer;
  const to = { ArrowRight: span.place + 1, ArrowLeft: span.place - 1, Home: 0, End: spans.length - 1 }[event.key];
  if (event.key === "Enter") open("token");
  if (to === undefined) return;
  event.preventDefault();
  spans[to]?.focus();
});

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  send(prompt.value);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send(prompt.value);
});
addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
find("stop").addEventListener("click", () => running?.abort());
find("new").addEventListener("click", begin);
find("modes").addEventListener("change", () => {
  localStorage.setItem("gristmill.mode", mode());
  begin();
  changeMode();
});
find("tint").addEventListener("change", () => {
  for (const span of thread.querySelectorAll(".t")) inspector.tint(span);
});
find("settings").addEventListener("submit", (event) => event.preventDefault());
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(find("key").value.trim());
  find("key").value = "";
  find("ask-key").close();
  start();
});
find("forget").addEventListener("click", () => {
  key.forget();
  location.reload();
});
const refresh = () => (find("new").disabled = Boolean(running) || !thread.querySelector(".turn"));
new MutationObserver(refresh).observe(thread, { childList: true });

start();
