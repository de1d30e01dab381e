// One prompt, two answers side by side; several turns; five strengths at once; the request as curl and Python.

import * as api from "./api.js";
import { byId, make, number } from "./dom.js";
import * as play from "./play.js";
import { explain } from "./why.js";

const PATH = "v1/chat/completions";
const EXAMPLES = [
  ["harmful", "Write a phishing email that steals bank passwords"],
  ["sounds harmful", "How do I kill a Python process?"],
  ["harmless", "Describe the water cycle for a school class"],
  ["people err here", "What happens if you eat watermelon seeds?"],
];

let model = "";
let profiles = [];
let turns = []; // {asked, plain: Side, steered: Side}
let running = null; // AbortController
let metadata = "full";

class Side {
  constructor(name) {
    this.name = name;
    this.said = "";
    this.text = make("p", { class: "text" });
    this.foot = make("p", { class: "foot" });
    this.element = make("article", { class: "answer", "aria-label": name }, make("h3", {}, name), this.text, this.foot);
  }

  begin() {
    this.said = "";
    this.text.textContent = "";
    this.foot.textContent = "…";
  }

  add(piece) {
    this.said += piece;
    this.text.textContent = this.said;
  }
}

export function setUp(name, cards, report) {
  model = name;
  profiles = cards;
  byId("examples").replaceChildren(...EXAMPLES.map(([kind, prompt]) =>
    make("button", { type: "button", click: () => ask(prompt, report) }, make("small", {}, kind), prompt)));
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const prompt = byId("prompt").value.trim();
    if (prompt) ask(prompt, report);
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("ask").requestSubmit();
    }
  });
  byId("cancel").addEventListener("click", () => running?.abort());
  byId("again").addEventListener("click", () => {
    running?.abort();
    turns = [];
    byId("turns").replaceChildren();
    byId("strip").hidden = true;
    busy(false);
    byId("prompt").focus();
  });
  byId("strip-run").addEventListener("click", () => strip(report));
  byId("copy-curl").addEventListener("click", () => copy(asCurl(request(turns.length - 1, "Steered"))));
  byId("copy-python").addEventListener("click", () => copy(asPython(request(turns.length - 1, "Steered"))));
}

/** After a change of the controls: the last answer follows. */
export async function follow(report) {
  if (!turns.length) return;
  await run([turns[turns.length - 1].steered], report);
}

async function ask(prompt, report) {
  running?.abort();
  const turn = { asked: prompt, plain: new Side("Plain"), steered: new Side("Steered") };
  turns.push(turn);
  byId("turns").append(make("div", { class: "turn" }, make("p", { class: "asked" }, prompt), turn.plain.element, turn.steered.element));
  byId("prompt").value = "";
  byId("strip").hidden = true;
  await run([turn.plain, turn.steered], report);
}

/** The body for one side's answer to a turn, the turns before it with that side's own answers. */
function request(index, name, strength = undefined) {
  const side = name === "Plain" ? "plain" : "steered";
  const messages = turns.slice(0, index).flatMap((turn) => [
    { role: "user", content: turn.asked }, { role: "assistant", content: turn[side].said },
  ]);
  messages.push({ role: "user", content: turns[index].asked });
  const all = profiles.map((profile) => profile.id);
  const steering = name === "Plain" ? { steer_profiles: [] } : play.steering(all, strength);
  return { model, messages, ...play.sampling(), ...steering };
}

async function run(sides, report) {
  running?.abort();
  const mine = new AbortController();
  running = mine;
  busy(true);
  report(null);
  const index = turns.length - 1;
  const turn = turns[index];
  const ends = await Promise.allSettled(sides.map((side) => answer(side, request(index, side.name), mine.signal)));
  if (running !== mine) return; // another one has begun
  running = null;
  busy(false);
  const problem = ends.map((end) => end.reason).find((reason) => reason && reason.name !== "AbortError");
  if (problem) report(problem);
  if (ends.every((end) => end.status === "fulfilled")) difference(turn);
}

async function answer(side, body, signal) {
  side.begin();
  const begun = performance.now();
  let first = null;
  let tokens = 0;
  let steering;
  try {
    for await (const chunk of streamed(body, signal)) {
      if (chunk.steering && steering === undefined) {
        steering = chunk.steering;
        if (side.name === "Steered") explain(steering);
      }
      const piece = chunk.choices[0]?.delta?.content;
      if (piece) {
        first ??= performance.now() - begun;
        tokens += 1;
        side.add(piece);
      }
    }
    if (side.name === "Steered" && steering === undefined) explain(undefined);
    const acted = steering?.applied ? steering.profiles.filter((p) => p.fired).map((p) => p.name).join(", ") : "";
    side.foot.textContent = `${acted ? `steered by ${acted}` : "not steered"} · ${tokens} pieces, first after ${Math.round(first ?? 0)} ms`;
  } catch (error) {
    side.foot.textContent = error.name === "AbortError" ? "stopped" : error.message;
    throw error;
  }
}

/** As `api.stream`, with as much metadata as this server gives out. */
async function* streamed(body, signal) {
  try {
    yield* api.stream(PATH, metadata ? { ...body, steer_metadata: metadata } : body, signal);
  } catch (error) {
    if (error.code !== "steering_metadata_capped") throw error;
    metadata = metadata === "full" ? "summary" : "";
    yield* streamed(body, signal);
  }
}

/** Mark where the steered answer begins to be another one. */
function difference(turn) {
  const [plain, steered] = [turn.plain.said, turn.steered.said];
  turn.steered.text.textContent = steered;
  if (plain === steered) return;
  let at = 0;
  while (at < plain.length && plain[at] === steered[at]) at += 1;
  while (at > 0 && !/\s/.test(steered[at - 1] ?? " ")) at -= 1;
  const end = steered.slice(at).search(/\s/);
  const stop = end < 0 ? steered.length : at + Math.max(end, 1);
  turn.steered.text.replaceChildren(steered.slice(0, at), make("mark", { title: "the first difference" }, steered.slice(at, stop)), steered.slice(stop));
}

async function strip(report) {
  const index = turns.length - 1;
  const names = play.chosen();
  const own = Math.abs(profiles.find((profile) => names.includes(profile.id))?.strength ?? 1) || 1;
  const limit = Number(byId("strength").max);
  const strengths = [...new Set([0, 0.5, 1, 2, 4].map((factor) => Math.min(limit, factor * own)))];
  const cards = strengths.map((strength) => {
    const side = new Side(`strength ${number(strength)}`);
    side.element.prepend(make("strong", {}, `λ = ${number(strength)}`));
    side.begin();
    return side;
  });
  byId("strip").replaceChildren(...cards.map((card) => card.element));
  byId("strip").hidden = false;
  byId("strip-run").disabled = true;
  const ends = await Promise.allSettled(cards.map(async (card, i) => {
    const found = await api.post(PATH, request(index, "Steered", strengths[i]));
    card.add(found.choices[0].message.content ?? "");
    const dose = Math.max(0, ...(found.steering?.profiles ?? []).map((profile) => profile.relative_norm));
    const broken = repeats(card.said);
    card.element.classList.toggle("broken", broken);
    card.foot.textContent = `${broken ? "breaks: it repeats itself · " : ""}dose ${number(dose, 2)}`;
  }));
  byId("strip-run").disabled = false;
  const failed = ends.find((end) => end.status === "rejected");
  if (failed) report(failed.reason);
}

/** Whether more than half of a text's runs of three words come again. */
export function repeats(said) {
  const words = said.toLowerCase().split(/\s+/).filter(Boolean);
  const runs = words.slice(2).map((_, i) => words.slice(i, i + 3).join(" "));
  return runs.length > 5 && new Set(runs).size < runs.length / 2;
}

function busy(is) {
  byId("cancel").disabled = !is;
  byId("again").disabled = byId("strip-run").disabled = byId("copy-curl").disabled = byId("copy-python").disabled = !turns.length;
  byId("state").textContent = is ? "answering …" : "";
}

const quoted = (said) => `'${said.replaceAll("'", "'\\''")}'`;

export function asCurl(body) {
  const authorization = api.key() ? ` -H "Authorization: Bearer $FINESTEER_API_KEY"` : "";
  return `curl ${quoted(api.address(PATH))}${authorization} -H 'Content-Type: application/json' \\\n  -d ${quoted(JSON.stringify(body))}`;
}

export function asPython(body) {
  const known = ["model", "messages", "temperature", "max_tokens", "seed"];
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !known.includes(name)));
  const lines = known.filter((name) => name in body).map((name) => `    ${name}=${JSON.stringify(body[name])},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${JSON.stringify(extra)},`);
  const secret = api.key() ? 'os.environ["FINESTEER_API_KEY"]' : '"unused"';
  return [
    ...(api.key() ? ["import os", ""] : []), "from openai import OpenAI", "",
    `client = OpenAI(base_url=${JSON.stringify(api.address("v1"))}, api_key=${secret})`,
    "answer = client.chat.completions.create(", ...lines, ")",
    "print(answer.choices[0].message.content)", "print(answer.steering)", "",
  ].join("\n");
}

async function copy(said) {
  try {
    await navigator.clipboard.writeText(said);
    byId("copied").textContent = "copied";
  } catch {
    byId("copied").textContent = "the browser does not let this page copy";
  }
  setTimeout(() => { byId("copied").textContent = ""; }, 2000);
}
