// Disassembly with points to click, the stack, and the points that stop the machine.

import { Pane } from "./pane.js";
import { button, field, h, onEnter } from "../dom.js";

// ADDRESS <SYMBOL>: BYTES  TEXT, as docs/files.md has it.
const LINE = /^0x([0-9a-f]+)(?: <(.*?)>)?: ((?:[0-9a-f]{2} )+) *(.*)$/;

export class Code extends Pane {
  constructor(view) {
    super(view, "code", "Disassembly");
    this.at = "";
    this.rows = [];
    this.points = new Map();
    this.where = onEnter(field("Address, symbol or FILE:LINE (empty: rip)"), (at) => this.goTo(at));
    this.tools.append(this.where, button("rip", "Go on at rip", () => this.goTo("")),
      button("Symbols", "Find the symbols of the Linux that runs", () => view.do("symbols", { find: true })));
    this.list = h("ol", { class: "lines mono", "aria-label": "Instructions" });
    this.body.append(this.list);
  }

  sources() {
    return { disasm: this.at ? { at: this.at } : {}, points: {} };
  }

  goTo(at) {
    this.at = at;
    this.where.value = at;
    if (!this.isOpen) this.open(true);
    this.root.scrollIntoView({ block: "nearest" });
    this.view.refresh();
  }

  render(source, data) {
    if (source === "points") {
      this.points = new Map(data.filter((point) => point.at).map((point) => [BigInt(point.at), point]));
    } else {
      this.rip = data.rip === null ? this.rip : BigInt(data.rip);
      this.followsRip = data.rip !== null;
      this.rows = data.lines.map((line) => {
        const match = LINE.exec(line);
        return match ? { address: BigInt(`0x${match[1]}`), symbol: match[2] ?? "", bytes: match[3], text: match[4] } : { line };
      });
    }
    this.lay();
  }

  lay() {
    let symbol = "";
    const focused = document.activeElement?.dataset?.address;
    const items = [];
    for (const row of this.rows) {
      if (row.line !== undefined) {
        items.push(h("li", { class: "dim" }, row.line));
        continue;
      }
      const base = row.symbol.replace(/\+0x[0-9a-f]+$/, "");
      if (base && base !== symbol) items.push(h("li", { class: "symbol" }, `${base}:`));
      symbol = base;
      items.push(this.row(row));
    }
    const top = this.list.scrollTop;
    this.list.replaceChildren(...items);
    const here = this.list.querySelector(".here");
    if (here && this.shownRip !== this.rip) this.list.scrollTop = here.offsetTop - this.list.offsetTop - this.list.clientHeight / 3;
    else this.list.scrollTop = top;
    this.shownRip = this.rip;
    if (focused) this.list.querySelector(`[data-address="${CSS.escape(focused)}"]`)?.focus();
  }

  row(row) {
    const point = this.points.get(row.address);
    const here = row.address === this.rip && this.followsRip;
    const text = `0x${row.address.toString(16)}`;
    const gutter = h("button", { type: "button", class: "gutter plain", "data-address": text, "aria-pressed": String(Boolean(point)),
      title: point ? `Delete the breakpoint (${point.hits} hits)` : "Set a breakpoint", "aria-label": `Breakpoint at ${text}`,
      onclick: () => this.view.do("debug", { line: point ? `delete ${point.id}` : `break ${text}` }) }, point ? "●" : "○");
    return h("li", { class: here ? "here" : null, "aria-current": here ? "true" : null }, gutter,
      button(row.address.toString(16).padStart(8, "0"), `Run to ${text}`, () => this.view.do("until", { at: text }), { class: "plain address" }),
      h("span", { class: "bytes dim" }, row.bytes), h("span", { class: "text" }, row.text));
  }

  // The address after the call at rip; nothing where there is none.
  afterCall() {
    const at = this.rows.findIndex((row) => row.address === this.rip);
    if (at < 0 || !/^call\b/.test(this.rows[at].text) || !this.rows[at + 1]?.address) return "";
    return `0x${this.rows[at + 1].address.toString(16)}`;
  }
}

// #N ADDRESS SYMBOL at WHERE
const FRAME = /^(#\d+|\?) +0x([0-9a-f]+)(.*)$/;

export class Stack extends Pane {
  constructor(view) {
    super(view, "stack", "Stack");
    this.list = h("ol", { class: "lines mono", "aria-label": "Callers" });
    this.body.append(this.list);
  }

  sources() {
    return { stack: {} };
  }

  render(_, lines) {
    this.list.replaceChildren(...lines.map((line) => {
      const match = FRAME.exec(line);
      if (!match) return h("li", {}, line);
      return h("li", { class: match[1] === "?" ? "dim" : null }, h("span", { class: "frame" }, match[1]),
        button(match[2].replace(/^0+(?=.{8})/, ""), "Show its code", () => this.view.showCode(`0x${match[2]}`), { class: "plain address" }),
        h("span", { class: "text" }, match[3].trim()));
    }));
  }
}

export class Points extends Pane {
  constructor(view) {
    super(view, "points", "Stops");
    this.line = onEnter(field("break start_kernel if rdi==0", { "aria-label": "A point: break, watch, iobreak, catch or on" }), async (line) => {
      if (line && await view.do("debug", { line }) !== undefined) this.line.value = "";
    });
    this.tools.append(this.line);
    this.list = h("ul", { class: "lines mono", "aria-label": "Points" });
    this.body.append(this.list);
  }

  sources() {
    return { points: {} };
  }

  render(_, points) {
    this.list.replaceChildren(...points.map((point) => {
      const disabled = / disabled\b/.test(point.what);
      return h("li", {}, h("span", { class: "frame" }, String(point.id)), h("span", { class: disabled ? "text dim" : "text" }, point.what),
        button(disabled ? "enable" : "disable", `${disabled ? "Enable" : "Disable"} ${point.id}`,
          () => this.view.do("debug", { line: `${disabled ? "enable" : "disable"} ${point.id}` }), { class: "plain" }),
        button("×", `Delete ${point.id}`, () => this.view.do("debug", { line: `delete ${point.id}` }), { class: "plain" }));
    }));
    if (!points.length) this.list.append(h("li", { class: "dim" }, "None. Click beside an instruction, or write one here."));
  }
}
