// What the gate saw and what was done, for the steered side's last answer.

import * as api from "./api.js";
import { byId, facts, make, number, percent } from "./dom.js";

const REASONS = {
  gate_open: "The gate opened: the answer was steered.",
  gate_closed: "The gate stayed shut: this is the plain model's answer, token for token.",
  strength_zero: "Strength 0: decided and reported, and nothing was changed.",
  forced_open: "The gate was forced open.",
  forced_closed: "The gate was forced shut: nothing was changed.",
  opted_out: "No profile was asked for, and no gate was computed.",
  no_profile: "No profile is loaded.",
  shadow: "Shadow mode: decided and reported, and nothing was changed.",
  non_finite: "A vector could not be computed.",
};
const evidences = new Map(); // by profile and version

async function evidenceOf(profile) {
  const id = `${profile.name} ${profile.version}`;
  if (!evidences.has(id)) {
    const found = api.get(`v1/steering/profiles/${encodeURIComponent(profile.name)}/evidence`).catch(() => null);
    evidences.set(id, found);
  }
  return evidences.get(id);
}

/** Show a response's `steering` object; undefined where the server tells nothing. */
export async function explain(steering) {
  const box = byId("why");
  if (!steering) {
    box.replaceChildren(make("p", {}, "This server tells nothing of its decisions (--steering-metadata none)."));
    return;
  }
  const parts = [make("p", { id: "why-reason" }, REASONS[steering.reason] ?? steering.reason)];
  const evidence = await Promise.all(steering.profiles.map(evidenceOf));
  steering.profiles.forEach((profile, i) => parts.push(...about(profile, evidence[i])));
  if (steering.compute_ms !== undefined) {
    parts.push(make("p", { class: "hint" }, `Gates and vectors took ${number(steering.compute_ms)} ms.`));
  }
  box.replaceChildren(...parts);
}

const shownRatio = (value) => (value < 0.001 ? "under 0.001" : number(value));

function about(profile, evidence) {
  const state = profile.fired ? make("span", { class: "fired" }, "fired") : make("span", { class: "shut" }, "did not fire");
  const parts = [make("h3", {}, `${profile.name}: `, state)];
  if (evidence?.gate) parts.push(...dial(profile, evidence.gate));
  parts.push(facts([
    ["gate", number(profile.gate)],
    ["energy ratio", profile.energy_ratio === null ? null : `${shownRatio(profile.energy_ratio)} (threshold ${number(profile.threshold)})`],
    ["strength", `${number(profile.strength)} (${profile.strength_source})`],
    ["dose", profile.applied === false ? null : `${percent(profile.relative_norm)} of the state's length`],
    ["where", `output of layer ${profile.layer}, positions ${profile.positions}`],
    ["version", profile.version],
  ]));
  if (profile.routing && profile.fired) parts.push(...experts(profile.routing, evidence?.experts ?? []));
  return parts;
}

/** Where this query lies among the queries that the gate was calibrated on. */
function dial(profile, gate) {
  const value = profile.energy_ratio ?? null;
  const [width, height, foot] = [320, 110, 18];
  const first = gate.edges[0];
  const span = gate.edges[gate.edges.length - 1] - first;
  const x = (v) => (width * (Math.min(Math.max(v, first), first + span) - first)) / span;
  const sums = [gate.ir, gate.general].map((counts) => counts.reduce((a, b) => a + b, 0) || 1);
  const highest = Math.max(...gate.ir.map((c) => c / sums[0]), ...gate.general.map((c) => c / sums[1]));
  const bars = (counts, sum, colour, name) => counts.map((count, i) => {
    const tall = ((height - foot - 12) * count) / sum / highest;
    return make("rect", {
      x: x(gate.edges[i]), width: Math.max(0.5, x(gate.edges[i + 1]) - x(gate.edges[i]) - 0.5),
      y: height - foot - tall, height: tall, fill: `var(--${colour})`, opacity: 0.6,
    }, make("title", {}, `${name}: ${count} of ${sum}`));
  });
  const upright = (v, colour, dash) => make("line", {
    x1: x(v), x2: x(v), y1: 2, y2: height - foot, stroke: colour, "stroke-width": 2.5, "stroke-dasharray": dash,
  });
  const below = gate.ir.reduce((sum, count, i) => sum + (gate.edges[i + 1] <= value ? count : 0), 0) / sums[0];
  const words = value === null
    ? "This gate has no energy ratio."
    : `This query's energy ratio, ${shownRatio(value)}, is ${value >= profile.threshold ? "above" : "below"} the threshold ${number(profile.threshold)}; ` +
      `${percent(below)} of the queries that need steering lie below it.`;
  return [
    make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words },
      ...bars(gate.general, sums[1], "general", "general queries"), ...bars(gate.ir, sums[0], "ir", "queries that need steering"),
      upright(gate.threshold, "var(--soft)", "4 3"),
      value === null ? null : upright(value, "var(--text)", null),
      make("text", { x: 0, y: height - 4 }, number(first, 2)),
      make("text", { x: width, y: height - 4, "text-anchor": "end" }, number(first + span, 2)),
      value === null ? null : make("text", x(value) < width / 2
        ? { x: x(value) + 5, y: 11 } : { x: x(value) - 5, y: 11, "text-anchor": "end" }, "this query")),
    make("p", { class: "hint" },
      make("span", { class: "shut" }, "blue"), ": general queries, ", make("span", { class: "fired" }, "red"),
      ": queries that need steering, dashed: the threshold. ", words),
  ];
}

function experts(routing, known) {
  const order = routing.map((weight, index) => ({ weight, index })).sort((a, b) => b.weight - a.weight);
  return [
    make("h3", {}, "Experts"),
    ...order.map(({ weight, index }, rank) => {
      const about = known.find((expert) => expert.index === index);
      const name = `expert ${index}${about?.label ? `, ${about.label}` : ""}`;
      const row = make("div", { class: "expert" },
        `${name}: ${percent(weight)}`, make("meter", { value: weight, min: 0, max: 1, "aria-label": name }));
      if (rank < 2 && weight > 0.1 && about?.examples?.length) {
        row.append(make("span", { class: "hint" }, "nearest training examples"),
          make("ul", {}, ...about.examples.slice(0, 3).map((example) => make("li", {}, example))));
      }
      return row;
    }),
  ];
}
