// The loaded profiles, their cards and reports.

import * as api from "./api.js";
import { byId, facts, make, number, percent } from "./dom.js";

export function show(profiles, report) {
  const frame = make("div", { id: "report" });
  byId("profiles").replaceChildren(make("div", { class: "cards" }, ...profiles.map((profile) => card(profile, frame, report))), frame);
  if (!profiles.length) byId("profiles").append(make("p", {}, "No profile is loaded: start the server with --profile NAME=FOLDER."));
}

function card(profile, frame, report) {
  const { gate, experts } = profile.metrics ?? {};
  return make("section", { class: "card" },
    make("h2", {}, profile.id), make("p", {}, profile.description ?? ""),
    facts([
      ["method", profile.method], ["model", profile.model],
      ["site", `output of layer ${profile.layer}, positions ${profile.positions}`],
      ["strength", number(profile.strength)], ["gate", profile.gate?.kind],
      ["threshold", profile.gate?.threshold === undefined ? null : number(profile.gate.threshold)],
      ["AUC", gate ? number(gate.auc) : null],
      ["fires on general queries", gate ? percent(gate.general_fired.share) : null],
      ["experts", profile.experts?.num_prototypes],
      ["validation error", experts?.validation_error === undefined ? null : `${number(experts.validation_error)} (mean vector ${number(experts.validation_error_mean_vector)})`],
      ["clients may change it", profile.override], ["mode", profile.mode], ["version", profile.version],
    ]),
    make("button", { type: "button", click: () => open(profile.id, frame, report) }, "Report"));
}

/** In the page where the server wants no key; else as a file, since a frame cannot send one. */
async function open(name, frame, report) {
  const path = `v1/steering/profiles/${encodeURIComponent(name)}/report`;
  try {
    const content = await api.text(path);
    if (api.key()) {
      const file = URL.createObjectURL(new Blob([content], { type: "text/html" }));
      make("a", { href: file, download: `${name}-report.html` }).click();
      frame.replaceChildren(make("p", { class: "hint" }, "The report was saved as a file: open it from there."));
      setTimeout(() => URL.revokeObjectURL(file), 10000);
    } else {
      frame.replaceChildren(make("iframe", { src: api.address(path), title: `Report of ${name}` }));
      frame.scrollIntoView();
    }
  } catch (error) {
    report(error);
  }
}
