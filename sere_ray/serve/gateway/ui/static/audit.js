// Who changed what. Entries hold strings of users: they become text, never HTML.

import { byId, changes, element, plain } from "./format.js";

let shown = "";

/** Show the log, newest first; `restore(policy)` puts a version's values into the form. */
export function showAudit(entries, restore) {
  const content = JSON.stringify(entries);
  if (content === shown) return; // keep the place and the focus of who reads it
  shown = content;
  byId("audit").replaceChildren(...entries.toReversed().map((entry) => line(entry, restore)));
}

function line(entry, restore) {
  const at = new Date(entry.time);
  const time = element("time", { datetime: entry.time, title: entry.time },
    Number.isNaN(at.getTime()) ? entry.time : at.toLocaleString("en-GB"));
  const head = element("p", {}, time, " ", element("b", {}, String(entry.who)), ` ${entry.what}`);
  const item = element("li", { class: entry.refused ? "refused" : null }, head, element("p", {}, summary(entry)));
  if (entry.after?.policy) {
    head.append(` → version ${entry.after.version} `);
    const button = element("button", { type: "button", class: "link" }, "load into form");
    button.setAttribute("aria-label", `Load version ${entry.after.version} into the policy form`);
    const { policy } = entry.after;
    button.addEventListener("click", () => restore({ ...policy, mode: entry.mode ?? policy.mode }));
    head.append(button);
  }
  return item;
}

function summary(entry) {
  return [entry.reason && `level ${entry.level}: ${entry.reason}.`, changed(entry)].filter(Boolean).join(" ");
}

function changed({ refused, before, after, what, mode, reason }) {
  if (refused) return `refused: ${refused}`;
  if (what === "artifact") return `artifact ${after.sha256.slice(0, 12)}, was ${before.sha256.slice(0, 12)}`;
  if (before) {
    const asked = mode === "auto" && !reason ? ["mode auto"] : [];
    return [...asked, ...changes(before, after.policy)].join(", ") || "nothing differs";
  }
  return Object.entries(after?.policy ?? {}).filter(([name, value]) => !["similarity", "masks"].includes(name) && value !== null)
    .map(([name, value]) => `${name} ${plain(value)}`).join(", ");
}
