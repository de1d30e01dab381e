// What the server's own metrics say, since this view was opened.

import * as api from "./api.js";
import { byId, facts, make, number, percent } from "./dom.js";

const EVERY_MS = 2000;
const KEEP = 60; // points of a line
let timer = null;
let first = null;
let history = [];

/** `name{labels} value` lines → [{name, labels, value}], of this server's own metrics. */
export function parse(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const match = /^finesteer:(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map((m) => [m[1], m[2]]));
    found.push({ name: match[1], labels, value: Number(match[3]) });
  }
  return found;
}

const sum = (samples, name, wanted = {}) => samples
  .filter((s) => s.name === name && Object.entries(wanted).every(([k, v]) => s.labels[k] === v))
  .reduce((total, s) => total + s.value, 0);

/** A histogram's counts by bucket, not cumulated: [[upper edge, count], …]. */
export function buckets(samples, name, wanted = {}) {
  const edges = new Map();
  for (const s of samples) {
    if (s.name !== `${name}_bucket` || !Object.entries(wanted).every(([k, v]) => s.labels[k] === v)) continue;
    edges.set(s.labels.le, (edges.get(s.labels.le) ?? 0) + s.value);
  }
  const order = [...edges].sort((a, b) => Number(a[0].replace("+", "")) - Number(b[0].replace("+", "")));
  return order.map(([edge, count], i) => [edge, count - (i ? order[i - 1][1] : 0)]);
}

export function open(profiles, report) {
  const tick = async () => {
    try {
      const samples = parse(await api.text("metrics"));
      first ??= samples;
      history = [...history, samples].slice(-KEEP);
      byId("watch").replaceChildren(...shown(profiles, samples));
      report(null);
    } catch (error) {
      report(error);
    }
  };
  close();
  tick();
  timer = setInterval(tick, EVERY_MS);
}

export function close() {
  clearInterval(timer);
}

function shown(profiles, now) {
  const mean = (steered) => {
    const count = sum(now, "time_to_first_token_seconds_count", { steered });
    return count ? `${Math.round((1000 * sum(now, "time_to_first_token_seconds_sum", { steered })) / count)} ms (${count} requests)` : "–";
  };
  const gap = (steered) => {
    const count = sum(now, "inter_token_latency_seconds_count", { steered });
    return count ? `${number((1000 * sum(now, "inter_token_latency_seconds_sum", { steered })) / count)} ms` : "–";
  };
  return [
    make("p", { class: "hint" }, "From this server's /metrics, every two seconds: since it started; the lines since this view was opened."),
    make("div", { class: "cards" },
      make("section", { class: "card" }, make("h2", {}, "Now"), facts([
        ["running", sum(now, "num_requests_running")], ["waiting", sum(now, "num_requests_waiting")],
        ["tokens given", sum(now, "generation_tokens_total")],
        ["first token, plain", mean("false")], ["first token, steered", mean("true")],
        ["between tokens, plain", gap("false")], ["between tokens, steered", gap("true")],
      ])),
      ...profiles.map((profile) => card(profile, now))),
  ];
}

function card(profile, now) {
  const of = { profile: profile.id };
  const [fired, evaluated] = [sum(now, "gate_fired_total", of), sum(now, "gate_evaluations_total", of)];
  const rates = history.map((samples) => {
    const total = sum(samples, "gate_evaluations_total", of) - sum(first, "gate_evaluations_total", of);
    return total ? (sum(samples, "gate_fired_total", of) - sum(first, "gate_fired_total", of)) / total : null;
  });
  return make("section", { class: "card" },
    make("h2", {}, profile.id),
    make("p", { class: "big" }, evaluated ? percent(fired / evaluated) : "–"),
    make("p", { class: "hint" }, `fired on ${fired} of ${evaluated} queries`),
    line(rates, `gate-fire rate of ${profile.id}`),
    make("p", { class: "hint" }, rates.some((rate) => rate !== null) ? "the rate since this view was opened" : "no query since this view was opened"),
    make("h3", {}, "Energy ratios"),
    histogram(buckets(now, "energy_ratio", of), profile.gate?.threshold, `energy ratios of ${profile.id}`));
}

function line(values, name) {
  const [width, height] = [320, 60];
  const points = values.map((value, i) => (value === null ? null : [(width * i) / (KEEP - 1), height - 4 - (height - 8) * value]));
  const path = points.filter(Boolean).map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join(" ");
  return make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name },
    make("line", { x1: 0, x2: width, y1: height - 4, y2: height - 4, stroke: "var(--line)" }),
    make("path", { d: path || "M0 0", fill: "none", stroke: "var(--main)", "stroke-width": 2 }));
}

function histogram(counts, threshold, name) {
  const [width, height] = [320, 80];
  const finite = counts.filter(([edge]) => edge !== "+Inf");
  const highest = Math.max(1, ...finite.map(([, count]) => count));
  const wide = width / Math.max(1, finite.length);
  return make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name },
    ...finite.map(([edge, count], i) => make("rect", {
      x: i * wide, width: wide - 1, y: height - ((height - 4) * count) / highest, height: ((height - 4) * count) / highest,
      fill: threshold !== undefined && Number(edge) > threshold ? "var(--ir)" : "var(--general)",
    }, make("title", {}, `up to ${edge}: ${count}`))));
}
