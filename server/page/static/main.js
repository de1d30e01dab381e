// The page: which view is shown, what the server serves, and how problems are told.

import * as api from "./api.js";
import * as compare from "./compare.js";
import { byId } from "./dom.js";
import * as play from "./play.js";
import * as profiles from "./profiles.js";
import * as watch from "./watch.js";

let cards = [];

/** Say what is wrong, or with null that nothing is. A wrong or missing key is asked for. */
function report(problem) {
  const wantsKey = problem?.status === 401;
  byId("key-form").hidden = !wantsKey;
  byId("problem").hidden = !problem || (wantsKey && !api.key());
  byId("problem").textContent = problem ? problem.message : "";
  if (wantsKey) byId("key").focus();
}

async function begin() {
  try {
    const [models, loaded] = await Promise.all([api.get("v1/models"), api.get("v1/steering/profiles")]);
    const model = models.data.find((card) => card.parent === null) ?? models.data[0];
    cards = loaded.data.map((card) => ({ ...card, default: model.steer_profiles.includes(card.id) }));
    byId("serving").textContent = `${model.id}, ${cards.length ? `steered by ${cards.map((card) => card.id).join(", ")}` : "no profile loaded"}`;
    report(null);
    play.setUp(cards, () => compare.follow(report));
    compare.setUp(model.id, cards, report);
    profiles.show(cards, report);
  } catch (error) {
    byId("serving").textContent = "";
    report(error);
  }
}

function view(name) {
  for (const section of ["compare", "watch", "profiles"]) byId(section).hidden = section !== name;
  document.querySelectorAll("nav button").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.view === name)));
  if (name === "watch") watch.open(cards, report);
  else watch.close();
}

document.querySelectorAll("nav button").forEach((button) => button.addEventListener("click", () => view(button.dataset.view)));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.useKey(byId("key").value);
  begin();
});
begin();
