// The controls, and the request that they make.

import { byId, make, number } from "./dom.js";

/** Fill the controls from the loaded profiles; `changed` is called after each change, once it has settled. */
export function setUp(profiles, changed) {
  const box = byId("profiles-on");
  box.querySelectorAll("label").forEach((label) => label.remove());
  for (const profile of profiles) {
    const input = make("input", { type: "checkbox", value: profile.id, checked: profile.default !== false });
    box.append(make("label", { class: "inline" }, input, profile.id));
  }
  if (!profiles.length) box.append(make("label", {}, "none are loaded: both answers are the plain model's"));
  byId("strength").max = Math.max(...profiles.map((profile) => profile.max_strength), 1);
  if (profiles.length) byId("strength").value = Math.abs(profiles[0].strength);
  byId("strength").addEventListener("input", () => {
    byId("strength-own").checked = false;
    shown();
  });
  let timer;
  byId("play").addEventListener("input", () => {
    shown();
    clearTimeout(timer);
    timer = setTimeout(changed, 250);
  });
  byId("play").addEventListener("submit", (event) => event.preventDefault());
  shown();
}

function shown() {
  byId("strength-shown").textContent = byId("strength-own").checked ? "each profile's own" : number(byId("strength").value);
}

export const chosen = () => [...byId("profiles-on").querySelectorAll("input:checked")].map((input) => input.value);

/** Sampling alone: what both sides share. */
export function sampling() {
  const found = { temperature: Number(byId("temperature").value), max_tokens: Number(byId("max-tokens").value) };
  if (byId("seed").value !== "") found.seed = Number(byId("seed").value);
  return found;
}

/** The steered side's fields. `all`: the names of every loaded profile. `strength`: in place of the slider's. */
export function steering(all, strength = undefined) {
  const names = chosen();
  const found = {};
  if (names.length !== all.length) found.steer_profiles = names;
  const value = strength ?? (byId("strength-own").checked ? undefined : Number(byId("strength").value));
  if (value !== undefined && names.length) found.steer_strength = value;
  if (byId("gate").value !== "auto" && names.length) found.steer_gate = byId("gate").value;
  if (byId("positions").value && names.length) found.steer_positions = byId("positions").value;
  return found;
}
