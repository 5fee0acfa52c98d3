// The policy as a form, built from the schema of PUT /sere/policy: new keys appear by themselves.
// Nothing is checked here; the server's own message is shown at the field it names.

import { byId, changes, element, plain, say } from "./format.js";

/** Builds the form once and keeps it at the newest policy, but for what is being edited. */
export class PolicyForm {
  #fields = [];
  #policy = {};
  #apply = element("button", { type: "submit", class: "primary" }, "Apply");
  #reset = element("button", { type: "button" }, "Undo edits");
  #difference = element("p", { class: "note" });
  #message = element("p", { role: "status" });

  /** `put(changes)` sends them and returns the new status. */
  constructor(schema, put) {
    const form = byId("policy");
    const properties = Object.entries(schema.properties);
    properties.sort(([a], [b]) => (b === "mode") - (a === "mode")); // the mode first
    this.#fields = properties.map(([name, about]) => makeField(name, about));
    form.replaceChildren(
      ...this.#fields.map((field) => field.root),
      this.#difference,
      element("div", { class: "row" }, this.#apply, this.#reset),
      this.#message,
    );
    form.addEventListener("input", () => this.#edited());
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send(put);
    });
    this.#reset.addEventListener("click", () => this.fill(this.#policy));
  }

  /** Show a status of the server. */
  show(status) {
    const edited = this.#edits();
    this.#policy = { ...status.policy, mode: status.mode }; // auto, where the engines have on or off
    for (const field of this.#fields) {
      if (!(field.name in edited)) field.write(this.#policy[field.name]);
    }
    this.#edited();
    const { replicas, replicas_settled: settled, version } = status;
    say(byId("settled"), `version ${version} on ${settled} of ${replicas} ranks`);
    const progress = byId("settling");
    progress.hidden = settled >= replicas;
    [progress.max, progress.value] = [Math.max(replicas, 1), settled];
  }

  /** The fields that the chosen rule has. */
  get #shown() {
    const rule = this.#fields.find((field) => field.name === "rule")?.read();
    return this.#fields.filter((field) => field.rules?.includes(rule) ?? true);
  }

  /** Put values into the fields, as edits. */
  fill(policy) {
    for (const field of this.#fields) field.write(policy[field.name]);
    this.#edited();
  }

  #edits() {
    const shown = this.#shown; // a key that another rule had is taken back
    const entries = this.#fields.map((field) => [field.name, shown.includes(field) ? field.read() : null]);
    return Object.fromEntries(entries.filter(([name, value]) => plain(value) !== plain(this.#policy[name])));
  }

  #edited() {
    const edits = this.#edits();
    const names = Object.keys(edits);
    const shown = this.#shown;
    this.#apply.disabled = this.#reset.disabled = names.length === 0;
    say(this.#difference, changes(this.#policy, { ...this.#policy, ...edits }).join(", "));
    for (const field of this.#fields) {
      field.root.hidden = !shown.includes(field);
      field.root.classList.toggle("edited", field.name in edits);
    }
  }

  async #send(put) {
    for (const field of this.#fields) field.complain("");
    this.#message.className = "";
    say(this.#message, "Waiting for the ranks …");
    this.#apply.disabled = true;
    try {
      const status = await put(this.#edits());
      this.show(status);
      const { version, replicas, replicas_settled: settled } = status;
      say(this.#message, settled < replicas
        ? `Version ${version} stands; ${settled} of ${replicas} ranks run it so far.`
        : `Version ${version} runs on all ${replicas} ranks.`);
    } catch (error) {
      this.#refused(error.message);
    }
    this.#edited();
  }

  #refused(message) {
    const named = this.#fields.find((field) => message.includes(`policy.${field.name} `));
    named?.complain(message);
    this.#message.className = "error";
    say(this.#message, named ? "Refused; nothing has changed." : message);
  }
}

/** {name, rules, root, read(), write(value), complain(message)} of one key. */
function makeField(name, about) {
  const id = `policy-${name}`;
  const error = element("p", { class: "error", id: `${id}-error`, role: "alert" });
  const note = element("p", { class: "note", id: `${id}-note` }, (about.description ?? "").replaceAll("`", ""));
  const describedby = `${id}-note ${id}-error`;
  const makeControl = about.enum ? choose : type;
  const control = makeControl(name, about, describedby);
  const root = element("div", { class: "field" }, control.root, note, error);
  return {
    name,
    rules: about["x-rules"],
    root,
    ...control.value,
    complain(message) {
      say(error, message);
      for (const input of control.inputs) input.setAttribute("aria-invalid", String(message !== ""));
      if (message) control.inputs[0].focus();
    },
  };
}

/** Radio buttons for a few values. */
function choose(name, { enum: choices }, describedby) {
  const inputs = choices.map((choice) =>
    element("input", { type: "radio", name, value: plain(choice), "aria-describedby": describedby }));
  const labels = inputs.map((input) => element("label", {}, input, element("span", {}, input.value)));
  return {
    inputs,
    root: element("fieldset", {}, element("legend", {}, name), element("div", { class: "switch" }, ...labels)),
    value: {
      read: () => choices[inputs.findIndex((input) => input.checked)] ?? null,
      write: (value) => inputs.forEach((input) => (input.checked = input.value === plain(value))),
    },
  };
}

/** A text field; JSON but for strings, empty = null. */
function type(name, about, describedby) {
  const kinds = (about.anyOf ?? [about]).map((kind) => kind.type);
  const isText = kinds.includes("string");
  const input = element("input", {
    id: `policy-${name}`,
    type: "text",
    inputmode: kinds.includes("integer") ? "numeric" : kinds.includes("number") ? "decimal" : null,
    autocomplete: "off",
    placeholder: kinds.includes("null") ? "null" : null,
    readonly: "const" in about,
    "aria-describedby": describedby,
  });
  return {
    inputs: [input],
    root: element("div", { class: "row" }, element("label", { for: input.id }, name), input),
    value: {
      read() {
        const text = input.value.trim();
        if (text === "" || isText) return text || null;
        try {
          return JSON.parse(text);
        } catch {
          return text; // the server says what is wrong with it
        }
      },
      write(value) {
        input.value = value === null || value === undefined ? "" : plain(value);
      },
    },
  };
}
