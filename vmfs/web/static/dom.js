// Elements. Text that comes from a guest, a file or a user becomes text nodes and nothing else: there is no innerHTML here.

export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function button(text, title, action, properties = {}) {
  return h("button", { type: "button", title, "aria-label": properties.label ?? title, onclick: action, ...properties }, text);
}

export function field(label, properties = {}) {
  return h("input", { type: "text", "aria-label": label, placeholder: label, spellcheck: "false", autocomplete: "off",
    autocapitalize: "off", ...properties });
}

// Runs an action on Enter.
export function onEnter(input, action) {
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    action(input.value.trim());
  });
  return input;
}

let fading;

// A sentence for whoever looks: what failed, or what was done.
export function say(text, kind = "bad") {
  const box = document.getElementById("said");
  box.replaceChildren(h("p", { class: kind }, text,
    button("×", "Dismiss", () => box.replaceChildren(), { class: "plain" })));
  clearTimeout(fading);
  fading = setTimeout(() => box.replaceChildren(), kind === "bad" ? 12000 : 4000);
}

// A question with one line for an answer, or none; what was answered, null for no.
export function ask(title, { text = "", value, yes = "OK", danger = false } = {}) {
  return new Promise((resolve) => {
    const input = value === undefined ? null : field(title, { value });
    const form = h("form", { method: "dialog" },
      h("h2", {}, title), text && h("p", {}, text), input,
      h("p", { class: "row end" }, h("button", { value: "no", formnovalidate: true }, "Cancel"),
        h("button", { value: "yes", class: danger ? "danger" : "main" }, yes)));
    const dialog = h("dialog", { "aria-label": title }, form);
    document.body.append(dialog);
    if (input) onEnter(input, () => dialog.close("yes"));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes" ? (input ? input.value.trim() : true) : null);
    });
    dialog.showModal();
    (input ?? form.querySelector("button[value=yes]")).focus();
    input?.select();
  });
}

export function bytes(count) {
  for (const [letter, unit] of [["G", 2 ** 30], ["M", 2 ** 20], ["K", 2 ** 10]]) {
    if (count >= unit) return `${Number((count / unit).toPrecision(3))}${letter}`;
  }
  return `${count ?? "-"}`;
}

export function grouped(number) {
  return String(number).replace(/\B(?=(\d{3})+$)/g, "\u202f");
}

export function remembered(key, value) {
  try {
    if (value === undefined) return JSON.parse(localStorage.getItem(`vmfs.${key}`));
    localStorage.setItem(`vmfs.${key}`, JSON.stringify(value));
  } catch { /* a browser that keeps nothing */ }
  return null;
}
