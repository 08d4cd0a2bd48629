// How busy the server is, asked once a second while someone looks, and how quick this page's own answers were.
import { get } from "./api.js";
import { percent } from "./answer.js";

const EVERY_MS = 1000;
const POINTS = 60;
const find = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en");
const time = (ms) => (ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(2)} s`);

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

export class Server {
  // failed: called with what went wrong.
  constructor(failed) {
    this.failed = failed;
    this.speeds = [];
    this.firsts = [];
    this.gaps = [];
    this.used = { prompt: 0, cached: 0, made: 0 };
    document.addEventListener("visibilitychange", () => document.hidden || this.look());
  }

  // operates: whether the key may read the figures of the whole server.
  begin(operates) {
    this.operates = operates;
    find("whole-server").hidden = !operates;
    this.look();
  }

  async look() {
    clearTimeout(this.timer);
    if (!this.operates) return;
    try {
      this.show(await get("v1/load"));
    } catch (problem) {
      find("pulse").textContent = "not reachable";
      find("pulse").className = "lost";
      this.failed(problem);
    }
    if (!document.hidden) this.timer = setTimeout(() => this.look(), EVERY_MS);
  }

  show(load) {
    const speed = load.tokens_per_s;
    const rate = speed < 10 && speed > 0 ? speed.toFixed(1) : count(Math.round(speed));
    find("tokens_per_s").textContent = rate;
    find("running").textContent = count(load.running);
    find("waiting").textContent = count(load.waiting);
    find("cache").textContent = percent(load.blocks_in_use / load.blocks).replace("< 0.01%", "0%");
    find("prompt_tokens").textContent = count(load.prompt_tokens);
    find("generation_tokens").textContent = count(load.generation_tokens);
    find("hits").textContent = load.prompt_tokens
      ? percent(load.cached_tokens / load.prompt_tokens).replace("< 0.01%", "0%")
      : "–";
    const busy = load.running + load.waiting;
    find("pulse").textContent = busy ? `${rate} tokens/s · ${busy} at work` : "idle";
    find("pulse").className = busy ? "busy" : "";
    this.speeds = [...this.speeds, speed].slice(-POINTS);
    this.draw();
  }

  draw() {
    const most = Math.max(1, ...this.speeds);
    const points = this.speeds.map((speed, n) => {
      const x = (300 * (POINTS - this.speeds.length + n)) / (POINTS - 1);
      return `${x.toFixed(1)} ${(54 - (50 * speed) / most).toFixed(1)}`;
    });
    const svg = find("speed");
    const start = points[0].split(" ")[0];
    svg.querySelector(".line").setAttribute("d", `M${points.join("L")}`);
    svg.querySelector(".area").setAttribute("d", `M${start} 55L${points.join("L")}L300 55z`);
    const [now, peak] = [this.speeds.at(-1), Math.max(...this.speeds)].map((speed) => count(Math.round(speed)));
    svg.setAttribute("aria-label", `Tokens per second over the last minute: now ${now}, at most ${peak}`);
  }

  // One answer of this page. first_ms: to its first token; each_ms: for each after it; usage: as the API tells it.
  answered(first_ms, each_ms, usage) {
    this.firsts.push(first_ms);
    if (each_ms !== null) this.gaps.push(each_ms);
    if (usage) {
      this.used.prompt += usage.prompt_tokens;
      this.used.cached += usage.prompt_tokens_details.cached_tokens;
      this.used.made += usage.completion_tokens;
    }
    find("first").textContent = time(median(this.firsts));
    find("each").textContent = this.gaps.length ? time(median(this.gaps)) : "–";
    find("own_prompt").textContent = count(this.used.prompt);
    find("own_cached").textContent = count(this.used.cached);
    find("own_made").textContent = count(this.used.made);
  }
}

export { time, count };
