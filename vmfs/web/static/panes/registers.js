// Registers: what has changed since the stop before is marked, and each can be set.

import { Pane } from "./pane.js";
import { button, field, h } from "../dom.js";

const GENERAL = ["rip", "rsp", "rbp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rflags"];
const SYSTEM = ["cs", "ss", "ds", "es", "fs", "gs", "fs.base", "gs.base", "tr", "ldt", "gdtr.base", "idtr.base", "cr0", "cr2", "cr3", "cr4", "cr8", "efer"];
const FLAGS = [[0, "CF"], [2, "PF"], [4, "AF"], [6, "ZF"], [7, "SF"], [8, "TF"], [9, "IF"], [10, "DF"], [11, "OF"], [14, "NT"], [16, "RF"], [17, "VM"], [18, "AC"]];
const POINTERS = new Set(["rip", "rsp", "rbp"]);

export class Registers extends Pane {
  constructor(view) {
    super(view, "registers", "Registers");
    this.values = new Map();
    this.cells = new Map();
    this.changed = new Map();
    this.find = field("Find a register", { type: "search", oninput: () => this.lay() });
    this.all = h("input", { type: "checkbox", onchange: () => this.lay() });
    this.mode = h("span", { class: "tag" });
    this.tools.append(this.mode, this.find, h("label", { class: "check" }, this.all, "all"));
    this.grid = h("div", { class: "values" });
    this.body.append(this.grid);
  }

  sources() {
    return { registers: {} };
  }

  forget() {
    this.values.clear();
  }

  render(_, { mode, rows }) {
    const before = this.values;
    this.values = new Map(rows);
    this.changed = new Map();
    if (before.size) {
      for (const [name, value] of rows) if (before.has(name) && before.get(name) !== value) this.changed.set(name, before.get(name));
    }
    this.mode.textContent = mode;
    this.lay();
  }

  shown() {
    const find = this.find.value.trim().toLowerCase();
    if (find) return [...this.values.keys()].filter((name) => name.includes(find)).slice(0, 200);
    const usual = [...GENERAL, ...SYSTEM].filter((name) => this.values.has(name));
    return this.all.checked ? [...usual, ...[...this.values.keys()].filter((name) => !usual.includes(name))] : usual;
  }

  lay() {
    if (this.grid.querySelector("input")) return;  // somebody writes a value
    const names = this.shown();
    const key = names.join(" ");
    if (key !== this.laid) {
      this.laid = key;
      this.cells = new Map(names.map((name) => [name, this.cell(name)]));
      this.grid.replaceChildren(...[...this.cells.values()].map((cell) => cell.root));
    }
    for (const [name, cell] of this.cells) this.fill(name, cell);
  }

  cell(name) {
    const value = h("button", { type: "button", class: "value plain", onclick: () => this.edit(name) });
    const more = h("span", { class: "dim flags" });
    const title = POINTERS.has(name)
      ? button(name, `Look at ${name}`, () => (name === "rip" ? this.view.showCode("") : this.view.showMemory(name)), { class: "plain name" })
      : h("span", { class: "name" }, name);
    return { root: h("div", { class: "register", "data-name": name }, title, value, name === "rflags" ? more : null), value, more };
  }

  fill(name, { root, value, more }) {
    const text = this.values.get(name);
    const short = /^0x0{8,}/.test(text) && text.length > 18 ? text.replace(/^0x0+(?=.)/, "0x") : text;
    value.textContent = short.replace(/^0x/, "");
    const was = this.changed.get(name);
    root.classList.toggle("changed", was !== undefined);
    value.title = was === undefined ? `Set ${name}` : `Set ${name}; it was ${was}`;
    value.setAttribute("aria-label", `${name} ${text}${was === undefined ? "" : `, changed, was ${was}`}. Set it`);
    if (name === "rflags") {
      const bits = BigInt(text);
      more.textContent = FLAGS.filter(([bit]) => bits >> BigInt(bit) & 1n).map(([, flag]) => flag).join(" ");
    }
  }

  edit(name) {
    const cell = this.cells.get(name);
    let isDone = false;
    const done = async (value) => {
      if (isDone) return;  // an input that is taken away has a blur, too
      isDone = true;
      input.replaceWith(cell.value);
      cell.value.focus();
      this.lay();
      if (value !== null) await this.view.do("set-register", { name, value });
    };
    const input = field(`New value of ${name}`, { value: this.values.get(name), onblur: () => done(null) });
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();  // else the button that has the focus then is pressed by it
      done(event.key === "Enter" ? input.value.trim() : null);
    });
    cell.value.replaceWith(input);
    input.focus();
    input.select();
  }
}
